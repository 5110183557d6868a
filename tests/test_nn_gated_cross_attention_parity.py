"""`GatedCrossAttentionBlock` on the weights of transformers' mllama and IDEFICS layers.

Where rows see no image transformers' mllama attends to every image instead; there ours passes the
row on unchanged, and only the other rows are compared. IDEFICS is compared in every row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn_helpers import check_parity, loud, transformers_layers
from torch import Tensor
from torch.func import functional_call

from mmfast.nn import GatedCrossAttentionBlock

B, N, IMAGES, TOKENS, E, C, H, HIDDEN = 3, 6, 2, 5, 24, 20, 4, 40
M = IMAGES * TOKENS


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def visible_images() -> Tensor:
    """bool `[B, N, IMAGES]`: text sees the images before it, an item has one, an item has none."""
    sees = torch.zeros(B, N, IMAGES, dtype=torch.bool)
    sees[0, 1:, 0] = sees[0, 3:, 1] = True
    sees[1, 2:, 0] = True
    return sees


def renamed(module: GatedCrossAttentionBlock, names: dict[str, str]) -> dict[str, Tensor]:
    """The parameters of `module` under the names of another library."""
    return {
        names.get(name, name.replace("attention.", "cross_attn.").replace("feed_forward", "mlp")): p
        for name, p in module.named_parameters()
    }


def apply(layer: torch.nn.Module, weights: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    assert {name: p.shape for name, p in weights.items()} == shapes
    return functional_call(layer, weights, args, options)


# --- mllama ------------------------------------------------------------------------------------

MLLAMA = {
    "attn_norm.weight": "input_layernorm.weight",
    "ff_norm.weight": "post_attention_layernorm.weight",
    "attention.out_proj.weight": "cross_attn.o_proj.weight",
    "attn_gate": "cross_attn_attn_gate",
    "ff_gate": "cross_attn_mlp_gate",
}


def mllama(their_attention: str) -> tuple[Any, Any, GatedCrossAttentionBlock]:
    models = transformers_layers("mllama")
    config = models.MllamaTextConfig(
        hidden_size=E, num_attention_heads=H, num_key_value_heads=2, intermediate_size=HIDDEN,
        rms_norm_eps=1e-3, dropout=0.0,
    )  # fmt: skip
    config._attn_implementation = their_attention
    layer = models.MllamaCrossAttentionDecoderLayer(config, layer_idx=0)
    module = GatedCrossAttentionBlock(
        E, H, num_kv_heads=2, qk_norm="rms", hidden_features=HIDDEN, eps=1e-3,
        mask_feed_forward=True, gate_init=0.7,
    )  # fmt: skip
    return models, layer, loud(module)


@pytest.mark.parametrize("their_attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["mask", "segments", "lens"])
def test_mllama(their_attention: str, way: str) -> None:
    models, layer, module = mllama(their_attention)
    sees = visible_images()
    if way == "lens":  # all text of an item sees all of its images
        sees = torch.tensor([2, 1, 0])[:, None, None] > torch.arange(IMAGES)
        sees = sees.expand(B, N, IMAGES)
    float_mask, full_rows = models._prepare_cross_attention_mask(
        sees.float()[..., None], num_vision_tokens=TOKENS, dtype=torch.float32
    )
    some = sees.any(-1)
    assert torch.equal(full_rows[:, 0, :, 0].bool(), some) and not some.all()
    options: dict[str, Tensor | str] = {
        "mask": {"mask": sees.repeat_interleave(TOKENS, 2)[:, None]},
        "segments": {
            "x_segments": sees.sum(-1) - 1,
            "context_segments": torch.arange(M).div(TOKENS, rounding_mode="floor").expand(B, M),
            "segment_rule": "at_most",
        },
        "lens": {"context_lens": sees[:, 0].sum(-1) * TOKENS},
    }[way]

    def mine(module: GatedCrossAttentionBlock, x: Tensor, images: Tensor) -> Tensor:
        out = module(x, images, **options)
        assert torch.equal(out[~some], x[~some])
        return out * some[..., None]

    def theirs(module: GatedCrossAttentionBlock, x: Tensor, images: Tensor) -> Tensor:
        out = apply(
            layer, renamed(module, MLLAMA), x, cross_attention_states=images,
            cross_attention_mask=float_mask, attention_mask=None,
            full_text_row_masked_out_mask=full_rows,
        )  # fmt: skip
        return out * some[..., None]

    check_parity(module, mine, theirs, torch.randn(B, N, E), torch.randn(B, M, E))


def test_mllama_without_a_mask() -> None:
    _, layer, module = mllama("eager")

    def theirs(module: GatedCrossAttentionBlock, x: Tensor, images: Tensor) -> Tensor:
        return apply(
            layer, renamed(module, MLLAMA), x, cross_attention_states=images,
            cross_attention_mask=None, attention_mask=None, full_text_row_masked_out_mask=None,
        )  # fmt: skip

    check_parity(
        module, lambda m, x, y: m(x, y), theirs, torch.randn(B, N, E), torch.randn(B, M, E)
    )


# --- IDEFICS -----------------------------------------------------------------------------------

IDEFICS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ff_norm.weight": "post_attention_layernorm.weight",
    "attention.out_proj.weight": "cross_attn.o_proj.weight",
    "attention.q_norm.weight": "cross_attn.q_layer_norm.weight",
    "attention.k_norm.weight": "cross_attn.k_layer_norm.weight",
    "attn_gate": "alpha_cross_attn",
    "ff_gate": "alpha_dense",
}


@pytest.mark.parametrize("their_attention", ["eager", "sdpa"])
@pytest.mark.parametrize("alpha", ["vector", "float"])
@pytest.mark.parametrize("qk_norm", [None, "rms"])
def test_idefics(their_attention: str, alpha: str, qk_norm: str | None) -> None:
    models = transformers_layers("idefics")
    config = models.IdeficsConfig(
        hidden_size=E, num_attention_heads=H, intermediate_size=HIDDEN, rms_norm_eps=1e-3,
        alpha_type=alpha, alpha_initializer="ones", qk_layer_norms=qk_norm is not None,
        vision_config={"embed_dim": C}, dropout=0.0,
    )  # fmt: skip
    config._attn_implementation = their_attention
    layer = models.IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    module = loud(
        GatedCrossAttentionBlock(
            E, H, context_dim=C, hidden_features=HIDDEN, eps=1e-3, qk_norm=qk_norm,
            gate="vector" if alpha == "vector" else "scalar",
        )
    )  # fmt: skip
    sees = visible_images().repeat_interleave(TOKENS, 2)[:, None]
    some = sees.any(-1)[:, 0]
    float_mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)

    def theirs(module: GatedCrossAttentionBlock, x: Tensor, images: Tensor) -> Tensor:
        weights = renamed(module, IDEFICS)
        if alpha == "vector":
            for name in ("alpha_cross_attn", "alpha_dense"):
                weights[name] = weights[name].view(1, 1, E)
        return apply(
            layer, weights, x, image_hidden_states=images, image_attention_mask=float_mask,
            cross_attention_gate=some.float(),
        )  # fmt: skip

    x, images = torch.randn(B, N, E), torch.randn(B, M, C)
    check_parity(module, lambda m, x, y: m(x, y, mask=sees), theirs, x, images)
    check_parity(module, lambda m, x, y: m(x, y, mask=sees, row_mask=some), theirs, x, images)

    # Rows that see nothing by the gate alone, as IDEFICS allows: its mask lets them see.
    everywhere = torch.zeros_like(float_mask)

    def gate_alone(module: GatedCrossAttentionBlock, x: Tensor, images: Tensor) -> Tensor:
        nonlocal float_mask
        float_mask = everywhere
        return theirs(module, x, images)

    check_parity(module, lambda m, x, y: m(x, y, row_mask=some), gate_alone, x, images)
