"""`mmfast.nn.CrossModalAttention` against the same layer composed of plain torch functions."""

from __future__ import annotations

import copy
import doctest
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import Calls, assert_near, gradients, loud
from torch import Tensor

import mmfast
import mmfast.nn._projected_attention as implementation
import mmfast.nn.cross_modal_attention as module
from mmfast.nn import CrossModalAttention
from mmfast.nn._tokens import Tokens

B, N, M, E, C, H = 3, 5, 7, 24, 20, 4
LENS = torch.tensor([M, 4, 0])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "context_dim": C},
    {"num_kv_heads": 1, "qk_norm": "rms", "gate": "head"},
    {"qk_norm": "layer", "gate": "channel", "bias": False},
    {"context_dim": C, "head_dim": 10, "value_head_dim": 3, "gate": "channel", "out_bias": False},
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counter = Calls()
    monkeypatch.setattr(implementation, "cross_attention", counter)
    return counter


def layer(**options: Any) -> CrossModalAttention:
    return loud(CrossModalAttention(**{"embed_dim": E, "num_heads": H, **options}))


def streams(module: CrossModalAttention, keys: int = M) -> tuple[Tensor, Tensor]:
    dtype = module.q_proj.weight.dtype
    return (
        torch.randn(B, N, E, dtype=dtype),
        torch.randn(B, keys, module.context_dim, dtype=dtype),
    )


