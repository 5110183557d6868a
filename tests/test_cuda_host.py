"""The host run of CUDA kernels finds the faults it is there for (csrc/host).

Each fault is planted in a small kernel of cuda_host_toys.cu; beside it the same kernel without the
fault has to pass. Reports of the sanitizers come from processes of their own.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOYS = ROOT / "tests" / "cuda_host_toys.cu"
SEEDS = range(8)
SCHEDULES = {"random": 0, "greedy": 1, "round robin": 2}
RIGHT, WRONG, ERROR = range(3)

FAULTLESS = (
    "exchange",
    "exchange in a warp",
    "stream",
    "places",
    "aligned",
    "ways",
    "blocks",
    "gemm",
)

# What a process prints of one toy under a sanitizer.
RUN_TOY = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
message = ctypes.create_string_buffer(2000)
print(library.toy(sys.argv[2].encode(), message, 2000), message.value.decode())
"""


def tools() -> Any:
    """tools/host_build.py and tools/host_sanitize.py, which are no package."""
    if str(ROOT / "tools") not in sys.path:
        sys.path.insert(0, str(ROOT / "tools"))
    import host_build
    import host_sanitize

    return host_build, host_sanitize


@functools.lru_cache
def built(mode: str) -> Path:
    """The library of toys."""
    host_build, _ = tools()
    import native_build

    try:
        return host_build.build(mode, name="toys", ops=(), sources=(TOYS,))
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The toys without a sanitizer."""
    handle = ctypes.CDLL(str(built("plain")))
    handle.mmfast_host_seed.argtypes = [ctypes.c_uint64]
    for name in ("mmfast_host_counters", "mmfast_host_launches"):
        getattr(handle, name).restype = ctypes.c_char_p
    return handle


class Outcome(NamedTuple):
    status: int
    message: str


def run(toy: str, schedule: str = "random", seed: int = 0) -> Outcome:
    """Runs a toy in this process."""
    message = ctypes.create_string_buffer(2000)
    library().mmfast_host_seed(seed)
    before = library().mmfast_host_schedule(SCHEDULES[schedule])
    try:
        status = library().toy(toy.encode(), message, len(message))
    finally:
        library().mmfast_host_schedule(before)
    return Outcome(status, message.value.decode())


def sanitized(mode: str, toy: str) -> subprocess.CompletedProcess[str]:
    """Runs a toy under a sanitizer, in a process of its own."""
    _, host_sanitize = tools()
    try:
        done = host_sanitize.python(mode, "-c", RUN_TOY, str(built(mode)), toy, timeout=120)
    except SystemExit as missing:  # no runtime to preload
        pytest.skip(str(missing))
    return done


# --- without a sanitizer ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("toy", FAULTLESS)
def test_a_faultless_kernel_is_right_in_every_order(toy: str, schedule: str) -> None:
    for seed in SEEDS:
        assert run(toy, schedule, seed) == Outcome(RIGHT, "")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "toy",
    [
        "exchange: no barrier before reading",
        "exchange: no barrier after reading",
        "exchange in a warp: no sync_warp",
        "stream: loose wait",
        "gemm: swapped B registers",
    ],
)
def test_a_fault_makes_the_result_wrong(toy: str, seed: int) -> None:
    assert run(toy, seed=seed) == Outcome(WRONG, "")
    assert run(toy, "greedy") == Outcome(WRONG, "")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("toy", "words"),
    {
        "ways: divergent shuffle": "a shuffle (cuda_host_toys.cu:",
        "ways: a shuffle on either side": "waits at a shuffle (cuda_host_toys.cu:",
        "ways: skipped barrier": "sync_threads (cuda_host_toys.cu:",
        "ways: left before a barrier": "left the kernel",
        "ways: two barriers": "it came to sync_threads (cuda_host_toys.cu:",
        "ways: more shared memory than launched": "takes 1024 bytes of shared memory",
        "places: shared overrun": "thread 77 (warp 2, lane 13): shared memory overrun: a store of "
        "4 bytes",
        "aligned: misaligned store": "thread 3 (warp 0, lane 3): misaligned global memory: a store "
        "of 16 bytes",
        "aligned: misaligned shared store": "misaligned shared memory: a store of 16 bytes",
        "aligned: misaligned copy": "misaligned global memory: cp_async16",
    }.items(),
)
def test_a_fault_is_an_error_that_says_where(toy: str, words: str, schedule: str) -> None:
    status, message = run(toy, schedule)
    assert status == ERROR
    assert words in message
    assert message.startswith("host run of ") and "_kernel<" in message
    assert ": block (0, 0, 0), thread " in message
    # What was left half-way does not disturb the next launch.
    assert run("exchange", schedule) == Outcome(RIGHT, "")


def test_a_launch_that_cannot_be_is_refused() -> None:
    library().mmfast_host_device(108, 80, 100)
    try:
        status, message = run("exchange")
    finally:
        library().mmfast_host_device(108, 80, 163 * 1024)
    assert status == ERROR
    assert "needs 512 bytes of shared memory per block; device 0 has 100" in message


def test_one_order_of_blocks_may_hide_a_race() -> None:
    """Which block comes last, and so is right by chance, is the seed's choice."""
    by_seed = [run("blocks: one element shared", seed=seed).status for seed in SEEDS]
    assert set(by_seed) == {RIGHT, WRONG}


