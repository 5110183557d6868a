"""Cross-attention's kernels on a GPU, CUDA C++ and Triton: the registry under the ruler.

Every test here runs where a device is, CUDA or ROCm; test_cross_attention_gpu_device.py has what is
about the device itself (streams, graphs, memory, offsets).
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from gpu_helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_same_bits,
    gpu_only,
    kernels,  # noqa: F401
    on_cpu,
    on_device,
    run_on_device,
    some,
    some_heads,
)
from torch.utils.checkpoint import checkpoint

import mmfast
from mmfast import dispatch
from mmfast.reference.philox import dropout_keep
from mmfast.testing import tolerance
from mmfast.testing.cases import (
    CROSS_ATTENTION,
    Case,
    functional_cases,
    make_inputs,
    performance_cases,
)

pytestmark = gpu_only

MAX_WIDTH = 256
FUNCTIONAL = [case for case in functional_cases() if max(case.D, case.Dv) <= MAX_WIDTH]
WIDER = [case for case in functional_cases() if max(case.D, case.Dv) > MAX_WIDTH]
BY_DTYPE = pytest.mark.parametrize(
    "dtype", some(DTYPES), ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@functools.lru_cache(maxsize=512)
def _truth(name, dtype):
    return tolerance.truth(make_inputs(CROSS_ATTENTION[name], dtype))


def _masked_cases():
    """Cases with keys or rows that take no part."""
    for case in FUNCTIONAL:
        inputs = make_inputs(case)
        if not (inputs.key_seen().all() and inputs.row_sees().all()):
            yield case.name


# --- numbers ------------------------------------------------------------------------------------


@BY_DTYPE
@pytest.mark.parametrize("name", some([case.name for case in FUNCTIONAL]))
def test_case(name, dtype):
    """Forward and backward by the ruler, twice the same bits; dropout as the reference has it."""
    against = _truth(name, dtype)
    results = run_on_device(against.inputs)
    assert all(part.device.type == DEVICE.type for part in results.values())
    assert_same_bits(run_on_device(against.inputs), results)
    tolerance.assert_accurate(on_cpu(results), against)


@BY_DTYPE
@pytest.mark.parametrize("name", some([case.name for case in performance_cases()]))
def test_performance_shape(name, dtype):
    """At full size; two heads are held against float64."""
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    heads = (0, inputs.case.H - 1)
    against = tolerance.truth(some_heads(inputs, heads))
    results = run_on_device(inputs)
    assert_same_bits(run_on_device(inputs), results)
    for part_name, part in results.items():
        assert not part.isnan().any(), part_name
    tolerance.assert_accurate(
        on_cpu({name: part[:, list(heads)] for name, part in results.items()}), against
    )


@BY_DTYPE
@pytest.mark.parametrize("name", some(list(_masked_cases())))
def test_nothing_masked_leaks(name, dtype):
    """Whatever is in the slots that take no part: the same bits, forward and backward."""
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    expected = run_on_device(inputs.poisoned(0.0))
    for value in (float("nan"), float("inf")):
        results = run_on_device(inputs.poisoned(value))
        assert_same_bits(results, expected)
        tolerance.assert_exact_zeros(on_cpu(results), inputs)


def test_a_nan_in_one_item_stays_there():
    inputs = make_inputs(CROSS_ATTENTION["lens"], torch.float32)
    expected = run_on_device(inputs)
    q = inputs.q.clone()
    q[1] = float("nan")
    results = run_on_device(dataclasses.replace(inputs, q=q))
    for name, part in results.items():
        for item in (0, 2, 3):
            assert torch.equal(part[item], expected[name][item]), name


@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16]), ids=str)
def test_250_repeats(dtype):
    inputs = make_inputs(CROSS_ATTENTION["results_everything"], dtype)
    expected = run_on_device(inputs)
    for _ in range(250):
        assert_same_bits(run_on_device(inputs), expected)


@pytest.mark.parametrize("name", some(["results_everything", "gate_lens", "bias_lens", "q_lens"]))
def test_every_element_is_written(name):
    """torch.empty comes filled with NaN, in the kernels' own allocations as well."""
    against = _truth(name, torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        results = run_on_device(against.inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    tolerance.assert_accurate(on_cpu(results), against)


def test_inputs_are_not_written_and_the_graph_may_be_walked_twice():
    inputs = on_device(make_inputs(CROSS_ATTENTION["segments_everything"], torch.bfloat16))
    before = [t.clone() for t in (inputs.q, inputs.k, inputs.v, inputs.dout)]
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out = mmfast.cross_attention(*leaves, **inputs.options)
    first = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(out, leaves, inputs.dout)
    for one, other in zip(kept, second, strict=True):
        assert torch.equal(one, other)
    for now, then in zip((inputs.q, inputs.k, inputs.v, inputs.dout), before, strict=True):
        assert torch.equal(now, then)


@BY_DTYPE
@pytest.mark.parametrize("value", some([1e4, float("inf")]))
def test_saturated_gates(value, dtype):
    """Open: the ungated result. Closed: exactly 0. Gradients stay finite."""
    inputs = on_device(make_inputs(CROSS_ATTENTION["gate_full"], dtype))
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    plain = mmfast.cross_attention(*leaves)
    for sign, expected in ((1.0, plain), (-1.0, torch.zeros_like(plain))):
        gate = torch.full_like(inputs.options["gate"], sign * value).requires_grad_()
        out = mmfast.cross_attention(*leaves, gate=gate)
        assert torch.equal(out, expected)
        for grad in torch.autograd.grad(out, [*leaves, gate], inputs.dout):
            assert grad.isfinite().all()


def test_incoming_gradients_in_any_layout():
    """Stride 0 as from `.sum()`, transposed, sliced: the same bits as contiguous."""
    inputs = on_device(make_inputs(CROSS_ATTENTION["dense"], torch.bfloat16))
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    wide = torch.zeros(*inputs.dout.shape[:-1], 2 * inputs.dout.shape[-1], device=DEVICE)
    sliced = wide.to(inputs.dout.dtype)[..., 1::2].copy_(inputs.dout)
    one = torch.ones((), dtype=inputs.dout.dtype, device=DEVICE).expand(inputs.dout.shape)
    out = mmfast.cross_attention(*leaves)
    for dout in (sliced, inputs.dout.transpose(1, 2).contiguous().transpose(1, 2), one):
        got = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        expected = torch.autograd.grad(out, leaves, dout.contiguous(), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


# --- dropout ------------------------------------------------------------------------------------


@BY_DTYPE
@pytest.mark.parametrize("M", some([131, 64]))
def test_the_dropout_mask_is_the_reference_s(M, dtype):
    """Equal scores and the identity as values: `out` is the mask itself, element by element."""
    B, H, N, p = 2, 3, 70, 0.3
    q, k = (torch.zeros(B, H, length, 16, dtype=dtype, device=DEVICE) for length in (N, M))
    v = torch.eye(M, dtype=dtype, device=DEVICE).expand(B, H, M, M)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**63 - 1, (1,), device=DEVICE)  # as the op draws it
    torch.manual_seed(11)
    out = mmfast.cross_attention(q, k, v, dropout_p=p)
    assert torch.equal((out != 0).cpu(), dropout_keep(seed.cpu(), p, B, H, N, M))


def test_the_dropout_seed_comes_from_the_device_s_generator():
    inputs = on_device(make_inputs(CROSS_ATTENTION["dropout"], torch.float32))

    def draw():
        return mmfast.cross_attention(inputs.q, inputs.k, inputs.v, dropout_p=0.3)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "reentrant", some([False, True]), ids=lambda on: "reentrant" if on else "saved"
)
def test_checkpointing_sees_the_same_dropout(reentrant):
    inputs = on_device(make_inputs(CROSS_ATTENTION["dropout_odd"], torch.float32))

    def gradients(wrap):
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]

        def call(*tensors):
            return mmfast.cross_attention(*tensors, **inputs.options)

        torch.manual_seed(5)
        out = checkpoint(call, *leaves, use_reentrant=reentrant) if wrap else call(*leaves)
        out.backward(inputs.dout)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float16]), ids=str)
