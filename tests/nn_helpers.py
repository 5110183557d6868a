"""What the tests of `mmfast.nn` share: loud weights, a call counter, comparisons, checks."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.testing.tolerance import GRADIENT_FACTOR

M = TypeVar("M", bound=torch.nn.Module)


class Calls:
    """Stands in for `cross_attention`: counts its calls and keeps the arguments of the last."""

    def __init__(self) -> None:
        self.count = 0
        self.last: dict[str, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.count += 1
        self.last = {"q": q, "k": k, "v": v, **options}
        return mmfast.cross_attention(q, k, v, **options)


def loud(module: M) -> M:
    """Weights ~ N(0, 1.6 / sqrt(fan_in)): attention is neither uniform nor one-hot."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 2.0
            parameter.normal_(0.0, 1.6 / fan_in**0.5)
    return module


def assert_near(
    name: str, got: Tensor, exact: Tensor, eager: Tensor | None, size: float = 1.0
) -> None:
    """`got` is within 3 times the error that `eager`, in the same dtype, makes, plus rounding.

    `exact` is float64. The floor is the rounding of a chain of three products whose terms are of
    size `size`: a gradient that cancels to 0 (that of the key bias) is all rounding. Where `eager`
    is NaN (PyTorch in a row that sees nothing) only the floor counts. Infinities must match.
    """
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    live = exact.isfinite()
    assert torch.equal(got.isfinite(), live), f"{name}: NaN or infinity out of place"
    if not live.any():
        return
    eps = torch.finfo(got.dtype if eager is None else eager.dtype).eps
    allowed = 128 * eps * exact[live].abs().max().clamp(min=size)
    if eager is not None and not eager.isnan().any():
        allowed = allowed + GRADIENT_FACTOR * (eager.double() - exact)[live].abs().max()
    error = (got.double() - exact)[live].abs().max()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def gradients(out: Tensor, module: torch.nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Of a fixed random projection of `out`, for the inputs and every parameter."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    leaves = [*inputs, *module.parameters()]
    grads = torch.autograd.grad((out * direction).sum(), leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
    ]


def compare(
    module: torch.nn.Module,
    mine: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *inputs: Any,
) -> None:
    """Result and gradients of `mine(module, *inputs)` against `theirs` in float64.

    Their error may be 3 times that of `theirs` in the dtype of `module`.
    """
    exactly = copy.deepcopy(module).double()
    results = []
    for call, instance in ((theirs, exactly), (theirs, module), (mine, module)):
        leaves = [x.detach().to(_dtype(instance)).requires_grad_() for x in inputs]
        out = call(instance, *leaves)
        results.append([out, *gradients(out, instance, *leaves)])
    names = ["out", *(f"dinput{i}" for i in range(len(inputs)))]
    names += [f"d{name}" for name, _ in module.named_parameters()]
    # The gradient of a key bias is a sum that cancels to 0; that of the key weight is the same sum
    # with factors of size 1, and tells how large its terms are.
    sizes = {name: float(x.detach().abs().max()) for name, x in zip(names, results[0]) if x.numel()}
    for name, exact, eager, got in zip(names, *results, strict=True):
        cancels = name.endswith("k_proj.bias")
        size = max(1.0, sizes[name.replace("bias", "weight")]) if cancels else 1.0
        assert_near(name, got, exact, eager, size)


def check_module(make: Callable[..., M], call: Callable[[M], Tensor]) -> M:
    """What every module can do: factory arguments, reset, state dict, deepcopy, change of dtype."""
    module = loud(make())
    expected = call(module)
    empty = make(device="meta")
    assert all(p.is_meta for p in empty.parameters())
    fresh = empty.to_empty(device="cpu")
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(call(fresh), expected)
    assert torch.equal(call(copy.deepcopy(module)), expected)
    assert torch.equal(call(pickle.loads(pickle.dumps(module))), expected)  # noqa: S301
    for build in (make, lambda: _reset(fresh)):
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append({name: value.clone() for name, value in build().state_dict().items()})
        assert states[0].keys() == states[1].keys() == module.state_dict().keys()
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name
            assert not torch.equal(value, module.state_dict()[name]), name
    assert all(p.dtype == torch.float64 for p in make(dtype=torch.float64).parameters())
    assert all(p.dtype == torch.bfloat16 for p in fresh.to(torch.bfloat16).parameters())
    assert type(module).__name__ in repr(module)
    return module


def _reset(module: M) -> M:
    module.reset_parameters()  # type: ignore[operator]
    return module


def check_compiled(
    module: torch.nn.Module, call: Callable[..., Tensor], *inputs: Tensor, dynamic: bool = False
) -> None:
    """torch.compile(fullgraph=True), forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for function in (call, compiled):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(module, *leaves)
        results.append([out, *gradients(out, module, *leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_autocast(module: torch.nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """bfloat16 autocast is near float32, and every gradient has the dtype of its tensor."""
    expected = call(module, *inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(module, *leaves)
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    for leaf, grad in zip(
        [*leaves, *module.parameters()], gradients(got, module, *leaves), strict=True
    ):
        assert grad.dtype == leaf.dtype and grad.isfinite().all()
    return got


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def transformers_layers(model: str) -> Any:
    """The module `transformers.models.<model>.modeling_<model>`.

    transformers looks for Hugging Face's package `kernels`. With the root of this repository on
    sys.path, as `python -m pytest` puts it there, it would find our folder of that name, which
    refuses to be imported so.
    """
    pytest.importorskip("transformers")
    root = Path(__file__).resolve().parent.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != root])
        return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def check_parity(
    module: torch.nn.Module,
    mine: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *inputs: Any,
) -> None:
    """`theirs`, another library's layer on the parameters of `module`, agrees in float32.

    Results and gradients within 1e-4 of the largest value of each, and no gradient is all zero:
    then nothing would have been compared.
    """
    results = []
    for call in (theirs, mine):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = call(module, *leaves)
        results.append([out, *gradients(out, module, *leaves)])
    names = ["out", *(f"dinput{i}" for i in range(len(inputs)))]
    names += [f"d{name}" for name, _ in module.named_parameters()]
    for name, expected, got in zip(names, *results, strict=True):
        size = float(expected.detach().abs().max())
        assert size > 0, f"{name} is 0 everywhere"
        assert got.shape == expected.shape, name
        error = float((got - expected).detach().abs().max())
        assert error <= 1e-4 * size, f"{name}: off by {error:.2e}, the largest value is {size:.2e}"
