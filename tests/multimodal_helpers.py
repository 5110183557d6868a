"""A small `MultimodalTransformer`, and the same model item by item in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nn_helpers import loud
from torch import Tensor
from torch.nn import Linear, Module
from torch.utils import _pytree as pytree

from mmfast.nn import MultimodalOutput, MultimodalTransformer

WIDTHS = {"image": 6, "text": 5, "audio": 7}
LENGTHS = {"image": 5, "text": 3, "audio": 4}
B, D = 4, 16
# Item 0 has everything, item 1 lacks text, item 2 has nothing but sound, item 3 has nothing.
LENS = {
    "image": torch.tensor([5, 2, 0, 0]),
    "text": torch.tensor([3, 0, 0, 0]),
    "audio": torch.tensor([1, 4, 3, 0]),
}


def make(**options: Any) -> MultimodalTransformer:
    settings: dict[str, Any] = {
        "encoders": {"image": Linear(6, 6), "text": None, "audio": None},
        "widths": WIDTHS,
        "d_model": D,
        "nhead": 2,
        "num_layers": 2,
        "dim_feedforward": 24,
        "heads": {"label": 3, "score": 1},
        "losses": {"score": "mse"},
    }
    settings |= options
    if settings.get("pattern") == "to_anchor":
        settings.setdefault("anchor", "text")
    model = MultimodalTransformer(**settings)
    with torch.no_grad():
        return loud(model).eval()


def batch(batch: int = B, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: torch.randn(batch, LENGTHS[name], width, dtype=dtype)
        for name, width in WIDTHS.items()
    }


def targets(batch: int = B) -> dict[str, Tensor]:
    return {"label": torch.arange(batch) % 3, "score": torch.linspace(-1.0, 1.0, batch)}


def features(model: MultimodalTransformer, *xs: Tensor, **options: Any) -> Tensor:
    out = model(dict(zip(WIDTHS, xs, strict=False)), **options)
    assert isinstance(out, MultimodalOutput)
    return torch.cat([out.features, *out.logits.values()], dim=1)


def exactly(**options: Any) -> tuple[MultimodalTransformer, dict[str, Tensor]]:
    """A model and a batch in float64: two ways to one result differ by its rounding alone."""
    return make(**options).double(), batch(dtype=torch.float64)


def same(a: Any, b: Any, tolerance: float | None = None) -> None:
    exact = all(t.dtype != torch.float32 for t in pytree.tree_leaves((a, b)))
    tolerance = tolerance or (1e-9 if exact else 2e-5)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


# --- plain torch -------------------------------------------------------------------------------


def attend(x: Tensor, context: Tensor, weights: Any, heads: int) -> tuple[Tensor, Tensor]:
    """`[N, C]`, `[M, C]` -> `[N, C]` and the probabilities `[heads, N, M]`."""
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = weights
    q, k, v = (
        F.linear(t, w, b).unflatten(-1, (heads, -1)).transpose(0, 1)
        for t, w, b in ((x, wq, bq), (context, wk, bk), (context, wv, bv))
    )
    probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return F.linear((probabilities @ v).transpose(0, 1).flatten(1), wo, bo), probabilities


def mha_weights(attention: Any) -> Any:
    rows = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    return *zip(*rows, strict=True), (attention.out_proj.weight, attention.out_proj.bias)


def layer_of_one_item(layer: Any, x: Tensor, memory: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    found = []

    def attention(module: Any, h: Tensor, context: Tensor) -> Tensor:
        if context.shape[0] == 0:
            return torch.zeros_like(h)
        out, probabilities = attend(h, context, mha_weights(module), module.num_heads)
        found.append(probabilities)
        return out

    branches = [lambda h: attention(layer.self_attn, h, h)]
    if layer.multihead_attn is not None:
        none = x.new_zeros(0, x.shape[1])
        branches.append(
            lambda h: attention(layer.multihead_attn, h, none if memory is None else memory)
        )
    branches.append(lambda h: layer.linear2(F.gelu(layer.linear1(h))))
    for i, branch in enumerate(branches, 1):
        norm = getattr(layer, f"norm{i}")
        x = x + branch(norm(x)) if layer.norm_first else norm(x + branch(x))
    return x, found


def plain(
    model: Any, inputs: dict[str, Tensor], lens: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, list[dict[str, list[Tensor]]]]:
    """Features, weights of the modalities, and of each item stream -> probabilities by layer."""
    names, found, features, weights = list(model.modalities), [], [], []
    pattern, anchor = model.layers.pattern, model.layers.anchor
    for b in range(next(iter(inputs.values())).shape[0]):
        streams: dict[str, Tensor] = {}
        for name in names:
            if name not in inputs:
                continue
            tokens = model.encoders[name](inputs[name][b])
            tokens = tokens[: None if lens is None or name not in lens else int(lens[name][b])]
            if tokens.shape[0] > 0:
                align = model.alignments[name]
                streams[name] = align.norm(align.proj(tokens)) + align.type_embedding
        maps: dict[str, list[Tensor]] = {name: [] for name in names}
        shared = model.layers.bottlenecks
        for depth, layers in enumerate(model.layers.layers):
            together, after, updates = depth >= model.layers.fusion_layer, {}, []
            for name, x in streams.items():
                if together and pattern == "bottleneck":
                    both, seen = layer_of_one_item(layers[name], torch.cat([shared, x]), None)
                    updates.append(both[: len(shared)])
                    after[name] = both[len(shared) :]
                    maps[name].append(seen[0])
                    continue
                others = [t for other, t in streams.items() if other != name]
                sees = together and others and (pattern == "all_to_all" or name == anchor)
                memory = torch.cat(others) if sees else None
                after[name], seen = layer_of_one_item(layers[name], x, memory)
                if sees:
                    maps[name].append(seen[1])
            streams = after
            if updates:
                shared = torch.stack(updates).mean(0)
        pooled, zero = [], torch.zeros(model.d_model, dtype=next(model.parameters()).dtype)
        for name in names:
            pooled.append(pool_of_one_item(model, name, streams[name]) if name in streams else zero)
        present = torch.tensor([[name in streams for name in names]])
        fused = model.fusion([p.unsqueeze(0) for p in pooled], present, return_weights=True)
        features.append(fused.out[0])
        weights.append(fused.weights[0])
        found.append(maps)
    return torch.stack(features), torch.stack(weights), found


def pool_of_one_item(model: Any, name: str, x: Tensor) -> Tensor:
    x = model.norms[name](x) if len(model.norms) else x
    if model.pooling != "attention":
        return x.mean(0) if model.pooling == "mean" else x[0]
    attention = model.pools[name].attention
    parts: list[Module] = [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj,
    ]  # fmt: skip
    weights = [(part.weight, part.bias) for part in parts]
    return attend(model.pools[name].queries, x, weights, attention.num_heads)[0][0]
