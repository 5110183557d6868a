"""`python -m mmfast info` with everything there, and with parts of it missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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
