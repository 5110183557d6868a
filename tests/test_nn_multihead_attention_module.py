"""`mmfast.nn.MultiheadAttention` as a module: state, transforms, inside PyTorch's own layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from fresh_process import run_python
from mha_helpers import (  # noqa: F401  fixtures
    OPEN,
    B,
    E,
    H,
    L,
    MultiheadAttention,
    S,
    attention_mask,
    counted_calls,
    padding_mask,
    pair,
    seeded,
)
from nn_helpers import Calls, loud
from torch import Tensor

# --- as a module -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 6}, {"add_bias_kv": True}])
def test_state_dict_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    loud(ours)
    theirs.load_state_dict(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_initialisation_is_torch_s() -> None:
    states = []
    for cls in (torch.nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(3)
        states.append(cls(E, H, add_bias_kv=True).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_from_torch_shares_parameters() -> None:
    theirs, _ = pair(dropout=0.25, add_bias_kv=True)
    theirs.eval().in_proj_weight.requires_grad_(False)
    ours = MultiheadAttention.from_torch(theirs)
    mine = dict(ours.named_parameters())
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    assert all(mine[name] is parameter for name, parameter in theirs.named_parameters())
    assert ours.dropout == 0.25 and not ours.training and ours.batch_first
    assert ours.out_proj is not theirs.out_proj and not theirs.out_proj._forward_pre_hooks
    ours.train()
    assert not theirs.training
    again = MultiheadAttention.from_torch(ours)
    assert again.in_proj_weight is theirs.in_proj_weight


def test_from_torch_refuses_what_it_would_lose() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.MultiheadAttention but got Linear"):
        MultiheadAttention.from_torch(torch.nn.Linear(2, 2))  # type: ignore[arg-type]

    class Other(torch.nn.MultiheadAttention):
        def forward(self, *args: Any, **options: Any) -> Any:
            return None

    with pytest.raises(TypeError, match="forward or parametrizations of its own"):
        MultiheadAttention.from_torch(Other(E, H))
    normed = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.MultiheadAttention(E, H), "in_proj_weight"
    )
    with pytest.raises(TypeError, match="forward or parametrizations of its own"):
        MultiheadAttention.from_torch(normed)


def test_deepcopy_device_dtype_and_repr() -> None:
    ours = MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16)
    assert ours.in_proj_weight.is_meta and ours.in_proj_weight.dtype == torch.bfloat16
    assert isinstance(ours, torch.nn.MultiheadAttention)
    _, ours = pair()
    twin = copy.deepcopy(ours)
    x = torch.randn(B, L, E)
    assert torch.equal(ours(x, x, x)[0], twin(x, x, x)[0])
    assert twin.in_proj_weight is not ours.in_proj_weight
    assert "MultiheadAttention" in repr(ours)


def test_autocast() -> None:
    theirs, ours = pair()
    q, k = torch.randn(B, L, E), torch.randn(B, S, E)
    mask = attention_mask("float 2d", B, L, S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = theirs(q, k, k, attn_mask=mask)
        got, _ = ours(q, k, k, attn_mask=mask)
    assert got.dtype == expected.dtype == torch.bfloat16
    exact, _ = theirs(q, k, k, attn_mask=mask)
    allowed = 3 * (expected - exact).abs().max() + 2.0**-6 * exact.abs().max()
    assert (got - exact).abs().max() <= allowed
    got.float().sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


def test_functional_call_and_vmap() -> None:
    theirs, ours = pair()
    x, padding = torch.randn(4, B, L, E), torch.rand(4, B, L) < 0.3
    padding[..., OPEN] = False
    parameters = dict(ours.named_parameters())

    def call(x: Tensor, padding: Tensor) -> Tensor:
        return torch.func.functional_call(
            ours, parameters, (x, x, x), {"key_padding_mask": padding, "need_weights": False}
        )[0]

    got = torch.func.vmap(call)(x, padding)
    for i in range(4):
        expected, _ = theirs(x[i], x[i], x[i], key_padding_mask=padding[i])
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-5)


def test_checkpoint_gives_the_same_gradients_with_dropout() -> None:
    from torch.utils.checkpoint import checkpoint

    _, ours = pair(dropout=0.3)
    x, padding = torch.randn(B, S, E), padding_mask("right", B, S)
    grads = []
    for wrapped in (False, True):
        ours.zero_grad()
        torch.manual_seed(2)
        call = lambda x: ours(x, x, x, key_padding_mask=padding)[0]  # noqa: E731
        out = checkpoint(call, x, use_reentrant=False) if wrapped else call(x)
        out.square().sum().backward()
        grads.append(ours.in_proj_weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    theirs, ours = pair()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for kind, keys in (("scattered", S), ("right", S + 1)) if dynamic else (("values", S),):
        q, k = torch.randn(B, L, E), torch.randn(B, keys, E, requires_grad=True)
        padding = padding_mask(kind, B, keys)
        expected, expected_weights = theirs(q, k, k, key_padding_mask=padding)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), k)
        got, weights = compiled(q, k, k, key_padding_mask=padding)
        (grad,) = torch.autograd.grad(got.square().sum(), k)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


def test_the_first_call_of_a_process_may_be_compiled() -> None:
    """The library is then loaded while Dynamo traces."""
    program = """
