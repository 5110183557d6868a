"""Every module of `mmfast.nn` that has Linears, and two models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import multimodal_helpers
import pytest
import torch
from nn_helpers import loud
from torch import Tensor, nn

import mmfast.nn as mm
from mmfast.testing.architectures import _harness, all_architectures

C, CONTEXT, COND = 32, 24, 12
TEXT_LENS, IMAGE_LENS = torch.tensor([5, 3]), torch.tensor([9, 4])
_generator = torch.Generator().manual_seed(11)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


TEXT, IMAGE, MEMORY = _random(2, 5, C), _random(2, 9, CONTEXT), _random(2, 9, C)
VECTOR, COND_VECTOR, IMAGE_VECTOR = _random(2, C), _random(2, COND), _random(2, CONTEXT)
TEXT_PAD = torch.arange(5) >= TEXT_LENS[:, None]
IMAGE_PAD = torch.arange(9) >= IMAGE_LENS[:, None]
STREAMS = {
    name: _random(4, multimodal_helpers.LENGTHS[name], width)
    for name, width in multimodal_helpers.WIDTHS.items()
}


class Case(NamedTuple):
    make: Callable[[], torch.nn.Module]
    call: Callable[[Any], Tensor]
    silent: tuple[str, ...] = ()
    """Linears that the call does not use."""


def _layer(kind: Any, **options: Any) -> Any:
    return kind(C, 4, 48, 0.0, **options)


MODULES: dict[str, Case] = {
    "CrossModalAttention": Case(
        lambda: mm.CrossModalAttention(C, 4, context_dim=CONTEXT, gate="head", qk_norm="rms"),
        lambda m: m(TEXT, IMAGE, context_lens=IMAGE_LENS),
    ),
    # With one query the projections of the context would be absorbed: read, not called.
    "CrossModalAttention, one query": Case(
        lambda: mm.CrossModalAttention(C, 4, context_dim=CONTEXT),
        lambda m: m(TEXT[:, :1], IMAGE, context_lens=IMAGE_LENS),
    ),
    "AttentionPooling": Case(
        lambda: mm.AttentionPooling(C, 4, context_dim=CONTEXT, hidden_features=40),
        lambda m: m(IMAGE, IMAGE_LENS),
    ),
    "GatedCrossAttentionBlock": Case(
        lambda: mm.GatedCrossAttentionBlock(C, 4, context_dim=CONTEXT, gate_init=0.7),
        lambda m: m(TEXT, IMAGE, context_lens=IMAGE_LENS, x_lens=TEXT_LENS),
    ),
    "CrossModalEncoder": Case(
        lambda: mm.CrossModalEncoder(
            _layer(mm.CrossModalEncoderLayer, activation="swiglu", gate="scalar"), 2
        ),
        lambda m: m(TEXT, MEMORY, memory_lens=IMAGE_LENS, tgt_lens=TEXT_LENS),
    ),
    "TransformerEncoder": Case(
        lambda: mm.TransformerEncoder(_layer(mm.TransformerEncoderLayer, batch_first=True), 2),
        lambda m: m(TEXT, src_key_padding_mask=TEXT_PAD),
    ),
    "TransformerDecoder": Case(
        lambda: mm.TransformerDecoder(_layer(mm.TransformerDecoderLayer, batch_first=True), 2),
        lambda m: m(TEXT, MEMORY, tgt_key_padding_mask=TEXT_PAD, memory_key_padding_mask=IMAGE_PAD),
    ),
    "GatedMLP": Case(lambda: mm.GatedMLP(C, 48), lambda m: m(TEXT)),
    "GatedFusion": Case(
        lambda: mm.GatedFusion([C, COND, CONTEXT], 16),
        lambda m: m([VECTOR, COND_VECTOR, IMAGE_VECTOR]),
    ),
    "GatedFusion, one missing": Case(
        lambda: mm.GatedFusion([C, COND, CONTEXT], 16),
        lambda m: m([VECTOR, None, IMAGE_VECTOR]),
        silent=("projs.1",),
    ),
    "AdaptationGate": Case(
        lambda: mm.AdaptationGate(C, [COND, CONTEXT]),
        lambda m: m(VECTOR, [COND_VECTOR, IMAGE_VECTOR]),
    ),
    "FiLM": Case(lambda: mm.FiLM(COND, C), lambda m: m(TEXT, COND_VECTOR)),
    "AdaLayerNorm": Case(lambda: mm.AdaLayerNorm(C, COND), lambda m: m(TEXT, COND_VECTOR)),
    "MultimodalTransformer": Case(
        multimodal_helpers.make,
        lambda m: multimodal_helpers.features(m, *STREAMS.values(), lens=multimodal_helpers.LENS),
    ),
}

MODELS = ("bert", "lxmert")  # attention chosen by name; attention written out


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return loud(case.make()).eval()


@pytest.fixture(params=MODELS, scope="module", name="model")
def stock_model(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    """A stock model of transformers, and how to call it."""
    case = all_architectures()[request.param]
    stock, inputs = _harness.tiny(case)

    def call(model: nn.Module) -> Tensor:
        outputs = case.outputs(model(**inputs), inputs)
        return torch.cat([value.flatten() for value in outputs.values()])

    return stock, call


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance * max(scale, 1.0))
