"""The arguments of `cross_attention`, one by one: checked, cast and made what kernels read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import _checks

_OP = "cross_attention"
_RULES = {"equal": 0, "at_most": 1}


def autocast_device(q: Tensor) -> str:
    """The device type whose autocast governs q; meta tensors follow the CPU's."""
    if q.is_cpu:
        return "cpu"
    return "cpu" if q.is_meta else q.device.type


def autocast(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    to = torch.get_autocast_dtype(autocast_device(q))

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(to) if eligible and tensor.dtype != torch.float64 else tensor

    if isinstance(bias, Tensor) and bias.dtype != torch.float32:
        bias = cast(bias)
    k = cast(k)
    return cast(q), k, k if v is None else cast(v), bias, cast(gate)


def integers(
    name: str, values: Any, shape: tuple[int, ...], low: int, high: int, q: Tensor, eager: bool
) -> Tensor:
    """Lengths or segments as contiguous int32, checked."""
    _checks.require_integer(_OP, name, values, shape, q)
    if eager and values.is_cpu:
        return _checks.checked_int32(_OP, name, values, low, high)
    if eager:  # no synchronisation: the kernels clamp lengths, so that no stray memory is read
        return values.to(torch.int32, memory_format=torch.contiguous_format)
    return torch.ops.mmfast.checked_int32(values, low, high, _OP, name)


def check_rule(q_segments: Any, kv_segments: Any, segment_rule: Any) -> int:
    if segment_rule not in _RULES:
        raise ValueError(
            f"{_OP}: segment_rule is {segment_rule!r}; it must be 'equal' or 'at_most'"
        )
    if (q_segments is None) != (kv_segments is None):
        missing = "q_segments" if q_segments is None else "kv_segments"
        raise ValueError(
            f"{_OP}: {missing} is missing; q_segments and kv_segments come together or not at all"
        )
    return _RULES[segment_rule]


def prepare_mask(mask: Any, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    _checks.require_tensor(_OP, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{_OP}: mask must be bool (True = may attend), got {mask.dtype}; "
            f"give additive scores as bias, or convert it with .bool()"
        )
    _checks.require_device(_OP, "mask", mask, q)
    _checks.require_broadcast(_OP, "mask", mask, shape)
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[3] != 1 and mask.stride(3) != 1:
        # One column stands for all when the last dim is expanded.
        mask = mask[..., :1] if mask.stride(3) == 0 else mask.contiguous()
    return mask


def prepare_bias(bias: Any, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    _checks.require_tensor(_OP, "bias", bias)
    _require_side_dtype("bias", bias, q)
    _checks.require_device(_OP, "bias", bias, q)
    _checks.require_broadcast(_OP, "bias", bias, shape)
    bias = bias[(None,) * (4 - bias.dim())]
    return bias if bias.shape[3] == 1 or bias.stride(3) == 1 else bias.contiguous()


def prepare_gate(gate: Any, q: Tensor, shape: tuple[int, int, int], Dv: int) -> Tensor:
    _checks.require_tensor(_OP, "gate", gate)
    _require_side_dtype("gate", gate, q)
    _checks.require_device(_OP, "gate", gate, q)
    B, N, H = shape
    if tuple(gate.shape) != shape and tuple(gate.shape) != (*shape, Dv):
        raise ValueError(
            f"{_OP}: gate has shape {_checks.shape_text(gate)}, expected [B, N, H] = "
            f"[{B}, {N}, {H}] or [B, N, H, Dv] = [{B}, {N}, {H}, {Dv}]; it holds one logit for "
            f"each row and head, or for each output"
        )
    if gate.dim() == 4 and Dv != 1 and gate.stride(3) != 1:
        return gate.contiguous()
    return gate


def _require_side_dtype(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype and (tensor.dtype != torch.float32 or q.dtype == torch.float64):
        wanted = str(q.dtype)
        if q.dtype in (torch.float16, torch.bfloat16):
            wanted += " (the dtype of q) or torch.float32"
        else:
            wanted += " (the dtype of q)"
        raise TypeError(
            f"{_OP}: {name} must be {wanted}, got {tensor.dtype}; convert it with .to(q.dtype)"
        )


def check_scale(scale: Any) -> float:
    if not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(
            f"{_OP}: scale must be a Python number or None, got {type(scale).__name__}; "
            f"a learned scale can be multiplied into q"
        )
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"{_OP}: scale is {scale}; it must be finite")
    return float(scale)


def check_dropout(dropout_p: Any) -> None:
    if not isinstance(dropout_p, (int, float, torch.SymFloat)):
        raise TypeError(
            f"{_OP}: dropout_p must be a Python number, got {type(dropout_p).__name__}; "
            f"convert it with float()"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(
            f"{_OP}: dropout_p is {dropout_p}, expected 0 <= dropout_p < 1; "
            f"it is the probability that a weight is dropped"
        )


def check_seed(seed: Any, q: Tensor) -> None:
    _checks.require_tensor(_OP, "dropout_seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(
            f"{_OP}: dropout_seed must be an int64 tensor, got {seed.dtype}; make it with "
            f"torch.randint(2**63 - 1, (1,))"
        )
    _checks.require_integer(_OP, "dropout_seed", seed, (1,), q)


def rank_message(q: Tensor, k: Tensor, v: Tensor) -> str:
    name, tensor = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.dim() != 4)
    wanted = {"q": "[B, H, N, D]", "k": "[B, G, M, D]", "v": "[B, G, M, Dv]"}[name]
    return (
        f"{_OP}: {name} has {tensor.dim()} dims (shape {_checks.shape_text(tensor)}), expected "
        f"{wanted}; add the missing dims with unsqueeze or split the heads with unflatten"
    )


def shape_message(q: Tensor, k: Tensor, v: Tensor) -> str:
    B, H, _, D = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != B:
            return (
                f"{_OP}: {name} has B={tensor.shape[0]} but q has B={B}; both must match; "
                f"expand the smaller one"
            )
    if k.shape[3] != D:
        return (
            f"{_OP}: k has D={k.shape[3]} but q has D={D}; both must match; "
            f"project them to one head width"
        )
    for index, letter in ((1, "G"), (2, "M")):
        if k.shape[index] != v.shape[index]:
            return (
                f"{_OP}: v has {letter}={v.shape[index]} but k has {letter}={k.shape[index]}; "
                f"both must match; keys and values come in pairs"
            )
    if H < 1 or k.shape[1] < 1:
        return f"{_OP}: q has H={H} and k has G={k.shape[1]} heads; both must be at least 1"
    if D < 1 or v.shape[3] < 1:
        return f"{_OP}: D={D} and Dv={v.shape[3]}; head widths must be at least 1"
    return (
        f"{_OP}: q has H={H} heads, which is not a multiple of the G={k.shape[1]} heads of k; "
        f"repeat the key and value heads or change H"
    )


def dtype_message(q: Tensor, k: Tensor, v: Tensor) -> str:
    if q.dtype not in _checks.FLOAT_DTYPES:
        return (
            f"{_OP}: q has dtype {q.dtype}, expected float32, bfloat16, float16 or float64; "
            f"convert q, k and v with .float()"
        )
    name, tensor = ("k", k) if k.dtype != q.dtype else ("v", v)
    return (
        f"{_OP}: {name} has dtype {tensor.dtype} but q has {q.dtype}; both must match; "
        f"convert it with .to(q.dtype) or use autocast"
    )