import torch, mmfast
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
layer.self_attn = mmfast.nn.MultiheadAttention.from_torch(layer.self_attn)
x, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[5], [3]])
with torch.no_grad():
    got = torch.compile(layer, fullgraph=True, backend="eager")(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got, layer(x, src_key_padding_mask=padding))
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_errors_under_compile_say_the_same() -> None:
    torch._dynamo.reset()
    _, ours = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = torch.zeros(B, L, E)
    with pytest.raises(Exception, match="expecting embedding dimension of 24, but got 23"):
        compiled(x[..., 1:], x, x)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    theirs, ours = pair()
    q, k, padding = torch.randn(B, L, E), torch.randn(B, S, E), padding_mask("right", B, S)
    program = torch.export.export(
        ours.eval(), (q, k, k), {"key_padding_mask": padding}, strict=strict
    )
    got, _ = program.module()(q, k, k, key_padding_mask=padding_mask("left", B, S))
    expected, _ = theirs(q, k, k, key_padding_mask=padding_mask("left", B, S))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_torchscript_compiles_torch_s_module() -> None:
    _, ours = pair()
    x, padding = torch.randn(B, S, E), padding_mask("right", B, S)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(ours)
    got, _ = scripted(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(
        got, ours(x, x, x, key_padding_mask=padding)[0], rtol=1e-4, atol=1e-5
    )
    assert scripted.in_proj_weight.data_ptr() == ours.in_proj_weight.data_ptr()


def test_nested_tensors_are_torch_s(calls: Calls) -> None:
    theirs, ours = pair()
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    theirs.eval(), ours.eval()
    with torch.no_grad():
        expected, _ = theirs(x, x, x, need_weights=False)
        got, _ = ours(x, x, x, need_weights=False)
    assert all(torch.equal(a, b) for a, b in zip(got.unbind(), expected.unbind(), strict=True))
    assert calls.count == 0
    with pytest.raises(AssertionError, match="NestedTensor outside of its fast path"):
        ours.train()(x, x, x)


# --- inside PyTorch's layers -------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["none", "right", "scattered"])
def test_transformer_layers(norm_first: bool, training: bool, kind: str, calls: Calls) -> None:
    options = {"dropout": 0.0, "norm_first": norm_first, "batch_first": True}
    encoder = loud(torch.nn.TransformerEncoderLayer(E, H, 32, **options)).train(training)
    decoder = loud(torch.nn.TransformerDecoderLayer(E, H, 32, **options)).train(training)
    swapped_encoder, swapped_decoder = copy.deepcopy(encoder), copy.deepcopy(decoder)
    swapped_encoder.self_attn = MultiheadAttention.from_torch(swapped_encoder.self_attn)
    swapped_decoder.self_attn = MultiheadAttention.from_torch(swapped_decoder.self_attn)
    swapped_decoder.multihead_attn = MultiheadAttention.from_torch(swapped_decoder.multihead_attn)

    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    padding, causal = padding_mask(kind, B, S), torch.ones(L, L).tril().logical_not()
    with torch.set_grad_enabled(training):
        expected = encoder(memory, src_key_padding_mask=padding)
        got = swapped_encoder(memory, src_key_padding_mask=padding)
        # In eval mode without gradients PyTorch's layer would bypass its self_attn; ours is called.
        assert calls.count == 1
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        rest = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding}
        expected = decoder(x, memory, **rest)
        got = swapped_decoder(x, memory, **rest)
        assert calls.count == 3
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_transformer_encoder_in_eval_mode(calls: Calls) -> None:
    """With padding it makes nested tensors, PyTorch's own business; otherwise we are called."""
    layer = loud(torch.nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dropout=0.0))
    stack = torch.nn.TransformerEncoder(layer, 2).eval()
    swapped = copy.deepcopy(stack)
    for one in swapped.layers:
        one.self_attn = MultiheadAttention.from_torch(one.self_attn)
    x, padding = torch.randn(B, S, E), padding_mask("right", B, S)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        for options in ({}, {"src_key_padding_mask": padding}):
            torch.testing.assert_close(
                swapped(x, **options), stack(x, **options), rtol=1e-3, atol=1e-4
            )
    assert calls.count == 2
    swapped.enable_nested_tensor = swapped.use_nested_tensor = False
    with torch.no_grad():
        got = swapped(x, src_key_padding_mask=padding)
    assert calls.count == 4
    torch.testing.assert_close(
        got[~padding], stack(x, src_key_padding_mask=padding)[~padding], rtol=1e-3, atol=1e-4
    )
