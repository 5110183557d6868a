"""Which modalities the items of a batch have, and the tokens that encoders make of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, LayerNorm, Linear, Module, Parameter

from mmfast.nn import _batches
from mmfast.nn._init import reset_linear
from mmfast.nn._modality_stream import ModalityStream, modality_stream, spread, with_lens
from mmfast.nn._tokens import readable
from mmfast.nn.packed_tokens import PackedTokens

Columns = list[Tensor | None]


class Alignment(Module):
    """Tokens of one modality into the space of all: `LayerNorm(x W + b) + type_embedding`."""

    def __init__(self, width: int, d_model: int, eps: float, factory: Mapping[str, Any]) -> None:
        super().__init__()
        self.proj = Linear(width, d_model, **factory)
        self.norm = LayerNorm(d_model, eps=eps, **factory)
        self.type_embedding = Parameter(torch.empty(d_model, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projection, unit norm, type embedding ~ N(0, 0.02)."""
        reset_linear(self.proj)
        self.norm.reset_parameters()
        torch.nn.init.normal_(self.type_embedding, std=0.02)

    def forward(self, stream: ModalityStream) -> ModalityStream:
        """Of every token; an encoder may work in another dtype."""
        like = self.type_embedding  # the weight of proj may be quantised
        autocast = not like.is_meta and torch.is_autocast_enabled(like.device.type)

        def align(x: Tensor) -> Tensor:
            return self.norm(self.proj(x if autocast else x.to(like.dtype))) + like

        return stream.rows(align)


def presence_columns(op: str, names: Sequence[str], present: Any) -> Columns:
    """`present`, bool `[B, K]` or a mapping from modalities to bool `[B]`, one by one."""
    if present is None:
        return [None] * len(names)
    if isinstance(present, Mapping):
        for name in present:
            if name not in names:
                raise ValueError(f"{op}: present has {name!r}, but modalities are {list(names)}")
        columns = [present.get(name) for name in names]
    else:
        if isinstance(present, Tensor) and (
            present.dim() != 2 or present.shape[1] != len(names) or present.dtype != torch.bool
        ):
            raise ValueError(
                f"{op}: present is {present.dtype} {list(present.shape)}, expected bool "
                f"[batch, {len(names)}], one column for each of {list(names)}; True = the item has "
                f"the modality"
            )
        if not isinstance(present, Tensor):
            raise TypeError(
                f"{op}: present must be a bool tensor [batch, {len(names)}] or a mapping from "
                f"modalities to bool [batch], got {type(present).__name__}"
            )
        columns = list(present.unbind(1))
    for name, column in zip(names, columns, strict=True):
        if column is not None and (
            not isinstance(column, Tensor) or column.dtype != torch.bool or column.dim() != 1
        ):
            raise TypeError(
                f"{op}: present[{name!r}] must be a bool tensor [batch], got "
                f"{getattr(column, 'dtype', type(column).__name__)}; convert it with != 0"
            )
    return columns


def batch_size(
    op: str,
    inputs: Mapping[str, Any],
    encoders: Mapping[str, Any],
    columns: Columns,
    lens: Mapping[str, Any],
) -> int | None:
    """The number of items as `present`, lens and features show it; None where none of those do.

    What goes into an encoder does not show it for certain: it may be all frames of all videos.
    """
    sizes = {
        f"inputs[{name!r}]": _batches.batch_of(value)
        for name, value in inputs.items()
        if isinstance(encoders[name], Identity)
    }
    sizes |= {f"lens[{n!r}]": _batches.batch_of(v) for n, v in lens.items() if n in inputs}
    sizes["present"] = next((c.shape[0] for c in columns if c is not None), None)
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in known.items())
        raise ValueError(f"{op}: the number of items differs: {listed}; all must match")
    return next(iter(known.values()), None)


def available(
    op: str,
    names: Sequence[str],
    inputs: Mapping[str, Any],
    lens: Mapping[str, Any],
    columns: Columns,
) -> Columns:
    """Which items have each modality, bool `[B]`; None: all have it, or it is not in inputs."""
    found: Columns = []
    for name, column in zip(names, columns, strict=True):
        if name not in inputs:
            if column is not None and readable(column) and bool(column.any()):
                raise ValueError(
                    f"{op}: present says that {int(column.sum())} items have {name!r}, but it is "
                    f"not in inputs"
                )
            found.append(None)
            continue
        listed = _batches.none_items(inputs[name])
        conditions = [] if column is None else [column]
        if listed is not None:
            conditions.append(torch.tensor(listed))
        if isinstance(lens.get(name), Tensor):
            conditions.append(lens[name] > 0)
        place = next((c.device for c in conditions if not c.is_cpu), torch.device("cpu"))
        there: Tensor | None = None
        for condition in conditions:
            condition = condition.to(place)
            there = condition if there is None else there & condition
        if there is not None and readable(there) and bool(there.all()):
            there = None
        found.append(there)
    return found


