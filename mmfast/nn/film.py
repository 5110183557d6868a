"""Feature-wise linear modulation: a condition scales and shifts each channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, Module

from mmfast.nn import _checks
from mmfast.nn._init import reset_linear
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.modulate import modulate

_OP = "FiLM"


class FiLM(Module):
    r"""Feature-wise linear modulation (Perez et al. 2018)::

        gamma, beta = proj(cond)
        out         = (1 + gamma) * x + beta        (delta=True)
        out         = gamma * x + beta              (delta=False: CLIPSeg)

    One kernel forward and one backward; gamma and beta are never expanded to the size of x.

    Args:
        cond_dim: width of the condition.
        channels: channels of x.
        delta: gamma is the difference to 1. Then small weights mean little modulation.
        channel_dim: where x has its channels: -1 for `[B, ..., C]`, 1 for images `[B, C, H, W]`
            (taken without a copy in `torch.channels_last` memory).
        bias: a bias in the projection.
        device, dtype: of the parameters.

    Parameters: `proj`, a `torch.nn.Linear(cond_dim, 2 * channels)` with gamma in the first half.
    (CLIPSeg's `film_mul` and `film_add`, one below the other.) The weight starts Xavier-uniform for
    each half; the bias starts at 0, that of gamma at 1 with `delta=False`.

    Shapes: x `[B, ..., C]`, cond `[B, cond_dim]` (one for each item) or `[B, ..., cond_dim]` (one
    for each row; with channel_dim=1 as if the channels of x were last) -> the shape and dtype of x.

    Raises:
        ValueError: sizes below 1, x or cond of another width, rows of cond that do not fit x.
        TypeError: not tensors, or cond of another dtype than the weights outside of autocast.

    Example:
        >>> import torch, mmfast
        >>> film = mmfast.nn.FiLM(cond_dim=32, channels=8, channel_dim=1)
        >>> image, text = torch.randn(2, 8, 5, 5), torch.randn(2, 32)
        >>> film(image, text).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        cond_dim: int,
        channels: int,
        *,
        delta: bool = True,
        channel_dim: int = -1,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.require_sizes(_OP, cond_dim=cond_dim, channels=channels)
        _checks.require_choice(_OP, "channel_dim", channel_dim, (-1, 1))
        self.cond_dim, self.channels = cond_dim, channels
        self.delta, self.channel_dim = delta, channel_dim
        self.proj = Linear(cond_dim, 2 * channels, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights of each half, zero bias (1 for a gamma that is not a delta)."""
        reset_linear(self.proj, parts=2)
        if self.proj.bias is not None and not self.delta:
            with torch.no_grad():
                self.proj.bias[: self.channels] = 1.0

    def extra_repr(self) -> str:
        """The settings that the submodule does not show."""
        return f"channels={self.channels}, delta={self.delta}, channel_dim={self.channel_dim}"

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Modulate `x` by `cond`; the class says the shapes and what it raises."""
        if self.channel_dim == 1 and isinstance(x, Tensor) and x.dim() > 1:
            return self._modulate(x.movedim(1, -1), cond).movedim(-1, 1)
        return self._modulate(x, cond)

    def _modulate(self, x: Tensor, cond: Tensor) -> Tensor:
        _checks.require_stream(_OP, "x", x, self.channels, "channels")
        _checks.require_stream(_OP, "cond", cond, self.cond_dim, "cond_dim")
        _checks.require_condition(_OP, x, cond)
        _checks.require_weight_dtype(_OP, self.proj.weight, cond=cond)
        gamma, beta = self.proj(cond).chunk(2, dim=-1)
        if self.delta:
            return modulate(x, gamma, beta, norm=None)
        # Not modulate with gamma - 1: that would round a small gamma away.
        beta = beta.to(x.dtype)  # before it is expanded
        if beta.dim() == 2 and x.dim() > 2:
            beta = beta.view(beta.shape[0], *(1,) * (x.dim() - 2), beta.shape[1])
        return gated_residual(beta.expand_as(x), x, gamma, activation="identity")
