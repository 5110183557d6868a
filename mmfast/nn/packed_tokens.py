"""A ragged batch without padding: the tokens of all items one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmfast.nn._masks import right_padded_lens
from mmfast.nn._tokens import padded_rows, put_rows, readable, take_rows

_OP = "PackedTokens"


# A dataclass, since fully_shard and DistributedDataParallel look for tensors in these alone, and
# what they do not find has no gradient hooks.
@dataclass(init=False, repr=False, eq=False)
class PackedTokens:
    r"""Ragged items without padding: item b is the rows `cu_seqlens[b]:cu_seqlens[b + 1]`.

    The attention modules and stacks of `mmfast.nn` take one wherever they take a padded batch, and
    everything that works on rows alone (norms, projections, feed-forward networks) works on
    `values` as it is: `packed.with_values(norm(packed.values))`. Nothing is computed for padding.

    Args:
        values: `[T, ...]`, the tokens of all items, any dtype; differentiable.
        cu_seqlens: `[B + 1]` integers on the device of `values`, from 0 to T, never falling. Kept
            as int32.
        max_len: length of the longest item, or anything above it; default: read from `cu_seqlens`
            (on an accelerator that waits for the device).
        positions: `[T]` integers: where in its padded item each row was, for a batch whose padding
            is not all on the right; None: row i of an item was at i.
        length: the padded length that `to_padded` gives; default `max_len`.

    Attributes: `values`, `cu_seqlens` (int32), `max_len`, `positions`, `length`, `batch` (B),
    `lens` (int32 `[B]`), `items` (int64 `[T]`, the item of each row), `total` (T).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also offsets that do not
            rise from 0 to T, or a `max_len` below the longest item.

    Example:
        >>> import torch, mmfast
        >>> image = torch.arange(12.0).view(2, 3, 2)
        >>> packed = mmfast.nn.PackedTokens.from_padded(image, torch.tensor([3, 1]))
        >>> packed.values.shape, packed.cu_seqlens.tolist()
        (torch.Size([4, 2]), [0, 3, 4])
        >>> packed.to_padded()[1].tolist()
        [[6.0, 7.0], [0.0, 0.0], [0.0, 0.0]]
    """

    values: Tensor
    cu_seqlens: Tensor
    max_len: int
    positions: Tensor | None
    length: int

    def __init__(
        self,
        values: Tensor,
        cu_seqlens: Tensor,
        max_len: int | None = None,
        *,
        positions: Tensor | None = None,
        length: int | None = None,
    ) -> None:
        max_len = _check(values, cu_seqlens, max_len, positions)
        if length is not None and length < max_len:
            raise ValueError(
                f"{_OP}: length is {length} but max_len is {max_len}; the padded length holds the "
                f"longest item"
            )
        self._set(values, cu_seqlens.to(torch.int32), max_len, positions, length)

    def _set(
        self,
        values: Tensor,
        cu_seqlens: Tensor,
        max_len: int,
        positions: Tensor | None = None,
        length: int | None = None,
    ) -> None:
        self.values = values
        self.cu_seqlens = cu_seqlens
        self.max_len = max_len
        self.positions = positions
        self.length = max_len if length is None else length
        self._lens: Tensor | None = None
        # Of the jagged tensor that it came from: torch adds only what shares this very tensor.
        self._offsets: Tensor | None = None
        self._items: Tensor | None = None
        # Rows in the padded batch of `length`; False: every row, in order.
        self._index: Tensor | bool | None = None

    @classmethod
    def _make(cls, *args: Any, **named: Any) -> PackedTokens:
        """Without checks: for arguments made here."""
        packed = cls.__new__(cls)
        packed._set(*args, **named)
        return packed

    # --- from and to other forms ---------------------------------------------------------------

    @classmethod
    def from_padded(
        cls, x: Tensor, lens: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> PackedTokens:
        """The valid rows of a padded batch, in order. Padding may hold NaN; its gradient is 0.

        The number of tokens must be known on the host. On the CPU that is free; for x on an
        accelerator give `lens` (or the mask) on the CPU, or it waits for the device.

        Args:
            x: `[B, L, ...]`.
            lens: `[B]` integers in `[0, L]`: the valid rows of each item are its first ones.
            padding_mask: bool `[B, L]`, True at padding, in any pattern. Give one of the two, or
                neither where nothing is padding.
        """
        if not isinstance(x, Tensor) or x.is_nested or x.dim() < 2:
            got = list(x.shape) if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
            raise ValueError(
                f"{_OP}.from_padded: x must be a dense [batch, tokens, ...], got {got}"
            )
        if lens is not None and padding_mask is not None:
            raise ValueError(f"{_OP}.from_padded: give lens or padding_mask, not both")
        B, L = x.shape[0], x.shape[1]
        if padding_mask is not None:
            _require_shape("padding_mask", padding_mask, (B, L))
            if padding_mask.dtype != torch.bool:
                raise TypeError(
                    f"{_OP}.from_padded: padding_mask must be bool, True at padding, got "
                    f"{padding_mask.dtype}; convert it with padding_mask != 0"
                )
            lens = right_padded_lens(padding_mask)
        if lens is None and padding_mask is None:
            return cls._whole(x, L)
        if lens is not None:
            _require_shape("lens", lens, (B,))
            _require_integers("lens", lens)
            counts = lens.tolist()
            if counts and not 0 <= min(counts) <= max(counts) <= L:
                bad = max(counts) if max(counts) > L else min(counts)
                raise ValueError(
                    f"{_OP}.from_padded: lens holds {bad}, allowed are 0 to {L}; clamp it"
                )
            valid = padded_rows(lens, L).logical_not()
        else:
            assert padding_mask is not None
            valid = padding_mask.logical_not()
            counts = valid.sum(1).tolist()
        if sum(counts) == B * L:
            return cls._whole(x, max(counts, default=0))
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        offsets = offsets.to(x.device, non_blocking=True)
        index = valid.reshape(-1).nonzero().squeeze(1).to(x.device, non_blocking=True)
        if x.is_contiguous() or not x.transpose(0, 1).is_contiguous():
            rows = take_rows(x.flatten(0, 1), index)
        else:  # [L, B, ...] in memory: gathered from there, not copied first
            memory = index % L * B + index.div(L, rounding_mode="floor")
            rows = take_rows(x.transpose(0, 1).flatten(0, 1), memory)
        positions = None if lens is not None else index % L
        packed = cls._make(rows, offsets, max(counts), positions, L)
        packed._index = index
        return packed

    @classmethod
    def _whole(cls, x: Tensor, max_len: int) -> PackedTokens:
        """Of a batch without padding: a view, where its memory allows."""
        B, L = x.shape[:2]
        offsets = torch.arange(B + 1, dtype=torch.int32, device=x.device) * L
        packed = cls._make(x.flatten(0, 1), offsets, max_len, length=L)
        packed._index = False
        return packed

    @classmethod
    def from_nested(cls, x: Tensor) -> PackedTokens:
        """Of a jagged nested tensor `[B, tokens (ragged), ...]`; its values are not copied."""
        if not (isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged):
            raise TypeError(
                f"{_OP}.from_nested: x must be a nested tensor with layout=torch.jagged, got "
                f"{type(x).__name__}; make it with torch.nested.nested_tensor(..., "
                f"layout=torch.jagged)"
            )
        if getattr(x, "_ragged_idx", 1) != 1:
            raise ValueError(
                f"{_OP}.from_nested: the ragged dim of x is {x._ragged_idx}, expected 1, "  # type: ignore[attr-defined]
                f"[batch, tokens, ...]; transpose it back"
            )
        if x.lengths() is not None:  # type: ignore[attr-defined]
            x = x.contiguous()  # with holes between the items
        longest = int(x._get_max_seqlen())  # type: ignore[attr-defined]
        offsets: Tensor = x.offsets()  # type: ignore[attr-defined]
        packed = cls._make(x.values(), offsets.to(torch.int32), longest)
        packed._offsets = offsets
        return packed

    def to_padded(self, length: int | None = None) -> Tensor:
        """`[B, length, ...]` with zeros in padding; default: the length that it was made from."""
        length = self.length if length is None else length
        if length < (self.max_len if self.positions is None else self.length):
            raise ValueError(
                f"{_OP}.to_padded: length is {length} but the longest item has "
                f"{self.max_len if self.positions is None else self.length} tokens; pad to at "
                f"least that"
            )
        index = self.padded_index(length)
        shape = (self.batch, length, *self.values.shape[1:])
        if index is None:
            return self.values.view(shape)
        return put_rows(self.values, index, self.batch * length).view(shape)

    def to_nested(self) -> Tensor:
        """A jagged nested tensor over the same values."""
        offsets = self.cu_seqlens.long() if self._offsets is None else self._offsets
        return torch.nested.nested_tensor_from_jagged(
            self.values, offsets, min_seqlen=0, max_seqlen=self.max_len
        )

    def with_values(self, values: Tensor) -> PackedTokens:
        """The same items with other values `[T, ...]`, as a norm or a projection gives them."""
        if values.shape[0] != self.values.shape[0]:
            raise ValueError(
                f"{_OP}.with_values: values has {values.shape[0]} rows, expected {self.total}; "
                f"give one row for each token"
            )
        other = type(self)._make(values, self.cu_seqlens, self.max_len, self.positions, self.length)
        other._lens, other._items, other._index = self._lens, self._items, self._index
        other._offsets = self._offsets
        return other

    def without_holes(self) -> PackedTokens:
        """The same items with all padding on their right: `positions` are dropped."""
        if self.positions is None:
            return self
        return type(self)._make(self.values, self.cu_seqlens, self.max_len, None, self.length)

    @classmethod
    def join(cls, streams: Sequence[PackedTokens]) -> PackedTokens:
        """Item by item, the tokens of all streams one after the other; all stay packed.

        Item b of the result is item b of the first stream, then of the second, and so on. It has
        no padded coordinates of its own: `positions` of the streams are dropped.
        """
        if len(streams) == 0:
            raise ValueError(f"{_OP}.join: there are no streams; give at least one")
        first = streams[0]
        for stream in streams[1:]:
            if stream.batch != first.batch:
                raise ValueError(
                    f"{_OP}.join: a stream has {stream.batch} items but the first has "
                    f"{first.batch}; all streams hold the same items, empty ones too"
                )
            if stream.values.shape[1:] != first.values.shape[1:]:
                raise ValueError(
                    f"{_OP}.join: a stream has values {list(stream.values.shape)} but the first "
                    f"{list(first.values.shape)}; project them to one width first"
                )
        if len(streams) == 1:
            return cls._make(first.values, first.cu_seqlens, first.max_len)
        offsets = torch.stack([stream.cu_seqlens for stream in streams]).sum(0, dtype=torch.int32)
        longest = sum(stream.max_len for stream in streams)
        if readable(offsets):
            longest = max(offsets.diff().tolist(), default=0)
        total = sum(stream.total for stream in streams)
        # Row of the result for each row of the streams, one stream after the other.
        before, target = offsets[:-1], []
        for stream in streams:
            own = torch.arange(stream.total, device=offsets.device)
            target.append(own + (before - stream.cu_seqlens[:-1])[stream.items])
            before = before + stream.lens
        order = torch.empty(total, dtype=torch.int64, device=offsets.device)
        order[torch.cat(target)] = torch.arange(total, device=offsets.device)
        values = torch.cat([stream.values for stream in streams])
        return cls._make(take_rows(values, order), offsets, longest)

    def to(self, *args: Any, **named: Any) -> PackedTokens:
        """`values.to(...)`; the other tensors follow its device."""
        values = self.values.to(*args, **named)
        if values.device == self.values.device:
            return self if values is self.values else self.with_values(values)
        positions = None if self.positions is None else self.positions.to(values.device)
        offsets = self.cu_seqlens.to(values.device)
        return type(self)._make(values, offsets, self.max_len, positions, self.length)

    # --- what there is -------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """The number of items B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def total(self) -> int:
        """The number of tokens T of all items."""
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """Of `values`."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of `values`."""
        return self.values.dtype

    @property
    def lens(self) -> Tensor:
        """int32 `[B]`: the length of each item."""
        if self._lens is None:
            lens = self.cu_seqlens.diff()
            if torch.compiler.is_compiling():
                return lens
            self._lens = lens
        return self._lens

    @property
    def items(self) -> Tensor:
        """int64 `[T]`: the item of each row; `per_item[items]` gives each row what its item has."""
        if self._items is None:
            each = torch.arange(self.batch, device=self.cu_seqlens.device)
            items = each.repeat_interleave(self.lens.long(), output_size=self.total)
            if torch.compiler.is_compiling():
                return items
            self._items = items
        return self._items

    def padded_index(self, length: int) -> Tensor | None:
        """int64 `[T]`: the row of `[B * length]` of each token; None: every row, in order."""
        if length == self.length and self._index is not None:
            return self._index if isinstance(self._index, Tensor) else None
        items = self.items
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.total, device=items.device) - self.cu_seqlens[items]
        index = items * length + positions
        if length == self.length and not torch.compiler.is_compiling():
            self._index = index
        return index

    def __repr__(self) -> str:
        return (
            f"PackedTokens(batch={self.batch}, tokens={self.total}, max_len={self.max_len}, "
            f"values={list(self.values.shape)} {self.values.dtype} on {self.values.device})"
        )


