"""Keys and values of one context for all layers of a stack, and of the steps decoded so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from mmfast.nn._layer_streams import Stream, open_stream
from mmfast.nn._layers import Context, context_of, open_context, plain_attention, run_layer
from mmfast.nn._plain import unwrapped
from mmfast.nn._streams import Source
from mmfast.nn._sublayers import apply_norm
from mmfast.nn.multihead_attention import MultiheadAttention
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext
from mmfast.planning import Plan

_OP = "ContextCache"


class ContextCache:
    """What `prepare_context` of a stack returns: one `ProjectedContext` for each layer.

    Passed to the stack in place of the context, it saves projecting the context again, with the
    same results; gradients reach the context and each layer's own weights. It holds no weights:
    after a training step make a new one. `step` of the stack also keeps the keys and values of the
    tokens decoded so far in it; `length` counts them.

    Args:
        contexts: one `ProjectedContext` for each layer, all of one batch on one device.

    Attributes: `contexts`, `length`, `batch`, `device`, `dtype`, `holes` (the context had padding
    that was not on the right; a `memory_mask` cannot be applied any more).

    Raises:
        ValueError: no context, or contexts of different batches or devices.

    Example:
        >>> import torch, mmfast
        >>> layer = mmfast.nn.CrossModalEncoderLayer(64, 4, context_dim=96)
        >>> stack = mmfast.nn.CrossModalEncoder(layer, num_layers=2).eval()
        >>> image = torch.randn(2, 9, 96)
        >>> cache = stack.prepare_context(image, torch.tensor([9, 4]))
        >>> for _ in range(3):
        ...     out = stack.step(torch.randn(2, 1, 64), cache)
        >>> out.shape, cache.length
        (torch.Size([2, 1, 64]), 3)
        >>> cache.select(torch.tensor([0, 0, 1])).batch  # beam search: item 0 goes on twice
        3
    """

    def __init__(self, contexts: Sequence[ProjectedContext]) -> None:
        if len(contexts) == 0:
            raise ValueError(f"{_OP}: there are no contexts; give one for each layer")
        first = contexts[0]
        for number, context in enumerate(contexts):
            if context.batch != first.batch or context.device != first.device:
                raise ValueError(
                    f"{_OP}: layer {number} has a context of batch {context.batch} on "
                    f"{context.device} but layer 0 one of batch {first.batch} on {first.device}; "
                    f"prepare all from one context"
                )
        self.contexts = tuple(contexts)
        self.length = 0
        self.holes = False
        self._past: list[_Past] = []

    @property
    def batch(self) -> int:
        """The number of items."""
        return self.contexts[0].batch

    @property
    def device(self) -> torch.device:
        """Of the keys."""
        return self.contexts[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys."""
        return self.contexts[0].dtype

    def reset(self) -> None:
        """Forget the decoded steps, not the context."""
        self.length = 0
        self._past = []

    def to(self, *args: Any, **named: Any) -> ContextCache:
        """With keys and values of another device or floating dtype, as `Tensor.to` takes them."""
        return self._with(
            [context.to(*args, **named) for context in self.contexts],
            [past.map(lambda x: x.to(*args, **named)) for past in self._past],
        )

    def select(self, items: Tensor) -> ContextCache:
        """Item `items[i]` as item i, decoded steps included: for beam search."""
        return self._with(
            [context.select(items) for context in self.contexts],
            [past.map(lambda x: x.index_select(0, items)) for past in self._past],
        )

    def _with(self, contexts: list[ProjectedContext], past: list[_Past]) -> ContextCache:
        other = ContextCache(contexts)
        other.length, other.holes, other._past = self.length, self.holes, past
        return other

    def check(self, op: str, layers: int, stream: Stream) -> None:
        """ValueError, in the name of `op`, unless a stack of `layers` layers can use this."""
        if len(self.contexts) != layers:
            raise ValueError(
                f"{op}: the context cache was made for {len(self.contexts)} layers but the stack "
                f"has {layers}; call its own prepare_context"
            )
        if self.batch != stream.batch:
            raise ValueError(
                f"{op}: the context cache was made for a batch of {self.batch} but tgt has "
                f"{stream.batch}; call prepare_context again, or reorder it with select"
            )
        if self.device != stream.values.device:
            raise ValueError(
                f"{op}: the context cache is on {self.device} but tgt is on "
                f"{stream.values.device}; call prepare_context again, or move it with to"
            )

    def _step_past(self, layers: int) -> list[_Past]:
        if not self._past:
            self._past = [_Past() for _ in range(layers)]
        for past in self._past:
            past.start = self.length
        return self._past

    def __repr__(self) -> str:
        return (
            f"ContextCache(layers={len(self.contexts)}, batch={self.batch}, "
            f"length={self.length}, {self.contexts[0]!r})"
        )


