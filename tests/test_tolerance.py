"""The ruler is measured too: it must reject small planted faults and accept honest rounding."""

import pytest
import torch

import mmfast
from mmfast import reference
from mmfast.testing import eager, tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LONG = Case("ruler_long", 2, 4, 64, 512, 64, G=2, kv_lens=(512, 300), bias="1HNM")


def _without_one_key(q, k, v, **options):
    """The key with index 77 of every item is forgotten."""
    mask = torch.ones(k.shape[2], dtype=torch.bool)
    mask[77] = False
    return reference.cross_attention(q, k, v, **options, mask=mask)


def _without_one_key_of_one_item(q, k, v, **options):
    mask = torch.ones(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool)
    mask[1, ..., 77] = False
    return reference.cross_attention(q, k, v, **options, mask=mask)


def _without_scale(q, k, v, **options):
    return reference.cross_attention(q, k, v, **options, scale=1.0)


def _skipped_tile(q, k, v, **options):
    """One tile of 16 rows by 64 keys of one head is not visited."""
    mask = torch.ones(q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)
    mask[1, 16:32, 128:192] = False
    return reference.cross_attention(q, k, v, **options, mask=mask)


def _lens_off_by_one(offset):
    def faulty(q, k, v, **options):
        options["kv_lens"] = (options["kv_lens"] + offset).clamp(0, k.shape[2])
        return reference.cross_attention(q, k, v, **options)

    return faulty


class _WrongSum(torch.autograd.Function):
    """A bias whose gradient is a mean where it should be a sum, or forgets one batch item."""

    @staticmethod
    def forward(ctx, bias, size, kind):
        ctx.shape, ctx.kind = bias.shape, kind
        return bias.expand(size).clone()

    @staticmethod
    def backward(ctx, dbias):
        if ctx.kind == "one item forgotten":
            dbias = dbias.clone()
            dbias[-1] = 0
        dbias = dbias.sum_to_size(ctx.shape)
        return (dbias / 2 if ctx.kind == "mean" else dbias), None, None


def _wrong_dbias(kind):
    def faulty(q, k, v, **options):
        size = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        options["bias"] = _WrongSum.apply(options["bias"], size, kind)
        return reference.cross_attention(q, k, v, **options)

    return faulty


def _gradient_off_by_5_percent(q, k, v, **options):
    v = v.detach() * 0.05 + v * 0.95
    return reference.cross_attention(q, k, v, **options)


def _one_nan(q, k, v, **options):
    result = reference.cross_attention(q, k, v, **options)
    out = result.out.clone()
    out[0, 0, 0, 0] = float("nan")
    return result._replace(out=out)


FAULTS = {
    "dropped key": _without_one_key,
    "dropped key of one item": _without_one_key_of_one_item,
    "missing scale": _without_scale,
    "skipped tile": _skipped_tile,
    "length one too short": _lens_off_by_one(-1),
    "length one too long": _lens_off_by_one(1),
    "dbias a mean": _wrong_dbias("mean"),
    "dbias without an item": _wrong_dbias("one item forgotten"),
    "dv off by 5 percent": _gradient_off_by_5_percent,
    "one NaN": _one_nan,
}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def truth(request):
    return tolerance.truth(make_inputs(LONG, request.param))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_rejected(truth, fault):
    results = tolerance.run(FAULTS[fault], truth.inputs)
    with pytest.raises(AssertionError, match="BAD"):
        tolerance.assert_accurate(results, truth)


def test_off_by_one_is_seen_in_the_lse_even_where_out_agrees(truth):
    """All values are equal, so that a lost key changes no output."""
    inputs = truth.inputs
    flat = torch.ones_like(inputs.v)
    inputs_flat = type(inputs)(**{**vars(inputs), "v": flat})
    against = tolerance.truth(inputs_flat, backward=False)
    results = tolerance.run(_lens_off_by_one(-1), inputs_flat, backward=False)
    verdicts = {verdict.name: verdict.ok for verdict in tolerance.judge(results, against)}
    assert verdicts == {"out": True, "lse": False}


@pytest.mark.parametrize("function", [eager.cross_attention, reference.cross_attention])
def test_honest_rounding_is_accepted(truth, function):
    tolerance.assert_accurate(tolerance.run(function, truth.inputs), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["results_everything", "lens", "bias_infinite", "one_key", "tiny"])
def test_eager_and_reference_pass_on(name, dtype):
    against = tolerance.truth(make_inputs(CROSS_ATTENTION[name], dtype))
    for function in (eager.cross_attention, reference.cross_attention, mmfast.cross_attention):
        results = tolerance.run(function, against.inputs)
        if function is eager.cross_attention and name == "bias_infinite":
            assert results.pop("dq").isnan().any()  # of rows whose bias is -inf throughout
            results = {key: value for key, value in results.items() if not value.isnan().any()}
        tolerance.assert_accurate(results, against)


def test_masked_zeros_must_be_exact():
    against = tolerance.truth(make_inputs(CROSS_ATTENTION["lens"], torch.float32))
    results = tolerance.run(reference.cross_attention, against.inputs)
    tolerance.assert_exact_zeros(results, against.inputs)
    for name in ("out", "dq", "dk", "dv"):
        spoilt = {**results, name: results[name] + 1e-30}
        with pytest.raises(AssertionError, match="exactly 0"):
            tolerance.assert_exact_zeros(spoilt, against.inputs)


def test_the_lse_must_be_there():
    against = tolerance.truth(make_inputs(CROSS_ATTENTION["tiny"], torch.float32))
    with pytest.raises(AssertionError, match="LSE"):
        tolerance.judge({"out": against.exact["out"]}, against)


def test_where_eager_is_nan_it_sets_no_bar():
    """Rows whose bias is -inf throughout: eager gives NaN gradients, ours are exact zeros."""
    inputs = make_inputs(CROSS_ATTENTION["bias_infinite"])
    against = tolerance.truth(inputs)
    assert against.peer["dq"].isnan().any()
    results = tolerance.run(mmfast.reference.cross_attention, inputs)
    tolerance.assert_accurate(results, against)
    for name in ("dq", "dk", "dbias"):
        wrong = {**results, name: torch.full_like(results[name], float("nan"))}
        with pytest.raises(AssertionError, match=f"BAD {name}"):
            tolerance.assert_accurate(wrong, against)
