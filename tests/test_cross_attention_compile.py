"""opcheck, torch.compile, torch.export, fake tensors. Compiles are few: they are slow."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, make_inputs

# Several shapes and layouts: a fake that hard-codes one shape passes with that shape alone.
_OPCHECK_CASES = [
    "dense", "gqa_3_ragged", "widths_64_1", "layout_bnhd", "layout_nbhd", "layout_mixed_back",
    "segments_everything", "mask_B11M", "results_everything", "gate_full_float32",
    "bias_float32", "dropout", "empty_rows", "one_query_lens",
]  # fmt: skip


def _arguments(name, dtype=torch.float32):
    """The inputs of a case as the four ops take them."""
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    case, given = inputs.case, inputs.options

    def four(name):
        tensor = given.get(name)
        return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]

    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    bias, gate = four("bias"), given.get("gate")
    bias = None if bias is None else bias.detach().requires_grad_()
    gate = None if gate is None else gate.detach().requires_grad_()
    lens = [given.get(n) for n in ("kv_lens", "q_lens", "q_segments", "kv_segments")]
    seed = torch.tensor([17]) if case.dropout_p else None
    scale, rule = case.D**-0.5, int(case.segment_rule == "at_most")
    fwd = (
        *leaves, *lens, four("mask"), bias, None, None, gate, seed, scale, case.dropout_p,
        case.is_causal, rule, 0, 0,
    )  # fmt: skip
    return inputs, fwd, (lens, four("mask"), bias, scale, case.is_causal, rule)


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in _OPCHECK_CASES]
    + [("layout_mixed_back", torch.bfloat16), ("results_everything", torch.float64)],
)
def test_opcheck(name, dtype):
    with mmfast.use_backend("cpu"):
        mmfast.cross_attention(*[torch.ones(1, 1, 1, 1)] * 3)  # loads and registers
    ops = torch.ops.mmfast
    inputs, fwd, (lens, mask, bias, scale, causal, rule) = _arguments(name, dtype)
    torch.library.opcheck(ops.cross_attention_fwd.default, fwd)

    with torch.no_grad():
        out, lse = ops.cross_attention_fwd(*fwd)
    held = [None if t is None else t.detach() for t in fwd[:13]]
    bwd = (inputs.dout, None, *held[:3], out, lse, *held[3:], *fwd[13:], bias is not None, True)
    torch.library.opcheck(ops.cross_attention_bwd.default, bwd)

    bias = None if bias is None else bias.detach()
    for importance, weights in ((True, 0), (False, 1), (True, 2)):
        side = (*lens, mask, bias, None, None, scale, causal, rule, 0, 0)
        probs = (*held[:2], lse, *side, importance, weights)
        torch.library.opcheck(ops.cross_attention_probs.default, probs)
        got = ops.cross_attention_probs(*probs)
        incoming = (
            torch.randn_like(got[0]) if importance else None,
            torch.randn_like(got[1]) if weights else None,
        )
        arguments = (*incoming, *held[:2], lse, *side, bias is not None)
        torch.library.opcheck(ops.cross_attention_probs_bwd.default, arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck_of_the_length_check(dtype):
    lens = torch.tensor([3, 0, 7], dtype=dtype)
    arguments = (lens, 0, 7, "cross_attention", "kv_lens")
    torch.library.opcheck(torch.ops.mmfast.checked_int32.default, arguments)
    assert torch.ops.mmfast.checked_int32(*arguments).dtype == torch.int32


def _everything(q, k, v, bias, gate, kv_lens):
    result = mmfast.cross_attention(
        q, k, v, bias=bias, gate=gate, kv_lens=kv_lens, is_causal=True, return_lse=True,
        return_importance=True, return_weights=True,
    )  # fmt: skip
    return tuple(result)


def _problem(B, H, N, M, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(B, N, H, D, generator=g).transpose(1, 2),
        torch.randn(B, M, H, D, generator=g).transpose(1, 2),
        torch.randn(B, M, H, D, generator=g).transpose(1, 2),
        torch.randn(1, H, N, M, generator=g),
        torch.randn(B, N, H, generator=g),
    ]
    lens = torch.randint(0, M + 1, (B,), generator=g)
    return [t.requires_grad_() for t in tensors], lens


def _gradients(function, leaves, lens):
    results = function(*leaves, lens)
    loss = sum(part.masked_fill(part.isinf(), 0.0).sin().sum() for part in results)
    return [part.detach() for part in results], torch.autograd.grad(loss, leaves)


def test_fullgraph_dynamic(backend):
    """One graph for all sizes, gradients included, equal to eager, through inductor.

    Except D: a kernel takes the scale as a number, and a new one is a new graph.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(_everything, fullgraph=True, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    for sizes in ((2, 3, 9, 17, 16), (3, 2, 40, 70, 16), (5, 4, 7, 33, 16)):
        leaves, lens = _problem(*sizes)
        got, expected = (_gradients(f, leaves, lens) for f in (compiled, _everything))
        for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert graphs["unique_graphs"] == 1
    with pytest.raises(ValueError, match="kv_lens holds 34, allowed are 0 to 33; clamp it"):
        compiled(*leaves, torch.full((5,), 34))


@pytest.mark.parametrize(
    "name",
    ["segments_everything", "results_everything", "gqa_3_ragged", "mask_dead_rows", "empty_rows"],
)
def test_fullgraph_of_a_case(name, backend):
    """aot_eager: Dynamo, fake tensors, AOTAutograd, functionalisation; no code generation."""
    torch.compiler.reset()
    against = tolerance.truth(make_inputs(CROSS_ATTENTION[name], torch.float32))
    compiled = torch.compile(mmfast.cross_attention, fullgraph=True, backend="aot_eager")
    tolerance.assert_accurate(tolerance.run(compiled, against.inputs), against)


def test_changing_the_backend_recompiles():
    torch.compiler.reset()
    compiled = torch.compile(mmfast.cross_attention, fullgraph=True, backend="eager")
    q = torch.randn(1, 2, 3, 8)
    for name in ("reference", "auto", "reference"):
        with mmfast.use_backend(name):
            torch.testing.assert_close(compiled(q, q, q), mmfast.cross_attention(q, q, q))


def test_autocast_under_compile(backend):
    torch.compiler.reset()

    def function(q):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mmfast.cross_attention(q, q, q)

    q = torch.randn(1, 2, 3, 8)
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(q)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, function(q))


