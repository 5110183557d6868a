"""How the streams of a model see each other, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Parameter

from mmfast.nn._attention_maps import BOTTLENECK, AttentionMaps
from mmfast.nn._modality_stream import ModalityStream
from mmfast.nn._tokens import take_rows
from mmfast.nn.packed_tokens import PackedTokens

PATTERNS = ("all_to_all", "to_anchor", "bottleneck")


class Joined:
    """Streams one after the other, item by item. Where each token goes is worked out once.

    The streams are all packed or all padded; `tokens` and `split` take other values of the same
    streams, as the next layers have them.
    """

    def __init__(self, streams: Sequence[ModalityStream]) -> None:
        self.streams = tuple(streams)
        self._packed: PackedTokens | None = None
        if len(streams) > 1 and isinstance(streams[0].tokens, PackedTokens):
            rows, start = [], 0
            for stream in streams:
                tokens = stream.packed()
                ids = torch.arange(start, start + tokens.total, device=tokens.device)
                rows.append(tokens.with_values(ids))
                start += tokens.total
            self._packed = PackedTokens.join(rows)

    def tokens(self, streams: Sequence[ModalityStream]) -> ModalityStream:
        """The streams joined."""
        if len(streams) == 1:
            return streams[0]
        parts: list[Any] = [stream.tokens for stream in streams]
        if self._packed is not None:
            values = torch.cat([part.values for part in parts])
            return ModalityStream(self._packed.with_values(take_rows(values, self._packed.values)))
        joined = torch.cat(parts, dim=1)
        if not any(stream.ragged for stream in streams):
            return ModalityStream(joined)
        *before, last = streams
        if last.lens is not None and not any(stream.ragged for stream in before):
            return ModalityStream(joined, last.lens + sum(stream.length for stream in before))
        pads = [stream.padding() for stream in streams]
        return ModalityStream(
            joined,
            pad=torch.cat(
                [
                    torch.zeros(part.shape[:2], dtype=torch.bool, device=part.device)
                    if pad is None
                    else pad
                    for part, pad in zip(parts, pads, strict=True)
                ],
                dim=1,
            ),
        )

    def split(self, joined: ModalityStream) -> list[ModalityStream]:
        """The inverse of `tokens`."""
        streams, tokens = self.streams, joined.tokens
        if self._packed is not None:
            assert isinstance(tokens, PackedTokens)
            inverse = torch.empty_like(self._packed.values)
            inverse[self._packed.values] = torch.arange(inverse.shape[0], device=inverse.device)
            values = take_rows(tokens.values, inverse)
            parts = values.split([stream.packed().total for stream in streams])
            return [
                stream.rows(lambda _, part=part: part)  # type: ignore[misc]
                for stream, part in zip(streams, parts, strict=True)
            ]
        assert isinstance(tokens, Tensor)
        pieces = tokens.split([stream.length for stream in streams], dim=1)
        return [s._replace(tokens=piece) for s, piece in zip(streams, pieces, strict=True)]


class CoAttention(Module):
    """Layers in which K streams see each other in one of `PATTERNS`.

    Args:
        names: of the modalities.
        pattern: "all_to_all": each stream attends to the tokens of all others, under one softmax.
            "to_anchor": the stream `anchor` does, the others only see themselves. "bottleneck":
            each stream attends to itself and to bottleneck tokens, which are then averaged over the
            streams that the item has (Nagrani et al. 2021).
        num_layers: how many layers.
        fusion_layer: layers before it see only their own stream.
        make_layer: gives a layer, with cross-attention where its argument is True.
        num_bottlenecks, d_model: number and width of the bottleneck tokens.
        factory: device and dtype of the parameters.
    """

    def __init__(
        self,
        names: Sequence[str],
        pattern: str,
        anchor: str | None,
        num_layers: int,
        fusion_layer: int,
        make_layer: Callable[[bool], Module],
        num_bottlenecks: int,
        d_model: int,
        factory: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.names, self.pattern, self.anchor = tuple(names), pattern, anchor
        self.fusion_layer = fusion_layer
        self.layers = ModuleList(
            ModuleDict(
                {
                    name: make_layer(bool(self._sources(name)) and depth >= fusion_layer)
                    for name in names
                }
            )
            for depth in range(num_layers)
        )
        self.bottlenecks: Parameter | None = None
        if pattern == "bottleneck" and fusion_layer < num_layers:
            self.bottlenecks = Parameter(torch.empty(num_bottlenecks, d_model, **factory))
        self._reset_bottlenecks()

    def reset_parameters(self) -> None:
        """Every layer anew; bottleneck tokens ~ N(0, 0.02), as published."""
        for layers in self.layers:
            assert isinstance(layers, ModuleDict)
            for layer in layers.values():
                layer.reset_parameters()  # type: ignore[operator]
        self._reset_bottlenecks()

    def _reset_bottlenecks(self) -> None:
        if self.bottlenecks is not None:
            torch.nn.init.normal_(self.bottlenecks, std=0.02)

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return f"pattern={self.pattern!r}, anchor={self.anchor!r}, fusion_layer={self.fusion_layer}"

    def _sources(self, name: str) -> tuple[str, ...]:
        """Whose tokens the stream `name` attends to, besides its own."""
        if self.pattern == "all_to_all" or (self.pattern == "to_anchor" and name == self.anchor):
            return tuple(other for other in self.names if other != name)
        return ()

    def forward(
        self, streams: Mapping[str, ModalityStream], maps: AttentionMaps | None = None
    ) -> dict[str, ModalityStream]:
        """The streams of the modalities that are there, after all layers.

        All streams packed, or all padded with lengths and masks on their device and zeros in the
        padding. What layers saw is added to `maps`.
        """
        streams = dict(streams)
        sources = {k: [s for s in self._sources(k) if s in streams] for k in streams}
        joins: dict[str, Joined] = {}
        bottleneck = self._first_bottleneck(streams)
        for depth, layers in enumerate(self.layers):
            assert isinstance(layers, ModuleDict)
            together = depth >= self.fusion_layer
            if together and bottleneck is not None:
                streams, bottleneck = self._through_bottleneck(
                    layers, streams, bottleneck, joins, maps
                )
                continue
            after = {}
            for name, stream in streams.items():
                if not (together and sources[name]):
                    after[name] = _self_attended(layers[name], stream)
                    continue
                parts = [streams[source] for source in sources[name]]
                if name not in joins:
                    joins[name] = Joined(parts)
                memory = joins[name].tokens(parts)
                asked = {} if maps is None else maps.asked
                result = layers[name](
                    stream.tokens,
                    memory.tokens,
                    **_padding("tgt", stream),
                    **_padding("memory", memory),
                    **asked,
                )
                after[name] = stream._replace(tokens=result.out if asked else result)
                if maps is not None:
                    maps.add(name, stream, sources[name], parts, result.importance, result.weights)
            streams = after
        return streams

    def _first_bottleneck(self, streams: Mapping[str, ModalityStream]) -> ModalityStream | None:
        if self.bottlenecks is None or not streams:
            return None
        some = next(iter(streams.values()))
        like = some.tokens.values if isinstance(some.tokens, PackedTokens) else some.tokens
        tokens = self.bottlenecks.to(like.dtype).expand(some.batch, -1, -1)
        if isinstance(some.tokens, PackedTokens):
            return ModalityStream(PackedTokens.from_padded(tokens))
        return ModalityStream(tokens)

    @staticmethod
    def _through_bottleneck(
        layers: ModuleDict,
        streams: Mapping[str, ModalityStream],
        bottleneck: ModalityStream,
        joins: dict[str, Joined],
        maps: AttentionMaps | None,
    ) -> tuple[dict[str, ModalityStream], ModalityStream]:
        """One layer over `[bottleneck, stream]` for each stream; the mean of the bottlenecks."""
        after, updates = {}, []
        for name, stream in streams.items():
            # In front of the tokens: right padding stays right padding.
            parts = [bottleneck, stream]
            if name not in joins:
                joins[name] = Joined(parts)
            both = joins[name].tokens(parts)
            asked = {} if maps is None else maps.asked
            result = layers[name](both.tokens, **_padding("tgt", both), **asked)
            out = both._replace(tokens=result.out if asked else result)
            updated, after[name] = joins[name].split(out)
            updates.append(torch.where(stream.there().view(-1, 1, 1), updated.padded(), 0.0))
            if maps is not None:
                maps.add_self(
                    name, both, (BOTTLENECK, name), parts,
                    result.self_importance, result.self_weights,
                )  # fmt: skip
        having = torch.stack([stream.there() for stream in streams.values()]).sum(0)
        mean = torch.stack(updates).sum(0) / having.clamp(min=1).view(-1, 1, 1)
        mean = torch.where(having.view(-1, 1, 1) > 0, mean, bottleneck.padded())
        if isinstance(bottleneck.tokens, PackedTokens):
            return after, bottleneck.rows(lambda _: mean.flatten(0, 1))
        return after, ModalityStream(mean)


def _self_attended(layer: Module, stream: ModalityStream) -> ModalityStream:
    """A stream that nothing else reaches: a layer with cross-attention is given no memory."""
    return stream._replace(tokens=layer(stream.tokens, **_padding("tgt", stream)))


def _padding(name: str, stream: ModalityStream) -> dict[str, Tensor]:
    """Its lengths or its mask as arguments of a layer."""
    if stream.lens is not None:
        return {f"{name}_lens": stream.lens}
    if stream.pad is not None:
        return {f"{name}_key_padding_mask": stream.pad}
    return {}
