"""What the tests of `mmfast.patch` share: small models and how to call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn_helpers import loud
from torch import Tensor, nn

from mmfast.testing.architectures import _harness, all_architectures


@pytest.fixture(scope="module", name="bert")
def tiny_bert() -> tuple[nn.Module, dict[str, Any]]:
    """Attention chosen by name, layers by class."""
    return _harness.tiny(all_architectures()["bert"])


@pytest.fixture(scope="module", name="lxmert")
def tiny_lxmert() -> tuple[nn.Module, dict[str, Any]]:
    """Attention written out: all by class."""
    return _harness.tiny(all_architectures()["lxmert"])


def stack() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32))
    return loud(nn.ModuleDict({"encoder": encoder, "head": nn.Linear(32, 3)})).eval()


X, PAD = torch.randn(2, 5, 32), torch.arange(5) >= torch.tensor([[5], [3]])


def run(model: Any) -> Tensor:
    return model["encoder"](X, src_key_padding_mask=PAD)[~PAD]


def result(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got, expected, rtol=0.0, atol=2e-5 * float(expected.detach().abs().max())
    )


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def names(report: Any) -> set[str]:
    return {row.name for row in report.swapped}
