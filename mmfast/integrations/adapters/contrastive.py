"""CLIP and its kin: two towers, or a tower of pictures that a decoder of text reads.

The text of these models is padded, so that its layers leave padding out, also under a causal mask;
in SigLIP 2 the patches are. Nearly all of them find their attention by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._inside import records_attention
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import allowed, readable, remembered
from mmfast.integrations._packing import Arguments, PackedLayer, worthwhile
from mmfast.integrations.registry import Adapter, Kind, adapter

_A = TypeVar("_A", bound=type[nn.Module])


def row(model: str, name: str, kind: Kind, parts: str = "") -> Callable[[_A], _A]:
    """Register a mixin for a class of a model that relies on other classes of its file."""
    where = f"transformers.models.{model}.modeling_{model}.{name}"
    return adapter(where, kind=kind, relies_on=tuple(parts.split()))


# --- layers without padding ----------------------------------------------------------------------


@row("clip", "CLIPEncoderLayer", "layer", "CLIPAttention CLIPMLP")
@row("clipseg", "CLIPSegEncoderLayer", "layer", "CLIPSegAttention CLIPSegMLP")
@row("owlvit", "OwlViTEncoderLayer", "layer", "OwlViTAttention OwlViTMLP")
@row("owlv2", "Owlv2EncoderLayer", "layer", "Owlv2Attention Owlv2MLP")
@row("x_clip", "XCLIPEncoderLayer", "layer", "XCLIPAttention XCLIPMLP")
@row("groupvit", "GroupViTEncoderLayer", "layer", "GroupViTAttention GroupViTMLP")
@row(
    "altclip",
    "AltRobertaLayer",
    "layer",
    "AltRobertaAttention AltRobertaSelfAttention AltRobertaSelfOutput AltRobertaIntermediate "
    "AltRobertaOutput",
)
@row(
    "chinese_clip",
    "ChineseCLIPTextLayer",
    "layer",
    "ChineseCLIPTextAttention ChineseCLIPTextSelfAttention ChineseCLIPTextSelfOutput "
    "ChineseCLIPTextIntermediate ChineseCLIPTextOutput",
)
class TextLayer(PackedLayer):
    """A layer of a text encoder; the same classes read pictures, which have no padding."""


@row(
    "xlm_roberta",
    "XLMRobertaLayer",
    "layer",
    "XLMRobertaAttention XLMRobertaSelfAttention XLMRobertaCrossAttention XLMRobertaSelfOutput "
    "XLMRobertaIntermediate XLMRobertaOutput",
)
class XlmRobertaLayer(PackedLayer):
    """With another stream where it is a decoder."""

    context = "encoder_hidden_states"
    context_mask = "encoder_attention_mask"


@row("kosmos2", "Kosmos2TextBlock", "layer", "KosmosTextAttention Kosmos2TextFFN")
class KosmosBlock(PackedLayer):
    """A decoder's layer, with a picture among its words."""

    context = "encoder_hidden_states"
    context_mask = "encoder_attention_mask"


@row("siglip", "SiglipEncoderLayer", "layer", "SiglipAttention SiglipMLP")
@row("siglip2", "Siglip2EncoderLayer", "layer", "Siglip2Attention Siglip2MLP")
class SiglipLayer(PackedLayer):
    """Keeps the last row of each item too, which the text tower pools, padding or not.

    As a key it counts only where it is a token.
    """

    def _packing(self, given: Arguments) -> tuple[Layout, PackedMask] | None:
        layout = self._layout(given)
        if layout is None:
            return None
        found = layout
        kept = remembered(given.get(self.mask), "last rows", lambda: _with_last_rows(found))
        return kept if worthwhile(self, kept[0], given.get(self.hidden)) else None


def _with_last_rows(layout: Layout) -> tuple[Layout, PackedMask]:
    valid = layout.valid()
    rows = valid.clone()
    rows[:, -1] = True
    more = Layout.of(rows)
    positions = torch.arange(more.max_len, device=rows.device)
    is_key = positions < (more.lens - (rows[:, -1] ^ valid[:, -1]).int())[:, None]
    return more, PackedMask(more, more, kv_mask=is_key[:, None, None])


# --- GIT: the picture is a prefix that sees itself in both directions ----------------------------


@row(
    "git",
    "GitLayer",
    "layer",
    "GitAttention GitSelfAttention GitSelfOutput GitIntermediate GitOutput",
)
class GitLayer(PackedLayer):
    """A layer of the decoder: the tokens of the picture, then the words, which are padded."""

    attention: Any

    def _packing(self, given: Arguments) -> tuple[Layout, PackedMask] | None:
        packing = super()._packing(given)
        if packing is not None or not self._may_pack(given):
            return packing
        mask, hidden = given.get(self.mask), given.get(self.hidden)
        if not isinstance(mask, Tensor) or torch.compiler.is_compiling():
            return None
        packing = _prefix(mask, hidden, self.attention.self.image_patch_tokens)
        return packing if packing and worthwhile(self, packing[0], hidden) else None


def _prefix(mask: Tensor, hidden: Tensor, length: int) -> tuple[Layout, PackedMask] | None:
    """Of a mask `[B, 1, N, N]` by which `length` tokens see one another, and the rest is causal."""
    if tuple(mask.shape) != (hidden.shape[0], 1, hidden.shape[1], hidden.shape[1]):
        return None
    if not readable(mask):
        return None
    return remembered(mask, ("prefix", length), lambda: _read_prefix(mask, length))


def _read_prefix(mask: Tensor, length: int) -> tuple[Layout, PackedMask] | None:
    see = allowed(mask[:, 0])
    valid = see[:, -1]
    pattern = torch.ones_like(see[0]).tril_()
    pattern[:length, :length] = True
    if not valid[:, :length].all() or not torch.equal(see, pattern & valid[:, None]):
        return None
    layout = Layout.of(valid)
    kept = pattern[: layout.max_len, : layout.max_len]
    return layout, PackedMask(layout, layout, kv_mask=kept[None, None])


# --- attention that is written out ---------------------------------------------------------------


@row("git", "GitSelfAttention", "attention")
class GitAttention(Adapter):
    """Self-attention of GIT's decoder."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    attention_head_size: int
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedMask | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, N, C]` -> `([B, N, C], [B, H, N, M] where the model collects weights)`."""
        q, k, v = (
            of(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for of in (self.query, self.key, self.value)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            need_weights=records_attention(),
        )
        return out.flatten(-2), weights


@row("groupvit", "GroupViTAttention", "attention")
class GroupViTAttention(Adapter):
    """Of both towers, and of the groups over what they gather."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    head_dim: int
    scale: float
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedMask | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, N, C]` -> `([B, N, C], [B, H, N, M] where the model collects weights)`."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            of(rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for of, rows in (
                (self.q_proj, hidden_states),
                (self.k_proj, context),
                (self.v_proj, context),
            )
        )
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.scale,
            dropout=self.dropout if self.training else 0.0,
            need_weights=records_attention(),
        )
        return self.out_proj(out.flatten(-2)), weights
