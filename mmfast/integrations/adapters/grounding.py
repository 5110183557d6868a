"""Grounding DINO: pictures and text, fused in both directions by every layer of the encoder.

The stock classes compute attention weights whether or not anybody asked for them. Here they are
computed where somebody looks at them, by the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import remembered
from mmfast.integrations._packing import Arguments, layout_of
from mmfast.integrations._weights import in_plain_eager, no_weights, unwanted
from mmfast.integrations.adapters.bert_like import heads, row
from mmfast.integrations.adapters.deformable import DeformableAttention, keys_of
from mmfast.integrations.registry import Adapter
from mmfast.nn._plain import plain_linear


@row("grounding_dino", "GroundingDino", "MultiheadAttention", "attention")
@row("mm_grounding_dino", "MMGroundingDino", "MultiheadAttention", "attention")
@row("omdet_turbo", "OmDetTurbo", "MultiheadAttention", "attention")
class MultiheadAttention(Adapter):
    """Queries over keys, batch first."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out_proj: nn.Linear
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor | None, ...]:
        """`[B, N, C]` over `[B, M, C]` -> `([B, N, C],)`, with the weights if asked for."""
        width = self.attention_head_size
        out, weights = attend(
            self,
            heads(self.query(queries), width),
            heads(self.key(keys), width),
            heads(self.value(values), width),
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            need_weights=bool(output_attentions) and not unwanted(),
        )
        out = self.out_proj(out.flatten(-2))
        return (out, weights) if output_attentions else (out,)


