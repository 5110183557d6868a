"""`mmfast.nn.GatedMLP` against plain torch, and against transformers' gated feed-forward layers."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import (
    check_autocast,
    check_compiled,
    check_module,
    check_parity,
    compare,
    loud,
    transformers_layers,
)
from torch import Tensor
from torch.func import functional_call

import mmfast
import mmfast.nn.gated_mlp as implementation
from mmfast.nn import GatedMLP

C, H, OUT = 12, 20, 10
EAGER: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def call(module: GatedMLP, x: Tensor) -> Tensor:
    return module(x)


def eager(module: GatedMLP, x: Tensor) -> Tensor:
    if module.packed:
        gate, up = module.gate_up_proj(x).split(module.hidden_features, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(EAGER[module.activation](gate) * up)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_activation(packed: bool, activation: str, dtype: torch.dtype) -> None:
    module = GatedMLP(C, H, OUT, activation=activation, packed=packed, dtype=dtype)
    compare(loud(module), call, eager, torch.randn(2, 7, C))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(C,), (5, C), (2, 3, 4, C), (0, C), (2, 0, C), (0, 3, C)])
def test_any_leading_dims(packed: bool, shape: tuple[int, ...]) -> None:
    module = loud(GatedMLP(C, H, OUT, bias=False, packed=packed))
    compare(module, call, eager, torch.randn(shape))
    strided = torch.randn(*shape[:-1], 2 * C)[..., ::2]
    torch.testing.assert_close(module(strided), eager(module, strided))


def test_the_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("glu", "glu_packed"):
        op = getattr(mmfast, name)
        count = lambda *args, _op=op, _name=name: calls.append(_name) or _op(*args)  # noqa: E731
        monkeypatch.setattr(implementation, name, count)
    for packed in (False, True):
        GatedMLP(C, H, packed=packed)(torch.randn(3, C))
    assert calls == ["glu", "glu_packed"]


# --- state dicts -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_either_kind_loads_into_either(
    bias: bool, packed: bool, assign: bool
) -> None:
    source = torch.nn.Sequential(loud(GatedMLP(C, H, bias=bias, packed=not packed)))
    target = torch.nn.Sequential(GatedMLP(C, H, bias=bias, packed=packed))
    state = source.state_dict()
    names = set(state)
    assert target.load_state_dict(state, assign=assign) is not None
    assert set(state) == names  # the caller's dict is not written to
    x = torch.randn(3, C)
    torch.testing.assert_close(target(x), source(x))
    pointers = [p.untyped_storage().data_ptr() for p in target.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_what_is_missing_is_said() -> None:
    state = GatedMLP(C, H, bias=False).state_dict()
    del state["up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj.weight"):
        GatedMLP(C, H, bias=False, packed=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for gate_up_proj"):
        GatedMLP(C, H, packed=True).load_state_dict(GatedMLP(C, H + 1).state_dict())


# --- transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation, theirs", [("silu", "silu"), ("gelu_tanh", "gelu_new")])
def test_llama_mlp(packed: bool, activation: str, theirs: str) -> None:
    llama = transformers_layers("llama")
    config = llama.LlamaConfig(
        hidden_size=C, num_attention_heads=4, intermediate_size=H, hidden_act=theirs, mlp_bias=True
    )
    layer = loud(llama.LlamaMLP(config))
    module = GatedMLP(C, H, activation=activation, packed=packed)
    module.load_state_dict(layer.state_dict())

    def llama_mlp(module: GatedMLP, x: Tensor) -> Tensor:
        weights = dict(module.named_parameters())
        for part in ("weight", "bias") if packed else ():
            both = weights.pop(f"gate_up_proj.{part}").chunk(2)
            weights[f"gate_proj.{part}"], weights[f"up_proj.{part}"] = both
        return functional_call(layer, weights, (x,), strict=True)

    check_parity(module, call, llama_mlp, torch.randn(2, 5, C))


def test_t5_gated_feed_forward() -> None:
    t5 = transformers_layers("t5")
    config = t5.T5Config(d_model=C, d_ff=H, dropout_rate=0.4, feed_forward_proj="gated-gelu")
    layer = t5.T5DenseGatedActDense(config)
    module = loud(GatedMLP(C, H, activation="gelu_tanh", bias=False, dropout=0.4))
    names = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}

    def t5_mlp(module: GatedMLP, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        weights = {f"{a}.weight": getattr(module, b).weight for a, b in names.items()}
        return functional_call(layer, weights, (x,), strict=True)

    def mine(module: GatedMLP, x: Tensor) -> Tensor:
        torch.manual_seed(5)  # T5 drops the same units
        return module(x)

    for training in (True, False):
        module.train(training)
        layer.train(training)
        check_parity(module, mine, t5_mlp, torch.randn(2, 5, C))


# --- as a module -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_as_a_module(packed: bool) -> None:
    x = torch.randn(3, C)
    made = check_module(
        lambda **options: GatedMLP(C, H, packed=packed, dropout=0.5, **options),
        lambda module: module.eval()(x.to(module.down_proj.weight.dtype)),
    )
    assert f"packed={packed}" in repr(made)


def test_both_kinds_start_alike() -> None:
    for packed in (False, True):
        torch.manual_seed(1)
        weights = GatedMLP(200, 300, packed=packed).state_dict()
        halves = weights["gate_up_proj.weight"].chunk(2) if packed else [weights["up_proj.weight"]]
        for weight in halves:
            bound = (6 / 500) ** 0.5
            assert 0.97 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("packed", [False, True])
def test_compile_autocast_gradcheck(packed: bool) -> None:
    module = loud(GatedMLP(C, H, packed=packed))
    x = torch.randn(2, 3, C)
    check_compiled(module, call, x)
    assert check_autocast(module, call, x).dtype == torch.bfloat16
    module = module.double()
    assert torch.autograd.gradcheck(module, (x.double().requires_grad_(),), fast_mode=True)


X = torch.zeros(2, C)


@pytest.mark.parametrize(
    "x, kind, message",
    [
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
        (X[:, 1:], ValueError, "x has width 11 but the module was made for in_features=12; both"),
        (
            X.double(),
            TypeError,
            "x has dtype torch.float64, but the weights are torch.float32; convert",
        ),
        (torch.zeros(()), ValueError, r"x has no dims, expected \[..., 12\]; unsqueeze it"),
        (
            torch.nested.nested_tensor([X[0:1], X], layout=torch.jagged),
            TypeError,
            "x must be a dense tensor, got a nested one; pad it",
        ),
    ],
)
def test_errors(x: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"GatedMLP: {message}"):
        GatedMLP(C, H)(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_features": 0}, "in_features is 0; it must be at least 1"),
        ({"hidden_features": -1}, "hidden_features is -1; it must be at least 1"),
        ({"out_features": 0}, "out_features is 0; it must be at least 1"),
        ({"activation": "tanh"}, "activation is 'tanh'; it must be 'silu', .* or 'identity'"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 <= dropout < 1"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"GatedMLP: {message}"):
        GatedMLP(**{"in_features": C, "hidden_features": H, **options})


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(implementation).failed == 0
