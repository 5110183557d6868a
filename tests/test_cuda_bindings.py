"""The bindings of the CUDA kernels, on the host run: errors, memory, opcheck, torch.compile, vmap.

One source serves the library that ships and this one (csrc/bindings/cuda_*.cpp); what a GPU adds to
it is its stream, its guard and its allocator, which tests marked `gpu` see.
"""

from __future__ import annotations

import functools

import cuda_host
import pytest
import torch
from cuda_host import host  # noqa: F401

import mmfast
from mmfast import _torch_ops, dispatch
from mmfast.ops import _fused
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, LAYOUTS, make_inputs
from mmfast.testing.gate_cases import GATE_LAYOUTS, GATES, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate

pytestmark = pytest.mark.usefixtures("host")

OPS = _torch_ops.OPS
GATE_OPS = _torch_ops.GATES
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
ATTENTION = [
    "dense", "gqa_3_ragged", "widths_64_1", "layout_bnhd", "layout_mixed_back",
    "segments_everything", "mask_B11M", "results_everything", "gate_full_float32", "bias_float32",
    "dropout", "empty_rows", "empty_keys", "one_query_lens",
]  # fmt: skip
GATED = [
    "gated_residual-mask_BN_BC", "gated_residual-layout_sequence_first",
    "gated_residual-float32_same", "glu-layout_sequence_first", "glu-empty_rows",
    "glu_packed-layout_sequence_first", "fuse-softmax_BNK_present", "fuse-layout_sequence_first",
    "fuse-gmu_1NKC", "fuse-empty_rows", "fuse-pair_B1C_present", "modulate-empty_rows",
    "modulate-layer_all_BC", "modulate-layout_sequence_first", "modulate-film_chunk",
    "adaptation_gate-mask_BN", "adaptation_gate-layout_sequence_first",
    "adaptation_gate-empty_rows",
]  # fmt: skip


def _needs(op):
    """Skips where the library was built without this op (MMFAST_HOST_OPS)."""
    if op not in cuda_host.ops():
        pytest.skip(f"MMFAST_HOST_OPS leaves {op} out of the library")


def _run(name, dtype, function=None):
    """Forward and backward of a case of an op, on the backend at hand."""
    if name in GATES:
        inputs = make_gate_inputs(GATES[name], dtype)
        return run_gate(function or getattr(mmfast, GATES[name].op), inputs)
    return tolerance.run(
        function or mmfast.cross_attention, make_inputs(CROSS_ATTENTION[name], dtype)
    )


def _op_of(name):
    return GATES[name].op if name in GATES else "cross_attention"


# --- what is registered -------------------------------------------------------------------------


def test_every_op_is_there():
    missing = set(OPS) - set(cuda_host.ops())
    if missing and cuda_host.asked_for_some():
        pytest.skip(f"MMFAST_HOST_OPS leaves out {', '.join(sorted(missing))}")
    assert not missing


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("compiled_library")
def test_schemas_are_those_of_the_other_backends(op):
    _needs(op)
    dispatch.explain()  # loads the compiled library
    for mine, theirs in zip(
        _torch_ops.torch_ops(op, cuda_host.NAMESPACE), _torch_ops.torch_ops(op), strict=True
    ):
        assert str(mine._schema).partition("::")[2] == str(theirs._schema).partition("::")[2]


# --- errors: what would be unsafe, past the checks of the Python ops ----------------------------


def _arguments(op):
    """The arguments of `<op>_fwd` of a small problem."""
    x = torch.ones(2, 3, 16)
    q = torch.ones(2, 2, 3, 16)
    return {
        "cross_attention": (q, q, q, *(None,) * 10, 0.25, 0.0, False, 0, 0, 0),
        "gated_residual": (x, x, torch.ones(1, 1, 16), None, 0),
        "glu": (x, x, 0),
        "glu_packed": (x, 0),
        "fuse": ([x, x], torch.ones(1, 1, 2, 1), None, 0),
        "modulate": (x, None, None, torch.ones(2, 1, 16), None, None, None, 1, 1e-5),
        "adaptation_gate": (x, x, None, None, None, 1.0, 1e-6),
    }[op]


