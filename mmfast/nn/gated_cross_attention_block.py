"""A cross-attention layer behind gates that start closed (Flamingo, mllama, IDEFICS)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, Parameter, RMSNorm

from mmfast.nn import _checks
from mmfast.nn._init import reset_linear
from mmfast.nn._plain import plain_norm
from mmfast.nn._rows import to_rows
from mmfast.nn._streams import like, packed_by_lens, stream_of
from mmfast.nn._tokens import Tokens, padded_rows
from mmfast.nn.cross_modal_attention import CrossModalAttention
from mmfast.nn.gated_mlp import GatedMLP
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext
from mmfast.ops.cross_attention import CrossAttentionOutput
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.modulate import modulate

_OP = "GatedCrossAttentionBlock"
_NOBODY = -(2**31)  # the segment of rows that may see nothing
_ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class GatedCrossAttentionBlock(Module):
    r"""One stream attends to another behind gates that start closed::

        h   = x + tanh(attn_gate) * attention(attn_norm(x), context)
        out = h + tanh(ff_gate)   * feed_forward(ff_norm(h))

    The gated residual of the attention and the norm that follows are one kernel
    (`mmfast.modulate`), so is the second gated residual (`mmfast.gated_residual`).

    **Rows that attend to nothing** (no context: `context_lens[b] = 0`; `row_mask` False; everything
    masked) get exactly nothing from the attention. With `mask_feed_forward` they skip the
    feed-forward network as well, and the block is the identity for them, bit for bit. Contexts of
    such items and rows past `context_lens` and `x_lens` may hold NaN. Rows of the output past
    `x_lens` are 0.

    The published forms:

    - Flamingo (Alayrac et al. 2022): `norm="layer", feed_forward="mlp", activation="gelu"`, and in
      `forward` segments, so that text sees its own image.
    - mllama (Llama 3.2 Vision): `num_kv_heads=8, qk_norm="rms", mask_feed_forward=True`.
    - IDEFICS: `gate="vector"` (or "scalar"), `eps=1e-6`, `qk_norm="rms"` where its configuration
      says `qk_layer_norms`, and in `forward` its `cross_attention_gate` as `row_mask`.

    transformers' mllama layer differs in rows that see no image: its attention gives them a mean
    over all images there, here they get nothing.

    Args:
        dim: width of x and of the output.
        num_heads: query heads.
        context_dim: width of the context; default `dim`.
        num_kv_heads, head_dim, qk_norm: of the attention, as `CrossModalAttention`.
        hidden_features: width of the feed-forward network; default `4 * dim`.
        feed_forward: "glu" (`GatedMLP`) or "mlp" (`down_proj(act(up_proj(x)))`).
        activation: of the feed-forward network: "silu", "gelu" (erf), "gelu_tanh" or "relu".
        norm: "rms" or "layer".
        eps: of all norms, those of q and k included.
        gate: "scalar" (one for each branch) or "vector" (one for each channel of each branch).
        gate_init: the gates' first value; 0 makes the block the identity.
        mask_feed_forward: rows that attend to nothing skip the feed-forward network.
        bias: biases in all projections.
        dropout: of attention weights, in training.
        residual_dropout: of what each branch adds, in training.
        device, dtype: of the parameters.

    Parameters: `attn_norm`, `attention` (`CrossModalAttention`), `attn_gate` `[1]` or `[dim]`,
    `ff_norm`, `feed_forward`, `ff_gate`.

    Raises:
        ValueError: sizes, names and probabilities that cannot be.

    Example:
        >>> import torch, mmfast
        >>> _ = torch.manual_seed(0)
        >>> block = mmfast.nn.GatedCrossAttentionBlock(64, 4, context_dim=96, gate_init=0.5)
        >>> text, image = torch.randn(2, 5, 64), torch.randn(2, 9, 96)
        >>> sees = torch.tensor([[False, True, True, True, True], [True] * 5])
        >>> block(text, image, context_lens=torch.tensor([9, 4]), row_mask=sees).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: str | None = None,
        hidden_features: int | None = None,
        feed_forward: str = "glu",
        activation: str = "silu",
        norm: str = "rms",
        eps: float = 1e-5,
        gate: str = "scalar",
        gate_init: float = 0.0,
        mask_feed_forward: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.require_sizes(_OP, dim=dim, hidden_features=hidden_features)
        _checks.require_choice(_OP, "feed_forward", feed_forward, ("glu", "mlp"))
        _checks.require_choice(_OP, "activation", activation, tuple(_ACTIVATIONS))
        _checks.require_choice(_OP, "norm", norm, ("rms", "layer"))
        _checks.require_choice(_OP, "gate", gate, ("scalar", "vector"))
        _checks.require_probability(_OP, "residual_dropout", residual_dropout)
        self.dim, self.norm, self.eps, self.gate, self.gate_init = dim, norm, eps, gate, gate_init
        self.mask_feed_forward, self.residual_dropout = mask_feed_forward, residual_dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kind = RMSNorm if norm == "rms" else LayerNorm
        hidden = 4 * dim if hidden_features is None else hidden_features

        self.attn_norm = kind(dim, eps=eps, **factory)
        self.attention = CrossModalAttention(
            dim, num_heads, num_kv_heads=num_kv_heads, context_dim=context_dim, head_dim=head_dim,
            qk_norm=qk_norm, qk_norm_eps=eps, bias=bias, dropout=dropout, **factory,
        )  # fmt: skip
        self.attn_gate = Parameter(torch.empty(dim if gate == "vector" else 1, **factory))
        self.ff_norm = kind(dim, eps=eps, **factory)
        if feed_forward == "glu":
            self.feed_forward: Module = GatedMLP(
                dim, hidden, activation=activation, bias=bias, **factory
            )
        else:
            self.feed_forward = _FeedForward(dim, hidden, activation, bias, factory)
        self.ff_gate = Parameter(torch.empty(dim if gate == "vector" else 1, **factory))
        self._work = dim * hidden * (3 if feed_forward == "glu" else 2)
        self._reset_gates()

    def reset_parameters(self) -> None:
        """Every part anew; the gates at `gate_init`."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        self._reset_gates()

    def _reset_gates(self) -> None:
        torch.nn.init.constant_(self.attn_gate, self.gate_init)
        torch.nn.init.constant_(self.ff_gate, self.gate_init)

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return (
            f"dim={self.dim}, gate={self.gate!r}, mask_feed_forward={self.mask_feed_forward}, "
            f"residual_dropout={self.residual_dropout}"
        )

    def forward(
        self,
        x: Any,
        context: Any,
        *,
        context_lens: Tensor | None = None,
        x_lens: Tensor | None = None,
        row_mask: Tensor | None = None,
        x_segments: Tensor | None = None,
        context_segments: Tensor | None = None,
        segment_rule: str = "equal",
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        return_lse: bool = False,
        return_importance: bool = False,
        return_weights: bool | str = False,
    ) -> Any:
        """Let `x` attend to `context`.

        Args:
            x: `[B, N, dim]`, a jagged `torch.nested` tensor, or `PackedTokens`.
            context: `[B, M, context_dim]`, jagged, `PackedTokens`, or the `ProjectedContext` that
                `attention.prepare_context` gave.
            row_mask: bool `[B, N]`, False = the row attends to nothing.
            context_lens, x_lens, x_segments, context_segments, segment_rule, mask, bias, is_causal,
                return_lse, return_importance, return_weights: as `CrossModalAttention.attend`.

        Where `x_lens` can be read for nothing (on the CPU) the whole block runs on valid rows.

        Returns:
            The result in the form of x; with any `return_*`
            `CrossAttentionOutput(out, lse, importance, weights)` with None for what was not asked.

        Raises:
            ValueError, TypeError: from here, or from `CrossModalAttention`.
        """
        given = x
        x = stream_of(_OP, "x", x, x_lens, self.dim, "dim")
        keys, lens = self._check(x, context, row_mask, context_lens)
        if isinstance(x, Tensor) and x_lens is not None:
            x = packed_by_lens(x, x_lens, self._work)
        packed = x if isinstance(x, PackedTokens) else None
        rows = x if isinstance(x, Tensor) else x.values
        padding = None
        if packed is not None:
            x_lens = None
        elif x_lens is not None:
            padding = padded_rows(x_lens, rows.shape[1])
            rows = rows.masked_fill(padding.unsqueeze(-1), 0.0)  # before a norm: 0 * NaN is NaN
        if row_mask is not None:
            x_segments, context_segments = _hide_rows(row_mask, x_segments, context_segments, keys)
        by_lse = self.mask_feed_forward and (
            mask is not None or bias is not None or x_segments is not None or is_causal or keys == 0
        )
        normed = self._norm(rows, self.attn_norm)
        result = self.attention(
            normed if packed is None else packed.with_values(normed), context,
            context_lens=context_lens, x_lens=x_lens,
            x_segments=x_segments, context_segments=context_segments, segment_rule=segment_rule,
            mask=mask, bias=bias, is_causal=is_causal, return_lse=return_lse or by_lse,
            return_importance=return_importance, return_weights=return_weights,
        )  # fmt: skip
        attended = result.out if isinstance(result, CrossAttentionOutput) else result
        skipped = padding
        if by_lse:
            skipped = to_rows((result.lse == -torch.inf).all(dim=1), packed)  # past x_lens too
        elif self.mask_feed_forward and lens is not None:
            none = lens == 0
            if packed is not None:
                skipped = none[packed.items]
            else:
                none = none.unsqueeze(1)
                skipped = none.expand(rows.shape[:2]) if padding is None else padding | none

        if isinstance(attended, PackedTokens):
            attended = attended.values
        wide = torch.promote_types(rows.dtype, torch.float32)
        gate = torch.tanh(self.attn_gate.to(wide)).expand(self.dim)
        normed, stream = self._norm(self._drop(attended), self.ff_norm, residual=rows, gate=gate)
        if skipped is None:
            fed, row_mask = self.feed_forward(normed), None
        else:
            tokens, row_mask = Tokens(skipped, self._work), skipped.logical_not()
            fed = tokens.put(self.feed_forward(tokens.take(normed)))
        out = gated_residual(
            stream, self._drop(fed), self.ff_gate, activation="tanh", row_mask=row_mask
        )
        if packed is not None:
            out = like(given, packed.with_values(out))
        if not (return_lse or return_importance or return_weights):
            return out
        return CrossAttentionOutput(
            out, result.lse if return_lse else None, result.importance, result.weights
        )

    def _norm(self, x: Tensor, norm: Any, **residual: Tensor) -> Any:
        if not plain_norm(norm):
            if not residual:
                return norm(x)
            gate = residual["gate"]
            stream = gated_residual(residual["residual"], x, gate, activation="identity")
            return norm(stream), stream
        bias = getattr(norm, "bias", None)
        return modulate(x, norm=self.norm, eps=self.eps, weight=norm.weight, bias=bias, **residual)

    def _drop(self, branch: Tensor) -> Tensor:
        if self.residual_dropout == 0.0:
            return branch
        return F.dropout(branch, self.residual_dropout, self.training)

    def _check(
        self, x: Tensor | PackedTokens, context: Any, row_mask: Any, context_lens: Tensor | None
    ) -> tuple[int, Tensor | None]:
        """The number of keys of the longest item, and the lengths of the context, if any."""
        attention, weight = self.attention, self.attention.q_proj.weight
        rows = x if isinstance(x, Tensor) else x.values
        if isinstance(context, ProjectedContext):
            _checks.require_weight_dtype(_OP, weight, x=rows)
            keys, lens = context.keys, context.item_lens()
        else:
            stream = stream_of(
                _OP, "context", context, context_lens, attention.context_dim, "context_dim"
            )
            if isinstance(stream, PackedTokens):
                values, keys, lens = stream.values, stream.length, stream.lens
            else:
                values, keys, lens = stream, stream.shape[1], context_lens
            _checks.require_weight_dtype(_OP, weight, x=rows, context=values)
        if row_mask is not None:
            shape = x.shape[:2] if isinstance(x, Tensor) else (x.batch, x.length)
            _check_row_mask(row_mask, shape, x.device)
        return keys, lens


def _check_row_mask(row_mask: Any, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(row_mask, Tensor) or row_mask.dtype != torch.bool:
        got = row_mask.dtype if isinstance(row_mask, Tensor) else type(row_mask).__name__
        raise TypeError(
            f"{_OP}: row_mask must be a bool tensor, got {got}; True = the row may attend: "
            f"convert it with row_mask != 0"
        )
    if row_mask.device != device:
        raise ValueError(
            f"{_OP}: row_mask is on {row_mask.device} but x is on {device}; "
            f"move all tensors to one device"
        )
    if row_mask.shape != shape:
        raise ValueError(
            f"{_OP}: row_mask has shape {list(row_mask.shape)}, expected "
            f"{list(shape)}; give one bool for each row of x"
        )


class _FeedForward(Module):
    """`down_proj(act(up_proj(x)))`"""

    def __init__(
        self, dim: int, hidden: int, activation: str, bias: bool, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = Linear(dim, hidden, bias=bias, **factory)
        self.down_proj = Linear(hidden, dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        reset_linear(self.up_proj)
        reset_linear(self.down_proj)

    def extra_repr(self) -> str:
        """The setting that the submodules do not show."""
        return f"activation={self.activation!r}"

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` -> `[..., dim]`"""
        return self.down_proj(_ACTIVATIONS[self.activation](self.up_proj(x)))


def _hide_rows(
    row_mask: Tensor, x_segments: Tensor | None, context_segments: Tensor | None, keys: int
) -> tuple[Tensor, Tensor | None]:
    """Segments in which rows with `row_mask` False see nothing: cheaper than a mask over keys."""
    if x_segments is None and context_segments is None:
        x_segments = torch.zeros(row_mask.shape, dtype=torch.int32, device=row_mask.device)
        context_segments = x_segments.new_zeros(row_mask.shape[0], keys)
    if not isinstance(x_segments, Tensor):
        raise TypeError(
            f"{_OP}: x_segments must be a torch.Tensor beside context_segments, got "
            f"{type(x_segments).__name__}; give both or neither"
        )
    x_segments = x_segments.to(torch.promote_types(x_segments.dtype, torch.int32))
    return x_segments.masked_fill(row_mask.logical_not(), _NOBODY), context_segments
