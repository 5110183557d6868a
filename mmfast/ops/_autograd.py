"""What the ops share about autograd: which way a call takes, and what is not offered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils import _pytree as pytree

from mmfast import dispatch

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))

# Looked up once: these run several times a call, and each attribute costs 30 ns.
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state


def in_eager() -> bool:
    """No torch.compile, no tracing, no dispatch mode, no functorch transform around this call."""
    return (
        not torch.compiler.is_compiling()
        and _modes() == 0
        and _transform() is None
        and _tracing() is None
    )


def is_plain(tensor: Any) -> bool:
    """A dense tensor with data of no subclass (fake tensors are one), not lazily negated."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_meta
    )


def is_plain_cpu(tensor: Any) -> bool:
    """`is_plain`, and on the CPU."""
    return is_plain(tensor) and tensor.is_cpu


def composed_derivatives(eager: bool, *tensors: Tensor | None) -> str | None:
    """A derivative at work here that only an op composed of torch functions has, in words."""
    if not eager:
        return _transform_derivatives()
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            return "forward-mode differentiation"
    return None


@dispatch.constant_when_compiled
def _transform_derivatives() -> str | None:
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    kinds = torch._C._functorch.TransformType
    for interpreter in torch._C._functorch.get_interpreter_stack() or ():
        if interpreter.key() in (kinds.Grad, kinds.Jvp):
            return "a derivative of torch.func"
    return None


def no_double_backward(op: str) -> Callable[..., Any]:
    """An autograd formula that says that there is none."""

    def raises(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{op}: the gradient of a gradient is not offered by this backend; run the forward "
            f"within `with mmfast.use_backend('reference')`, which differentiates any number of "
            f"times"
        )

    return raises


def one_by_one(op: Any) -> Callable[..., Any]:
    """The vmap rule: call the op for every slice. Right for any op, dropout seeds included."""

    def cut(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(arg, list | tuple) and isinstance(dim, list | tuple):
            return [cut(a, d, index) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, index)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        slices = [
            op(*(cut(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        parts = [pytree.tree_flatten(piece)[0] for piece in slices]
        stacked = [torch.stack(same) for same in zip(*parts, strict=True)]
        results = pytree.tree_unflatten(stacked, pytree.tree_structure(slices[0]))
        return results, pytree.tree_map(lambda _: 0, results)

    return rule
