"""Cross-modal attention: `torch.nn.MultiheadAttention`'s idea without its warts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, RMSNorm

from mmfast.nn import _checks
from mmfast.nn._absorbed import Absorbed
from mmfast.nn._init import reset_linear
from mmfast.nn._plain import plain_linear
from mmfast.nn._planned import PlanSizes
from mmfast.nn._projected_attention import ProjectedAttention
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext

_OP = "CrossModalAttention"
_NORMS = {"layer": LayerNorm, "rms": RMSNorm}
_GATES = (None, "head", "channel")


class CrossModalAttention(ProjectedAttention, Module):
    r"""One stream attends to another: projections, normalisation, attention, gate, projection::

        q    = norm(x W_q + b_q)             [B, N, H, D]
        k    = norm(context W_k + b_k)       [B, M, G, D]
        v    = context W_v + b_v             [B, M, G, Dv]
        attn = sigmoid(x W_g + b_g) * (softmax over the allowed m of (q k^T / sqrt(D)) @ v)
        out  = attn W_o + b_o, and exactly 0 in rows with nothing to attend

    **Missing modality.** `context_lens[b] = 0` says that item b has no context. It then contributes
    exactly nothing: its output rows are 0, *without* the bias of the output projection, so that a
    residual connection passes the stream on unchanged, and neither it nor its (possibly NaN)
    context changes any gradient. The same holds for every single row that may attend to nothing.

    **Padding.** Rows of the context past `context_lens` and rows of x past `x_lens` may hold NaN or
    Inf; on a CPU they are not computed at all, projections included. Rows of the output past
    `x_lens` are 0. Either stream may also come without padding, as `PackedTokens` or as a jagged
    `torch.nested` tensor, on any device.

    **Plans.** The context's projections are done for all rows, for its tokens alone, or not at all:
    with few queries they are absorbed into the queries and the result. The planner chooses, the
    result is the same (`explain()` tells which and why, `mmfast.use_plan` forces one). A context
    that is attended to many times is projected once by `prepare_context`.

    Args:
        embed_dim: width of x and of the output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, a divisor of H (grouped-query attention); default H.
        context_dim: width of the context; default `embed_dim`.
        head_dim: width D of a query and key head; default `embed_dim // num_heads`.
        value_head_dim: width Dv of a value head; default `head_dim`.
        qk_norm: None, "layer" (LayerNorm) or "rms" (RMSNorm) over each head of q and k, with a
            weight of its own for q and for k, shared by the heads.
        qk_norm_eps: their epsilon.
        bias: biases in the projections of q, k, v, gate and output.
        out_bias: a bias in the output projection; default: as `bias`.
        gate: None, "head" (one sigmoid gate for each head and row) or "channel" (one for each
            channel of each head), computed from x.
        dropout: of attention weights, in training.
        device, dtype: of the parameters.

    Parameters: `q_proj`, `k_proj`, `v_proj`, `out_proj` and, where asked for, `gate_proj`
    (`torch.nn.Linear`), `q_norm`, `k_norm`. Weights start Xavier-uniform, biases 0.

    Raises:
        ValueError: sizes that are not positive or do not divide, unknown `qk_norm` or `gate`.

    Example:
        >>> import torch, mmfast
        >>> _ = torch.manual_seed(0)
        >>> attention = mmfast.nn.CrossModalAttention(
        ...     64, 4, num_kv_heads=2, context_dim=96, qk_norm="rms", gate="head"
        ... )
        >>> text, image = torch.randn(3, 5, 64), torch.randn(3, 9, 96)
        >>> patches = torch.tensor([9, 4, 0])  # the last item has no image
        >>> result = attention(text, image, context_lens=patches, return_importance=True)
        >>> result.out.shape, result.importance.shape
        (torch.Size([3, 5, 64]), torch.Size([3, 4, 9]))
        >>> bool((result.out[2] == 0).all()), bool((result.importance[1, :, 4:] == 0).all())
        (True, True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        context_dim: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        bias: bool = True,
        out_bias: bool | None = None,
        gate: str | None = None,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        context_dim = embed_dim if context_dim is None else context_dim
        _check_sizes(embed_dim, num_heads, num_kv_heads, context_dim, head_dim, value_head_dim)
        _checks.require_choice(_OP, "qk_norm", qk_norm, (None, *_NORMS))
        _checks.require_choice(_OP, "gate", gate, _GATES)
        _checks.require_probability(_OP, "dropout", dropout)
        self.embed_dim, self.context_dim = embed_dim, context_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.value_head_dim = self.head_dim if value_head_dim is None else value_head_dim
        self.qk_norm, self.gate, self.dropout = qk_norm, gate, dropout

        def linear(width_in: int, width_out: int, with_bias: bool = bias) -> Linear:
            return Linear(width_in, width_out, bias=with_bias, device=device, dtype=dtype)

        values = num_heads * self.value_head_dim
        self.q_proj = linear(embed_dim, num_heads * self.head_dim)
        self.k_proj = linear(context_dim, num_kv_heads * self.head_dim)
        self.v_proj = linear(context_dim, num_kv_heads * self.value_head_dim)
        self.out_proj = linear(values, embed_dim, bias if out_bias is None else out_bias)
        self.gate_proj = self.q_norm = self.k_norm = None
        if gate is not None:
            self.gate_proj = linear(embed_dim, num_heads if gate == "head" else values)
        if qk_norm is not None:
            norm: Any = _NORMS[qk_norm]
            self.q_norm = norm(self.head_dim, eps=qk_norm_eps, device=device, dtype=dtype)
            self.k_norm = norm(self.head_dim, eps=qk_norm_eps, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases, unit norms."""
        for module in self.children():
            if isinstance(module, Linear):
                reset_linear(module)
            elif isinstance(module, (LayerNorm, RMSNorm)):
                module.reset_parameters()

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, value_head_dim={self.value_head_dim}, "
            f"qk_norm={self.qk_norm!r}, gate={self.gate!r}, dropout={self.dropout}"
        )

    def forward(
        self,
        x: Tensor | PackedTokens,
        context: Tensor | PackedTokens | ProjectedContext,
        *,
        context_lens: Tensor | None = None,
        x_lens: Tensor | None = None,
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
        """`attend` under the name that modules are called by; arguments and results are its."""
        return self.attend(
            x, context, context_lens=context_lens, x_lens=x_lens, x_segments=x_segments,
            context_segments=context_segments, segment_rule=segment_rule, mask=mask, bias=bias,
            is_causal=is_causal, return_lse=return_lse, return_importance=return_importance,
            return_weights=return_weights,
        )  # fmt: skip

    def kv_weights(self) -> tuple[Tensor, Tensor | None]:
        """The projections of keys and values as one: weight `[G * (D + Dv), context_dim]`, bias.

        Keys come first. For a stack that projects one context for all its layers at once;
        `kv_heads` takes the result apart.

        Raises:
            TypeError: a projection that has to be called (LoRA, quantised, hooked).
        """
        if not (plain_linear(self.k_proj) and plain_linear(self.v_proj)):
            raise TypeError(
                f"{_OP}.kv_weights: k_proj or v_proj is not a plain torch.nn.Linear with a plain "
                f"weight, or has hooks, so that it must be called; use prepare_context"
            )
        weight = torch.cat([self.k_proj.weight, self.v_proj.weight])
        bias: Tensor | None = self.k_proj.bias
        return weight, None if bias is None else torch.cat([bias, self.v_proj.bias])

    def kv_heads(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[..., G, D]`, normed, and values `[..., G, Dv]` in what `kv_weights` give."""
        G, D, Dv = self.num_kv_heads, self.head_dim, self.value_head_dim
        k, v = projected.split([G * D, G * Dv], dim=-1)
        return _heads(k, G, D, self.k_norm), v.unflatten(-1, (G, Dv))

    # --- what attend needs -----------------------------------------------------------------------

    _dead_rows_are_zero = True

    def _query_heads(self, rows: Tensor, held: Any) -> Tensor:
        return _heads(self.q_proj(rows), self.num_heads, self.head_dim, self.q_norm)

    def _key_value_heads(self, rows: Tensor, held: Any) -> tuple[Tensor, Tensor]:
        G = self.num_kv_heads
        k = _heads(self.k_proj(rows), G, self.head_dim, self.k_norm)
        return k, _heads(self.v_proj(rows), G, self.value_head_dim, None)

    def _gate_logits(self, rows: Tensor) -> Tensor | None:
        if self.gate_proj is None:
            return None
        gate: Tensor = self.gate_proj(rows)
        if self.gate == "head":
            return gate
        return gate.unflatten(-1, (self.num_heads, self.value_head_dim))

    def _result(self, attended: Tensor) -> Tensor:
        return self.out_proj(attended)

    def _a_weight(self) -> Tensor:
        return self.q_proj.weight

    def _has_result_bias(self) -> bool:
        return self.out_proj.bias is not None

    def _absorbed(self, held: Any) -> Absorbed:
        G, C = self.num_kv_heads, self.context_dim
        k, v = self.k_proj, self.v_proj
        return Absorbed(
            k.weight.view(G, self.head_dim, C), k.bias,
            v.weight.view(G, self.value_head_dim, C), v.bias,
        )  # fmt: skip

    def _plan_sizes(self) -> PlanSizes:
        return PlanSizes(
            self.embed_dim, self.context_dim, self.num_heads, self.num_kv_heads, self.head_dim,
            self.value_head_dim,
        )  # fmt: skip

    def _plan_refusals(self) -> Mapping[str, str]:
        modules = self._modules  # without Module.__getattr__, which costs 0.3 us each time
        if modules.get("k_norm") is not None:
            return _NORMED
        for module in (modules["k_proj"], modules["v_proj"]):
            if not plain_linear(module):
                return _NOT_PLAIN
        return _NOTHING


_NOTHING: Mapping[str, str] = {}
_NORMED = {"absorbed": "qk_norm: a norm stands between the projection of the keys and the scores"}
_NOT_PLAIN = {
    "absorbed": "k_proj or v_proj is not a plain torch.nn.Linear, or has hooks, or its weight is "
    "not a plain tensor: it must be called"
}


def _heads(projected: Tensor, heads: int, width: int, norm: Any) -> Tensor:
    """Split into heads `[..., heads, width]` and normalise each."""
    split = projected.view(*projected.shape[:-1], heads, width)
    # Under autocast: as LayerNorm, in float32.
    return split if norm is None else norm(split.to(norm.weight.dtype))


def _check_sizes(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    context_dim: int,
    head_dim: int | None,
    value_head_dim: int | None,
) -> None:
    _checks.require_sizes(
        _OP, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
        context_dim=context_dim, head_dim=head_dim, value_head_dim=value_head_dim,
    )  # fmt: skip
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            f"{_OP}: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; "
            f"every key/value head serves the same number of query heads"
        )
    if head_dim is None and embed_dim % num_heads != 0:
        raise ValueError(
            f"{_OP}: embed_dim={embed_dim} is not a multiple of num_heads={num_heads}; "
            f"choose another number of heads or give head_dim"
        )
