"""What runs through a layer or a stack: a padded batch, or the tokens of a ragged one alone.

A batch that is padded is packed once where the number of its tokens is known on the host (CPU in
eager mode, or lengths on the CPU), everything after that works on tokens, and the result is padded
once. Elsewhere (accelerators, `torch.compile`) the batch stays padded, its padding is set to 0 and
the attention is told the lengths. Both give the same results, 0 in the padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.nn import _checks
from mmfast.nn._masks import KeyPadding, attention_mask, bias_dtype, key_padding, top_left_causal
from mmfast.nn._mha_checks import ArgumentError
from mmfast.nn._tokens import padded_rows, readable
from mmfast.nn.packed_tokens import PackedTokens

# Packing and padding again cost some 60 us: what this many multiplications take.
_SMALL = 4_000_000


class Stream(NamedTuple):
    """`tokens` is `[B, N, C]` with zeros in the padding, or packed."""

    tokens: Any
    origin: PackedTokens | None = None
    """Where the rows of packed tokens lie in the padded batch, if `tokens` has forgotten it."""
    kind: str = "dense"
    """What the caller gave: "dense", "packed", "jagged", or "strided" (nested too)."""
    batch_first: bool = True
    batched: bool = True
    pad: Tensor | None = None
    """bool `[B, N]`, True at padding, of a batch that stays padded."""
    lens: Tensor | None = None
    """`[B]`, where the padding of a batch that stays padded is known as lengths."""
    bias: Tensor | None = None
    """What a float key padding mask adds to the scores, `[B, 1, 1, N]`."""

    @property
    def packed(self) -> bool:
        """Are there tokens alone?"""
        return isinstance(self.tokens, PackedTokens)

    @property
    def values(self) -> Tensor:
        """`[B, N, C]` or `[T, C]`."""
        return self.tokens.values if self.packed else self.tokens

    def holding(self, values: Tensor) -> Any:
        """`values` in the form of `tokens`."""
        return self.tokens.with_values(values) if self.packed else values

    @property
    def batch(self) -> int:
        """The number of items."""
        return self.tokens.batch if self.packed else self.tokens.shape[0]

    @property
    def length(self) -> int:
        """N of the padded batch: that of masks and statistics."""
        return self.tokens.length if self.packed else self.tokens.shape[1]

    def close(self, values: Tensor) -> Any:
        """`values` in the form that the caller gave."""
        if self.packed:
            tokens = (self.origin or self.tokens).with_values(values)
            if self.kind == "packed":
                return tokens
            if self.kind == "jagged":
                return tokens.to_nested()
            if self.kind == "strided":
                return torch.nested.as_nested_tensor(
                    list(tokens.values.split(tokens.lens.tolist())), layout=torch.strided
                )
            values = tokens.to_padded()
        elif self.pad is not None:
            values = values.masked_fill(self.pad.unsqueeze(-1), 0.0)
        if not self.batched:
            return values.squeeze(0)
        return values if self.batch_first else values.transpose(0, 1).contiguous()


def open_stream(
    op: str,
    name: str,
    x: Any,
    width: int,
    padding_mask: Tensor | None = None,
    lens: Tensor | None = None,
    *,
    batch_first: bool = True,
    work: int = 0,
    in_place: bool = False,
) -> Stream:
    """`x` as a `Stream`, packed where that is free and worth it.

    `padding_mask` is a `key_padding_mask` of torch (True or -inf: padding), `work` the number of
    multiplications that a row is worth. `in_place`: masks or statistics over padded positions are
    wanted, so that rows must know theirs: attention then pads what has holes.
    """
    if isinstance(x, PackedTokens) or (isinstance(x, Tensor) and x.is_nested):
        if padding_mask is not None or lens is not None:
            raise ValueError(
                f"{op}: {name} is ragged and knows its lengths, but a padding mask or lengths came "
                f"with it; leave them out"
            )
        kind = "packed" if isinstance(x, PackedTokens) else "jagged"
        if not isinstance(x, PackedTokens) and x.layout is torch.strided:
            # What torch.nn.TransformerEncoder makes of padding, in inference.
            kind = "strided"
            x = torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged)
        tokens = x if isinstance(x, PackedTokens) else PackedTokens.from_nested(x)
        if tokens.values.dim() != 2 or tokens.values.shape[1] != width:
            raise ArgumentError(
                f"{op}: {name} has values {list(tokens.values.shape)}, expected [tokens, {width}], "
                f"the width that the module was made for"
            )
        return _packed(tokens, in_place, {"kind": kind})
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: {name} must be a torch.Tensor or PackedTokens, got {type(x).__name__}"
        )
    if x.dim() not in (2, 3):
        raise ArgumentError(
            f"{op}: {name} has shape {list(x.shape)}, expected [batch, tokens, {width}] "
            f"({'batch' if batch_first else 'tokens'} first) or [tokens, {width}]"
        )
    if x.shape[-1] != width:
        raise ArgumentError(
            f"{op}: {name} has width {x.shape[-1]} but the module was made for {width}; both must "
            f"match"
        )
    if padding_mask is not None and lens is not None:
        raise ValueError(f"{op}: {name} has a padding mask and lengths; give one of them")
    form: dict[str, Any] = {"batch_first": batch_first, "batched": x.dim() == 3}
    if x.dim() == 2:
        x = x.unsqueeze(0)
        padding_mask = None if padding_mask is None else padding_mask.unsqueeze(0)
    elif not batch_first:
        x = x.transpose(0, 1).contiguous()
    if padding_mask is not None:
        return _masked(op, name, x, padding_mask, work, in_place, form)
    if lens is None:
        return Stream(x, **form)
    # Lengths on the CPU beside a stream on an accelerator: packed without waiting for it.
    beside = x if not isinstance(lens, Tensor) or not lens.is_cpu else lens.new_empty(x.shape[0])
    _checks.require_lens(op, f"{name}_lens", lens, beside)
    if readable(lens) and x.shape[0] * x.shape[1] * work > _SMALL:
        return _packed(PackedTokens.from_padded(x, lens=lens), in_place, form)
    lens = lens.to(x.device)
    pad = padded_rows(lens, x.shape[1])
    return Stream(x.masked_fill(pad.unsqueeze(-1), 0.0), **form, pad=pad, lens=lens)


def _packed(tokens: PackedTokens, in_place: bool, form: dict[str, Any]) -> Stream:
    if in_place:
        return Stream(tokens, **form)
    # Nobody asks for positions in the padded batch: the longest item is long enough, and with
    # holes left out the order, all that a causal mask needs, is the same.
    short = PackedTokens._make(tokens.values, tokens.cu_seqlens, tokens.max_len)
    return Stream(short, **form, origin=tokens)


def _masked(
    op: str, name: str, x: Tensor, mask: Tensor, work: int, in_place: bool, form: dict[str, Any]
) -> Stream:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ArgumentError(
            f"{op}: only bool and floating types of the padding mask of {name} are supported, got "
            f"{mask.dtype}"
        )
    if mask.shape != x.shape[:2]:
        raise ArgumentError(
            f"{op}: the padding mask of {name} has shape {list(mask.shape)}, expected "
            f"{list(x.shape[:2])} (batch, tokens)"
        )
    padding = key_padding(mask, 0)
    pad = mask if mask.dtype == torch.bool else mask == -torch.inf
    if padding.bias is None and readable(pad) and pad.numel() * work > _SMALL:
        return _packed(PackedTokens.from_padded(x, padding_mask=pad), in_place, form)
    bias = padding.bias
    if bias is not None:
        bias = bias.masked_fill(pad[:, None, None, :], 0.0)
    x = x.masked_fill(pad.unsqueeze(-1), 0.0)
    right = padding.pad is not None and padding.kv_segments is None
    return Stream(x, **form, pad=pad, lens=padding.kv_lens if right else None, bias=bias)


def conditions(
    op: str,
    queries: Stream,
    keys: Stream | None,
    mask: Tensor | None,
    is_causal: bool,
    heads: int,
) -> dict[str, Any]:
    """Who may attend to whom, in the terms of `attend`; `keys=None` for self-attention.

    `mask` is an `attn_mask` of torch: True = may not attend, or added to the scores. As in torch
    the causal hint replaces it.
    """
    itself, keys = keys is None, queries if keys is None else keys
    options: dict[str, Any] = {}
    N, M = queries.length, keys.length
    allowed = bias = None
    if is_causal and itself:
        options["is_causal"] = True
    elif is_causal:
        causal = top_left_causal(1, N, M, queries.values.device)
        assert causal.kv_segments is not None and causal.q_segments is not None
        allowed = causal.kv_segments[:, None, None, :] <= causal.q_segments[:, None, :, None]
    elif mask is not None:
        allowed, bias = _mask_terms(op, queries, keys, mask, heads)
    if not keys.packed and keys.pad is not None:
        padding = KeyPadding(kv_lens=keys.lens)
        if keys.lens is None:
            padding = key_padding(keys.pad, N)
        options["context_lens"] = padding.kv_lens
        if padding.kv_segments is not None:
            options["context_segments"] = padding.kv_segments
            options["x_segments"] = padding.q_segments
        if itself:  # a causal mask aligns on the lengths of both
            options["x_lens"] = padding.kv_lens
        if keys.bias is not None:
            extra = bias_dtype(keys.bias, queries.values.dtype)
            bias = extra if bias is None else bias + extra
    if queries.lens is not None:
        options["x_lens"] = queries.lens
    elif queries.pad is not None:  # rows of padding among the others see nothing, nor count
        nobody = torch.zeros_like(queries.pad, dtype=torch.int32)
        options["x_segments"] = nobody.masked_fill(queries.pad, -1)
        options.setdefault("context_segments", nobody.new_zeros(queries.batch, M))
    if allowed is not None:
        options["mask"] = allowed
    if bias is not None:
        options["bias"] = bias
    return options


def _mask_terms(
    op: str, queries: Stream, keys: Stream, mask: Tensor, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    N, M, B = queries.length, keys.length, queries.batch
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ArgumentError(
            f"{op}: only bool and floating types of masks are supported, got {mask.dtype}"
        )
    shape = [N, M] if mask.dim() == 2 else [B * heads, N, M]
    if list(mask.shape) != shape:
        raise ArgumentError(
            f"{op}: the attention mask has shape {list(mask.shape)}, expected {[N, M]} or "
            f"{[B * heads, N, M]} (batch {B} times {heads} heads); rows are queries, columns keys"
        )
    return attention_mask(mask, B, heads, queries.values.dtype)


def is_causal_mask(mask: Tensor | None, hint: bool | None) -> bool:
    """The hint, or whether `mask` is the causal one, where looking costs nothing."""
    if hint is not None or mask is None:
        return bool(hint)
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or not readable(mask):
        return False
    if mask.requires_grad or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return False
    fill: Any = True if mask.dtype == torch.bool else -torch.inf
    return torch.equal(mask, torch.full_like(mask, fill).triu(1))
