"""Modules that may be read instead of called, and those that something else stands behind.

Adapters (LoRA), quantisation, sharding and offloading wrap a module, hook it, replace its forward
or its weight. Then its parameters are not what it computes with, and only calling it is right.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, Parameter, RMSNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_LINEARS = (Linear, NonDynamicallyQuantizableLinear)


def has_hooks(module: Module) -> bool:
    """Would calling `module` run something else than the forward of its class?"""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or getattr(module, "_compiled_call_impl", None) is not None
    ):
        return True
    own = module.__dict__.get("forward")  # accelerate puts its hooks there
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def plain_linear(module: Any) -> bool:
    """May slices of the weight of `module` stand for calling it?"""
    return (
        type(module) in _LINEARS
        and type(module._parameters["weight"]) in (Parameter, Tensor)
        and not has_hooks(module)
    )


def plain_norm(module: Any) -> bool:
    """May the weight, bias and eps of a LayerNorm or RMSNorm stand for calling it?"""
    return type(module) in (LayerNorm, RMSNorm) and not has_hooks(module)


def unwrapped(attention: Any) -> Any:
    """For its sizes: what is inside wrappers, which PEFT's adapters are."""
    while "base_layer" in attention._modules:
        attention = attention.base_layer
    return attention
