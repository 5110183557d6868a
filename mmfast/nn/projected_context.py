"""Keys and values of a context, projected once and attended to many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmfast.nn._tokens import readable
from mmfast.nn.packed_tokens import PackedTokens

_OP = "ProjectedContext"


class ProjectedContext:
    r"""The keys and values of a context: what an attention module's `prepare_context` returns.

    Passed to the module in place of the context, for any number of calls (the steps of a
    generation, or several streams that look at one image); the results are those of passing the
    context itself. It holds no weights: after a training step make a new one.

    Args:
        k: `[B, G, M, D]` keys after their norm, or packed `[G, T, D]`.
        v: `[B, G, M, Dv]` values, or packed `[G, T, Dv]`.
        lens: `[B]` integers: the valid rows of each item, where they are padded.
        cu_seqlens: int32 `[B + 1]`, where they are packed: item b is the rows
            `cu_seqlens[b]:cu_seqlens[b + 1]`.
        max_len: where they are packed: the length of the longest item, or more.

    Attributes: these, `packed`, `batch`, `keys` (M: padded length or `max_len`), `device`, `dtype`.

    Raises:
        ValueError: shapes that do not belong together.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        *,
        lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_len: int | None = None,
    ) -> None:
        dims = 4 if cu_seqlens is None else 3
        if k.dim() != dims or v.dim() != dims or k.shape[:-1] != v.shape[:-1]:
            form = "[B, G, M, D]" if cu_seqlens is None else "[G, T, D], for they are packed"
            raise ValueError(
                f"{_OP}: k has shape {list(k.shape)} and v {list(v.shape)}, expected {form}; both "
                f"hold the same keys"
            )
        if cu_seqlens is not None and max_len is None:
            raise ValueError(f"{_OP}: cu_seqlens needs max_len, the length of the longest item")
        self.k, self.v = k, v
        self.lens, self.cu_seqlens = lens, cu_seqlens
        self.max_len: int = k.shape[-2] if max_len is None else max_len

    @property
    def packed(self) -> bool:
        """Are the keys of all items one after the other, without padding?"""
        return self.cu_seqlens is not None

    @property
    def batch(self) -> int:
        """The number of items B."""
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def has_empty(self) -> bool:
        """May an item have no keys? (Nobody looks at the lengths to tell.)"""
        return self.lens is not None or self.cu_seqlens is not None

    @property
    def keys(self) -> int:
        """M: the padded length, or what stands for it where the keys are packed."""
        return self.max_len

    @property
    def device(self) -> torch.device:
        """Of the keys."""
        return self.k.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys."""
        return self.k.dtype

    def item_lens(self) -> Tensor | None:
        """`[B]`: how many keys each item has; None: all have M."""
        return self.lens if self.cu_seqlens is None else self.cu_seqlens.diff()

    def to(self, *args: Any, **named: Any) -> ProjectedContext:
        """With keys and values of another device or floating dtype, as `Tensor.to` takes them."""
        k, v = self.k.to(*args, **named), self.v.to(*args, **named)
        lens = None if self.lens is None else self.lens.to(k.device)
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(k.device)
        return ProjectedContext(k, v, lens=lens, cu_seqlens=cu_seqlens, max_len=self.max_len)

    def select(self, items: Tensor) -> ProjectedContext:
        """Item `items[i]` as item i: for beam search, which reorders and repeats items.

        Args:
            items: `[B']` integers in `[0, B)`, on the device of the keys.

        Packed keys on an accelerator: their number is read from it, which waits for the device.
        """
        if not isinstance(items, Tensor) or items.dim() != 1 or items.dtype not in _INDICES:
            got = list(items.shape) if isinstance(items, Tensor) else type(items).__name__
            kind = f" {items.dtype}" if isinstance(items, Tensor) else ""
            raise ValueError(
                f"{_OP}.select: items must be integers [B'] (int64 or int32), got {got}{kind}"
            )
        if items.device != self.device:
            raise ValueError(
                f"{_OP}.select: items is on {items.device} but the keys are on {self.device}; move "
                f"both to one device"
            )
        if readable(items) and items.numel():
            low, high = (int(bound) for bound in items.aminmax())
            if low < 0 or high >= self.batch:
                raise ValueError(
                    f"{_OP}.select: items holds {low if low < 0 else high}, allowed are 0 to "
                    f"{self.batch - 1}, the items that there are"
                )
        if self.cu_seqlens is None:
            lens = None if self.lens is None else self.lens.index_select(0, items)
            k, v = self.k.index_select(0, items), self.v.index_select(0, items)
            return ProjectedContext(k, v, lens=lens)
        packed = PackedTokens(self.k.transpose(0, 1), self.cu_seqlens, self.max_len)
        counts = packed.lens.index_select(0, items)
        offsets = torch.zeros(items.shape[0] + 1, dtype=torch.int32, device=items.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        total = int(offsets[-1])
        target = torch.arange(items.shape[0], device=items.device)
        target = target.repeat_interleave(counts.long(), output_size=total)
        first = self.cu_seqlens.index_select(0, items)[target] - offsets[target]
        rows = torch.arange(total, device=items.device) + first
        k, v = self.k.index_select(1, rows), self.v.index_select(1, rows)
        return ProjectedContext(k, v, cu_seqlens=offsets, max_len=self.max_len)

    def check(
        self, module: str, x: Tensor | PackedTokens, heads: int, width: int, value_width: int
    ) -> None:
        """ValueError or TypeError, in the name of `module`, unless x can attend to this."""
        batch = x.batch if isinstance(x, PackedTokens) else x.shape[0]
        if self.batch != batch:
            raise ValueError(
                f"{module}: the projected context was made for a batch of {self.batch} but x has "
                f"{batch}; call prepare_context again, or reorder it with select"
            )
        if self.device != x.device:
            raise ValueError(
                f"{module}: the projected context is on {self.device} but x is on {x.device}; "
                f"call prepare_context again, or move it with to"
            )
        got = (self.k.shape[-3], self.k.shape[-1], self.v.shape[-1])
        if got != (heads, width, value_width):
            raise ValueError(
                f"{module}: the projected context has {got[0]} heads of widths {got[1]} and "
                f"{got[2]}, expected {heads} of {width} and {value_width}; it was made by another "
                f"module: call this one's prepare_context"
            )

    def __repr__(self) -> str:
        form = "packed" if self.packed else "padded"
        return (
            f"ProjectedContext({form}, batch={self.batch}, k={list(self.k.shape)}, "
            f"v={list(self.v.shape)} {self.dtype} on {self.device})"
        )


_INDICES = (torch.int64, torch.int32)


def _flatten(context: ProjectedContext) -> tuple[list[Any], int]:
    return [context.k, context.v, context.lens, context.cu_seqlens], context.max_len


def _unflatten(leaves: Any, max_len: Any) -> ProjectedContext:
    context = ProjectedContext.__new__(ProjectedContext)
    context.k, context.v, context.lens, context.cu_seqlens = leaves
    context.max_len = max_len
    return context


pytree.register_pytree_node(
    ProjectedContext, _flatten, _unflatten, serialized_type_name="mmfast.nn.ProjectedContext"
)
