"""The torch ops of the kernels: their names, by namespace, and what happens once they are defined.

`torch.ops.mmfast.<op>_<part>` has an implementation for CPU tensors (the compiled library) and one
for CUDA tensors (Triton). The CUDA C++ kernels of the compiled library have a namespace of their
own, `mmfast_cuda`, with the same names and schemas: a key of the dispatcher holds one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch

GATES = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
"""The ops that have one forward and one backward kernel."""

OPS = ("cross_attention", *GATES)


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


_when_defined: dict[str, Callable[[Any], None]] = {}
_defined: dict[str, list[str]] = {op: [] for op in OPS}  # op -> the namespaces that have it


def when_defined(op: str, function: Callable[[Any], None]) -> None:
    """Call `function(torch ops)` once the torch ops of `op` are there: registrations on them.

    It is called for each namespace that defines them.
    """
    _when_defined[op] = function
    for namespace in _defined[op]:
        function(torch_ops(op, namespace))


def note_defined(ops: Iterable[str], namespace: str = "mmfast") -> None:
    """The torch ops of `ops` are there. The second call does nothing."""
    for op in ops:
        if namespace not in _defined[op]:
            _defined[op].append(namespace)
            if op in _when_defined:
                _when_defined[op](torch_ops(op, namespace))


def parts(op: str) -> tuple[str, ...]:
    """The names of an op's kernels."""
    return ("fwd", "bwd", "probs", "probs_bwd") if op == "cross_attention" else ("fwd", "bwd")


def torch_ops(op: str, namespace: str = "mmfast") -> tuple[Any, ...]:
    """What `torch.ops.<namespace>` has of this op, one for each of its parts."""
    home = getattr(torch.ops, namespace)
    return tuple(getattr(home, f"{op}_{part}").default for part in parts(op))


def has_ops(op: str, namespace: str) -> bool:
    """Whether all parts of the op are defined there."""
    home = getattr(torch.ops, namespace)
    return all(hasattr(home, f"{op}_{part}") for part in parts(op))


def bundle(op: str, through_torch: Iterable[Any], direct: Iterable[Any]) -> Any:
    """`CrossAttentionKernels` or `GateKernels`."""
    kernels = CrossAttentionKernels if op == "cross_attention" else GateKernels
    return kernels(*through_torch, *direct)


def compiled(op: str, namespace: str, key: torch._C.DispatchKey) -> Any:
    """The kernels of the compiled library; below the dispatcher those of this key."""
    found = torch_ops(op, namespace)
    keys = torch._C.DispatchKeySet(key)
    return bundle(op, found, [partial(one.redispatch, keys) for one in found])


def constant_when_compiled(function: Any) -> Any:
    """`torch.compiler.assume_constant_result`, without its import of dynamo (1.4 s) at our import.

    That decorator sets this one attribute; tests of compiled calls in fresh processes depend on it.
    """
    function._dynamo_marked_constant = True
    return function


def asked_once(function: Any) -> Any:
    """`functools.lru_cache` that torch.compile takes for a constant; it would look past a cache."""
    cached = lru_cache(maxsize=16)(function)

    @wraps(function)
    def asked(*args: Any) -> Any:
        return cached(*args)

    asked.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return constant_when_compiled(asked)
