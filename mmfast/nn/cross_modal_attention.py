"""Cross-modal attention: `torch.nn.MultiheadAttention`'s idea without its warts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, RMSNorm

from mmfast.nn import _checks
from mmfast.nn._init import reset_linear
from mmfast.nn._tokens import Tokens, padded_rows
from mmfast.ops.cross_attention import CrossAttentionOutput, cross_attention

_OP = "CrossModalAttention"
_NORMS = {"layer": LayerNorm, "rms": RMSNorm}
_GATES = (None, "head", "channel")


class CrossModalAttention(Module):
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
    `x_lens` are 0.

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
        x: Tensor,
        context: Tensor,
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
    ) -> Tensor | CrossAttentionOutput:
        """Attend from `x` to `context`.

        Args:
            x: `[B, N, embed_dim]`.
            context: `[B, M, context_dim]`; M = 0 is a batch in which nobody has a context.
            context_lens: `[B]` integers in `[0, M]`: valid rows of the context; 0 = no context.
            x_lens: `[B]` integers in `[0, N]`: valid rows of x; the others come out 0.
            x_segments, context_segments, segment_rule: `[B, N]` and `[B, M]` integers: row n sees
                row m where the segments are equal ("equal": text sees its own image) or
                `context_segments <= x_segments` ("at_most": all images so far).
            mask: bool, broadcasts to `[B, H, N, M]`, True = may attend.
            bias: added to the scores, broadcasts to `[B, H, N, M]`.
            is_causal: bottom-right aligned on the true lengths, as `mmfast.cross_attention`.
            return_lse, return_importance, return_weights: as `mmfast.cross_attention`.

        Returns:
            `[B, N, embed_dim]`; with any `return_*`
            `CrossAttentionOutput(out, lse, importance, weights)` with None for what was not asked.

        Raises:
            ValueError, TypeError: from here or from `mmfast.cross_attention`, whose `kv_lens`,
                `q_lens`, `q_segments` and `kv_segments` are `context_lens`, `x_lens`, `x_segments`
                and `context_segments` here.
        """
        self._check(x, context, context_lens, x_lens)
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.value_head_dim
        rows = keys = None
        if x_lens is not None:
            work = self.embed_dim * H * (D + Dv)
            rows = Tokens(padded_rows(x_lens, x.shape[1]), work)
        if context_lens is not None:
            work = self.context_dim * G * (D + Dv)
            keys = Tokens(padded_rows(context_lens, context.shape[1]), work)

        x_in = x if rows is None else rows.take(x)
        context_in = context if keys is None else keys.take(context)
        q = _heads(self.q_proj(x_in), H, D, self.q_norm, rows)
        k = _heads(self.k_proj(context_in), G, D, self.k_norm, keys)
        v = _heads(self.v_proj(context_in), G, Dv, None, keys)
        gate = None
        if self.gate_proj is not None:
            gate = self.gate_proj(x_in)
            gate = gate if rows is None else rows.put(gate)
            gate = gate.unflatten(-1, (H, Dv)) if self.gate == "channel" else gate

        # The output bias must not reach rows that attend to nothing. Which rows those are follows
        # from the lengths alone, or else from the log-sum-exp.
        by_lse = self.out_proj.bias is not None and (
            mask is not None
            or bias is not None
            or x_segments is not None
            or is_causal
            or context.shape[1] == 0
        )
        result = cross_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            kv_lens=context_lens, q_lens=x_lens, q_segments=x_segments,
            kv_segments=context_segments, segment_rule=segment_rule, mask=mask, bias=bias,
            is_causal=is_causal, dropout_p=self.dropout if self.training else 0.0, gate=gate,
            return_lse=return_lse or by_lse, return_importance=return_importance,
            return_weights=return_weights,
        )  # fmt: skip
        attended = result if isinstance(result, Tensor) else result.out
        attended = attended.transpose(1, 2).flatten(2)  # a view: memory is [B, N, H, Dv]
        if rows is None:
            out = self.out_proj(attended)
        else:
            out = rows.put_zeros(self.out_proj(rows.take(attended)))
        if self.out_proj.bias is not None:
            if by_lse:
                dead = (result.lse == -torch.inf).all(dim=1)
                out = out.masked_fill(dead.unsqueeze(-1), 0.0)
            elif context_lens is not None:
                out = out.masked_fill((context_lens == 0).view(-1, 1, 1), 0.0)
        if not (return_lse or return_importance or return_weights):
            return out
        return CrossAttentionOutput(
            out, result.lse if return_lse else None, result.importance, result.weights
        )

    def _check(
        self, x: Tensor, context: Tensor, context_lens: Tensor | None, x_lens: Tensor | None
    ) -> None:
        _checks.require_stream(_OP, "x", x, self.embed_dim, "embed_dim", dims=3)
        _checks.require_stream(_OP, "context", context, self.context_dim, "context_dim", dims=3)
        if x.shape[0] != context.shape[0]:
            raise ValueError(
                f"{_OP}: context has B={context.shape[0]} but x has B={x.shape[0]}; both must "
                f"match; give an item without context the length 0 in context_lens"
            )
        _checks.require_weight_dtype(_OP, self.q_proj.weight, x=x, context=context)
        if context_lens is not None:
            _checks.require_lens(_OP, "context_lens", context_lens, context)
        if x_lens is not None:
            _checks.require_lens(_OP, "x_lens", x_lens, x)


def _heads(projected: Tensor, heads: int, width: int, norm: Any, tokens: Tokens | None) -> Tensor:
    """Split into heads `[..., heads, width]`, normalise each, pad again."""
    split = projected.unflatten(-1, (heads, width))
    if norm is not None:
        split = norm(split.to(norm.weight.dtype))  # under autocast: as LayerNorm, in float32
    return split if tokens is None else tokens.put(split)


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
