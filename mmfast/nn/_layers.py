"""How a transformer layer runs on a stream; encoder, decoder and cross-modal layers alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from mmfast.nn._attend_call import AttendCall
from mmfast.nn._layer_streams import Stream, conditions, open_stream
from mmfast.nn._plain import has_hooks, unwrapped
from mmfast.nn._sublayers import Sublayer, feed_forward, run_sublayers
from mmfast.nn._tokens import readable
from mmfast.nn.multihead_attention import MultiheadAttention
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext

_ATTENTIONS = ("self_attn", "multihead_attn")


class Context(NamedTuple):
    """What a stream attends to: `keys` is its form, `source` what `attend` takes."""

    source: Any
    """A padded tensor, `PackedTokens` or `ProjectedContext`; None: the stream itself, or nothing
    at all in the place of another stream."""
    options: dict[str, Any]
    lens: Tensor | None = None
    """`[B]`, where they are known."""
    empty: bool = False
    """There is no key in any item."""


class Asked(NamedTuple):
    """Which statistics of the attention a caller wants; those found are put into `found`."""

    importance: bool
    weights: bool | str
    found: dict[str, Any]


def run_layer(
    layer: Any,
    stream: Stream,
    x: Tensor,
    self_options: dict[str, Any],
    context: Context | None = None,
    *,
    blank: bool = False,
    gate: Tensor | None = None,
    asked: Asked | None = None,
    past: Any = None,
) -> Tensor:
    """The layer on the values of `stream`.

    `blank`: rows that may attend to nothing get nothing from an attention, not even the bias of its
    output projection. `past`: keys and values of earlier steps, which the new ones join.
    """
    self_attention: Any = getattr(layer, "self_attn", None)

    def attend_to_itself(h: Tensor) -> Tensor:
        source = None if past is None else past.append(self_attention, h)
        here = Context(source, self_options, lens=None)
        return _attend(self_attention, stream, h, here, blank, asked, "self_")

    def attend_to_context(h: Tensor) -> Tensor:
        assert context is not None
        if context.source is None:
            return torch.zeros_like(h)
        return _attend(layer.multihead_attn, stream, h, context, blank, asked, "")

    branches: list[tuple[Any, Tensor | None]] = []
    if self_attention is not None:
        branches.append((attend_to_itself, None))
    if context is not None:
        branches.append((attend_to_context, gate))
    branches.append((lambda h: feed_forward(layer, h), None))
    sublayers = [
        Sublayer(getattr(layer, f"norm{i}"), getattr(layer, f"dropout{i}"), branch, its_gate)
        for i, (branch, its_gate) in enumerate(branches, 1)
    ]
    return run_sublayers(x, sublayers, layer.norm_first)


def _attend(
    attention: Module,
    stream: Stream,
    h: Tensor,
    context: Context,
    blank: bool,
    asked: Asked | None,
    prefix: str,
) -> Tensor:
    options = context.options
    # Which rows see nothing follows from lengths alone, or else from the log-sum-exp.
    by_lse = blank and (
        "mask" in options or "bias" in options or options.get("context_segments") is not None
    )
    importance, weights = (asked.importance, asked.weights) if asked else (False, False)
    wanted = {"return_lse": by_lse, "return_importance": importance, "return_weights": weights}
    found: dict[str, Any] = {}
    call = AttendCall(h, stream.holding, context.source, {**options, **wanted}, found)
    if isinstance(attention, MultiheadAttention) and not has_hooks(attention):
        values = call.run(attention)
    else:
        values = attention(call, None, None)[0]
    if asked is not None:
        asked.found[f"{prefix}importance"] = found.get("importance")
        asked.found[f"{prefix}weights"] = found.get("weights")
    if not blank:
        return values
    dead = _dead_rows(stream, context, found["lse"] if by_lse else None)
    return values if dead is None else values.masked_fill(dead.unsqueeze(-1), 0.0)


def _dead_rows(stream: Stream, context: Context, lse: Tensor | None) -> Tensor | None:
    """bool `[B, N]` (or broadcast) or `[T]`: rows that may attend to nothing; None: none."""
    if lse is not None:
        dead = (lse == -torch.inf).all(dim=1)
        if not stream.packed:
            return dead
        index = stream.tokens.padded_index(dead.shape[1]) if dead.numel() else None
        return dead.flatten() if index is None else dead.flatten().index_select(0, index)
    if context.empty:
        return torch.ones(stream.values.shape[:-1], dtype=torch.bool, device=stream.values.device)
    if context.lens is None:
        return None
    dead = context.lens == 0
    if readable(dead) and not dead.any():
        return None
    dead = dead.to(stream.values.device)
    return dead.index_select(0, stream.tokens.items) if stream.packed else dead.unsqueeze(1)


def open_context(
    op: str,
    queries: Stream,
    memory: Any,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    layer: Any,
    *,
    lens: Tensor | None = None,
    batch_first: bool = True,
    in_place: bool = False,
) -> Context:
    """`memory` as what the cross-attention of `layer` takes.

    `in_place`: see `open_stream`.
    """
    attention = unwrapped(layer.multihead_attn)
    if memory is None:
        return Context(None, {}, empty=True)
    if isinstance(memory, ProjectedContext):
        if padding is not None or lens is not None:
            raise ValueError(
                f"{op}: memory was projected before and knows its lengths, but a padding mask or "
                f"lengths came with it; leave them out"
            )
        return context_of(op, queries, memory, mask, is_causal, attention.num_heads)
    width = attention.kdim
    keys = open_stream(
        op, "memory", memory, width, padding, lens, batch_first=batch_first,
        work=2 * width * attention.embed_dim, in_place=in_place,
    )  # fmt: skip
    if keys.batch != queries.batch:
        raise ValueError(
            f"{op}: memory has a batch of {keys.batch} but tgt has {queries.batch}; both must "
            f"match; give an item without context the length 0"
        )
    options = conditions(op, queries, keys, mask, is_causal, attention.num_heads)
    lens = keys.tokens.lens if keys.packed else keys.lens
    return Context(keys.tokens, options, lens, keys.length == 0)


def context_of(
    op: str, queries: Stream, projected: ProjectedContext, mask: Any, causal: bool, heads: int
) -> Context:
    """Keys and values that were projected before, as what a cross-attention takes."""
    # What `conditions` asks of padded keys: their batch and number, without memory.
    shape = torch.empty(1, device="meta").expand(projected.batch, projected.keys, 1)
    options = conditions(op, queries, Stream(shape), mask, causal, heads)
    return Context(projected, options, projected.item_lens(), projected.keys == 0)


# --- layers of torch and ours ------------------------------------------------------------------


def share_attention(attention: Any) -> Any:
    """`attention` by mmfast, on the same parameters; what is no attention of torch stays itself."""
    if type(attention) is torch.nn.MultiheadAttention:
        return MultiheadAttention.from_torch(attention)
    return attention


def plain_attention(attention: Any) -> bool:
    """May `attend` stand for calling the module?"""
    return isinstance(attention, MultiheadAttention) and our_attention(attention)


def our_attention(attention: Any) -> bool:
    """May `run_layer` stand for the forward of a layer with this attention, wrapped or plain?"""
    inner = unwrapped(attention)
    return (
        isinstance(inner, MultiheadAttention)
        and type(inner).forward is MultiheadAttention.forward
        and inner.bias_k is None
        and not inner.add_zero_attn
        and not has_hooks(inner)
        and (inner is attention or not has_hooks(attention))
    )


def known(layer: Module, cls: type[Any]) -> bool:
    """May `run` stand for calling the layer?"""
    if not isinstance(layer, cls) or type(layer).forward is not cls.forward or has_hooks(layer):
        return False
    return all(
        our_attention(layer._modules[name])
        for name in _ATTENTIONS
        if layer._modules.get(name) is not None
    )


def convert(layers: ModuleList, cls: Any, stock: type[Module]) -> ModuleList:
    """Layers of torch become ours, on the same parameters; others stay."""
    return ModuleList(cls.from_torch(x) if type(x) is stock else x for x in layers)


def require_padded(layer: Module, x: Any) -> None:
    """TypeError for a ragged batch where PyTorch's forward has to run; it takes its own kind."""
    if isinstance(x, PackedTokens) or (x.is_nested and x.layout is not torch.strided):
        raise TypeError(
            f"{type(layer).__name__}: a ragged batch came, but an attention of the layer was "
            f"replaced or has hooks, so that PyTorch's own forward runs; pad the batch"
        )


def work_of(layer: Any) -> int:
    """Multiplications that a row is worth."""
    width = layer.linear2.out_features
    return width * (4 * width + 2 * layer.linear2.in_features)


def zero_padding(x: Tensor, stream: Stream) -> Tensor:
    """Zeros in the padding of `x` as the caller laid it out."""
    if stream.pad is None:
        return x
    pad = stream.pad if stream.batch_first else stream.pad.t()
    pad = pad if stream.batched else pad.squeeze(0 if stream.batch_first else 1)
    return x.masked_fill(pad.unsqueeze(-1), 0.0)
