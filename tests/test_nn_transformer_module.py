"""The transformer stacks as modules: made, converted, copied, hooked, compiled, misused."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
from typing import Any

import pytest
import torch
from nn_helpers import check_autocast, check_compiled
from stack_helpers import (
    FF,
    N_LENS,
    B,
    C,
    H,
    M,
    N,
    causal,
    check,
    forced_packing,  # noqa: F401
    quiet_norms,
    run,
    seeded,  # noqa: F401
)
from torch import Tensor
from transformer_helpers import (
    M_PAD,
    MASKS,
    N_PAD,
    converted,
    for_encoder,
    layer,
    stack,
    streams_for,
)

import mmfast.nn.transformer_decoder as decoder_file
import mmfast.nn.transformer_encoder as encoder_file
from mmfast.nn import (
    MultiheadAttention,
    PackedTokens,
    TransformerDecoder,
    TransformerEncoder,
    TransformerEncoderLayer,
)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_constructors_and_state_dicts(kind: str) -> None:
    theirs_cls: Any = type(layer(kind))
    ours_cls: Any = type(layer(kind, True))
    mine, expected = (inspect.signature(cls.__init__).parameters for cls in (ours_cls, theirs_cls))
    assert list(mine) == list(expected)
    assert [p.default for p in mine.values()] == [p.default for p in expected.values()]
    forward, wanted = (inspect.signature(cls.forward) for cls in (ours_cls, theirs_cls))
    assert list(forward.parameters) == list(wanted.parameters)
    torch.manual_seed(1)
    theirs = layer(kind)
    torch.manual_seed(1)
    ours = layer(kind, True)
    for (name, a), (other, b) in zip(
        theirs.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, theirs_cls)
    whole: Any = TransformerEncoder if kind == "encoder" else TransformerDecoder
    made = whole(ours, 2, torch.nn.LayerNorm(C))
    assert list(made.state_dict()) == list(stack(kind).state_dict())
    assert type(whole(theirs, 2).layers[0]) is ours_cls
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301
        inputs = streams_for(kind)
        assert torch.equal(copied(*inputs), made(*inputs))
    assert all(p.is_meta for p in layer(kind, True, device="meta").parameters())
    assert layer(kind, True, dtype=torch.float64)(
        *[x.double() for x in streams_for(kind)]
    ).dtype == torch.float64  # fmt: skip


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_from_torch_shares_and_refuses(kind: str) -> None:
    theirs = stack(kind)
    cls: Any = TransformerEncoder if kind == "encoder" else TransformerDecoder
    ours = cls.from_torch(theirs.eval())
    assert not ours.training and not ours.layers[1].training
    assert [id(p) for p in ours.parameters()] == [id(p) for p in theirs.parameters()]
    assert type(theirs.layers[0].self_attn) is torch.nn.MultiheadAttention

    class Own(type(theirs.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Any:
            return args[0]

    with pytest.raises(TypeError, match="but got Linear"):
        cls.from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Own has a forward of its own"):
        type(ours.layers[0]).from_torch(Own(C, H))
    # A layer of the user's stays, and is called as PyTorch calls it.
    made = cls(Own(C, H), 2)
    inputs = streams_for(kind)
    assert made(*inputs) is inputs[0]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_hooks_and_replaced_attention(kind: str, packing: str) -> None:
    theirs, inputs = stack(kind), streams_for(kind)
    options = MASKS["padding"] if kind == "decoder" else for_encoder(MASKS["padding"])

    def call(module: Any, *leaves: Tensor) -> Tensor:
        return module(*leaves, **options)

    ours = converted(theirs)
    seen: list[Any] = []
    ours.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    check(theirs, ours, call, inputs, N_PAD)
    assert seen[0].shape == (B, N, C)

    ours = converted(theirs)
    ours.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    del seen[:]
    check(theirs, ours, call, inputs, N_PAD)
    assert seen[0].shape == (B, N, C)

    class Mine(torch.nn.MultiheadAttention):
        pass

    ours = converted(theirs)
    old = ours.layers[0].self_attn
    ours.layers[0].self_attn = Mine(C, H, batch_first=True)
    ours.layers[0].self_attn.load_state_dict(old.state_dict())
    check(theirs, ours, call, inputs, N_PAD)
    with pytest.raises(TypeError, match="was replaced or has hooks"):
        ours(PackedTokens.from_padded(inputs[0], lens=N_LENS), *inputs[1:])


def test_norms_of_the_user() -> None:
    """Another norm, and one with a hook, run as modules."""
    theirs = quiet_norms(layer("encoder"))
    theirs.norm1 = torch.nn.Identity()
    ours = TransformerEncoderLayer.from_torch(theirs)
    seen: list[Tensor] = []
    ours.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(B, N, C)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    ours.norm1, ours.norm2 = torch.nn.RMSNorm(C, eps=1e-6), torch.nn.RMSNorm(C)
    other = torch.nn.TransformerEncoderLayer(C, H, FF, 0.0, batch_first=True)
    for name, module in ours.named_children():
        setattr(other, name, module)
    torch.testing.assert_close(ours(x), other(x), rtol=1e-4, atol=1e-4)


def test_the_layers_call_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmfast.nn._sublayers as sublayers

    calls: list[str] = []
    for name in ("modulate", "glu_packed"):
        op = getattr(sublayers, name)
        monkeypatch.setattr(
            sublayers, name, lambda *a, _op=op, _n=name, **k: calls.append(_n) or _op(*a, **k)
        )
    layer("decoder", True, activation="swiglu", norm_first=True)(*streams_for("decoder"))
    assert sorted(calls) == ["glu_packed", "modulate", "modulate", "modulate"]


def test_packed_layers_compute_no_padding(packing: str) -> None:
    ours = converted(stack("decoder"))
    rows: list[int] = []
    for module in ours.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args: rows.append(args[0].shape[:-1].numel())
            )
    ours(*streams_for("decoder"), **MASKS["padding"])
    valid = int((~N_PAD).sum()) if packing == "packed" else B * N
    assert rows == [valid] * 8  # linear1, linear2, and out_proj of both attentions, twice


def test_dropout_is_applied_and_reproducible(packing: str) -> None:
    ours = converted(stack("decoder", dropout=0.5))
    inputs, options = streams_for("decoder"), MASKS["padding"]
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(ours(*inputs, **options))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    ours.eval()
    assert torch.equal(ours(*inputs, **options), ours(*inputs, **options))


@pytest.mark.parametrize("kind", [pytest.param("encoder", marks=pytest.mark.slow), "decoder"])
def test_compile(kind: str) -> None:
    options = MASKS["padding"] if kind == "decoder" else for_encoder(MASKS["padding"])
    ours = converted(stack(kind))
    ours.layers = ours.layers[:1]  # seconds a layer
    check_compiled(ours, lambda module, *x: module(*x, **options), *streams_for(kind))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_autocast(kind: str, packing: str) -> None:
    options = MASKS["padding"] if kind == "decoder" else for_encoder(MASKS["padding"])
    ours = converted(stack(kind))
    check_autocast(ours, lambda module, *x: module(*x, **options), *streams_for(kind))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_empty_batches_and_items(kind: str, packing: str) -> None:
    ours = converted(stack(kind))
    for shape in ((0, N, C), (B, 0, C)):
        inputs = [torch.randn(shape)] + ([torch.randn(shape[0], M, C)] if kind == "decoder" else [])
        assert ours(*inputs).shape == shape
    inputs = streams_for(kind)
    name = "src" if kind == "encoder" else "tgt"
    nothing = torch.ones(B, N, dtype=torch.bool)
    results = run(ours, lambda m, *x: m(*x, **{f"{name}_key_padding_mask": nothing}), inputs)
    assert all((x == 0).all() for x in results.values())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_compiles_pytorchs_own(kind: str) -> None:
    ours, inputs = converted(stack(kind)).eval(), streams_for(kind)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(*inputs), ours(*inputs), rtol=1e-5, atol=1e-5)
    assert type(ours.layers[0].self_attn) is MultiheadAttention
    with pytest.raises(TypeError, match="has no gated units"):
        torch.jit.script(layer(kind, True, activation="swiglu"))


def test_wrong_arguments() -> None:
    ours, (x, m) = converted(stack("decoder")), streams_for("decoder")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((x[..., 1:], m), {}, "tgt has width 15 but the module was made for 16"),
        ((x, m[:2]), {}, "memory has a batch of 2 but tgt has 3"),
        ((x[0, 0], m), {}, r"tgt has shape \[16\], expected \[batch, tokens, 16\]"),
        ((x, m), {"tgt_key_padding_mask": M_PAD}, r"padding mask of tgt has shape \[3, 7\]"),
        ((x, m), {"tgt_key_padding_mask": N_PAD.int()}, "only bool and floating types"),
        ((x, m), {"tgt_mask": torch.zeros(N, M)}, r"mask has shape \[5, 7\], expected \[5, 5\]"),
        ((x, m), {"memory_mask": torch.zeros(2, N, M)}, r"expected \[5, 7\] or \[6, 5, 7\]"),
        ((x, m), {"tgt_mask": causal(N).int()}, "only bool and floating types of masks"),
    ]
    for args, options, message in cases:
        for errors in (ValueError, (AssertionError, RuntimeError)):
            if "batch of 2" in message and errors is not ValueError:
                continue
            with pytest.raises(errors, match=message):
                ours(*args, **options)
    with pytest.raises(TypeError, match="or PackedTokens, got list"):
        ours([1], m)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu"):
        layer("encoder", True, activation="softmax")


def test_attention_is_ours_and_checks_pass() -> None:
    assert type(layer("decoder", True).multihead_attn) is MultiheadAttention
    for module in (encoder_file, decoder_file):
        assert doctest.testmod(module).failed == 0
