"""Detectors whose attention reads a few points of each feature map: Deformable DETR and its kin.

The encoder's layers run on the pixels that are not padding. What is sampled stays a padded picture,
whose padding is 0 in the stock models too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask
from mmfast.integrations._deformable import deformable, why_not
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import remembered
from mmfast.integrations._packing import Arguments, PackedLayer, layout_of
from mmfast.integrations.adapters.bert_like import row
from mmfast.integrations.registry import Adapter
from mmfast.ops._autograd import in_eager


def keys_of(mask: Any, valid: bool) -> Tensor | None:
    """A bool mask `[B, S]` as `[B, 1, 1, S]`, True = valid: one tensor for all layers.

    `valid`: what the mask has for a valid pixel.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
        return None
    return remembered(
        mask, ("keys", valid), lambda: (mask.clone() if valid else ~mask)[:, None, None, :]
    )


@row("deformable_detr", "DeformableDetr", "MultiscaleDeformableAttention", "attention")
@row("rt_detr", "RTDetr", "MultiscaleDeformableAttention", "attention")
@row("grounding_dino", "GroundingDino", "MultiscaleDeformableAttention", "attention")
@row("mm_grounding_dino", "MMGroundingDino", "MultiscaleDeformableAttention", "attention")
@row("omdet_turbo", "OmDetTurbo", "MultiscaleDeformableAttention", "attention")
class DeformableAttention(Adapter):
    """Samples by `deformable`; on a CPU in float32 or float64, and in eager mode."""

    sampling_offsets: nn.Linear
    attention_weights: nn.Linear
    value_proj: nn.Linear
    output_proj: nn.Linear
    n_heads: int
    n_levels: int
    n_points: int

    valid: ClassVar[bool] = True
    """What the mask of keys has for a pixel that is not padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`[B, N, C]` -> `([B, N, C], [B, N, H, L, P])`, as the stock class."""
        given = Arguments(self, args, kwargs)
        hidden, context = given.get("hidden_states"), given.get("encoder_hidden_states")
        shapes, mask = given.get("spatial_shapes_list"), given.get("attention_mask")
        reference = given.get("reference_points")
        packed = isinstance(mask, PackedMask)
        if not packed and not self._takes(hidden, context, shapes, reference):
            return super().forward(*args, **kwargs)
        position = given.get("position_embeddings")
        if position is not None:
            hidden = hidden + position
        rows = hidden.shape[:2]
        values, items = self._values(context, mask, rows)
        points = (self.n_heads, self.n_levels, self.n_points)
        weights = self.attention_weights(hidden).unflatten(-1, (self.n_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, points[1:])
        out = deformable(
            values,
            shapes,
            reference.expand(*rows, *reference.shape[2:]).flatten(0, 1),
            self.sampling_offsets(hidden).unflatten(-1, (*points, 2)).flatten(0, 1),
            weights.flatten(0, 1),
            items,
        )
        return self.output_proj(out.view(*rows, -1)), weights

    def _takes(self, hidden: Any, context: Any, shapes: Any, reference: Any) -> bool:
        if torch.compiler.is_compiling() or not in_eager() or torch.is_autocast_enabled("cpu"):
            return False
        if not isinstance(hidden, Tensor) or not isinstance(context, Tensor):
            return False
        if not isinstance(shapes, Sequence) or not isinstance(reference, Tensor):
            return False
        if sum(height * width for height, width in shapes) != context.shape[1]:
            return False  # the stock class says what is wrong
        return (
            reference.shape[-1] in (2, 4) and why_not(hidden) is None and why_not(context) is None
        )

    def _values(
        self, context: Tensor, mask: Tensor | PackedMask | None, rows: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """What is sampled `[B, S, H, D]`, 0 in padding, and the item of each query."""
        layout: Layout | None
        if isinstance(mask, PackedMask):
            layout = mask.kv
            assert layout is not None
            values = self.value_proj(context)
            items = (layout.index // layout.length).to(torch.int32)
        else:
            layout = layout_of(self, keys_of(mask, self.valid), context, work=context.shape[2] ** 2)
            values = self.value_proj(context if layout is None else layout.pack(context))
            items = torch.arange(rows[0], dtype=torch.int32).repeat_interleave(rows[1])
        if layout is not None:
            values = layout.padded(values)
        elif mask is not None:
            assert isinstance(mask, Tensor)
            values = values.masked_fill((~mask if self.valid else mask)[..., None], 0.0)
        return values.unflatten(-1, (self.n_heads, -1)), items


_POINTS = "PixelDecoderEncoderMultiscaleDeformableAttention"


@row("mask2former", "Mask2Former", _POINTS, "attention")
@row("oneformer", "OneFormer", _POINTS, "attention")
class MaskedDeformableAttention(DeformableAttention):
    """As `DeformableAttention`; True in the mask is padding."""

    valid = False


# --- layers without padding ----------------------------------------------------------------------


@row("deformable_detr", "DeformableDetr", "EncoderLayer", "layer", "MLP")
class DeformableEncoderLayer(PackedLayer):
    """Its mask is bool `[B, N]`, True = valid; positions and points are those of the pixels."""

    rows = ("spatial_position_embeddings", "reference_points")
    self_attn: nn.Module

    def _packing(self, given: Arguments) -> tuple[Layout, PackedMask] | None:
        if not self._may_pack(given) or not isinstance(self.self_attn, DeformableAttention):
            return None
        hidden = given.get(self.hidden)
        takes = self.self_attn._takes(
            hidden, hidden, given.get("spatial_shapes_list"), given.get("reference_points")
        )
        keys = keys_of(given.get(self.mask), True)
        layout = layout_of(self, keys, hidden) if takes else None
        return None if layout is None else (layout, PackedMask(layout, layout))
