"""THE table: which backends an op has, in order of preference, and why one cannot take a call.

A backend is offered by its `why_not(...)`: None means it takes the call, a sentence says why it
cannot. `auto` takes the first row without an objection. A backend asked for by name, with
`use_backend` or the environment variable `MMFAST_BACKEND`, never falls back silently: the error
holds every backend's reason. `python -m mmfast info` prints the same table.

This is the only module that reaches for the compiled library or the Triton kernels, and it does so
when the first call needs them, never at import.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import reference

BACKENDS = ("cpu", "triton", "reference")

GATES = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
"""The ops that have one forward and one backward kernel."""


class CrossAttentionKernels(NamedTuple):
    """The four torch ops of `cross_attention`, and the same below the dispatcher, as of gates."""

    fwd: Any
    bwd: Any
    probs: Any
    probs_bwd: Any
    direct_fwd: Callable[..., Any]
    direct_bwd: Callable[..., Any]
    direct_probs: Callable[..., Any]
    direct_probs_bwd: Callable[..., Any]


class GateKernels(NamedTuple):
    """The two torch ops of a gate, and the same below the dispatcher: what eager calls take."""

    fwd: Any
    bwd: Any
    direct_fwd: Callable[..., Any]
    direct_bwd: Callable[..., Any]


class Row(NamedTuple):
    """One backend of one op. `why_not` takes what `select` is given for that op.

    `launcher()` gives the kernels of a compiled backend; for the reference it is the function
    itself, whose derivatives are those of the torch functions that it is composed of (`composed`).
    """

    backend: str
    why_not: Callable[..., str | None]
    launcher: Callable[..., Any]
    composed: bool = False


# --- the torch ops ----------------------------------------------------------------------------

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_when_defined: dict[str, Callable[[Any], None]] = {}
_defined: set[str] = set()


def when_defined(op: str, function: Callable[[Any], None]) -> None:
    """Call `function(torch ops)` once the torch ops of `op` are there: registrations on them."""
    _when_defined[op] = function
    if op in _defined:
        function(_torch_ops(op))


def _parts(op: str) -> tuple[str, ...]:
    return ("fwd", "bwd", "probs", "probs_bwd") if op == "cross_attention" else ("fwd", "bwd")


def _torch_ops(op: str) -> tuple[Any, ...]:
    """What `torch.ops.mmfast` has of this op, one for each of its parts."""
    return tuple(getattr(torch.ops.mmfast, f"{op}_{part}").default for part in _parts(op))


def _bundle(op: str, through_torch: Iterable[Any], direct: Iterable[Any]) -> Any:
    """`CrossAttentionKernels` or `GateKernels`."""
    kernels = CrossAttentionKernels if op == "cross_attention" else GateKernels
    return kernels(*through_torch, *direct)


def _note_defined(ops: Iterable[str]) -> None:
    for op in ops:
        if op not in _defined:
            _defined.add(op)
            if op in _when_defined:
                _when_defined[op](_torch_ops(op))


def constant_when_compiled(function: Any) -> Any:
    """`torch.compiler.assume_constant_result`, without its import of dynamo (1.4 s) at our import.

    That decorator sets this one attribute; tests of compiled calls in fresh processes depend on it.
    """
    function._dynamo_marked_constant = True
    return function


# --- the compiled library ---------------------------------------------------------------------

_kernels: dict[str, Any] | None = None
_missing: str | None = None  # why the library is not there, once that is known


@constant_when_compiled
def _load() -> str | None:
    """Load the compiled library if that has not been tried; the reason when it is not there."""
    global _kernels, _missing
    if _kernels is None and _missing is None:
        from mmfast import _library

        status = _library.status()
        if status.loaded:
            _kernels = {op: _compiled(op) for op in ("cross_attention", *GATES)}
            _note_defined(_kernels)
        else:
            _missing = status.reason or "the compiled library is not there"
    return None if _kernels is not None else _missing


def _compiled(op: str) -> Any:
    found = _torch_ops(op)
    return _bundle(op, found, [partial(one.redispatch, _CPU) for one in found])


def _compiled_kernels(op: str) -> Callable[[], Any]:
    def launcher() -> Any:
        # While torch.compile traces, what `_load` has just stored is not to be seen.
        if torch.compiler.is_compiling() or _kernels is None:
            return _bundle(op, _torch_ops(op), _torch_ops(op))
        return _kernels[op]

    return launcher


# --- Triton -----------------------------------------------------------------------------------

_triton_kernels: dict[str, Any] | None = None
_triton_missing: str | None = None


def _interprets() -> bool:
    """Triton's own switch: its kernels then run on the CPU, in Python, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unusable_triton() -> str | None:
    """Why the installed triton cannot compile the kernels; nothing is imported for that."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # built into something else: its own version says nothing
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton {version} is too old; pip install 'triton>={oldest}'"
    return None


@constant_when_compiled
@lru_cache(maxsize=16)
def _unusable_gpu(device: torch.device) -> str | None:
    """Why the kernels cannot run on this CUDA device."""
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_GPU:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability "
                f"{capability[0]}.{capability[1]}; this backend takes 8.0 (Ampere) and newer"
            )
    return None


@constant_when_compiled
def _load_triton() -> str | None:
    """Bring the Triton kernels in if that has not been tried; the reason when they are absent."""
    global _triton_kernels, _triton_missing
    if _triton_kernels is None and _triton_missing is None:
        _triton_missing = _unusable_triton()
        if _triton_missing is not None:
            return _triton_missing
        _load()  # where the compiled library defines the torch ops, they are defined by it
        from mmfast.kernels import _torch_ops as registration

        registration.register()
        _note_defined(registration.OPS)
        _triton_kernels = {op: _triton(op, registration.OPS[op]) for op in registration.OPS}
    return None if _triton_kernels is not None else _triton_missing


def _triton(op: str, launchers: Mapping[str, Callable[..., Any]]) -> Any:
    direct = [launchers[part] for part in _parts(op)]
    return _bundle(op, direct if _interprets() else _torch_ops(op), direct)


def _triton_launcher(op: str) -> Callable[[], Any]:
    def launcher() -> Any:
        if torch.compiler.is_compiling() or _triton_kernels is None:
            return _bundle(op, _torch_ops(op), _torch_ops(op))
        return _triton_kernels[op]

    return launcher


# --- why not ----------------------------------------------------------------------------------

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OLDEST_TRITON = (3, 8)  # those before do not compile named tuples of constants
_OLDEST_GPU = (8, 0)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_MAX_WIDTH = 512
_TRITON_MAX_WIDTH = 256
MAX_MODALITIES = 64


def _cpu_why_not(q: Tensor, v: Tensor, derivatives: str | None = None) -> str | None:
    """`derivatives` names a kind of derivative that only composed torch functions have."""
    reason = _gate_cpu_why_not(q, derivatives)
    return reason if reason is not None else _too_wide(q, v, _CPU_MAX_WIDTH)


def _too_wide(q: Tensor, v: Tensor, widest: int) -> str | None:
    if q.size(3) > widest or v.size(3) > widest:
        return f"D={q.size(3)}, Dv={v.size(3)}: head widths go up to {widest} here"
    return None


def _triton_attention_why_not(q: Tensor, v: Tensor, derivatives: str | None = None) -> str | None:
    reason = _triton_why_not(q, derivatives)
    return reason if reason is not None else _too_wide(q, v, _TRITON_MAX_WIDTH)


def _gate_cpu_why_not(x: Tensor, derivatives: str | None = None) -> str | None:
    if torch.compiler.is_compiling() or _kernels is None:
        missing = _load()
        if missing is not None:
            return missing
    if not x.is_cpu:
        return f"the data is on {x.device}, this backend takes CPU tensors"
    if x.dtype not in _CPU_DTYPES:
        return f"the data is {x.dtype}, this backend takes float32, bfloat16, float16, float64"
    return None if derivatives is None else _composed(derivatives)


def _triton_why_not(x: Tensor, derivatives: str | None = None) -> str | None:
    interprets = _interprets()
    if not (x.is_cuda or (interprets and x.is_cpu)):
        return f"the data is on {x.device}, this backend takes CUDA tensors"
    if interprets and (torch.compiler.is_compiling() or x.dtype == torch.bfloat16):
        return "TRITON_INTERPRET=1: the interpreter takes eager float32 and float16 calls"
    if x.dtype not in _TRITON_DTYPES:
        return f"the data is {x.dtype}, this backend takes float32, bfloat16, float16"
    if derivatives is not None:
        return _composed(derivatives)
    reason = _unusable_gpu(x.device) if x.is_cuda else None
    return reason if reason is not None else _load_triton()


def _composed(derivatives: str) -> str:
    return f"{derivatives} needs an op composed of torch functions"


def _few_modalities(
    why_not: Callable[[Tensor, str | None], str | None],
) -> Callable[..., str | None]:
    def both(x: Tensor, derivatives: str | None = None, K: int = 1) -> str | None:
        if K > MAX_MODALITIES:
            return f"K={K}: up to {MAX_MODALITIES} modalities are fused here"
        return why_not(x, derivatives)

    return both


def _reference_why_not(*call: Any) -> str | None:
    return None


def _gate_rows(op: str) -> tuple[Row, ...]:
    cpu, triton = _gate_cpu_why_not, _triton_why_not
    if op == "fuse":
        cpu, triton = _few_modalities(cpu), _few_modalities(triton)
    return (
        Row("cpu", cpu, _compiled_kernels(op)),
        Row("triton", triton, _triton_launcher(op)),
        Row("reference", _reference_why_not, getattr(reference, op), composed=True),
    )


TABLE: dict[str, tuple[Row, ...]] = {
    "cross_attention": (
        Row("cpu", _cpu_why_not, _compiled_kernels("cross_attention")),
        Row("triton", _triton_attention_why_not, _triton_launcher("cross_attention")),
        Row("reference", _reference_why_not, reference.cross_attention, composed=True),
    ),
    **{op: _gate_rows(op) for op in GATES},
}


# --- the choice -------------------------------------------------------------------------------

# Process-wide, as torch.nn.attention.sdpa_kernel is: torch.compile guards on it.
_forced: str = os.environ.get("MMFAST_BACKEND", "") or "auto"
_forced_by: str = "MMFAST_BACKEND"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every op runs on the backend `name`, or raises saying why it cannot.

    Args:
        name: "cpu", "triton", "reference", or "auto" (the first that can take the call).

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
    known = {row.backend: row.why_not(*call) or "can take this call" for row in TABLE[op]}
    known.setdefault(_forced, "there is none for this op")
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in known.items())
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
    return [
        Offer(name, row.backend, row.why_not(*(call or _probe(name))))
        for name, rows in TABLE.items()
        if op is None or name == op
        for row in rows
    ]


def _probe(op: str) -> tuple[Tensor, ...]:
    x = torch.zeros(1, 1, 1, 16)
    return (x, x) if op == "cross_attention" else (x,)