def test_a_seed_gives_one_order() -> None:
    first = [run("blocks: one element shared", seed=seed) for seed in SEEDS]
    assert first == [run("blocks: one element shared", seed=seed) for seed in SEEDS]


# --- counters -----------------------------------------------------------------------------------


def counted(toy: str) -> dict[str, int]:
    """The counters of the one kernel that a toy launches."""
    library().mmfast_host_clear_counters()
    library().mmfast_host_counting(1)
    try:
        assert run(toy).status == RIGHT
    finally:
        library().mmfast_host_counting(0)
    (counters,) = json.loads(library().mmfast_host_counters()).values()
    return counters


@pytest.mark.parametrize(
    ("toy", "conflicts", "sectors"),
    [
        ("banks: 4 bytes, 1 apart", 0, 4),
        ("banks: 4 bytes, 2 apart", 1, 8),
        ("banks: 4 bytes, 32 apart", 31, 32),
        ("banks: 16 bytes, 1 apart", 0, 4),
        # Four quarters of the warp, in each 8 lanes that want the same 4 banks.
        ("banks: 16 bytes, 8 apart", 28, 32),
    ],
)
def test_bank_conflicts_of_stores(toy: str, conflicts: int, sectors: int) -> None:
    counters = counted(toy)
    assert counters["shared_stores"] == 1
    assert counters["shared_store_conflicts"] == conflicts
    assert counters["global_accesses"] == 1
    assert counters["global_sectors"] == sectors
    assert counters["global_sectors_least"] == 4


def test_bank_conflicts_of_ldmatrix() -> None:
    padded, packed = counted("gemm"), counted("gemm: packed rows")
    assert padded["ldmatrix"] == packed["ldmatrix"] == 2
    assert padded["mma"] == packed["mma"] == 1
    # Rows of 48 bytes: 8 of them lie in 8 different groups of 4 banks. Rows of 32 bytes: in 4.
    assert padded["ldmatrix_conflicts"] == 0
    assert packed["ldmatrix_conflicts"] == 4 + 2
    assert padded["copies"] == packed["copies"] == 2


def test_a_dry_run_only_writes_down() -> None:
    library().mmfast_host_clear_counters()
    assert library().mmfast_host_dry_run(1) == 0
    try:
        assert run("blocks").status == WRONG
    finally:
        assert library().mmfast_host_dry_run(0) == 1
    (launch,) = json.loads(library().mmfast_host_launches())
    assert "blocks_kernel<false>" in launch.pop("kernel")
    assert launch == {"grid": [8, 1, 1], "threads": 128, "shared": 0}
    assert json.loads(library().mmfast_host_counters()) == {}


# --- under sanitizers ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_a_sanitizer_has_nothing_to_say_of_faultless_kernels(mode: str) -> None:
    for toy in FAULTLESS:
        done = sanitized(mode, toy)
        assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_an_error_leaves_the_sanitizer_undisturbed(mode: str) -> None:
    done = sanitized(mode, "ways: skipped barrier")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 host run of")


@pytest.mark.parametrize(
    ("mode", "toy", "words"),
    [
        ("asan", "places: global read out of bounds", "heap-buffer-overflow"),
        ("asan", "places: global write out of bounds", "heap-buffer-overflow"),
        ("asan", "places: shared overrun by a plain store", "use-after-poison"),
        ("asan", "stream: loose wait", "use-after-poison"),
        ("tsan", "exchange: no barrier before reading", "data race"),
        ("tsan", "exchange: no barrier after reading", "data race"),
        ("tsan", "exchange in a warp: no sync_warp", "data race"),
        ("tsan", "blocks: one element shared", "data race"),
    ],
)
def test_a_sanitizer_reports_the_fault(mode: str, toy: str, words: str) -> None:
    done = sanitized(mode, toy)
    assert done.returncode != 0
    assert words in done.stderr
