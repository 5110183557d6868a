"""The compiled `cross_attention` under autograd, fake tensors and vmap.

Two ways lead to the same kernels and the same backward formula:

* `fused(...)` is the eager hot path on plain tensors: one `torch.autograd.Function` (none when
  nothing needs a gradient) that calls the kernels below the autograd keys.
* `torch.ops.mmfast.*` (`mmfast_cuda.*` for the CUDA C++ kernels) with the registrations made here
  is the way of torch.compile, torch.export, fake tensors, subclasses and vmap. It costs about 20 us
  more a call.

Double backward is not offered: differentiating a gradient raises an error that names the remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.dispatch import CrossAttentionKernels, when_defined
from mmfast.ops._autograd import in_eager, is_plain, no_double_backward, one_by_one

_OP = "cross_attention"
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
# Positions of bias and gate in the schemas, and the number of arguments.
_FWD_BIAS, _FWD_GATE, _FWD_INPUTS = 8, 11, 19
_PROBS_BIAS, _PROBS_INPUTS = 8, 18


# --- the backward formulas, shared by both ways ------------------------------------------------


def _fwd_gradients(
    bwd: Callable[..., Any],
    dout: Tensor | None,
    dlse: Tensor | None,
    saved: tuple[Any, ...],
    scalars: tuple[Any, ...],
    needs_dbias: bool,
    needs_dk: bool,
) -> Any:
    """`(dq, dk, dv, dbias, dgate)`. `saved` holds q, k, v, out, lse and the ten options.

    Where the keys are the values and need no gradient, dk is `[0]`: it is a third of the work.
    """
    if dout is None:
        dout = torch.zeros_like(saved[3])
    elif dout.stride(3) != 1 and dout.shape[3] != 1:  # the kernels read dense rows
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    return bwd(dout, dlse, *saved, *scalars, needs_dbias, needs_dk)


def _probs_gradients(
    probs_bwd: Callable[..., Any],
    dimportance: Tensor | None,
    dweights: Tensor | None,
    saved: tuple[Any, ...],
    scalars: tuple[Any, ...],
    needs_dbias: bool,
) -> Any:
    """`(dq, dk, dbias, dlse)`. `saved` holds q, k, lse and eight options.

    What was not asked for is a result `[0]`, whose gradient says nothing.
    """
    if dimportance is not None:
        dimportance = dimportance.contiguous() if dimportance.dim() == 3 else None
    if dweights is not None:
        dweights = dweights.contiguous() if dweights.dim() >= 3 else None
    return probs_bwd(dimportance, dweights, *saved, *scalars, needs_dbias)


# --- the eager hot path ------------------------------------------------------------------------


def _eager_call(op: Callable[..., Any], direct: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient kernel itself where that is safe; the op under create_graph, modes or vmap."""

    def call(*args: Any) -> Any:
        incoming = args[0] if args[0] is not None else args[1]
        plain = not torch.is_grad_enabled() and in_eager() and is_plain(incoming)
        if plain:
            # is_grads_batched goes through torch's older vmap, which only the keys tell.
            keys = torch._C._dispatch_keys(incoming)
            plain = any(keys.has(device) for device in _DEVICES)
        return direct(*args) if plain else op(*args)

    return call


