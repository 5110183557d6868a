"""Encoders of several modalities, cross-modal layers, fusion and task heads in one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, LayerNorm, Linear, Module, ModuleDict

from mmfast.nn import _batches, _checks, _encoding, _multimodal_checks, _pretrained_model
from mmfast.nn._attention_maps import AttentionMaps
from mmfast.nn._co_attention import CoAttention
from mmfast.nn._init import reset_linear
from mmfast.nn._modality_stream import ModalityStream
from mmfast.nn._multimodal_output import MultimodalOutput
from mmfast.nn._task_heads import Loss, TaskLosses, make_heads
from mmfast.nn._unused import touch
from mmfast.nn.attention_pooling import AttentionPooling
from mmfast.nn.cross_modal_encoder_layer import CrossModalEncoderLayer
from mmfast.nn.gated_fusion import GatedFusion

_OP = "MultimodalTransformer"
_POOLINGS = ("attention", "mean", "first")


class MultimodalTransformer(Module):
    r"""Any number of modalities, from their encoders to the losses of several tasks::

        t_k      = LayerNorm(encoder_k(x_k) W_k + b_k) + type_k        alignment, [B, N_k, d_model]
        t_1..t_K = num_layers cross-modal layers, in which the streams see each other
        p_k      = pool(t_k)                                           [B, d_model]
        features = GatedFusion(p_1, ..., p_K)                          [B, d_model]
        logits_h = head_h(features),   loss = sum_h weight_h loss_h

    Patterns (`CrossModalEncoderLayer` is self-attention, cross-attention and feed-forward network):

    - "all_to_all": every stream attends to the tokens of all the others, under one softmax.
    - "to_anchor": the stream `anchor` does (text that looks at an image and hears a sound); the
      others see themselves only. Cost grows linearly with the modalities.
    - "bottleneck": streams see themselves and `num_bottlenecks` tokens which all of them share;
      each stream updates those, and they are averaged over the streams that the item has
      (Nagrani et al. 2021). The cheapest for long streams.

    **Missing modality.** Say it for an item by `present`, by a length of 0, by None in a list, or
    leave the modality out of `inputs`: all give the same. It contributes exactly nothing, its
    content may be NaN, it changes no gradient, and on the CPU (or with `present` on the CPU) its
    encoder is not run for that item. An item that has nothing has features 0. A modality that no
    item of a batch has costs nothing; its parameters get no gradient then, which
    DistributedDataParallel wants to know: `find_unused_parameters=True`, or here
    `zero_unused=True`.

    **Padding** is computed only where lengths cannot be read (`torch.compile`, lengths on an
    accelerator); in eager mode the streams are packed once and padded once.

    Args:
        encoders: modality -> any module, or None where `inputs` holds features already. It gives
            `[B, N, width]`, `[B, width]` (one token), `PackedTokens`, a nested tensor,
            `(tokens, lens)`, a list of `[N_b, width]`, or an output of transformers
            (`last_hidden_state`; padding by the input's `attention_mask`). A mapping is passed to
            it as keyword arguments, a tuple as positional ones, anything else as it is.
        widths: modality -> width of what its encoder gives.
        d_model, nhead, num_layers: of the cross-modal layers.
        pattern: "all_to_all", "to_anchor" or "bottleneck".
        anchor: the modality that attends to the others; only for "to_anchor".
        num_bottlenecks: bottleneck tokens.
        fusion_layer: layers before it see only their own stream (mid fusion; `num_layers`: late
            fusion).
        dim_feedforward: default `4 * d_model`.
        dropout: in the layers, in training.
        activation: of the feed-forward networks, as `CrossModalEncoderLayer`.
        layer_norm_eps: of all norms.
        norm_first: norms before the branches, and one more at the end, or after them.
        pooling: "attention" (`AttentionPooling`, a learned query for each modality), "mean" or
            "first" (encoders with a class token in front).
        fusion: mode of `GatedFusion`: "softmax", "sigmoid" or "gmu".
        heads: task -> number of outputs or any module over `[B, d_model]`.
        losses: task -> "cross_entropy" (default of heads with several outputs),
            "binary_cross_entropy", "mse", "l1", or a function `(logits, target) -> scalar`. The
            named ones leave out targets of -100 (classes) or NaN (numbers).
        loss_weights: task -> factor in the sum; default 1.
        modality_dropout: probability with which an item loses a modality in training, one for all
            or modality -> probability; one of those that it has always stays. Whoever will lack a
            modality in use should train with it.
        frozen: modalities whose encoders are not trained: no gradients, always in eval mode.
        encoder_specs: modality -> `{"kind": name, ...}` in terms of JSON, kept by
            `save_pretrained`: `from_pretrained(registry={name: function})` calls
            `function(**the rest)`.
        zero_unused: parameters that a batch does not use get gradients of 0 instead of none.
        device, dtype: of the parameters that are made here.

    Modalities and tasks: `modalities` (their order is that of `widths` and of the columns of
    `present`), `encoders`, `alignments`, `layers`, `norms`, `pools`, `fusion`, `heads`.

    Raises:
        ValueError, TypeError: sizes that do not fit, unknown names, encoders that give something
            else; each says what was expected of which modality.

    Example:
        >>> import torch, mmfast
        >>> _ = torch.manual_seed(0)
        >>> model = mmfast.nn.MultimodalTransformer(
        ...     encoders={"image": torch.nn.Linear(48, 32), "audio": None},
        ...     widths={"image": 32, "audio": 20},
        ...     d_model=64, nhead=4, num_layers=2, heads={"digit": 10, "loudness": 1},
        ...     losses={"loudness": "mse"},
        ... ).eval()
        >>> patches, frames = torch.randn(3, 16, 48), torch.randn(3, 9, 20)
        >>> out = model(
        ...     {"image": patches, "audio": frames},
        ...     lens={"audio": torch.tensor([9, 5, 0])},  # item 2 has no sound
        ...     targets={"digit": torch.tensor([3, 1, 4]), "loudness": torch.rand(3)},
        ...     return_importance=True,
        ... )
        >>> out.logits["digit"].shape, sorted(out.losses), bool(out.modality_weights[2, 1] == 0)
        (torch.Size([3, 10]), ['digit', 'loudness'], True)
        >>> out.importance["audio"]["image"].shape  # which patches the sound looked at
        torch.Size([3, 2, 4, 16])
    """

    def __init__(
        self,
        encoders: Mapping[str, Module | None],
        widths: Mapping[str, int],
        d_model: int = 256,
        nhead: int = 4,
        num_layers: int = 4,
        *,
        pattern: str = "all_to_all",
        anchor: str | None = None,
        num_bottlenecks: int = 4,
        fusion_layer: int = 0,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = True,
        pooling: str = "attention",
        fusion: str = "softmax",
        heads: Mapping[str, int | Module] | None = None,
        losses: Mapping[str, Loss] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        modality_dropout: float | Mapping[str, float] = 0.0,
        frozen: Sequence[str] = (),
        encoder_specs: Mapping[str, Mapping[str, Any]] | None = None,
        zero_unused: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads, losses, weights = dict(heads or {}), dict(losses or {}), dict(loss_weights or {})
        names = _multimodal_checks.check_names(encoders, widths, pattern, anchor, heads)
        _multimodal_checks.require_known("frozen", frozen, names)
        _multimodal_checks.require_known("encoder_specs", encoder_specs or {}, names)
        _checks.require_sizes(
            _OP, d_model=d_model, nhead=nhead, num_layers=num_layers,
            num_bottlenecks=num_bottlenecks, dim_feedforward=dim_feedforward,
            **{f"widths[{name!r}]": width for name, width in widths.items()},
        )  # fmt: skip
        _checks.require_choice(_OP, "pooling", pooling, _POOLINGS)
        if not 0 <= fusion_layer <= num_layers:
            raise ValueError(
                f"{_OP}: fusion_layer is {fusion_layer}; expected 0 (streams see each other from "
                f"the first layer on) to num_layers={num_layers} (never)"
            )
        self.modalities, self.d_model, self.pooling = names, d_model, pooling
        self.frozen, self.zero_unused = tuple(frozen), zero_unused
        self._dropped = _multimodal_checks.probabilities(modality_dropout, names)
        self._config: dict[str, Any] = {
            "widths": {name: widths[name] for name in names}, "d_model": d_model, "nhead": nhead,
            "num_layers": num_layers, "pattern": pattern, "anchor": anchor,
            "num_bottlenecks": num_bottlenecks, "fusion_layer": fusion_layer,
            "dim_feedforward": dim_feedforward, "dropout": dropout, "activation": activation,
            "layer_norm_eps": layer_norm_eps, "norm_first": norm_first, "pooling": pooling,
            "fusion": fusion, "heads": heads, "losses": losses, "loss_weights": weights,
            "modality_dropout": modality_dropout, "frozen": list(frozen),
            "encoder_specs": {k: dict(v) for k, v in (encoder_specs or {}).items()},
            "zero_unused": zero_unused,
        }  # fmt: skip
        self._config["heads"] = {k: None if isinstance(v, Module) else v for k, v in heads.items()}
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def layer(cross_attention: bool) -> Module:
            return CrossModalEncoderLayer(
                d_model, nhead, dim_feedforward or 4 * d_model, dropout, activation,
                layer_norm_eps, norm_first=norm_first, cross_attention=cross_attention, **factory,
            )  # fmt: skip

        def norm() -> Module:
            return LayerNorm(d_model, eps=layer_norm_eps, **factory)

        given = {name: encoders[name] for name in names}
        self.encoders = ModuleDict({k: Identity() if v is None else v for k, v in given.items()})
        self.alignments = ModuleDict(
            {n: _encoding.Alignment(widths[n], d_model, layer_norm_eps, factory) for n in names}
        )
        self.layers = CoAttention(
            names, pattern, anchor, num_layers, fusion_layer, layer, num_bottlenecks, d_model,
            factory,
        )  # fmt: skip
        self.norms = ModuleDict({name: norm() for name in names} if norm_first else {})
        self.pools = ModuleDict()
        if pooling == "attention":
            for name in names:
                self.pools[name] = AttentionPooling(d_model, nhead, **factory)
        self.fusion = GatedFusion([d_model] * len(names), d_model, mode=fusion, **factory)
        self.heads = make_heads(_OP, d_model, heads, factory)
        self._losses = TaskLosses(_OP, heads, losses, weights)
        self._reset_heads()
        for name in self.frozen:
            self.encoders[name].requires_grad_(False).eval()

    def reset_parameters(self) -> None:
        """Every part that was made here anew; encoders and heads that were given stay."""
        parts = (self.alignments, self.norms, self.pools)
        for module in (*(m for part in parts for m in part.values()), self.layers, self.fusion):
            module.reset_parameters()  # type: ignore[operator]
        self._reset_heads()

    def _reset_heads(self) -> None:
        for name, outputs in self._config["heads"].items():
            head = self.heads[name]
            if outputs is not None and isinstance(head, Linear):
                reset_linear(head)

    def train(self, mode: bool = True) -> MultimodalTransformer:
        """As `torch.nn.Module.train`; frozen encoders stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.encoders[name].eval()
        return self

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return (
            f"modalities={list(self.modalities)}, d_model={self.d_model}, pooling={self.pooling!r}"
        )

    def forward(
        self,
        inputs: Mapping[str, Any],
        *,
        lens: Mapping[str, Tensor] | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
        targets: Mapping[str, Tensor] | None = None,
        return_attention: bool | str = False,
        return_importance: bool = False,
    ) -> MultimodalOutput:
        """Run the model.

        Args:
            inputs: modality -> what its encoder takes; left out or None: no item has it.
            lens: modality -> `[B]` integers: how many of the tokens that the encoder gives are
                valid. (0: the item does not have the modality.) Only for those that have padding;
                those tokens may be NaN.
            present: bool `[B, K]`, a column for each of `modalities`, or modality -> bool `[B]`;
                True = the item has it. Default: all have what is in `inputs`.
            targets: task -> target, for any of the heads.
            return_attention: also the cross-modal attention: True for the mean over heads,
                "per_head".
            return_importance: also its column sums, and what the pooling attended to.

        Returns:
            `MultimodalOutput`
        """
        inputs, lens = self._check(inputs, lens)
        if targets is not None:
            self._losses.check(targets)
        streams, batch = self._encode(inputs, lens, present)
        streams = {
            name: self.alignments[name](stream)
            for name, stream in _encoding.uniform(streams).items()
        }
        maps = None
        if return_importance or return_attention:
            maps = AttentionMaps(return_importance, return_attention)
        streams = self.layers(streams, maps)
        if self.norms:
            streams = {name: stream.rows(self.norms[name]) for name, stream in streams.items()}
        padded = {name: stream.padded() for name, stream in streams.items()}
        pooling: dict[str, Tensor] = {}
        pooled = {
            name: self._pooled(name, stream, padded[name], pooling if return_importance else None)
            for name, stream in streams.items()
        }
        features, weights = self._fused(streams, pooled, batch)
        if self.zero_unused:
            tasks = {id(parameter) for parameter in self.heads.parameters()}
            features = touch(features, [p for p in self.parameters() if id(p) not in tasks])
        logits = {name: head(features) for name, head in self.heads.items()}
        loss: Tensor | None = None
        losses: dict[str, Tensor] = {}
        if targets is not None:
            loss, losses = self._losses(logits, targets)
            if self.zero_unused:
                loss = touch(loss, list(self.heads.parameters()))
        return MultimodalOutput(
            logits, loss, losses, features, padded, weights,
            {} if maps is None else maps.importance(), {} if maps is None else maps.weights(),
            pooling,
        )  # fmt: skip

    def _encode(
        self, inputs: dict[str, Any], lens: Mapping[str, Tensor], present: Any
    ) -> tuple[dict[str, ModalityStream], int]:
        names = self.modalities
        columns = _encoding.presence_columns(_OP, names, present)
        encoders: Any = self.encoders
        batch = _encoding.batch_size(_OP, inputs, encoders, columns, lens)
        columns = _encoding.available(_OP, names, inputs, lens, columns)
        if self.training and any(self._dropped) and inputs:
            if batch is None:
                sizes = (_batches.batch_of(value) for value in inputs.values())
                batch = next((size for size in sizes if size is not None), None)
            if batch is None:
                raise ValueError(
                    f"{_OP}: modality_dropout needs the number of items before encoding, and "
                    f"inputs does not show it; give present"
                )
            columns = _encoding.drop_modalities(
                names, inputs, columns, batch, self._dropped, self._like().device
            )
        streams: dict[str, ModalityStream] = {}
        for name, there in zip(names, columns, strict=True):
            if name not in inputs:
                continue
            stream = _encoding.encode(
                _OP, name, encoders[name], inputs[name], self._config["widths"][name],
                lens=lens.get(name), there=there, batch=batch, frozen=name in self.frozen,
            )  # fmt: skip
            if stream is not None:
                streams[name] = stream
                batch = stream.batch if batch is None else batch
        if batch is None:
            raise ValueError(
                f"{_OP}: inputs has none of {list(names)} and present is not given, so that the "
                f"number of items is unknown; give one of them"
            )
        return streams, batch

    def _pooled(
        self,
        name: str,
        stream: ModalityStream,
        padded: Tensor,
        importance: dict[str, Tensor] | None,
    ) -> Tensor:
        """`[B, d_model]`, 0 for items without the modality."""
        if self.pooling == "mean":
            return _encoding.mean_token(stream, padded)
        if self.pooling == "first":
            return _encoding.first_token(stream, padded)
        pool = self.pools[name]
        if importance is None:
            return pool(stream.tokens, stream.lens, padding_mask=stream.pad)
        out, found = pool(
            stream.tokens, stream.lens, padding_mask=stream.pad, return_importance=True
        )
        importance[name] = AttentionMaps.spread(found, stream).mean(1)
        return out

    def _like(self) -> Tensor:
        """A parameter that quantisation leaves as it is, for device and dtype."""
        return next(iter(self.alignments.values())).type_embedding  # type: ignore[return-value]

    def _fused(
        self, streams: Mapping[str, ModalityStream], pooled: Mapping[str, Tensor], batch: int
    ) -> tuple[Tensor, Tensor]:
        """Features `[B, d_model]` and the weights of the modalities `[B, K]`."""
        names = self.modalities
        if not streams:
            like = self._like()
            return like.new_zeros(batch, self.d_model), like.new_zeros(batch, len(names))
        some = next(iter(pooled.values()))
        present = None
        if any(stream.ragged or stream.length == 0 for stream in streams.values()):
            nobody = torch.zeros(batch, dtype=torch.bool, device=some.device)
            present = torch.stack(
                [streams[name].there() if name in streams else nobody for name in names], dim=1
            )
        fused = self.fusion([pooled.get(name) for name in names], present, return_weights=True)
        weights = fused.weights
        return fused.out, weights.mean(-1) if weights.dim() == 3 else weights

    def _check(self, inputs: Any, lens: Any) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        for argument, value in (("inputs", inputs), ("lens", lens)):
            if value is None and argument == "lens":
                continue
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"{_OP}: {argument} must be a mapping from modalities to values, got "
                    f"{type(value).__name__}; the modalities are {list(self.modalities)}"
                )
            _multimodal_checks.require_known(argument, value, self.modalities)
        return {n: inputs[n] for n in self.modalities if inputs.get(n) is not None}, lens or {}

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, include_encoders: bool = True
    ) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be.

        Modules and functions that were given (encoders, heads, losses, an activation) are not
        described: `from_pretrained` takes them again. Their weights are in the file.

        Args:
            folder: where to.
            include_encoders: False leaves the weights of the encoders out, where they are kept
                elsewhere.

        Raises:
            ImportError: the package safetensors is not installed.
            TypeError: something does not fit into JSON or safetensors.
        """
        _pretrained_model.save(_OP, self, self._config, folder, include_encoders)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        encoders: Mapping[str, Module | None] | None = None,
        registry: Mapping[str, Callable[..., Module]] | None = None,
        heads: Mapping[str, Module] | None = None,
        losses: Mapping[str, Loss] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> MultimodalTransformer:
        """The model that `save_pretrained` wrote, in eval mode. Nothing in the folder is executed.

        Args:
            folder: where it is.
            encoders: modality -> module, for those that had one; their weights are loaded.
            registry: kind -> function that builds an encoder, for those with `encoder_specs`.
            heads: task -> module, for those that were modules.
            losses: task -> function, for those that were functions (needed for targets only).
            device, dtype: where it goes, and the dtype of all but the encoders; default: the CPU,
                and the dtype in which it was saved.
            options: other arguments of the constructor, in place of those that were saved.

        Raises:
            ImportError: the package safetensors is not installed.
            FileNotFoundError, ValueError: the folder holds no such model, or one that does not fit
                the encoders and heads.
        """
        arguments = _pretrained_model.arguments(
            _OP, folder, encoders, registry, heads, losses, options
        )
        if dtype is not None:
            arguments["dtype"] = dtype
        model = cls(**arguments)
        _pretrained_model.load(_OP, model, folder)
        return model.to(device).eval()
