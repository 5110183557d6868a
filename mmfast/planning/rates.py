"""How long a piece of work takes: rates that were measured on this machine, or assumed ones.

The time of a piece is linear in what it has, with coefficients of its kind and dtype::

    seconds = call * calls + flop * flops + element * elements + score * scores + byte * bytes

`element` is what few rows pay: reading and laying out an operand that many rows would share. The
defaults were fitted on one core of a server processor (docs/planner.md) and are carried over to
another by its instruction set: which plan is the cheapest depends on their ratios alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from mmfast.planning import calibration
from mmfast.planning.costs import Piece


class Coefficients(NamedTuple):
    """Seconds of a call, a FLOP, an element of the shared operand, a score, a byte moved."""

    call: float = 0.0
    flop: float = 0.0
    element: float = 0.0
    score: float = 0.0
    byte: float = 0.0


@dataclass(frozen=True)
class Rates:
    """The coefficients of each kind of work for one dtype, and where they come from.

    `overlaps`: the host only queues the work, so that calls cost nothing while the device is busy.
    """

    kinds: Mapping[str, Coefficients]
    source: str
    overlaps: bool = False

    def seconds(self, work: Iterable[Piece]) -> float:
        """The modelled time of the pieces together."""
        host = device = 0.0
        for piece in work:
            c = self.kinds[piece.kind]
            host += c.call * piece.calls
            device += (
                c.flop * piece.flops
                + c.element * piece.elements
                + c.score * piece.scores
                + c.byte * piece.bytes
            )
        return max(host, device) if self.overlaps else host + device


_NS = 1e-9
_CPU: dict[str, dict[str, Coefficients]] = {
    "float32": {
        "gemm": Coefficients(3e3 * _NS, 0.0112 * _NS, 0.25 * _NS),
        "attention": Coefficients(12e3 * _NS, 0.0100 * _NS, 0.28 * _NS, 0.14 * _NS),
        "attention_backward": Coefficients(60e3 * _NS, 0.0092 * _NS, 1.3 * _NS, 0.9 * _NS),
        "shared": Coefficients(14e3 * _NS, 0.0128 * _NS, score=1.4 * _NS),
        "shared_backward": Coefficients(50e3 * _NS, 0.0126 * _NS, 0.107 * _NS, 0.6 * _NS),
        "move": Coefficients(3e3 * _NS, byte=0.03 * _NS),
        "step": Coefficients(1e3 * _NS),
    },
    "bfloat16": {
        "gemm": Coefficients(17e3 * _NS, 0.0049 * _NS, 0.15 * _NS),
        "attention": Coefficients(12e3 * _NS, 0.0053 * _NS, 0.15 * _NS, 0.18 * _NS),
        "attention_backward": Coefficients(55e3 * _NS, 0.0055 * _NS, 0.9 * _NS, 0.4 * _NS),
        "shared": Coefficients(12e3 * _NS, 0.0079 * _NS, 0.008 * _NS, 0.6 * _NS),
        "shared_backward": Coefficients(46e3 * _NS, 0.0071 * _NS, 0.067 * _NS, 0.9 * _NS),
        "move": Coefficients(3e3 * _NS, byte=0.03 * _NS),
        "step": Coefficients(1e3 * _NS),
    },
}  # fmt: skip
"""Of one core with AVX-512 and AVX512_BF16 at 3.5 GHz."""


def rates_for(dtype: torch.dtype, device: torch.device, threads: int) -> Rates:
    """The rates of a dtype on a device: measured by `python -m mmfast tune`, or assumed.

    float16 has bfloat16's, float64 twice float32's seconds. `threads` counts on a CPU alone.
    """
    index = device.index if device.type == "cuda" else None
    return _rates_for(dtype, device.type, index, threads)


@lru_cache(maxsize=64)
def _rates_for(dtype: torch.dtype, kind: str, index: int | None, threads: int) -> Rates:
    name = "bfloat16" if dtype in (torch.bfloat16, torch.float16) else "float32"
    slower = 2.0 if dtype == torch.float64 else 1.0
    device = torch.device(kind) if index is None else torch.device(kind, index)
    found = _measured(kind, index)
    measured = found.rates.get(name)
    if measured is not None:
        spread = slower * found.threads / threads if kind == "cpu" else slower
        kinds = {k: _scaled(Coefficients(*row), spread) for k, row in measured.items()}
        return Rates(kinds, f"measured: {found.path}", kind != "cpu")
    kinds = _assumed_cpu(name, slower / threads) if kind == "cpu" else _assumed_gpu(name, device)
    return Rates(kinds, "assumed; python -m mmfast tune measures them", kind != "cpu")


@lru_cache(maxsize=16)
def _measured(kind: str, index: int | None) -> calibration.Found:
    """The file of a device, read once. Warns of one that somebody else may have written."""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        return calibration.Found({})
    device = torch.device(kind) if index is None else torch.device(kind, index)
    found = calibration.read(calibration.device_of(device))
    if found.unsafe:
        warnings.warn(f"mmfast: rates of plans are not used: {found.why_not}", stacklevel=2)
    return found


def forget() -> None:
    """Read the files again. What was chosen by them is `choice.forget`'s."""
    _measured.cache_clear()
    _rates_for.cache_clear()


def _scaled(c: Coefficients, factor: float) -> Coefficients:
    """The work is `factor` times as long, a call is as it was."""
    return Coefficients(c.call, *(value * factor for value in c[1:]))


def _assumed_cpu(name: str, factor: float) -> dict[str, Coefficients]:
    """This processor's instructions against those of the processor that the defaults are of."""
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    wide = torch.backends.cpu.get_cpu_capability()
    slower = {"AVX512": 1.0, "AVX2": 1.8}.get(wide, 4.0)
    kinds = {k: _scaled(c, factor * slower) for k, c in _CPU[name].items()}
    if name == "bfloat16" and able.get("amx_bf16"):
        # The tile units multiply seven times as fast; nothing else becomes faster.
        kinds = {k: c._replace(flop=c.flop / 7) for k, c in kinds.items()}
    elif name == "bfloat16" and not able.get("avx512_bf16"):
        # Converted to float32 and back: no product is faster than in float32.
        kinds = {k: c._replace(flop=c.flop * 2.5) for k, c in kinds.items()}
    return kinds


def _assumed_gpu(name: str, device: torch.device) -> dict[str, Coefficients]:
    """**Modelled, not measured**: products and memory of an A100 or H100, by compute capability."""
    here = device.type == "cuda" and torch.cuda.is_available()
    recent = here and torch.cuda.get_device_capability(device) >= (9, 0)
    flop, byte = (1 / 450e12, 1 / 2.6e12) if recent else (1 / 180e12, 1 / 1.4e12)
    size = 2
    if name == "float32":
        flop, size = flop * (9 if recent else 12), 4
    gemm = Coefficients(8e-6, flop, size * byte)
    forward = Coefficients(14e-6, 1.6 * flop, size * byte)
    backward = Coefficients(30e-6, 2.2 * flop, 3 * size * byte)
    return {
        "gemm": gemm,
        "attention": forward,
        "attention_backward": backward,
        "shared": forward,
        "shared_backward": backward,
        "move": Coefficients(8e-6, byte=byte),
        "step": Coefficients(1e-6),
    }
