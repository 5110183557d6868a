"""`mmfast.nn.GatedCrossAttentionBlock` against plain torch, and what blind rows may not do."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import (
    Calls,
    check_autocast,
    check_compiled,
    check_module,
    compare,
    gradients,
    loud,
)
from torch import Tensor

import mmfast.nn._projected_attention as attention_module
import mmfast.nn.gated_cross_attention_block as implementation
from mmfast.nn import GatedCrossAttentionBlock

B, N, M, E, C, H = 3, 5, 7, 24, 20, 4
LENS = torch.tensor([M, 4, 0])
SEES = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "feed_forward": "mlp", "activation": "gelu", "bias": True},
    {"num_kv_heads": 2, "qk_norm": "rms", "mask_feed_forward": True, "eps": 1e-2},
    {"gate": "vector", "context_dim": C, "hidden_features": 10, "activation": "gelu_tanh"},
    {"head_dim": 10, "bias": True, "mask_feed_forward": True, "gate": "vector", "norm": "layer"},
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def block(**options: Any) -> GatedCrossAttentionBlock:
    return loud(GatedCrossAttentionBlock(**{"dim": E, "num_heads": H, **options}))


def streams(module: GatedCrossAttentionBlock) -> tuple[Tensor, Tensor]:
    return torch.randn(B, N, E), torch.randn(B, M, module.attention.context_dim)


def call(module: Any, x: Tensor, context: Tensor) -> Tensor:
    return module(x, context)


def eager(
    module: GatedCrossAttentionBlock, x: Tensor, context: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """The block in plain torch, with the NxM matrix; `allowed` bool `[B, 1, N, M]`."""
    attn = module.attention

    def norm(layer: Any, y: Tensor) -> Tensor:
        if isinstance(layer, torch.nn.LayerNorm):
            return F.layer_norm(y, y.shape[-1:], layer.weight, layer.bias, module.eps)
        return y * (y.square().mean(-1, keepdim=True) + module.eps).rsqrt() * layer.weight

    def heads(y: Tensor, count: int, layer: Any) -> Tensor:
        y = y.unflatten(-1, (count, -1))
        y = (y if layer is None else norm(layer, y)).transpose(1, 2)
        return y.repeat_interleave(H // count, dim=1)

    q = heads(attn.q_proj(norm(module.attn_norm, x)), H, attn.q_norm)
    k = heads(attn.k_proj(context), attn.num_kv_heads, attn.k_norm)
    v = heads(attn.v_proj(context), attn.num_kv_heads, None)
    scores = q @ k.transpose(-2, -1) * attn.head_dim**-0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        p = scores.softmax(-1) * allowed
    else:
        p = scores.softmax(-1)
    attended = attn.out_proj((p @ v).transpose(1, 2).flatten(2))
    blind = torch.zeros(B, N, 1, dtype=torch.bool)
    if allowed is not None:
        blind = ~allowed.expand(B, 1, N, M).any(-1)[:, 0, :, None]
    h = x + module.attn_gate.tanh() * attended.masked_fill(blind, 0.0)
    ff, y = module.feed_forward, norm(module.ff_norm, h)
    if hasattr(ff, "gate_proj"):
        act = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[ff.activation]
        fed = ff.down_proj(act(ff.gate_proj(y)) * ff.up_proj(y))
    else:
        fed = ff.down_proj({"gelu": F.gelu, "relu": F.relu}[ff.activation](ff.up_proj(y)))
    if module.mask_feed_forward:
        fed = fed.masked_fill(blind, 0.0)
    return h + module.ff_gate.tanh() * fed


def check(module: GatedCrossAttentionBlock, allowed: Tensor, **options: Any) -> None:
    """`options` say the same as `allowed`: results and gradients agree."""
    compare(
        module,
        lambda m, x, context: m(x, context, **options),
        lambda m, x, context: eager(m, x, context, allowed.expand(B, 1, N, M)),
        *streams(module),
    )


BY_LENS = (torch.arange(M) < LENS[:, None])[:, None, None, :]


# --- the same results --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant(variant: dict[str, Any], dtype: torch.dtype) -> None:
    module = block(**variant, dtype=dtype)
    compare(module, call, eager, *streams(module))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("small", [0, 10**9])
def test_what_rows_may_see(
    variant: dict[str, Any], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that skip the feed-forward are left out of it (small = 0), or masked."""
    monkeypatch.setattr("mmfast.nn._tokens._SMALL", small)
    module = block(**variant)
    sees = SEES[:, None, :, None]
    check(module, BY_LENS, context_lens=LENS)
    check(module, sees, row_mask=SEES)
    check(module, BY_LENS & sees, context_lens=LENS, row_mask=SEES)

    own, other = torch.randint(0, 3, (B, N)), torch.randint(0, 2, (B, M))
    equal = own[:, None, :, None] == other[:, None, None, :]
    at_most = other[:, None, None, :] <= own[:, None, :, None]
    segments = {"x_segments": own, "context_segments": other}
    check(module, equal, **segments)
    check(module, equal & sees, row_mask=SEES, **segments)
    narrow = {name: s.to(torch.int8) for name, s in segments.items()}
    check(module, equal & sees, row_mask=SEES, **narrow)
    rule = {"segment_rule": "at_most", "context_lens": LENS}
    check(module, at_most & sees & BY_LENS, row_mask=SEES, **segments, **rule)

    mask = torch.rand(B, 1, N, M) < 0.4
    mask[0, :, 3] = False
    check(module, mask, mask=mask)
    check(module, mask & sees, mask=mask, row_mask=SEES)
    bottom_right = torch.arange(M) <= torch.arange(N)[:, None] + (M - N)
    check(module, bottom_right[None, None], is_causal=True)
    bottom_right = torch.arange(M) <= torch.arange(N)[:, None] + (LENS - N).view(-1, 1, 1, 1)
    check(
        module, bottom_right & BY_LENS, is_causal=True, context_lens=LENS
    )  # row 0 of item 1: none


