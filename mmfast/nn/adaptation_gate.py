"""The multimodal adaptation gate: other modalities displace the tokens of a text model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, ModuleList, Parameter

from mmfast.nn import _checks
from mmfast.nn._init import reset_linear
from mmfast.nn._plain import plain_norm
from mmfast.nn._present import absent_to_zero, presence, rows_of
from mmfast.ops.adaptation_gate import adaptation_gate
from mmfast.ops.glu import glu

_OP = "AdaptationGate"


class AdaptationGate(Module):
    r"""Multimodal adaptation gate (MAG; Rahman et al. 2020), for any number of side modalities::

        g_k   = relu(gate_projs_k([z; s_k]))                      how much of modality k to let in
        h     = sum_k g_k * value_projs_k(s_k)  + shift            the displacement
        alpha = min(beta * |z| / |h|, 1)                           never longer than beta * |z|
        out   = dropout(LayerNorm(z + alpha * h))

    The gates are `mmfast.glu`, the rest is one kernel.

    **Missing modality.** Where `present` is False, or a side is None, the modality contributes
    exactly nothing (it may be NaN), and the weights that would have projected it get no gradient
    from there. A row with no side modality at all is not displaced, not even by the shift:
    `LayerNorm(z)`.

    Args:
        dim: width of z and of the result.
        side_dims: widths of the side modalities (visual, acoustic ...), any number of them.
        beta: how long the displacement may be beside z.
        eps: of the layer norm.
        dropout: of the result, in training.
        bias: biases in the gates, and the shift.
        value_bias: biases in the value projections, inside the gate (the authors' program has
            these and no shift; the paper has the shift alone).
        device, dtype: of the parameters.

    Parameters: `gate_projs` (`torch.nn.Linear(dim + side_dims[k], dim)`, z first), `value_projs`
    (`Linear(side_dims[k], dim)`), `shift` `[dim]`, `norm` (`LayerNorm`). Weights start
    Xavier-uniform, biases and shift 0.

    Raises:
        ValueError: sizes below 1, no side modality, a dropout outside [0, 1), a negative beta, and
            sides or `present` of other shapes than promised.
        TypeError: streams that are not tensors, `present` not bool, dtypes that are not those of
            the weights outside of autocast.

    Example:
        >>> import torch, mmfast
        >>> gate = mmfast.nn.AdaptationGate(16, [6, 4], beta=0.5)
        >>> text, face, voice = torch.randn(2, 5, 16), torch.randn(2, 5, 6), torch.randn(2, 5, 4)
        >>> face[1] = float("nan")  # nobody to be seen
        >>> present = torch.tensor([[True, True], [False, True]])
        >>> bool(gate(text, [face, voice], present).isfinite().all())
        True
    """

    def __init__(
        self,
        dim: int,
        side_dims: Sequence[int],
        *,
        beta: float = 1.0,
        eps: float = 1e-5,
        dropout: float = 0.0,
        bias: bool = True,
        value_bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(side_dims, int) or not side_dims:
            raise ValueError(
                f"{_OP}: side_dims is {side_dims!r}; it must hold the width of each side modality, "
                f"as in [47, 74]"
            )
        sizes = {f"side_dims[{k}]": width for k, width in enumerate(side_dims)}
        _checks.require_sizes(_OP, dim=dim, **sizes)
        _checks.require_probability(_OP, "dropout", dropout)
        if not beta >= 0.0:
            raise ValueError(f"{_OP}: beta is {beta}; it bounds a length and must be at least 0")
        self.dim, self.side_dims, self.beta, self.dropout = dim, tuple(side_dims), beta, dropout

        def linear(width: int, with_bias: bool) -> Linear:
            return Linear(width, dim, bias=with_bias, device=device, dtype=dtype)

        self.gate_projs = ModuleList(linear(dim + width, bias) for width in side_dims)
        self.value_projs = ModuleList(linear(width, value_bias) for width in side_dims)
        self.shift = None
        if bias:
            self.shift = Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.norm = LayerNorm(dim, eps=eps, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases and shift, unit norm."""
        for linear in (*self.gate_projs, *self.value_projs):
            assert isinstance(linear, Linear)
            reset_linear(linear)
        if self.shift is not None:
            torch.nn.init.zeros_(self.shift)
        self.norm.reset_parameters()

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return (
            f"dim={self.dim}, side_dims={self.side_dims}, beta={self.beta}, dropout={self.dropout}"
        )

    def forward(
        self, z: Tensor, sides: Sequence[Tensor | None], present: Tensor | None = None
    ) -> Tensor:
        """Displace z by the side modalities.

        Args:
            z: `[B, ..., dim]`, usually tokens of a text model.
            sides: one tensor `[B, ..., side_dims[k]]` for each side modality, aligned with z row by
                row, or None for one that no item has. (Its parameters then have no gradient at
                all. DistributedDataParallel waits for one: give it a tensor, with `present` False.)
            present: bool `[B, K]` (for each item) or `[B, ..., K]` (for each row), True = there;
                default: all.

        Returns:
            `[B, ..., dim]`.
        """
        self._check(z, sides, present)
        leading = z.shape[:-1]
        present = presence(present, [side is not None for side in sides], leading, z.device)
        h: Tensor | None = None
        for k, side in enumerate(sides):
            if side is None:
                continue
            side = absent_to_zero(side, present, k)
            gate = self.gate_projs[k](torch.cat([z, side], dim=-1))
            term = glu(gate, self.value_projs[k](side), "relu")
            if self.value_projs[k].bias is not None:
                term = absent_to_zero(term, present, k)
            h = term if h is None else h + term
        row_mask = None
        if present is not None:
            row_mask = rows_of(present.any(dim=-1, keepdim=True), 0, z.dim())
        if h is None:
            h = z  # masked in every row
        elif self.shift is not None:
            h = h + self.shift
        if plain_norm(self.norm):
            out = adaptation_gate(
                z, h, beta=self.beta, eps=self.norm.eps, weight=self.norm.weight,
                bias=self.norm.bias, row_mask=row_mask,
            )  # fmt: skip
        else:
            out = self.norm(self._displaced(z, h, row_mask))
        return F.dropout(out, self.dropout, self.training) if self.dropout > 0.0 else out

    def _displaced(self, z: Tensor, h: Tensor, row_mask: Tensor | None) -> Tensor:
        """`z + alpha * h`: what the op normalises, for a norm that has to be called."""
        if row_mask is not None:
            h = h.masked_fill(row_mask.logical_not().unsqueeze(-1), 0.0)
        size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        ratio = self.beta * torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        alpha = ratio / torch.where(size > 0, size, 1.0)
        return z + torch.where((size > 0) & (alpha < 1), alpha, 1.0) * h

    def _check(self, z: Any, sides: Any, present: Any) -> None:
        _checks.require_stream(_OP, "z", z, self.dim, "dim")
        if not isinstance(sides, list | tuple) or len(sides) != len(self.side_dims):
            got = len(sides) if isinstance(sides, list | tuple) else type(sides).__name__
            raise ValueError(
                f"{_OP}: sides must be a list of {len(self.side_dims)} tensors (one for each of "
                f"side_dims), got {got}; give None for a modality that no item has"
            )
        for k, side in enumerate(sides):
            if side is None:
                continue
            _checks.require_stream(_OP, f"sides[{k}]", side, self.side_dims[k], f"side_dims[{k}]")
            if side.shape[:-1] != z.shape[:-1]:
                raise ValueError(
                    f"{_OP}: sides[{k}] has shape {list(side.shape)} but z has {list(z.shape)}; "
                    f"all dims but the last must match: align the side modality with the rows of z"
                )
        named = {f"sides[{k}]": side for k, side in enumerate(sides)}
        _checks.require_weight_dtype(_OP, self.norm.weight, z=z, **named)
        if present is not None:
            _checks.require_present(_OP, present, z, len(self.side_dims))