def _check(values: Any, cu_seqlens: Any, max_len: Any, positions: Any) -> int:
    """TypeError or ValueError for what `PackedTokens` cannot be made of; gives `max_len`."""
    for name, value in (("values", values), ("cu_seqlens", cu_seqlens)):
        if not isinstance(value, Tensor) or value.is_nested:
            raise TypeError(
                f"{_OP}: {name} must be a dense torch.Tensor, got {type(value).__name__}"
            )
    if values.dim() == 0:
        raise ValueError(f"{_OP}: values has no dims, expected [tokens, ...]")
    _require_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{_OP}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected [batch + 1]; it "
            f"starts with 0 and ends with the number of tokens"
        )
    if cu_seqlens.device != values.device:
        raise ValueError(
            f"{_OP}: cu_seqlens is on {cu_seqlens.device} but values is on {values.device}; move "
            f"both to one device"
        )
    if positions is not None:
        _require_integers("positions", positions)
        if positions.shape != values.shape[:1]:
            raise ValueError(
                f"{_OP}: positions has shape {list(positions.shape)}, expected "
                f"[{values.shape[0]}]; give one integer for each row of values"
            )
    if not readable(cu_seqlens):
        if max_len is None:
            max_len = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
        return max_len
    offsets = cu_seqlens.tolist()
    lens = [end - start for start, end in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != values.shape[0] or min(lens, default=0) < 0:
        raise ValueError(
            f"{_OP}: cu_seqlens must rise from 0 to the {values.shape[0]} rows of values, got "
            f"{offsets if len(offsets) <= 8 else [*offsets[:4], '...', *offsets[-2:]]}; "
            f"it is the cumulative sum of the lengths, with a 0 before it"
        )
    longest = max(lens, default=0)
    if max_len is not None and max_len < longest:
        raise ValueError(
            f"{_OP}: max_len is {max_len} but the longest item has {longest} tokens; leave it out "
            f"or give at least that"
        )
    return longest if max_len is None else max_len


def _require_integers(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{_OP}: {name} must be a torch.Tensor, got {type(value).__name__}; convert it with "
            f"torch.as_tensor"
        )
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{_OP}: {name} must be an integer tensor, got {value.dtype}")


def _require_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{_OP}.from_padded: {name} must be {list(shape)}, got {got}")


def _flatten(packed: PackedTokens) -> tuple[list[Any], tuple[int, int]]:
    return [packed.values, packed.cu_seqlens, packed.positions], (packed.max_len, packed.length)


def _unflatten(leaves: Any, sizes: Any) -> PackedTokens:
    values, cu_seqlens, positions = leaves
    return PackedTokens._make(values, cu_seqlens, sizes[0], positions, sizes[1])


# torch.func and torch.export look into arguments and results through pytrees.
pytree.register_pytree_node(
    PackedTokens, _flatten, _unflatten, serialized_type_name="mmfast.nn.PackedTokens"
)
