"""What every test file shares: the implementations at hand and the Hypothesis profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import hypothesis
import pytest

import mmfast
from mmfast import _library

# The default is the same examples every time; nightly draws new ones.
_unhurried = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile(
    "default", max_examples=200, deadline=None, derandomize=True, suppress_health_check=_unhurried
)
hypothesis.settings.register_profile(
    "nightly", max_examples=2000, deadline=None, suppress_health_check=_unhurried
)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """A run that leaves nothing out (`pytest -m ""`, make test-all) draws the nightly examples."""
    if config.getoption("markexpr") == "" and not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("nightly")


class Implementation(NamedTuple):
    """A backend, and for the compiled one an instruction set."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(mmfast.use_backend(self.backend))
            if self.isa is not None:
                stack.enter_context(_library.use_isa(self.isa))
            yield


# `reference` always; `cpu` once for each instruction set that this processor has.
IMPLEMENTATIONS = [
    Implementation("reference"),
    *(Implementation("cpu", isa) for isa in _library.isa_available()),
]
HAS_LIBRARY = len(IMPLEMENTATIONS) > 1
# The gates have no kernels for AMX.
GATE_IMPLEMENTATIONS = [one for one in IMPLEMENTATIONS if one.isa != "amx"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`implementation`: every one. `backend`: reference, and the compiled one at its best."""
    if "gate_implementation" in metafunc.fixturenames:
        metafunc.parametrize("gate_implementation", GATE_IMPLEMENTATIONS, ids=str, indirect=True)
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", IMPLEMENTATIONS, ids=str, indirect=True)
    if "backend" in metafunc.fixturenames:
        names = ["reference", "cpu"] if HAS_LIBRARY else ["reference"]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    with request.param.active():
        yield request.param


@pytest.fixture
def gate_implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    with request.param.active():
        yield request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with mmfast.use_backend(request.param):
        yield request.param


@pytest.fixture
def compiled_library() -> None:
    """For tests that are about the compiled library."""
    if not HAS_LIBRARY:
        pytest.skip(f"no compiled library: {_library.status().reason}")
