"""`make bench` from outside: a smoke run writes what the project promises, and the suite's own
tests (benchmarks/test_suite*.py, which refuse planted wrong kernels) pass."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = {
    "op", "case", "ragged", "dtype", "direction", "impl", "p20_ms", "p50_ms", "p80_ms",
    "ratio_vs_eager", "best_peer", "ratio_vs_best_peer", "peak_extra_bytes", "pct_of_peak",
    "pct_of_clone", "beyond_cache",
}  # fmt: skip
GATES = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run."""
    folder = tmp_path_factory.mktemp("results")
    done = python("benchmarks", "--profile", "smoke", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (folder / "terminal.txt").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_the_machine_is_recorded(results: dict[str, Any]) -> None:
    machine = results["machine"]
    for key in ("processor", "instruction_set", "threads", "torch", "mmfast", "commit"):
        assert machine[key], key
    assert machine["gemm_gflops"]["float32"] > 0
    assert machine["clone_gb_per_s"] > 0


def test_rows_have_exactly_the_promised_keys(results: dict[str, Any]) -> None:
    assert results["rows"]
    for row in results["rows"]:
        assert set(row) == ROW
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["direction"] in ("forward", "forward_backward")
        assert row["impl"] in ("mmfast", "eager", "sdpa", "compile")
        assert row["best_peer"] in ("eager", "sdpa", "compile")
        assert type(row["ragged"]) is bool
        assert type(row["peak_extra_bytes"]) is int


def test_ratios_follow_from_the_times(results: dict[str, Any]) -> None:
    def p50(row: dict[str, Any], impl: str) -> float:
        key = ("op", "case", "ragged", "dtype", "direction")
        same = [r for r in results["rows"] if all(r[k] == row[k] for k in key)]
        return next((r["p50_ms"] for r in same if r["impl"] == impl), math.inf)

    for row in results["rows"]:
        assert math.isclose(row["ratio_vs_eager"], p50(row, "eager") / row["p50_ms"])
        best = p50(row, row["best_peer"])
        assert math.isclose(row["ratio_vs_best_peer"], best / row["p50_ms"])
        assert best <= min(p50(row, "eager"), p50(row, "sdpa"))


def test_every_kind_of_row_is_there(results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["impl"] == "mmfast"]
    kinds = {(row["op"], row["ragged"], row["direction"]) for row in rows}
    for direction in ("forward", "forward_backward"):
        assert ("cross_attention", False, direction) in kinds
        assert ("cross_attention", True, direction) in kinds
        assert ("MultiheadAttention", True, direction) in kinds
        assert ("GatedMLP", False, direction) in kinds
        for op in GATES:
            assert (op, False, direction) in kinds
        for op in ("attention pooling", "Q-Former attention"):
            assert (op, False, direction) in kinds
        for op in ("cross-attention block", "layers over one context"):
            assert (op, True, direction) in kinds
    assert ("decoding steps", True, "forward") in kinds
    assert ("drop-in", True, "forward") in kinds
    assert {"tiny", "longest"} <= {row["case"] for row in rows}


def test_gates_say_what_they_reach_of_the_bandwidth(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["op"] in GATES:
            assert row["impl"] in ("mmfast", "eager")  # smoke has no time for compile
            assert row["pct_of_clone"] > 0.0
            assert row["beyond_cache"] is False  # its cases are tiny
        else:
            assert row["pct_of_clone"] is None
    total = [entry for entry in results["summary"] if entry["op"] == "gates"]
    assert {(entry["dtype"], entry["direction"]) for entry in total} == {
        (dtype, direction)
        for dtype in ("float32", "bfloat16")
        for direction in ("forward", "forward_backward")
    }
    assert {entry["op"] for entry in results["summary"]} >= set(GATES)


def test_models_of_transformers_were_patched(results: dict[str, Any], out: Path) -> None:
    rows = [row for row in results["rows"] if row["op"] == "drop-in"]
    models = {entry["case"]: entry for entry in results["drop_in"]}
    assert set(models) == {row["case"] for row in rows if row["impl"] == "mmfast"} != set()
    assert all(entry["swapped"] > 0 for entry in models.values())
    assert "mmfast.patch(model)" in (out / "terminal.txt").read_text(encoding="utf-8")


def test_the_planner_was_judged(results: dict[str, Any], out: Path) -> None:
    told = results["plans"]["summary"]
    assert told["problems"] == len(results["plans"]["rows"]) > 0
    assert 0.0 <= told["share_near_best"] <= 1.0
    assert told["mean_ratio"] >= 1.0
    assert "planner: within" in (out / "terminal.txt").read_text(encoding="utf-8")


def test_what_was_left_out_is_said(results: dict[str, Any], out: Path) -> None:
    assert any("compile" in entry["what"] for entry in results["left_out"])
    assert all(entry["why"] for entry in results["left_out"])
    assert "left out" in (out / "terminal.txt").read_text(encoding="utf-8")


def test_the_twins_agree_and_only_torch_makes_nan(results: dict[str, Any]) -> None:
    training = results["training"]
    assert set(training["accuracy"]["mmfast"]) == {"both", "image_missing", "audio_missing"}
    assert training["agreement"]["logits_max_difference"] < 1e-4
    assert training["without_workaround"]["eager"]["parameters_nan"] > 0
    assert training["without_workaround"]["mmfast"]["parameters_nan"] == 0
    assert training["without_workaround"]["mmfast"]["items_nan"] == 0


def test_the_report_is_one_self_contained_file(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    references = re.findall(r"(?:src|href)\s*=\s*['\"]?([^'\">\s]*)", page)
    assert references
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)
    for title in (
        "Drop-in",
        "Real data",
        "cross_attention",
        "gates",
        "modules and stacks",
        "The planner",
        "Method",
        "Machine",
        "Left out",
    ):
        assert title in page


def test_plots_are_pngs_and_nothing_is_left_half_written(out: Path) -> None:
    plots = list(out.glob("*.png"))
    assert {
        "training.png",
        "memory.png",
        "data.png",
        "ratios_gates_float32.png",
        "ratios_modules_and_stacks_float32.png",
        "plans.png",
        "drop_in.png",
    } <= {plot.name for plot in plots}
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert list(out.glob(".*")) == []


def test_the_suite_passes_its_own_tests() -> None:
    own = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("benchmarks/test_suite*.py"))]
    assert len(own) == 7
    done = python("pytest", "-q", "-p", "no:cacheprovider", *own)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_suite_passes_its_slow_tests() -> None:
    """FlexAttention on the CPU: seconds of compiling."""
    done = python(
        "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider", "benchmarks/test_suite_peers.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pytest_benchmark_has_a_group_for_every_case() -> None:
    done = python("pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "benchmarks")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("tanh_gate", "swiglu", "geglu_packed", "softmax_mix_3", "gmu", "film", "mag"):
        for impl in ("eager", "mmfast"):
            assert f"[{impl}-forward_backward-bfloat16-{name}_long]" in done.stdout
    for name in ("vqa", "caption", "qformer", "align", "mllama", "detect", "speech", "pool"):
        for impl in ("eager", "sdpa", "mmfast"):
            for case in (name, f"{name}_ragged"):
                assert f"[{impl}-forward_backward-float32-{case}]" in done.stdout
