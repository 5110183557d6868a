"""`MultimodalTransformer`: what it cannot use, in words; losses of items without targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from multimodal_helpers import WIDTHS, B, batch, make, targets
from torch import Tensor
from torch.nn import Linear, Module

from mmfast.nn import MultimodalTransformer, PackedTokens

NONE = dict.fromkeys(WIDTHS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Gives(Module):
    """An encoder that gives what it was made with."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Any) -> Any:
        return self.what


CONSTRUCTOR: list[tuple[dict[str, Any], str]] = [
    ({"encoders": {}}, "encoders must be a mapping with at least one modality"),
    ({"encoders": {"image": None}}, r"encoders has \['image'\] and widths"),
    ({"encoders": {**NONE, "image": len}}, r"encoders\['image'\] must be a torch.nn.Module or"),
    ({"encoders": {"a.b": None}, "widths": {"a.b": 3}}, "'a.b', which cannot be the name of a"),
    ({"encoders": {"items": None}, "widths": {"items": 3}}, "'items', which cannot be the name"),
    ({"heads": {"a.b": 2}, "losses": {}}, "heads has the name 'a.b'"),
    ({"widths": {**WIDTHS, "text": 0}}, r"widths\['text'\] is 0"),
    ({"num_layers": 0}, "num_layers is 0"),
    ({"nhead": 3}, "not a multiple of n"),
    ({"pattern": "star"}, "pattern is 'star'; it must be 'all_to_all', 'to_anchor' or 'bottlenec"),
    ({"pattern": "to_anchor", "anchor": None}, "anchor is None; pattern 'to_anchor' needs one of"),
    ({"anchor": "text"}, "anchor is 'text' with pattern 'all_to_all'"),
    ({"pattern": "bottleneck", "encoders": {"bottleneck": None}, "widths": {"bottleneck": 3}},
     "a modality is called 'bottleneck'"),
    ({"fusion_layer": 3}, r"fusion_layer is 3; expected 0 .* to num_layers=2"),
    ({"pooling": "max"}, "pooling is 'max'"),
    ({"fusion": "mean"}, "mode is 'mean'"),
    ({"heads": {"label": 0}, "losses": {}}, r"heads\['label'\] is 0; give its number of outputs"),
    ({"losses": {"label": "nll"}}, r"losses\['label'\] is 'nll'; it must be 'cross_entropy'"),
    ({"losses": {"other": "mse"}}, r"losses has 'other', but the heads are \['label', 'score'\]"),
    ({"loss_weights": {"other": 1.0}}, "loss_weights has 'other'"),
    ({"modality_dropout": 1.0}, r"modality_dropout\['image'\] is 1.0"),
    ({"modality_dropout": {"smell": 0.5}}, "modality_dropout has 'smell', but modalities are"),
    ({"frozen": ["smell"]}, "frozen has 'smell'"),
    ({"encoder_specs": {"smell": {}}}, "encoder_specs has 'smell'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "match"), CONSTRUCTOR, ids=lambda x: str(x)[:40])
def test_constructor(options: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make(**options)


X = torch.randn(B, 5, 6)
FORWARD: list[tuple[dict[str, Any], str]] = [
    ({"inputs": X}, "inputs must be a mapping from modalities to values, got Tensor"),
    ({"inputs": {"smell": X}}, r"inputs has 'smell', but modalities are \['image', 'text', 'audio"),
    ({"inputs": {}}, "the number of items is unknown"),
    ({"lens": {"smell": X}}, "lens has 'smell'"),
    ({"lens": X}, "lens must be a mapping"),
    ({"image": X[:2]}, r"number of items differs: inputs\['image'\] 2, inputs\['text'\] 4"),
    ({"image": X[..., :5]}, r"tokens of width 5 \(\[4, 5, 5\]\) but widths\['image'\] is 6"),
    ({"image": X.long()}, "gave torch.int64; expected floating-point tokens"),
    ({"image": X.view(4, 5, 3, 2)}, r"flatten a feature map with x\.flatten\(2\)"),
    ({"image": "abcd"}, "gave a str; expected tokens"),
    ({"image": [X[0], X[0, 0]] * 2}, r"a list whose item 1 is \[6\]; expected tensors \[tokens, 6"),
    ({"lens": {"image": torch.tensor([5, 6, 0, 0])}}, "holds 6, allowed are 0 to 5"),
    ({"lens": {"image": torch.tensor([-1, 6, 0, 0])}}, "holds -1, allowed are 0 to 5"),
    ({"lens": {"image": torch.ones(B)}}, "must be an integer tensor"),
    ({"lens": {"image": torch.ones(3).long()}}, "number of items differs"),
    ({"image": PackedTokens.from_padded(X), "lens": {"image": torch.ones(B).long()}},
     "packed and know their lengths"),
    ({"present": [[True] * 3] * B}, "present must be a bool tensor"),
    ({"present": torch.ones(B, 2).bool()}, r"is torch.bool \[4, 2\], expected bool \[batch"),
    ({"present": torch.ones(B, 3)}, "present is torch.float32"),
    ({"present": torch.ones(2, 3).bool()}, "number of items differs: .* present 2"),
    ({"present": {"smell": torch.ones(B).bool()}}, "present has 'smell'"),
    ({"present": {"text": torch.ones(B)}}, r"present\['text'\] must be a bool tensor"),
    ({"image": None, "present": torch.ones(B, 3).bool()}, "says that 4 items have 'image', but"),
    ({"targets": X}, "targets must be a mapping"),
    ({"targets": {}}, "targets is empty"),
    ({"targets": {"smell": X}}, r"targets has 'smell', but the heads are \['label', 'score'\]"),
    ({"targets": {"label": [1]}}, r"targets\['label'\] must be a torch.Tensor, got list"),
    ({"targets": {"label": torch.tensor([0, 1, 2, 3])}}, "has 3 classes but its target holds"),
    ({"targets": {"label": torch.zeros(B, 1).long()}}, r"expected class indices \[4\]"),
    ({"targets": {"score": torch.zeros(B, 2)}}, r"\[4, 1\] but its target has shape \[4, 2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), FORWARD, ids=lambda x: str(x)[:40])
def test_forward(change: dict[str, Any], match: str) -> None:
    model, change = make(encoders=NONE), dict(change)
    inputs = {**batch(), "image": change.pop("image", X)}
    with pytest.raises((ValueError, TypeError), match=match):
        model(**{"inputs": inputs, **change})


def test_encoders_that_give_something_else() -> None:
    model = make(encoders={**NONE, "image": Gives(X[:3])})
    with pytest.raises(ValueError, match="the encoder of 'image' gave 3 items for 4"):
        model(batch())
    model = make(modality_dropout=0.5, encoders={**NONE, "image": Gives(X)}).train()
    with pytest.raises(ValueError, match="modality_dropout needs the number of items before"):
        model({"image": "something"})
    with pytest.raises(ValueError, match="has one output, for which cross-entropy is always 0"):
        make(losses={})(batch(), targets=targets())


def test_losses_leave_out_items_without_a_target() -> None:
    heads = {"label": 3, "soft": 3, "yes": 1, "numbers": 2}
    losses = {"yes": "binary_cross_entropy", "numbers": "l1"}
    model, inputs = make(heads=heads, losses=losses), batch()
    whole: dict[str, Tensor] = {
        "label": torch.tensor([0, -100, 2, 1]),
        "soft": torch.rand(B, 3).softmax(1),
        "yes": torch.tensor([1, 0, -100, 1]),
        "numbers": torch.randn(B, 2),
    }
    whole["soft"][1] = torch.nan
    whole["numbers"][2, 0] = torch.nan
    out = model(inputs, targets=whole)
    logits, F = out.logits, torch.nn.functional
    expected = {
        "label": F.cross_entropy(logits["label"], whole["label"]),
        "soft": F.cross_entropy(logits["soft"][[0, 2, 3]], whole["soft"][[0, 2, 3]]),
        "yes": F.binary_cross_entropy_with_logits(
            logits["yes"][[0, 1, 3], 0], whole["yes"][[0, 1, 3]].float()
        ),
        "numbers": (logits["numbers"] - whole["numbers"]).abs().nanmean(),
    }
    torch.testing.assert_close(out.losses, expected)
    grads = torch.autograd.grad(out.loss, list(model.heads.parameters()))
    assert all(g.isfinite().all() for g in grads)
    nothing = {n: torch.full_like(t, -100 if n in ("label", "yes") else torch.nan)
               for n, t in whole.items()}  # fmt: skip
    out = model(inputs, targets=nothing)
    assert out.loss == 0
    assert all(
        (g == 0).all() for g in torch.autograd.grad(out.loss, list(model.heads.parameters()))
    )


def test_a_head_of_ones_own() -> None:
    head = Linear(16, 2)
    model = make(heads={"own": head}, losses={"own": lambda logits, target: logits.sum() * target})
    out = model(batch(), targets={"own": torch.tensor(2.0)})
    torch.testing.assert_close(out.loss, 2.0 * head(out.features).sum())
    assert isinstance(model, MultimodalTransformer)
