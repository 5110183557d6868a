"""Patched models of torch.nn: the results of the stock classes, without what padding costs.

That `mmfast.nn`'s classes do what torch's do, mask by mask, is in test_nn_transformer.py and
test_nn_multihead_attention.py; here it is the exchange in place.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mha_helpers import INF, run
from nn_helpers import assert_near, compare, loud
from stack_helpers import B, C, M, N, quiet_norms
from torch import Tensor, nn
from transformer_helpers import MASKS, N_PAD, for_encoder, layer, stack, streams_for

import mmfast
from mmfast.nn import _layer_streams
from mmfast.testing.architectures import _harness

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And batches are packed however small they are."""
    monkeypatch.setattr(_layer_streams, "_SMALL", 0)
    torch.manual_seed(0)


def valid(out: Tensor, options: dict[str, Any], batch_first: bool) -> Tensor:
    """Without rows of padding, which torch computes and mmfast does not."""
    pad = options.get("tgt_key_padding_mask", options.get("src_key_padding_mask"))
    if pad is None:
        return out
    keep = (pad == 0) if pad.is_floating_point() else ~pad
    return (out if batch_first else out.transpose(0, 1))[keep]


@pytest.mark.parametrize("masks", ["none", "padding, causal", "per head", "holes, scores"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_stacks(kind: str, norm_first: bool, batch_first: bool, masks: str) -> None:
    """Results and gradients against torch's own in float64, through our attention."""
    module = stack(kind, norm_first=norm_first, batch_first=batch_first)
    options = dict(MASKS[masks])
    if kind == "encoder":
        options = for_encoder(options)
    attentions = 2 if kind == "encoder" else 4

    def theirs(model: Any, *streams: Tensor) -> Tensor:
        named = {k: _as(v, streams[0].dtype) for k, v in options.items()}
        return valid(model(*streams, **named), options, batch_first)

    def ours(model: Any, *streams: Tensor) -> Tensor:
        report = mmfast.patch(model)
        with _harness.counted() as calls:
            out = theirs(model, *streams)
        assert calls.attention == attentions
        assert len(report.swapped) == attentions + 3
        report.undo()
        return out

    compare(module, ours, theirs, *streams_for(kind, batch_first))


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({"batch_first": True}, {"need_weights": False}),
        ({"kdim": 20, "vdim": 12}, {"average_attn_weights": False}),
        ({"add_bias_kv": True, "add_zero_attn": True}, {}),
        ({"bias": False}, {"key_padding_mask": torch.arange(7) >= torch.tensor([[7], [3], [5]])}),
        ({}, {"attn_mask": torch.zeros(5, 7).masked_fill(torch.eye(5, 7) == 1, -INF)}),
    ],
)
def test_attention(options: dict[str, Any], call: dict[str, Any]) -> None:
    theirs = loud(nn.MultiheadAttention(24, 4, **options))
    ours = copy.deepcopy(theirs)
    mmfast.patch(ours)
    first = bool(options.get("batch_first"))
    inputs = [torch.randn(3, 5, 24), torch.randn(3, 7, theirs.kdim), torch.randn(3, 7, theirs.vdim)]
    inputs = inputs if first else [x.transpose(0, 1).contiguous() for x in inputs]
    exact = run(copy.deepcopy(theirs).double(), inputs, "", **dict(call))
    eager = run(theirs, inputs, "", **dict(call))
    with _harness.counted() as calls:
        got = run(ours, inputs, "", **dict(call))
    assert calls.attention == 1
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert_near(name, got[name], expected, eager[name])


def test_only_valid_rows_are_computed() -> None:
    """Linears of a patched model see no padding; undone, they see all rows."""
    model = stack("encoder")
    rows: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args: rows.append(args[0].shape[:-1].numel())
            )
    report = mmfast.patch(model)
    model(*streams_for("encoder"), src_key_padding_mask=N_PAD)
    assert set(rows) == {int((~N_PAD).sum())}
    rows.clear()
    report.undo()
    model(*streams_for("encoder"), src_key_padding_mask=N_PAD)
    assert set(rows) == {B * N}


INCLUDED = [None, "TransformerEncoder", "TransformerEncoderLayer", "MultiheadAttention", "layers.1"]


