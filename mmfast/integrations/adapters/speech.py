"""Speech with relative positions in the scores: SpeechT5, and the conformer of SeamlessM4T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import recognised
from mmfast.integrations._packing import PackedLayer, layout_of
from mmfast.integrations.adapters.encoder_decoder import row
from mmfast.integrations.registry import Adapter
from mmfast.nn._tokens import take_rows


@row("speecht5", "SpeechT5", "Attention", "RelativePositionalEncoding", kind="attention")
class Attention(Adapter):
    """Self- and cross-attention, with and without a cache."""

    _mmfast_every_row = True
    """Of spectrograms: the decoder's postnet mixes neighbouring rows."""
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    head_dim: int
    scaling: float
    dropout: float
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | PackedMask | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock class."""
        query = self._heads(self.q_proj(hidden_states))
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        bias = None
        if position_bias is not None:
            padded = query
            if isinstance(attention_mask, PackedMask) and attention_mask.q is not None:
                padded = _unpacked_heads(query, attention_mask.q)
            bias = _of_distances(padded * self.scaling, _distances(position_bias))
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            position_bias=bias,
            need_weights=bool(output_attentions),
        )
        return self.out_proj(out.flatten(2)), weights

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(
        self, hidden_states: Tensor, key_value_states: Tensor | None, past_key_values: Any
    ) -> tuple[Tensor, Tensor]:
        cross = key_value_states is not None
        cache, pair = past_key_values, hasattr(past_key_values, "is_updated")
        if pair:
            cache = past_key_values.cross_attention_cache if cross else cache.self_attention_cache
            if cross and past_key_values.is_updated.get(self.layer_idx):
                layer = cache.layers[self.layer_idx]
                return layer.keys, layer.values
        rows = hidden_states if key_value_states is None else key_value_states
        key, value = self._heads(self.k_proj(rows)), self._heads(self.v_proj(rows))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if cross and pair:
                past_key_values.is_updated[self.layer_idx] = True
        return key, value


def _distances(position: Tensor) -> Tensor:
    """`p[N - 1], ..., p[0], ..., p[-(N - 1)]` `[2 N - 1, D]` of position[i, j] = p[i - j]."""
    return torch.cat([position[1:, 0].flip(0), position[0]])


def _of_distances(query: Tensor, distances: Tensor) -> Tensor:
    """`query[b, h, i] . distances[N - 1 - i + j]`, `[B, H, N, N]`.

    All queries meet all distances `[2 N - 1, D]` or `[H, 2 N - 1, D]` in one product, and row i is
    read from distance i to distance i - N + 1: 2 N - 2 further on in memory than row i - 1. (The
    stock SpeechT5 multiplies each row with a matrix of its own; the stock conformer copies.)
    """
    length = query.shape[2]
    scores = (query @ distances.transpose(-2, -1)).flatten(2)
    rows = scores[..., length - 1 : length - 1 + length * max(1, 2 * length - 2)]
    return rows.unflatten(2, (length, -1))[..., :length]


def _unpacked_heads(heads: Tensor, layout: Layout) -> Tensor:
    """`[1, H, T, D]` -> `[B, H, N, D]` with zeros in padding."""
    return layout.padded(heads.transpose(1, 2)).transpose(1, 2)


@row("speecht5", "SpeechT5", "EncoderLayer", "Attention FeedForward RelativePositionalEncoding")
class EncoderLayer(PackedLayer):
    """Text or frames of speech.

    The decoder's layers keep their padding: of spectrograms, the convolutions behind them
    (`SpeechT5SpeechDecoderPostnet`) reach into it.
    """

    holes = False


@row(
    "seamless_m4t",
    "SeamlessM4T",
    "ConformerEncoderLayer",
    "ConformerSelfAttention ConformerFeedForward ConformerConvolutionModule ConformerAdapterLayer",
)
class ConformerLayer(Adapter):
    """Feed-forward, attention with relative positions, convolution over time, feed-forward.

    Only the depthwise convolution sees padding. The adapter behind the encoder pools frames and
    reaches a few rows into the padding, which are computed like the others, but are not keys.
    """

    ffn1: nn.Module
    ffn1_layer_norm: nn.Module
    ffn2: nn.Module
    ffn2_layer_norm: nn.Module
    final_layer_norm: nn.Module
    self_attn: Any
    self_attn_layer_norm: nn.Module
    self_attn_dropout: nn.Module
    conv_module: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        conv_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock class, without padding."""
        frames = self._frames(hidden_states, attention_mask, conv_attention_mask)
        if frames is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                relative_position_embeddings=relative_position_embeddings,
                conv_attention_mask=conv_attention_mask,
                **kwargs,
            )
        x = frames.rows.pack(hidden_states)
        x = self.ffn1(self.ffn1_layer_norm(x)) * 0.5 + x
        attended = self._attention(
            self.self_attn_layer_norm(x), frames, relative_position_embeddings
        )
        x = self.self_attn_dropout(attended) + x
        x = x + self._convolution(x, frames)
        x = self.ffn2(self.ffn2_layer_norm(x)) * 0.5 + x
        return frames.rows.unpack(self.final_layer_norm(x))

    def _frames(self, hidden: Tensor, mask: Any, conv_mask: Any) -> _Frames | None:
        attention, config = self.self_attn, self.self_attn.config
        if torch.compiler.is_compiling() or not isinstance(conv_mask, Tensor):
            return None
        # In training the batch norm counts padding as well.
        if self.conv_module.batch_norm.training or attention.position_embeddings_type == "rotary":
            return None
        if config.add_adapter and config.num_adapter_layers != 1:
            return None
        keys = layout_of(self, mask, hidden, work=23 * hidden.shape[2] ** 2)
        pattern = None if keys is None else recognised(mask)
        if keys is None or pattern is None or keys.holes or pattern.causal:
            return None
        more = 2 * (config.adaptor_kernel_size // 2) - config.adaptor_stride // 2
        more = max(0, more) if config.add_adapter else 0
        frames: _Frames | None = getattr(keys, "_mmfast_frames", None)
        if frames is None or frames.more != more:
            frames = _Frames(keys, more)
            keys._mmfast_frames = frames  # type: ignore[attr-defined]
        return frames

    def _attention(self, x: Tensor, frames: _Frames, positions: Tensor | None) -> Tensor:
        attention = self.self_attn

        def heads(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (-1, attention.head_size)).transpose(1, 2)

        query, of_keys = heads(attention.linear_q(x)), frames.keys_of(x)
        key, value = heads(attention.linear_k(of_keys)), heads(attention.linear_v(of_keys))
        bias = None
        if attention.position_embeddings_type == "relative":
            distances = heads(attention.linear_pos(positions)).squeeze(0)
            padded = _unpacked_heads(query, frames.rows) + attention.pos_bias_v[:, None]
            bias = _of_distances(padded * attention.scaling, distances)
            query = query + attention.pos_bias_u[:, None]
        out, _ = attend(
            attention,
            query,
            key,
            value,
            PackedMask(frames.rows, frames.keys),
            scaling=attention.scaling,
            dropout=attention.dropout.p if self.training else 0.0,
            position_bias=bias,
        )
        return attention.linear_out(out.flatten(2))

    def _convolution(self, x: Tensor, frames: _Frames) -> Tensor:
        conv = self.conv_module
        x = conv.layer_norm(frames.keys_of(x))
        x = conv.glu(conv.pointwise_conv1(x.transpose(1, 2))).transpose(1, 2)
        x = conv.depthwise_conv(frames.keys.padded(x).transpose(1, 2))
        x = frames.rows.pack(x.transpose(1, 2)).transpose(1, 2)
        x = conv.activation(conv.batch_norm(x))
        return conv.dropout(conv.pointwise_conv2(x)).transpose(1, 2)


class _Frames:
    """Rows that are computed, and the keys among them."""

    def __init__(self, keys: Layout, more: int) -> None:
        self.keys, self.more = keys, more
        place = torch.arange(keys.length, device=keys.index.device)
        computed = place < keys.lens[:, None] + more
        self.rows = Layout.of(computed) if more else keys
        self._among = keys.valid()[computed].nonzero().squeeze(1) if more else None

    def keys_of(self, rows: Tensor) -> Tensor:
        """`[1, T + more, C]` -> `[1, T, C]`"""
        if self._among is None:
            return rows
        return take_rows(rows.squeeze(0), self._among).unsqueeze(0)
