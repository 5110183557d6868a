"""`python -m mmfast tune --only tiles`: choosing, the file and who may have written it, the command
line. Of plans: test_planning_calibration.py."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_helpers import interpreter, requires_triton

from mmfast import __main__ as cli
from mmfast import _tune as command

pytestmark = requires_triton
try:
    from mmfast.kernels import _tune, _tune_gpu, _tuning
except ImportError:  # no triton: every test is skipped
    pass
else:
    DEVICE = _tune.Device("NVIDIA H100 80GB HBM3", (9, 0), "sm_90")
    KEY = ("fwd", 64, 2, 128, 256)
    CANDIDATES = _tuning.attention_candidates("fwd", "sm_90", 64, 2, 128, 256)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


# --- choosing -------------------------------------------------------------------------------------


def work(key: Any = None, *, fails: Sequence[int] = (), label: str = "fwd") -> Any:
    def runner(tile: Any) -> Callable[[], None]:
        def run() -> None:
            if CANDIDATES.index(tile) in fails:
                raise _tune.CannotRun("too large")

        run.tile = tile  # type: ignore[attr-defined]
        return run

    return _tune.Work(label, key or KEY, CANDIDATES, runner)


def timed(*times: float) -> Callable[[Sequence[Any]], list[float]]:
    """Measures each candidate as given here."""
    return lambda runs: [times[CANDIDATES.index(run.tile)] for run in runs]


def test_the_fastest_is_chosen():
    assert len(CANDIDATES) == 3
    for times in ((3.0, 1.0, 2.0), (1.0, 3.0, 2.0), (3.0, 2.0, 1.0)):
        outcome = _tune.choose([work()], timed(*times), budget=9)
        best = CANDIDATES[times.index(1.0)]
        assert outcome.choices == {KEY: _tune.Choice(best, 1.0, times[0])}
        assert outcome.failed == outcome.left == []


def test_the_first_of_equals_is_chosen():
    assert _tune.choose([work()], timed(2, 1, 1), budget=9).choices[KEY].tile == CANDIDATES[1]


def test_what_does_not_run_is_left_out_and_told():
    outcome = _tune.choose([work(fails=[1])], timed(2.0, 0.0, 3.0), budget=9)
    assert outcome.choices[KEY].tile == CANDIDATES[0]
    assert outcome.failed == [f"fwd, {_tune.describe(CANDIDATES[1])}: too large"]
    outcome = _tune.choose([work(fails=[0, 1, 2])], timed(), budget=9)
    assert outcome.choices == {}
    assert len(outcome.failed) == 3


def test_other_errors_are_not_hidden():
    def runner(tile: Any) -> Callable[[], None]:
        return lambda: 1 // 0  # type: ignore[return-value]

    with pytest.raises(ZeroDivisionError):
        _tune.choose([_tune.Work("fwd", KEY, CANDIDATES, runner)], timed(), budget=9)


def test_a_class_is_timed_once_and_the_budget_ends_it():
    seconds = iter([0.0, 1.0, 4.0, 10.0, 11.0])
    measured, told = [], []

    def measure(runs: Sequence[Any]) -> list[float]:
        measured.append(len(runs))
        return [1.0] * len(runs)

    others = [("dq", 64, 2, 128, 256), ("dkv", 64, 2, 128, 256), ("fwd", 128, 2, 128, 256)]
    pieces = [work(), work(), *[work(key, label=key[0]) for key in others]]
    outcome = _tune.choose(
        pieces, measure, budget=10.0, clock=lambda: next(seconds),
        told=lambda one, choice: told.append((one.label, choice is not None)),
    )  # fmt: skip
    assert list(outcome.choices) == [KEY, others[0]]
    assert len(measured) == 2
    assert outcome.left == ["dkv", "fwd"]
    assert told == [("fwd", True), ("fwd", True), ("dq", True), ("dkv", False), ("fwd", False)]


# --- the file -------------------------------------------------------------------------------------


def choices() -> dict[Any, Any]:
    other = _tuning.attention_candidates("dkv", "sm_90", 128, 4, 64, 32)
    return {
        KEY: _tune.Choice(CANDIDATES[1], 0.25, 0.5),
        ("dkv", 128, 4, 64, 32): _tune.Choice(other[0], 1.0, 1.0),
    }


def changed(**fields: Any) -> Path:
    """The file of `choices()` with some of its fields replaced."""
    path = _tune.write(DEVICE, choices())
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def test_round_trip(cache):
    path = _tune.write(DEVICE, choices())
    assert path == cache / "mmfast" / "tuning-nvidia-h100-80gb-hbm3.json"
    assert _tune.read(DEVICE) == _tune.Found(choices())
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    assert data["capability"] == [9, 0]
    assert {"device", "triton", "torch", "mmfast"} <= set(data)


@pytest.mark.parametrize("cache_home", [None, "", "relative/path"])
def test_the_cache_is_in_the_home_directory(monkeypatch, tmp_path, cache_home):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home or "")
    if cache_home is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    assert _tune.path_for(DEVICE).parent == tmp_path / ".cache" / "mmfast"


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "", "NVIDIA\n\x00", "...", "~"])
def test_no_device_name_leaves_the_directory(cache, name):
    path = _tune.path_for(DEVICE._replace(name=name))
    assert path.parent == cache / "mmfast"
    assert path.name.startswith("tuning-") and path.suffix == ".json"


@pytest.mark.parametrize("mask", [0o022, 0o000])
def test_nobody_else_may_read_or_write(cache, mask):
    (cache / "mmfast").mkdir(mode=0o777)
    before = os.umask(mask)
    try:
        path = _tune.write(DEVICE, choices())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch):
    path = _tune.write(DEVICE, choices())

    def failing(*names: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        _tune.write(DEVICE, {})
    assert _tune.read(DEVICE).choices == choices()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_reader_sees_the_old_or_the_new_file():
    sets = [choices(), {KEY: choices()[KEY]}]
    _tune.write(DEVICE, sets[0])
    stop = threading.Event()

    def writes() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            _tune.write(DEVICE, sets[number % 2])

    writer = threading.Thread(target=writes)
    writer.start()
    try:
        found = [_tune.read(DEVICE) for _ in range(200)]
    finally:
        stop.set()
        writer.join()
    assert all(one.why_not is None and one.choices in sets for one in found)


def test_no_file_is_no_warning(recwarn):
    assert _tune.read(DEVICE).choices == {}
    assert "python -m mmfast tune makes it" in str(_tune.read(DEVICE).why_not)
    assert not recwarn


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_used(monkeypatch, mode):
    path = _tune.write(DEVICE, choices())
    path.chmod(mode)
    found = _tune.read(DEVICE)
    assert found.choices == {} and found.unsafe
    assert "others may write" in str(found.why_not)
    monkeypatch.setattr(_tune, "device_of", lambda device: DEVICE)
    with pytest.warns(UserWarning, match="others may write .* delete it and run python -m mmfast"):
        assert _tune.load(torch.device("cuda")) == {}


def test_a_file_of_another_user_is_not_used(monkeypatch):
    _tune.write(DEVICE, choices())
    monkeypatch.setattr(os, "getuid", lambda: os.stat("/").st_uid + 12345)
    found = _tune.read(DEVICE)
    assert found.choices == {} and found.unsafe
    assert "belongs to another user" in str(found.why_not)


def test_what_is_no_regular_file_is_not_used(cache):
    path = _tune.path_for(DEVICE)
    path.parent.mkdir()
    os.mkfifo(path)
    assert "no regular file" in str(_tune.read(DEVICE).why_not)  # and does not wait for a writer
    path.unlink()
    path.mkdir()
    assert _tune.read(DEVICE).why_not is not None
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert _tune.read(DEVICE).unsafe


def test_a_huge_file_is_not_read():
    path = _tune.write(DEVICE, choices())
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    assert "more than tuning writes" in str(_tune.read(DEVICE).why_not)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}']
)
def test_a_broken_file_is_not_used(content):
    path = _tune.write(DEVICE, choices())
    path.write_bytes(content)
    found = _tune.read(DEVICE)
    assert found.choices == {}
    assert str(path) in str(found.why_not)


@pytest.mark.parametrize(
    "field, value",
    [
        ("schema", 2), ("schema", "1"), ("device", "NVIDIA A100"), ("capability", [8, 0]),
        ("capability", None), ("triton", "2.0.0"), ("torch", "1.0"), ("mmfast", "0.0.0"),
    ],
)  # fmt: skip
def test_another_device_or_version_is_not_used(field, value):
    changed(**{field: value})
    found = _tune.read(DEVICE)
    assert found.choices == {} and not found.unsafe
    assert f"is of {field} {value!r}" in str(found.why_not)


ENTRY = {"kernel": "fwd", "width": 64, "itemsize": 2, "rows": 128, "keys": 256,
         "ms": 1.0, "default_ms": 2.0}  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    [
        None, 5, {}, [], {"kernel": ["fwd"]}, {"kernel": "fwd; rm"}, {"width": "64"},
        {"width": 48}, {"width": True}, {"itemsize": 3}, {"rows": -128}, {"rows": 10**30},
        {"keys": 2.5}, {"tile": None}, {"tile": [64, 128, 4]}, {"tile": [64, 128, 4, "3"]},
        {"tile": [0, 128, 4, 3]}, {"tile": [65, 128, 4, 3]}, {"tile": [4096, 4096, 4, 3]},
        {"tile": {"rows": 64}}, {"ms": None}, {"default_ms": "1"},
    ],
)  # fmt: skip
def test_an_entry_that_is_no_choice_is_not_used(entry):
    good = {**ENTRY, "tile": list(CANDIDATES[1])}
    changed(choices=[good])
    assert _tune.read(DEVICE).choices[KEY].tile == CANDIDATES[1]
    bad = {**good, **entry} if isinstance(entry, dict) and entry else entry
    changed(choices=[good, bad])
    found = _tune.read(DEVICE)
    assert found.choices == {}
    assert "no choice of a tile" in str(found.why_not)


def test_load_gives_what_the_kernels_ask_for(monkeypatch):
    _tune.write(DEVICE, choices())
    monkeypatch.setattr(_tune, "device_of", lambda device: DEVICE)
    tuned = _tune.load(torch.device("cuda"))
    assert tuned == {key: choice.tile for key, choice in choices().items()}
    default = _tuning.attention_tile("fwd", "sm_90", 64, 2, 100, 200)
    assert default == CANDIDATES[0]
    monkeypatch.setattr(_tuning, "TUNED", tuned)
    assert _tuning.attention_tile("fwd", "sm_90", 64, 2, 100, 200) == CANDIDATES[1]
    assert _tuning.attention_tile("fwd", "sm_90", 64, 2, 300, 200) != CANDIDATES[1]


def test_reset(cache):
    assert not _tune.reset(DEVICE)
    path = _tune.write(DEVICE, choices())
    assert _tune.reset(DEVICE)
    assert not path.exists()


# --- the work on a device, in the interpreter -----------------------------------------------------


def test_work_asks_the_launchers_and_runs_each_tile():
    """The candidates are those of the classes that the launchers ask for, and they are taken."""
    with interpreter(), pytest.MonkeyPatch.context() as patch:
        from mmfast.kernels import _tune_gpu, _tuning

        patch.setattr(_tuning, "arch", lambda device: "sm_90")
        problem = _tune_gpu.Problem(1, 2, 5, 20, 16)
        found = list(_tune_gpu.work([problem], [torch.float32], torch.device("cpu")))
        kernels = ("fwd", "dq", "dkv")
        assert [one.label for one in found] == [f"{k} 1, 2, 5, 20, 16 float32" for k in kernels]
        assert [one.key for one in found] == [(k, 32, 4, 16, 32) for k in kernels]
        taken: dict[str, Any] = {}
        tile_of = _tuning.attention_tile

        def noting(kernel: str, *rest: Any, **options: Any) -> Any:
            taken[kernel] = tile_of(kernel, *rest, **options)
            return taken[kernel]

        patch.setattr(_tuning, "attention_tile", noting)
        for one in found:
            assert one.candidates[0] == tile_of(one.key[0], "sm_90", *one.key[1:])
            odd = one.candidates[0]._replace(rows=16, keys=16)
            taken.clear()
            one.runner(odd)()
            assert taken[one.key[0]] == odd
            assert _tuning.TUNED == {}


# --- the command line -----------------------------------------------------------------------------


TILES = ("tune", "--only", "tiles")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("options", [[], ["--show"], ["--reset"]])
def test_without_a_gpu(capsys, options):
    assert cli.main([*TILES, *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "python -m mmfast tune: no GPU that torch can use; tiles are timed on one.\n"
    )


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose second candidate is the fastest; the problems that were asked for."""
    asked: list[Any] = []

    def pieces(problems: Any, dtypes: Any, device: Any) -> Any:
        asked.extend((*problem, dtype) for problem in problems for dtype in dtypes)
        yield from [work(), work(("fwd", 64, 2, 256, 256), fails=[2], label="other")]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_tune, "device_of", lambda device: DEVICE)
    monkeypatch.setattr(_tune_gpu, "work", pieces)
    monkeypatch.setattr(_tune_gpu, "measure", timed(2.0, 1.0, 3.0))
    return asked


