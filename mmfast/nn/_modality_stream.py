"""The tokens of one modality on their way through a model: padded, or packed where they can be.

Encoders answer in many ways. `modality_stream` makes a `ModalityStream` of each; everything after
it knows one form. A ragged stream is packed where its lengths can be read at no cost (CPU, eager,
or lengths on the CPU beside tokens on an accelerator) and stays padded, with lengths or a mask,
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.nn._tokens import padded_rows, readable, take_rows
from mmfast.nn.packed_tokens import PackedTokens


class ModalityStream(NamedTuple):
    """Tokens of a batch: `PackedTokens`, or `[B, N, C]` with lengths, a padding mask or neither."""

    tokens: Tensor | PackedTokens
    lens: Tensor | None = None
    """`[B]` integers: valid tokens of each item of a padded stream; None: all."""
    pad: Tensor | None = None
    """bool `[B, N]`, True at padding; where it is not all on the right, instead of lens."""
    origin: PackedTokens | None = None
    """Where packed tokens lie in the padded batch, if `tokens` has forgotten it."""

    @property
    def batch(self) -> int:
        """The number of items."""
        tokens = self.tokens
        return tokens.batch if isinstance(tokens, PackedTokens) else tokens.shape[0]

    @property
    def length(self) -> int:
        """The padded length N."""
        tokens = self.tokens if self.origin is None else self.origin
        return tokens.length if isinstance(tokens, PackedTokens) else tokens.shape[1]

    @property
    def ragged(self) -> bool:
        """Is there padding, as far as one can say?"""
        if isinstance(self.tokens, PackedTokens):
            return True
        return self.lens is not None or self.pad is not None

    def rows(self, function: Callable[[Tensor], Tensor]) -> ModalityStream:
        """With `function` applied to every token."""
        if isinstance(self.tokens, PackedTokens):
            return self._replace(tokens=self.tokens.with_values(function(self.tokens.values)))
        return self._replace(tokens=function(self.tokens))

    def counts(self) -> Tensor | None:
        """`[B]`: the number of tokens of each item; None: all have N."""
        if isinstance(self.tokens, PackedTokens):
            return self.tokens.lens
        return self.lens if self.pad is None else self.pad.logical_not().sum(1)

    def there(self) -> Tensor:
        """bool `[B]`: which items have a token."""
        counts, tokens = self.counts(), self.tokens
        if counts is None:
            return torch.full((self.batch,), self.length > 0, device=tokens.device)
        return counts.to(tokens.device) > 0

    def padding(self) -> Tensor | None:
        """bool `[B, N]`, True at padding, of a padded stream; None: there is none."""
        if self.lens is None:
            return self.pad
        return padded_rows(self.lens, self.length)

    def clean(self) -> ModalityStream:
        """With zeros in the padding of a padded stream: it may be NaN, and 0 * NaN is NaN."""
        if isinstance(self.tokens, PackedTokens):
            return self
        padding = self.padding()
        if padding is None:
            return self
        return self._replace(tokens=self.tokens.masked_fill(padding.unsqueeze(-1), 0.0))

    def padded(self) -> Tensor:
        """`[B, N, C]`, with zeros in padding."""
        tokens = self.clean().tokens
        if not isinstance(tokens, PackedTokens):
            return tokens
        return (self.origin or tokens).with_values(tokens.values).to_padded()

    def placed(self) -> PackedTokens:
        """Packed tokens that know where they lie in the padded batch."""
        return self.packed() if self.origin is None else self.origin

    def in_order(self) -> ModalityStream:
        """Packed tokens that have forgotten it: what attends to them knows items and rows alone."""
        tokens = self.tokens
        if not isinstance(tokens, PackedTokens) or tokens.positions is None:
            return self
        plain = PackedTokens(tokens.values, tokens.cu_seqlens, tokens.max_len)
        return self._replace(tokens=plain, origin=tokens)

    def packable(self) -> bool:
        """Is the number of its tokens known on the host?"""
        if torch.compiler.is_compiling():
            return False
        return all(readable(t) for t in (self.lens, self.pad) if t is not None)

    def packed(self) -> PackedTokens:
        """Without the padding; for what is `packable`."""
        if isinstance(self.tokens, PackedTokens):
            return self.tokens
        return PackedTokens.from_padded(self.tokens, self.lens, self.pad)

    def unpacked(self) -> ModalityStream:
        """Padded, with lengths or a mask beside the tokens on their device and zeros in padding."""
        tokens = self.tokens
        if not isinstance(tokens, PackedTokens):
            lens = None if self.lens is None else self.lens.to(tokens.device, non_blocking=True)
            pad = None if self.pad is None else self.pad.to(tokens.device, non_blocking=True)
            return ModalityStream(tokens, lens, pad).clean()
        if tokens.positions is None:
            return ModalityStream(tokens.to_padded(), tokens.lens)
        index = tokens.padded_index(tokens.length)
        pad = torch.ones(tokens.batch * tokens.length, dtype=torch.bool, device=tokens.device)
        pad = pad.logical_not() if index is None else pad.index_fill(0, index, False)
        return ModalityStream(tokens.to_padded(), pad=pad.view(tokens.batch, tokens.length))

    def limited(self, present: Tensor | None) -> ModalityStream:
        """Without the tokens of items for which `present`, bool `[B]`, is False."""
        if present is None:
            return self
        if isinstance(self.tokens, PackedTokens):
            return ModalityStream(_items(self.tokens, present.to(self.tokens.device)))
        if self.pad is not None:
            present = present.to(self.pad.device)
            return self._replace(pad=self.pad | present.logical_not().unsqueeze(1))
        if self.lens is not None:
            return self._replace(lens=self.lens * present.to(self.lens.device))
        return self._replace(lens=present.to(torch.int64) * self.length)


def _items(packed: PackedTokens, present: Tensor) -> PackedTokens:
    """Only the tokens of these items; how many those are is read from the device."""
    index = present[packed.items].nonzero().squeeze(1)
    if index.shape[0] == packed.total:
        return packed
    where = packed.positions
    return PackedTokens(
        take_rows(packed.values, index),
        _offsets(packed.lens * present),
        packed.max_len,
        positions=None if where is None else where.index_select(0, index),
        length=packed.length,
    )


def spread(stream: ModalityStream, items: Tensor, batch: int) -> ModalityStream:
    """Items that were encoded alone at their places in the batch; the others have no tokens."""
    where = items.to(stream.tokens.device)
    if not stream.packable():  # the encoder gave lengths that cannot be read
        tokens, lens, pad, _ = stream.unpacked()
        assert isinstance(tokens, Tensor)
        whole = tokens.new_zeros(batch, *tokens.shape[1:]).index_copy(0, where, tokens)
        if lens is not None:
            return ModalityStream(whole, lens.new_zeros(batch).index_copy(0, where, lens))
        assert pad is not None
        everywhere = torch.ones(batch, pad.shape[1], dtype=torch.bool, device=pad.device)
        return ModalityStream(whole, pad=everywhere.index_copy(0, where, pad))
    packed = stream.packed()
    lens = packed.lens.new_zeros(batch).index_copy(0, where, packed.lens)
    return ModalityStream(
        PackedTokens(
            packed.values,
            _offsets(lens),
            packed.max_len,
            positions=packed.positions,
            length=packed.length,
        )
    )


def _offsets(lens: Tensor) -> Tensor:
    return torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))


def modality_stream(
    op: str, name: str, output: Any, width: int, source: Any = None
) -> ModalityStream:
    """What the encoder of modality `name` gave, as a stream.

    Args:
        op: the module that errors name.
        output: `[B, N, width]`, `[B, width]` (one token), `PackedTokens`, a jagged nested tensor, a
            list of `[N_b, width]`, `(tokens, lens)`, or what transformers' models return: an
            object or mapping with `last_hidden_state`, or a tuple that begins with it.
        source: what the encoder was given; its `attention_mask` says which tokens are padding where
            `output` itself does not.
    """
    lens = None
    if isinstance(output, Mapping) and "last_hidden_state" in output:
        output = output["last_hidden_state"]
    elif hasattr(output, "last_hidden_state"):
        output = output.last_hidden_state
    elif isinstance(output, tuple) and len(output) > 0:
        if len(output) == 2 and _are_counts(output[1]):
            lens = output[1]
        output = output[0]
    elif isinstance(output, list) and len(output) > 0:
        output = _from_list(op, name, output, width)
    if isinstance(output, Tensor) and output.is_nested:
        output = PackedTokens.from_nested(output)
    _check_tokens(op, name, output, width)
    if isinstance(output, PackedTokens):
        return ModalityStream(output)
    stream = ModalityStream(output.unsqueeze(1) if output.dim() == 2 else output)
    if lens is not None:
        return with_lens(op, name, stream, lens)
    mask = source.get("attention_mask") if isinstance(source, Mapping) else None
    if isinstance(mask, Tensor) and list(mask.shape) == [stream.batch, stream.length]:
        return stream._replace(pad=mask == 0)
    return stream


def with_lens(op: str, name: str, stream: ModalityStream, lens: Any) -> ModalityStream:
    """The stream with lengths that the caller gave, in place of its own."""
    if isinstance(stream.tokens, PackedTokens):
        raise ValueError(
            f"{op}: lens has {name!r}, but its tokens are packed and know their lengths; leave it "
            f"out"
        )
    if not _are_counts(lens):
        got = f"{lens.dtype} {list(lens.shape)}" if isinstance(lens, Tensor) else type(lens)
        raise TypeError(
            f"{op}: the lens of {name!r} must be an integer tensor [batch], got {got}; it counts "
            f"the valid tokens that the encoder gave for each item"
        )
    if lens.shape[0] != stream.batch:
        raise ValueError(
            f"{op}: the lens of {name!r} has {lens.shape[0]} items but its tokens have "
            f"{stream.batch}; give one integer for each item"
        )
    if readable(lens):
        low, high = (int(lens.min()), int(lens.max())) if lens.numel() else (0, 0)
        if low < 0 or high > stream.length:
            raise ValueError(
                f"{op}: the lens of {name!r} holds {low if low < 0 else high}, allowed are 0 to "
                f"{stream.length}, the tokens that its encoder gave"
            )
        if low == stream.length:
            return ModalityStream(stream.tokens)
    return ModalityStream(stream.tokens, lens)


def _are_counts(value: Any) -> bool:
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype in kinds


def _check_tokens(op: str, name: str, output: Any, width: int) -> None:
    tokens = output.values if isinstance(output, PackedTokens) else output
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"{op}: the encoder of {name!r} gave a {type(tokens).__name__}; expected tokens "
            f"[batch, tokens, {width}], PackedTokens, (tokens, lens) or an output with "
            f"last_hidden_state"
        )
    if not tokens.is_floating_point():
        raise TypeError(
            f"{op}: the encoder of {name!r} gave {tokens.dtype}; expected floating-point tokens: "
            f"embed or convert them"
        )
    dims = (2,) if isinstance(output, PackedTokens) else (2, 3)
    if tokens.dim() not in dims:
        remedy = "; flatten a feature map with x.flatten(2).transpose(1, 2)"
        raise ValueError(
            f"{op}: the encoder of {name!r} gave {list(tokens.shape)}; expected "
            f"[batch, tokens, {width}] or [batch, {width}]{remedy if tokens.dim() == 4 else ''}"
        )
    if tokens.shape[-1] != width:
        raise ValueError(
            f"{op}: the encoder of {name!r} gave tokens of width {tokens.shape[-1]} "
            f"({list(tokens.shape)}) but widths[{name!r}] is {width}; both must match"
        )


def _from_list(op: str, name: str, items: Sequence[Any], width: int) -> PackedTokens:
    """A list of `[N_b, width]`, one an item."""
    for b, item in enumerate(items):
        if not isinstance(item, Tensor) or item.dim() != 2 or item.shape[1] != width:
            got = list(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise ValueError(
                f"{op}: {name!r} is a list whose item {b} is {got}; expected tensors "
                f"[tokens, {width}], one for each item of the batch"
            )
    counts = [item.shape[0] for item in items]
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(items[0].device)
    return PackedTokens(torch.cat(list(items)), offsets, max(counts))
