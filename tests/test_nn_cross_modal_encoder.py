"""`CrossModalEncoderLayer` and `CrossModalEncoder` against plain torch."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
from cross_modal_helpers import KINDS, MISSING, N_PAD, WIDE, layer, stack, streams
from nn_helpers import check_autocast, check_compiled
from stack_helpers import (
    FF,
    N_LENS,
    B,
    C,
    H,
    M,
    N,
    as_float,
    causal,
    check,
    forced_packing,  # noqa: F401
    holes,
    padding,
    quiet_norms,
    run,
    same,
    seeded,  # noqa: F401
)
from torch import Tensor

import mmfast
import mmfast.nn.context_cache as cache_file
import mmfast.nn.cross_modal_encoder as stack_file
import mmfast.nn.cross_modal_encoder_layer as layer_file
from mmfast.nn import (
    CrossModalEncoder,
    CrossModalEncoderLayer,
    CrossModalOutput,
    MultiheadAttention,
)


@pytest.mark.parametrize("pads", ["lens", "holes"])
def test_statistics(pads: str, packing: str) -> None:
    module, (x, memory) = layer(), streams()
    if pads == "lens":
        options: dict[str, Any] = {"tgt_lens": N_LENS, "memory_lens": MISSING}
        x_pad, memory_pad = N_PAD, padding(MISSING, M)
    else:
        x_pad, memory_pad = holes(N), holes(M)
        options = {"tgt_key_padding_mask": x_pad, "memory_key_padding_mask": memory_pad}
    got = module(x, memory, **options, return_importance=True, return_weights="per_head")
    assert isinstance(got, CrossModalOutput)
    torch.testing.assert_close(got.out, module(x, memory, **options))
    for weights, importance, keys in (
        (got.weights, got.importance, memory_pad),
        (got.self_weights, got.self_importance, x_pad),
    ):
        assert weights.shape == (B, H, N, keys.shape[1])
        assert importance.shape == (B, H, keys.shape[1])
        live = ~x_pad & ~keys.all(1, keepdim=True)
        torch.testing.assert_close(weights.sum(-1)[:, 0][live], torch.ones(int(live.sum())))
        assert (weights.masked_fill(~keys[:, None, None], 0.0) == 0).all()
        assert (weights.masked_fill(~x_pad[:, None, :, None], 0.0) == 0).all()
        torch.testing.assert_close(importance, weights.sum(2))
    mean = module(x, memory, **options, return_weights=True)
    assert mean.weights.shape == (B, N, M) and mean.importance is None
    whole = stack(3)(x, memory, **options, return_importance=True)
    assert whole.importance.shape == (B, 3, H, M) and whole.self_importance.shape == (B, 3, H, N)
    assert whole.weights is None


def test_a_stack_is_its_layers_in_turn(packing: str) -> None:
    module, inputs = stack(3), streams()
    options = {"tgt_lens": N_LENS, "memory_lens": MISSING}

    def layers(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        for one in module.layers:
            x = one(x, memory, **options)
        return module.norm(x)

    same(
        run(module, layers, inputs, N_PAD),
        run(module, lambda m, *leaves: m(*leaves, **options), inputs, N_PAD),
    )


def test_layers_that_differ(packing: str) -> None:
    """As in a Q-Former: every other layer attends to the image."""
    layers = [layer(), layer(cross_attention=False), layer(self_attention=False, norm_first=True)]
    module, inputs = CrossModalEncoder(layers), streams()

    def turn(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        for one, context in zip(module.layers, (memory, None, memory), strict=True):
            x = one(x, context)
        return x

    same(run(module, turn, inputs), run(module, lambda m, *leaves: m(*leaves), inputs))
    cached = module(inputs[0], module.prepare_context(inputs[1]))
    torch.testing.assert_close(cached, module(*inputs), rtol=1e-5, atol=1e-5)
    got = module(*inputs, return_importance=True)
    assert got.importance.shape == (B, 2, H, M) and got.self_importance.shape == (B, 2, H, N)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_from_torch_and_state_dicts(kind: str, packing: str) -> None:
    torch_layer: Any = getattr(torch.nn, f"Transformer{kind.capitalize()}Layer")
    torch_stack: Any = getattr(torch.nn, f"Transformer{kind.capitalize()}")
    theirs = quiet_norms(torch_stack(torch_layer(C, H, FF, 0.0), 2, torch.nn.LayerNorm(C)))
    ours = CrossModalEncoder.from_torch(theirs)
    assert [id(p) for p in ours.parameters()] == [id(p) for p in theirs.parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    made = CrossModalEncoder(
        CrossModalEncoderLayer(C, H, FF, cross_attention=kind == "decoder"), 2,
        torch.nn.LayerNorm(C),
    )  # fmt: skip
    made.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(N, B, C), torch.randn(M, B, C)][: 1 if kind == "encoder" else 2]
    name = "src_key_padding_mask" if kind == "encoder" else "tgt_key_padding_mask"

    def reference(module: Any, *leaves: Tensor) -> Tensor:
        return module(*leaves, **{name: N_PAD})

    def call(module: Any, *leaves: Tensor) -> Tensor:
        return module(*leaves, tgt_key_padding_mask=N_PAD)

    check(theirs, ours, call, inputs, N_PAD.t(), reference)
    with pytest.raises(TypeError, match="TransformerEncoder but got Linear"):
        CrossModalEncoder.from_torch(torch.nn.Linear(2, 2))


def test_checkpointing_keeps_less_and_gives_the_same() -> None:
    plain_stack, inputs = stack(3, dropout=0.3), streams()
    again = copy.deepcopy(plain_stack)
    again.checkpoint = True
    options = {"tgt_lens": N_LENS, "memory_lens": MISSING}
    results, saved = [], []
    for module in (plain_stack, again):
        kept: set[int] = set()

        def pack(x: Tensor, kept: set[int] = kept) -> Tensor:
            kept.add(x.data_ptr())
            return x

        def call(module: Any, *leaves: Tensor) -> Tensor:
            torch.manual_seed(4)
            return module(*leaves, **options)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            results.append(run(module, call, inputs, N_PAD))
        saved.append(kept)
    same(*results, 1e-6)
    assert 0 < len(saved[1]) < len(saved[0]) / 4
    # A cache made outside is kept for all layers; gradients reach what it was made of.
    cached = [
        run(m, lambda m, x, y: m(x, m.prepare_context(y)), inputs)
        for m in (plain_stack.eval(), again.eval())
    ]
    same(*cached, 1e-6)
    same(cached[0], run(plain_stack, lambda m, x, y: m(x, y), inputs))


def test_causal_masks_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (x, memory) = stack(), streams()
    seen: list[Any] = []
    attend = MultiheadAttention.attend

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        seen.append((options.get("is_causal", False), options.get("mask") is not None))
        return attend(self, *args, **options)

    monkeypatch.setattr(MultiheadAttention, "attend", spy)
    expected = module(x, memory, tgt_mask=causal(N), tgt_is_causal=False)
    assert seen[0] == (False, True)
    for options in (
        {"tgt_mask": causal(N)},
        {"tgt_mask": as_float(causal(N))},
        {"tgt_is_causal": True},
    ):
        del seen[:]
        torch.testing.assert_close(module(x, memory, **options), expected)
        assert seen[0] == (True, False)
    other = causal(N)
    other[0, 4] = False
    del seen[:]
    assert not torch.allclose(module(x, memory, tgt_mask=other), expected, atol=1e-3)
    assert seen[0] == (False, True)


@pytest.mark.parametrize("jointly", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile(jointly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = stack(2 if jointly else 1, gate="scalar", activation="swiglu", norm_first=True)
    if jointly:
        monkeypatch.setattr(cache_file, "_hoists", lambda *args: True)
        monkeypatch.setattr(
            cache_file,
            "project_for_all",
            lambda layers, *args: cache_file.ContextCache(
                cache_file.project_jointly([x.multihead_attn for x in layers], *args)
            ),
        )
    options = {"tgt_lens": N_LENS, "memory_lens": MISSING}
    check_compiled(module, lambda m, *leaves: m(*leaves, **options), *streams())


def test_autocast(packing: str) -> None:
    options = {"tgt_lens": N_LENS, "memory_lens": MISSING}
    for kind in ("post norm", "pre norm, swiglu, gate of channels"):
        check_autocast(stack(**KINDS[kind]), lambda m, *x: m(*x, **options), *streams())


def test_bfloat16(packing: str) -> None:
    module = stack(norm_first=True)
    options = {"tgt_lens": N_LENS, "memory_lens": MISSING}
    inputs = streams()
    expected = module(*inputs, **options)
    got = module.bfloat16()(*[x.bfloat16() for x in inputs], **options)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_nothing_at_all(packing: str) -> None:
    module = stack()
    assert module(torch.randn(0, N, C), torch.randn(0, M, WIDE)).shape == (0, N, C)
    assert module(torch.randn(B, 0, C), torch.randn(B, M, WIDE)).shape == (B, 0, C)
    none = torch.zeros(B, dtype=torch.int64)
    results = run(module, lambda m, *x: m(*x, tgt_lens=none, memory_lens=none), streams())
    assert all((x == 0).all() for x in results.values())


@pytest.mark.parametrize("lengths", [False, True])
def test_the_plan_changes_no_result(lengths: bool, packing: str) -> None:
    module, inputs = stack(gate="scalar"), streams()
    options = {"tgt_lens": N_LENS, "memory_lens": MISSING} if lengths else {}
    results = []
    for plan in ("projected", "packed", "absorbed"):
        with mmfast.use_plan(plan):
            results.append(run(module, lambda m, *leaves: m(*leaves, **options), inputs))
    same(results[0], results[1])
    same(results[0], results[2])


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    module = stack()
    module(*streams())
    assert module.explain().name in ("projected", "packed", "absorbed")
    assert module.layers[0].explain(8, 1, 577).costs
    assert "projected" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cross_attention=False"):
        layer(cross_attention=False).explain()


def test_examples() -> None:
    for module in (stack_file, layer_file, cache_file):
        assert doctest.testmod(module).failed == 0
