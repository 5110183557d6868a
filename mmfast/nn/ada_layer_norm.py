"""Adaptive layer normalisation (DiT): a condition shifts, scales and gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from mmfast.nn import _checks
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.modulate import ModulateOutput, modulate


class _Adaptive(Module):
    """What both forms share: the projection of the condition and the norm."""

    _CHUNKS: tuple[str, ...]
    """What the condition gives each sublayer, in DiT's order."""

    def __init__(
        self,
        dim: int,
        cond_dim: int | None = None,
        *,
        sublayers: int,
        order: Sequence[str],
        norm: str,
        eps: float,
        elementwise_affine: bool,
        activation: str | None,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        cond_dim = dim if cond_dim is None else cond_dim
        _checks.require_sizes(name, dim=dim, cond_dim=cond_dim, sublayers=sublayers)
        _checks.require_choice(name, "norm", norm, ("layer", "rms"))
        _checks.require_choice(name, "activation", activation, ("silu", None))
        if sorted(order) != sorted(self._CHUNKS):
            raise ValueError(
                f"{name}: order is {tuple(order)!r}; it must hold each of {self._CHUNKS!r} once"
            )
        self.dim, self.cond_dim = dim, cond_dim
        self.order, self.norm, self.eps, self.activation = tuple(order), norm, eps, activation
        chunks = sublayers * len(self.order)
        self.proj = Linear(cond_dim, chunks * dim, bias=bias, device=device, dtype=dtype)
        shape = (sublayers, dim) if sublayers > 1 else (dim,)
        self.weight = self.bias = None
        if elementwise_affine:
            self.weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
            if norm == "layer":
                self.bias = Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A zero projection (no shift, scale 1, gates closed) and a plain norm."""
        with torch.no_grad():
            self.proj.weight.zero_()
            if self.proj.bias is not None:
                self.proj.bias.zero_()
            if self.weight is not None:
                self.weight.fill_(1.0)
            if self.bias is not None:
                self.bias.zero_()

    def extra_repr(self) -> str:
        """The settings that the submodule does not show."""
        return (
            f"dim={self.dim}, order={self.order}, norm={self.norm!r}, eps={self.eps}, "
            f"elementwise_affine={self.weight is not None}, activation={self.activation!r}"
        )

    def modulation(self, cond: Tensor) -> tuple[Tensor, ...]:
        """What the condition says: tensors `[..., dim]` in the order of the projection, as views.

        For whoever composes `mmfast.modulate` and `mmfast.gated_residual` by hand.
        """
        name = type(self).__name__
        _checks.require_stream(name, "cond", cond, self.cond_dim, "cond_dim")
        _checks.require_weight_dtype(name, self.proj.weight, cond=cond)
        chunks = self.proj.out_features // self.dim
        return self.proj(F.silu(cond) if self.activation else cond).chunk(chunks, dim=-1)

    def _by_name(self, x: Tensor, cond: Tensor) -> list[dict[str, Tensor]]:
        """For each sublayer its tensors by name."""
        name = type(self).__name__
        _checks.require_stream(name, "x", x, self.dim, "dim")
        chunks = self.modulation(cond)
        _checks.require_condition(name, x, cond)
        width = len(self.order)
        return [
            dict(zip(self.order, chunks[start:], strict=False))
            for start in range(0, len(chunks), width)
        ]


class AdaLayerNorm(_Adaptive):
    r"""Layer (or RMS) normalisation whose scale and shift come from a condition::

        shift, scale = proj(silu(cond))
        h            = x,  or  residual + gate * x
        out          = norm(h) * (1 + scale) + shift

    One kernel, residual and gate included. It starts as the plain norm.

    Args:
        dim: channels of x.
        cond_dim: width of the condition; default `dim`.
        order: in which order the projection holds "shift" and "scale". DiT's final layer has the
            shift first; Qwen2.5-Omni's and diffusers' final layers have ("scale", "shift").
        norm: "layer" or "rms".
        eps: its epsilon.
        elementwise_affine: a learned weight (and, for "layer", bias) of the norm itself.
        activation: "silu" or None, of the condition.
        bias: a bias in the projection.
        device, dtype: of the parameters.

    Parameters: `proj` (`torch.nn.Linear(cond_dim, 2 * dim)`), zero at first; `weight`, `bias`
    `[dim]` where asked for.

    Shapes: x `[B, ..., dim]`, cond `[B, cond_dim]` (one for each item) or `[B, ..., cond_dim]` (one
    for each row).

    Raises:
        ValueError: sizes below 1, an unknown norm, activation or order, x or cond of another width,
            rows of cond that do not fit x; and what `mmfast.modulate` says of residual and gate.
        TypeError: not tensors, or cond of another dtype than the weights outside of autocast.

    Example:
        >>> import torch, mmfast
        >>> norm = mmfast.nn.AdaLayerNorm(16, cond_dim=8)
        >>> x, branch, time = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 8)
        >>> norm(x, time).shape
        torch.Size([2, 5, 16])
        >>> out, stream = norm(branch, time, residual=x, gate=torch.zeros(2, 16))
        >>> bool((stream == x).all())
        True
    """

    _CHUNKS = ("shift", "scale")

    def __init__(
        self,
        dim: int,
        cond_dim: int | None = None,
        *,
        order: Sequence[str] = _CHUNKS,
        norm: str = "layer",
        eps: float = 1e-6,
        elementwise_affine: bool = False,
        activation: str | None = "silu",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, cond_dim, sublayers=1, order=order, norm=norm, eps=eps,
            elementwise_affine=elementwise_affine, activation=activation, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        *,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor | ModulateOutput:
        """Normalise and modulate x; with a residual the sum, and return that as well.

        Args:
            x: `[B, ..., dim]`; with a residual, the branch that is added to it.
            cond: `[B, cond_dim]` or `[B, ..., cond_dim]`.
            residual: like x.
            gate: `[B, dim]` or `[B, ..., dim]`, of x; only with a residual.

        Returns:
            `out`, shaped like x, or with a residual `ModulateOutput(out, h)`.
        """
        (chunk,) = self._by_name(x, cond)
        return modulate(
            x, chunk["scale"], chunk["shift"], norm=self.norm, eps=self.eps, weight=self.weight,
            bias=self.bias, residual=residual, gate=gate,
        )  # fmt: skip


class AdaLayerNormZero(_Adaptive):
    r"""The conditioning of a residual block: adaLN-zero (Peebles and Xie 2023), around sublayers::

        shift_1, scale_1, gate_1, shift_2, ... = proj(silu(cond))
        x = x + gate_i * f_i(norm(x) * (1 + scale_i) + shift_i)        for i = 1, 2 ...

    The f_i (attention, feed-forward) are given to `forward`, which therefore can do the gated
    residual of one and the norm of the next in a single kernel: 1 + (number of f_i) kernels beside
    the f_i themselves. The projection starts at 0, so every block starts as the identity.

    Args:
        dim: channels of x.
        cond_dim: width of the condition; default `dim`.
        sublayers: how many f_i there are: 2 in DiT, MM-DiT and Qwen2.5-Omni, 1 in VibeVoice's head.
        order: in which order the projection holds the "shift", "scale" and "gate" of a sublayer;
            the default is that of DiT, Qwen2.5-Omni, VibeVoice and diffusers.
        norm, eps, elementwise_affine, activation, bias, device, dtype: as `AdaLayerNorm`. With two
            or more sublayers the weight (and bias) of the norm are `[sublayers, dim]`.

    Parameters: `proj` (`torch.nn.Linear(cond_dim, 3 * sublayers * dim)`); `weight` and `bias` where
    asked for.

    Shapes and errors: as `AdaLayerNorm`; also a ValueError for another number of sublayers.

    Example:
        >>> import torch, mmfast
        >>> block = mmfast.nn.AdaLayerNormZero(16, cond_dim=8)
        >>> mlp = mmfast.nn.GatedMLP(16, 40)
        >>> x, time = torch.randn(2, 5, 16), torch.randn(2, 8)
        >>> bool((block(x, time, torch.nn.Identity(), mlp) == x).all())
        True
    """

    _CHUNKS = ("shift", "scale", "gate")

    def __init__(
        self,
        dim: int,
        cond_dim: int | None = None,
        *,
        sublayers: int = 2,
        order: Sequence[str] = _CHUNKS,
        norm: str = "layer",
        eps: float = 1e-6,
        elementwise_affine: bool = False,
        activation: str | None = "silu",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, cond_dim, sublayers=sublayers, order=order, norm=norm, eps=eps,
            elementwise_affine=elementwise_affine, activation=activation, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.sublayers = sublayers

    def forward(self, x: Tensor, cond: Tensor, *sublayers: Callable[[Tensor], Tensor]) -> Tensor:
        """x after all sublayers.

        Args:
            x: `[B, ..., dim]`.
            cond: `[B, cond_dim]` or `[B, ..., cond_dim]`.
            sublayers: functions or modules from `[B, ..., dim]` to the same shape, as many as the
                module was made for.
        """
        if len(sublayers) != self.sublayers:
            raise ValueError(
                f"AdaLayerNormZero: got {len(sublayers)} sublayers but the module was made for "
                f"sublayers={self.sublayers}; both must match"
            )
        chunks = self._by_name(x, cond)
        stream, branch, gate = x, None, None
        for index, (sublayer, chunk) in enumerate(zip(sublayers, chunks, strict=True)):
            weight, bias = (
                None if p is None else p[index] if self.sublayers > 1 else p
                for p in (self.weight, self.bias)
            )
            result = modulate(
                stream if branch is None else branch, chunk["scale"], chunk["shift"],
                norm=self.norm, eps=self.eps, weight=weight, bias=bias,
                residual=None if branch is None else stream, gate=gate,
            )  # fmt: skip
            if isinstance(result, Tensor):
                out = result
            else:
                out, stream = result
            branch, gate = sublayer(out), chunk["gate"]
        assert branch is not None and gate is not None
        return gated_residual(stream, branch, gate, activation="identity")
