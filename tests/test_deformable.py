"""Deformable attention by a table of pixels against `F.grid_sample`; weights on demand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mmfast
from mmfast.integrations import _deformable
from mmfast.testing.architectures import _harness, all_architectures

SHAPES = [(5, 7), (3, 4), (1, 2)]
B, N, H, D, P = 2, 6, 3, 4, 2


def by_grid_sample(
    values: Tensor, reference: Tensor, offsets: Tensor, weights: Tensor, boxes: bool
) -> Tensor:
    """`[B, N, H, D]`, as the models have it."""
    sizes = offsets.new_tensor([(width, height) for height, width in SHAPES])[:, None, :]
    if boxes:
        moved = offsets / P * reference[:, :, None, :, None, 2:] * 0.5
    else:
        moved = offsets / sizes
    at = reference[:, :, None, :, None, :2] + moved
    out: Any = 0.0
    parts = values.split([height * width for height, width in SHAPES], 1)
    for level, ((height, width), part) in enumerate(zip(SHAPES, parts, strict=True)):
        picture = part.permute(0, 2, 3, 1).reshape(B * H, D, height, width)
        grid = 2 * at[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        read = F.grid_sample(picture, grid, align_corners=False)  # [B * H, D, N, P]
        share = weights[:, :, :, level].transpose(1, 2).reshape(B * H, 1, N, P)
        out = out + (read * share).sum(-1)
    return out.view(B, H, D, N).permute(0, 3, 1, 2)


def inputs(boxes: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    L = len(SHAPES)
    values = draw(B, sum(h * w for h, w in SHAPES), H, D) - 0.5
    reference = draw(B, N, 1 if boxes else L, 4 if boxes else 2) * 1.4 - 0.2  # some outside
    offsets = 6 * (draw(B, N, H, L, P, 2) - 0.5)
    return [x.requires_grad_() for x in (values, reference, offsets, draw(B, N, H, L, P))]


def ours(values: Tensor, reference: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    items = torch.arange(B, dtype=torch.int32).repeat_interleave(N)
    rows = (x.flatten(0, 1) for x in (reference, offsets, weights))
    return _deformable.deformable(values, SHAPES, *rows, items).view(B, N, H, D)


@pytest.mark.parametrize("boxes", [False, True])
def test_it_is_grid_sample(boxes: bool) -> None:
    """Values and all gradients, with points outside of the maps."""
    given = inputs(boxes)
    expected, got = by_grid_sample(*given, boxes), ours(*given)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(expected)
    right = torch.autograd.grad((expected * weight).sum(), given)
    torch.testing.assert_close(
        torch.autograd.grad((got * weight).sum(), given), right, atol=1e-11, rtol=1e-11
    )


def test_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient, rows are done some at a time."""
    given = [x.detach() for x in inputs(False)]
    whole = ours(*given)
    monkeypatch.setattr(_deformable, "_ROWS", 5)
    torch.testing.assert_close(ours(*given), whole, atol=1e-14, rtol=0)


def test_what_it_does_not_take() -> None:
    """Half precision, and values whose indices the dtype of the coordinates cannot hold."""
    assert _deformable.why_not(torch.zeros(1, 2, 3, 4)) is None
    assert "float16" in (_deformable.why_not(torch.zeros(1, 2, 3, 4).half()) or "")
    huge = torch.zeros(1).expand(1, 2**22, 2, 4)
    assert "too many" in (_deformable.why_not(huge) or "")


@pytest.mark.parametrize("model_type", ["grounding_dino", "table_transformer", "dab_detr", "sam"])
def test_weights_where_asked_for(model_type: str) -> None:
    """`output_attentions=True` gives what the stock model gives, rows of padding left out."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    case = all_architectures()[model_type]
    stock, fed = _harness.tiny(case)
    if model_type == "sam":
        stock.set_attn_implementation("eager")  # type: ignore[operator]
    model = copy.deepcopy(stock)
    mmfast.patch(model)
    with torch.no_grad(), _harness.counted():
        expected = stock(**fed, output_attentions=True)
        got = model(**fed, output_attentions=True)
    compared = 0
    for name in (name for name in expected if "attentions" in name):
        pairs = zip(tensors(got[name]), tensors(expected[name]), strict=True)
        for index, (mine, theirs) in enumerate(pairs):
            assert mine.shape == theirs.shape, (name, index)
            off = (mine - theirs).abs()
            # Grounding DINO's are computed afterwards, from rows of which padding is 0.
            close = off.median() if model_type == "grounding_dino" else off.max()
            assert float(close) < 1e-4, (name, index)
            compared += 1
    assert compared > 0


def tensors(of: Any) -> list[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(of, Tensor):
        return [of]
    return [tensor for item in of or () for tensor in tensors(item)]
