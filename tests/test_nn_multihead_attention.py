"""`mmfast.nn.MultiheadAttention` against `torch.nn.MultiheadAttention`, form by form.

Weights are N(0, 1.6 / sqrt(fan_in)), so that the softmax has something to decide and a wrong scale,
a lost mask or a lost bias shows. Errors are judged against PyTorch in float64.
"""

from __future__ import annotations

import copy
import doctest
import itertools
import warnings
from typing import Any

import pytest
import torch
from fresh_process import run_python
from nn_helpers import Calls, assert_near, loud
from torch import Tensor

import mmfast.nn.multihead_attention as implementation
from mmfast.nn import MultiheadAttention

B, L, S, E, H = 3, 5, 7, 24, 4
INF = float("inf")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counter = Calls()
    monkeypatch.setattr(implementation, "cross_attention", counter)
    return counter


def pair(**options: Any) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    """PyTorch's module and ours with the same weights (copies)."""
    options = {"embed_dim": E, "num_heads": H, "batch_first": True, **options}
    theirs = loud(torch.nn.MultiheadAttention(**options))
    ours = MultiheadAttention(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(module: Any, inputs: list[Tensor], same: str, **options: Any) -> dict[str, Tensor]:
    """Results and all gradients of one call, by name. `same`: which inputs are one."""
    dtype = module.out_proj.weight.dtype
    query, key, value = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs)
    if same in ("self", "kv"):
        value = key
    if same == "self":
        query = key
    leaves = {"query": query, "key": key, "value": value}
    for name in ("attn_mask", "key_padding_mask"):
        mask = options.get(name)
        if mask is not None and mask.is_floating_point():
            mask = options[name] = mask.detach().to(dtype, copy=True)
            if not ((mask == 0) | (mask == -INF)).all():  # not just a bool mask in other clothes
                leaves[name] = mask.requires_grad_()

    module.zero_grad()
    out, weights = module(query, key, value, **options)
    results = {"out": out} if weights is None else {"out": out, "weights": weights}
    generator = torch.Generator().manual_seed(5)
    loss = out.new_zeros(())
    for result in results.values():
        loss = loss + (result * torch.randn(result.shape, generator=generator).to(dtype)).sum()
    loss.backward()
    for name, leaf in (*leaves.items(), *module.named_parameters()):
        results["d" + name] = leaf.grad
    return {name: tensor.detach() for name, tensor in results.items()}


