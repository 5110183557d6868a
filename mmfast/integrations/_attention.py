"""One attention of a patched model: what it was given, in terms of `mmfast.cross_attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import Pattern, allowed, only_masks, readable, recognised
from mmfast.ops.cross_attention import cross_attention

COMPAT = "_mmfast_hf_compat"
EVERY_ROW = "_mmfast_every_row"
"""On modules whose rows of padding somebody reads: they are not left out and 0."""


class PackedMask(NamedTuple):
    """Stands where a mask stood when rows come without padding.

    `q`: the queries are packed so; None: they are dense. `kv`: the keys are; None: they are dense.
    `kv_mask`: which of the keys count, `[B, 1, 1, M]` in either form; for packed keys anything that
    broadcasts to `[B, H, N, M]`, by positions in the packed items.
    """

    q: Layout | None
    kv: Layout | None
    causal: bool = False
    kv_mask: Tensor | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | PackedMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    is_causal: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `[B, H, N, D]` over `[B, G, M, D]` as a patched module computes it.

    Args:
        module: whose attention it is (for `hf_compat`).
        query, key, value: `[B, H, N, D]`, `[B, G, M, D]`, `[B, G, M, Dv]`, `H % G == 0`; where mask
            is a `PackedMask` that packs them, `[1, H, T, D]` and so on.
        mask: additive or bool (True = may attend), broadcasts to `[B, H, N, M]`; or a `PackedMask`;
            None: every row sees every key.
        scaling: of the scores; default `D ** -0.5`.
        dropout: probability, 0 outside training.
        position_bias: added to the scores, broadcasts to `[B, H, N, M]`, padded also where rows
            are packed.
        is_causal: without a mask alone: row n sees keys up to `n + M - N`. Never guessed.
        need_weights: also the weights.

    Returns:
        out `[B, N, H, Dv]`, contiguous (`[1, T, H, Dv]` packed), and weights `[B, H, N, M]` or
        None.
    """
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    if need_weights:
        options["return_weights"] = "per_head"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        shared = value is key
        key = key.to(query.dtype)
        value = key if shared else value.to(query.dtype)
    if isinstance(mask, PackedMask):
        return _attend_packed(query, key, value, mask, position_bias, options)
    dead = None
    if mask is None:
        options["is_causal"] = is_causal
        options["bias"] = position_bias
    else:
        # A view would be another tensor, whose pattern every layer would have to read again.
        if mask.shape[-1] > key.shape[2]:
            mask = mask[..., : key.shape[2]]
        dead = _say_mask(module, mask, query, position_bias, options)
    result = cross_attention(query, key, value, **options)
    out, weights = (result.out, result.weights) if need_weights else (result, None)
    if dead is not None:
        out, weights = _mean_of_values(out, weights, value, dead)
    return out.transpose(1, 2).contiguous(), weights


def _say_mask(
    module: nn.Module,
    mask: Tensor,
    query: Tensor,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """Put a mask into the options; returns the rows `[B, N]` that see nothing and yet give a mean.

    transformers masks with the least value of the dtype, and the softmax of a row of these is the
    same for all keys. With -inf the row would be NaN, and with lengths it is 0.
    """
    compat = getattr(module, COMPAT, True)
    if mask.dim() == 2:
        mask = mask[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None]
    pattern = recognised(mask)
    if pattern is not None and pattern.valid.shape[0] not in (1, query.shape[0]):
        pattern = None
    options["bias"] = position_bias
    if pattern is None:
        return _say_dense(mask, compat, options)
    dead = None if pattern.dead is None or not compat else pattern.dead[:, None]
    if pattern.rows_too and not pattern.full and getattr(module, EVERY_ROW, False):
        options["mask"] = allowed(mask)
    else:
        _say_pattern(pattern, mask, query, options)
    return dead


def _say_pattern(pattern: Pattern, mask: Tensor, query: Tensor, options: dict[str, Any]) -> None:
    if pattern.lens is None:
        options["mask"] = allowed(mask) if pattern.causal else pattern.valid[:, None, None, :]
        return
    lens = pattern.lens
    if lens.shape[0] != query.shape[0]:
        lens = lens.expand(query.shape[0]).contiguous()
    if not pattern.full:
        options["kv_lens"] = lens
        if pattern.rows_too:
            options["q_lens"] = lens
    options["is_causal"] = pattern.causal


def _say_dense(mask: Tensor, compat: bool, options: dict[str, Any]) -> Tensor | None:
    """A mask of any values, or one that nobody may look at; returns rows that see nothing."""
    can_read = readable(mask)
    see = allowed(mask) if can_read or compat or mask.dtype == torch.bool else None
    if mask.dtype == torch.bool or (can_read and see is not None and only_masks(mask, see)):
        options["mask"] = see
    else:
        bias = options["bias"]
        options["bias"] = mask if bias is None else bias + mask
    if not compat or see is None:
        return None
    nothing = ~see.any(-1)
    return nothing if not can_read or bool(nothing.any()) else None


def _mean_of_values(
    out: Tensor, weights: Tensor | None, value: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rows that may see nothing give the mean of all values, as the stock softmax does."""
    groups = out.shape[1] // value.shape[1]
    mean = value.mean(dim=2, keepdim=True).repeat_interleave(groups, dim=1)
    out = torch.where(dead.unsqueeze(-1), mean, out)
    if weights is not None:
        weights = torch.where(dead.unsqueeze(-1), 1.0 / value.shape[2], weights)
    return out, weights


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    q, k, v = query, key, value
    if mask.q is not None:
        q = query.squeeze(0)
        options.update(q_cu_seqlens=mask.q.cu_seqlens, max_q_len=mask.q.max_len)
    if mask.kv is not None:
        k = key.squeeze(0)
        v = k if value is key else value.squeeze(0)
        options.update(kv_cu_seqlens=mask.kv.cu_seqlens, max_kv_len=mask.kv.max_len)
        if mask.kv_mask is not None:
            options["mask"] = allowed(mask.kv_mask)
    elif mask.kv_mask is not None:
        pattern = recognised(mask.kv_mask)
        if pattern is not None and pattern.lens is not None:
            options["kv_lens"] = None if pattern.full else pattern.lens
        else:
            options["mask"] = allowed(mask.kv_mask)
    if position_bias is not None:
        # Padded coordinates: position p of the item is row p of the bias.
        rows = position_bias.shape[-2] if mask.q is None else mask.q.max_len
        keys = position_bias.shape[-1] if mask.kv is None else mask.kv.max_len
        options["bias"] = position_bias[..., :rows, :keys]
    out = cross_attention(q, k, v, is_causal=mask.causal, **options)
    if isinstance(out, tuple):
        raise ValueError(
            "mmfast: attention weights of packed rows were asked for; ask the model for them with "
            "output_attentions=True, or leave padding in with mmfast.unpatch(model)"
        )
    if mask.q is None:
        return out.transpose(1, 2).contiguous(), None
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None
