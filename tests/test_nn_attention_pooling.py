"""`mmfast.nn.AttentionPooling` against plain torch, SigLIP's head, and items without tokens."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from nn_helpers import (
    check_autocast,
    check_compiled,
    check_module,
    compare,
    gradients,
    loud,
    transformers_layers,
)
from torch import Tensor

import mmfast.nn.attention_pooling as implementation
from mmfast.nn import AttentionPooling, PackedTokens

B, N, C = 4, 6, 12
LENS = torch.tensor([6, 3, 0, 1])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_queries": 3, "context_dim": 5, "bias": False},
    {"hidden_features": 20},
    {"hidden_features": 20, "num_queries": 2, "activation": "silu"},
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pool(**options: Any) -> AttentionPooling:
    return loud(AttentionPooling(C, 3, **options))


def tokens(module: AttentionPooling, batch: int = B) -> Tensor:
    return torch.randn(batch, N, module.attention.context_dim)


def plain(module: Any, x: Tensor, lens: Tensor | None = None) -> Tensor:
    """Item by item, without padding."""
    attention, found = module.attention, []
    for b, item in enumerate(x):
        item = item if lens is None else item[: int(lens[b])]
        if item.shape[0] == 0:
            found.append(module.queries * 0.0)
            continue
        heads = [
            p(y).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
            for p, y in (
                (attention.q_proj, module.queries),
                (attention.k_proj, item),
                (attention.v_proj, item),
            )
        ]
        q, k, v = heads
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        out = attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
        if module.feed_forward is not None:
            out = out + module.feed_forward(module.norm(out))
        found.append(out)
    out = torch.stack(found)
    return out[:, 0] if module.num_queries is None else out


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant(variant: dict[str, Any]) -> None:
    module = pool(**variant)
    compare(module, lambda m, x: m(x), plain, tokens(module))
    compare(module, lambda m, x: m(x, LENS), lambda m, x: plain(m, x, LENS), tokens(module))


def test_the_head_of_siglip() -> None:
    siglip = transformers_layers("siglip")
    config = siglip.SiglipVisionConfig(hidden_size=C, intermediate_size=20, num_attention_heads=3)
    head = siglip.SiglipMultiheadAttentionPoolingHead(config).eval()
    module = pool(hidden_features=20)

    def theirs(m: AttentionPooling, x: Tensor) -> Tensor:
        attention = m.attention
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        state = {
            "probe": m.queries.unsqueeze(0),
            "attention.in_proj_weight": torch.cat([p.weight for p in parts]),
            "attention.in_proj_bias": torch.cat([p.bias for p in parts]),
            "attention.out_proj.weight": attention.out_proj.weight,
            "attention.out_proj.bias": attention.out_proj.bias,
            "layernorm.weight": m.norm.weight,
            "layernorm.bias": m.norm.bias,
            "mlp.fc1.weight": m.feed_forward.up_proj.weight,
            "mlp.fc1.bias": m.feed_forward.up_proj.bias,
            "mlp.fc2.weight": m.feed_forward.down_proj.weight,
            "mlp.fc2.bias": m.feed_forward.down_proj.bias,
        }
        return torch.func.functional_call(head, state, (x,), strict=True)

    x = tokens(module).requires_grad_()
    torch.testing.assert_close(module(x), theirs(module, x), rtol=1e-4, atol=1e-4)
    got, expected = (gradients(f(module, x), module, x) for f in (lambda m, x: m(x), theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_form_of_ragged_tokens(variant: dict[str, Any]) -> None:
    module = pool(**variant).double()
    x = tokens(module).double()
    padding = torch.arange(N) >= LENS.unsqueeze(1)
    x[padding] = torch.nan
    expected = module(x, LENS, return_importance=True)
    assert (expected.out[2] == 0).all() and (expected.importance[2] == 0).all()
    jagged = torch.nested.nested_tensor(
        [row[:n] for row, n in zip(x, LENS.tolist(), strict=True)], layout=torch.jagged
    )
    shifted, moved = x.roll(2, 1), padding.roll(2, 1)
    for got in (
        module(PackedTokens.from_padded(x, LENS), return_importance=True),
        module(x, padding_mask=padding, return_importance=True),
        module(jagged, return_importance=True),
        module(shifted, padding_mask=moved, return_importance=True),
    ):
        torch.testing.assert_close(got.out, expected.out)
        assert all(g.isfinite().all() for g in gradients(got.out, module))
    torch.testing.assert_close(got.importance, expected.importance.roll(2, 2))
    torch.testing.assert_close(
        expected.importance.sum(-1)[:, 0], (LENS > 0) * float(module.num_queries or 1),
        check_dtype=False,
    )  # fmt: skip
    assert (module(x[:, :0]) == 0).all() and module(x[:0]).shape[0] == 0


def test_errors() -> None:
    module = pool()
    x, lens = tokens(module), LENS
    for match, arguments in (
        ("x has width 5 but the module was made for context_dim=12", {"x": x[..., :5]}),
        ("give lens or padding_mask, not both", {"lens": lens, "padding_mask": x[..., 0] > 0}),
        ("padding_mask has shape", {"padding_mask": x[:, :2, 0] > 0}),
        ("lens must be an integer tensor", {"lens": lens.float()}),
        ("leave lens and padding_mask out", {"x": PackedTokens.from_padded(x), "lens": lens}),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            module(**{"x": x, **arguments})
    with pytest.raises(TypeError, match="padding_mask must be a bool tensor"):
        module(x, padding_mask=torch.zeros(B, N))
    with pytest.raises(ValueError, match="num_queries is 0"):
        AttentionPooling(C, 3, num_queries=0)


def test_module() -> None:
    def make(**factory: Any) -> AttentionPooling:
        return AttentionPooling(C, 3, hidden_features=8, **factory)

    x = torch.randn(B, N, C)
    module = check_module(make, lambda m: m(x))
    check_autocast(module, lambda m, x: m(x, LENS), x)
    check_compiled(pool(), lambda m, x: m(x, LENS), x)


def test_examples() -> None:
    assert doctest.testmod(implementation).failed == 0