def _moved(arguments, change, skip=0):
    """With `change` made to the tensors of the call but the first `skip`."""
    seen = 0

    def one(value):
        nonlocal seen
        if isinstance(value, list):
            return [one(part) for part in value]
        if not isinstance(value, torch.Tensor):
            return value
        seen += 1
        return value if seen <= skip else change(value)

    return tuple(one(value) for value in arguments)


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_are_right_as_they_are(op):
    """Otherwise the errors below could be of something else."""
    _needs(op)
    cuda_host.op(f"{op}_fwd").redispatch(CPU, *_arguments(op))


@pytest.mark.parametrize("op", OPS)
def test_float64_is_refused(op):
    _needs(op)
    arguments = _moved(_arguments(op), torch.Tensor.double)
    with pytest.raises(RuntimeError, match=rf"mmfast::{op}: \S+ must be float32, "):
        cuda_host.op(f"{op}_fwd").redispatch(CPU, *arguments)


@pytest.mark.parametrize("op", [op for op in OPS if op != "glu_packed"])  # it has one tensor
def test_tensors_on_two_devices_are_refused(op):
    _needs(op)
    arguments = _moved(_arguments(op), lambda tensor: tensor.to("meta"), skip=1)
    with pytest.raises(RuntimeError) as error:
        cuda_host.op(f"{op}_fwd").redispatch(CPU, *arguments)
    assert f"mmfast::{op}: " in str(error.value)
    assert " is on cpu; move it with " in str(error.value)


@pytest.mark.parametrize(("D", "Dv"), [(257, 16), (16, 300)])
def test_wide_heads_are_refused(D, Dv):
    _needs("cross_attention")
    q, v = torch.ones(1, 1, 2, D), torch.ones(1, 1, 2, Dv)
    with pytest.raises(RuntimeError, match=r"mmfast::cross_attention: .* go up to 256 here"):
        cuda_host.op("cross_attention_fwd").redispatch(
            CPU, q, q, v, *(None,) * 10, 0.25, 0.0, False, 0, 0, 0
        )
    with pytest.raises(RuntimeError, match=f"D={D}, Dv={Dv}: head widths go up to 256 here"):
        mmfast.cross_attention(q, q, v)


def test_float64_by_name_names_the_backend():
    _needs("glu")
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cuda: the data is torch\.float64, this backend"):
        mmfast.glu(x, x)


def test_strided_heads_are_refused():
    """The last dim of q is read as dense: with another stride that would be other memory."""
    _needs("cross_attention")
    q = torch.ones(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="the last dim of q and k must be dense"):
        cuda_host.op("cross_attention_fwd").redispatch(
            CPU, q.expand(1, 1, 2, 8).transpose(2, 3)[..., :1].expand(1, 1, 8, 8), q, q,
            *(None,) * 10, 0.25, 0.0, False, 0, 0, 0,
        )  # fmt: skip


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_attention_follows_the_inputs(layout):
    _needs("cross_attention")
    inputs = make_inputs(CROSS_ATTENTION[f"layout_{layout}"], torch.bfloat16)
    results = tolerance.run(mmfast.cross_attention, inputs)
    with mmfast.use_backend("reference"):
        assert results["out"].shape == mmfast.cross_attention(inputs.q, inputs.k, inputs.v).shape
    out = results["out"]
    turned = inputs.q.stride(1) < inputs.q.stride(2)
    assert (out.transpose(1, 2) if turned else out).is_contiguous()


@pytest.mark.parametrize("layout", GATE_LAYOUTS)
@pytest.mark.parametrize("op", GATE_OPS)
def test_memory_of_gates_follows_the_inputs(op, layout):
    _needs(op)
    inputs = make_gate_inputs(GATES[f"{op}-layout_{layout}"], torch.float32)
    results = run_gate(getattr(mmfast, op), inputs)
    data = next(iter(inputs.leaves.values()))
    turned = data.stride(0) < data.stride(1) and layout != "columns"
    for name in ("out", "h"):
        if name in results:
            out = results[name]
            assert (out.transpose(0, 1) if turned else out).is_contiguous(), name


