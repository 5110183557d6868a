"""The compiled library: loading, instruction sets, and the words for what cannot be."""

from __future__ import annotations

import json

import native_build
import pytest
from fresh_process import run_python

from mmfast import __version__, _library

needs_library = pytest.mark.skipif(
    not _library.status().loaded, reason=f"no compiled library: {_library.status().reason}"
)

CURRENT = """
import json
from mmfast import _library
print(json.dumps([_library.status().reason, _library.isa_current(), _library.isa_available()]))
"""


def current_under(cap: str | None) -> tuple[str | None, str | None, list[str]]:
    done = run_python("-c", CURRENT, environment={"MMFAST_ISA": cap} if cap else None)
    assert done.returncode == 0, done.stderr
    reason, current, available = json.loads(done.stdout)
    return reason, current, available


def test_library_is_there_where_it_can_be_built() -> None:
    """Otherwise every test that needs it would be skipped and nobody would notice."""
    try:
        native_build.find_toolchain()
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    assert _library.status().loaded, f"{_library.status().reason}; run `make build`"


@needs_library
def test_available_sets_are_known_and_ordered() -> None:
    available = _library.isa_available()
    assert available[0] == "generic"
    assert [name for name in _library.ISA_NAMES if name in available] == list(available)
    assert _library.isa_current() in available


@needs_library
def test_every_available_set_can_be_chosen_and_is_left_again() -> None:
    before = _library.isa_current()
    for name in _library.isa_available():
        with _library.use_isa(name):
            assert _library.isa_current() == name
        assert _library.isa_current() == before


@needs_library
def test_a_set_is_left_after_an_error() -> None:
    before = _library.isa_current()
    with pytest.raises(KeyError), _library.use_isa("generic"):  # noqa: PT012
        assert _library.isa_current() == "generic"
        raise KeyError
    assert _library.isa_current() == before


@needs_library
def test_unknown_set() -> None:
    before = _library.isa_current()
    with pytest.raises(ValueError, match=r"^set_isa: 'avx1024' is not an instruction set; use one"):
        _library.set_isa("avx1024")
    assert _library.isa_current() == before


def test_set_that_this_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class SmallProcessor:
        def mmfast_isa_set(self, name: bytes) -> int:
            return 0 if name == b"generic" else 2

        def mmfast_isa_available(self) -> bytes:
            return b"generic"

    state = _library._State(_library.LibraryStatus(True, "", None), SmallProcessor())  # type: ignore[arg-type]
    monkeypatch.setattr(_library, "_state", lambda: state)
    _library.set_isa("generic")
    with pytest.raises(ValueError, match=r"^set_isa: this processor cannot run avx2; use one of g"):
        _library.set_isa("avx2")


@needs_library
@pytest.mark.parametrize("cap", ["generic", "avx2", "amx"])
def test_environment_caps(cap: str) -> None:
    reason, current, available = current_under(cap)
    assert reason is None
    allowed = _library.ISA_NAMES[: _library.ISA_NAMES.index(cap) + 1]
    assert current == [name for name in allowed if name in available][-1]


@needs_library
def test_the_best_set_is_the_default() -> None:
    _, current, available = current_under(None)
    # Emulated AMX tiles (development builds) are there for tests and never chosen by themselves.
    emulated = current != "amx" and available[-1] == "amx"
    assert current == available[-2 if emulated else -1]


@needs_library
def test_build_info_is_of_this_version() -> None:
    assert _library.build_info()["version"] == __version__


def test_without_library_the_questions_have_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = _library._State(_library.LibraryStatus(False, None, "it is not here"), None)
    monkeypatch.setattr(_library, "_state", lambda: nothing)
    assert _library.isa_available() == ()
    assert _library.isa_current() is None
    assert _library.build_info() == {}
    with pytest.raises(RuntimeError, match=r"^set_isa: it is not here$"):
        _library.set_isa("avx2")
