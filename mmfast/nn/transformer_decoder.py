"""`torch.nn.TransformerDecoderLayer` and `TransformerDecoder`: same calls, less work."""

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
    open_context,
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
from mmfast.nn.context_cache import Caching, ContextCache


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    r"""Self-attention, cross-attention, feed-forward: a drop-in for PyTorch's decoder layer.

    Constructor, parameters and their initialisation, state dict and arguments of `forward` are
    those of `torch.nn.TransformerDecoderLayer`; `from_torch(layer)` shares the weights of an
    existing layer. What differs is what differs in `mmfast.nn.TransformerEncoderLayer`: padding is
    not computed and comes out 0, `tgt` and `memory` may be ragged, more activations. `memory` may
    also be the `ProjectedContext` of `multihead_attn.prepare_context`.

    Rows whose memory is all padding get the bias of the output projection from the cross-attention,
    as in PyTorch; `CrossModalEncoderLayer` gives them nothing.

    Example:
        >>> import torch, mmfast
        >>> layer = mmfast.nn.TransformerDecoderLayer(64, 4, batch_first=True)
        >>> text, image = torch.randn(2, 5, 64), torch.randn(2, 9, 64)
        >>> padding = torch.arange(9) >= torch.tensor([[9], [4]])
        >>> layer(text, image, memory_key_padding_mask=padding, tgt_is_causal=True).shape
        torch.Size([2, 5, 64])
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
        self.multihead_attn = share_attention(self.multihead_attn)

    @classmethod
    def from_torch(cls, layer: torch.nn.TransformerDecoderLayer) -> TransformerDecoderLayer:
        """A layer that shares the parameters of `layer` (the same objects) and its settings.

        Raises:
            TypeError: `layer` is not a `torch.nn.TransformerDecoderLayer`, or is a subclass with a
                `forward` of its own.
        """
        require_stock(cls, layer, torch.nn.TransformerDecoderLayer)
        shared = shallow_copy(layer, cls)
        shared.self_attn = share_attention(layer.self_attn)
        shared.multihead_attn = share_attention(layer.multihead_attn)
        return shared

    def __prepare_scriptable__(self) -> torch.nn.TransformerDecoderLayer:
        return for_torchscript(self, torch.nn.TransformerDecoderLayer)

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Any:
        """`[..., d_model]` -> the same; arguments as of `torch.nn.TransformerDecoderLayer`."""
        op = type(self).__name__
        ours = our_attention(self.self_attn) and our_attention(self.multihead_attn)
        masked = (tgt_mask is not None and not tgt_is_causal) or memory_mask is not None
        stream = _open(self, op, tgt, tgt_key_padding_mask, masked, ours)
        if not ours:
            require_padded(self, tgt)
            require_padded(self, memory)
            out = super().forward(
                zero_padding(tgt, stream), memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                memory_key_padding_mask, tgt_is_causal, memory_is_causal,
            )  # fmt: skip
            return zero_padding(out, stream)
        heads = unwrapped(self.self_attn).num_heads
        options = conditions(op, stream, None, tgt_mask, tgt_is_causal, heads)
        context = open_context(
            op, stream, memory, memory_mask, memory_key_padding_mask, memory_is_causal, self,
            batch_first=unwrapped(self.self_attn).batch_first, in_place=memory_mask is not None,
        )  # fmt: skip
        return stream.close(run_layer(self, stream, stream.values, options, context))


class TransformerDecoder(torch.nn.TransformerDecoder, Caching):
    r"""A stack of decoder layers, a drop-in for `torch.nn.TransformerDecoder`.

    Constructor, state dict and arguments of `forward` are PyTorch's; `from_torch` shares the
    weights of an existing stack. Target and memory are packed once for all layers. For generation,
    `prepare_context(memory, ...)` projects the memory once, and `step` decodes token by token with
    what it returns; `forward` takes it in place of the memory too.

    Layers of `torch.nn` that are given are converted; other modules are called as PyTorch does, and
    so is a layer that has hooks.

    Example:
        >>> import torch, mmfast
        >>> theirs = torch.nn.TransformerDecoder(
        ...     torch.nn.TransformerDecoderLayer(64, 4, batch_first=True), num_layers=2
        ... ).eval()
        >>> decoder = mmfast.nn.TransformerDecoder.from_torch(theirs)
        >>> text, image = torch.randn(2, 5, 64), torch.randn(2, 9, 64)
        >>> expected = theirs(text, image)
        >>> bool(torch.allclose(decoder(text, image), expected, atol=1e-5))
        True
        >>> cache = decoder.prepare_context(image)
        >>> bool(torch.allclose(decoder(text, cache), expected, atol=1e-5))
        True
    """

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__(decoder_layer, num_layers, norm)  # type: ignore[arg-type]
        self.layers = convert(
            self.layers, TransformerDecoderLayer, torch.nn.TransformerDecoderLayer
        )

    @classmethod
    def from_torch(cls, decoder: torch.nn.TransformerDecoder) -> TransformerDecoder:
        """A stack that shares the parameters of `decoder`.

        Raises:
            TypeError: `decoder` is not a `torch.nn.TransformerDecoder`, or it or one of its layers
                is a subclass with a `forward` of its own.
        """
        require_stock(cls, decoder, torch.nn.TransformerDecoder)
        shared = shallow_copy(decoder, cls)
        shared.layers = ModuleList(TransformerDecoderLayer.from_torch(x) for x in decoder.layers)
        shared.layers.train(decoder.training)
        return shared

    def __prepare_scriptable__(self) -> torch.nn.TransformerDecoder:
        return for_torchscript(self, torch.nn.TransformerDecoder)

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """As `torch.nn.TransformerDecoder`; `memory` may also be a `ContextCache`.

        `tgt` and `memory` may be ragged; the result is of the kind of `tgt`.
        """
        op = type(self).__name__
        causal = is_causal_mask(tgt_mask, tgt_is_causal)
        if not all(known(layer, TransformerDecoderLayer) for layer in self.layers):
            for number, layer in enumerate(self.layers):
                tgt = layer(
                    tgt,
                    memory.contexts[number] if isinstance(memory, ContextCache) else memory,
                    tgt_mask=tgt_mask,
                    memory_mask=memory_mask,
                    tgt_key_padding_mask=tgt_key_padding_mask,
                    memory_key_padding_mask=memory_key_padding_mask,
                    tgt_is_causal=causal,
                    memory_is_causal=memory_is_causal,
                )
            return tgt if self.norm is None else self.norm(tgt)
        first: Any = self.layers[0]
        masked = (tgt_mask is not None and not causal) or memory_mask is not None
        stream = _open(first, op, tgt, tgt_key_padding_mask, masked, True)
        heads = unwrapped(first.self_attn).num_heads
        options = conditions(op, stream, None, tgt_mask, causal, heads)
        contexts = self._contexts(
            op, stream, memory, memory_mask, memory_is_causal, memory_key_padding_mask, None
        )
        x = stream.values
        for layer, context in zip(self.layers, contexts, strict=True):
            x = run_layer(layer, stream, x, options, context)
        return stream.close(x if self.norm is None else apply_norm(self.norm, x))


def _open(layer: Any, op: str, tgt: Any, padding: Any, masked: bool, ours: bool) -> Stream:
    attention = unwrapped(layer.self_attn)
    return open_stream(
        op, "tgt", tgt, attention.embed_dim, padding, batch_first=attention.batch_first,
        work=work_of(layer) if ours else 0, in_place=masked,
    )  # fmt: skip