@pytest.mark.parametrize("name", ["empty_batch", "empty_rows", "empty_keys", "empty_all"])
def test_empty_attention(name):
    _needs("cross_attention")
    cuda_host.check_attention(name, torch.float16)


@pytest.mark.parametrize("name", [name for name in GATES if "-empty" in name])
def test_empty_gates(name):
    _needs(_op_of(name))
    cuda_host.check_gate(name, torch.float16)


# --- the torch ops under torch --------------------------------------------------------------------


class _Recorder:
    """Stands in for a torch op and keeps what it is called with."""

    def __init__(self, op):
        self.op, self.calls = op, []

    def __call__(self, *args):
        self.calls.append(args)
        return self.op(*args)


def _detached(value, differentiable):
    if isinstance(value, list | tuple) and any(isinstance(one, torch.Tensor) for one in value):
        return [_detached(one, differentiable) for one in value]
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(differentiable and value.is_floating_point())
    return value


QUICK = {"layout_bnhd", "results_everything", "empty_rows", "gate_full_float32", "bias_float32",
         "one_query_lens"}  # fmt: skip
SLOW = [
    pytest.param(name, marks=[] if name in QUICK or name in GATES else [pytest.mark.slow])
    for name in (*ATTENTION, *GATED)
]


@pytest.mark.parametrize("name", SLOW)
def test_opcheck(name, monkeypatch):
    """With the arguments that a real forward and backward give to the torch ops."""
    op = _op_of(name)
    _needs(op)
    originals = _torch_ops.torch_ops(op, cuda_host.NAMESPACE)
    recorders = [_Recorder(one) for one in originals]
    monkeypatch.setitem(dispatch._cuda_kernels, op, _torch_ops.bundle(op, recorders, recorders))
    _run(name, torch.float32)
    assert recorders[0].calls, "nothing was called"
    for original, recorder in zip(originals, recorders, strict=True):
        forward = original._opname.endswith(("_fwd", "_probs"))
        for call in recorder.calls[:1]:
            torch.library.opcheck(original, tuple(_detached(value, forward) for value in call))


