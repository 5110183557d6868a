"""A transformer layer in which one stream also attends to another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Dropout, LayerNorm, Linear, Module, Parameter

from mmfast.nn import _checks
from mmfast.nn._layer_streams import Stream, conditions, open_stream
from mmfast.nn._layers import (
    Asked,
    Context,
    open_context,
    run_layer,
    share_attention,
    work_of,
)
from mmfast.nn._plain import unwrapped
from mmfast.nn._sublayers import Activation, activation_function, require_stock, shallow_copy
from mmfast.nn.multihead_attention import MultiheadAttention
from mmfast.planning import Plan

_OP = "CrossModalEncoderLayer"


class CrossModalOutput(NamedTuple):
    """Result of a layer or stack with statistics of its attentions; None for what was not asked.

    Importance `[B, H, M]` sums the attention weights over the rows, weights are `[B, N, M]` (head
    mean) or `[B, H, N, M]`; those of a stack have a dim of layers after B.
    """

    out: Any
    importance: Tensor | None = None
    """Of the attention to the memory."""
    weights: Tensor | None = None
    self_importance: Tensor | None = None
    """Of the self-attention."""
    self_weights: Tensor | None = None


class LayerCall(NamedTuple):
    """How a stack calls a layer: on an open stream; the result is its new values."""

    stream: Stream
    values: Tensor
    options: dict[str, Any]
    context: Context | None
    asked: Asked | None


class CrossModalEncoderLayer(Module):
    r"""Self-attention, attention to another stream, feed-forward network::

        norm first:                              norm last:
        x = x + self_attn(norm1(x))              x = norm1(x + self_attn(x))
        x = x + multihead_attn(norm2(x), memory) x = norm2(x + multihead_attn(x, memory))
        x = x + feed_forward(norm3(x))           x = norm3(x + feed_forward(x))

    Arguments, parameters and state dict are those of `torch.nn.TransformerDecoderLayer` (without
    cross-attention: of `torch.nn.TransformerEncoderLayer`; the branches that there are have the
    norms 1, 2, ...); `from_torch` shares the weights of either. Only `batch_first` differs in its
    default. Besides:

    - **Missing modality.** A row that may attend to nothing (memory of length 0, everything masked,
      `memory=None`) gets exactly nothing from the attention, not even the bias of the output
      projection. PyTorch gives it that bias, or NaN.
    - **Padding is not computed** and may hold NaN; rows of padding come out 0. Everything runs on
      the valid tokens alone where their number is known on the host: on a CPU, or with lengths on
      the CPU.
    - **Ragged streams**: `tgt` and `memory` may be `PackedTokens` or jagged nested tensors,
      `memory` also a `ProjectedContext`; the result is of the kind of `tgt`.

    Args:
        d_model, nhead, dim_feedforward, dropout, layer_norm_eps, batch_first, norm_first, bias:
            as of `torch.nn.TransformerDecoderLayer`; dropout is also that of attention weights.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", a function, or a gated unit:
            "swiglu", "geglu", "geglu_tanh", "reglu", "glu" (sigmoid) or "bilinear"; `linear1` is
            then twice as wide, [gate | value].
        context_dim: width of the memory; default `d_model`.
        self_attention, cross_attention: leave one of the two out.
        gate: None, "scalar" or "vector": what the attention to the memory adds is multiplied by
            `tanh(cross_gate)`, which starts at 0 (Flamingo).
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes below 1, probabilities outside [0, 1), an unknown gate, a layer without
            any attention, a gate without cross-attention.

    Example:
        >>> import torch, mmfast
        >>> layer = mmfast.nn.CrossModalEncoderLayer(64, 4, activation="swiglu", context_dim=96)
        >>> text, image = torch.randn(3, 5, 64), torch.randn(3, 9, 96)
        >>> patches = torch.tensor([9, 4, 0])  # the last item has no image
        >>> result = layer(text, image, memory_lens=patches, return_importance=True)
        >>> result.out.shape, result.importance.shape
        (torch.Size([3, 5, 64]), torch.Size([3, 4, 9]))
    """

    glu: str | None = None

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        *,
        context_dim: int | None = None,
        self_attention: bool = True,
        cross_attention: bool = True,
        gate: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.require_sizes(
            _OP, d_model=d_model, nhead=nhead, dim_feedforward=dim_feedforward,
            context_dim=context_dim,
        )  # fmt: skip
        _checks.require_probability(_OP, "dropout", dropout)
        _checks.require_choice(_OP, "gate", gate, (None, "scalar", "vector"))
        if d_model % nhead != 0:
            raise ValueError(
                f"{_OP}: d_model={d_model} is not a multiple of nhead={nhead}; choose another "
                f"number of heads"
            )
        if not (self_attention or cross_attention):
            raise ValueError(f"{_OP}: self_attention and cross_attention are both off; keep one")
        if gate is not None and not cross_attention:
            raise ValueError(f"{_OP}: gate={gate!r} needs cross_attention; leave it out")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        attention: dict[str, Any] = {
            "dropout": dropout, "bias": bias, "batch_first": batch_first, **factory,
        }  # fmt: skip
        self.d_model, self.norm_first, self.gate = d_model, norm_first, gate
        self.self_attn = self.multihead_attn = self.cross_gate = None
        if self_attention:
            self.self_attn = MultiheadAttention(d_model, nhead, **attention)
        if cross_attention:
            self.multihead_attn = MultiheadAttention(
                d_model, nhead, kdim=context_dim, vdim=context_dim, **attention
            )
        self.activation, self.glu = activation_function(_OP, activation)
        hidden = dim_feedforward if self.glu is None else 2 * dim_feedforward
        self.linear1 = Linear(d_model, hidden, bias=bias, **factory)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, **factory)
        for i in range(1, 2 + self_attention + cross_attention):
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
            self.add_module(f"norm{i}", norm)
        for i in range(1, 2 + self_attention + cross_attention):
            self.add_module(f"dropout{i}", Dropout(dropout))
        if gate is not None:
            self.cross_gate = Parameter(torch.zeros(d_model if gate == "vector" else 1, **factory))

    @classmethod
    def from_torch(cls, layer: Module) -> CrossModalEncoderLayer:
        """A layer that shares the parameters of a decoder or encoder layer of `torch.nn` (or ours).

        Raises:
            TypeError: another module, or a subclass with a `forward` of its own.
        """
        decoder = isinstance(layer, torch.nn.TransformerDecoderLayer)
        stock = torch.nn.TransformerDecoderLayer if decoder else torch.nn.TransformerEncoderLayer
        require_stock(cls, layer, stock)
        shared = shallow_copy(layer, cls)
        shared.gate = None
        shared.self_attn = share_attention(layer.self_attn)
        shared.d_model = shared.self_attn.embed_dim
        if decoder:
            shared.multihead_attn = share_attention(layer.multihead_attn)
        else:
            shared.multihead_attn = None
        shared.cross_gate = None
        for attention in (shared.self_attn, shared.multihead_attn):
            if not isinstance(attention, MultiheadAttention | None):
                raise TypeError(
                    f"{_OP}.from_torch: an attention of the layer is {type(attention).__name__}, "
                    f"expected torch.nn.MultiheadAttention"
                )
        return shared

    def reset_parameters(self) -> None:
        """Every part anew, as after construction; the gate at 0."""
        for module in self.children():
            if isinstance(module, MultiheadAttention):
                module._reset_parameters()
                module.out_proj.reset_parameters()
                if module.out_proj.bias is not None:
                    torch.nn.init.zeros_(module.out_proj.bias)
            elif isinstance(module, Linear | LayerNorm):
                module.reset_parameters()
        if self.cross_gate is not None:
            torch.nn.init.zeros_(self.cross_gate)

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return f"norm_first={self.norm_first}, glu={self.glu!r}, gate={self.gate!r}"

    @property
    def batch_first(self) -> bool:
        """Is the batch the first dim of `tgt` and `memory`?"""
        attention = self.multihead_attn if self.self_attn is None else self.self_attn
        assert attention is not None
        return unwrapped(attention).batch_first

    def forward(
        self,
        tgt: Any,
        memory: Any = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        tgt_lens: Tensor | None = None,
        memory_lens: Tensor | None = None,
        return_importance: bool = False,
        return_weights: bool | str = False,
    ) -> Any:
        """Let `tgt` attend to itself and to `memory`.

        Args:
            tgt: `[B, N, d_model]` (`[N, B, d_model]` unless `batch_first`; without B unbatched), or
                ragged.
            memory: `[B, M, context_dim]`, ragged, or a `ProjectedContext`; None: nobody has one.
            tgt_mask, memory_mask: `[N, N]` and `[N, M]` or `[B * nhead, ...]`; bool (True = may
                not attend) or added to the scores.
            tgt_key_padding_mask, memory_key_padding_mask: `[B, N]` and `[B, M]`; True or -inf is
                padding, in any pattern.
            tgt_is_causal, memory_is_causal: row n sees key m <= n. No mask is needed beside it.
            tgt_lens, memory_lens: `[B]` integers, instead of a padding mask: the valid rows of
                each item; 0: the item does not have this modality.
            return_importance, return_weights: as `mmfast.cross_attention`.

        Returns:
            As `tgt`; with any `return_*` a `CrossModalOutput`.

        Raises:
            ValueError, TypeError: sizes, dtypes, devices or lengths that do not fit.
        """
        if isinstance(tgt, LayerCall):
            return self._run(*tgt)
        if memory is not None and self.multihead_attn is None:
            raise ValueError(
                f"{_OP}: memory came but the layer was made with cross_attention=False; leave it "
                f"out"
            )
        asks = return_importance or return_weights is not False
        masked = (tgt_mask is not None and not tgt_is_causal) or memory_mask is not None
        stream = self.open(_OP, tgt, tgt_key_padding_mask, tgt_lens, in_place=masked or asks)
        options: dict[str, Any] = {}
        if self.self_attn is not None:
            heads = unwrapped(self.self_attn).num_heads
            options = conditions(_OP, stream, None, tgt_mask, tgt_is_causal, heads)
        context = None
        if self.multihead_attn is not None:
            context = open_context(
                _OP, stream, memory, memory_mask, memory_key_padding_mask, memory_is_causal, self,
                lens=memory_lens, batch_first=self.batch_first,
                in_place=memory_mask is not None or asks,
            )  # fmt: skip
        asked = Asked(return_importance, return_weights, {}) if asks else None
        x = self._run(stream, stream.values, options, context, asked)
        out = stream.close(x)
        if asked is None:
            return out
        return CrossModalOutput(out, **asked.found)

    def explain(self, *sizes: int, **named: Any) -> Plan:
        """The plan of the attention to the memory: `MultiheadAttention.explain`."""
        if self.multihead_attn is None:
            raise ValueError(f"{_OP}.explain: the layer was made with cross_attention=False")
        return self.multihead_attn.explain(*sizes, **named)

    def open(self, op: str, tgt: Any, padding: Any, lens: Any, in_place: bool = False) -> Stream:
        """`tgt` as a `Stream`."""
        return open_stream(
            op, "tgt", tgt, self.d_model, padding, lens, batch_first=self.batch_first,
            work=work_of(self), in_place=in_place,
        )  # fmt: skip

    def _run(
        self, stream: Stream, x: Tensor, options: Any, context: Any, asked: Asked | None
    ) -> Tensor:
        return run_layer(
            self, stream, x, options, context, blank=True, gate=self.cross_gate, asked=asked
        )