class _Forward(torch.autograd.Function):
    """Takes what has a gradient one by one and the rest in one tuple: arguments cost time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        kernels: CrossAttentionKernels,
        wants_lse: bool,
        args: tuple[Any, ...],
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = kernels.direct_fwd(*args)
        ctx.kernels, ctx.scalars = kernels, args[13:]
        ctx.bare = args[3:13] == _NO_OPTIONS
        ctx.save_for_backward(q, k, v, out, lse, *(() if ctx.bare else args[3:13]))
        ctx.set_materialize_grads(False)
        return (out, lse) if wants_lse else out

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 8
        _, needs_dk, _, needs_dbias, needs_dgate, *_ = ctx.needs_input_grad
        saved = ctx.saved_tensors
        dq, dk, dv, dbias, dgate = _fwd_gradients(
            _eager_call(ctx.kernels.bwd, ctx.kernels.direct_bwd), dout, dlse,
            (*saved, *_NO_OPTIONS) if ctx.bare else saved, ctx.scalars, needs_dbias, needs_dk,
        )  # fmt: skip
        if not needs_dbias:
            dbias = None
        if not needs_dk:
            dk = None
        if saved[2] is None:
            dv = None
        return dq, dk, dv, dbias, dgate if needs_dgate else None, None, None, None


_NO_OPTIONS = (None,) * 10


class _Probs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        kernels: CrossAttentionKernels,
        args: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        output = kernels.direct_probs(*args)
        ctx.kernels, ctx.scalars = kernels, args[11:16]
        ctx.save_for_backward(*args[:11])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(
        ctx: Any, dimportance: Tensor | None, dweights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dimportance is None and dweights is None:
            return (None,) * 6
        needs_dbias = ctx.needs_input_grad[3]
        dq, dk, dbias, dlse = _probs_gradients(
            _eager_call(ctx.kernels.probs_bwd, ctx.kernels.direct_probs_bwd), dimportance, dweights,
            ctx.saved_tensors, ctx.scalars, needs_dbias,
        )  # fmt: skip
        return dq, dk, dlse, dbias if needs_dbias else None, None, None


# Function.apply without its Python prologue (3 us), which is for functorch transforms.
_apply_forward = super(torch.autograd.Function, _Forward).apply
_apply_probs = super(torch.autograd.Function, _Probs).apply


def fused(
    kernels: CrossAttentionKernels,
    eager: bool,
    needs_grad: bool,
    wants_lse: bool,
    args: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None]:
    """`(out, lse)` of `cross_attention_fwd(*args)`; the lse may be None where it is not wanted.

    `eager` says that the hot path may be taken.
    """
    if not eager:
        return kernels.fwd(*args)
    if not needs_grad:
        return kernels.direct_fwd(*args)
    result = _apply_forward(
        args[0], args[1], args[2], args[_FWD_BIAS], args[_FWD_GATE], kernels, wants_lse, args
    )
    return result if wants_lse else (result, None)


def fused_probs(
    kernels: CrossAttentionKernels, eager: bool, needs_grad: bool, args: tuple[Any, ...]
) -> Any:
    """`(importance, weights)` of `cross_attention_probs(*args)`."""
    if not eager:
        return kernels.probs(*args)
    if needs_grad:
        return _apply_probs(args[0], args[1], args[2], args[_PROBS_BIAS], kernels, args)
    return kernels.direct_probs(*args)


# --- fake tensors: shapes, dtypes and strides of the results ------------------------------------


def _rows_first(tensor: Tensor) -> bool:
    """Does `[B, H, N, D]` lie in memory as `[B, N, H, D]`? The results follow."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(tensor.stride(1) < tensor.stride(2))


def _empty_following(tensor: Tensor, width: Any) -> Tensor:
    B, H, N, _ = tensor.shape
    if _rows_first(tensor):
        return tensor.new_empty((B, N, H, width)).transpose(1, 2)
    return tensor.new_empty((B, H, N, width))


def _statistic_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _sizes(
    q: Tensor, k: Tensor, starts: tuple[Tensor | None, Tensor | None], most: tuple[int, int]
) -> tuple[Any, Any, Any, Any]:
    """B, H, N, M of everything that is padded."""
    q_starts, kv_starts = starts
    B, N, M = q.shape[0], q.shape[2], k.shape[2]
    if kv_starts is not None:
        B, M = kv_starts.shape[0] - 1, most[1]
    if q_starts is not None:
        B, N = q_starts.shape[0] - 1, most[0]
    return B, q.shape[1], N, M


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    out = _empty_following(q, (k if v is None else v).shape[3])
    B, H, N, _ = _sizes(q, k, rest[6:8], rest[14:16])
    return out, q.new_empty((B, H, N), dtype=_statistic_dtype(q))


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, gate, need_dbias, need_dk = rest[7], rest[10], rest[18], rest[19]
    return (
        _empty_following(q, q.shape[3]),
        _empty_following(k, k.shape[3]) if v is not None or need_dk else q.new_empty((0,)),
        q.new_empty((0,)) if v is None else _empty_following(v, v.shape[3]),
        bias.new_empty(bias.shape) if need_dbias else q.new_empty((0,)),
        gate.new_empty(gate.shape) if gate is not None else q.new_empty((0,)),
    )


