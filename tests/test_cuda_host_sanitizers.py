"""The CUDA kernels on the CPU under AddressSanitizer + UBSan and under ThreadSanitizer.

A few cases of the registry with everything that a kernel of attention can be asked for, in a build
of one head width; all tests of the kernels, in all widths, where `slow` is chosen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import host_build  # noqa: E402
import host_sanitize  # noqa: E402

MODES = ("asan", "tsan")
# One width, and what is needed for it. Narrower heads are padded to it.
RESTRICTED = {"MMFAST_HOST_OPS": "cross_attention,glu", "MMFAST_HOST_WIDTHS": "64"}
ATTENTION = "tests/test_cuda_cross_attention.py::test_gradients"
CASES = ("lens_odd", "dropout_gate_bias")


def run(mode: str, *arguments: str, **variables: str) -> None:
    """Runs pytest under the sanitizer; its report is the message of a failure."""
    import native_build

    widths = tuple(int(x) for x in variables.get("MMFAST_HOST_WIDTHS", "").split(",") if x)
    ops = tuple(x for x in variables.get("MMFAST_HOST_OPS", "").split(",") if x)
    try:
        host_build.build(mode, ops=ops, widths=widths)
        done = host_sanitize.pytest(mode, "-q", *arguments, **variables)
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    except SystemExit as missing:  # no runtime to preload
        pytest.skip(str(missing))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_some_cases(mode: str) -> None:
    names = " or ".join(CASES)
    run(mode, ATTENTION, "-k", names, "-m", "not slow", **RESTRICTED)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_everything(mode: str) -> None:
    run(mode, *host_sanitize.TESTS, "-m", "not slow", MMFAST_HOST_OPS="", MMFAST_HOST_WIDTHS="")
