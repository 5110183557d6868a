"""The compiled `cross_attention` under autograd, fake tensors and vmap.

Two ways lead to the same kernels and the same backward formula:

* `fused(...)` is the eager hot path on plain CPU tensors: one `torch.autograd.Function` (none when
  nothing needs a gradient) that calls the kernels below the autograd keys.
* `torch.ops.mmfast.*` with the registrations made here is the way of torch.compile, torch.export,
  fake tensors, subclasses and vmap. It costs about 20 us more a call.

Double backward is not offered: differentiating a gradient raises an error that names the remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.dispatch import Kernels, when_loaded

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Positions in the schema of cross_attention_fwd and cross_attention_probs.
_FWD_BIAS, _FWD_GATE, _FWD_INPUTS = 8, 9, 15
_PROBS_BIAS, _PROBS_INPUTS = 8, 14

_DOUBLE_BACKWARD = (
    "cross_attention: the gradient of a gradient is not offered by this backend; run the forward "
    "within `with mmfast.use_backend('reference')`, which differentiates any number of times"
)


def in_eager() -> bool:
    """No torch.compile, no tracing, no dispatch mode, no functorch transform around this call."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _unit_last(tensor: Tensor) -> Tensor:
    """The kernels read rows: the last dim must be dense."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


# --- the backward formulas, shared by both ways ------------------------------------------------


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:11])
    ctx.scalars = inputs[11:15]  # scale, dropout_p, is_causal, segment_rule
    ctx.set_materialize_grads(False)


def _fwd_gradients(
    ctx: Any, bwd: Callable[..., tuple[Tensor, ...]], dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients for the 15 inputs of cross_attention_fwd."""
    grads: list[Tensor | None] = [None] * _FWD_INPUTS
    if dout is None and dlse is None:
        return tuple(grads)
    out, lse, q, k, v, *options = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else _unit_last(dout)
    dlse = None if dlse is None else dlse.contiguous()
    needs_dbias = ctx.needs_input_grad[_FWD_BIAS]
    grads[0], grads[1], grads[2], dbias, dgate = bwd(
        dout, dlse, q, k, v, out, lse, *options, *ctx.scalars, needs_dbias
    )
    if needs_dbias:
        grads[_FWD_BIAS] = dbias
    if ctx.needs_input_grad[_FWD_GATE]:
        grads[_FWD_GATE] = dgate
    return tuple(grads)


def _save_probs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.scalars = inputs[9:12]  # scale, is_causal, segment_rule
    ctx.set_materialize_grads(False)


