"""The table of backends: choice by name, by the environment, exact reasons, no silent fallback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import mmfast
from mmfast import _gpus, _library, _order, dispatch
from mmfast._torch_ops import OPS, has_ops, torch_ops

Q = torch.ones(1, 1, 2, 4)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_auto_takes_the_first_without_objection():
    row = dispatch.select("cross_attention", Q, Q)
    free = [o.backend for o in dispatch.explain("cross_attention") if o.reason is None]
    assert row.backend == free[0]


def test_the_reference_takes_everything():
    assert dispatch.explain("cross_attention")[-1] == ("cross_attention", "reference", None, None)


def test_every_row_is_a_known_backend():
    for rows in dispatch.TABLE.values():
        assert {row.backend for row in rows} <= set(dispatch.BACKENDS)
        assert rows[-1].backend == "reference"


def test_use_backend_nests_and_restores():
    assert dispatch.current_backend() == "auto"
    with mmfast.use_backend("reference"):
        assert dispatch.current_backend() == "reference"
        with mmfast.use_backend("auto"):
            assert dispatch.current_backend() == "auto"
        assert dispatch.current_backend() == "reference"
        with pytest.raises(KeyError), mmfast.use_backend("auto"):
            raise KeyError
        assert dispatch.current_backend() == "reference"
    assert dispatch.current_backend() == "auto"


def test_unknown_backend():
    message = (
        "use_backend: unknown backend 'gpu'; "
        "it must be one of 'auto', 'cpu', 'cuda', 'triton', 'reference'"
    )
    with pytest.raises(ValueError, match=message), mmfast.use_backend("gpu"):
        pass


def test_a_backend_by_name_is_used(backend, monkeypatch):
    called = []
    rows = dispatch.TABLE["cross_attention"]

    def spy(row):
        def launcher(*args, **kwargs):
            called.append(row.backend)
            return row.launcher(*args, **kwargs)

        return row._replace(launcher=launcher)

    monkeypatch.setitem(dispatch.TABLE, "cross_attention", tuple(map(spy, rows)))
    mmfast.cross_attention(Q, Q, Q)
    assert called == [backend]


def test_no_silent_fallback():
    """A backend asked for by name that cannot take the call: every backend's reason."""
    q = torch.zeros(1, 1, 2, 4, device="meta")
    with mmfast.use_backend("cpu"), pytest.raises(RuntimeError) as caught:
        mmfast.cross_attention(q, q, q)
    message = str(caught.value)
    assert message.startswith(
        "cross_attention: the backend 'cpu' was asked for by use_backend and cannot take this call"
    )
    assert "cpu: " in message
    assert "reference: can take this call" in message
    assert message.endswith("ask for 'auto' or for a backend that can")


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            (Q.to("meta"), Q),
            "the data is on meta, this backend takes CPU tensors",
        ),
        (
            (Q.to(torch.complex64), Q),
            "the data is torch.complex64, this backend takes float32, bfloat16, float16, float64",
        ),
        (
            (torch.zeros(1, 1, 1, 8193), Q),
            "D=8193, Dv=4: head widths go up to 8192 here",
        ),
        (
            (Q, Q, "forward-mode differentiation"),
            "forward-mode differentiation needs an op composed of torch functions",
        ),
        ((Q, Q), None),
    ],
)
def test_reasons_of_the_cpu_backend(call, reason):
    offers = {offer.backend: offer.reason for offer in dispatch.explain("cross_attention", *call)}
    del offers["cuda"], offers["triton"]
    assert offers == {"cpu": reason, "reference": None}


class OnCuda:
    """As much of a CUDA tensor as the dispatcher looks at."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda", 0)

    def __init__(self, width=64, dtype=torch.float16, length=16):
        self.shape, self.dtype = (1, 8, length, width), dtype

    def size(self, dim):
        return self.shape[dim]


def _forget_devices():
    for asked in (_gpus.capability, _gpus.unusable_gpu, dispatch._no_code_for):
        asked.cache_clear()


def _gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for name in ("_triton_kernels", "_triton_missing", "_cuda_kernels", "_cuda_missing"):
        monkeypatch.setattr(dispatch, name, None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _forget_devices()


@pytest.fixture
def hopper(monkeypatch):
    """An H100 as far as the table looks, with the CUDA kernels and Triton's."""
    _gpu(monkeypatch)
    monkeypatch.setattr(_library, "cuda_code", lambda: ("80,86,90,100f", "80,100"))
    monkeypatch.setattr(dispatch, "_cuda_kernels", {})
    monkeypatch.setattr(dispatch, "_triton_kernels", {})
    yield
    _forget_devices()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ((Q, Q), "the data is on cpu, this backend takes CUDA tensors"),
        (
            (OnCuda(dtype=torch.float64), OnCuda()),
            "the data is torch.float64, this backend takes float32, bfloat16, float16",
        ),
        (
            (OnCuda(), OnCuda(), "forward-mode differentiation"),
            "forward-mode differentiation needs an op composed of torch functions",
        ),
    ],
)
def test_reasons_of_the_triton_backend(call, reason, monkeypatch):
    _gpu(monkeypatch)
    offers = {offer.backend: offer.reason for offer in dispatch.explain("cross_attention", *call)}
    assert offers["triton"] == reason


