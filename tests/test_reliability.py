"""What went wrong for users of other libraries: one test, or a few, for each class of fault."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, functional_cases, make_inputs

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16]


def _leaves(inputs):
    return [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]


def _masked_cases():
    """Cases with keys or rows that take no part."""
    for case in functional_cases():
        inputs = make_inputs(case)
        if not (inputs.key_seen().all() and inputs.row_sees().all()):
            yield case.name


def _same_bits(results, expected):
    for name, part in expected.items():
        assert torch.equal(results[name], part), name


# --- fully masked rows --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["length", "mask", "segments", "bias", "q_lens"])
def test_a_fully_masked_row(kind, dtype, implementation):
    """out 0, LSE -inf, finite gradients with the loss on the live rows only."""
    inputs = make_inputs(Case("blind", 3, 2, 5, 37, 16), dtype)
    options = {
        "length": {"kv_lens": torch.tensor([37, 0, 5])},
        "mask": {"mask": torch.tensor([True, False, True])[:, None, None, None]},
        "segments": {
            "q_segments": torch.tensor([[0], [9], [0]]).expand(3, 5),
            "kv_segments": torch.zeros(3, 37, dtype=torch.int64),
        },
        "bias": {"bias": torch.tensor([0.0, -INF, 0.0], dtype=dtype)[:, None, None, None]},
        "q_lens": {"q_lens": torch.tensor([5, 0, 5])},
    }[kind]
    leaves = _leaves(inputs)
    result = mmfast.cross_attention(*leaves, **options, return_lse=True, return_importance=True)
    assert not result.out[1].any()
    assert (result.lse[1] == -INF).all()
    assert not result.importance[1].any()
    assert result.lse[0].isfinite().all()
    grads = torch.autograd.grad(result.out[::2].float().square().sum(), leaves, retain_graph=True)
    for grad in grads:
        assert grad.isfinite().all()
        assert not grad[1].any()
    # And with a loss on the blind item itself.
    for grad in torch.autograd.grad(result.out.float().square().sum(), leaves):
        assert grad.isfinite().all()
        assert not grad[1].any()


def test_bool_infinite_and_finfo_min_agree_on_live_rows(implementation):
    inputs = make_inputs(CROSS_ATTENTION["mask_dead_rows"], torch.float32)
    mask = inputs.options["mask"]
    expected = tolerance.run(mmfast.cross_attention, inputs)
    live = inputs.row_sees()
    for low in (-INF, torch.finfo(torch.float32).min):
        bias = torch.zeros(mask.shape).masked_fill(~mask, low)
        other = dataclasses.replace(inputs, options={"bias": bias})
        results = tolerance.run(mmfast.cross_attention, other, backward=False)
        for name in ("out", "lse"):
            torch.testing.assert_close(results[name][live], expected[name][live])
        assert not results["out"].isnan().any()


# --- NaN and Inf in padding ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(_masked_cases()))
def test_nothing_masked_leaks(name, dtype, value, implementation):
    """Whatever is in the slots that take no part: the same bits, forward and backward."""
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    expected = tolerance.run(mmfast.cross_attention, inputs.poisoned(0.0))
    results = tolerance.run(mmfast.cross_attention, inputs.poisoned(value))
    _same_bits(results, expected)
    tolerance.assert_exact_zeros(results, inputs)


def test_padded_bias_gate_and_incoming_gradient_may_be_anything(implementation):
    """Beyond the lengths the side inputs are not read either."""
    case = Case("padded_sides", 3, 2, 35, 70, 16, kv_lens=(70, 33, 0), q_lens=(35, 7, 20),
                bias="BHNM", gate="full", importance=True)  # fmt: skip
    inputs = make_inputs(case, torch.float32)
    allowed, blind = inputs.allowed(), ~inputs.row_sees()

    def filled(value):
        bias = inputs.options["bias"].masked_fill(~allowed, value)
        gate = inputs.options["gate"].masked_fill(blind.transpose(1, 2)[..., None], value)
        dout = inputs.dout.masked_fill(blind[..., None], value)
        options = {**inputs.options, "bias": bias, "gate": gate}
        return dataclasses.replace(inputs, options=options, dout=dout)

    expected = tolerance.run(mmfast.cross_attention, filled(0.0))
    results = tolerance.run(mmfast.cross_attention, filled(NAN))
    _same_bits(results, expected)


def test_a_nan_in_one_item_stays_there(implementation):
    inputs = make_inputs(CROSS_ATTENTION["lens"], torch.float32)
    expected = tolerance.run(mmfast.cross_attention, inputs)
    q = inputs.q.clone()
    q[0] = NAN
    results = tolerance.run(mmfast.cross_attention, dataclasses.replace(inputs, q=q))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(results[name][1:], expected[name][1:]), name
    assert results["out"][0].isnan().all()


# --- gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["head", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1e4, -1e4, INF, -INF])
def test_gate_overflow(value, dtype, form, implementation):
    case = Case("gates", 2, 2, 9, 33, 16, gate=form)
    inputs = make_inputs(case, dtype)
    gate = torch.full_like(inputs.options["gate"], value)
    other = dataclasses.replace(inputs, options={"gate": gate})
    results = tolerance.run(mmfast.cross_attention, other)
    ungated = tolerance.run(mmfast.cross_attention, dataclasses.replace(inputs, options={}))
    assert not results["dgate"].any()  # saturated, and never NaN
    for name in ("out", "dq", "dk", "dv"):
        expected = ungated[name] if value > 0 else torch.zeros_like(ungated[name])
        assert torch.equal(results[name], expected), name


# --- sizes, offsets, strides --------------------------------------------------------------------


def test_offsets_beyond_32_bits(backend):
    """A small tensor with a stride of 2**31 + 8 elements; untouched pages cost no memory."""
    stride = 2**31 + 8
    shape, strides = (2, 1, 5, 16), (stride, 80, 16, 1)
    tensors = []
    for seed in range(3):
        flat = torch.empty(stride + 80, dtype=torch.bfloat16)
        tensor = flat.as_strided(shape, strides)
        tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        tensors.append(tensor)
    compact = [t.contiguous() for t in tensors]
    assert torch.equal(mmfast.cross_attention(*tensors), mmfast.cross_attention(*compact))
    leaves = [t.detach().requires_grad_() for t in tensors]
    got = torch.autograd.grad(mmfast.cross_attention(*leaves).float().square().sum(), leaves)
    leaves = [t.requires_grad_() for t in compact]
    expected = torch.autograd.grad(mmfast.cross_attention(*leaves).float().square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("B", "H"), [(65536, 1), (1, 65536), (256, 257)])
def test_more_heads_than_a_grid_has(B, H, backend):
    inputs = make_inputs(Case(f"grid_{B}_{H}", B, H, 1, 3, 4), torch.float32)
    leaves = _leaves(inputs)
    out = mmfast.cross_attention(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    dim = 0 if B > 1 else 1
    size = (B, H)[dim]
    for part in (slice(0, size // 2), slice(size // 2, size)):
        index = (part,) if dim == 0 else (slice(None), part)
        halves = [leaf.detach()[index].requires_grad_() for leaf in leaves]
        half = mmfast.cross_attention(*halves)
        torch.testing.assert_close(half, out[index])
        half_grads = torch.autograd.grad(half.square().sum(), halves)
        for a, b in zip(half_grads, grads, strict=True):
            torch.testing.assert_close(a, b[index])


@pytest.mark.parametrize("name", ["dense", "lens", "gate_head", "layout_bnhd"])
def test_strides_of_the_incoming_gradient(name, implementation):
    """`.sum().backward()` gives stride 0; slices and transposes come from the code around."""
    inputs = make_inputs(CROSS_ATTENTION[name], torch.float32)
    B, H, N, Dv = inputs.dout.shape

    def gradients(dout):
        return tolerance.run(mmfast.cross_attention, dataclasses.replace(inputs, dout=dout))

    ones = gradients(torch.ones(B, H, N, Dv))
    _same_bits(gradients(torch.ones(()).expand(B, H, N, Dv)), ones)
    leaves = _leaves(inputs)
    mmfast.cross_attention(*leaves, **inputs.options).sum().backward()
    for leaf, expected in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert torch.equal(leaf.grad, ones[expected])

    expected = gradients(inputs.dout)
    wide = torch.randn(B, H, N, 2 * Dv + 1)
    wide[..., 1::2] = inputs.dout
    transposed = inputs.dout.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    rows = inputs.dout.transpose(1, 2).contiguous().transpose(1, 2)
    for dout in (wide[..., 1::2], transposed, rows):
        _same_bits(gradients(dout), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [16, 17, 64])
def test_misaligned_by_one_element(D, dtype, implementation):
    def shifted(tensor):
        flat = torch.empty(tensor.numel() + 1, dtype=dtype)[1:]
        return flat.view(tensor.shape).copy_(tensor)

    inputs = make_inputs(Case("aligned", 2, 2, 19, 37, D, bias="1HNM", gate="full"), dtype)
    options = {name: shifted(tensor) for name, tensor in inputs.options.items()}
    q, k, v, dout = (shifted(t) for t in (inputs.q, inputs.k, inputs.v, inputs.dout))
    moved = dataclasses.replace(inputs, q=q, k=k, v=v, dout=dout, options=options)
    assert q.data_ptr() % 16 != 0
    expected = tolerance.run(mmfast.cross_attention, inputs)
    _same_bits(tolerance.run(mmfast.cross_attention, moved), expected)


@pytest.mark.parametrize("flags", [{}, {"return_importance": True, "return_weights": True}])
@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (0, 2, 0, 0)], ids=str)
def test_empty(sizes, flags, implementation):
    """Also with every option given, and through the backward."""
    case = Case(f"empty{sizes}", *sizes, 16, segments="shuffled", mask="B1NM", bias="BHNM",
                gate="full", dropout_p=0.1, kv_lens=(0,) * sizes[0], q_lens=(0,) * sizes[0],
                is_causal=True)  # fmt: skip
    inputs = make_inputs(case, torch.float32)
    leaves = _leaves(inputs)
    result = mmfast.cross_attention(*leaves, **inputs.options, return_lse=True, **flags)
    assert result.out.shape == (*sizes[:3], 16)
    assert (result.out == 0).all()
    assert (result.lse == -INF).all()
    for leaf, grad in zip(leaves, torch.autograd.grad(result.out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (3, 3), (17, 17), (72, 80), (96, 3), (64, 512)])
def test_odd_widths_use_every_column(D, Dv, implementation):
    """A NaN in the last column of q, k or v reaches the result."""
    inputs = make_inputs(Case(f"columns{D}_{Dv}", 1, 1, 3, 33, D, Dv=Dv), torch.float32)
    for name in ("q", "k", "v"):
        spoilt = getattr(inputs, name).clone()
        spoilt[..., -1] = NAN
        results = tolerance.run(
            mmfast.cross_attention, dataclasses.replace(inputs, **{name: spoilt}), backward=False
        )
        out = results["out"]
        assert (out[..., -1].isnan().all() and not out[..., :-1].isnan().any()) or (
            name != "v" and out.isnan().all()
        )


# --- rows never written -------------------------------------------------------------------------


@pytest.fixture
def poisoned_empty():
    """torch.empty comes filled with NaN, in the kernels' own allocations as well."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["lens", "lens_all_zero", "q_lens", "both_lens", "causal_tall", "causal_lens", "mask_tiles",
     "segments_equal_orphan", "segments_everything", "results_everything", "weights_mask",
     "importance_lens", "gate_lens", "width_17", "empty_keys", "empty_rows", "bias_lens"],
)  # fmt: skip
def test_every_element_is_written(name, dtype, poisoned_empty, implementation):
    against = tolerance.truth(make_inputs(CROSS_ATTENTION[name], dtype))
    tolerance.assert_accurate(tolerance.run(mmfast.cross_attention, against.inputs), against)


