"""A gate's forward and backward kernel joined: under autograd, fake tensors, vmap and compilation.

Two ways lead to the same kernels and the same backward formula:

* the eager hot path on plain tensors: one `torch.autograd.Function` (none when nothing needs a
  gradient) that calls the kernels below the dispatcher;
* the torch ops `torch.ops.mmfast.<op>_fwd` and `_bwd` (`mmfast_cuda` for the CUDA C++ kernels) with
  the registrations made here: the way of torch.compile, torch.export, fake tensors, subclasses
  and vmap.

Double backward is not offered: differentiating a gradient raises an error that names the remedy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import dispatch
from mmfast.ops import _checks
from mmfast.ops._autograd import (
    PLAIN_TYPES,
    in_eager,
    is_plain,
    no_double_backward,
    one_by_one,
)

_FLOATS = frozenset(_checks.FLOAT_DTYPES)


class Fused(NamedTuple):
    """What is particular to an op.

    `leaves` are the public arguments that have gradients, one by one, `rest` the others.

    `prepare(leaves, rest)` gives the arguments of `<op>_fwd`; `keep(args, result)` the tensors that
    the backward reads, and the numbers. `gradients(bwd, incoming, saved, numbers, needs)` gives
    one gradient, or None, for each leaf, in the kernels' shapes: `incoming` holds the gradients of
    the results, `needs` whether each leaf wants one. `leaf_positions` are those of the
    leaves in the torch op's arguments, a list of tensors being one.
    """

    op: str
    prepare: Callable[..., tuple[Any, ...]]
    keep: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]
    gradients: Callable[..., tuple[Any, ...]]
    leaf_positions: tuple[int, ...]
    fwd_fake: Callable[..., Any]
    bwd_fake: Callable[..., Any]


# --- which way a call takes --------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _keys_of_plain_tensors(device: str) -> frozenset[int]:
    """What the dispatch keys of dense tensors there look like, in and out of inference mode.

    Any other key (another device or layout, lazy negation, a batch of vmap, a Python mode or a
    fake tensor) makes another number.
    """
    # Whatever is around this call must not show.
    with torch.inference_mode(False):
        plain = torch.empty(0, device=device)
    with torch.inference_mode():
        inferred = torch.empty(0, device=device)
    return frozenset(_keys_of(t).raw_repr() for t in (plain, inferred))


_keys_of = torch._C._dispatch_keys
_autocast_enabled = torch.is_autocast_enabled
_PLAIN_KEYS = _keys_of_plain_tensors("cpu")
_FIRST_IN_THE_TABLE = ("auto", "cpu")
_FIRST_ON_GPUS = ("auto", "cuda")


def quick(op: str, x: Any, *others: Any) -> dispatch.GateKernels | None:
    """The compiled kernels where nothing stands in the way of calling them at once.

    Plain contiguous floating-point tensors on one device (None among the `others` is skipped), no
    other backend asked for, no autocast, no transform, no compilation. Otherwise None: the checked
    way.
    """
    if not in_eager():
        return None
    kernels = dispatch._kernels
    if (
        kernels is None
        or dispatch._forced not in _FIRST_IN_THE_TABLE
        or forward_ad._current_level >= 0
        or _autocast_enabled("cpu")
        or type(x) not in PLAIN_TYPES
        or x.dtype not in _FLOATS
        or _keys_of(x).raw_repr() not in _PLAIN_KEYS
        or not x.is_contiguous()
    ):
        return _quick_on_gpu(op, x, others)
    for other in others:
        if other is not None and (
            type(other) not in PLAIN_TYPES
            or _keys_of(other).raw_repr() not in _PLAIN_KEYS
            or not other.is_contiguous()
        ):
            return None
    return kernels[op]


def _quick_on_gpu(op: str, x: Any, others: tuple[Any, ...]) -> dispatch.GateKernels | None:
    """The same for the CUDA C++ kernels, once a checked call has brought them in."""
    kernels = dispatch._cuda_kernels
    if kernels is None or dispatch._forced not in _FIRST_ON_GPUS or type(x) not in PLAIN_TYPES:
        return None
    device = x.device
    if (
        device.type != dispatch._cuda_home.device
        or forward_ad._current_level >= 0
        or _autocast_enabled(device.type)
        or not dispatch.takes_gpu_tensor(x)
    ):
        return None
    plain = _keys_of_plain_tensors(device.type)
    for tensor in (x, *others):
        if tensor is not None and (
            type(tensor) not in PLAIN_TYPES
            or _keys_of(tensor).raw_repr() not in plain
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            return None
    return kernels[op]


def call(
    spec: Fused,
    kernels: dispatch.GateKernels,
    eager: bool,
    leaves: tuple[Any, ...],
    rest: tuple[Any, ...],
) -> Any:
    """The result of the forward, in the kernels' shapes, with its derivative."""
    if not eager:
        return kernels.fwd(*spec.prepare(leaves, rest))
    if torch.is_grad_enabled():
        for leaf in leaves:
            if leaf is not None and leaf.requires_grad:
                return _apply(spec, kernels, rest, *leaves)
    return kernels.direct_fwd(*spec.prepare(leaves, rest))