def eager(
    module: CrossModalAttention,
    x: Tensor,
    context: Tensor,
    *,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The layer in plain torch, with the NxM matrix; `allowed` bool `[B, 1, N, M]`."""
    G, D, Dv = module.num_kv_heads, module.head_dim, module.value_head_dim

    def split(y: Tensor, heads: int, norm: Any) -> Tensor:
        y = y.unflatten(-1, (heads, -1))
        return (y if norm is None else norm(y)).transpose(1, 2)

    q = split(F.linear(x, module.q_proj.weight, module.q_proj.bias), H, module.q_norm)
    k = split(F.linear(context, module.k_proj.weight, module.k_proj.bias), G, module.k_norm)
    v = split(F.linear(context, module.v_proj.weight, module.v_proj.bias), G, None)
    assert q.shape[-1] == k.shape[-1] == D and v.shape[-1] == Dv
    k, v = (y.repeat_interleave(H // G, dim=1) for y in (k, v))
    scores = q @ k.transpose(-2, -1) * D**-0.5
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    p = scores.softmax(-1).nan_to_num(0.0)
    out = (p @ v).transpose(1, 2)
    if module.gate_proj is not None:
        gate = F.linear(x, module.gate_proj.weight, module.gate_proj.bias).sigmoid()
        out = out * gate.view(B, -1, H, 1 if module.gate == "head" else Dv)
    out = F.linear(out.flatten(2), module.out_proj.weight, module.out_proj.bias)
    dead = (p == 0).all(-1).all(1)
    return {
        "out": out.masked_fill(dead[..., None], 0.0),
        "lse": scores.logsumexp(-1),
        "importance": p.sum(2),
        "weights": p.mean(1),
    }


def compare(module: CrossModalAttention, allowed: Tensor | None, **options: Any) -> None:
    """Results and gradients of `module` against eager float64, no worse than eager's own."""
    exactly = copy.deepcopy(module).double()
    x, context = (s.requires_grad_() for s in streams(module))
    x64, context64 = (s.detach().double().requires_grad_() for s in (x, context))
    bias = options.get("bias")
    exact = eager(exactly, x64, context64, allowed=allowed, bias=bias)
    plain = eager(module, x, context, allowed=allowed, bias=bias)
    got = module(
        x, context, return_lse=True, return_importance=True, return_weights=True, **options
    )
    for name, value in exact.items():
        assert_near(name, getattr(got, name), value, plain[name])
    assert torch.equal(module(x, context, **options), got.out)
    names = ["dx", "dcontext", *(f"d{name}" for name, _ in module.named_parameters())]
    mine = gradients(got.out, module, x, context)
    theirs = gradients(exact["out"], exactly, x64, context64)
    plains = gradients(plain["out"], module, x, context)
    for name, grad, expected, peer in zip(names, mine, theirs, plains, strict=True):
        assert_near(name, grad, expected, peer)


def by_lens(context_lens: Tensor, x_lens: Tensor | None = None) -> Tensor:
    allowed = (torch.arange(M) < context_lens[:, None])[:, None, None, :]
    if x_lens is not None:
        allowed = allowed & (torch.arange(N) < x_lens[:, None])[:, None, :, None]
    return allowed.expand(B, 1, N, M)


# --- the same results --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_variant(variant: dict[str, Any], dtype: torch.dtype, calls: Calls) -> None:
    module = layer(**variant, dtype=dtype)
    compare(module, None)
    assert calls.count == 2
    lens = torch.tensor([M, 4, 1])
    compare(module, by_lens(lens), context_lens=lens)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_lengths_segments_masks(variant: dict[str, Any]) -> None:
    module = layer(**variant)
    x_lens = torch.tensor([N, 2, 3])
    compare(module, by_lens(LENS, x_lens), context_lens=LENS, x_lens=x_lens)
    compare(module, by_lens(LENS), context_lens=LENS.int())
    compare(module, by_lens(torch.tensor([M] * 3), x_lens), x_lens=x_lens)

    own, other = torch.randint(0, 3, (B, N)), torch.randint(0, 2, (B, M))
    own[0] = 2  # an item whose rows see nothing under "equal"
    equal = (own[:, None, :, None] == other[:, None, None, :]) & by_lens(LENS)
    at_most = (other[:, None, None, :] <= own[:, None, :, None]) & by_lens(LENS)
    segments = {"x_segments": own, "context_segments": other, "context_lens": LENS}
    compare(module, equal, **segments)
    compare(module, at_most, segment_rule="at_most", **segments)

    mask = torch.rand(B, 1, N, M) < 0.5
    mask[1, :, 2] = False
    compare(module, mask, mask=mask)
    compare(module, mask & by_lens(LENS), mask=mask, context_lens=LENS)
    bias = torch.randn(1, H, N, M)
    compare(module, None, bias=bias)
    bottom_right = torch.arange(M) <= torch.arange(N)[:, None] + (LENS - N).view(-1, 1, 1, 1)
    compare(module, bottom_right & by_lens(LENS), is_causal=True, context_lens=LENS)


def test_per_head_masks_kill_only_rows_dead_in_every_head() -> None:
    module = layer()
    mask = torch.rand(B, H, N, M) < 0.5
    mask[0, :2, 1] = False
    mask[1, :, 3] = False
    compare(module, mask, mask=mask)
    assert (module(*streams(module), mask=mask)[0, 1] != 0).any()


# --- a missing modality ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("big", [False, True])
def test_a_missing_modality_contributes_exactly_nothing(variant: dict[str, Any], big: bool) -> None:
    """Exact zeros out, and the NaN that stands for it touches no gradient."""
    keys = 400 if big else M
    module = layer(**variant, **({"embed_dim": 24} if not big else {}))
    x, clean = streams(module, keys)
    lens = torch.tensor([keys, 3, 0])
    padding = torch.arange(keys) >= lens[:, None]
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        context = clean.masked_fill(padding[..., None], filler).requires_grad_()
        query = x.clone().requires_grad_()
        result = module(
            query, context, context_lens=lens,
            return_lse=True, return_importance=True, return_weights=True,
        )  # fmt: skip
        assert (result.out[2] == 0).all() and (result.lse[2] == -torch.inf).all()
        assert (result.importance[2] == 0).all() and (result.weights[2] == 0).all()
        grads = gradients(result.out, module, query, context)
        assert (grads[0][2] == 0).all() and (grads[1][padding] == 0).all()
        results.append([*result, *grads])
    for zeros, *others in zip(*results, strict=True):
        assert all(torch.equal(zeros, other) for other in others)


def test_training_goes_on_as_if_the_item_were_not_there() -> None:
    module = layer(context_dim=C, gate="head", qk_norm="rms")
    x, context = streams(module)
    lens = torch.tensor([M, 4, 0])
    with_item = gradients(module(x, context, context_lens=lens), module)
    direction = torch.randn(B, N, E, generator=torch.Generator().manual_seed(7))[:2]
    out = module(x[:2], context[:2], context_lens=lens[:2])
    without = torch.autograd.grad((out * direction).sum(), list(module.parameters()))
    for a, b in zip(with_item, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nobody_has_a_context(variant: dict[str, Any]) -> None:
    module = layer(**variant)
    x, context = streams(module)
    cases = [
        module(x, context, context_lens=torch.zeros(B, dtype=torch.int32)),
        module(x, context[:, :0]),
        module(x, context, mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool)),
        module(x, context, bias=torch.full((1, 1, 1, 1), float("-inf"))),
    ]
    for out in cases:
        assert torch.equal(out, torch.zeros(B, N, E))
        for grad in gradients(out, module):
            assert (grad == 0).all()


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rows_past_x_lens_may_hold_nan(variant: dict[str, Any], big: bool) -> None:
    rows = 400 if big else N
    module = layer(**variant)
    clean, context = torch.randn(B, rows, E), streams(module)[1]
    x_lens = torch.tensor([rows, 2, 0])
    padding = torch.arange(rows) >= x_lens[:, None]
    results = []
    for filler in (0.0, float("nan")):
        x = clean.masked_fill(padding[..., None], filler).requires_grad_()
        out = module(x, context, x_lens=x_lens)
        assert (out[padding] == 0).all()
        results.append([out, *gradients(out, module, x)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_empty_batches_and_sequences() -> None:
    module = layer(context_dim=C, gate="channel", qk_norm="layer")
    for batch, rows, keys in ((0, N, M), (B, 0, M), (B, N, 0)):
        x, context = torch.randn(batch, rows, E), torch.randn(batch, keys, C)
        for lens in (None, torch.zeros(batch, dtype=torch.int64)):
            out = module(x, context, context_lens=lens)
            assert out.shape == x.shape
            assert all(g.isfinite().all() for g in gradients(out, module))


# --- derivatives, dtypes, transforms -----------------------------------------------------------


@pytest.mark.parametrize("variant", [VARIANTS[2], VARIANTS[4]], ids=str)
def test_gradcheck(variant: dict[str, Any]) -> None:
    module = layer(**variant, dtype=torch.float64)
    x, context = (s[:, :4].requires_grad_() for s in streams(module))
    lens, x_lens = torch.tensor([4, 2, 0]), torch.tensor([4, 3, 4])

    def call(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        result = module(x, context, context_lens=lens, x_lens=x_lens, return_importance=True)
        return result.out, result.importance

    assert torch.autograd.gradcheck(call, (x, context), fast_mode=True)


def test_gathering_tokens_differentiates_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfast.nn._tokens._SMALL", 0)
    tokens = Tokens(torch.tensor([[False, True, True], [False, False, True]]), 1)
    assert tokens.index is not None and tokens.index.tolist() == [0, 3, 4]
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return tokens.put(tokens.take(x).square())

    assert torch.autograd.gradcheck(call, (x,)) and torch.autograd.gradgradcheck(call, (x,))
    assert tokens.put(tokens.take(x))[tokens.pad].eq(0).all()


def test_double_backward_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfast.nn._tokens._SMALL", 0)
    module = layer(dtype=torch.float64, gate="head")
    x, context = (s[:, :3].requires_grad_() for s in streams(module))
    lens = torch.tensor([3, 2, 0])
    with mmfast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda x, c: module(x, c, context_lens=lens), (x, context), fast_mode=True
        )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_autocast(variant: dict[str, Any]) -> None:
    module = layer(**variant)
    x, context = streams(module)
    expected = module(x, context, context_lens=LENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x, context, context_lens=LENS)
    assert got.dtype == torch.bfloat16 and (got[2] == 0).all()
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_forward_mode() -> None:
    module = layer(dtype=torch.float64, context_dim=C)
    x, context = streams(module)
    tangent = torch.randn_like(context)
    call = lambda c: module(x, c, context_lens=LENS)  # noqa: E731
    _, got = torch.func.jvp(call, (context,), (tangent,))
    step = 1e-6
    expected = (call(context + step * tangent) - call(context - step * tangent)) / (2 * step)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_vmap() -> None:
    module = layer(gate="head")
    x, context = torch.randn(4, B, N, E), torch.randn(4, B, M, E)
    lens = torch.randint(0, M + 1, (4, B))
    call = lambda x, c, n: module(x, c, context_lens=n)  # noqa: E731
    got = torch.func.vmap(call)(x, context, lens)
    for i in range(4):
        torch.testing.assert_close(got[i], call(x[i], context[i], lens[i]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    module = layer(**VARIANTS[1], qk_norm="rms", gate="channel")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for keys in (M, M + 2) if dynamic else (M,):
        x, context = streams(module, keys)
        context[2] = float("nan")
        result = {}
        for name, call in (("eager", module), ("compiled", compiled)):
            out = call(x, context, context_lens=LENS)
            result[name] = [out, *gradients(out, module)]
        for a, b in zip(*result.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert (result["compiled"][0][2] == 0).all()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    module = layer(**VARIANTS[1], gate="head")
    x, context = streams(module)
    program = torch.export.export(module, (x, context), {"context_lens": LENS}, strict=strict)
    other = torch.tensor([0, M, 5])
    torch.testing.assert_close(
        program.module()(x, context, context_lens=other),
        module(x, context, context_lens=other),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_checkpoint_and_dropout() -> None:
    from torch.utils.checkpoint import checkpoint

    module = layer(dropout=0.4)
    x, context = streams(module)
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(2)
        call = lambda x: module(x, context, context_lens=LENS)  # noqa: E731
        out = checkpoint(call, x, use_reentrant=False) if wrapped else call(x)
        grads.append(gradients(out, module))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert not torch.equal(call(x), call(x))
    module.eval()
    assert torch.equal(call(x), call(x))


# --- as a module -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_state_dict_deepcopy_device_dtype(variant: dict[str, Any]) -> None:
    module = layer(**variant)
    fresh = CrossModalAttention(E, H, **variant, device="meta", dtype=torch.float32)
    assert all(p.is_meta for p in fresh.parameters())
    fresh = fresh.to_empty(device="cpu")
    fresh.load_state_dict(module.state_dict())
    x, context = streams(module)
    expected = module(x, context, context_lens=LENS)
    assert torch.equal(fresh(x, context, context_lens=LENS), expected)
    assert torch.equal(copy.deepcopy(module)(x, context, context_lens=LENS), expected)
    assert all(p.dtype == torch.bfloat16 for p in module.to(torch.bfloat16).parameters())
    assert f"num_kv_heads={module.num_kv_heads}" in repr(module)


def test_initialisation_is_reproducible_and_has_zero_biases() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(CrossModalAttention(E, H, gate="head", qk_norm="layer").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all((states[0][f"{n}_proj.bias"] == 0).all() for n in ("q", "k", "v", "out", "gate"))


# --- errors ------------------------------------------------------------------------------------

X, Y = torch.zeros(B, N, E), torch.zeros(B, M, E)
MISTAKES: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    ([1.0], Y, {}, TypeError, "x must be a torch.Tensor, got list"),
    (X[0], Y, {}, ValueError, r"x has 2 dims \(shape \[5, 24\]\), expected \[batch, tokens, 24\]"),
    (X, Y[..., 1:], {}, ValueError, "context has width 23 but .* context_dim=24"),
    (X[..., 1:], Y, {}, ValueError, "x has width 23 but .* embed_dim=24"),
    (X[1:], Y, {}, ValueError, "context has B=3 but x has B=2"),
    (X.double(), Y, {}, TypeError, "x has dtype torch.float64 and context torch.float32, but"),
    (X, Y, {"context_lens": [1, 2, 3]}, TypeError, "context_lens must be a torch.Tensor, got list"),
    (X, Y, {"context_lens": torch.ones(B)}, TypeError, "context_lens must be an integer tensor"),
    (X, Y, {"x_lens": torch.ones(B) > 0}, TypeError, "x_lens must be an integer tensor"),
    (X, Y, {"context_lens": LENS[1:]}, ValueError, r"context_lens has shape \[2\], expected \[3\]"),
    (X, Y, {"x_lens": LENS[:, None]}, ValueError, r"x_lens has shape \[3, 1\], expected \[3\]"),
    (X, Y, {"x_lens": LENS.to("meta")}, ValueError, "x_lens is on meta but"),
    (X, Y, {"context_lens": LENS + 1}, ValueError, "kv_lens holds 8, allowed are 0 to 7"),
    (X, Y, {"context_lens": LENS - 1}, ValueError, "kv_lens holds -1, allowed are 0 to 7"),
    (X, Y, {"x_segments": torch.zeros(B, N).int()}, ValueError, "kv_segments is missing"),
    (X, Y, {"mask": torch.zeros(N, N) > 0}, ValueError, r"mask has shape \[5, 5\], which does not"),
    (X, Y, {"segment_rule": "most"}, ValueError, "segment_rule is 'most'"),
]


@pytest.mark.parametrize(
    "x, context, options, kind, message", MISTAKES, ids=[m[4] for m in MISTAKES]
)
def test_errors(
    x: Any, context: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        layer()(x, context, **options)


def test_a_strided_nested_context_is_refused() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)])
    with pytest.raises(TypeError, match=r"must be a nested tensor with layout=torch\.jagged"):
        layer()(X[:2], nested)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_heads": 5}, "embed_dim=24 is not a multiple of num_heads=5"),
        ({"value_head_dim": -1}, "value_head_dim is -1"),
        ({"qk_norm": "batch"}, "qk_norm is 'batch'; it must be None, 'layer' or 'rms'"),
        ({"gate": "tanh"}, "gate is 'tanh'; it must be None, 'head' or 'channel'"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 <= dropout < 1"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CrossModalAttention: {message}"):
        CrossModalAttention(**{"embed_dim": E, "num_heads": H, **options})


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(module).failed == 0


def test_results_do_not_depend_on_how_tokens_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, whole with padding zeroed, and as where values cannot be read."""
    for variant, with_x_lens in itertools.product(VARIANTS, (False, True)):
        module = layer(**variant)
        x, context = streams(module)
        x_lens = torch.tensor([2, 5, 1]) if with_x_lens else None
        results = []
        for small in (0, 10**9):
            monkeypatch.setattr("mmfast.nn._tokens._SMALL", small)
            out = module(x, context, context_lens=LENS, x_lens=x_lens)
            results.append([out, *gradients(out, module)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