def _probs_gradients(
    ctx: Any,
    probs_bwd: Callable[..., tuple[Tensor, ...]],
    dimportance: Tensor | None,
    dweights: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients for the 14 inputs of cross_attention_probs."""
    grads: list[Tensor | None] = [None] * _PROBS_INPUTS
    if dimportance is None and dweights is None:
        return tuple(grads)
    needs_dbias = ctx.needs_input_grad[_PROBS_BIAS]
    dq, dk, dbias, dlse = probs_bwd(
        None if dimportance is None else dimportance.contiguous(),
        None if dweights is None else dweights.contiguous(),
        *ctx.saved_tensors,
        *ctx.scalars,
        needs_dbias,
    )
    grads[0], grads[1], grads[2] = dq, dk, dlse
    if needs_dbias:
        grads[_PROBS_BIAS] = dbias
    return tuple(grads)


# --- the eager hot path ------------------------------------------------------------------------


def _call(op: Any, plain: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The kernel itself where that is safe; through the dispatcher under create_graph or modes."""
    if not torch.is_grad_enabled() and type(plain) is Tensor and in_eager():
        return op.redispatch(_CPU, *args)
    return op(*args)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        kernels = inputs[-1]
        output = kernels.fwd.redispatch(_CPU, *inputs[:-1])
        ctx.bwd = kernels.bwd
        _save_fwd(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        def bwd(*args: Any) -> tuple[Tensor, ...]:
            return _call(ctx.bwd, args[0], args)

        return (*_fwd_gradients(ctx, bwd, dout, dlse), None)


class _Probs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        kernels = inputs[-1]
        output = kernels.probs.redispatch(_CPU, *inputs[:-1])
        ctx.probs_bwd = kernels.probs_bwd
        _save_probs(ctx, inputs, output)
        return output

    @staticmethod
    def backward(
        ctx: Any, dimportance: Tensor | None, dweights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        def probs_bwd(*args: Any) -> tuple[Tensor, ...]:
            return _call(ctx.probs_bwd, args[0] if args[0] is not None else args[1], args)

        return (*_probs_gradients(ctx, probs_bwd, dimportance, dweights), None)


def fused(kernels: Kernels, eager: bool, needs_grad: bool, args: tuple[Any, ...]) -> Any:
    """`(out, lse)` of `cross_attention_fwd(*args)`; `eager` says that the hot path may be taken."""
    if not eager:
        return kernels.fwd(*args)
    if needs_grad:
        return _Forward.apply(*args, kernels)
    return kernels.fwd.redispatch(_CPU, *args)


def fused_probs(kernels: Kernels, eager: bool, needs_grad: bool, args: tuple[Any, ...]) -> Any:
    """`(importance, weights)` of `cross_attention_probs(*args)`."""
    if not eager:
        return kernels.probs(*args)
    if needs_grad:
        return _Probs.apply(*args, kernels)
    return kernels.probs.redispatch(_CPU, *args)


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


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = _empty_following(q, v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=_statistic_dtype(q))


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, gate, need_dbias = rest[7], rest[8], rest[14]
    return (
        _empty_following(q, q.shape[3]),
        _empty_following(k, k.shape[3]),
        _empty_following(v, v.shape[3]),
        bias.new_empty(bias.shape) if need_dbias else q.new_empty((0,)),
        gate.new_empty(gate.shape) if gate is not None else q.new_empty((0,)),
    )


def _probs_fake(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    importance, weights = rest[9], rest[10]
    B, H, N, M = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
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
    bias, need_dbias = rest[5], rest[9]
    return (
        _empty_following(q, q.shape[3]),
        _empty_following(k, k.shape[3]),
        bias.new_empty(bias.shape) if need_dbias else q.new_empty((0,)),
        lse.new_empty(lse.shape),
    )


# --- registration, once the library has defined the ops ------------------------------------------


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(_DOUBLE_BACKWARD)


def _one_by_one(op: Any) -> Callable[..., Any]:
    """The vmap rule: call the op for every slice. Right for any op, dropout seeds included."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        slices = [
            op(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return results, (0,) * len(results)

    return rule


_registrations: torch.library.Library | None = None  # registrations live as long as this object


def _register(kernels: Kernels) -> None:
    global _registrations
    _registrations = torch.library.Library("mmfast", "FRAGMENT")
    fakes: tuple[Callable[..., Any], ...] = (_fwd_fake, _bwd_fake, _probs_fake, _probs_bwd_fake)
    for op, fake in zip(kernels, fakes, strict=True):
        torch.library.register_fake(op, fake, lib=_registrations)
        torch.library.register_vmap(op, _one_by_one(op), lib=_registrations)

    def fwd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        return _fwd_gradients(ctx, kernels.bwd, dout, dlse)

    def probs_backward(ctx: Any, dimportance: Tensor | None, dweights: Tensor | None) -> Any:
        return _probs_gradients(ctx, kernels.probs_bwd, dimportance, dweights)

    for op, backward, setup in (
        (kernels.fwd, fwd_backward, _save_fwd),
        (kernels.probs, probs_backward, _save_probs),
        (kernels.bwd, _no_double_backward, None),
        (kernels.probs_bwd, _no_double_backward, None),
    ):
        torch.library.register_autograd(op, backward, setup_context=setup, lib=_registrations)


when_loaded(_register)