class _Past:
    """Keys and values of the tokens that a layer has decoded; room for more is kept in advance."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.start = 0

    def append(self, attention: MultiheadAttention, x: Tensor) -> ProjectedContext:
        """The keys of `x` `[B, n, C]` behind the first `start`; all of them."""
        fresh = attention.prepare_context(x)
        end = self.start + x.shape[1]
        self.k, k = self._put(self.k, fresh.k, end)
        self.v, v = self._put(self.v, fresh.v, end)
        return ProjectedContext(k, v)

    def _put(self, buffer: Tensor | None, fresh: Tensor, end: int) -> tuple[Tensor, Tensor]:
        if buffer is None or buffer.shape[2] < end:
            room = max(32, 2 * end)
            grown = fresh.new_empty(fresh.shape[0], fresh.shape[1], room, fresh.shape[3])
            if buffer is not None:
                grown[:, :, : self.start] = buffer[:, :, : self.start]
            buffer = grown
        buffer[:, :, self.start : end] = fresh
        return buffer, buffer[:, :, :end]

    def map(self, function: Any) -> _Past:
        """With other tensors."""
        other = _Past()
        other.start = self.start
        other.k = None if self.k is None else function(self.k)
        other.v = None if self.v is None else function(self.v)
        return other


def project_for_all(layers: Sequence[Any], context: Any, lens: Tensor | None) -> ContextCache:
    """Keys and values of a context (padded with `lens`, or packed) for the layers.

    On accelerators one product for all layers. On a CPU one for each: there the joint product is
    0.83 to 1.01 times as fast, 0.64 to 0.98 with joining the weights (docs/encoders.md).
    """
    attentions = [layer.multihead_attn for layer in layers]
    values = context.values if isinstance(context, PackedTokens) else context
    if values.is_cpu or len(attentions) == 1:
        return ContextCache([a.prepare_context(context, lens) for a in attentions])
    return ContextCache(project_jointly(attentions, context, lens))


def project_jointly(
    attentions: Sequence[MultiheadAttention], context: Any, lens: Tensor | None
) -> list[ProjectedContext]:
    """One product for all; keys and values of each layer are views of its result."""
    packed = isinstance(context, PackedTokens)
    values = context.values if packed else context
    parts = [attention.kv_weights() for attention in attentions]
    weight = torch.cat([part[0] for part in parts])
    biases = [part[1] for part in parts if part[1] is not None]
    projected = F.linear(values, weight, torch.cat(biases) if biases else None)
    contexts = []
    widths = [part[0].shape[0] for part in parts]
    for attention, both in zip(attentions, projected.split(widths, dim=-1), strict=True):
        k, v = attention.kv_heads(both)
        if packed:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            made = ProjectedContext(k, v, cu_seqlens=context.cu_seqlens, max_len=context.length)
        else:
            made = ProjectedContext(k.transpose(1, 2), v.transpose(1, 2), lens=lens)
        contexts.append(made)
    return contexts


def _hoists(context: Context, queries: Stream, layers: Sequence[Any]) -> bool:
    """Is one product for all layers worth it within a call? On a CPU it is not.

    Nor where a layer would rather not project the context at all: the plan "absorbed".
    """
    source = context.source
    values = source.values if isinstance(source, PackedTokens) else source
    if not isinstance(values, Tensor) or values.is_cpu or len(layers) < 2:
        return False
    if not all(plain_attention(layer.multihead_attn) for layer in layers):
        return False
    attention: MultiheadAttention = layers[0].multihead_attn
    packed = queries.tokens if queries.packed else None
    lens = None if isinstance(source, PackedTokens) else context.options.get("context_lens")
    plan = attention._plan_for(queries.values, Source(source, lens), packed)
    return plan != "absorbed"


class Caching(Module):
    """`prepare_context` and `step` of a stack; `_blank` as of `run_layer`."""

    _blank = False
    layers: Any
    norm: Any

    def prepare_context(
        self,
        memory: Any,
        memory_lens: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> ContextCache:
        """Keys and values of `memory` for every layer, to be passed in its place.

        Args:
            memory: `[B, M, C]` (`[M, B, C]` unless `batch_first`), `PackedTokens` or a jagged
                nested tensor.
            memory_lens: `[B]` integers: its valid rows.
            memory_key_padding_mask: bool or float `[B, M]`, as of `torch.nn`; give one of the two.
                Looked at on the host: on an accelerator that waits for the device.

        Raises:
            TypeError, ValueError: wrong types, shapes, widths; a mask of more than 0 and -inf.
        """
        op = f"{type(self).__name__}.prepare_context"
        self._require_ours(op)
        crossing = self._crossing()
        first = crossing[0].multihead_attn
        width = first.kdim
        if memory_key_padding_mask is not None and not memory_key_padding_mask.is_cpu:
            memory_key_padding_mask = memory_key_padding_mask.cpu()
        stream = open_stream(
            op, "memory", memory, width, memory_key_padding_mask, memory_lens,
            batch_first=first.batch_first, work=2**62,
        )  # fmt: skip
        if stream.bias is not None:
            raise ValueError(
                f"{op}: the padding mask adds scores other than 0 and -inf, which a cache does not "
                f"keep; pass them as memory_mask"
            )
        holes = stream.origin is not None and stream.origin.positions is not None
        if stream.pad is not None and stream.lens is None:
            raise ValueError(
                f"{op}: which rows the padding mask leaves cannot be read here (torch.compile, "
                f"torch.func); give memory_lens, or prepare the context outside"
            )
        # Masks over the padded memory still fit, unless its rows moved together.
        tokens = stream.tokens if stream.origin is None or holes else stream.origin
        cache = project_for_all(crossing, tokens, stream.lens)
        cache.holes = holes
        return cache

    def explain(self, *sizes: int, **named: Any) -> Plan:
        """The plan of the first layer's attention to the memory: `MultiheadAttention.explain`."""
        self._require_ours(f"{type(self).__name__}.explain")
        return self._crossing()[0].multihead_attn.explain(*sizes, **named)

    @torch.no_grad()
    def step(self, tgt: Tensor, cache: ContextCache, tgt_is_causal: bool = True) -> Tensor:
        """The next tokens of a generation: as the last rows of a causal call with all tokens.

        Keys and values of the tokens are kept in `cache`, so that only new ones are computed.
        No gradients; call `eval()` first.

        Args:
            tgt: `[B, n, C]` (`[n, B, C]` unless `batch_first`): the tokens that follow the
                `cache.length` ones given before; n may be above 1 (a prompt).
            cache: of this stack's `prepare_context`.
            tgt_is_causal: among the new tokens, may one see only those before it?

        Raises:
            ValueError: a cache of another batch, device, number of layers or width.
        """
        op = f"{type(self).__name__}.step"
        self._require_ours(op)
        crossing = self._crossing()
        first = crossing[0].multihead_attn
        stream = open_stream(
            op, "tgt", tgt, first.embed_dim, batch_first=first.batch_first
        )  # fmt: skip
        if stream.packed:
            raise TypeError(f"{op}: tgt is ragged; give a padded tensor [B, n, C]")
        cache.check(op, len(crossing), stream)
        causal = tgt_is_causal and stream.length > 1
        options = {"is_causal": True} if causal else {}
        x = stream.values
        memories = iter(cache.contexts)
        for layer, past in zip(self.layers, cache._step_past(len(self.layers)), strict=True):
            context = None
            if layer.multihead_attn is not None:
                memory = next(memories)
                context = Context(memory, {}, memory.item_lens(), memory.keys == 0)
            x = run_layer(
                layer, stream, x, options, context, blank=self._blank,
                gate=getattr(layer, "cross_gate", None), past=past,
            )  # fmt: skip
        cache.length += stream.length
        return stream.close(x if self.norm is None else apply_norm(self.norm, x))

    def _contexts(
        self,
        op: str,
        queries: Stream,
        memory: Any,
        mask: Tensor | None,
        is_causal: bool,
        padding: Tensor | None,
        lens: Tensor | None,
        in_place: bool = False,
    ) -> list[Context]:
        """What each layer attends to: from a cache, or one memory opened once for all."""
        layers = self._crossing()
        if isinstance(memory, ContextCache):
            if padding is not None or lens is not None:
                raise ValueError(
                    f"{op}: a context cache knows its lengths, but a padding mask or lengths came "
                    f"with it; leave them out"
                )
            memory.check(op, len(layers), queries)
            if memory.holes and (mask is not None or is_causal):
                raise ValueError(
                    f"{op}: a memory_mask came, but the context cache was made with padding that "
                    f"is not on the right and has forgotten the positions; pass the memory itself"
                )
        else:
            first = layers[0]
            context = open_context(
                op, queries, memory, mask, padding, is_causal, first, lens=lens,
                batch_first=unwrapped(first.multihead_attn).batch_first,
                in_place=in_place or mask is not None,
            )  # fmt: skip
            if not _hoists(context, queries, layers):
                return [context] * len(layers)
            options = dict(context.options)
            joint = project_for_all(layers, context.source, options.pop("context_lens", None))
            return [context._replace(source=part, options=options) for part in joint.contexts]
        return [
            context_of(
                op, queries, part, mask, is_causal, unwrapped(layer.multihead_attn).num_heads
            )
            for layer, part in zip(layers, memory.contexts, strict=True)
        ]

    def _crossing(self) -> list[Any]:
        return [x for x in self.layers if getattr(x, "multihead_attn", None) is not None]

    def _require_ours(self, op: str) -> None:
        crossing = self._crossing()
        if not crossing:
            raise TypeError(f"{op}: no layer has a cross-attention, so there is nothing to prepare")
        for layer in crossing:
            if not plain_attention(layer.multihead_attn):
                raise TypeError(
                    f"{op}: the cross-attention of a layer is "
                    f"{type(layer.multihead_attn).__name__}, or has hooks; expected a "
                    f"mmfast.nn.MultiheadAttention: convert the stack with from_torch"
                )