def test_triton_is_missing_or_too_old(monkeypatch):
    _gpu(monkeypatch)

    def reason():
        dispatch._triton_missing = None
        return dispatch._triton_attention_why_not(OnCuda(), OnCuda())

    monkeypatch.setattr(_gpus.importlib.util, "find_spec", lambda name: None)
    assert reason() == "triton is not installed; pip install triton"
    monkeypatch.setattr(_gpus.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_gpus.importlib.metadata, "version", lambda name: "3.7.1+git")
    assert reason() == "triton 3.7.1+git is too old; pip install 'triton>=3.8'"


def test_an_old_gpu(monkeypatch):
    _gpu(monkeypatch, (7, 5))
    assert dispatch._triton_attention_why_not(OnCuda(), OnCuda()) == (
        "Tesla T4 has compute capability 7.5; this backend takes 8.0 (Ampere) and newer"
    )
    monkeypatch.setattr(dispatch, "_cuda_kernels", {})
    assert dispatch._cuda_why_not(OnCuda()) == dispatch._triton_why_not(OnCuda())
    _forget_devices()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "why_not", [dispatch._cuda_attention_why_not, dispatch._triton_attention_why_not]
)
def test_wide_heads_are_refused_on_gpus(why_not):
    assert why_not(OnCuda(), OnCuda(320)) == "D=64, Dv=320: head widths go up to 256 here"
    assert why_not(OnCuda(256), OnCuda(256)) is None


# --- CUDA C++ ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ((Q, Q), "the data is on cpu, this backend takes CUDA tensors"),
        (
            (OnCuda(dtype=torch.float64), OnCuda()),
            "the data is torch.float64, this backend takes float32, bfloat16, float16",
        ),
        (
            (OnCuda(), OnCuda(), "forward-mode differentiation"),
            "forward-mode differentiation needs an op composed of torch functions",
        ),
        ((OnCuda(), OnCuda()), None),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_reasons_of_the_cuda_backend(call, reason):
    offers = {offer.backend: offer.reason for offer in dispatch.explain("cross_attention", *call)}
    assert offers["cuda"] == reason


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", dispatch.GATES)
def test_every_gate_is_offered_on_cuda(op):
    offers = {offer.backend: offer for offer in dispatch.explain(op, OnCuda())}
    assert offers["cuda"].reason is None
    assert offers["cuda"].yields is None, "memory limits gates: CUDA C++ keeps them"
    assert "K=65" in dispatch.TABLE["fuse"][1].why_not(OnCuda(), None, 65)


@pytest.mark.usefixtures("compiled_library")
def test_a_library_without_cuda_kernels(monkeypatch):
    _gpu(monkeypatch)
    monkeypatch.setattr(dispatch, "has_ops", lambda op, namespace: False)
    assert dispatch._cuda_why_not(OnCuda()) == (
        f"the compiled library has no CUDA kernels; {_library.HOW_TO_GET_CUDA}"
    )
    monkeypatch.setattr(dispatch, "_cuda_missing", None)
    monkeypatch.setattr(dispatch, "has_ops", lambda op, namespace: True)
    monkeypatch.setattr(_library, "has_cuda_streams", lambda: False)
    assert dispatch._cuda_why_not(OnCuda()) == (
        "this torch is a build without CUDA; install one with it"
    )


@pytest.mark.usefixtures("hopper")
def test_a_rocm_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert dispatch._cuda_why_not(OnCuda()) == (
        "this torch is a ROCm build, the compiled CUDA kernels take NVIDIA GPUs"
    )