@pytest.mark.parametrize("include", INCLUDED)
@torch.no_grad()
def test_the_fast_path_of_torch_does_not_go_past_us(include: str | None) -> None:
    """In inference torch hands the weights of layers, and ragged batches, to kernels of its own.

    With the stack left as it is, layers get the nested tensors that it makes; one layer of ours
    beside one of torch's too.
    """
    model = stack("encoder").eval()
    (x,) = streams_for("encoder")
    expected = model(x, src_key_padding_mask=N_PAD)
    report = mmfast.patch(model, include=include)
    assert report.swapped
    with _harness.counted() as calls:
        out = model(x, src_key_padding_mask=N_PAD)
    if include != "MultiheadAttention":  # a nested tensor in a layer of torch: torch's own
        assert calls.attention == (1 if include == "layers.1" else 2)
    torch.testing.assert_close(out[~N_PAD], expected[~N_PAD], rtol=1e-4, atol=1e-4)
    with _harness.counted() as calls:
        model(x)
    assert calls.attention == (1 if include == "layers.1" else 2)
    report.undo()
    with _harness.counted() as calls:
        assert torch.equal(model(x, src_key_padding_mask=N_PAD), expected)
    assert calls.attention == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_transformer_generates_alike() -> None:
    """`torch.nn.Transformer`, whose own class stays, step by step with a growing target."""
    model = quiet_norms(nn.Transformer(C, 4, 2, 2, 48, 0.0, batch_first=True)).eval()
    source, pad = torch.randn(B, M, C), torch.arange(M) >= torch.tensor([[M], [3], [5]])
    embed = torch.randn(11, C)

    @torch.no_grad()
    def generate(model: nn.Module) -> list[list[int]]:
        memory = model.encoder(source, src_key_padding_mask=pad)
        tokens = torch.zeros(B, 1, dtype=torch.long)
        for _ in range(8):
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            out = model.decoder(embed[tokens], memory, mask, memory_key_padding_mask=pad)
            best = (out[:, -1] @ embed.t()).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
        return tokens.tolist()

    expected = generate(model)
    report = mmfast.patch(model)
    assert type(model) is nn.Transformer
    with _harness.counted() as calls:
        assert generate(model) == expected
    assert calls.attention == 2 + 8 * 4
    assert len(report.swapped) == 6 + 4 + 2


def test_what_the_stock_layer_gives_nan_for() -> None:
    """An item of padding alone: finite, and so are the gradients (pytorch#41508)."""
    attention = nn.MultiheadAttention(C, 4, batch_first=True)
    x, pad = torch.randn(2, N, C), torch.tensor([[False] * N, [True] * N])
    assert attention(x, x, x, key_padding_mask=pad)[0].isnan().any()
    mmfast.patch(attention)
    out, weights = attention(x, x, x, key_padding_mask=pad)
    assert out.isfinite().all()
    assert not weights[1].any()
    out[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_torchscript_compiles_the_stock_classes(kind: str) -> None:
    model = stack(kind).eval()
    inputs = streams_for(kind)
    with torch.no_grad():
        expected = model(*inputs)
        mmfast.patch(model)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(*inputs), expected, rtol=1e-4, atol=1e-4)


def test_hooks_on_an_attention_see_a_call_of_torch() -> None:
    """The layer then runs torch's forward, around our attention."""
    module = quiet_norms(layer("encoder")).eval()
    seen: list[Any] = []
    module.self_attn.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    (x,) = streams_for("encoder")
    expected = module(x)
    mmfast.patch(module)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    (before, _), (after, _) = seen
    assert [a.shape for a in before] == [a.shape for a in after] == [(B, N, C)] * 3


def test_other_attentions_and_layers_are_left() -> None:
    """A layer with an attention of the user's own, and a stack with such a layer."""

    class Attention(nn.MultiheadAttention):
        pass

    model = stack("encoder")
    model.layers[1].self_attn = Attention(C, 4, batch_first=True)
    (x,) = streams_for("encoder")
    expected = model(x)
    report = mmfast.patch(model)
    reasons = {row.name: row.reason for row in report.left}
    assert reasons == {
        "": "not all of its layers were exchanged",
        "layers.1": "its attention is a Attention of torch or the user's own, and was left",
        "layers.1.self_attn": "no adapter for this class",
    }
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_drops_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not computed, but for a hook that would see them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import mmfast.nn._projected_attention as implementation

    config = transformers.SiglipVisionConfig(
        hidden_size=C, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.SiglipVisionModel(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = model(pixels).pooler_output
    report = mmfast.patch(model)
    wanted: list[Any] = []
    op = implementation.cross_attention

    def spy(*args: Any, **named: Any) -> Any:
        wanted.append(named["return_weights"])
        return op(*args, **named)

    monkeypatch.setattr(implementation, "cross_attention", spy)
    torch.testing.assert_close(model(pixels).pooler_output, expected, rtol=1e-4, atol=1e-5)
    assert wanted == [False]
    (head,) = (m for m in model.modules() if type(m).__name__.endswith("PoolingHead"))
    weights: list[Tensor] = []
    hook = head.attention.register_forward_hook(lambda m, args, out: weights.append(out[1]))
    model(pixels)
    hook.remove()
    assert wanted == [False, "mean"]
    assert weights[0].shape == (2, 1, 4)
    report.undo()
    assert "_drop_weights" not in head.attention.__dict__
    assert head.attention(*[torch.randn(2, 3, C)] * 3)[1] is not None
