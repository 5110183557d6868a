"""`torch.nn.TransformerEncoderLayer` and `TransformerEncoder`: same calls, less work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, ModuleList

from mmfast.nn._layer_streams import Stream, conditions, is_causal_mask, open_stream
from mmfast.nn._layers import (
    convert,
    known,
    our_attention,
    require_padded,
    run_layer,
    share_attention,
    work_of,
    zero_padding,
)
from mmfast.nn._plain import unwrapped
from mmfast.nn._sublayers import (
    Activation,
    activation_function,
    apply_norm,
    for_torchscript,
    require_stock,
    shallow_copy,
)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    r"""Self-attention and a feed-forward network, a drop-in for `torch.nn.TransformerEncoderLayer`.

    Constructor, parameters and their initialisation, state dict and arguments of `forward` are
    PyTorch's. `TransformerEncoderLayer.from_torch(layer)` takes the place of an existing layer and
    shares its weights. What differs:

    - **Padding is not computed**: the rows that `src_key_padding_mask` marks (True or -inf), in any
      pattern, come out 0 and may hold NaN. (PyTorch computes them in training, and gives 0 on its
      fast path.) Everything runs on the valid tokens alone where their number is known on the host.
    - **`src` may be ragged**: `PackedTokens` or a jagged nested tensor; the result is of its kind.
    - **`activation`** may also be "silu", "gelu_tanh" or a gated unit: "swiglu", "geglu",
      "geglu_tanh", "reglu", "glu" or "bilinear". `linear1` is then twice as wide, [gate | value].
    - **A residual and the norm that follows it are one kernel** (`mmfast.modulate`).
    - The native fast path of PyTorch is not taken. `is_causal=True` needs no mask.
    - `torch.jit.script` compiles PyTorch's own layer with these weights.

    A layer whose `self_attn` was replaced, or has hooks, runs PyTorch's own forward.

    Example:
        >>> import torch, mmfast
        >>> layer = mmfast.nn.TransformerEncoderLayer(64, 4, batch_first=True, activation="swiglu")
        >>> padding = torch.arange(9) >= torch.tensor([[9], [4]])  # item 1 has 4 tokens
        >>> out = layer(torch.randn(2, 9, 64), src_key_padding_mask=padding)
        >>> out.shape, bool((out[1, 4:] == 0).all())
        (torch.Size([2, 9, 64]), True)
    """

    glu: str | None = None

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        function, glu = activation_function(type(self).__name__, activation)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, function, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        self.glu = glu
        if glu is not None:
            self.linear1 = Linear(d_model, 2 * dim_feedforward, bias, device, dtype)
        self.self_attn = share_attention(self.self_attn)

    @classmethod
    def from_torch(cls, layer: torch.nn.TransformerEncoderLayer) -> TransformerEncoderLayer:
        """A layer that shares the parameters of `layer` (the same objects) and its settings.

        Raises:
            TypeError: `layer` is not a `torch.nn.TransformerEncoderLayer`, or is a subclass with a
                `forward` of its own.
        """
        require_stock(cls, layer, torch.nn.TransformerEncoderLayer)
        shared = shallow_copy(layer, cls)
        shared.self_attn = share_attention(layer.self_attn)
        return shared

    def __prepare_scriptable__(self) -> torch.nn.TransformerEncoderLayer:
        return for_torchscript(self, torch.nn.TransformerEncoderLayer)

    def forward(
        self,
        src: Any,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """`[..., d_model]` -> the same; arguments as of `torch.nn.TransformerEncoderLayer`."""
        stream = self._open(src, src_mask, src_key_padding_mask, is_causal)
        attention = self.self_attn
        if not our_attention(attention):
            require_padded(self, src)
            src = zero_padding(src, stream)
            out = super().forward(src, src_mask, src_key_padding_mask, is_causal)
            return zero_padding(out, stream)
        heads = unwrapped(attention).num_heads
        options = conditions(type(self).__name__, stream, None, src_mask, is_causal, heads)
        return stream.close(run_layer(self, stream, stream.values, options))

    def _open(
        self, src: Any, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Stream:
        """`src` as a `Stream`."""
        attention = self.self_attn
        inner = unwrapped(attention)
        return open_stream(
            type(self).__name__, "src", src, inner.embed_dim, padding,
            batch_first=inner.batch_first,
            work=work_of(self) if our_attention(attention) else 0,
            in_place=mask is not None and not is_causal,
        )  # fmt: skip


class TransformerEncoder(torch.nn.TransformerEncoder):
    r"""A stack of encoder layers, a drop-in for `torch.nn.TransformerEncoder`.

    Constructor, state dict and arguments of `forward` are PyTorch's; `from_torch` shares the
    weights of an existing stack. A padded batch is packed once, before the first layer, and padded
    once, after the last; padding comes out 0 (after PyTorch's fast path a final norm has run over
    the zeros). See `TransformerEncoderLayer` for what else differs. `enable_nested_tensor` and
    `mask_check` are accepted and have no effect.

    Layers of `torch.nn` that are given are converted; other modules are called as PyTorch does, and
    so is a layer that has hooks.

    Example:
        >>> import torch, mmfast
        >>> layer = mmfast.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> encoder = mmfast.nn.TransformerEncoder(layer, num_layers=2)
        >>> text = [torch.randn(5, 64), torch.randn(3, 64)]
        >>> ragged = torch.nested.nested_tensor(text, layout=torch.jagged)
        >>> [item.shape for item in encoder(ragged).unbind()]
        [torch.Size([5, 64]), torch.Size([3, 64])]
    """

    def __init__(
        self,
        encoder_layer: Module,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor
        self.layers = convert(
            self.layers, TransformerEncoderLayer, torch.nn.TransformerEncoderLayer
        )

    @classmethod
    def from_torch(cls, encoder: torch.nn.TransformerEncoder) -> TransformerEncoder:
        """A stack that shares the parameters of `encoder`.

        Raises:
            TypeError: `encoder` is not a `torch.nn.TransformerEncoder`, or it or one of its layers
                is a subclass with a `forward` of its own.
        """
        require_stock(cls, encoder, torch.nn.TransformerEncoder)
        shared = shallow_copy(encoder, cls)
        shared.layers = ModuleList(TransformerEncoderLayer.from_torch(x) for x in encoder.layers)
        shared.layers.train(encoder.training)
        return shared

    def __prepare_scriptable__(self) -> torch.nn.TransformerEncoder:
        return for_torchscript(self, torch.nn.TransformerEncoder)

    def forward(
        self,
        src: Any,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Any:
        """As `torch.nn.TransformerEncoder`; `src` may be ragged, the result is of its kind."""
        first: Any = self.layers[0]
        causal = is_causal_mask(mask, is_causal)
        if not all(known(layer, TransformerEncoderLayer) for layer in self.layers):
            for layer in self.layers:
                src = layer(
                    src, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask
                )
            return src if self.norm is None else self.norm(src)
        stream = first._open(src, mask, src_key_padding_mask, causal)
        options = conditions(
            type(self).__name__, stream, None, mask, causal, unwrapped(first.self_attn).num_heads
        )
        x = stream.values
        for layer in self.layers:
            x = run_layer(layer, stream, x, options)
        if self.norm is not None:
            x = apply_norm(self.norm, x)
        return stream.close(x)
