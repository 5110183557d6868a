"""`python -m mmfast info` with everything there, and with parts of it missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from overlay import make_overlay

from mmfast import __main__ as cli
from mmfast import __version__, _library, dispatch

SECTIONS = ["Versions", "Processor", "Compiled library", "Backends", "Tuning", "Environment"]


def test_json_holds_every_section_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == SECTIONS
    assert told["Versions"]["mmfast"] == __version__
    for offer in dispatch.explain():
        row = told["Backends"][f"{offer.op} on {offer.backend}"]
        assert row == (offer.reason or "available")
    if _library.status().loaded:
        assert told["Compiled library"]["in use"] == _library.isa_current()


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in SECTIONS)
    assert "cross_attention on reference" in shown


def test_without_rich_and_without_library(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text('raise ImportError("rich is blocked in this test")\n')
    done = run_python("-m", "mmfast", "info", package=make_overlay(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert all(title in done.stdout for title in SECTIONS)
    assert 'pip install "mmfast[cli]"' in done.stdout
    assert "not in use: the compiled library is not in this installation" in done.stdout
    assert "cross_attention on reference  available" in done.stdout


def test_wrong_settings_are_shown_not_raised() -> None:
    settings = {"MMFAST_ISA": "avx1024", "MMFAST_BACKEND": "fast"}
    done = run_python("-m", "mmfast", "info", "--json", environment=settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["Environment"] == {
        "MMFAST_BACKEND": "fast",
        "MMFAST_ISA": "avx1024",
    }


def test_no_command_says_what_there_is() -> None:
    done = run_python("-m", "mmfast")
    assert done.returncode == 2
    assert "info" in done.stderr


CODE = {"cuda_archs": "80,90", "cuda_ptx": "80", "cuda_version": "13.0"}


@pytest.mark.parametrize(
    ("cuda", "available", "told"),
    [
        (None, False, "no: this torch is a CPU build; install a CUDA build of torch"),
        ("13.0", False, "no: torch finds no GPU or no driver for one"),
        ("13.0", True, "H100: yes"),
        ("13.0", True, "V100: the compiled library has CUDA kernels for 80,90 (PTX for 80)"),
    ],
)
def test_cuda_kernels_and_whether_they_can_be_used(
    cuda: str | None, available: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = told.partition(":")[0]
    monkeypatch.setattr(_library, "build_info", lambda: CODE)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    capability = (7, 0) if name == "V100" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    (_, held), (_, use) = cli._cuda_kernels()
    assert held == "machine code for 80,90, PTX for 80, of CUDA 13.0"
    assert use.startswith(told)


def test_a_library_without_cuda_kernels_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_library, "build_info", dict)
    assert cli._cuda_kernels() == [("CUDA kernels", f"none; {_library.HOW_TO_GET_CUDA}")]
