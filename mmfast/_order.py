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
    """Modelled TFLOP/s of the forward in 16 bits, long sequences (tools/gpu_model.py)."""

    cuda: float
    triton: float


# Compute capability (major) -> heads up to this wide -> rates. Of CUDA C++: tools/cuda_report.py
# --target sm_90 (sm_100) --source 'cross_attention_fwd_bf16*'; of Triton: docs/triton-attention.md.
RATES: dict[int, dict[int, Rate]] = {
    9: {32: Rate(226, 298), 64: Rate(337, 448), 128: Rate(387, 596), 256: Rate(277, 598)},
    10: {32: Rate(270, 360), 64: Rate(361, 706), 128: Rate(410, 1043), 256: Rate(345, 1105)},
}
FLOAT32_PARTS = 6
"""float32 is three products at half the rate, for both."""


def gives_way(
    major: int, B: int, H: int, N: int, M: int, D: int, Dv: int, float32: bool
) -> str | None:
    """Why Triton takes this call where it can, or None where CUDA C++ keeps it."""
    rates = RATES.get(major)
    if rates is None:
        return None
    width = max(D, Dv)
    rate = rates[32 if width <= 32 else 64 if width <= 64 else 128 if width <= 128 else 256]
    flop = 2 * B * H * N * M * (D + Dv) * (FLOAT32_PARTS if float32 else 1)
    if flop * (1 / rate.cuda - 1 / rate.triton) <= (TRITON_LAUNCH - CUDA_LAUNCH) * 1e12:
        return None
    return (
        f"Triton's tensor instructions of compute capability {major} save more than its launch "
        f"costs at this size (modelled)"
    )