def test_jvp_under_compile():
    """Never a silent zero tangent."""
    torch.compiler.reset()
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))

    def function(q, tangent):
        return torch.func.jvp(lambda q: mmfast.cross_attention(q, k, v), (q,), (tangent,))

    compiled = torch.compile(function, backend="aot_eager")
    got, expected = compiled(q, k), function(q, k)
    assert expected[1].abs().max() > 1e-3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_with_dropout_under_compile(compiled, backend):
    torch.compiler.reset()
    leaves, _ = _problem(2, 3, 9, 17, 8)
    q, k, v = leaves[:3]

    def block(q, k, v):
        return mmfast.cross_attention(q, k, v, dropout_p=0.5)

    def function(q, k, v):
        return checkpoint(block, q, k, v, use_reentrant=False)

    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    out = function(q, k, v)
    got = torch.autograd.grad(out.sin().sum(), (q, k, v))
    torch.manual_seed(3)
    plain = block(q, k, v)
    torch.testing.assert_close(out, plain)
    for a, b in zip(got, torch.autograd.grad(plain.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 16)

    def forward(self, x, context, lens):
        q, k = (self.project(t).unflatten(-1, (2, 8)).transpose(1, 2) for t in (x, context))
        return mmfast.cross_attention(q, k, k, kv_lens=lens, return_lse=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, backend):
    model = _Model()
    rows, keys = torch.export.Dim("rows", max=64), torch.export.Dim("keys", max=64)
    arguments = (torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.tensor([7, 2]))
    program = torch.export.export(
        model, arguments, dynamic_shapes=({1: rows}, {1: keys}, None), strict=strict
    )
    other = (torch.randn(2, 9, 8), torch.randn(2, 30, 8), torch.tensor([0, 30]))
    for inputs in (arguments, other):
        got, expected = program.module()(*inputs), model(*inputs)
        torch.testing.assert_close(got.out, expected.out)
        torch.testing.assert_close(got.lse, expected.lse)
    with pytest.raises(ValueError, match="kv_lens holds 31, allowed are 0 to 30"):
        program.module()(*other[:2], torch.tensor([0, 31]))


@pytest.mark.parametrize("name", ["dense", "layout_bnhd", "results_everything"])
def test_fake_and_meta_tensors(name, backend):
    """Shapes, dtypes and strides are known without computing."""
    inputs = make_inputs(CROSS_ATTENTION[name], torch.bfloat16)
    function = functools.partial(mmfast.cross_attention, return_lse=True)
    expected = function(inputs.q, inputs.k, inputs.v, **inputs.options)
    with torch._subclasses.FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(t) for t in (inputs.q, inputs.k, inputs.v))
        options = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.options.items()
        }
        got = function(q, k, v, **options)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.stride() == b.stride()
    with mmfast.use_backend("auto"):
        on_meta = function(*(t.to("meta") for t in (inputs.q, inputs.k, inputs.v)))
    assert on_meta.out.is_meta
    assert on_meta.out.shape == expected.out.shape


def test_jit_trace_is_not_constant(backend):
    """A traced graph computes: it does not replay the result of the example."""
    q, other = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda q: mmfast.cross_attention(q, q, q), (q,), check_trace=False)
    torch.testing.assert_close(traced(other), mmfast.cross_attention(other, other, other))