# --- determinism, threads -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results_everything", "dropout_odd", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_250_repeats(name, dtype, backend):
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    expected = tolerance.run(mmfast.cross_attention, inputs)
    for _ in range(250 if backend == "cpu" else 20):
        _same_bits(tolerance.run(mmfast.cross_attention, inputs), expected)


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize(
    "name",
    ["dense_long", "results_everything", "gqa_3_ragged", "one_query", "one_query_lens",
     "bias_1111", "bias_11NM", "gate_full", "empty_rows"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(name, dtype):
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    before = torch.get_num_threads()
    try:
        with mmfast.use_backend("cpu"):
            torch.set_num_threads(1)
            expected = tolerance.run(mmfast.cross_attention, inputs)
            for threads in (2, 4):
                torch.set_num_threads(threads)
                _same_bits(tolerance.run(mmfast.cross_attention, inputs), expected)
    finally:
        torch.set_num_threads(before)


# --- what must not be written to ----------------------------------------------------------------


def _version(tensor):
    return tensor._version, tensor.detach().clone()


def test_inputs_and_saved_tensors_are_not_written(implementation):
    """Version counters and bits, of inputs and of the incoming gradients; retain_graph twice."""
    inputs = make_inputs(CROSS_ATTENTION["results_everything"], torch.float32)
    leaves = _leaves(inputs)
    held = [*leaves, inputs.dout, *(t for t in inputs.options.values() if torch.is_tensor(t))]
    before = [_version(t) for t in held]
    result = mmfast.cross_attention(*leaves, **inputs.options, return_lse=True)
    kept = [_version(part) for part in result]
    incoming = [inputs.dout, inputs.dlse, inputs.dimportance, inputs.dweights]
    first = torch.autograd.grad(list(result), leaves, incoming, retain_graph=True)
    second = torch.autograd.grad(list(result), leaves, incoming, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for tensor, (version, bits) in zip([*held, *result], [*before, *kept], strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, bits)


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize("which", ["q", "out", "mask", "kv_lens"])
def test_writing_to_a_saved_tensor_is_noticed(which):
    inputs = make_inputs(Case("saved", 2, 2, 3, 5, 4, mask="B1NM", kv_lens=(5, 2)), torch.float32)
    q = inputs.q.clone().requires_grad_()
    live = q * 1
    options = dict(inputs.options)
    with mmfast.use_backend("cpu"):
        out = mmfast.cross_attention(live, inputs.k, inputs.v, **options)
    victim = {"q": live, "out": out, **options}[which]
    with torch.no_grad():
        victim.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_scoreboard_names_tests_that_exist():
    folder = Path(__file__).parent
    page = (folder.parent / "docs" / "reliability.md").read_text()
    cited = re.findall(r"`(test_\w+\.py)::(\w+)`", page)
    assert len(cited) > 30
    for file, name in cited:
        assert f"def {name}(" in (folder / file).read_text(), f"{file}::{name}"
