"""Stateless layers: each has only a `forward`, with the arguments of the modules it stands for,
and works on their parameters. What a layer does not cover goes to the module's own forward.

The classes have the names by which transformers and `kernels-community` ask for such layers, where
there is one; docs/drop-in.md says which module each is for.
"""

from torch import Tensor, nn

import mmfast
import mmfast.nn

_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "ReLU": "relu",
    "Sigmoid": "sigmoid", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
    "Identity": "identity", "LinearActivation": "identity",
}  # fmt: skip
"""Activation modules of torch and transformers, by class, as `mmfast.glu` names them."""


def _activation(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module).__name__)


class SiluAndMul(nn.Module):
    """`silu(a) * b` of `x = [a | b]`, `[..., 2 C] -> [..., C]`."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return mmfast.glu_packed(x, "silu")


class GeluAndMul(nn.Module):
    """`gelu(a) * b` (erf) of `x = [a | b]`, `[..., 2 C] -> [..., C]`."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return mmfast.glu_packed(x, "gelu")


class GeluTanhAndMul(nn.Module):
    """`gelu(a) * b` (tanh form) of `x = [a | b]`, `[..., 2 C] -> [..., C]`."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return mmfast.glu_packed(x, "gelu_tanh")


class GatedMLP(nn.Module):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`: the MLP of Llama and of most after it."""

    can_torch_compile = True

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C] -> [..., C]`. Of an activation that `mmfast.glu` lacks the product alone is
        left to torch."""
        activation = _activation(self.act_fn)
        if activation is None:
            return type(self).forward(self, x)
        return self.down_proj(mmfast.glu(self.gate_proj(x), self.up_proj(x), activation))


class RMSNorm(nn.Module):
    """`weight * h * rsqrt(mean(h^2) + variance_epsilon)`: LlamaRMSNorm, T5LayerNorm and the like.

    Rounded once, at the end; in 16 bits transformers rounds the normalised row as well.
    """

    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., C] -> [..., C]`. A weight of another dtype goes to the module's own forward."""
        if self.weight.dtype != hidden_states.dtype:
            return type(self).forward(self, hidden_states)
        return mmfast.modulate(
            hidden_states, norm="rms", weight=self.weight, eps=self.variance_epsilon
        )


class RMSNormZeroCentered(nn.Module):
    """`(1 + weight) * x * rsqrt(mean(x^2) + eps)`: Gemma's and Qwen3-Next's."""

    can_torch_compile = True

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C] -> [..., C]`, dtype of x."""
        return mmfast.modulate(x, self.weight, norm="rms", eps=self.eps)


class AdaLayerNormZero(nn.Module):
    """adaLN-zero as Qwen2_5_OmniAdaLayerNormZero has it: `norm(x) * (1 + scale) + shift`, the six
    vectors from `linear(silu(emb))`."""

    can_torch_compile = True

    silu: nn.Module
    linear: nn.Linear
    norm: nn.LayerNorm

    def forward(
        self, hidden_states: Tensor, emb: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`[B, N, C]` and `[B, C]` -> the modulated rows, and gate_msa, shift_mlp, scale_mlp,
        gate_mlp, each `[B, C]`."""
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return mmfast.modulate(hidden_states, scale, shift, eps=self.norm.eps), *others


class AdaLayerNormZeroFinal(nn.Module):
    """adaLN as Qwen2_5_OmniAdaLayerNormZero_Final has it: scale and shift from
    `linear(silu(emb))`."""

    can_torch_compile = True

    silu: nn.Module
    linear: nn.Linear
    norm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, emb: Tensor) -> Tensor:
        """`[B, N, C]` and `[B, C]` -> `[B, N, C]`."""
        scale, shift = self.linear(self.silu(emb)).chunk(2, dim=1)
        return mmfast.modulate(hidden_states, scale, shift, eps=self.norm.eps)


class LxmertAttention(nn.Module):
    """Attention of one stream over another with projections of their own, as LxmertAttention."""

    can_torch_compile = True

    num_attention_heads: int
    attention_head_size: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """`([B, N, C],)`; `attention_mask` is added to the scores. With `output_attentions` the
        module's own forward runs."""
        if output_attentions:
            return type(self).forward(self, hidden_states, context, attention_mask, True)
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            projection(x).unflatten(-1, heads).transpose(1, 2)
            for projection, x in (
                (self.query, hidden_states), (self.key, context), (self.value, context),
            )
        )  # fmt: skip
        dropout_p = self.dropout.p if self.training else 0.0
        out = mmfast.cross_attention(q, k, v, bias=attention_mask, dropout_p=dropout_p)
        return (out.transpose(1, 2).flatten(2),)


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention`, by `mmfast.nn.MultiheadAttention`: the differences that its
    docstring lists hold here too."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`(output, weights)`; arguments as torch's."""
        # Made anew for each call: a layer keeps no state, and the parameters may be others by now.
        shared = mmfast.nn.MultiheadAttention.from_torch(self)
        return type(shared).forward(
            shared, query, key, value, key_padding_mask, need_weights, attn_mask,
            average_attn_weights, is_causal,
        )  # fmt: skip