COMPILED = [
    "segments_everything", "gqa_3_ragged", "results_everything", "gated_residual-mask_BN_BC",
    "glu-rank_4d", "glu_packed-gelu", "fuse-softmax_BNK_present", "modulate-layer_all_BC",
    "adaptation_gate-mask_BN",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_fullgraph_of_a_case(name):
    """aot_eager: Dynamo, fake tensors, AOTAutograd. The same ops, so the same bits as eager."""
    op = _op_of(name)
    _needs(op)
    torch.compiler.reset()
    function = getattr(mmfast, op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if name in GATES:
        against = gate_truth(make_gate_inputs(GATES[name], torch.float32))
        assert_gate_accurate(run_gate(compiled, against.inputs), against)
    else:
        against = tolerance.truth(make_inputs(CROSS_ATTENTION[name], torch.float32))
        tolerance.assert_accurate(tolerance.run(compiled, against.inputs), against)


def test_the_graph_holds_the_ops_of_this_backend():
    """What AOTInductor compiles and a C++ server runs: ops of the library, no Python."""
    _needs("glu")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda a, b: mmfast.glu(a, b), fullgraph=True, backend=keep)
    compiled(torch.ones(2, 3, 8), torch.ones(2, 3, 8))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert f"{cuda_host.NAMESPACE}.glu_fwd.default" in targets


class _Glu(torch.nn.Module):
    def forward(self, a, b):
        return mmfast.glu(a, b)


def test_an_exported_program_needs_no_backend_chosen():
    """The choice was made when it was exported: it holds the ops themselves."""
    _needs("glu")
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(_Glu(), (x, x))
    expected = mmfast.glu(x, x)
    with mmfast.use_backend("reference"):
        assert torch.equal(program.module()(x, x), expected)
    assert f"{cuda_host.NAMESPACE}.glu_fwd.default" in str(program.graph)


@pytest.mark.parametrize("op", GATE_OPS)
def test_gradient_of_a_gradient_is_an_error(op):
    _needs(op)
    name = {"fuse": "fuse-softmax_BNK_present", "glu_packed": "glu_packed-gelu"}.get(
        op, next(name for name in GATES if GATES[name].op == op)
    )
    inputs = make_gate_inputs(GATES[name], torch.float32)
    leaves = {key: leaf.detach().requires_grad_() for key, leaf in inputs.leaves.items()}
    output = inputs.call(getattr(mmfast, op), leaves)
    out = output if isinstance(output, torch.Tensor) else output.out
    first = torch.autograd.grad(out.sin().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of a gradient is not offered"):
        first[-1].sum().backward()


def test_vmap():
    _needs("glu")
    _needs("cross_attention")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 16, generator=g), torch.randn(2, 2, 3, 16, generator=g)
    expected = torch.stack([mmfast.glu(x, y) for x, y in zip(a, b, strict=True)])
    assert torch.equal(torch.func.vmap(mmfast.glu)(a, b), expected)
    attend = functools.partial(mmfast.cross_attention, is_causal=True)
    q = torch.randn(2, 1, 2, 5, 16, generator=g)
    expected = torch.stack([attend(x, x, x) for x in q])
    assert torch.equal(torch.func.vmap(lambda x: attend(x, x, x))(q), expected)


def test_fake_cuda_tensors(monkeypatch):
    """What torch.compile and torch.export see of a GPU. Without gradients: autograd asks a device
    that is not there for its streams."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = cuda_host.ops()
    home = dispatch.Home(cuda_host.NAMESPACE, torch._C.DispatchKey.CUDA, "cuda")
    monkeypatch.setattr(dispatch, "_cuda_home", home)
    monkeypatch.setattr(dispatch, "_no_code_for", lambda device: None)
    with FakeTensorMode():
        x = torch.empty(2, 3, 16, device="cuda", dtype=torch.bfloat16)
        q = torch.empty(2, 5, 4, 16, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        if "glu" in found:
            out = mmfast.glu(x, x)
            assert (out.device.type, out.shape, out.dtype) == ("cuda", x.shape, x.dtype)
        if "cross_attention" in found:
            lens = torch.empty(2, dtype=torch.int32, device="cuda")
            out = mmfast.cross_attention(q, q, q, kv_lens=lens)
            assert (out.device.type, out.stride()) == ("cuda", q.stride())


# --- the quick way of gates -----------------------------------------------------------------------


def test_plain_calls_go_at_once_and_others_are_checked():
    """`_fused.quick` gives this backend's kernels for plain tensors, and nothing for any other."""
    _needs("glu")
    x = torch.ones(2, 3, 8)
    kernels = dispatch._cuda_kernels["glu"]
    assert _fused.quick("glu", x, x) is kernels
    assert _fused.quick("glu", x, None) is kernels
    for a, b in (
        (x.double(), x.double()),
        (x, x.to("meta")),
        (x, torch.ones(2, 8, 3).transpose(1, 2)),
        (x.to_sparse(), x),
        (None, x),
    ):
        assert _fused.quick("glu", a, b) is None
    with torch.autocast("cpu"):
        assert _fused.quick("glu", x, x) is None
    with mmfast.use_backend("reference"):
        assert _fused.quick("glu", x, x) is None
    with torch.autograd.forward_ad.dual_level():
        assert _fused.quick("glu", x, x) is None


@pytest.mark.parametrize("ways", ["forward", "backward"])
def test_the_quick_way_and_the_checked_one_give_the_same_bits(ways, monkeypatch):
    _needs("glu")
    inputs = make_gate_inputs(GATES["glu-layout_dense"], torch.bfloat16)
    quick = run_gate(mmfast.glu, inputs, ways == "backward")
    monkeypatch.setattr(_fused, "quick", lambda op, *tensors: None)
    checked = run_gate(mmfast.glu, inputs, ways == "backward")
    for name, part in checked.items():
        assert torch.equal(quick[name], part), name
