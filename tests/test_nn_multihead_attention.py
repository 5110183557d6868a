"""`mmfast.nn.MultiheadAttention` against `torch.nn.MultiheadAttention`, form by form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from mha_helpers import (  # noqa: F401  fixtures
    INF,
    OPEN,
    B,
    E,
    L,
    S,
    attention_mask,
    check,
    counted_calls,
    padding_mask,
    pair,
    seeded,
)
from nn_helpers import Calls

# --- the grid of forms -------------------------------------------------------------------------

# No mask hides key OPEN from any row: PyTorch gives NaN in a row that sees nothing.
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
