"""The suite tests itself, the part of the models of transformers: twins, refusals, the report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.testing.architectures import all_architectures

from . import drop_in, plots, report, results
from .drop_in import CASES, HEAVY, OP, DropInPlan, Model, compared, judge, measure
from .problems import FORWARD
from .profiles import PROFILES
from .terminal import drop_in_table, sections
from .timing import Effort
from .workloads import WrongResultError

CPU = torch.device("cpu")
PLAN = DropInPlan(("lxmert",), "tiny", None, Effort(0.0, min_rounds=1))


@pytest.fixture(scope="module")
def lxmert() -> Model:
    return Model("lxmert", PLAN, CPU)


def test_every_model_has_a_base_size() -> None:
    cases = all_architectures()
    assert len(set(CASES)) == len(CASES) >= 10
    assert set(HEAVY) < set(CASES)
    assert [name for name in CASES if "base" not in cases[name].sizes] == []
    assert len(PROFILES["quick"].drop_in.cases) >= 10
    assert PROFILES["full"].drop_in.cases == CASES


def test_twins_share_their_weights_and_nothing_else(lxmert: Model) -> None:
    twin, stock = lxmert.twin("eager"), lxmert.twin()
    assert all(a is b for a, b in zip(twin.parameters(), stock.parameters()))
    assert all(a is not b for a, b in zip(twin.modules(), stock.modules()))
    report = mmfast.patch(twin)
    assert report.swapped and not any(hasattr(type(m), "_mmfast_stock") for m in stock.modules())


@pytest.mark.parametrize("name", ["lxmert", "bart"])
def test_a_model_is_the_one_that_transformers_builds(name: str) -> None:
    """But for the values of its weights; those that are tied are."""
    usual = all_architectures()[name].build("tiny")
    model = Model(name, dataclasses.replace(PLAN, cases=(name,)), CPU).twin()
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in usual.named_parameters()
    ]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in usual.named_buffers()]
    for mine, theirs in zip(model.buffers(), usual.buffers()):
        assert torch.equal(mine, theirs)
    assert all(p.isfinite().all() and p.std() > 0 for p in model.parameters() if p.numel() > 1)


def test_what_a_model_is_measured_at() -> None:
    """The model alone where its attention is its own, eager and sdpa where it goes by name."""
    for name, stock in (("lxmert", {"eager"}), ("bart", {"eager", "sdpa"})):
        found = measure(dataclasses.replace(PLAN, cases=(name,)), CPU)
        assert not found.refused and not found.left_out
        assert {row["impl"] for row in found.rows} == {"mmfast", *stock}
        assert {row["op"] for row in found.rows} == {OP}
        assert all(row["peak_extra_bytes"] > 0 for row in found.rows)
        (told,) = found.models
        assert told["swapped"] > 0 and told["error"] < 1e-4 and "valid" in told["inputs"]


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mmfast.patch

    def wrong(model: nn.Module) -> Any:
        attention = next(m for n, m in model.named_modules() if n.endswith("x_layers.1.lang_inter"))
        attention.register_forward_hook(lambda module, args, out: out * 1.02)
        return right(model)

    monkeypatch.setattr(mmfast, "patch", wrong)
    found = measure(PLAN, CPU)
    assert found.rows == [] and found.models == []
    assert len(found.refused) == 1 and "lxmert" in found.refused[0]
    assert "its numbers are wrong" in found.left_out[0]["why"]


def test_a_stock_attention_that_is_wrong_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As eager of Grounding DINO, which adds a bool mask to scores."""
    usual = Model.twin

    def faulty(self: Model, attention: str | None = None) -> nn.Module:
        twin = usual(self, attention)
        if attention == "eager":
            twin.lm_head.register_forward_hook(lambda module, args, out: out * 1.02)
        return twin

    monkeypatch.setattr(Model, "twin", faulty)
    found = measure(dataclasses.replace(PLAN, cases=("bart",)), CPU)
    assert {row["impl"] for row in found.rows} == {"sdpa", "mmfast"} and not found.refused
    assert [entry["what"] for entry in found.left_out] == ["drop-in bart: eager"]
    results.check({"machine": dict.fromkeys(results.MACHINE, "x"), "rows": found.rows})


