"""Residual branches, norms and feed-forward networks: what every transformer layer is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, ModuleList

from mmfast.nn._plain import has_hooks, plain_norm
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.glu import glu_packed
from mmfast.ops.modulate import modulate

_M = TypeVar("_M", bound=Module)
Activation = str | Callable[[Tensor], Tensor]

GLUS = {
    "swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu",
    "glu": "sigmoid", "bilinear": "identity",
}  # fmt: skip
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": torch.nn.GELU("tanh"),
    "silu": F.silu,
}


def activation_function(op: str, activation: Activation) -> tuple[Any, str | None]:
    """(the function, None) of a plain activation; (identity, the op's name) of a gated one."""
    if not isinstance(activation, str):
        return activation, None
    if activation in GLUS:
        return torch.nn.Identity(), GLUS[activation]
    if activation not in _PLAIN:
        raise RuntimeError(
            f"{op}: activation should be relu/gelu, gelu_tanh, silu, {', '.join(GLUS)} or a "
            f"function, not {activation}"
        )
    return _PLAIN[activation], None


class Sublayer(NamedTuple):
    """`x + act(gate) * dropout(branch(norm(x)))`, or `norm(x + ...)` where norms come last."""

    norm: Any
    dropout: Any
    branch: Callable[[Tensor], Tensor]
    gate: Tensor | None = None


def run_sublayers(x: Tensor, sublayers: list[Sublayer], norm_first: bool) -> Tensor:
    """All in turn on `[..., C]`. A residual and the norm that follows it are one kernel."""
    if not norm_first:
        for norm, dropout, branch, gate in sublayers:
            x = add_norm(norm, x, dropout(branch(x)), gate)[0]
        return x
    normed = apply_norm(sublayers[0].norm, x)
    for (_, dropout, branch, gate), following in pairwise(sublayers):
        normed, x = add_norm(following.norm, x, dropout(branch(normed)), gate)
    _, dropout, branch, gate = sublayers[-1]
    return _add(x, dropout(branch(normed)), gate)


def apply_norm(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)`, by the kernel where it is one that the kernel knows."""
    kind = _norm_kind(norm, x)
    if kind is None:
        return norm(x)
    bias = getattr(norm, "bias", None)
    rows = _rows(x)
    return modulate(rows, norm=kind, eps=norm.eps, weight=norm.weight, bias=bias).view(x.shape)


def add_norm(norm: Any, x: Tensor, branch: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(norm(h), h)` with `h = x + tanh(gate) * branch`."""
    kind = _norm_kind(norm, x)
    if kind is None:
        h = _add(x, branch, gate)
        return norm(h), h
    if gate is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        gate = torch.tanh(gate.to(wide)).expand(x.shape[-1])
    bias = getattr(norm, "bias", None)
    out, h = modulate(
        _rows(branch), norm=kind, residual=_rows(x), gate=gate, eps=norm.eps, weight=norm.weight,
        bias=bias,
    )  # fmt: skip
    return out.view(x.shape), h.view(x.shape)


def _add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return x + branch
    return gated_residual(_rows(x), _rows(branch), gate, activation="tanh").view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """Packed rows as a batch of one: the way of the kernels with the fewest questions."""
    return x.unsqueeze(0) if x.dim() == 2 else x


def _norm_kind(norm: Any, x: Tensor) -> str | None:
    """The name of the norm in `mmfast.modulate`; None where the module itself must run."""
    if not plain_norm(norm) or norm.eps is None:
        return None
    if len(norm.normalized_shape) != 1 or norm.normalized_shape[0] != x.shape[-1]:
        return None
    weight = norm.weight
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return None
    return "layer" if type(norm) is LayerNorm else "rms"


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """`linear2(dropout(activation(linear1(x))))`; with a gated unit linear1 is [gate | value]."""
    hidden = layer.linear1(x)
    if layer.glu is not None:
        hidden = glu_packed(_rows(hidden), layer.glu).view(*x.shape[:-1], -1)
    elif layer.activation is F.relu and type(layer.linear1) is Linear:
        # A product needs its result for no gradient, so the rectifier may take its place.
        hidden = F.relu(hidden, inplace=not has_hooks(layer.linear1))
    else:
        hidden = layer.activation(hidden)
    return layer.linear2(layer.dropout(hidden))


def shallow_copy(module: Module, cls: type[_M]) -> _M:
    """`module` as a `cls` that shares its parameters and has registries of its own."""
    new = cls.__new__(cls)
    for name, value in module.__dict__.items():
        new.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    return new


def for_torchscript(module: Any, stock: type[_M]) -> _M:
    """`module` as PyTorch's own, on the same parameters: what `torch.jit.script` compiles."""
    if getattr(module, "glu", None) is not None:
        raise TypeError(
            f"{type(module).__name__}: PyTorch's layer, which TorchScript would compile, has no "
            f"gated units; use torch.compile or torch.export"
        )
    # All parts here: torch puts what parts prepare into the registries of the original.
    plain: Any = shallow_copy(module, stock)
    for name, part in plain._modules.items():
        if isinstance(part, ModuleList):
            plain._modules[name] = ModuleList(_prepared(layer) for layer in part)
        elif part is not None:
            plain._modules[name] = _prepared(part)
    return plain


def _prepared(module: Any) -> Any:
    prepare = getattr(module, "__prepare_scriptable__", None)
    return module if prepare is None else prepare()


def require_stock(cls: type[Module], module: Module, stock: type[Module]) -> None:
    """TypeError unless `module` is a `stock` with the forward that `cls` stands for."""
    if not isinstance(module, stock):
        raise TypeError(
            f"{cls.__name__}.from_torch: expected a torch.nn.{stock.__name__} but got "
            f"{type(module).__name__}"
        )
    if type(module).forward not in (stock.forward, getattr(cls, "forward", None)):
        raise TypeError(
            f"{cls.__name__}.from_torch: {type(module).__name__} has a forward of its own, which "
            f"would be lost; convert the plain torch.nn.{stock.__name__}"
        )
