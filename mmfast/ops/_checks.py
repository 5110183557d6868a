"""Validation shared by the ops: every message names op, argument, expected, got and remedy.

Checks of types, shapes and devices are plain Python and run while torch.compile traces as well.
Checks of values (lengths in range) read the tensor where that costs no device synchronisation: on
the CPU, eagerly, or inside the torch op `mmfast::checked_int32` when a graph is being captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

INTEGER_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

# Up to this many elements a Python list of the values is cheaper than a reduction (0.5 us for 8
# elements, 2.8 us for 256, against 2.6 us for aminmax).
_LIST_LIMIT = 200


def shape_text(tensor: Tensor) -> str:
    """`[2, 3, 4]`"""
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def require_tensor(op: str, name: str, value: object) -> None:
    """TypeError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}; "
            f"convert it with torch.as_tensor"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{op}: {name} must be a dense (strided) tensor, got layout {value.layout}; "
            f"convert it with .to_dense(), or pad it and pass lengths"
        )


def require_device(op: str, name: str, tensor: Tensor, q: Tensor) -> None:
    """ValueError unless `tensor` is where q is."""
    if tensor.device != q.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} but q is on {q.device}; "
            f"move all tensors to one device"
        )


def require_integer(op: str, name: str, value: object, shape: tuple[int, ...], q: Tensor) -> None:
    """TypeError or ValueError unless `value` is an integer tensor of this shape beside q."""
    require_tensor(op, name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(
            f"{op}: {name} must be an integer tensor (int32 is taken as it is), "
            f"got {value.dtype}; convert it with .to(torch.int32)"
        )
    require_device(op, name, value, q)
    if value.dim() != len(shape) or any(
        got != want for got, want in zip(value.shape, shape, strict=True)
    ):
        wanted = "[" + ", ".join(str(size) for size in shape) + "]"
        raise ValueError(
            f"{op}: {name} has shape {shape_text(value)}, expected {wanted}; "
            f"give one integer for each"
        )


def require_broadcast(op: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless `value` broadcasts to `shape` = [B, H, N, M]."""
    sizes = value.shape
    extra = len(shape) - len(sizes)
    if extra < 0 or any(
        got != 1 and got != want for got, want in zip(sizes, shape[extra:], strict=True)
    ):
        wanted = "[" + ", ".join(str(size) for size in shape) + "]"
        raise ValueError(
            f"{op}: {name} has shape {shape_text(value)}, which does not broadcast to "
            f"[B, H, N, M] = {wanted}; every dim must be 1 or that size"
        )


def require_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """ValueError unless every value is in `[low, high]`. Reads the values."""
    count = values.numel()
    if count == 0:
        return
    if count <= _LIST_LIMIT:
        listed = values.tolist() if values.dim() == 1 else values.flatten().tolist()
        least, most = min(listed), max(listed)
    else:
        bounds = values.aminmax()
        least, most = int(bounds.min), int(bounds.max)
    if least < low or most > high:
        raise ValueError(range_message(op, name, least, most, low, high))


def range_message(op: str, name: str, least: int, most: int, low: int, high: int) -> str:
    """The text of a value out of range."""
    bad = least if least < low else most
    remedy = "clamp it" if low == 0 else "renumber it"
    return f"{op}: {name} holds {bad}, allowed are {low} to {high}; {remedy}"


def checked_int32(op: str, name: str, values: Tensor, low: int, high: int) -> Tensor:
    """`values` as contiguous int32, its range checked. On the CPU, eagerly.

    An int32 tensor needs no check against the limits of int32.
    """
    if values.dtype is torch.int32:
        if low == 0:
            require_range(op, name, values, low, high)
        return values if values.is_contiguous() else values.contiguous()
    if low == 0 or values.dtype is torch.int64:
        require_range(op, name, values, low, high)
    return values.to(torch.int32, memory_format=torch.contiguous_format)


# The same as a torch op, for graphs: its result is what the attention op reads, so that no pass
# removes it, and its error is the same ValueError when the graph runs.
_library = torch.library.Library("mmfast", "FRAGMENT")
_library.define(
    "checked_int32(Tensor values, SymInt low, SymInt high, str op, str name) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _checked_int32_cpu(values: Tensor, low: int, high: int, op: str, name: str) -> Tensor:
    result = checked_int32(op, name, values, low, high)
    return result.clone() if result is values else result


def _checked_int32_device(values: Tensor, low: int, high: int, op: str, name: str) -> Tensor:
    """No synchronisation: the kernels clamp lengths, so that no stray memory is read."""
    result = values.to(torch.int32, memory_format=torch.contiguous_format)
    return result.clone() if result is values else result


def _checked_int32_fake(values: Tensor, low: int, high: int, op: str, name: str) -> Tensor:
    return torch.empty(values.shape, dtype=torch.int32, device=values.device)


def _checked_int32_vmap(
    info: object, in_dims: tuple[int | None, ...], values: Tensor, *rest: object
) -> tuple[Tensor, int]:
    batch = in_dims[0]
    assert batch is not None
    return torch.ops.mmfast.checked_int32(values.movedim(batch, 0), *rest), 0


_library.impl("checked_int32", _checked_int32_cpu, "CPU")
_library.impl("checked_int32", _checked_int32_device, "CUDA")
torch.library.register_fake("mmfast::checked_int32", _checked_int32_fake, lib=_library)
torch.library.register_vmap("mmfast::checked_int32", _checked_int32_vmap, lib=_library)
