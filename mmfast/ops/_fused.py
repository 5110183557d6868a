"""A gate's forward and backward kernel joined: under autograd, fake tensors, vmap and compilation.

Two ways lead to the same kernels and the same backward formula:

* the eager hot path on plain tensors: one `torch.autograd.Function` (none when nothing needs a
  gradient) that calls the kernels below the dispatcher;
* the torch ops `torch.ops.mmfast.<op>_fwd` and `_bwd` with the registrations made here: the way of
  torch.compile, torch.export, fake tensors, subclasses and vmap.

Double backward is not offered: differentiating a gradient raises an error that names the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import dispatch
from mmfast.ops._autograd import no_double_backward, one_by_one

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


class Fused(NamedTuple):
    """What is particular to an op.

    `leaves` are the positions of the forward's arguments that have gradients (a list of tensors
    counts as one), `saved` those of the tensors that the backward reads (None stays None);
    `keeps_result` is the position of a result that it reads as well. `gradients(bwd, incoming,
    saved, rest, needs)` gives one gradient, or None, for each of the leaves: `incoming` holds the
    gradients of the results, `rest` the forward's arguments that are no leaves and not saved,
    `needs` whether each leaf wants one.
    """

    op: str
    leaves: tuple[int, ...]
    saved: tuple[int, ...]
    rest: tuple[int, ...]
    gradients: Callable[..., tuple[Any, ...]]
    fwd_fake: Callable[..., Any]
    bwd_fake: Callable[..., Any]
    keeps_result: int | None = None


def is_plain(tensor: Any) -> bool:
    """A dense tensor of no subclass (fake tensors are one), not lazily negated."""
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_meta
    )


def call(spec: Fused, row: dispatch.Row, eager: bool, args: tuple[Any, ...]) -> Any:
    """The result of `<op>_fwd(*args)` on the backend of `row`, with its derivative."""
    kernels = row.launcher()
    if not eager:
        return kernels.fwd(*args)
    if torch.is_grad_enabled():
        leaves: list[Any] = []
        for position in spec.leaves:
            leaf = args[position]
            leaves.extend(leaf) if type(leaf) is list else leaves.append(leaf)
        for leaf in leaves:
            if leaf is not None and leaf.requires_grad:
                return _apply(spec, kernels, args, *leaves)
    return kernels.direct_fwd(*args)


class _Eager(torch.autograd.Function):
    """Takes what has a gradient one by one and the rest in one tuple: arguments cost time."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: Fused,
        kernels: dispatch.GateKernels,
        args: tuple[Any, ...],
        *leaves: Tensor | None,
    ) -> Any:
        result = kernels.direct_fwd(*args)
        ctx.spec, ctx.kernels = spec, kernels
        _save(ctx, spec, args, result)
        return result

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        spec, kernels = ctx.spec, ctx.kernels
        if all(grad is None for grad in incoming):
            return (None,) * len(ctx.needs_input_grad)
        direct = not torch.is_grad_enabled() and _is_simple(incoming)
        needs = _needs(ctx, spec, ctx.needs_input_grad[3:])
        grads = spec.gradients(
            kernels.direct_bwd if direct else kernels.bwd, incoming, *_saved(ctx, spec), needs
        )
        flat: list[Any] = [None, None, None]
        for grad, count in zip(grads, ctx.counts, strict=True):
            if count is None:
                flat.append(grad)
            else:
                flat.extend(grad if grad is not None else (None,) * count)
        return tuple(flat)


# Function.apply without its Python prologue (3 us), which is for functorch transforms.
_apply = super(torch.autograd.Function, _Eager).apply


def _is_simple(incoming: tuple[Tensor | None, ...]) -> bool:
    """Plain gradients, no mode, no transform. is_grads_batched goes through torch's older vmap,
    which only the dispatch keys tell."""
    keys = torch._C.DispatchKey
    for grad in incoming:
        if grad is not None:
            own = keys.CPU if grad.is_cpu else keys.CUDA
            if not is_plain(grad) or not torch._C._dispatch_keys(grad).has(own):
                return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
    )


