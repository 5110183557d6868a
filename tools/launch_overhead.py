"""What a launch of a Triton kernel costs on the host, by Triton itself and by ours: no GPU needed.

`python tools/launch_overhead.py` compiles for sm_90 and launches into a driver that does nothing,
so what is timed is Python's work before the driver is called: finding the compiled kernel. The two
ways take turns; the minimum of the rounds is printed, in microseconds. `--docs` puts it, with this
machine's name, into docs/triton-kernels.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from mmfast.kernels import _compiled, _launch
from mmfast.kernels.gated_residual import gated_residual_fwd
from stub_gpu import stub_gpu
from torch import Tensor

from mmfast.planning.calibration import processor

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "triton-kernels.md"
MARK = "<!-- tools/launch_overhead.py --docs -->"


class Call(NamedTuple):
    """One launch."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]


class Cost(NamedTuple):
    """Microseconds a launch: Triton's own way, ours; the same with shapes that were not seen."""

    bare: float
    ours: float
    bare_new: float
    ours_new: float


CONSTANTS = {
    "D": 64, "DV": 64, "BLOCK_N": 128, "BLOCK_M": 64, "CAUSAL": False, "AT_MOST": False,
    "PACKED": False, "MASK_DIMS": 0, "BIAS_DIMS": 7, "GATE": 0, "DROPOUT": False, "VEC": 8,
    "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True,
}  # fmt: skip


@triton.jit(do_not_specialize=["B", "H", "N", "M"])
def strides_in_tuples_kernel(
    q, k, v, out, lse, kv_lens, q_lens, q_segments, kv_segments, mask, bias, gate, seed,
    q_strides, k_strides, v_strides, out_strides, mask_strides, bias_strides, gate_strides,
    B, H, N, M, scale, keep,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, AT_MOST: tl.constexpr, PACKED: tl.constexpr, MASK_DIMS: tl.constexpr,
    BIAS_DIMS: tl.constexpr, GATE: tl.constexpr, DROPOUT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Arguments like those of an attention kernel; it writes one number."""
    tl.store(out + tl.program_id(0) * out_strides[0], (N * scale).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=[
    *[f"{name}_{dim}" for name in ("q", "k", "v", "out", "mask", "bias", "gate") for dim in "bhn"],
    "B", "H", "N", "M",
])  # fmt: skip
def strides_one_by_one_kernel(
    q, k, v, out, lse, kv_lens, q_lens, q_segments, kv_segments, mask, bias, gate, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, gate_b, gate_h, gate_n,
    B, H, N, M, scale, keep,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, AT_MOST: tl.constexpr, PACKED: tl.constexpr, MASK_DIMS: tl.constexpr,
    BIAS_DIMS: tl.constexpr, GATE: tl.constexpr, DROPOUT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The same with integers that are not specialised."""
    tl.store(out + tl.program_id(0) * out_b, (N * scale).to(out.dtype.element_ty))


def strides_in_tuples(N: int = 128) -> Call:
    """13 tensors of which 6 are None, 7 tuples of strides, 6 scalars, 12 constants, 3 options."""
    args = (*_tensors(), *_strides(N), 8, 12, N, 257, 0.125, 1.0)
    return Call(strides_in_tuples_kernel, N, args, CONSTANTS)


def strides_one_by_one(N: int = 128) -> Call:
    """The same, 21 strides."""
    strides = itertools.chain.from_iterable(_strides(N))
    args = (*_tensors(), *strides, 8, 12, N, 257, 0.125, 1.0)
    return Call(strides_one_by_one_kernel, N, args, CONSTANTS)


def _tensors() -> tuple[Tensor | None, ...]:
    wide = [torch.empty(64, dtype=torch.bfloat16) for _ in range(4)]
    lse, lens = torch.empty(64), torch.empty(64, dtype=torch.int32)
    return (*wide, lse, lens, None, None, None, None, wide[0], None, None)


def _strides(N: int) -> tuple[tuple[int, ...], ...]:
    return tuple((N * 96 * i, N * 8 * i, 8 * i) for i in range(1, 8))


def gated_residual_call(N: int = 512) -> Call:
    """What `gated_residual_fwd` launches with a scalar gate: rows of padded tensors."""
    launches: list[Call] = []
    run, _launch._run = _launch._run, lambda *launch: launches.append(Call(*launch))
    try:
        x, y, gate = _rows(N), _rows(N), torch.empty(1, 1, 1)
        gated_residual_fwd(x, y, gate, None, 0)
    finally:
        _launch._run = run
    return launches[0]


def _rows(N: int) -> Tensor:
    """`[8, N, 1024]` with room after each item, so that items are not merged."""
    return torch.empty(8, N + 8, 1024, dtype=torch.bfloat16)[:, :N]


CALLS: dict[str, Callable[..., Call]] = {
    "gated_residual_fwd": gated_residual_call,
    "attention, strides in tuples": strides_in_tuples,
    "attention, strides one by one": strides_one_by_one,
}


def measure(make: Callable[..., Call], *, rounds: int = 60, launches: int = 200) -> Cost:
    """The minimum over interleaved rounds of launches like the one that `make` gives."""
    call, best = make(), Cost(1e9, 1e9, 1e9, 1e9)
    with stub_gpu(record=False):
        _compiled.forget()
        for number in range(rounds):
            first = 1024 + 1024 * number
            shapes = [make(N) for N in range(first, first + 1024, 16)]
            _ours([call, *shapes[:1]])
            found = (
                _bare([call] * launches), _ours([call] * launches), _bare(shapes[1::2]),
                _ours(shapes[2::2]),
            )  # fmt: skip
            best = Cost(*map(min, best, found))
        _compiled.forget()
    return best


def _bare(calls: list[Call]) -> float:
    start = time.perf_counter()
    for kernel, programs, args, constants in calls:
        kernel[(programs,)](*args, **constants)
    return (time.perf_counter() - start) / len(calls) * 1e6


def _ours(calls: list[Call]) -> float:
    start = time.perf_counter()
    for kernel, programs, args, constants in calls:
        _launch.launch(kernel, programs, *args, **constants)
    return (time.perf_counter() - start) / len(calls) * 1e6


def table() -> str:
    """The figures as a table of Markdown, under a line that names the machine."""
    rows = [
        f"Triton {triton.__version__}, Python {sys.version.split()[0]}, {processor()}, "
        f"microseconds a launch, minimum of 60 rounds:\n",
        "| kernel | arguments | `kernel[grid](...)` | `launch` | new shapes: `kernel[grid](...)` | "
        "`launch` |",
        "|---|---|---|---|---|---|",
    ]
    for name, make in CALLS.items():
        call, cost = make(), measure(make)
        count = len(call.args) + len(call.constants)
        rows.append(f"| {name} | {count} | " + " | ".join(f"{value:.1f}" for value in cost) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", action="store_true", help="into docs/triton-kernels.md")
    options = parser.parse_args()
    text = table()
    print(text)
    if options.docs:
        before, _, rest = DOCS.read_text().partition(MARK)
        DOCS.write_text(before + MARK + "\n" + text + MARK + rest.partition(MARK)[2])


if __name__ == "__main__":
    main()