def test_nothing_begins_without_time() -> None:
    found = measure(PLAN, CPU, left_s=lambda: 0.0, out_of_time="too late")
    over = measure(dataclasses.replace(PLAN, budget_s=-1.0), CPU, out_of_time="too late")
    for one in (found, over):
        assert one.left_out == [{"what": "drop-in lxmert", "why": "too late"}] and not one.rows


@pytest.mark.parametrize("value", [1.002, float("nan"), float("inf")])
def test_the_largest_difference_counts(value: float) -> None:
    truth = {"a": torch.ones(3), "b": torch.full((2, 2), -1.0)}
    assert judge("x", {"a": torch.ones(3), "b": torch.full((2, 2), -1.0001)}, truth) < 2e-4
    got = {"a": torch.tensor([1.0, value, 1.0]), "b": truth["b"]}
    with pytest.raises(WrongResultError, match="drop-in x: a is off"):
        judge("x", got, truth)


def test_fewer_items_keep_the_share_of_padding() -> None:
    lens = torch.linspace(1.0, 0.2, 8) * 40
    mask = (torch.arange(40) < lens.round()[:, None]).long()
    inputs = {"attention_mask": mask, "picture": torch.rand(8, 3, 4), "scale": torch.tensor(2.0)}
    some: dict[str, Tensor] = drop_in._items(inputs, 2)
    assert some["attention_mask"].shape == (2, 40) and some["picture"].shape == (2, 3, 4)
    assert float(some["attention_mask"].float().mean()) == pytest.approx(0.6)
    assert torch.equal(some["picture"][1], inputs["picture"][7])
    assert "attention_mask 2x40 (60% valid)" in drop_in.described(some)


def _rows(case: str, eager: float, mmfast_: float, peaks: tuple[int, int]) -> list[dict[str, Any]]:
    group = {"op": OP, "case": case, "ragged": True, "dtype": "float32", "direction": FORWARD}
    taken = {"eager": [eager], "sdpa": [1.25 * eager], "mmfast": [mmfast_]}
    memory = {"eager": peaks[0], "sdpa": 1, "mmfast": peaks[1]}
    return results.group_rows(group, taken, memory, None)


def test_the_report_has_models_and_a_mean() -> None:
    rows = [*_rows("one", 3.0, 2.0, (100, 50)), *_rows("two", 1.2, 0.8, (100, 200))]
    found = compared(rows)
    assert [(e.case, e.stock, e.memory) for e in found] == [
        ("one", "eager", 0.5),
        ("two", "eager", 2.0),
    ]
    assert [e.ratio for e in found] == pytest.approx([1.5, 1.5])
    assert list(sections(rows)) == []  # no table of kernels has them
    assert drop_in_table(rows).row_count == 3
    told = {
        "model": "Model", "parameters": 2_000_000, "inputs": "ids 2x3", "swapped": 3, "left": 1,
        "estimate": 1.4, "error": 1e-6,
    }  # fmt: skip
    everything = {
        "machine": {**dict.fromkeys(results.MACHINE, "x"), "started": "now"},
        "rows": rows,
        "drop_in": [{"case": case, **told} for case in ("one", "two")],
        "summary": results.summarise(rows),
        "left_out": [],
        "profile": "smoke",
    }
    drawn = plots.draw(everything, None)
    assert set(drawn) == {"drop_in"}
    page = report.render(everything, drawn)
    assert page.count("<img") == 1 and "Drop-in: models of transformers" in page
    assert "1.50x</b>faster: 2 models of transformers, patched" in page
