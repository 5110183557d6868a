"""Every supported architecture of transformers: patched, it is the model that it was."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
from torch import nn

import mmfast
from mmfast.integrations import fingerprints, registry
from mmfast.testing.architectures import Architecture, _harness, all_architectures

pytest.importorskip("transformers", reason="transformers is not installed")

CASES = all_architectures()


@functools.lru_cache(maxsize=1)
def stock(model_type: str) -> tuple[nn.Module, dict[str, Any], Any, Any, Any]:
    """(model, inputs, truth, what it gives in float32, and nudged) of the unpatched model."""
    case = CASES[model_type]
    model, inputs = _harness.tiny(case)
    truth = _harness.truth_of(case, model, inputs)
    peer = _harness.run(copy.deepcopy(model), inputs, case)
    return model, inputs, truth, peer, _harness.run(_harness.nudged(model), inputs, case)


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Architecture:
    return CASES[request.param]


def test_parity(case: Architecture) -> None:
    """Outputs, gradients of every parameter, packed and padded; kernels called; exact undo."""
    original, inputs, truth, peer, nudged = stock(case.model_type)
    model = copy.deepcopy(original)
    classes = [type(module) for module in model.modules()]
    report = mmfast.patch(model)
    assert list(model.state_dict()) == list(original.state_dict())
    with _harness.counted() as calls:
        got = _harness.run(model, inputs, case)
    _harness.compare("output", got[0], peer[0], truth[0], nudged[0])
    _harness.compare("gradient", got[1], peer[1], truth[1], nudged[1])
    if not any(row.reason.startswith("the source of") for row in report.left):
        assert (calls.attention, calls.packed) == (case.calls, case.packed), report
    with _harness.counted(least_work=1 << 60) as calls:
        padded = _harness.run(model, inputs, case, backward=False)
    assert calls.packed == 0
    _harness.compare("output", padded[0], peer[0], truth[0], nudged[0])
    report.undo()
    assert [type(module) for module in model.modules()] == classes
    with _harness.counted() as calls:
        again = _harness.run(model, inputs, case)
    assert (calls.attention, calls.packed) == (0, 0)
    for name, value in again[0].items():
        assert torch.equal(value, peer[0][name]), name


def test_the_sources_of_this_version_are_known() -> None:
    """Of the versions that the suite is run with, every class is one that its adapter is for."""
    import transformers

    if transformers.__version__ not in ("5.20.2", "5.23.0"):
        pytest.skip(f"nobody has gone through transformers {transformers.__version__}")
    unknown = []
    for row in registry.rows().values():
        for where in fingerprints.addresses(row) if row.fingerprinted else ():
            module, _, name = where.rpartition(".")
            cls = getattr(importlib.import_module(module), name)
            if fingerprints.class_fingerprint(cls) not in fingerprints.known().get(where, {}):
                unknown.append(where)
    if transformers.__version__ == "5.20.2":
        # Sources that the adapters are not for: these modules stay as they are there.
        unknown = [w for w in unknown if w.split(".")[2] not in ("kosmos2", "mllama")]
    assert not unknown


@pytest.mark.parametrize(
    "model_type", [name for name, case in CASES.items() if case.generate is not None]
)
def test_generate(model_type: str) -> None:
    """The tokens of greedy decoding are the stock model's."""
    case = CASES[model_type]
    original, inputs, *_ = stock(model_type)
    prompt = inputs if case.prompt is None else case.prompt(original)
    with torch.no_grad():
        expected = original.generate(**prompt, **case.generate)  # type: ignore[operator]
        model = copy.deepcopy(original)
        mmfast.patch(model)
        with _harness.counted() as calls:
            got = model.generate(**prompt, **case.generate)  # type: ignore[operator]
    assert calls.attention > 0
    assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [name for name, case in CASES.items() if "base" in case.sizes]
)
def test_base_size(model_type: str) -> None:
    """A forward at the published base size: the outputs, to 1e-3 of the largest value."""
    case = CASES[model_type]
    torch.manual_seed(0)
    model = case.build("base").eval()
    inputs = case.inputs(model, "base")
    report = mmfast.patch(model)
    with torch.no_grad():
        torch.manual_seed(1)
        got = case.outputs(model(**inputs), inputs)
        report.undo()
        torch.manual_seed(1)
        right = case.outputs(model(**inputs), inputs)
    for name, value in right.items():
        size = float(value.abs().max())
        assert float((got[name] - value).abs().max()) <= 1e-3 * size, name