def _save(ctx: Any, spec: Fused, args: Sequence[Any], result: Any) -> None:
    """Inputs that the backward reads; a list of tensors is spread, and its length kept."""
    tensors: list[Tensor | None] = []
    for position in spec.saved:
        value = args[position]
        tensors.extend(value) if isinstance(value, list | tuple) else tensors.append(value)
    if spec.keeps_result is not None:
        tensors.append(result[spec.keeps_result])
    ctx.save_for_backward(*tensors)
    ctx.lengths = [_length(args[position]) for position in spec.saved]
    ctx.counts = [_length(args[position]) for position in spec.leaves]
    ctx.rest = tuple(args[position] for position in spec.rest)
    ctx.set_materialize_grads(False)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _saved(ctx: Any, spec: Fused) -> tuple[list[Any], tuple[Any, ...]]:
    tensors = list(ctx.saved_tensors)
    values: list[Any] = []
    for length in ctx.lengths:
        if length is None:
            values.append(tensors.pop(0))
        else:
            values.append(tensors[:length])
            del tensors[:length]
    return values + tensors, ctx.rest


def _needs(ctx: Any, spec: Fused, flags: Sequence[bool]) -> list[bool]:
    """Whether each leaf wants a gradient, from one flag for each tensor."""
    needs, at = [], 0
    for count in ctx.counts:
        width = 1 if count is None else count
        needs.append(any(flags[at : at + width]))
        at += width
    return needs


# --- shapes, dtypes and strides of the results ------------------------------------------------


def empty_like_rows(x: Tensor, width: Any = None) -> Tensor:
    """`[B, N, C]`, in memory `[N, B, C]` where x has its rows before its items."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    B, N, C = x.shape[0], x.shape[1], x.shape[2] if width is None else width
    turned = (
        guard_or_false(x.stride(0) < x.stride(1))
        and guard_or_false(B > 1)
        and guard_or_false(N > 1)
    )
    if turned:
        return x.new_empty((N, B, C)).transpose(0, 1)
    return x.new_empty((B, N, C))


def empty_side(side: Tensor | None, needed: bool, x: Tensor) -> Tensor:
    """A contiguous gradient of `side`, or `[0]` where it is not needed."""
    if side is None or not needed:
        return x.new_empty((0,))
    return side.new_empty(side.shape)


# --- registration, once the torch ops are defined ----------------------------------------------

_registrations: dict[str, torch.library.Library] = {}  # they live as long as these objects


def register(spec: Fused) -> None:
    """Fake, vmap and autograd of the op's two torch ops, as soon as they are defined."""

    def registered(ops: tuple[Any, Any]) -> None:
        fwd, bwd = ops
        library = torch.library.Library("mmfast", "FRAGMENT")
        _registrations[spec.op] = library
        for op, fake in ((fwd, spec.fwd_fake), (bwd, spec.bwd_fake)):
            torch.library.register_fake(op, fake, lib=library)
            torch.library.register_vmap(op, one_by_one(op), lib=library)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _save(ctx, spec, inputs, output)
            ctx.inputs = len(inputs)

        def backward(ctx: Any, *incoming: Tensor | None) -> Any:
            grads: list[Any] = [None] * ctx.inputs
            if any(grad is not None for grad in incoming):
                flags = [ctx.needs_input_grad[position] for position in spec.leaves]
                needs = [any(flag) if isinstance(flag, list | tuple) else flag for flag in flags]
                found = spec.gradients(bwd, incoming, *_saved(ctx, spec), needs)
                for position, grad in zip(spec.leaves, found, strict=True):
                    grads[position] = grad
            return tuple(grads)

        torch.library.register_autograd(fwd, backward, setup_context=setup, lib=library)
        torch.library.register_autograd(bwd, no_double_backward(spec.op), lib=library)

    dispatch.when_defined(spec.op, registered)


def dense_last(grad: Tensor) -> Tensor:
    """An incoming gradient as the kernels read it: dense channels."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()