def check(
    theirs: torch.nn.MultiheadAttention,
    ours: MultiheadAttention,
    inputs: list[Tensor],
    same: str = "kv",
    **options: Any,
) -> None:
    """Ours is as close to PyTorch in float64 as PyTorch in the same dtype is, times 3."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        exact = run(copy.deepcopy(theirs).double(), inputs, same, **options)
        eager = run(theirs, inputs, same, **options)
        got = run(ours, inputs, same, **options)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert_near(name, got[name], expected, eager[name])


# --- the grid of forms -------------------------------------------------------------------------

# No mask hides key OPEN from any row: PyTorch gives NaN in a row that sees nothing.
OPEN = 2


def padding_mask(kind: str, batch: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind.startswith("right"):
        lens = torch.tensor([keys, OPEN + 1, OPEN + 2, 5, 6][:batch])
        masked = torch.arange(keys) >= lens[:, None]
    elif kind.startswith("left"):
        masked = torch.arange(keys) < torch.tensor([0, OPEN, 1][:batch])[:, None]
    else:
        masked = torch.rand(batch, keys) < 0.4
        masked[:, OPEN] = False
        masked[0, OPEN - 1] = True
    if kind.endswith("inf"):
        return torch.zeros(batch, keys).masked_fill(masked, -INF)
    if kind.endswith("values"):
        return torch.randn(batch, keys).masked_fill(masked, -INF)
    return masked


def attention_mask(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (queries, keys) if "2d" in kind else (batch * H, queries, keys)
    masked = torch.rand(shape) < 0.3
    masked[..., OPEN] = False
    if kind.startswith("bool"):
        return masked
    return torch.randn(shape).masked_fill(masked, -INF)


PADDINGS = ("none", "right", "right inf", "left", "scattered", "scattered inf", "values")
MASKS = ("none", "bool 2d", "float 2d", "bool 3d", "float 3d")
EXTRAS = ({}, {"add_bias_kv": True}, {"add_zero_attn": True, "bias": False})


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_in_every_form(padding: str, mask: str, calls: Calls) -> None:
    for same, extra, need, average in itertools.product(
        ("self", "kv", "none"), EXTRAS, (False, True), (False, True)
    ):
        if not need and average:
            continue
        theirs, ours = pair(**extra, batch_first=need)
        queries = S if same == "self" else L
        inputs = [torch.randn(B, n, E) for n in (queries, S, S)]
        if not theirs.batch_first:
            inputs = [x.transpose(0, 1).contiguous() for x in inputs]
        before = calls.count
        check(
            theirs, ours, inputs, same,
            key_padding_mask=padding_mask(padding, B, S),
            attn_mask=attention_mask(mask, B, queries, S),
            need_weights=need, average_attn_weights=average,
        )  # fmt: skip
        assert calls.count == before + 1


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{"kdim": 10}, {"vdim": 6}, {"kdim": 10, "vdim": 10}])
def test_other_widths(options: dict[str, int], batch_first: bool) -> None:
    for extra, padding in itertools.product(EXTRAS, ("none", "right", "scattered")):
        theirs, ours = pair(**options, **extra, batch_first=batch_first)
        assert ours.in_proj_weight is None and ours.k_proj_weight is not None
        inputs = [torch.randn(B, L, E), *(torch.randn(B, S, w) for w in (ours.kdim, ours.vdim))]
        if not batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        same = "kv" if ours.kdim == ours.vdim else "none"
        check(theirs, ours, inputs, same, key_padding_mask=padding_mask(padding, B, S))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extra", EXTRAS)
def test_unbatched(extra: dict[str, Any], batch_first: bool) -> None:
    for same, padding, mask in itertools.product(
        ("self", "kv", "none"), ("none", "right", "values"), ("none", "bool 2d", "float 3d")
    ):
        theirs, ours = pair(**extra, batch_first=batch_first)
        queries = S if same == "self" else L
        key_padding = padding_mask(padding, 2, S)
        check(
            theirs, ours, [torch.randn(n, E) for n in (queries, S, S)], same,
            key_padding_mask=None if key_padding is None else key_padding[1],
            attn_mask=attention_mask(mask, 1, queries, S),
        )  # fmt: skip


@pytest.mark.parametrize("same", ["self", "kv"])
@pytest.mark.parametrize("queries, keys", [(7, 7), (5, 7), (7, 5)])
def test_is_causal(same: str, queries: int, keys: int, calls: Calls) -> None:
    """The hint means a top-left aligned mask; it counts only without padding and weights."""
    if same == "self":
        queries = keys
    causal = torch.ones(queries, keys).tril().logical_not()
    as_float = torch.zeros(queries, keys).masked_fill(causal, -INF)
    for extra, mask, padding, need in itertools.product(
        EXTRAS, (causal, as_float), ("none", "right"), (False, True)
    ):
        theirs, ours = pair(**extra)
        inputs = [torch.randn(B, n, E) for n in (queries, keys, keys)]
        pad = padding_mask(padding, B, keys)
        if pad is not None:
            pad[:, 0] = False
        check(
            theirs, ours, inputs, same, attn_mask=mask.detach(), is_causal=True,
            key_padding_mask=pad, need_weights=need,
        )  # fmt: skip
        if pad is None and not need:
            assert calls.last["mask"] is None and calls.last["bias"] is None


def test_a_wrong_causal_hint_is_believed_as_in_torch() -> None:
    theirs, ours = pair()
    nothing = torch.zeros(L, L)
    x = [torch.randn(B, L, E)] * 3
    check(theirs, ours, x, "self", attn_mask=nothing, is_causal=True, need_weights=False)
    check(theirs, ours, x, "self", attn_mask=nothing, is_causal=True, need_weights=True)
    dummy = torch.zeros(1, 1)
    check(theirs, ours, x, "self", attn_mask=dummy, is_causal=True, need_weights=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    theirs, ours = pair(dtype=dtype)
    inputs = [torch.randn(B, n, E) for n in (L, S, S)]
    for padding, mask in (("none", "none"), ("right", "float 2d"), ("values", "bool 3d")):
        check(
            theirs, ours, inputs, key_padding_mask=padding_mask(padding, B, S),
            attn_mask=attention_mask(mask, B, L, S),
        )  # fmt: skip


def test_a_float32_mask_beside_bfloat16_inputs() -> None:
    _, ours = pair(dtype=torch.bfloat16)
    x = torch.randn(B, L, E, dtype=torch.bfloat16)
    mask = attention_mask("float 2d", B, L, L)
    out, weights = ours(x, x, x, attn_mask=mask)
    assert out.dtype == weights.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_first", [True, False])
def test_empty(batch_first: bool) -> None:
    _, ours = pair(batch_first=batch_first)
    for batch, queries, keys in ((0, L, S), (B, 0, S), (B, L, 0)):
        q, k = torch.randn(batch, queries, E), torch.randn(batch, keys, E)
        if not batch_first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        out, weights = ours(q, k, k, key_padding_mask=padding)
        assert out.shape == q.shape and weights.shape == (batch, queries, keys)
        assert torch.equal(out, ours.out_proj.bias.expand(out.shape)) or keys
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters())


# --- what the masks become ---------------------------------------------------------------------


def test_right_padding_becomes_lengths(calls: Calls) -> None:
    _, ours = pair()
    q, k = torch.randn(B, L, E), torch.randn(B, S, E)
    for kind in ("right", "right inf"):
        ours(q, k, k, key_padding_mask=padding_mask(kind, B, S))
        assert calls.last["kv_lens"].tolist() == [S, OPEN + 1, OPEN + 2]
        assert calls.last["mask"] is calls.last["bias"] is calls.last["kv_segments"] is None
    ours(q, k, k, key_padding_mask=padding_mask("left", B, S))
    assert calls.last["kv_lens"] is None and calls.last["kv_segments"] is not None


def test_padding_is_exact_where_values_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: an upper bound as length, segments that make it exact."""
    import mmfast.nn._masks as masks
    import mmfast.nn._tokens as tokens

    monkeypatch.setattr(masks, "readable", lambda tensor: False)
    monkeypatch.setattr(tokens, "readable", lambda tensor: False)
    for kind in PADDINGS:
        theirs, ours = pair()
        inputs = [torch.randn(B, n, E) for n in (L, S, S)]
        check(theirs, ours, inputs, key_padding_mask=padding_mask(kind, B, S))
    given = masks.key_padding(torch.tensor([[True, False, True], [True, True, True]]), 4)
    assert given.kv_lens is not None and given.kv_lens.tolist() == [2, 0]