@row("grounding_dino", "GroundingDino", "BiMultiHeadAttention", "attention")
@row("mm_grounding_dino", "MMGroundingDino", "BiMultiHeadAttention", "attention")
class BiMultiHeadAttention(Adapter):
    """Picture over text and text over picture.

    The projections of the picture, which are most of the work, are absorbed into the text: for head
    h, `(v W_h^T + b_h) k_h^T = v (k_h W_h)^T + k_h b_h`, and what the text's values become in the
    picture's output is `(P_h t_h) O_h^T = P_h (t_h O_h^T)`. Text reads the picture's own rows,
    `P_h (v U_h^T + u_h) = (P_h v) U_h^T + u_h`, as both keys and values.
    """

    vision_proj: nn.Linear
    text_proj: nn.Linear
    values_vision_proj: nn.Linear
    values_text_proj: nn.Linear
    out_vision_proj: nn.Linear
    out_text_proj: nn.Linear
    embed_dim: int
    num_heads: int
    head_dim: int
    scale: float
    dropout: float

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | PackedMask | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> Any:
        """`[B, N, C]` and `[B, M, C]` -> `((vision, weights), (text, weights))`; True = padding."""
        vision, text = vision_features, text_features
        if not unwanted():
            return super().forward(vision, text, vision_attention_mask, text_attention_mask)
        words = keys_of(text_attention_mask, False)
        to_words: Any = words
        to_pixels: Any
        if isinstance(vision_attention_mask, PackedMask):
            to_words = PackedMask(vision_attention_mask.q, None, kv_mask=words)
            to_pixels = PackedMask(None, vision_attention_mask.q)
        else:
            to_pixels = keys_of(vision_attention_mask, False)
        fuse = self._absorbed if self._absorbs(vision, text) else self._projected
        of_vision, of_text = fuse(vision, text, to_words, to_pixels)
        return (of_vision, None), (of_text, None)

    def _absorbs(self, vision: Tensor, text: Tensor) -> bool:
        if self.training and self.dropout:
            return False  # the weights of a row do not sum to 1
        linears = (self.vision_proj, self.values_vision_proj, self.out_vision_proj)
        if not all(plain_linear(linear) for linear in linears):
            return False
        # Multiplications for each pixel: wider heads against three projections.
        wider = self.num_heads * vision.shape[-1] - self.embed_dim
        return 4 * text.shape[1] * wider < 3 * vision.shape[-1] * self.embed_dim

    def _projected(
        self, vision: Tensor, text: Tensor, to_words: Any, to_pixels: Any
    ) -> tuple[Tensor, Tensor]:
        pixels, words = self._heads(self.vision_proj(vision)), self._heads(self.text_proj(text))
        dropout = self.dropout if self.training else 0.0

        def over(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
            v = self._heads(v)
            out = attend(self, q, k, v, mask, scaling=self.scale, dropout=dropout)[0]
            return out.flatten(-2)

        of_vision = over(pixels, words, self.values_text_proj(text), to_words)
        of_text = over(words, pixels, self.values_vision_proj(vision), to_pixels)
        return self.out_vision_proj(of_vision), self.out_text_proj(of_text)

    def _absorbed(
        self, vision: Tensor, text: Tensor, to_words: Any, to_pixels: Any
    ) -> tuple[Tensor, Tensor]:
        H, shape = self.num_heads, (self.num_heads, self.head_dim)
        words = self._heads(self.text_proj(text))  # [B, H, M, D]
        keys = words @ self.vision_proj.weight.unflatten(0, shape)  # [B, H, M, C]
        bias = words @ self.vision_proj.bias.view(*shape, 1) * self.scale
        onto = self.out_vision_proj.weight.unflatten(1, shape).permute(1, 2, 0)  # [H, D, C]
        values = self._heads(self.values_text_proj(text)) @ onto
        rows = vision[:, None]
        of_vision = attend(
            self, rows.expand(-1, H, -1, -1), keys, values, to_words,
            scaling=self.scale, position_bias=bias.transpose(2, 3),
        )[0]  # fmt: skip
        of_vision = of_vision.sum(2) + self.out_vision_proj.bias

        # One head of H * M queries: the picture is read once.
        seen = attend(self, keys.flatten(1, 2)[:, None], rows, rows, to_pixels, scaling=self.scale)
        seen_by = seen[0].squeeze(2).unflatten(1, (H, -1))  # [B, H, M, C]
        of_text = seen_by @ self.values_vision_proj.weight.unflatten(0, shape).transpose(1, 2)
        of_text = of_text + self.values_vision_proj.bias.view(H, 1, -1)
        return of_vision, self.out_text_proj(of_text.transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return heads(x, self.head_dim)


@row("grounding_dino", "GroundingDino", "FusionLayer", "gate", "DropPath")
@row("mm_grounding_dino", "MMGroundingDino", "FusionLayer", "gate", "DropPath")
class FusionLayer(Adapter):
    """Each stream plus what the other tells it, channel by channel times a learned gate."""

    layer_norm_vision: nn.LayerNorm
    layer_norm_text: nn.LayerNorm
    attn: nn.Module
    drop_path: nn.Module
    vision_param: nn.Parameter
    text_param: nn.Parameter

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        attention_mask_vision: Tensor | PackedMask | None = None,
        attention_mask_text: Tensor | None = None,
    ) -> Any:
        """`[B, N, C]` and `[B, M, C]` -> `((vision, weights), (text, weights))`; True = padding."""
        vision = self.layer_norm_vision(vision_features)
        text = self.layer_norm_text(text_features)
        (to_vision, vision_weights), (to_text, text_weights) = self.attn(
            vision,
            text,
            vision_attention_mask=attention_mask_vision,
            text_attention_mask=attention_mask_text,
        )
        if self._drops():
            vision = vision + self.drop_path(self.vision_param * to_vision)
            text = text + self.drop_path(self.text_param * to_text)
        else:
            vision = torch.addcmul(vision, self.vision_param, to_vision)
            text = torch.addcmul(text, self.text_param, to_text)
        return (vision, vision_weights), (text, text_weights)

    def _drops(self) -> bool:
        """Whether whole items of the batch may be dropped: packed, they could not be told apart."""
        return self.training and bool(getattr(self.drop_path, "drop_prob", 0.0))


class _OnDemand(Sequence[Any]):
    """Weights of the four attentions of a layer, computed when one of them is looked at."""

    def __init__(self, compute: Callable[[], Sequence[Any]]) -> None:
        self._compute = compute
        self._weights: Sequence[Any] | None = None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        if self._weights is None:
            self._weights = self._compute()
        return self._weights[index]


@row(
    "grounding_dino", "GroundingDino", "EncoderLayer", "layer", "DeformableLayer TextEnhancerLayer"
)
@row(
    "mm_grounding_dino",
    "MMGroundingDino",
    "EncoderLayer",
    "layer",
    "DeformableLayer TextEnhancerLayer",
)
class GroundingEncoderLayer(Adapter):
    """Fuses, then enhances the text, then the picture: the picture's padding is left out.

    The text's is not: it is a hundredth of the rows.
    """

    text_enhancer_layer: nn.Module
    fusion_layer: FusionLayer
    deformable_layer: nn.Module
    get_text_position_embeddings: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class: `((vision, text), four attentions' weights)`."""
        stock = super().forward
        if not in_plain_eager():
            return stock(*args, **kwargs)
        given = Arguments(self, args, kwargs)
        layout = self._layout(given)
        with no_weights():
            if layout is None:
                streams = stock(*args, **kwargs)[0]
            else:
                streams = self._without_padding(given, layout)
        return streams, _OnDemand(lambda: stock(*args, **kwargs)[1])

    def _layout(self, given: Arguments) -> Layout | None:
        attention: Any = self.deformable_layer.self_attn
        inside = (self.fusion_layer, self.fusion_layer.attn, attention)
        if not all(isinstance(module, Adapter) for module in inside) or self.fusion_layer._drops():
            return None
        vision = given.get("vision_features")
        assert isinstance(attention, DeformableAttention)
        reference, shapes = given.get("reference_points"), given.get("spatial_shapes_list")
        if not attention._takes(vision, vision, shapes, reference):
            return None
        return layout_of(self, keys_of(given.get("key_padding_mask"), False), vision)

    def _without_padding(self, given: Arguments, layout: Layout) -> tuple[Tensor, Tensor]:
        text = given.get("text_features")
        position = self.get_text_position_embeddings(
            text, given.get("text_position_embedding"), given.get("text_position_ids")
        )
        mask = PackedMask(layout, layout)
        (vision, _), (text, _) = self.fusion_layer(
            vision_features=layout.pack(given.get("vision_features")),
            text_features=text,
            attention_mask_vision=mask,
            attention_mask_text=given.get("text_attention_mask"),
        )
        text, _ = self.text_enhancer_layer(
            hidden_states=text,
            attention_masks=~given.get("text_self_attention_masks"),
            position_embeddings=position,
        )
        vision, _ = self.deformable_layer(
            hidden_states=vision,
            attention_mask=mask,
            position_embeddings=layout.pack(given.get("vision_position_embedding")),
            reference_points=layout.pack(given.get("reference_points")),
            spatial_shapes=given.get("spatial_shapes"),
            spatial_shapes_list=given.get("spatial_shapes_list"),
            level_start_index=given.get("level_start_index"),
        )
        return layout.unpack(vision), text


@row("grounding_dino", "GroundingDino", "DecoderLayer", "module")
@row("mm_grounding_dino", "MMGroundingDino", "DecoderLayer", "module")
class GroundingDecoderLayer(Adapter):
    """Asks its attentions for weights only where it is asked for them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class."""
        if not in_plain_eager():
            return super().forward(*args, **kwargs)
        given = Arguments(self, args, kwargs)
        mask = given.get("text_encoder_attention_mask")
        if isinstance(mask, Tensor) and not mask.requires_grad:
            given.put("text_encoder_attention_mask", _one_row(mask))
        if given.get("output_attentions"):
            return super().forward(*given.args, **given.kwargs)
        with no_weights():
            return super().forward(*given.args, **given.kwargs)


def _one_row(mask: Tensor) -> Tensor:
    """A mask `[B, H, N, M]` that repeats one row as `[B, 1, 1, M]`, the same for all layers."""

    def read() -> Tensor | None:
        first = mask[:, :1, :1]
        return first.clone() if bool((mask == first).all()) else None

    kept = remembered(mask, "one row", read)
    return mask if kept is None else kept
