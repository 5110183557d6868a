"""Layers of transformers that compute no padding: the tokens go in packed, and come out padded."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import COMPAT, PackedMask
from mmfast.integrations._inside import minds_packed_rows
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import padding_of, recognised
from mmfast.integrations._prefill import Prefill
from mmfast.integrations._swapped import stock_of
from mmfast.integrations.registry import Adapter
from mmfast.ops._autograd import in_eager

# Rows that are left out are worth a gather and a scatter (30 us each) from here on: the
# multiplications of 12 C^2 a row that 0.1 ms takes on one core.
LEAST_WORK = 10_000_000
# With more valid tokens than this, moving them costs as much as it saves.
LARGEST_SHARE = 0.95


def layout_of(layer: nn.Module, mask: Any, hidden: Tensor, work: int = 0) -> Layout | None:
    """Where the tokens of `hidden` `[B, N, C]` are, by its self-attention's mask; None: leave it.

    `work`: multiplications a row is worth, default `12 * C * C`, a transformer layer.
    """
    if type(hidden) is not Tensor or hidden.dim() != 3 or not in_eager():
        return None
    batch, length, _ = hidden.shape
    pattern = padding_of(mask, batch, length)
    if pattern is None or pattern.full:
        return None
    layout = pattern.layout()
    return layout if worthwhile(layer, layout, hidden, work) else None


def worthwhile(layer: nn.Module, layout: Layout, hidden: Tensor, work: int = 0) -> bool:
    """Whether a layer may, and had better, be run on the tokens of `hidden` alone."""
    if layout.total == 0 or layout.valid_share > LARGEST_SHARE:
        return False
    # Rows of an item without any token are the mean of what there is in transformers, not 0.
    if layout.min_len == 0 and getattr(layer, COMPAT, True):
        return False
    left_out = layout.batch * layout.length - layout.total
    if left_out * (work or 12 * hidden.shape[2] ** 2) < LEAST_WORK:
        return False
    return not minds_packed_rows(layer)


def self_mask(mask: Any, layout: Layout) -> PackedMask:
    """In place of the self-attention mask that `layout` was found by."""
    pattern = recognised(mask)
    assert pattern is not None
    return PackedMask(layout, layout, causal=pattern.causal)


def cross_mask(
    mask: Any, context: Tensor, layout: Layout, always: bool = False
) -> tuple[Tensor, PackedMask] | None:
    """(context packed where its mask says so, what stands in its mask's place); None: cannot.

    For queries packed by `layout`, keys from `context` `[B, M, C]` with key padding `mask`.
    `always`: packed also where there is little or no padding.
    """
    if context.shape[0] != layout.batch:
        return None
    if mask is None:
        return _whole(context, layout) if always else (context, PackedMask(layout, None))
    pattern = recognised(mask) if isinstance(mask, Tensor) else None
    if pattern is None or pattern.causal or pattern.dead is not None:
        return None
    if tuple(pattern.valid.shape) != tuple(context.shape[:2]):
        return None
    if pattern.full:
        return _whole(context, layout) if always else (context, PackedMask(layout, None))
    keys = pattern.layout()
    if keys.valid_share > LARGEST_SHARE and not always:
        return context, PackedMask(layout, None, kv_mask=mask)
    return keys.pack(context), PackedMask(layout, keys)


def _whole(context: Tensor, layout: Layout) -> tuple[Tensor, PackedMask]:
    """Keys without padding in packed form: the same memory."""
    keys = Layout.whole(context.shape[0], context.shape[1], context.device)
    return context.flatten(0, 1).unsqueeze(0), PackedMask(layout, keys)


@functools.cache
def _parameters(stock: Any) -> dict[str, int]:
    """Positions of the parameters of a class's forward."""
    parameters = list(inspect.signature(stock.forward).parameters.values())[1:]
    return {p.name: i for i, p in enumerate(parameters)}


class Arguments:
    """Positional and keyword arguments of a call, by the names of the stock forward."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stock: Any = stock_of(layer) or type(layer)
        self._places = _parameters(stock)
        self.args = list(args)
        self.kwargs = dict(kwargs)

    def get(self, name: str) -> Any:
        """The value, None where it was not given."""
        place = self._places.get(name, len(self.args))
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    def put(self, name: str, value: Any) -> None:
        """Give it another value."""
        place = self._places.get(name, len(self.args))
        if place < len(self.args):
            self.args[place] = value
        else:
            self.kwargs[name] = value


class PackedLayer(Adapter):
    """A layer whose rows are independent but for attention: run on the valid tokens alone.

    A subclass names the parameters of the stock forward. Rows of padding come out 0. Everything is
    left as it is where there is no padding to leave out or the mask is not key padding (or causal
    with it), with a cache that holds something or is no `DynamicCache`, under torch.compile, where
    attention weights are asked for, and where somebody's hooks inside expect padded rows.
    """

    hidden: ClassVar[str] = "hidden_states"
    """The rows `[B, N, C]`."""
    mask: ClassVar[str] = "attention_mask"
    """Mask of the attention of the rows among themselves."""
    context: ClassVar[str | None] = None
    """Rows of another stream `[B, M, C']` that these attend to."""
    context_mask: ClassVar[str | None] = None
    context_packed: ClassVar[bool] = False
    """The layer takes it that both streams have one batch size: never one packed alone."""
    context_rows: ClassVar[tuple[str, ...]] = ()
    """More that has a value for each row of the context."""
    context_alone: ClassVar[bool] = False
    """The context's padding is left out also where the rows have none."""
    rows: ClassVar[tuple[str, ...]] = ()
    """More that has a value for each row `[B, N, ...]`, or a tuple of such."""
    caches: ClassVar[tuple[str, ...]] = ("past_key_values", "past_key_value", "layer_past")
    result: ClassVar[tuple[int, ...]] = (0,)
    """Which items of a tuple result are rows."""
    holes: ClassVar[bool] = True
    """Padding may be anywhere; False: on the right only (positions inside the layer count)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, without padding."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        given = Arguments(self, args, kwargs)
        packing = self._packing(given)
        if packing is None:
            self._pack_context(given)
            return super().forward(*given.args, **given.kwargs)
        layout, in_place_of_mask = packing
        context = None if self.context is None else given.get(self.context)
        keys: Layout | None = None
        if context is not None:
            assert self.context is not None
            mask = None if self.context_mask is None else given.get(self.context_mask)
            packed = cross_mask(mask, context, layout, self.context_packed)
            if packed is None:
                return super().forward(*args, **kwargs)
            given.put(self.context, packed[0])
            if self.context_mask is not None:
                given.put(self.context_mask, packed[1])
            keys = packed[1].kv
            if keys is not None:
                for name in self.context_rows:
                    given.put(name, keys.pack(given.get(name)))
        given.put(self.mask, in_place_of_mask)
        self._stand_in(given, layout, keys)
        for name in (self.hidden, *self.rows):
            given.put(name, layout.pack(given.get(name)))
        return self._unpacked(super().forward(*given.args, **given.kwargs), layout)

    def _pack_context(self, given: Arguments) -> None:
        """Leave out the context's padding; the rows stay as they are."""
        if not self.context_alone or self.context is None or self.context_mask is None:
            return
        context, mask = given.get(self.context), given.get(self.context_mask)
        if not isinstance(context, Tensor) or not self._may_pack(given):
            return
        # Two projections of the context, keys and values, are what a row of it costs.
        layout = layout_of(self, mask, context, work=2 * context.shape[-1] ** 2)
        pattern = None if layout is None else recognised(mask)
        if layout is None or pattern is None or pattern.causal or pattern.dead is not None:
            return
        given.put(self.context_mask, PackedMask(None, layout))
        self._stand_in(given, None, layout)
        for name in (self.context, *self.context_rows):
            given.put(name, layout.pack(given.get(name)))

    def _stand_in(self, given: Arguments, rows: Layout | None, context: Layout | None) -> None:
        for name in self.caches:
            if given.get(name) is not None:
                given.put(name, Prefill.of(given.get(name), rows, context))

    def _packing(self, given: Arguments) -> tuple[Layout, PackedMask] | None:
        """Which rows to compute, and what stands in the mask's place; None: all of them."""
        layout = self._layout(given)
        return None if layout is None else (layout, self_mask(given.get(self.mask), layout))

    def _layout(self, given: Arguments) -> Layout | None:
        # Most calls end at the mask: there is none, or it is known to hold no padding.
        layout = layout_of(self, given.get(self.mask), given.get(self.hidden))
        if layout is None or (layout.holes and not self.holes) or not self._may_pack(given):
            return None
        return layout

    def _may_pack(self, given: Arguments) -> bool:
        """Whether nothing but the mask speaks against it."""
        if not isinstance(given.get(self.hidden), Tensor) or given.get("output_attentions"):
            return False
        if getattr(self, "chunk_size_feed_forward", 0):
            return False
        attends_to_both = self.context is not None and given.get(self.context) is not None
        return all(Prefill.takes(given.get(name), self, attends_to_both) for name in self.caches)

    def _unpacked(self, result: Any, layout: Layout) -> Any:
        if isinstance(result, Tensor):
            return layout.unpack(result)
        items = [layout.unpack(x) if i in self.result else x for i, x in enumerate(result)]
        return type(result)(items)