class _Eager(torch.autograd.Function):
    """Tensors are brought into the kernels' form in here, where that records no views."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: Fused,
        kernels: dispatch.GateKernels,
        rest: tuple[Any, ...],
        *leaves: Tensor | None,
    ) -> Any:
        args = spec.prepare(leaves, rest)
        result = kernels.direct_fwd(*args)
        saved, ctx.numbers = spec.keep(args, result)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.kernels = spec, kernels
        ctx.shapes = [None if leaf is None else leaf.shape for leaf in leaves]
        return result

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        spec, kernels, needs = ctx.spec, ctx.kernels, ctx.needs_input_grad
        for grad in incoming:
            if grad is not None:
                break
        else:
            return (None,) * len(needs)
        bwd = kernels.direct_bwd if _is_simple(incoming) else kernels.bwd
        grads = spec.gradients(bwd, incoming, ctx.saved_tensors, ctx.numbers, needs[3:])
        return (None, None, None, *map(_shaped, grads, ctx.shapes))


def _shaped(grad: Tensor | None, shape: torch.Size | None) -> Tensor | None:
    return grad if grad is None or grad.shape == shape else grad.reshape(shape or ())


# Function.apply without its Python prologue (3 us), which is for functorch transforms.
_apply = super(torch.autograd.Function, _Eager).apply


def _is_simple(incoming: tuple[Tensor | None, ...]) -> bool:
    """Plain gradients, no mode, no transform, nothing recorded. is_grads_batched goes through
    torch's older vmap, which only the dispatch keys tell."""
    if torch.is_grad_enabled() or not in_eager():
        return False
    for grad in incoming:
        if grad is None:
            continue
        if type(grad) not in PLAIN_TYPES:
            return False
        if _keys_of(grad).raw_repr() in _PLAIN_KEYS:
            continue
        if not is_plain(grad) or not _keys_of(grad).has(torch._C.DispatchKey.CUDA):
            return False
    return True


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

_registrations: list[torch.library.Library] = []  # they live as long as these objects


def register(spec: Fused) -> None:
    """Fake, vmap and autograd of the op's two torch ops, as soon as a namespace has them."""

    def registered(ops: tuple[Any, Any]) -> None:
        fwd, bwd = ops
        library = torch.library.Library(fwd.namespace, "FRAGMENT")
        _registrations.append(library)
        for op, fake in ((fwd, spec.fwd_fake), (bwd, spec.bwd_fake)):
            torch.library.register_fake(op, fake, lib=library)
            torch.library.register_vmap(op, one_by_one(op), lib=library)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            saved, ctx.numbers = spec.keep(inputs, output)
            ctx.save_for_backward(*saved)
            ctx.set_materialize_grads(False)
            ctx.inputs = len(inputs)
            ctx.lengths = [_length(inputs[position]) for position in spec.leaf_positions]

        def backward(ctx: Any, *incoming: Tensor | None) -> Any:
            grads: list[Any] = [None] * ctx.inputs
            if any(grad is not None for grad in incoming):
                needs: list[bool] = []
                for position, length in zip(spec.leaf_positions, ctx.lengths, strict=True):
                    need = ctx.needs_input_grad[position]
                    needs.extend([need] if length is None else _each(need, length))
                found = list(spec.gradients(bwd, incoming, ctx.saved_tensors, ctx.numbers, needs))
                for position, length in zip(spec.leaf_positions, ctx.lengths, strict=True):
                    count = 1 if length is None else length
                    grads[position] = found[0] if length is None else found[:count]
                    del found[:count]
            return tuple(grads)

        torch.library.register_autograd(fwd, backward, setup_context=setup, lib=library)
        torch.library.register_autograd(bwd, no_double_backward(spec.op), lib=library)

    dispatch.when_defined(spec.op, registered)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _each(need: Any, length: int) -> list[bool]:
    return list(need) if isinstance(need, list | tuple) else [bool(need)] * length


def dense_last(grad: Tensor) -> Tensor:
    """An incoming gradient as the kernels read it: dense channels."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()
