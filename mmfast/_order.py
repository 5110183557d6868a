"""When CUDA C++ gives way to Triton: the size class of a call of `cross_attention`.

**Modelled, never measured.** The CUDA C++ kernels use the tensor instructions that every GPU since
Ampere has (`mma.sync`); Triton's use those of the architecture (wgmma on sm_90, tcgen05 on sm_100),
which multiply faster. What CUDA C++ has ahead is the host's side: a call of it costs the host some
microseconds less. So a call is theirs where

    FLOP / cuda_rate + CUDA_LAUNCH  <=  FLOP / triton_rate + TRITON_LAUNCH

with FLOP = 2 B H N M (D + Dv), and Triton's beyond. On sm_80, 86, 89 and 120 both use the same
instructions, so the host decides: CUDA C++. So it does for gates everywhere: memory limits them,
whoever asks for it.

The rule is for `auto` alone, and for calls that Triton can take. `use_backend` and MMFAST_BACKEND
go over it; `dispatch.explain("cross_attention", q, v)` says what it says of a call.
"""

from __future__ import annotations

from typing import NamedTuple

TRITON_LAUNCH = 14e-6
"""Seconds of a forward on the host, measured without a GPU (docs/triton-attention.md)."""
CUDA_LAUNCH = 6e-6
"""The same of CUDA C++, modelled: its way through torch, without a kernel, measured on the CPU (3
to 5 us on a busy machine) and a launch (2 us)."""


class Rate(NamedTuple):
    """Modelled TFLOP/s of the forward, long sequences (tools/gpu_model.py)."""

    cuda: float
    triton: float


# Compute capability (major) -> heads up to this wide -> rates. Of CUDA C++: tools/cuda_report.py
# --target sm_90 (sm_100) --source 'cross_attention_fwd_*'; of Triton: docs/triton-attention.md, and
# tools/attention_report.py for float32.
RATES: dict[int, dict[int, Rate]] = {
    9: {32: Rate(226, 298), 64: Rate(337, 448), 128: Rate(387, 596), 256: Rate(277, 598)},
    10: {32: Rate(270, 360), 64: Rate(361, 706), 128: Rate(410, 1043), 256: Rate(345, 1105)},
}
RATES_FLOAT32: dict[int, dict[int, Rate]] = {
    9: {64: Rate(43, 80), 128: Rate(44, 49), 256: Rate(42, 38)},
    10: {64: Rate(46, 73), 128: Rate(48, 52), 256: Rate(45, 46)},
}


def gives_way(
    major: int, B: int, H: int, N: int, M: int, D: int, Dv: int, float32: bool
) -> str | None:
    """Why Triton takes this call where it can, or None where CUDA C++ keeps it."""
    rates = (RATES_FLOAT32 if float32 else RATES).get(major)
    if rates is None:
        return None
    width = max(D, Dv)
    rate = next(rate for widest, rate in rates.items() if width <= widest)
    flop = 2 * B * H * N * M * (D + Dv)
    if flop * (1 / rate.cuda - 1 / rate.triton) <= (TRITON_LAUNCH - CUDA_LAUNCH) * 1e12:
        return None
    return (
        f"Triton's tensor instructions of compute capability {major} save more than its launch "
        f"costs at this size (modelled)"
    )
