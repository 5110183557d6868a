"""THE table: which backends an op has, in order of preference, and why one cannot take a call.

A backend is offered by its `why_not(...)`: None means it takes the call, a sentence says why it
cannot. `auto` takes the first row without an objection, unless that one yields to a later
one (CUDA C++ to Triton where that is faster: mmfast/_order.py). A backend asked for by name, with
`use_backend` or the environment variable `MMFAST_BACKEND`, never falls back silently: the error
holds every backend's reason. `python -m mmfast info` prints the same table.

This is the only module that reaches for the compiled library or the Triton kernels, and it does so
when the first call needs them, never at import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import _gpus, _order, reference
from mmfast._torch_ops import (
    GATES,
    OPS,
    CrossAttentionKernels,
    GateKernels,
    asked_once,
    bundle,
    compiled,
    constant_when_compiled,
    has_ops,
    note_defined,
    parts,
    torch_ops,
    when_defined,
)

__all__ = [
    "BACKENDS",
    "GATES",
    "TABLE",
    "CrossAttentionKernels",
    "GateKernels",
    "Offer",
    "Row",
    "constant_when_compiled",
    "current_backend",
    "explain",
    "select",
    "use_backend",
    "when_defined",
]

BACKENDS = ("cpu", "cuda", "triton", "reference")


class Row(NamedTuple):
    """One backend of one op. `why_not` takes what `select` is given for that op.

    `launcher()` gives the kernels of a compiled backend; for the reference it is the function
    itself, whose derivatives are those of the torch functions that it is composed of (`composed`).
    `shares(q)`: this attention takes keys that are the values too without v; others get them twice.
    `yields` says why a later row is the better one for a call that this one could take: `auto` then
    goes on, by name it counts for nothing.
    """

    backend: str
    why_not: Callable[..., str | None]
    launcher: Callable[..., Any]
    composed: bool = False
    yields: Callable[..., str | None] = lambda *call: None
    shares: Callable[[Tensor], bool] = lambda q: False


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
            _kernels = {op: compiled(op, "mmfast", torch._C.DispatchKey.CPU) for op in OPS}
            note_defined(OPS)
        else:
            _missing = status.reason or "the compiled library is not there"
    return None if _kernels is not None else _missing


def _compiled_kernels(op: str) -> Callable[[], Any]:
    def launcher() -> Any:
        # While torch.compile traces, what `_load` has just stored is not to be seen.
        if torch.compiler.is_compiling() or _kernels is None:
            return bundle(op, torch_ops(op), torch_ops(op))
        return _kernels[op]

    return launcher


# --- its CUDA kernels ---------------------------------------------------------------------------


class Home(NamedTuple):
    """Where ops are registered, and for tensors of which device."""

    namespace: str
    key: torch._C.DispatchKey
    device: str


_cuda_home = Home("mmfast_cuda", torch._C.DispatchKey.CUDA, "cuda")
_cuda_kernels: dict[str, Any] | None = None
_cuda_missing: str | None = None


@constant_when_compiled
def _load_cuda() -> str | None:
    """Find the CUDA kernels of the compiled library; the reason when there are none to be used."""
    global _cuda_kernels, _cuda_missing
    if _cuda_kernels is None and _cuda_missing is None:
        _cuda_missing = _load() or _unusable_cuda()
        if _cuda_missing is None:
            namespace, key, _ = _cuda_home
            note_defined(OPS, namespace)
            _cuda_kernels = {op: compiled(op, namespace, key) for op in OPS}
    return None if _cuda_kernels is not None else _cuda_missing


def _unusable_cuda() -> str | None:
    """Why the loaded library has no CUDA kernels that this torch can use."""
    from mmfast import _library

    if not all(has_ops(op, _cuda_home.namespace) for op in OPS):
        return f"the compiled library has no CUDA kernels; {_library.HOW_TO_GET_CUDA}"
    if _cuda_home.device == "cuda" and not _library.has_cuda_streams():
        return "this torch is a build without CUDA; install one with it"
    return None


def _cuda_launcher(op: str) -> Callable[[], Any]:
    def launcher() -> Any:
        if torch.compiler.is_compiling() or _cuda_kernels is None:
            found = torch_ops(op, _cuda_home.namespace)
            return bundle(op, found, found)
        return _cuda_kernels[op]

    return launcher


# --- Triton -----------------------------------------------------------------------------------

_triton_kernels: dict[str, Any] | None = None
_triton_missing: str | None = None


def _interprets() -> bool:
    """Triton's own switch: its kernels then run on the CPU, in Python, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_when_compiled