def test_masks_stay_views_of_their_size(calls: Calls) -> None:
    _, ours = pair()
    x = torch.randn(B, S, E)
    ours(x, x, x, attn_mask=attention_mask("float 2d", B, S, S))
    assert calls.last["bias"].shape == (1, 1, S, S)
    ours(x, x, x, attn_mask=attention_mask("bool 2d", B, S, S))
    assert calls.last["mask"].shape == (1, 1, S, S)
    mask = attention_mask("bool 2d", B, S, S)
    ours(x, x, x, attn_mask=mask, key_padding_mask=padding_mask("scattered", B, S))
    assert calls.last["mask"].shape == (1, 1, S, S)


@pytest.mark.parametrize("batch_first", [True, False])
def test_projections_are_not_copied(batch_first: bool, calls: Calls) -> None:
    _, ours = pair(batch_first=batch_first)
    x, y = torch.randn(B, B, E), torch.randn(B, B, E)
    ours(x, x, x)
    q, k, v = (calls.last[name] for name in "qkv")
    storage = q.untyped_storage().data_ptr()
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() == storage
    ours(x, y, y)
    k, v = calls.last["k"], calls.last["v"]
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.stride(-1) == v.stride(-1) == 1


@pytest.mark.parametrize("big", [False, True])
def test_padded_keys_are_not_projected(big: bool) -> None:
    """Whole or row by row: NaN in padding reaches neither results nor gradients."""
    width, keys = (256, 64) if big else (E, S)
    _, ours = pair(embed_dim=width)
    query, clean = torch.randn(B, L, width), torch.randn(B, keys, width)
    padding = torch.arange(keys) >= torch.tensor([[keys], [3], [0]])
    dirty = clean.masked_fill(padding[..., None], float("nan"))
    results = []
    for context in (clean.masked_fill(padding[..., None], 0.0), dirty):
        ours.zero_grad()
        context.requires_grad_()
        out, _ = ours(query, context, context, key_padding_mask=padding)
        out.square().sum().backward()
        results.append([out, context.grad, *(p.grad for p in ours.parameters())])
        assert (context.grad[padding] == 0).all()
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("same", ["self", "kv", "none"])
def test_large_enough_to_gather_tokens(same: str, batch_first: bool) -> None:
    """Sizes at which only valid tokens are projected and masks are read as tensors, not lists."""
    theirs, ours = pair(embed_dim=128, batch_first=batch_first)
    inputs = [torch.randn(B, 100, 128) for _ in range(3)]
    if not batch_first:
        inputs = [x.transpose(0, 1).contiguous() for x in inputs]
    for kind in ("right", "right inf", "left", "scattered inf", "values"):
        check(theirs, ours, inputs, same, key_padding_mask=padding_mask(kind, B, 100))


