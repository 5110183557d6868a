"""The two streams of an attention, whatever form they come in: dense, jagged or packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.nn import _checks
from mmfast.nn._tokens import host_lens, padded_rows, worth_packing
from mmfast.nn.packed_tokens import PackedTokens


def stream_of(
    module: str, name: str, x: Any, lens: Tensor | None, width: int, argument: str
) -> Tensor | PackedTokens:
    """A checked stream: a dense `[batch, tokens, width]`, or packed where it came so or jagged."""
    if isinstance(x, Tensor) and x.is_nested:
        x = PackedTokens.from_nested(x)
    if not isinstance(x, PackedTokens):
        _checks.require_stream(module, name, x, width, argument, dims=3)
        if lens is not None:
            _checks.require_lens(module, f"{name}_lens", lens, x)
        return x
    if lens is not None:
        raise ValueError(
            f"{module}: {name}_lens comes with {name}, which is packed and holds its lengths; "
            f"leave {name}_lens out"
        )
    values = x.values
    if values.dim() != 2:
        raise ValueError(
            f"{module}: the values of {name} have {values.dim()} dims (shape "
            f"{list(values.shape)}), expected [tokens, {width}]"
        )
    _checks.require_stream(module, name, values, width, argument)
    return x


def like(given: Any, out: Tensor | PackedTokens) -> Any:
    """`out` in the form that `given` came in: packed, jagged or dense."""
    if isinstance(out, PackedTokens) and not isinstance(given, PackedTokens):
        return out.to_nested() if given.is_nested else out.to_padded()
    return out


def packed_by_lens(x: Tensor, lens: Tensor | None, work: int) -> Tensor | PackedTokens:
    """x packed, where the host knows `lens` and the rows are worth it; x where all are valid.

    `work` is the number of multiplications that a row is worth.
    """
    if lens is None or not worth_packing(x.shape[0] * x.shape[1] * work):
        return x
    counts = host_lens(lens, x.shape[1])
    if counts is None or sum(counts) == x.shape[0] * x.shape[1]:
        return x
    return PackedTokens.from_padded(x, lens)


class Source:
    """A context as one call finds it, dense or packed, and what the host knows of it.

    Args:
        context: `[B, M, C]` (`[M, B, C]` with `seq_first`), or packed.
        lens: `[B]`: rows from there on are padding.
        pad: bool `[B, M]`, True at padding, where that is known as a mask.
        holes: `pad` may be True at rows before the lengths.
        tokens: the number of valid rows of a `pad` with holes, where the host knows it.
    """

    __slots__ = ("batch", "dense", "has_empty", "holes", "keys", "lens", "packed", "pad",
                 "seq_first", "tokens")  # fmt: skip

    def __init__(
        self,
        context: Tensor | PackedTokens,
        lens: Tensor | None = None,
        pad: Tensor | None = None,
        *,
        seq_first: bool = False,
        holes: bool = False,
        tokens: int | None = None,
    ) -> None:
        self.lens, self.pad, self.seq_first, self.tokens = lens, pad, seq_first, tokens
        self.holes = holes
        self.has_empty = lens is not None or pad is not None
        self.dense: Tensor | None = None
        self.packed: PackedTokens | None = None
        if isinstance(context, PackedTokens):
            self.packed = context
            self.batch, self.keys, self.tokens = context.batch, context.length, context.total
            self.lens, self.holes = context.lens, context.positions is not None
            counts = host_lens(context.lens, context.length)
            self.has_empty = counts is None or 0 in counts
            return
        self.dense = context
        self.batch, self.keys = context.shape[0], context.shape[1]
        if seq_first:
            self.batch, self.keys = self.keys, self.batch
        if holes:
            return
        if lens is not None:
            counts = host_lens(lens, self.keys)
            if counts is not None:
                self.has_empty, self.tokens = 0 in counts, sum(counts)
                if self.tokens == self.batch * self.keys:
                    self.lens = self.pad = None  # nothing is padding
        elif pad is None:
            self.tokens = self.batch * self.keys

    def rows(self, fill: bool) -> Tensor:
        """All rows, padding included, in the order of memory; set to 0 where `fill`.

        A NaN in the padding would reach the gradient of the weights: 0 * NaN is NaN.
        """
        if self.dense is None:
            assert self.packed is not None
            return self.packed.without_holes().to_padded(self.keys)
        pad = self.pad
        if not fill or (pad is None and self.lens is None):
            return self.dense
        if pad is None:
            assert self.lens is not None
            pad = padded_rows(self.lens, self.keys)
        pad = pad.t() if self.seq_first else pad
        return self.dense.masked_fill(pad.unsqueeze(-1), 0.0)

    def in_pack(self) -> PackedTokens:
        """The tokens alone."""
        if self.packed is not None:
            return self.packed
        assert self.dense is not None
        dense = self.dense.transpose(0, 1) if self.seq_first else self.dense
        if self.holes:
            return PackedTokens.from_padded(dense, padding_mask=self.pad)
        return PackedTokens.from_padded(dense, self.lens)

    def items_first(self) -> Tensor:
        """`[B, M, C]`, a view."""
        assert self.dense is not None
        return self.dense.transpose(0, 1) if self.seq_first else self.dense


def valid_rows(packed: PackedTokens) -> Tensor:
    """bool `[B, length]`: where in its padded form a packed batch has tokens."""
    valid = torch.zeros(packed.batch * packed.length, dtype=torch.bool, device=packed.device)
    index = packed.padded_index(packed.length)
    valid = valid.logical_not() if index is None else valid.index_fill(0, index, True)
    return valid.view(packed.batch, packed.length)
