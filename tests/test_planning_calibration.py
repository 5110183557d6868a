"""Rates measured on a machine: the file and who may have written it, `python -m mmfast tune`."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast import __main__ as cli
from mmfast import _tune as command
from mmfast import planning
from mmfast.planning import AttentionShapes, calibration, choice, costs, measuring, rates
from mmfast.planning.costs import KINDS
from mmfast.planning.rates import Coefficients

CPU = torch.device("cpu")
DEVICE = calibration.Device("AMD EPYC 9654 96-Core Processor", "AVX512")
ROW = (1e-5, 1e-11, 1e-10, 0.0, 2e-11)
RATES = {name: dict.fromkeys(KINDS, ROW) for name in calibration.DTYPES}
POOL = AttentionShapes(8, 1, 577, 768, 768, 12, 12, 64, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The user's cache directory, for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.forget()
    yield tmp_path
    choice.forget()


# --- the file -------------------------------------------------------------------------------------


def changed(**fields: Any) -> Path:
    """The file with some of its fields replaced."""
    path = calibration.write(DEVICE, RATES, 2)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def test_round_trip(cache):
    path = calibration.write(DEVICE, RATES, 2)
    assert path == cache / "mmfast" / "plans-amd-epyc-9654-96-core-processor.json"
    assert calibration.read(DEVICE) == calibration.Found(RATES, 2, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert calibration.reset(DEVICE) and not path.exists()
    assert not calibration.reset(DEVICE)


def test_no_file_is_no_warning(recwarn):
    assert rates.rates_for(torch.float32, CPU, 1).source.startswith("assumed")
    assert "python -m mmfast tune makes it" in str(calibration.read(DEVICE).why_not)
    assert not recwarn


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_used(mode):
    own = calibration.device_of(CPU)
    calibration.write(own, RATES, 1).chmod(mode)
    found = calibration.read(own)
    assert found.rates == {} and found.unsafe
    with pytest.warns(UserWarning, match="rates of plans are not used: others may write"):
        assert rates.rates_for(torch.float32, CPU, 1).source.startswith("assumed")


def test_a_file_of_another_user_is_not_used(monkeypatch):
    calibration.write(DEVICE, RATES, 1)
    monkeypatch.setattr(os, "getuid", lambda: os.stat("/").st_uid + 12345)
    found = calibration.read(DEVICE)
    assert found.rates == {} and found.unsafe
    assert "belongs to another user" in str(found.why_not)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_is_not_used(content):
    path = calibration.write(DEVICE, RATES, 1)
    path.write_bytes(content)
    found = calibration.read(DEVICE)
    assert found.rates == {} and str(path) in str(found.why_not)


@pytest.mark.parametrize(
    "field, value",
    [
        ("schema", 2), ("schema", "1"), ("device", "Intel"), ("instructions", "AVX2"),
        ("torch", "1.0"), ("mmfast", "0.0.0"), ("schema", None),
    ],
)  # fmt: skip
def test_another_machine_or_version_is_not_used(field, value):
    changed(**{field: value})
    found = calibration.read(DEVICE)
    assert found.rates == {} and not found.unsafe
    assert f"is of {field} {value!r}" in str(found.why_not)


def _with(kind: str, row: Any) -> dict[str, Any]:
    return {"float32": {**RATES["float32"], kind: row}}


@pytest.mark.parametrize(
    "value",
    [
        None, [], {}, "float32", {"float32": None}, {"float64": RATES["float32"]},
        {"float32": {"gemm": list(ROW)}}, _with("magic", list(ROW)), _with("gemm", None),
        _with("gemm", list(ROW[:4])), _with("gemm", [*ROW[:4], "1"]),
        _with("gemm", [*ROW[:4], True]), _with("gemm", [*ROW[:4], -1e-9]),
        _with("gemm", [*ROW[:4], 1e400]), _with("gemm", [*ROW[:4], float("nan")]),
        _with("gemm", [*ROW[:4], 5.0]), _with("gemm", {"call": 1e-6}),
    ],
)  # fmt: skip
def test_what_are_no_rates_are_not_used(value):
    changed(rates=value)
    found = calibration.read(DEVICE)
    assert found.rates == {}
    assert "what are no rates" in str(found.why_not)


@pytest.mark.parametrize("value", [None, 0, -1, "2", 2.0, True, 1 << 40])
def test_what_is_no_number_of_threads_is_not_used(value):
    changed(threads=value)
    assert "what are no rates" in str(calibration.read(DEVICE).why_not)


# --- what they are used for -----------------------------------------------------------------------


def written(threads: int = 2, **kinds: Coefficients) -> None:
    """Measured rates of this machine, in float32 alone."""
    table = {"float32": {**dict.fromkeys(KINDS, ROW), **kinds}}
    calibration.write(calibration.device_of(CPU), table, threads)
    choice.forget()


def test_measured_rates_decide():
    """On a machine whose wide attention is very slow nothing is absorbed."""
    assert planning.plan(POOL).name == "absorbed"
    written(shared=Coefficients(flop=1e-6))
    plan = planning.plan(POOL)
    assert plan.name == "projected"
    assert plan.source.startswith("measured: ") and plan.source.endswith(".json")
    assert planning.plan(POOL, torch.bfloat16).source.startswith("assumed")  # not measured


def test_choose_follows_what_is_measured_meanwhile():
    """What was chosen before is not kept."""
    call = (*dataclasses.astuple(POOL), torch.float32, CPU, False)
    assert planning.choose(*call) == "absorbed"
    written(shared=Coefficients(flop=1e-6))
    assert planning.choose(*call) == "projected"


def test_other_numbers_of_threads_scale_the_work_but_not_the_calls():
    written(threads=2)
    for threads, factor in ((1, 2.0), (2, 1.0), (8, 0.25)):
        found = rates.rates_for(torch.float32, CPU, threads).kinds["gemm"]
        assert found.call == ROW[0]
        assert found[1:] == pytest.approx([factor * value for value in ROW[1:]])
    double = rates.rates_for(torch.float64, CPU, 2).kinds["gemm"]
    assert double[1:] == pytest.approx([2.0 * value for value in ROW[1:]])


# --- measuring ------------------------------------------------------------------------------------


def test_a_short_measurement_gives_rates(monkeypatch):
    """Of the real functions: every kind has a row that can be written and read."""
    monkeypatch.setattr(measuring, "SAMPLE_S", 0.0)
    told = []
    found = measuring.measure(torch.float32, CPU, lambda kind, row: told.append(kind), rounds=1)
    assert tuple(told) == KINDS == tuple(found)
    for kind, row in found.items():
        assert max(row) > 0.0, kind
        used = Coefficients(*row)
        assert used.byte == 0.0 or kind == "move"
    path = calibration.write(DEVICE, {"float32": found}, 1)
    assert calibration.read(DEVICE) == calibration.Found({"float32": found}, 1, path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_a_measurement_on_a_gpu():
    """Where a launch is not all that takes time."""
    found = measuring.measure(torch.bfloat16, torch.device("cuda"), rounds=2)
    for kind in ("gemm", "attention", "shared"):
        assert 1e-16 < Coefficients(*found[kind]).flop < 1e-11, kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_that_are_timed_are_of_their_kind(kind):
    points = list(measuring._POINTS[kind](measuring._Maker(torch.float32, CPU)))
    assert {point.piece.kind for point in points} == {kind}
    # As many as tell its coefficients apart; a step has but one.
    assert len({point.piece[2:] for point in points}) >= (1 if kind == "step" else 3)


def test_the_least_time_of_each_counts(monkeypatch):
    """A slow round changes nothing."""
    taken = iter([1.0] * 2 + [9.0, 2.0] + [4.0, 3.0] + [5.0, 8.0])
    monkeypatch.setattr(measuring, "_sample", lambda run, calls, device: next(taken))
    assert measuring.least([lambda: None] * 2, CPU, rounds=3) == [4.0, 2.0]


def test_a_products_time_is_that_of_its_formula():
    piece = costs.gemm(3, 5, 7, 2)
    assert (piece.flops, piece.elements, piece.calls) == (2 * 3 * 5 * 7 * 2, 5 * 7 * 2, 1)


# --- the command line -----------------------------------------------------------------------------

PLANS = ("tune", "--only", "plans")


@pytest.fixture
def measured(monkeypatch):
    """A measurement that takes no time; the dtypes that were asked for."""
    asked: list[str] = []

    def measure(dtype: torch.dtype, device: torch.device, told: Any) -> Any:
        asked.append(str(dtype))
        for kind in KINDS:
            told(kind, ROW)
        return dict.fromkeys(KINDS, ROW)

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(command, "_devices", lambda: [CPU])
    return asked


def test_tune_show_reset(measured, capsys):
    own = calibration.device_of(CPU)
    assert cli.main([*PLANS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert measured == ["torch.bfloat16", "torch.float32"]
    described = "10 us a call, 100 GFLOP/s, 0.1 ns an element, 50 GB/s"
    assert lines[0].endswith(f"cpu, bfloat16, gemm: {described}")
    assert lines[-1].startswith("rates of plans on cpu with ")
    assert calibration.read(own).rates == RATES
    assert "by rates measured for bfloat16, float32, in" in dict(command.rows())["plans on cpu"]
    assert planning.plan(POOL).source.startswith("measured")

    assert cli.main([*PLANS, "--show"]) == 0
    shown = capsys.readouterr().out
    assert str(calibration.path_for(own)) in shown and f"float32, move: {described}" in shown

    assert cli.main([*PLANS, "--reset"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert cli.main([*PLANS, "--reset"]) == 0
    assert "nothing to forget" in capsys.readouterr().out
    assert cli.main([*PLANS, "--show"]) == 0
    assert "plans are chosen by assumed rates: there is no" in capsys.readouterr().out
    assert "by assumed rates: there is no" in dict(command.rows())["plans on cpu"]
    assert planning.plan(POOL).source.startswith("assumed")


def test_dtypes_of_other_runs_stay(measured, monkeypatch):
    own = calibration.device_of(CPU)
    other = {"float32": dict.fromkeys(KINDS, (1e-6,) * 5)}
    calibration.write(own, other, torch.get_num_threads())
    assert cli.main([*PLANS, "--dtype", "fp16"]) == 0
    assert measured == ["torch.bfloat16"]
    assert calibration.read(own).rates == {**other, "bfloat16": RATES["bfloat16"]}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert cli.main([*PLANS, "--dtype", "fp32"]) == 0  # rates of other threads do not mix
    assert calibration.read(own) == calibration.Found(
        {"float32": RATES["float32"]}, 77, calibration.path_for(own)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_tune_of_everything_measures_plans_where_there_is_no_gpu(measured, capsys):
    assert cli.main(["tune"]) == 0
    shown = capsys.readouterr()
    assert "tiles are timed on one" in shown.err
    assert "rates of plans on cpu" in shown.out


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "--only", "everything"])
    assert stopped.value.code == 2
    assert "--only" in capsys.readouterr().err


def test_info_shows_the_rates(measured, capsys):
    assert cli.main(["info", "--json"]) == 0
    assert "by assumed rates" in json.loads(capsys.readouterr().out)["Tuning"]["plans on cpu"]
