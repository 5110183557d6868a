"""`torch.nn.MultiheadAttention`'s masks in the terms of `mmfast.cross_attention`.

There True means *masked*, padding is a `[B, S]` matrix and everything ends as one dense float mask
of `[B * H, L, S]`. Here padding becomes lengths (or, where it is not on the right, segments), an
attention mask stays the broadcast view it is, and nothing of size `B * H * L * S` is made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.nn._tokens import padded_rows, readable

# Up to this many elements Python lists are faster than tensors (5 to 10 us instead of 13).
_LIST_LIMIT = 256


class KeyPadding(NamedTuple):
    """A key_padding_mask as arguments of `cross_attention`, and the rows worth projecting."""

    kv_lens: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    bias: Tensor | None = None
    pad: Tensor | None = None
    """bool `[B, S]`, True at padding; None for a mask of more than two values."""

    @property
    def holes(self) -> bool:
        """The lengths do not say all: there is padding before them, or nobody can tell."""
        return self.q_segments is not None


def key_padding(mask: Tensor, queries: int) -> KeyPadding:
    """`key_padding_mask` `[B, S]` (bool: True = ignore; float: added to the scores).

    A mask of two values (bool, or 0 and -inf: what `TransformerEncoderLayer` makes of a bool one)
    becomes lengths where the padding is on the right, else segments: padded keys are segment 1,
    everything else is segment 0. Both leave the padding out of the computation. Any other float
    mask is a bias.

    Whether padding is on the right is read from the values where they can be read for nothing (CPU,
    eager). Elsewhere the length is taken as "last valid key + 1", which is right for every mask,
    together with the segments that make it exact: no synchronisation, no guess.
    """
    can_read = readable(mask)
    if mask.dtype != torch.bool:
        binary = _binary(mask) if can_read and not mask.requires_grad else None
        if binary is None:
            bias = mask[:, None, None, :]
            return KeyPadding(kv_lens=_upper_bound(mask != -torch.inf), bias=bias)
        mask = binary
    lens = right_padded_lens(mask) if can_read else None
    if lens is not None:
        return KeyPadding(kv_lens=lens, pad=mask)
    return KeyPadding(
        kv_lens=None if can_read else _upper_bound(mask.logical_not()),
        q_segments=torch.zeros(mask.shape[0], queries, dtype=torch.int32, device=mask.device),
        kv_segments=mask.to(torch.int32),
        pad=mask,
    )


def _binary(mask: Tensor) -> Tensor | None:
    """A float mask of 0 and -inf alone as a bool mask, True at -inf; None for any other."""
    padded = mask == -torch.inf
    if mask.numel() > _LIST_LIMIT:
        return padded if torch.equal(mask == 0, padded.logical_not()) else None
    values = mask.flatten().tolist()
    return padded if values.count(0.0) + values.count(-torch.inf) == len(values) else None


def right_padded_lens(mask: Tensor) -> Tensor | None:
    """int32 `[B]`, the number of valid keys, if all padding (True) is on the right; else None."""
    if mask.numel() > _LIST_LIMIT:
        lens = mask.logical_not().sum(1, dtype=torch.int32)
        return lens if torch.equal(padded_rows(lens, mask.shape[1]), mask) else None
    counts = []
    for row in mask.tolist():
        count = row.index(True) if True in row else len(row)
        if False in row[count:]:
            return None
        counts.append(count)
    return torch.tensor(counts, dtype=torch.int32)


def _upper_bound(valid: Tensor) -> Tensor | None:
    """int32 `[B]`: index of the last valid key plus 1, without reading anything on the host."""
    keys = valid.shape[1]
    if keys == 0:
        return None
    return (valid * torch.arange(1, keys + 1, device=valid.device, dtype=torch.int32)).amax(1)


def top_left_causal(batch: int, queries: int, keys: int, device: torch.device) -> KeyPadding:
    """`m <= n` for any number of queries and keys, said with segments under the rule "at_most".

    `cross_attention(is_causal=True)` aligns bottom-right, `torch.nn` top-left; with as many keys as
    queries the two agree and this is not needed.
    """
    n = torch.arange(queries, device=device, dtype=torch.int32).expand(batch, queries)
    m = torch.arange(keys, device=device, dtype=torch.int32).expand(batch, keys)
    return KeyPadding(q_segments=n, kv_segments=m)


def attention_mask(
    mask: Tensor, batch: int, heads: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """`attn_mask` `[L, S]` or `[B * H, L, S]` -> (mask, bias) of `cross_attention`, as 4-D views.

    A bool mask (True = may not attend) is negated; a float one is the bias, in its own dtype where
    `cross_attention` takes that (`bias_dtype`).
    """
    view = mask[None, None] if mask.dim() == 2 else mask.view(batch, heads, *mask.shape[1:])
    if mask.dtype == torch.bool:
        return view.logical_not(), None
    return None, bias_dtype(view, dtype)


def bias_dtype(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`bias` in a dtype that `cross_attention` takes beside queries of `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return bias if bias.dtype in (dtype, wide) else bias.to(dtype)