@pytest.mark.parametrize(
    ("codes", "ptx", "runs", "fails"),
    [
        (
            "80,86,89,90,100f,120f",
            "80,120",
            [(8, 0), (8, 7), (9, 0), (10, 3), (12, 1), (13, 0)],
            [],
        ),
        ("86", "", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a", "90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("100f", "", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("", "80", [(8, 0), (12, 0)], [(7, 5)]),
        ("", "", [], [(8, 0)]),
    ],
)
def test_which_gpus_the_code_runs_on(codes, ptx, runs, fails, monkeypatch):
    monkeypatch.setattr(_library, "cuda_code", lambda: (codes, ptx))
    for capability in runs:
        assert _library.no_code_for(capability) is None, capability
    for capability in fails:
        reason = _library.no_code_for(capability)
        assert reason is not None, capability
        assert f"this GPU is {capability[0]}.{capability[1]}; " in reason


def _has_cuda_kernels():
    dispatch.explain()  # loads the compiled library
    return all(has_ops(op, "mmfast_cuda") for op in OPS)


@pytest.mark.skipif(not _has_cuda_kernels(), reason="the compiled library has no CUDA kernels")
@pytest.mark.parametrize("op", OPS)
def test_the_cuda_ops_of_the_library(op):
    """Schemas of the other backends; a CPU tensor, brought there past torch's dispatcher, is
    refused before any pointer is read."""
    mine, theirs = torch_ops(op, "mmfast_cuda"), torch_ops(op)
    for one, other in zip(mine, theirs, strict=True):
        assert str(one._schema).partition("::")[2] == str(other._schema).partition("::")[2]
    x = torch.ones(2, 2, 3, 16)
    values = {"Tensor": x, "List[Tensor]": [x], "int": 0, "float": 0.5, "bool": False}
    given = [values.get(str(argument.type)) for argument in mine[0]._schema.arguments]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=f"mmfast::{op}: this implementation takes CUDA tensors"):
        mine[0].redispatch(keys, *given)


# --- CUDA C++ or Triton ------------------------------------------------------------------------

SMALL, LARGE = OnCuda(), OnCuda(length=8192)


@pytest.mark.usefixtures("hopper")
def test_large_problems_go_to_triton_where_its_instructions_are_faster(monkeypatch):
    assert dispatch.select("cross_attention", SMALL, SMALL).backend == "cuda"
    assert dispatch.select("cross_attention", LARGE, LARGE).backend == "triton"
    offers = {o.backend: o for o in dispatch.explain("cross_attention", LARGE, LARGE)}
    assert offers["cuda"].reason is None
    assert "compute capability 9" in offers["cuda"].yields
    assert "modelled" in offers["cuda"].yields
    with mmfast.use_backend("cuda"):
        assert dispatch.select("cross_attention", LARGE, LARGE).backend == "cuda"
    # Where Triton cannot take the call nothing yields.
    monkeypatch.setattr(dispatch, "_triton_kernels", None)
    monkeypatch.setattr(dispatch, "_triton_missing", "it is not installed")
    monkeypatch.setattr(dispatch, "_load_triton", lambda: "it is not installed")
    assert dispatch.select("cross_attention", LARGE, LARGE).backend == "cuda"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0)])
def test_the_same_instructions_never_yield(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_library, "cuda_code", lambda: ("80,86,89,120f", ""))
    _forget_devices()
    assert dispatch.select("cross_attention", LARGE, LARGE).backend == "cuda"


def test_the_size_rule():
    """The border is where what the tensor cores save is what the launch costs more."""
    tables = ((False, _order.RATES), (True, _order.RATES_FLOAT32))
    for float32, major, width, (cuda, triton) in (
        (float32, major, width, rate)
        for float32, table in tables
        for major, widths in table.items()
        for width, rate in widths.items()
    ):
        if cuda >= triton:
            assert _order.gives_way(major, 9, 99, 9999, 9999, width, width, float32) is None
            continue
        at_border = (_order.TRITON_LAUNCH - _order.CUDA_LAUNCH) * 1e12
        border = at_border / (1 / cuda - 1 / triton) / (4 * width)  # B * H * N * M
        for share, yields in ((0.9, False), (1.1, True)):
            told = _order.gives_way(major, 1, 1, 1, int(share * border), width, width, float32)
            assert (told is not None) is yields