def drop_modalities(
    names: Sequence[str],
    inputs: Mapping[str, Any],
    columns: Columns,
    batch: int,
    probabilities: Sequence[float],
    device: torch.device,
) -> Columns:
    """Each modality of each item goes with its probability; one of those it has always stays."""
    if not torch.compiler.is_compiling():  # where the result can be read: nothing waits
        device = torch.device("cpu")
    device = next((c.device for c in columns if c is not None and not c.is_cpu), device)
    none, every = (torch.full((batch,), value, device=device) for value in (False, True))
    there = torch.stack(
        [
            none if name not in inputs else every if column is None else column.to(device)
            for name, column in zip(names, columns, strict=True)
        ],
        dim=1,
    )
    draws = torch.rand(there.shape, device=device)
    stays = draws >= torch.tensor(probabilities, device=device)
    last = draws.masked_fill(there.logical_not(), -1.0).argmax(1, keepdim=True)
    last = torch.zeros_like(stays).scatter(1, last, True)
    lost = (there & stays).any(1, keepdim=True).logical_not()
    kept = there & (stays | (last & lost))
    return [
        column if name in inputs else None
        for name, column in zip(names, kept.unbind(1), strict=True)
    ]


def encode(
    op: str,
    name: str,
    encoder: Module,
    value: Any,
    width: int,
    *,
    lens: Any,
    there: Tensor | None,
    batch: int | None,
    frozen: bool,
) -> ModalityStream | None:
    """The tokens of one modality for the whole batch; None where no item has it.

    Items without the modality are not encoded where that can be known at no cost, and zeros are
    encoded for them elsewhere: what they hold may be NaN.
    """
    items: Tensor | None = None
    if batch is None and there is not None:
        batch = there.shape[0]
    if there is not None and readable(there):
        items = there.nonzero().squeeze(1)
        if items.numel() == there.numel():
            there = items = None
        elif items.numel() == 0:
            return None
    given = value
    if not isinstance(encoder, Identity) and there is not None:
        if items is not None and batch is not None and _batches.can_pick(value, batch):
            given = _batches.pick(value, items)
            if lens is not None:
                lens = lens.index_select(0, items.to(lens.device))
        else:
            items = None
            given = _batches.blank(value, there)
    else:
        items = None
        if there is not None and isinstance(value, list):
            empty = next(item for item in value if item is not None)[:0]
            given = [empty if item is None else item for item in value]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        output = _run(encoder, given)
    stream = modality_stream(op, name, output, width, given)
    if lens is not None:
        stream = with_lens(op, name, stream, lens)
    encoded = batch if items is None else items.numel()
    if encoded is not None and stream.batch != encoded:
        raise ValueError(
            f"{op}: the encoder of {name!r} gave {stream.batch} items for {encoded}; expected "
            f"[batch, tokens, {width}]"
        )
    if items is not None:
        assert batch is not None
        return spread(stream, items, batch)
    return stream.limited(there)


def uniform(streams: Mapping[str, ModalityStream]) -> dict[str, ModalityStream]:
    """All packed where one is ragged and its lengths can be read, else all padded."""
    if not any(stream.ragged for stream in streams.values()):
        return dict(streams)
    if all(stream.packable() for stream in streams.values()):
        packed = {name: stream.packed() for name, stream in streams.items()}
        if any(tokens.total < tokens.batch * tokens.length for tokens in packed.values()):
            return {name: ModalityStream(tokens).in_order() for name, tokens in packed.items()}
        return {name: ModalityStream(tokens.to_padded()) for name, tokens in packed.items()}
    return {name: stream.unpacked() for name, stream in streams.items()}


def first_token(stream: ModalityStream, padded: Tensor) -> Tensor:
    """`[B, C]`: the first valid token of each item, 0 where there is none."""
    tokens, there = stream.tokens, stream.there().unsqueeze(1)
    if isinstance(tokens, PackedTokens) and stream.origin is not None:
        if tokens.total == 0:
            return padded.sum(1)
        rows = tokens.cu_seqlens[:-1].clamp(max=tokens.total - 1)
        return torch.where(there, tokens.values.index_select(0, rows), 0.0)
    if stream.pad is not None and stream.length > 0:
        first = stream.pad.to(torch.uint8).argmin(1).view(-1, 1, 1)
        rows = padded.gather(1, first.expand(-1, -1, padded.shape[2])).squeeze(1)
        return torch.where(there, rows, 0.0)
    return padded[:, 0] if stream.length > 0 else padded.sum(1)


def mean_token(stream: ModalityStream, padded: Tensor) -> Tensor:
    """`[B, C]`: the mean of the valid tokens of each item, 0 where there is none."""
    counts = stream.counts()
    if counts is None:
        return padded.sum(1) / max(stream.length, 1)
    return padded.sum(1) / counts.clamp(min=1).unsqueeze(1).to(padded.dtype)


def _run(encoder: Module, value: Any) -> Any:
    if isinstance(encoder, Identity):
        return value
    if isinstance(value, Mapping):
        return encoder(**value)
    return encoder(*value) if isinstance(value, tuple) else encoder(value)