def test_the_kernels_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    names: list[str] = []
    monkeypatch.setattr(attention_module, "cross_attention", calls)
    for name in ("modulate", "gated_residual"):
        op = getattr(implementation, name)

        def counted(*args: Any, _op: Any = op, _name: str = name, **options: Any) -> Any:
            names.append(_name)
            return _op(*args, **options)

        monkeypatch.setattr(implementation, name, counted)
    module = block()
    module(*streams(module))
    assert calls.count == 1 and names == ["modulate", "modulate", "gated_residual"]


def test_what_is_returned_beside_the_result() -> None:
    module = block(mask_feed_forward=True)
    x, context = streams(module)
    options: dict[str, Any] = {"context_lens": LENS, "row_mask": SEES}
    got = module(
        x, context, return_lse=True, return_importance=True, return_weights=True, **options
    )
    assert torch.equal(got.out, module(x, context, **options))
    blind = ~SEES | (LENS == 0)[:, None]
    assert torch.equal((got.lse == -torch.inf).all(1), blind)
    rows = got.weights.sum(-1)
    torch.testing.assert_close(rows, (~blind).float())
    torch.testing.assert_close(got.importance.mean(1), got.weights.sum(1))
    got = module(x, context, return_importance=True, **options)
    assert got.lse is None and got.weights is None