@pytest.mark.usefixtures("compiled_library")
def test_the_size_rule_under_compilation(monkeypatch):
    """It costs no graph for each size, and nothing is asked of the driver while tracing."""
    rows = dispatch.TABLE["glu"]
    asked = []

    def yields(x, derivatives=None):
        B, N, C = x.shape
        major = _gpus.capability(x.device)[0]
        return _order.gives_way(major, B, 1, N, N, C, C, x.dtype == torch.float32)

    def capability(device):
        asked.append(device)
        return (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setitem(dispatch.TABLE, "glu", (rows[0]._replace(yields=yields), *rows[1:]))
    _forget_devices()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(mmfast.glu, fullgraph=True, dynamic=True, backend="eager")
    for length in (3, 5, 9):
        compiled(*[torch.ones(2, length, 8)] * 2)
    _forget_devices()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(asked) == 1


def test_the_size_rule_is_between_the_shapes_of_the_suite():
    """On an H100 text over patches stays with CUDA C++, long video goes to Triton."""
    for shape in ((8, 12, 40, 36, 64), (8, 12, 128, 197, 64), (8, 12, 32, 257, 64),
                  (16, 8, 64, 50, 64), (8, 12, 1, 577, 64)):  # fmt: skip
        B, H, N, M, D = shape
        assert _order.gives_way(9, B, H, N, M, D, D, float32=False) is None, shape
    assert _order.gives_way(9, 1, 12, 4096, 4096, 64, 64, float32=False) is not None


def test_triton_asked_for_by_name_on_the_cpu():
    with mmfast.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        mmfast.cross_attention(Q, Q, Q)
    assert "triton: the data is on cpu, this backend takes CUDA tensors" in str(caught.value)


def test_a_backend_that_an_op_does_not_have(monkeypatch):
    rows = [row for row in dispatch.TABLE["cross_attention"] if row.backend != "triton"]
    monkeypatch.setitem(dispatch.TABLE, "cross_attention", tuple(rows))
    with mmfast.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        mmfast.cross_attention(Q, Q, Q)
    assert "triton: there is none for this op" in str(caught.value)


def test_wide_heads_go_to_the_reference():
    q = torch.randn(1, 1, 2, 600)
    torch.testing.assert_close(
        mmfast.cross_attention(q, q, q), mmfast.reference.cross_attention(q, q, q)
    )


def test_environment_chooses():
    code = "from mmfast import dispatch; print(dispatch.current_backend())"
    assert _python(code, MMFAST_BACKEND="reference").stdout.strip() == "reference"
    assert _python(code, MMFAST_BACKEND="").stdout.strip() == "auto"


def test_wrong_name_in_the_environment():
    """Importing works; the first call says what is wrong."""
    code = "import torch, mmfast; q = torch.ones(1, 1, 1, 1); mmfast.cross_attention(q, q, q)"
    process = _python(code, MMFAST_BACKEND="cuda12")
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1] == (
        "ValueError: MMFAST_BACKEND: unknown backend 'cuda12'; "
        "it must be one of 'auto', 'cpu', 'cuda', 'triton', 'reference'"
    )


def test_without_the_library(monkeypatch):
    """No compiled library: auto goes on with the reference, by name says why."""
    monkeypatch.setattr(dispatch, "_kernels", None)
    monkeypatch.setattr(dispatch, "_missing", "it was eaten by a dog")
    offers = dispatch.explain("cross_attention")
    reasons = {offer.backend: offer.reason for offer in offers}
    assert reasons["cpu"] == "it was eaten by a dog"
    assert reasons["reference"] is None
    monkeypatch.setattr(dispatch, "_cuda_kernels", None)
    monkeypatch.setattr(dispatch, "_cuda_missing", None)
    assert dispatch._cuda_why_not(OnCuda()) == "it was eaten by a dog"
    mmfast.cross_attention(Q, Q, Q)
    with (
        mmfast.use_backend("cpu"),
        pytest.raises(RuntimeError, match="cpu: it was eaten by a dog"),
    ):
        mmfast.cross_attention(Q, Q, Q)


def test_import_loads_nothing():
    code = (
        "import sys, mmfast, torch; "
        "assert 'mmfast.nn' not in sys.modules, 'nn'; "
        "assert 'triton' not in sys.modules, 'triton'; "
        "from mmfast import dispatch; "
        "assert dispatch._kernels is None and dispatch._missing is None; "
        "assert not hasattr(torch.ops.mmfast, 'cross_attention_fwd')"
    )
    process = _python(code)
    assert process.returncode == 0, process.stderr