def test_autocast(dtype):
    inputs = on_device(make_inputs(CROSS_ATTENTION["gqa_3_ragged"], torch.float32))
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    low = [t.to(dtype) for t in (inputs.q, inputs.k, inputs.v)]
    lens, gate = inputs.options["kv_lens"], inputs.options["gate"]
    expected = mmfast.cross_attention(*low, kv_lens=lens, gate=gate.to(dtype))
    with torch.autocast(DEVICE.type, dtype):
        out = mmfast.cross_attention(*leaves, kv_lens=lens, gate=gate)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("precision", some(["high", "medium"]))
@pytest.mark.parametrize("name", some(["dense_long", "gqa_3_ragged", "width_128"]))
def test_float32_is_full_precision_unless_asked_otherwise(name, precision):
    """`test_case` runs under torch's default, "highest", where float32 obeys the ruler. Under a
    lower one products may be TF32's, all of them: no worse than its ten bits, the same bits twice,
    and no trace of it afterwards."""
    against = _truth(name, torch.float32)
    assert torch.get_float32_matmul_precision() == "highest"
    before = run_on_device(against.inputs)
    torch.set_float32_matmul_precision(precision)
    try:
        results = run_on_device(against.inputs)
        assert_same_bits(run_on_device(against.inputs), results)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same_bits(run_on_device(against.inputs), before)
    for part_name, part in on_cpu(results).items():
        exact = against.exact[part_name]
        live = exact.isfinite()
        assert torch.equal(part.isfinite(), live)
        error = tolerance.largest((part.double() - exact)[live])
        assert error <= 2.0**-8 * max(1.0, against.sums[part_name]), part_name


