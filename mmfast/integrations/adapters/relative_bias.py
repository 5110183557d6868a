"""T5 and its kin: a bias by relative position, which the first layer makes and the others share."""

from __future__ import annotations

from typing import Any

from mmfast.integrations._packing import Arguments, PackedLayer
from mmfast.integrations._prefill import Prefill
from mmfast.integrations.adapters.encoder_decoder import row

_PARTS = (
    "Attention LayerSelfAttention LayerCrossAttention LayerFF LayerNorm "
    "DenseActDense DenseGatedActDense"
)


@row("t5", "T5", "Block", _PARTS)
@row("mt5", "MT5", "Block", _PARTS)
@row("udop", "Udop", "Block", _PARTS)
class T5Block(PackedLayer):
    """Self-attention with a bias, cross-attention without, feed-forward.

    The bias `[1, H, N, M]` is of positions in the padded batch, which packed rows keep as long as
    the padding is on the right. It is made here, where the padded shapes are known, and contiguous:
    as it comes from its embedding, `[N, M, H]`, every layer would copy it. The stock
    cross-attention adds as large a tensor of zeros; here it is one zero.
    """

    context = "encoder_hidden_states"
    context_mask = "encoder_attention_mask"
    context_alone = True
    holes = False
    layer: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, without padding."""
        given = Arguments(self, args, kwargs)
        hidden, attention = given.get("hidden_states"), self._self_attention()
        makes_bias = given.get("position_bias") is None and attention.has_relative_attention_bias
        if makes_bias and self._holds_nothing(given.get("past_key_values")):
            length = hidden.shape[1]
            bias = attention.compute_bias(length, length, device=hidden.device)
            given.put("position_bias", bias.contiguous())
        if given.get("encoder_decoder_position_bias") is None:
            given.put("encoder_decoder_position_bias", hidden.new_zeros(1, 1, 1, 1))
        return super().forward(*given.args, **given.kwargs)

    def _self_attention(self) -> Any:
        return self.layer[0].SelfAttention

    def _holds_nothing(self, cache: Any) -> bool:
        return cache is None or (
            Prefill.takes(cache, self)
            and cache.get_seq_length(self._self_attention().layer_idx) == 0
        )


@row(
    "pix2struct",
    "Pix2Struct",
    "TextBlock",
    "TextAttention TextLayerSelfAttention TextLayerCrossAttention TextLayerFF LayerNorm "
    "TextDenseGatedActDense",
)
class Pix2StructTextBlock(T5Block):
    """The decoder."""

    self_attention: Any

    def _self_attention(self) -> Any:
        return self.self_attention.attention