def test_tune_show_reset(gpu, capsys, cache):
    assert cli.main([*TILES, "--shape", "8,12,40,36,64", "--shape", "1,1,1,1,8"]) == 0
    shown = capsys.readouterr().out
    assert gpu == [
        (8, 12, 40, 36, 64, torch.bfloat16), (8, 12, 40, 36, 64, torch.float32),
        (1, 1, 1, 1, 8, torch.bfloat16), (1, 1, 1, 1, 8, torch.float32),
    ]  # fmt: skip
    lines = shown.splitlines()
    assert lines[0] == f"   1/12  fwd: {_tune.describe(CANDIDATES[1])}, 2.00x of the default"
    assert f"did not run: other, {_tune.describe(CANDIDATES[2])}: too large" in lines
    assert lines[-1].startswith("2 classes of problems chosen, in ")
    assert _tune.read(DEVICE).choices[KEY] == _tune.Choice(CANDIDATES[1], 1.0, 2.0)

    assert cli.main([*TILES, "--show"]) == 0
    shown = capsys.readouterr().out
    assert str(_tune.path_for(DEVICE)) in shown
    assert "fwd, width to 64, 2 bytes, 128 rows, 256 keys" in shown
    assert "1 ms, the default 2 ms" in shown
    assert "2 classes of problems tuned" in command.tiles_row()[1]

    assert cli.main([*TILES, "--reset"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert cli.main([*TILES, "--reset"]) == 0
    assert "nothing to forget" in capsys.readouterr().out
    assert cli.main([*TILES, "--show"]) == 0
    assert "there is no" in capsys.readouterr().out
    assert "as they come: there is no" in command.tiles_row()[1]


def test_choices_of_other_classes_stay(gpu):
    _tune.write(DEVICE, choices())
    assert cli.main([*TILES, "--shape", "1,1,1,1,8", "--dtype", "fp16"]) == 0
    assert gpu == [(1, 1, 1, 1, 8, torch.float16)]
    found = _tune.read(DEVICE).choices
    assert len(found) == 3
    assert found[KEY].ms == 1.0  # timed again


def test_no_time(gpu, capsys):
    assert cli.main([*TILES, "--budget", "0"]) == 0
    assert "no time for 2 of them" in capsys.readouterr().out
    assert _tune.read(DEVICE).choices == {}


def test_the_default_shapes_are_those_of_the_performance_suite():
    shapes = command.default_shapes()
    assert len(shapes) == len(set(shapes)) == 9
    assert (8, 12, 1, 577, 64) in shapes


@pytest.mark.parametrize("shape", ["1,2,3", "a,b,c,d,e", "1,2,3,4,0", ""])
def test_wrong_shapes_are_refused(gpu, capsys, shape):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*TILES, "--shape", shape])
    assert stopped.value.code == 2
    assert "--shape" in capsys.readouterr().err
    assert gpu == []


def test_a_bar_with_rich(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with command.progress(2) as tell:
        tell("[one]")
        tell("two")
    shown = capsys.readouterr().out
    assert "[one]" in shown and "two" in shown
    assert "2/2" in shown


def test_what_was_measured_goes_before_the_table():
    from mmfast.kernels import _tuning

    call = ("fwd", "sm_90", 64, 2, 128, 197)
    default, other = _tuning.attention_tile(*call), _tuning.attention_candidates(*call)[1]
    assert default != other
    measured = {("fwd", 64, 2, 128, 256): other}
    assert _tuning.attention_tile(*call, False, measured) == other
    assert _tuning.attention_tile("fwd", "sm_90", 64, 2, 64, 197, False, measured).rows == 64
    assert _tuning.attention_tile("dq", *call[1:], False, measured) != other
    halved = _tuning.attention_tile(*call, True, measured)
    assert halved == other._replace(keys=other.keys // 2)
