"""The table of backends: choice by name, by the environment, exact reasons, no silent fallback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import mmfast
from mmfast import dispatch

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
    assert dispatch.explain("cross_attention")[-1] == ("cross_attention", "reference", None)


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
        "use_backend: unknown backend 'gpu'; it must be one of 'auto', 'cpu', 'triton', 'reference'"
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
            (torch.zeros(1, 1, 1, 513), Q),
            "D=513, Dv=4: head widths go up to 512 here",
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
    del offers["triton"]
    assert offers == {"cpu": reason, "reference": None}


class OnCuda:
    """As much of a CUDA tensor as the dispatcher looks at."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda", 0)

    def __init__(self, width=64, dtype=torch.float16):
        self.width, self.dtype = width, dtype

    def size(self, dim):
        return self.width


def _gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(dispatch, "_triton_kernels", None)
    monkeypatch.setattr(dispatch, "_triton_missing", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._unusable_gpu.cache_clear()


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

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert reason() == "triton is not installed; pip install triton"
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: "3.7.1+git")
    assert reason() == "triton 3.7.1+git is too old; pip install 'triton>=3.8'"


def test_an_old_gpu(monkeypatch):
    _gpu(monkeypatch, (7, 5))
    assert dispatch._triton_attention_why_not(OnCuda(), OnCuda()) == (
        "Tesla T4 has compute capability 7.5; this backend takes 8.0 (Ampere) and newer"
    )
    dispatch._unusable_gpu.cache_clear()


def test_wide_heads_are_refused_by_triton(monkeypatch):
    _gpu(monkeypatch)
    monkeypatch.setattr(dispatch, "_triton_kernels", {})
    assert dispatch._triton_attention_why_not(OnCuda(), OnCuda(320)) == (
        "D=64, Dv=320: head widths go up to 256 here"
    )
    assert dispatch._triton_attention_why_not(OnCuda(256), OnCuda(256)) is None
    dispatch._unusable_gpu.cache_clear()


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
        "it must be one of 'auto', 'cpu', 'triton', 'reference'"
    )


def test_without_the_library(monkeypatch):
    """No compiled library: auto goes on with the reference, by name says why."""
    monkeypatch.setattr(dispatch, "_kernels", None)
    monkeypatch.setattr(dispatch, "_missing", "it was eaten by a dog")
    offers = dispatch.explain("cross_attention")
    reasons = {offer.backend: offer.reason for offer in offers if offer.backend != "triton"}
    assert reasons == {"cpu": "it was eaten by a dog", "reference": None}
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