def _probs_fake(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    importance, weights = rest[13], rest[14]
    B, H, N, M = _sizes(q, k, rest[6:8], rest[11:13])
    weight_shape = ((0,), (B, N, M), (B, H, N, M))[weights]
    return (
        q.new_empty((B, H, M) if importance else (0,), dtype=_statistic_dtype(q)),
        q.new_empty(weight_shape),
    )


def _probs_bwd_fake(
    dimportance: Tensor | None,
    dweights: Tensor | None,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, need_dbias = rest[5], rest[13]
    return (
        _empty_following(q, q.shape[3]),
        _empty_following(k, k.shape[3]),
        bias.new_empty(bias.shape) if need_dbias else q.new_empty((0,)),
        lse.new_empty(lse.shape),
    )


# --- registration, once a library has defined the ops ------------------------------------------


_registrations: list[torch.library.Library] = []  # they live as long as these objects


def _register(ops: tuple[Any, ...]) -> None:
    fwd, bwd, probs, probs_bwd = ops
    library = torch.library.Library(fwd.namespace, "FRAGMENT")
    _registrations.append(library)
    fakes: tuple[Callable[..., Any], ...] = (_fwd_fake, _bwd_fake, _probs_fake, _probs_bwd_fake)
    for op, fake in zip(ops, fakes, strict=True):
        torch.library.register_fake(op, fake, lib=library)
        torch.library.register_vmap(op, one_by_one(op), lib=library)

    def fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:13])
        ctx.scalars = inputs[13:]
        ctx.set_materialize_grads(False)

    def fwd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        grads: list[Tensor | None] = [None] * _FWD_INPUTS
        if dout is not None or dlse is not None:
            needs_dbias = ctx.needs_input_grad[_FWD_BIAS]
            dq, dk, dv, dbias, dgate = _fwd_gradients(
                bwd, dout, dlse, ctx.saved_tensors, ctx.scalars, needs_dbias,
                ctx.needs_input_grad[1],
            )  # fmt: skip
            grads[:3] = (
                dq,
                dk if ctx.needs_input_grad[1] else None,
                None if ctx.saved_tensors[2] is None else dv,
            )
            grads[_FWD_BIAS] = dbias if needs_dbias else None
            grads[_FWD_GATE] = dgate if ctx.needs_input_grad[_FWD_GATE] else None
        return tuple(grads)

    def probs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:11])
        ctx.scalars = inputs[11:16]
        ctx.set_materialize_grads(False)

    def probs_backward(ctx: Any, dimportance: Tensor | None, dweights: Tensor | None) -> Any:
        grads: list[Tensor | None] = [None] * _PROBS_INPUTS
        if dimportance is not None or dweights is not None:
            needs_dbias = ctx.needs_input_grad[_PROBS_BIAS]
            dq, dk, dbias, dlse = _probs_gradients(
                probs_bwd, dimportance, dweights, ctx.saved_tensors, ctx.scalars,
                needs_dbias,
            )  # fmt: skip
            grads[:3] = dq, dk, dlse
            grads[_PROBS_BIAS] = dbias if needs_dbias else None
        return tuple(grads)

    for op, backward, setup in (
        (fwd, fwd_backward, fwd_setup),
        (probs, probs_backward, probs_setup),
        (bwd, no_double_backward(_OP), None),
        (probs_bwd, no_double_backward(_OP), None),
    ):
        torch.library.register_autograd(op, backward, setup_context=setup, lib=library)


when_defined(_OP, _register)
