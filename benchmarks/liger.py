"""Liger-Kernel's fused gate functions, peers of `glu` on CUDA where the package is installed.

Their backward writes the gradients over the tensors that the forward saved, so they get tensors of
their own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from mmfast.testing.gate_cases import GateCase

NAME = "liger"
ABSENT = "not installed; pip install liger-kernel"
_FUNCTIONS = {("glu", "silu"): "liger_swiglu", ("glu", "gelu_tanh"): "liger_geglu"}


def offered(on: torch.device) -> bool | None:
    """None where the package is not installed; False where it is not for this device."""
    if on.type != "cuda":
        return False
    return True if importlib.util.find_spec("liger_kernel") is not None else None


def takes(case: GateCase) -> bool:
    """Has Liger a function for this case?"""
    return (case.op, case.activation) in _FUNCTIONS


def function_of(case: GateCase) -> Callable[..., Any]:
    """`function(a, b, activation=...)`. KeyError where Liger has none for the case."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    found = getattr(functional, _FUNCTIONS[case.op, case.activation])
    return lambda a, b, **options: found(a, b)