def _load_triton() -> str | None:
    """Bring the Triton kernels in if that has not been tried; the reason when they are absent."""
    global _triton_kernels, _triton_missing
    if _triton_kernels is None and _triton_missing is None:
        _triton_missing = _gpus.unusable_triton()
        if _triton_missing is not None:
            return _triton_missing
        _load()  # where the compiled library defines the torch ops, they are defined by it
        from mmfast.kernels import _torch_ops as registration

        registration.register()
        note_defined(registration.OPS)
        _triton_kernels = {op: _triton(op, registration.OPS[op]) for op in registration.OPS}
    return None if _triton_kernels is not None else _triton_missing


def _triton(op: str, launchers: Mapping[str, Callable[..., Any]]) -> Any:
    direct = [launchers[part] for part in parts(op)]
    return bundle(op, direct if _interprets() else torch_ops(op), direct)


def _triton_launcher(op: str) -> Callable[[], Any]:
    def launcher() -> Any:
        if torch.compiler.is_compiling() or _triton_kernels is None:
            return bundle(op, torch_ops(op), torch_ops(op))
        return _triton_kernels[op]

    return launcher


@asked_once
def _no_code_for(device: torch.device) -> str | None:
    """Why the CUDA kernels of the compiled library cannot run on this device."""
    from mmfast import _library

    if torch.version.hip is not None:
        return "this torch is a ROCm build, the compiled CUDA kernels take NVIDIA GPUs"
    too_old = _gpus.unusable_gpu(device)
    return too_old if too_old is not None else _library.no_code_for(_gpus.capability(device))


# --- why not ----------------------------------------------------------------------------------

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_MAX_WIDTH = 8192
_GPU_MAX_WIDTH = 256
_SHARED_MAX_WIDTH = 8192  # keys that are the values
MAX_MODALITIES = 64


def _cpu_why_not(
    q: Tensor, v: Tensor, derivatives: str | None = None, shared: bool = False
) -> str | None:
    """`derivatives` names a kind of derivative that only composed torch functions have; `shared`:
    the keys are the values."""
    reason = _gate_cpu_why_not(q, derivatives)
    return reason if reason is not None else _too_wide(q, v, _CPU_MAX_WIDTH)


def _too_wide(q: Tensor, v: Tensor, widest: int) -> str | None:
    if q.size(3) > widest or v.size(3) > widest:
        return f"D={q.size(3)}, Dv={v.size(3)}: head widths go up to {widest} here"
    return None


def _triton_attention_why_not(
    q: Tensor, v: Tensor, derivatives: str | None = None, shared: bool = False
) -> str | None:
    reason = _triton_why_not(q, derivatives)
    widest = _SHARED_MAX_WIDTH if shared else _GPU_MAX_WIDTH
    return reason if reason is not None else _too_wide(q, v, widest)


def _triton_shares(q: Tensor) -> bool:
    """Narrower ones are faster as keys and values."""
    return q.size(3) > _GPU_MAX_WIDTH


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


def _cuda_attention_why_not(
    q: Tensor, v: Tensor, derivatives: str | None = None, shared: bool = False
) -> str | None:
    reason = _cuda_why_not(q, derivatives)
    return reason if reason is not None else _too_wide(q, v, _GPU_MAX_WIDTH)


