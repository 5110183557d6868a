"""tools/fingerprints.py: the file of known sources is current; what each option does."""

from __future__ import annotations

import json
from pathlib import Path

import fingerprints
import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LXMERT = "transformers.models.lxmert.modeling_lxmert.LxmertAttention"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["fingerprints.py", *options])
    return fingerprints.main()


@pytest.mark.skipif(
    transformers.__version__ != "5.23.0", reason="the file is written with transformers 5.23.0"
)
def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--check") == 0, "run python tools/fingerprints.py"
    known = json.loads(fingerprints.FILE.read_text(encoding="utf-8"))
    file = tmp_path / "fingerprints.json"
    monkeypatch.setattr(fingerprints, "FILE", file)

    def start(data: object) -> None:
        file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    without = {where: prints for where, prints in known.items() if where != LXMERT}
    start(without)
    assert run(monkeypatch, "--check") == 1
    assert json.loads(file.read_text(encoding="utf-8")) == without
    for options in (("--known",), ("--but", "lxmert")):
        assert run(monkeypatch, *options) == 0
        assert LXMERT not in json.loads(file.read_text(encoding="utf-8"))
    assert run(monkeypatch) == 0
    (mark,) = json.loads(file.read_text(encoding="utf-8"))[LXMERT]
    assert known[LXMERT][mark][-1] == "5.23.0"
    # A class that no adapter needs any more goes.
    start({**known, "transformers.models.gone.modeling_gone.Gone": {"0" * 16: ["5.23.0"]}})
    assert run(monkeypatch) == 0
    assert json.loads(file.read_text(encoding="utf-8")) == known
