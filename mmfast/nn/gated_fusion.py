"""Fusion of K modalities into one stream by gates: softmax mixing, sigmoid gates, the GMU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, ModuleList, Parameter

from mmfast.nn import _checks
from mmfast.nn._init import reset_linear
from mmfast.nn._plain import plain_linear
from mmfast.nn._present import absent_to_zero, presence, rows_of
from mmfast.ops.fuse import fuse

_OP = "GatedFusion"
_MODES = ("softmax", "sigmoid", "gmu")
_GATES = ("features", "static")
_PER = (None, "modality", "channel")


class GatedFusionOutput(NamedTuple):
    """What `GatedFusion` returns when the weights are asked for."""

    out: Tensor
    weights: Tensor


class GatedFusion(Module):
    r"""One stream out of K modalities, each weighted by a gate::

        h_k = proj_k(x_k)
        l   = gate_proj([x_1; x_2; ... x_K])          or learned constants (gate="static")
        out = sum_k softmax_k(l)_k  h_k               mode="softmax", over the present modalities
        out = sum_k sigmoid(l_k)    h_k               mode="sigmoid"
        out = sum_k sigmoid(l_k)    tanh(h_k)         mode="gmu" (Arevalo et al. 2017)
        out = z tanh(h_1) + (1 - z) tanh(h_2)         mode="gmu", K = 2, tied: z = sigmoid(l)

    Weights, `tanh` and the sum are one kernel that reads every h_k once.

    **Missing modality.** Where `present` is False, or a feature is None, the modality contributes
    exactly nothing: its term is dropped, it does not enter the gates of the others, and neither it
    (it may be NaN) nor the weights that would have projected it get any gradient from there. With
    none present the result is exactly 0.

    Args:
        dims: the widths of the K modalities; their number is K.
        dim: width of the result. Default: no projections (all of `dims` must be equal then).
        mode: "softmax", "sigmoid" or "gmu".
        gate: "features" (logits computed from all the modalities of the row) or "static" (a learned
            constant for each: the layer mix of ELMo, Whisper and wav2vec 2.0).
        per: one logit for each "modality" (readable as importance) or for each "channel" of each;
            default "channel" in mode "gmu", as published, else "modality".
        tied: one gate z shared as z and 1 - z; only for "gmu" with K = 2, and its default there.
        bias: biases in the projections and in the gate (the published GMU has none).
        device, dtype: of the parameters.

    Parameters: `projs` (K `torch.nn.Linear(dims[k], dim)`), if there are projections; `gate_proj`
    (`Linear(sum(dims), logits)`, the logits of one modality after the other) or `logits` (`[K]`,
    `[K, dim]`, tied `[1]` or `[dim]`; 0 at first: equal weights).

    Raises:
        ValueError: widths below 1 or unequal without projections, unknown mode, gate or per, `tied`
            where it cannot be, and features or `present` of other shapes than promised.
        TypeError: features that are neither tensors nor None, `present` not bool, dtypes that are
            not those of the weights outside of autocast.

    Example:
        >>> import torch, mmfast
        >>> _ = torch.manual_seed(0)
        >>> fusion = mmfast.nn.GatedFusion([12, 20, 8], 16, mode="softmax")
        >>> image, text, audio = torch.randn(2, 12), torch.randn(2, 20), torch.randn(2, 8)
        >>> audio[1] = float("nan")  # item 1 has no sound
        >>> present = torch.tensor([[True, True, True], [True, True, False]])
        >>> out, weights = fusion([image, text, audio], present, return_weights=True)
        >>> out.shape, weights[1].shape, bool(weights[1, 2] == 0)
        (torch.Size([2, 16]), torch.Size([3]), True)
    """

    def __init__(
        self,
        dims: Sequence[int],
        dim: int | None = None,
        *,
        mode: str = "softmax",
        gate: str = "features",
        per: str | None = None,
        tied: bool | None = None,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dims, int) or not dims:
            raise ValueError(
                f"{_OP}: dims is {dims!r}; it must hold the width of each modality, as in "
                f"[768, 512]"
            )
        _checks.require_sizes(_OP, dim=dim, **{f"dims[{k}]": width for k, width in enumerate(dims)})
        _checks.require_choice(_OP, "mode", mode, _MODES)
        _checks.require_choice(_OP, "gate", gate, _GATES)
        _checks.require_choice(_OP, "per", per, _PER)
        if dim is None and len(set(dims)) > 1:
            raise ValueError(
                f"{_OP}: dims is {list(dims)} and dim is None; modalities of different widths need "
                f"projections: give dim, the width of the result"
            )
        pair = mode == "gmu" and len(dims) == 2
        if tied and not pair:
            raise ValueError(
                f"{_OP}: tied=True with mode={mode!r} and {len(dims)} modalities; one shared gate "
                f"z, 1 - z is for mode 'gmu' and two modalities"
            )
        self.dims, self.dim = tuple(dims), dims[0] if dim is None else dim
        self.mode, self.gate = mode, gate
        self.per = per or ("channel" if mode == "gmu" else "modality")
        self.tied = pair if tied is None else tied

        def linear(width_in: int, width_out: int) -> Linear:
            return Linear(width_in, width_out, bias=bias, device=device, dtype=dtype)

        self.projs = None if dim is None else ModuleList(linear(width, dim) for width in dims)
        shape = (() if self.tied else (len(dims),)) + ((self.dim,) if self.per == "channel" else ())
        self._logits_shape = shape or (1,)
        self.gate_proj = self.logits = None
        if gate == "features":
            self.gate_proj = linear(sum(dims), torch.Size(shape).numel())
        else:
            self.logits = Parameter(torch.empty(self._logits_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases, equal static weights."""
        for proj in self.projs or ():
            assert isinstance(proj, Linear)
            reset_linear(proj)
        if self.gate_proj is not None:
            reset_linear(self.gate_proj)
        if self.logits is not None:
            torch.nn.init.zeros_(self.logits)

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return (
            f"dims={self.dims}, dim={self.dim}, mode={self.mode!r}, gate={self.gate!r}, "
            f"per={self.per!r}, tied={self.tied}"
        )

    def forward(
        self,
        features: Sequence[Tensor | None],
        present: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> Tensor | GatedFusionOutput:
        """Fuse.

        Args:
            features: K tensors `[B, ..., dims[k]]` with the same leading dims, or None for a
                modality that no item has. (Parameters that only it would use then have no gradient
                at all. DistributedDataParallel waits for one: give it a tensor, with `present`
                False.)
            present: bool `[B, K]` (for each item) or `[B, ..., K]` (for each row), True = there;
                default: all.
            return_weights: return the weights as well, for an explanation or a loss.

        Returns:
            `[B, ..., dim]`, or `GatedFusionOutput(out, weights)` with the weights
            `[B, ..., K]` (`[B, ..., K, dim]` for `per="channel"`), 0 where a modality is missing.
        """
        some = self._check(features, present)
        leading = some.shape[:-1]
        present = presence(present, [x is not None for x in features], leading, some.device)
        clean = [
            None if x is None else absent_to_zero(x, present, k) for k, x in enumerate(features)
        ]
        logits = self._logits(clean, leading)
        hidden = [
            x if x is None or self.projs is None else self.projs[k](x) for k, x in enumerate(clean)
        ]
        stand_in = next(h for h in hidden if h is not None)  # of a term that is dropped
        terms = [stand_in if h is None else h for h in hidden]
        flat, flat_logits, by_item = terms, logits, present
        if present is not None and present.dim() > 2:  # by row: the rows become the items
            flat = [h.reshape(-1, h.shape[-1]) for h in terms]
            flat_logits = logits.expand(*leading, *logits.shape[len(leading) :])
            flat_logits = flat_logits.reshape(-1, *logits.shape[len(leading) :])
            by_item = present.reshape(-1, present.shape[-1])
        out = fuse(flat, flat_logits, mode=self.mode, present=by_item)
        out = out.view(*leading, self.dim)
        if not return_weights:
            return out
        return GatedFusionOutput(out, self._weights(logits, present, leading))

    def _logits(self, features: Sequence[Tensor | None], leading: torch.Size) -> Tensor:
        """`[B, ..., K, dim or 1]`, tied `[B, ..., dim or 1]`; static ones have leading dims 1."""
        last = self.dim if self.per == "channel" else 1
        shape = (last,) if self.tied else (len(self.dims), last)
        if self.logits is not None:
            return self.logits.view(*(1,) * len(leading), *shape)
        assert self.gate_proj is not None
        given = [x for x in features if x is not None]
        if len(given) < len(features) and plain_linear(self.gate_proj):
            columns = zip(features, self.gate_proj.weight.split(self.dims, dim=1), strict=True)
            weight = torch.cat([part for x, part in columns if x is not None], dim=1)
            logits = F.linear(torch.cat(given, dim=-1), weight, self.gate_proj.bias)
        else:
            every = [
                given[0].new_zeros(*leading, width) if x is None else x
                for x, width in zip(features, self.dims, strict=True)
            ]
            logits = self.gate_proj(torch.cat(every, dim=-1))
        return logits.unflatten(-1, shape)

    def _weights(self, logits: Tensor, present: Tensor | None, leading: torch.Size) -> Tensor:
        """What `fuse` weighs the modalities with, `[B, ..., K]` or `[B, ..., K, dim]`."""
        K = len(self.dims)
        absent = None
        if present is not None:
            there = [rows_of(present, k, len(leading) + 1) for k in range(K)]
            absent = torch.stack(there, dim=-1).logical_not().unsqueeze(-1)
        if self.mode == "softmax":
            if absent is not None:
                logits = logits.masked_fill(absent, -torch.inf)
            # nan_to_num: nothing present
            weights = logits.softmax(-2) if absent is None else logits.softmax(-2).nan_to_num(0.0)
        else:
            if self.tied:
                logits = torch.stack([logits, -logits], dim=-2)
            weights = torch.sigmoid(logits)
        if absent is not None:
            weights = weights.masked_fill(absent, 0.0)
        weights = weights.expand(*leading, K, weights.shape[-1])
        return weights if self.per == "channel" else weights.squeeze(-1)

    def _check(self, features: Any, present: Any) -> Tensor:
        """Raise for what `forward` could not use; the first feature that is given."""
        if not isinstance(features, list | tuple) or len(features) != len(self.dims):
            got = len(features) if isinstance(features, list | tuple) else type(features).__name__
            raise ValueError(
                f"{_OP}: features must be a list of {len(self.dims)} tensors (one for each of "
                f"dims), got {got}; give None for a modality that no item has"
            )
        some: Tensor | None = None
        for k, x in enumerate(features):
            if x is None:
                continue
            _checks.require_stream(_OP, f"features[{k}]", x, self.dims[k], f"dims[{k}]")
            if some is None:
                some = x
            elif x.shape[:-1] != some.shape[:-1]:
                raise ValueError(
                    f"{_OP}: features[{k}] has shape {list(x.shape)}, but another one has "
                    f"{list(some.shape)}; all dims but the last must match: pool or align them"
                )
        if some is not None and some.dim() < 2:
            raise ValueError(
                f"{_OP}: features have shape {list(some.shape)}, expected [B, ..., width]; "
                f"unsqueeze a dim of items"
            )
        if some is None:
            raise ValueError(
                f"{_OP}: every feature is None; give at least one tensor (with present = False for "
                f"items that have nothing)"
            )
        weights = self.logits if self.gate_proj is None else self.gate_proj.weight
        if self.gate_proj is not None or self.projs is not None:
            named = {f"features[{k}]": x for k, x in enumerate(features)}
            assert weights is not None
            _checks.require_weight_dtype(_OP, weights, **named)
        if present is not None:
            _checks.require_present(_OP, present, some, len(self.dims))
        return some