# --- what the kernels do not take ---------------------------------------------------------------


def _refused_for(inputs, backend):
    """The dispatcher's reason, which the error has to hold."""
    q, k, v = (t.to(DEVICE) for t in (inputs.q, inputs.k, inputs.v))
    offers = dispatch.explain("cross_attention", q, v, None)
    (reason,) = (offer.reason for offer in offers if offer.backend == backend)
    assert reason is not None
    with pytest.raises(RuntimeError) as error:
        mmfast.cross_attention(q, k, v)
    assert reason in str(error.value)
    return reason


@BY_DTYPE
@pytest.mark.parametrize("name", some([case.name for case in WIDER]))
def test_head_widths_beyond_256_are_refused(name, dtype, kernels):  # noqa: F811
    """By name with the reason; `auto` finds who can."""
    against = _truth(name, dtype)
    case = CROSS_ATTENTION[name]
    reason = _refused_for(against.inputs, kernels)
    assert str(MAX_WIDTH) in reason and str(max(case.D, case.Dv)) in reason
    with mmfast.use_backend("auto"):
        results = tolerance.run(mmfast.cross_attention, on_device(against.inputs))
    tolerance.assert_accurate(on_cpu(results), against)


def test_float64_is_refused(kernels):  # noqa: F811
    against = _truth("dense", torch.float64)
    assert "float64" in _refused_for(against.inputs, kernels)
    with mmfast.use_backend("auto"):
        results = tolerance.run(mmfast.cross_attention, on_device(against.inputs))
    tolerance.assert_accurate(on_cpu(results), against)


def test_auto_takes_the_kernels():
    inputs = on_device(make_inputs(CROSS_ATTENTION["dense"], torch.float16))
    with mmfast.use_backend("auto"):
        row = dispatch.select("cross_attention", inputs.q, inputs.v, None)
    assert row.backend in BACKENDS


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", some(["dense", "segments_everything", "results_everything", "gqa_3_ragged"])
)
def test_through_inductor(name):
    """One graph, one opaque op: the same bits as eager, dropout included."""
    inputs = on_device(make_inputs(CROSS_ATTENTION[name], torch.bfloat16))
    options = dict(inputs.options)
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    leaves |= {side: options.pop(side) for side in ("bias", "gate") if side in options}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}

    def function(tensors):
        return mmfast.cross_attention(**tensors, **options, return_lse=True)

    torch.compiler.reset()
    # Inductor would draw the dropout seed with a generator of its own.
    compiled = torch.compile(function, fullgraph=True, options={"fallback_random": True})
    results = []
    for one in (compiled, function):
        torch.manual_seed(13)
        output = one(leaves)
        grads = torch.autograd.grad(output.out, list(leaves.values()), inputs.dout)
        results.append([part for part in (*output, *grads) if part is not None])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_fullgraph_for_any_size():
    compiled = torch.compile(mmfast.cross_attention, fullgraph=True, dynamic=True)
    torch.compiler.reset()
    for N, M in ((33, 70), (1, 197), (128, 65)):
        case = Case(f"size_{N}_{M}", 2, 2, N, M, 64, kv_lens=(M, M // 2), layout="bnhd")
        inputs = on_device(make_inputs(case, torch.float16))
        lens = inputs.options["kv_lens"]
        expected = mmfast.cross_attention(inputs.q, inputs.k, inputs.v, kv_lens=lens)
        got = compiled(inputs.q, inputs.k, inputs.v, kv_lens=lens)
        assert torch.equal(got, expected)
