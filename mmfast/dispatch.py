"""THE table: which backends an op has, in order of preference, and why one cannot take a call.

A backend is offered by its `why_not(...)`: None means it takes the call, a sentence says why it
cannot. `auto` takes the first row without an objection. A backend asked for by name, with
`use_backend` or the environment variable `MMFAST_BACKEND`, never falls back silently: the error
holds every backend's reason. `python -m mmfast info` prints the same table.

This is the only module that reaches for the compiled library or the Triton kernels, and it does so
when the first call needs them, never at import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import reference

BACKENDS = ("cpu", "reference")


class Kernels(NamedTuple):
    """The four torch ops of a compiled `cross_attention`."""

    fwd: Any
    bwd: Any
    probs: Any
    probs_bwd: Any


class Row(NamedTuple):
    """One backend of one op. `why_not` takes what `select` is given for that op.

    `launcher()` gives the `Kernels` of a compiled backend; for the reference it is the function
    itself, whose derivatives are those of the torch functions that it is composed of (`composed`).
    """

    backend: str
    why_not: Callable[..., str | None]
    launcher: Callable[..., Any]
    composed: bool = False


# --- the compiled library ---------------------------------------------------------------------

_kernels: Kernels | None = None
_missing: str | None = None  # why the library is not there, once that is known
_when_loaded: list[Callable[[Kernels], None]] = []


def when_loaded(function: Callable[[Kernels], None]) -> None:
    """Call `function(kernels)` once the compiled library is there: registrations on its ops."""
    _when_loaded.append(function)
    if _kernels is not None:
        function(_kernels)


def _gather() -> Kernels:
    ops = torch.ops.mmfast
    return Kernels(
        ops.cross_attention_fwd.default,
        ops.cross_attention_bwd.default,
        ops.cross_attention_probs.default,
        ops.cross_attention_probs_bwd.default,
    )


def constant_when_compiled(function: Any) -> Any:
    """`torch.compiler.assume_constant_result`, without its import of dynamo (1.4 s) at our import.

    That decorator sets this one attribute; tests of compiled calls in fresh processes depend on it.
    """
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled
def _load() -> str | None:
    """Load the compiled library if that has not been tried; the reason when it is not there."""
    global _kernels, _missing
    if _kernels is None and _missing is None:
        from mmfast import _library

        status = _library.status()
        if status.loaded:
            _kernels = _gather()
            for function in _when_loaded:
                function(_kernels)
        else:
            _missing = status.reason or "the compiled library is not there"
    return None if _kernels is not None else _missing


def _compiled_kernels() -> Kernels:
    # While torch.compile traces, what `_load` has just stored is not to be seen.
    if torch.compiler.is_compiling() or _kernels is None:
        return _gather()
    return _kernels


# --- why not ----------------------------------------------------------------------------------

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPU_MAX_WIDTH = 512


def _cpu_why_not(q: Tensor, v: Tensor, derivatives: str | None = None) -> str | None:
    """`derivatives` names a kind of derivative that only composed torch functions have."""
    if torch.compiler.is_compiling() or _kernels is None:
        missing = _load()
        if missing is not None:
            return missing
    if not q.is_cpu:
        return f"q is on {q.device}, this backend takes CPU tensors"
    if q.dtype not in _CPU_DTYPES:
        return f"q has dtype {q.dtype}, this backend takes float32, bfloat16, float16, float64"
    if q.size(3) > _CPU_MAX_WIDTH or v.size(3) > _CPU_MAX_WIDTH:
        return f"D={q.size(3)}, Dv={v.size(3)}: head widths go up to {_CPU_MAX_WIDTH} here"
    if derivatives is not None:
        return f"{derivatives} needs an op composed of torch functions"
    return None


def _reference_why_not(q: Tensor, v: Tensor, derivatives: str | None = None) -> str | None:
    return None


TABLE: dict[str, tuple[Row, ...]] = {
    "cross_attention": (
        Row("cpu", _cpu_why_not, _compiled_kernels),
        Row("reference", _reference_why_not, reference.cross_attention, composed=True),
    ),
}


# --- the choice -------------------------------------------------------------------------------

# Process-wide, as torch.nn.attention.sdpa_kernel is: torch.compile guards on it.
_forced: str = os.environ.get("MMFAST_BACKEND", "") or "auto"
_forced_by: str = "MMFAST_BACKEND"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every op runs on the backend `name`, or raises saying why it cannot.

    Args:
        name: "reference", "cpu", or "auto" (the first backend that can take the call).

    The choice is process-wide, not per thread, and a backward runs on the backend that its forward
    ran on. Raises ValueError for an unknown name.
    """
    global _forced, _forced_by
    if name != "auto" and name not in BACKENDS:
        raise ValueError(_unknown("use_backend", name))
    before = _forced, _forced_by
    _forced, _forced_by = name, "use_backend"
    try:
        yield
    finally:
        _forced, _forced_by = before


def current_backend() -> str:
    """The name asked for: "auto", or a backend's."""
    return _forced


def select(op: str, *call: Any) -> Row:
    """The row of `TABLE[op]` that takes this call; `call` is what its `why_not` take.

    Raises RuntimeError, with every backend's reason, when the backend asked for by name cannot.
    """
    if _forced == "auto":
        for row in TABLE[op]:
            if row.why_not(*call) is None:
                return row
    for row in TABLE[op]:
        if row.backend == _forced and row.why_not(*call) is None:
            return row
    raise _refusal(op, call)


def _refusal(op: str, call: tuple[Any, ...]) -> Exception:
    if _forced != "auto" and _forced not in BACKENDS:
        return ValueError(_unknown(_forced_by, _forced))
    reasons = "; ".join(
        f"{row.backend}: {row.why_not(*call) or 'can take this call'}" for row in TABLE[op]
    )
    return RuntimeError(
        f"{op}: the backend {_forced!r} was asked for by {_forced_by} and cannot take this call "
        f"({reasons}); ask for 'auto' or for a backend that can"
    )


def _unknown(origin: str, name: str) -> str:
    known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
    return f"{origin}: unknown backend {name!r}; it must be one of {known}"


class Offer(NamedTuple):
    """A line of `explain`: `reason` is None where the backend can be used on this machine."""

    op: str
    backend: str
    reason: str | None


def explain(op: str | None = None, *call: Any) -> list[Offer]:
    """Every backend of `op` (of all ops without it), in order, with its reason why not.

    Without a `call` the question is asked for a small float32 CPU problem.
    """
    if not call:
        probe = torch.zeros(1, 1, 1, 16)
        call = (probe, probe)
    return [
        Offer(name, row.backend, row.why_not(*call))
        for name, rows in TABLE.items()
        if op is None or name == op
        for row in rows
    ]