def _cuda_attention_yields(
    q: Tensor, v: Tensor, derivatives: str | None = None, shared: bool = False
) -> str | None:
    """Triton is faster at large sizes on some GPUs (mmfast/_order.py)."""
    if not q.is_cuda:
        return None
    major = _gpus.capability(q.device)[0]
    if major not in _order.RATES:
        return None
    B, H, N, D = q.shape
    reason = _order.gives_way(major, B, H, N, v.shape[2], D, v.shape[3], q.dtype == torch.float32)
    if reason is None or _triton_attention_why_not(q, v, derivatives, shared) is not None:
        return None
    return reason


def takes_gpu_tensor(x: Tensor) -> bool:
    """Whether the CUDA kernels that are there take this tensor, wherever `auto` may choose them."""
    return x.dtype in _GPU_DTYPES and (not x.is_cuda or _no_code_for(x.device) is None)


def _cuda_why_not(x: Tensor, derivatives: str | None = None) -> str | None:
    if x.device.type != _cuda_home.device:
        return f"the data is on {x.device}, this backend takes CUDA tensors"
    if x.dtype not in _GPU_DTYPES:
        return f"the data is {x.dtype}, this backend takes float32, bfloat16, float16"
    if derivatives is not None:
        return _composed(derivatives)
    if torch.compiler.is_compiling() or _cuda_kernels is None:
        missing = _load_cuda()
        if missing is not None:
            return missing
    return _no_code_for(x.device) if x.is_cuda else None


def _triton_why_not(x: Tensor, derivatives: str | None = None) -> str | None:
    interprets = _interprets()
    if not (x.is_cuda or (interprets and x.is_cpu)):
        return f"the data is on {x.device}, this backend takes CUDA tensors"
    if interprets and (torch.compiler.is_compiling() or x.dtype == torch.bfloat16):
        return "TRITON_INTERPRET=1: the interpreter takes eager float32 and float16 calls"
    if x.dtype not in _GPU_DTYPES:
        return f"the data is {x.dtype}, this backend takes float32, bfloat16, float16"
    if derivatives is not None:
        return _composed(derivatives)
    reason = _gpus.unusable_gpu(x.device) if x.is_cuda else None
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
    cpu, cuda, triton = _gate_cpu_why_not, _cuda_why_not, _triton_why_not
    if op == "fuse":
        cpu, cuda, triton = map(_few_modalities, (cpu, cuda, triton))
    return (
        Row("cpu", cpu, _compiled_kernels(op)),
        Row("cuda", cuda, _cuda_launcher(op)),
        Row("triton", triton, _triton_launcher(op)),
        Row("reference", _reference_why_not, getattr(reference, op), composed=True),
    )


TABLE: dict[str, tuple[Row, ...]] = {
    "cross_attention": (
        Row("cpu", _cpu_why_not, _compiled_kernels("cross_attention"), shares=lambda q: True),
        Row(
            "cuda",
            _cuda_attention_why_not,
            _cuda_launcher("cross_attention"),
            yields=_cuda_attention_yields,
        ),
        Row(
            "triton",
            _triton_attention_why_not,
            _triton_launcher("cross_attention"),
            shares=_triton_shares,
        ),
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
        name: "cpu", "cuda", "triton", "reference", or "auto" (the best that can take the call).

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
            if row.why_not(*call) is None and row.yields(*call) is None:
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
    """A line of `explain`: `reason` is None where the backend can be used on this machine.

    `yields` says why `auto` nevertheless prefers a later one.
    """

    op: str
    backend: str
    reason: str | None
    yields: str | None = None


def explain(op: str | None = None, *call: Any) -> list[Offer]:
    """Every backend of `op` (of all ops without it), in order, with its reason why not.

    Without a `call` the question is asked for a small float32 CPU problem.
    """
    return [
        _offer(name, row, call or _probe(name))
        for name, rows in TABLE.items()
        if op is None or name == op
        for row in rows
    ]


def _offer(op: str, row: Row, call: tuple[Any, ...]) -> Offer:
    reason = row.why_not(*call)
    return Offer(op, row.backend, reason, row.yields(*call) if reason is None else None)


def _probe(op: str) -> tuple[Tensor, ...]:
    x = torch.zeros(1, 1, 1, 16)
    return (x, x) if op == "cross_attention" else (x,)