# --- rows that see nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("small", [0, 10**9])
def test_a_missing_context_contributes_exactly_nothing(
    variant: dict[str, Any], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmfast.nn._tokens._SMALL", small)
    module = block(**variant)
    x, clean = streams(module)
    padding = torch.arange(M) >= LENS[:, None]
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        text = x.clone().requires_grad_()
        context = clean.masked_fill(padding[..., None], filler).requires_grad_()
        out = module(text, context, context_lens=LENS, row_mask=SEES)
        grads = gradients(out, module, text, context)
        assert (grads[1][padding] == 0).all()
        results.append([out, *grads])
        blind = ~SEES | (LENS == 0)[:, None]
        if module.mask_feed_forward:
            assert torch.equal(out[blind], x[blind])
    for zeros, *others in zip(*results, strict=True):
        assert all(torch.equal(zeros, other) for other in others)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nobody_has_a_context(variant: dict[str, Any]) -> None:
    """All the ways to say so leave the block without attention, in the result and in training."""
    module = block(**variant)
    x, context = streams(module)
    nobody = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    expected = eager(module, x, context, nobody.expand(B, 1, N, M))
    for out in (
        module(x, context, context_lens=torch.zeros(B, dtype=torch.int64)),
        module(x, context[:, :0]),
        module(x, context, mask=nobody),
        module(x, context, row_mask=torch.zeros(B, N, dtype=torch.bool)),
        module(x, torch.full_like(context, float("nan")), context_lens=torch.zeros(B).int()),
    ):
        torch.testing.assert_close(out, expected)
        for (name, _), grad in zip(module.named_parameters(), gradients(out, module), strict=True):
            learns = not module.mask_feed_forward and name.startswith("ff_")
            assert grad.isfinite().all()
            if name.startswith("att") or module.mask_feed_forward:
                assert (grad == 0).all(), name
            elif learns:
                assert (grad != 0).any(), name
        if module.mask_feed_forward:
            assert torch.equal(out, x)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("small", [0, 10**9])
def test_rows_past_x_lens_may_hold_nan(
    variant: dict[str, Any], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmfast.nn._tokens._SMALL", small)
    module = block(**variant)
    clean, context = streams(module)
    x_lens = torch.tensor([N, 2, 0])
    padding = torch.arange(N) >= x_lens[:, None]
    for options in ({}, {"context_lens": LENS}, {"row_mask": SEES}):
        results = []
        for filler in (0.0, float("nan"), float("inf")):
            x = clean.masked_fill(padding[..., None], filler).requires_grad_()
            out = module(x, context, x_lens=x_lens, **options)
            assert (out[padding] == 0).all()
            grads = gradients(out, module, x)
            assert (grads[0][padding] == 0).all()
            results.append([out, *grads])
        for zeros, *others in zip(*results, strict=True):
            assert all(torch.equal(zeros, other) for other in others)
        if not options:
            whole = module(clean, context)
            torch.testing.assert_close(results[0][0][~padding], whole[~padding])


def test_closed_gates_are_the_identity() -> None:
    for variant in VARIANTS:
        module = GatedCrossAttentionBlock(E, H, **variant)
        x, context = streams(module)
        out = module(x, context, context_lens=LENS)
        assert torch.equal(out, x)
        grads = dict(zip((n for n, _ in module.named_parameters()), gradients(out, module)))
        assert (grads["attn_gate"] != 0).any() and (grads["ff_gate"] != 0).any()  # they open


@pytest.mark.parametrize("shape", [(0, N, M), (B, 0, M), (B, N, 0)])
def test_empty_batches_and_sequences(shape: tuple[int, int, int]) -> None:
    for variant in VARIANTS:
        module = block(**variant)
        batch, rows, keys = shape
        x, context = (
            torch.randn(batch, rows, E),
            torch.randn(batch, keys, module.attention.context_dim),
        )
        out = module(x, context, row_mask=torch.ones(batch, rows, dtype=torch.bool))
        assert out.shape == x.shape
        assert all(g.isfinite().all() for g in gradients(out, module))


# --- as a module -------------------------------------------------------------------------------


def test_residual_dropout() -> None:
    """What is dropped is what a branch adds; nothing is dropped in eval."""
    module = block(residual_dropout=0.5)
    x, context = streams(module)
    torch.testing.assert_close(module.eval()(x, context), eager(module, x, context))
    module.train()
    with torch.no_grad():
        module.ff_gate.zero_()
    added = (module(x, context) - x) != 0
    assert 0.3 < added.float().mean() < 0.7


def test_attention_dropout() -> None:
    module = block(dropout=0.5)
    x, context = streams(module)
    assert not torch.equal(module(x, context), module(x, context))
    assert torch.equal(module.eval()(x, context), module(x, context))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_as_a_module(variant: dict[str, Any]) -> None:
    context_dim = variant.get("context_dim", E)
    x, context = torch.randn(B, N, E), torch.randn(B, M, context_dim)

    def make(**options: Any) -> GatedCrossAttentionBlock:
        return GatedCrossAttentionBlock(E, H, gate_init=0.25, **variant, **options)

    made = check_module(make, lambda module: module(x, context, context_lens=LENS))
    assert f"gate={made.gate!r}" in repr(made) and (make().attn_gate == 0.25).all()


@pytest.mark.parametrize("variant, dynamic", [(VARIANTS[1], False), (VARIANTS[2], True)], ids=str)
def test_compile(variant: dict[str, Any], dynamic: bool) -> None:
    module = block(**variant)
    x_lens = torch.tensor([N, 3, 1])

    def masked(module: Any, x: Tensor, context: Tensor) -> Tensor:
        return module(x, context, context_lens=LENS, x_lens=x_lens, row_mask=SEES)

    check_compiled(module, masked, *streams(module), dynamic=dynamic)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_autocast_and_gradcheck(variant: dict[str, Any]) -> None:
    module = block(**variant)

    def masked(module: Any, x: Tensor, context: Tensor) -> Tensor:
        return module(x, context, context_lens=LENS, row_mask=SEES)

    x, context = streams(module)
    assert check_autocast(module, masked, x, context).dtype == torch.float32  # as torch: x's
    leaves = (x.double().requires_grad_(), context.double().requires_grad_())
    module = module.double()
    assert torch.autograd.gradcheck(lambda *s: masked(module, *s), leaves, fast_mode=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    module = block(**VARIANTS[2])
    x, context = streams(module)
    options = {"context_lens": LENS, "row_mask": SEES}
    program = torch.export.export(module, (x, context), options, strict=strict)
    other = {"context_lens": torch.tensor([0, M, 5]), "row_mask": SEES.flip(0)}
    torch.testing.assert_close(
        program.module()(x, context, **other), module(x, context, **other), rtol=1e-4, atol=1e-5
    )


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    module = block(dropout=0.3, residual_dropout=0.3)
    x, context = streams(module)
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(2)
        if wrapped:
            out = checkpoint(module, x, context, use_reentrant=False)
        else:
            out = module(x, context)
        grads.append(gradients(out, module))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


X, Y = torch.zeros(B, N, E), torch.zeros(B, M, E)


@pytest.mark.parametrize(
    "x, context, options, kind, message",
    [
        ([], Y, {}, TypeError, "GatedCrossAttentionBlock: x must be a torch.Tensor, got list"),
        (X[0], Y, {}, ValueError, r"GatedCrossAttentionBlock: x has 2 dims \(shape \[5, 24\]\)"),
        (X, Y[..., 1:], {}, ValueError, "context has width 23 but .* context_dim=24; both"),
        (
            X.half(),
            Y,
            {},
            TypeError,
            "x has dtype torch.float16 and context torch.float32, but the",
        ),
        (X, Y[1:], {}, ValueError, "context has B=2 but x has B=3"),
        (X, Y, {"row_mask": SEES.int()}, TypeError, "row_mask must be a bool tensor, got torch.in"),
        (X, Y, {"row_mask": [1]}, TypeError, "row_mask must be a bool tensor, got list; True ="),
        (X, Y, {"row_mask": SEES[0]}, ValueError, r"row_mask has shape \[5\], expected \[3, 5\]"),
        (X, Y, {"row_mask": SEES.to("meta")}, ValueError, "row_mask is on meta but x is on cpu;"),
        (X, Y, {"context_lens": LENS.float()}, TypeError, "context_lens must be an integer tensor"),
        (X, Y, {"context_lens": LENS + 9}, ValueError, "holds 16, allowed are 0 to 7"),
        (X, Y, {"x_lens": LENS[1:]}, ValueError, r"x_lens has shape \[2\], expected \[3\]"),
        (X, Y, {"x_lens": 3}, TypeError, "x_lens must be a torch.Tensor, got int"),
        (
            X,
            Y,
            {"row_mask": SEES, "context_segments": torch.zeros(B, M).int()},
            TypeError,
            "x_segments must be a torch.Tensor beside context_segments, got NoneType; give both",
        ),
        (X, Y, {"row_mask": SEES, "x_segments": torch.zeros(B, N).int()}, ValueError, "is missing"),
    ],
)
def test_errors(
    x: Any, context: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        block()(x, context, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"hidden_features": 0}, "hidden_features is 0; it must be at least 1"),
        ({"feed_forward": "moe"}, "feed_forward is 'moe'; it must be 'glu' or 'mlp'"),
        ({"activation": "tanh"}, "activation is 'tanh'; it must be 'silu', 'gelu'"),
        ({"norm": "batch"}, "norm is 'batch'; it must be 'rms' or 'layer'"),
        ({"gate": "head"}, "gate is 'head'; it must be 'scalar' or 'vector'"),
        ({"residual_dropout": 1.5}, "residual_dropout is 1.5, expected 0 <= residual_dropout < 1"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"GatedCrossAttentionBlock: {message}"):
        GatedCrossAttentionBlock(**{"dim": E, "num_heads": H, **options})


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(implementation).failed == 0