# --- where it differs on purpose ---------------------------------------------------------------


def test_a_row_that_sees_nothing_is_the_output_bias_not_nan() -> None:
    theirs, ours = pair()
    q, k = torch.randn(B, L, E), torch.randn(B, S, E)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    for module in (theirs, ours):
        out, weights = module(q, k, k, key_padding_mask=padding)
        out[[0, 2]].square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in module.parameters()])
        if module is theirs:  # one empty item, a loss on the others: all of training is lost
            assert out[1].isnan().all() and gradients.isnan().any()
        else:
            assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))
            assert (weights[1] == 0).all() and gradients.isfinite().all()
    # PyTorch agrees when it is not asked for weights.
    expected, _ = theirs(q, k, k, key_padding_mask=padding, need_weights=False)
    got, _ = ours(q, k, k, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout() -> None:
    _, ours = pair(dropout=0.5)
    q, k = torch.randn(B, L, E), torch.randn(B, S, E)
    torch.manual_seed(1)
    first, weights = ours(q, k, k)
    torch.manual_seed(1)
    again, _ = ours(q, k, k)
    other, _ = ours(q, k, k)
    assert torch.equal(first, again) and not torch.equal(first, other)
    ours.eval()
    still, eval_weights = ours(q, k, k)
    assert not torch.equal(first, still) and torch.equal(still, ours(q, k, k)[0])
    torch.testing.assert_close(weights, eval_weights)  # of the probabilities before dropout
    ours.train()
    with torch.no_grad():
        mean = torch.stack([ours(q, k, k)[0] for _ in range(200)]).mean(0)
    assert (mean - still).abs().max() < 0.4 * still.abs().max()


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


# --- errors and warnings -----------------------------------------------------------------------

Q, K = torch.zeros(B, L, E), torch.zeros(B, S, E)
MISTAKES: list[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any], str]] = [
    ("1-D query", (Q[0, 0], K, K), {}, "2D or batched 3D tensor but received 1-D"),
    ("2-D key", (Q, K[0], K), {}, "`value` to be 3-D but found 2-D and 3-D tensors"),
    ("2-D value", (Q, K, K[0]), {}, "`value` to be 3-D but found 3-D and 2-D tensors"),
    ("3-D key", (Q[0], K, K[0]), {}, "`value` to be 2-D but found 3-D and 2-D tensors"),
    ("width", (Q[..., 1:], K, K), {}, "expecting embedding dimension of 24, but got 23"),
    ("key width", (Q, K[..., 1:], K), {}, "key has width 23 and value 24"),
    ("key count", (Q, K, K[:, 1:]), {}, "key's sequence and batch dims"),
    ("batch", (Q[1:], K, K), {}, "query has batch size 2 but key has 3"),
    ("dtype", (Q.double(), K, K), {}, "have dtypes torch.float64, torch.float32"),
    (
        "padding dims",
        (Q, K, K),
        {"key_padding_mask": torch.zeros(S, dtype=torch.bool)},
        "expected `key_padding_mask` to be `None` or 2-D but found 1-D",
    ),
    (
        "padding shape",
        (Q, K, K),
        {"key_padding_mask": torch.zeros(B, L, dtype=torch.bool)},
        r"expected key_padding_mask of shape \(3, 7\)",
    ),
    (
        "padding dtype",
        (Q, K, K),
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.uint8)},
        "only bool and floating types of key_padding_mask",
    ),
    (
        "mask dims",
        (Q, K, K),
        {"attn_mask": torch.zeros(S)},
        "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D",
    ),
    (
        "mask dtype",
        (Q, K, K),
        {"attn_mask": torch.zeros(L, S).int()},
        "floating types of attn_mask",
    ),
    ("2-D mask", (Q, K, K), {"attn_mask": torch.zeros(S, L)}, "The shape of the 2D attn_mask is"),
    (
        "3-D mask",
        (Q, K, K),
        {"attn_mask": torch.zeros(B, L, S)},
        r"The shape of the 3D attn_mask is .*, but should be \(12, 5, 7\)",
    ),
    (
        "3-D mask unbatched",
        (Q[0], K[0], K[0]),
        {"attn_mask": torch.zeros(B, L, S)},
        r"Expected `attn_mask` shape to be \(4, 5, 7\)",
    ),
    (
        "hint alone",
        (Q, K, K),
        {"is_causal": True},
        "Need attn_mask if specifying the is_causal hint",
    ),
]


@pytest.mark.parametrize("label, inputs, options, message", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_errors(
    label: str, inputs: tuple[Tensor, ...], options: dict[str, Any], message: str
) -> None:
    """One error type for `except` clauses written for PyTorch and for mmfast."""
    _, ours = pair()
    for kind in (ValueError, AssertionError, RuntimeError):
        with pytest.raises(kind, match=message) as caught:
            ours(*inputs, **options)
    assert str(caught.value).startswith("MultiheadAttention: ")


@pytest.mark.parametrize("options", [{"embed_dim": 0}, {"num_heads": 0}, {"num_heads": 5}])
def test_constructor_errors_are_torch_s(options: dict[str, int]) -> None:
    options = {"embed_dim": E, "num_heads": H, **options}
    with pytest.raises((ValueError, AssertionError)) as theirs:
        torch.nn.MultiheadAttention(**options)
    with pytest.raises(type(theirs.value), match=str(theirs.value)[:20]):
        MultiheadAttention(**options)


def test_mismatched_mask_types_warn() -> None:
    _, ours = pair()
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        ours(Q, K, K, key_padding_mask=torch.zeros(B, S) > 0, attn_mask=torch.zeros(L, S))


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(implementation).failed == 0
