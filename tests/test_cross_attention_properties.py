"""Laws that hold for any input, on random problems (Hypothesis): 200 each, 2,000 in `nightly`."""

from __future__ import annotations

import torch
from conftest import IMPLEMENTATIONS
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import LAYOUTS, Case, make_inputs

_SIZES = st.integers(1, 9) | st.sampled_from([16, 17, 33, 64, 65, 130])
_SMALL = st.integers(1, 4)
_WIDTHS = st.integers(1, 20) | st.sampled_from([32, 48, 64, 65, 128])
_IMPLEMENTATIONS = st.sampled_from(IMPLEMENTATIONS)
_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def problems(draw, sizes=_SIZES, dropout=True, only_out=False, **fixed):
    """A random Case: any sizes, any combination of options."""
    B, G, repeat = draw(_SMALL), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    N, M = draw(sizes), draw(sizes)
    dims = st.sampled_from([None, "BHNM", "B1NM", "B11M", "11NM", "1HN1", "M", "H1M"])
    values = {
        "kv_lens": draw(st.none() | st.tuples(*[st.integers(0, M)] * B)),
        "q_lens": draw(st.none() | st.tuples(*[st.integers(0, N)] * B)),
        "segments": draw(st.sampled_from([None, None, "images", "orphan", "shuffled"])),
        "segment_rule": draw(st.sampled_from(["equal", "at_most"])),
        "mask": draw(dims),
        "bias": draw(dims),
        "bias_dtype": draw(st.sampled_from(["same", "float32"])),
        "is_causal": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.25])) if dropout else 0.0,
        "gate": draw(st.sampled_from([None, "head", "full"])),
        "dlse": draw(st.booleans()),
        "importance": draw(st.booleans()),
        "weights": draw(st.sampled_from([False, "mean", "per_head"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "kv_layout": draw(st.sampled_from(LAYOUTS)),
    }
    if only_out:
        values |= {"dlse": False, "importance": False, "weights": False}
    name = f"random{draw(st.integers(0, 2**31))}"
    D, Dv = draw(_WIDTHS), draw(_WIDTHS)
    return Case(name, B, G * repeat, N, M, D, G=G, Dv=Dv, **{**values, **fixed})


def _call(inputs, *, q=None, k=None, v=None, **changes):
    options = {**inputs.options, **changes}
    options = {name: value for name, value in options.items() if value is not None}
    torch.manual_seed(inputs.seed)
    return mmfast.cross_attention(
        inputs.q if q is None else q,
        inputs.k if k is None else k,
        inputs.v if v is None else v,
        **options,
    )


def _close(got, expected):
    """Equal up to the order of float64 sums."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@given(case=problems(), dtype=_DTYPES, implementation=_IMPLEMENTATIONS)
def test_random_problems_obey_the_ruler(case, dtype, implementation):
    against = tolerance.truth(make_inputs(case, dtype))
    with implementation.active():
        results = tolerance.run(mmfast.cross_attention, against.inputs)
    tolerance.assert_accurate(results, against)


@given(
    case=problems(sizes=st.integers(0, 3), dropout=False),
    dtype=_DTYPES,
    implementation=_IMPLEMENTATIONS,
    no_items=st.booleans(),
)
def test_zero_sizes(case, dtype, implementation, no_items):
    if no_items:
        changes = {name: () for name in ("kv_lens", "q_lens") if getattr(case, name) is not None}
        case = Case(**{**vars(case), "B": 0, **changes})
    against = tolerance.truth(make_inputs(case, dtype))
    with implementation.active():
        results = tolerance.run(mmfast.cross_attention, against.inputs)
    tolerance.assert_accurate(results, against)


@given(
    case=problems(dropout=False, kv_lens=None, is_causal=False, mask="BHNM", bias="BHNM"),
    seed=st.integers(0, 999),
)
def test_permuting_keys_with_their_mask_changes_nothing(case, seed):
    inputs = make_inputs(case, torch.float64)
    order = torch.randperm(case.M, generator=torch.Generator().manual_seed(seed))
    changes = {name: inputs.options[name][..., order] for name in ("mask", "bias")}
    if "kv_segments" in inputs.options:
        changes["kv_segments"] = inputs.options["kv_segments"][:, order]
    asked = {"return_lse": True, "return_importance": True}
    expected = _call(inputs, **asked)
    got = _call(inputs, k=inputs.k[:, :, order], v=inputs.v[:, :, order], **changes, **asked)
    _close(got.out, expected.out)
    _close(got.lse, expected.lse)
    _close(got.importance, expected.importance[..., order])


@given(case=problems(dropout=False, gate=None, is_causal=False), data=st.data())
def test_splitting_keys_and_merging_by_lse_equals_the_whole(case, data):
    inputs = make_inputs(case, torch.float64)
    cut = data.draw(st.integers(0, case.M))
    whole = _call(inputs, return_lse=True)
    parts = []
    for keys in (slice(0, cut), slice(cut, case.M)):
        changes = {}
        for name in ("mask", "bias"):
            if name in inputs.options and inputs.options[name].shape[-1] != 1:
                changes[name] = inputs.options[name][..., keys]
        if "kv_segments" in inputs.options:
            changes["kv_segments"] = inputs.options["kv_segments"][:, keys]
        if "kv_lens" in inputs.options:
            lens = inputs.options["kv_lens"] - keys.start
            changes["kv_lens"] = lens.clamp(0, keys.stop - keys.start)
        k, v = inputs.k[:, :, keys], inputs.v[:, :, keys]
        parts.append(_call(inputs, k=k, v=v, return_lse=True, **changes))
    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    share = [(part.lse - lse).exp().nan_to_num(0.0)[..., None] for part in parts]
    _close(lse, whole.lse)
    _close(sum(w * part.out for w, part in zip(share, parts)), whole.out)


@given(case=problems(dropout=False, only_out=True), dtype=_DTYPES, data=st.data())
def test_batch_items_are_independent(case, dtype, data):
    """An item beside items of NaN is bit for bit what it is among its own; alone, to rounding."""
    inputs = make_inputs(case, dtype)
    item = data.draw(st.integers(0, case.B - 1))
    expected = _call(inputs)[item]

    others = torch.arange(case.B) != item
    q, k, v = inputs.q.clone(), inputs.k.clone(), inputs.v.clone()
    for tensor in (q, k, v):
        tensor[others] = float("nan")
    assert torch.equal(_call(inputs, q=q, k=k, v=v)[item], expected)

    def own(value):
        is_batched = isinstance(value, torch.Tensor) and value.dim() > 0
        return value[item : item + 1] if is_batched and value.shape[0] == case.B else value

    per_item = ("kv_lens", "q_lens", "q_segments", "kv_segments", "gate")
    changes = {name: own(inputs.options[name]) for name in per_item if name in inputs.options}
    for name in ("mask", "bias"):
        if getattr(case, name) in ("BHNM", "B1NM", "B11M"):
            changes[name] = own(inputs.options[name])
    alone = _call(inputs, q=own(inputs.q), k=own(inputs.k), v=own(inputs.v), **changes)[0]
    torch.testing.assert_close(alone, expected)


@given(case=problems(gate="full", only_out=True), dtype=_DTYPES)
def test_saturated_gate_is_the_identity_and_a_closed_one_is_zero(case, dtype):
    inputs = make_inputs(case, dtype)
    ungated = _call(inputs, gate=None)
    gate = inputs.options["gate"]
    for shape in (gate, gate[..., 0]):
        for value in (float("inf"), 1e4):
            assert torch.equal(_call(inputs, gate=torch.full_like(shape, value)), ungated)
            assert not _call(inputs, gate=torch.full_like(shape, -value)).any()


@given(case=problems(kv_lens=None, is_causal=False, only_out=True), data=st.data())
def test_removing_padding_equals_giving_lengths(case, data):
    """One item cut to its length, against the whole item with that length."""
    case = Case(**{**vars(case), "B": 1, "q_lens": None})
    inputs = make_inputs(case, torch.float64)
    length = data.draw(st.integers(0, case.M))
    changes = {}
    for name in ("mask", "bias"):
        if name in inputs.options and inputs.options[name].shape[-1] != 1:
            changes[name] = inputs.options[name][..., :length]
    if "kv_segments" in inputs.options:
        changes["kv_segments"] = inputs.options["kv_segments"][:, :length]
    cut = _call(inputs, k=inputs.k[:, :, :length], v=inputs.v[:, :, :length], **changes)
    _close(_call(inputs, kv_lens=torch.tensor([length])), cut)


@given(case=problems(only_out=True, layout="bhnd", kv_layout="bhnd"), data=st.data())
def test_memory_layout_changes_nothing(case, data):
    """The same values in any strides, dropout mask included."""
    inputs = make_inputs(case, torch.float32)
    expected = _call(inputs)

    def relaid(tensor):
        order = data.draw(st.permutations(range(4)))
        pad = data.draw(st.integers(0, 3))
        moved = torch.nn.functional.pad(tensor.permute(order), (pad, pad))
        back = moved[..., pad : moved.shape[-1] - pad]
        return back.permute([order.index(i) for i in range(4)])

    got = _call(inputs, q=relaid(inputs.q), k=relaid(inputs.k), v=relaid(inputs.v))
    torch.testing.assert_close(got, expected)


@given(case=problems(dropout=False, kv_lens=None), shift=st.floats(-50, 50))
def test_a_constant_added_to_a_row_of_scores_changes_only_the_lse(case, shift):
    inputs = make_inputs(case, torch.float64)
    bias = inputs.options.get("bias", torch.zeros(1, dtype=torch.float64))
    plain = _call(inputs, bias=bias, return_lse=True)
    moved = _call(inputs, bias=bias + shift, return_lse=True)
    _close(moved.out, plain.out)
    _close(moved.lse, plain.lse + shift)


@given(case=problems(dropout=False, gate=None))
def test_importance_and_weights_are_sums_of_probabilities(case):
    inputs = make_inputs(case, torch.float64)
    result = _call(inputs, return_importance=True, return_weights="per_head", return_lse=True)
    _close(result.importance, result.weights.sum(2))
    live = result.lse > float("-inf")
    _close(result.weights.sum(-1), live.double())
    v = inputs.v.repeat_interleave(case.H // case.G, dim=1)
    _close(result.weights @ v, result.out)
