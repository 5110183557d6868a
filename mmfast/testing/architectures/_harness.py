"""Is a patched model the model that it was? Judged against float64, with weights that show faults.

Models with their usual initial weights (a standard deviation of 0.02, gates of 0) hide padding that
is not masked, a wrong scale and a lost bias. Here weights have gain 1.6, gates are open, some rows
are padded, and it is counted how often the library's kernels were called.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mmfast.integrations import _attention, _packing
from mmfast.nn import _projected_attention
from mmfast.ops.cross_attention import cross_attention
from mmfast.testing.architectures._case import Architecture

# Errors are held against those that the stock model makes in the same dtype, as in
# mmfast/testing/tolerance.py: at most twice in outputs, three times in gradients, plus a floor of
# roundings relative to the largest value. A network multiplies roundings: the floor is of many.
# Roundings come to 1e-6 to 5e-4 of a value here, faults to 0.01 to 20.
_TIMES = {"output": 2.0, "gradient": 3.0}
_FLOOR = 4e-6

_MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def strong_weights(
    model: nn.Module, seed: int = 0, draw: Callable[[torch.Size], Tensor] | None = None
) -> None:
    """Weights N(0, 1.6^2 / fan_in), norms round 1, biases N(0, 0.1^2), closed gates at 0.7.

    `draw`: where the N(0, 1) numbers of a shape come from, in place of the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    multiplied = {id(m.weight) for m in model.modules() if isinstance(m, _MULTIPLYING)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            value = draw(shape) if draw else torch.randn(shape, generator=generator)
            if parameter.dim() >= 2 and not name.endswith("bias"):
                fan_in = parameter[0].numel()
                looked_up = "embed" in name and id(parameter) not in multiplied
                value = value * (1.0 if looked_up else 1.6 / fan_in**0.5)
            elif name.endswith("bias"):
                value = value * 0.1
            elif not parameter.any():
                value = torch.full(parameter.shape, 0.7)
            else:
                value = 1.0 + 0.1 * value
            parameter.copy_(value)


def tiny(case: Architecture) -> tuple[nn.Module, dict[str, Any]]:
    """The stock model with strong weights, in eval mode, and its padded batch."""
    torch.manual_seed(0)
    model = case.build("tiny").eval()
    strong_weights(model)
    torch.manual_seed(1)
    return model, case.inputs(model, "tiny")


class Calls:
    """How often a forward went through the library: attentions, and layers without padding."""

    def __init__(self) -> None:
        self.attention = 0
        self.packed = 0


@contextlib.contextmanager
def counted(least_work: int = 0) -> Iterator[Calls]:
    """Count, with every layer packed that has any padding."""
    calls = Calls()
    unpacked = _packing.Layout.unpack

    def one_attention(*args: Any, **kwargs: Any) -> Any:
        calls.attention += 1
        return cross_attention(*args, **kwargs)

    def one_layer(self: Any, rows: Tensor) -> Tensor:
        calls.packed += 1
        return unpacked(self, rows)

    with (
        mock.patch.object(_attention, "cross_attention", one_attention),
        mock.patch.object(_projected_attention, "cross_attention", one_attention),
        mock.patch.object(_packing.Layout, "unpack", one_layer),
        mock.patch.object(_packing, "LEAST_WORK", least_work),
    ):
        yield calls


def run(
    model: nn.Module, inputs: Mapping[str, Any], case: Architecture, backward: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(outputs, gradients of parameters) of a loss that weighs every value of the outputs."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # some models draw: ViLT the order of the patches
    dtype = next(model.parameters()).dtype
    fed = {name: _to(value, dtype) for name, value in inputs.items()}
    with torch.set_grad_enabled(backward):
        outputs = case.outputs(model(**fed), fed)
    if backward:
        generator = torch.Generator().manual_seed(2)
        loss: Any = 0.0
        for value in outputs.values():
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            loss = loss + (value * weight.to(value.dtype)).sum()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, list | tuple):
        return type(value)(_to(item, dtype) for item in value)
    return value


def truth_of(case: Architecture, stock: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What the stock model gives in float64 (in float32 where it cannot)."""
    model = copy.deepcopy(stock)
    if not case.double:
        return run(model, inputs, case)
    # Some make their masks in the default dtype with the least value of the model's.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(nn.functional, "softmax", _softmax):
            return run(model.double(), inputs, case)
    finally:
        torch.set_default_dtype(default)


def nudged(stock: nn.Module, seed: int = 3) -> nn.Module:
    """A copy of which every weight is off by a rounding: no worse than the model it is of."""
    model = copy.deepcopy(stock)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1.0 + torch.finfo(parameter.dtype).eps / 2 * noise)
    return model


_stock_softmax = nn.functional.softmax


def _softmax(x: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Never in less than float64: most attentions ask for float32, whatever they are in."""
    return _stock_softmax(x.double(), dim).to(x.dtype)


def compare(
    kind: str,
    got: Mapping[str, Tensor],
    stock: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    nudged: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise AssertionError where a value is further from the truth than the stock model's.

    `nudged`: what the stock model gives with its weights off by a rounding. What one run of it is
    off by in one tensor is one draw of a lot (RT-DETR: of two such runs one is off by five times
    the other), so a tensor may also be off by as much, of its size, as the stock model's worst.
    """
    assert set(got) == set(truth) == set(stock), f"{kind}s: {set(got) ^ set(truth)}"
    assert truth, f"no {kind}s to compare"
    sizes = _sizes(kind, truth)
    peers = dict.fromkeys(truth, 0.0)
    for of in (stock, nudged):
        for name in peers if of is not None else ():
            peers[name] = max(peers[name], _off(of[name], truth[name]))  # type: ignore[index]
    share = max(peers[name] / size for name, size in sizes.items() if size)
    worst: list[tuple[float, str]] = []
    for name, size in sizes.items():
        value, right = got[name], truth[name]
        assert value.shape == right.shape, f"{kind} {name}: {value.shape}, stock {right.shape}"
        assert torch.isfinite(value).all(), f"{kind} {name}: not finite"
        error, peer = _off(value, right), peers[name]
        allowed = _TIMES[kind] * max(peer, share * size) + _FLOOR * size
        if error > allowed:
            worst.append((error / allowed, f"{kind} {name}: off by {error:.2e} of {size:.2e}, "
                          f"the stock model by {peer:.2e}"))  # fmt: skip
    assert not worst, max(worst)[1] + f" ({len(worst)} of {len(got)})"


def _off(value: Tensor, right: Tensor) -> float:
    return float((value.double() - right.double()).abs().max()) if right.numel() else 0.0


def _sizes(kind: str, truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest value of each tensor; of gradients at least a share of the largest of all.

    A gradient that is 0 but for the rounding of others (biases of keys) has no size of its own.
    """
    sizes = {name: float(v.abs().max()) if v.numel() else 0.0 for name, v in truth.items()}
    if kind == "gradient":
        largest = max(sizes.values())
        for name, size in sizes.items():
            sizes[name] = max(size, (0.1 if size < 1e-10 * largest else 0.01) * largest)
    return sizes
