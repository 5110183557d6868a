"""The suite tests itself: peers that not every machine has, with stand-ins for what is not here."""

from __future__ import annotations

import sys
import time
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.testing import gate_eager
from mmfast.testing.cases import Case

from . import (
    liger,
    measuring,
    memory,
    peers,
    plots,
    report,
    results,
    timing,
)
from .clocks import DeviceClock
from .gates import Gate, GateProblem
from .impls import IMPLS, Problem
from .memory import ResidentPeak
from .problems import DIRECTIONS, FORWARD, FORWARD_BACKWARD
from .profiles import GATES, PROFILES
from .table import Table
from .workloads import Attention, WrongResultError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RAGGED = Case("small", 2, 2, 9, 24, 16, layout="bnhd", kv_lens=(24, 11))
DENSE = Case("dense", 2, 2, 9, 24, 16, layout="bnhd")
BOTH = pytest.mark.parametrize("case", [RAGGED, DENSE], ids=lambda case: case.name)


# --- peers ----------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On `[..., N, H, D]`."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, rows: Any, keys: Any) -> Tensor:
    rows, keys = [x.tolist() if isinstance(x, Tensor) else x for x in (rows, keys)]
    parts = [
        _attend(q[rows[i] : rows[i + 1]], k[keys[i] : keys[i + 1]], v[keys[i] : keys[i + 1]])
        for i in range(len(rows) - 1)
    ]
    return torch.cat(parts)


def _offsets(lens: list[int]) -> list[int]:
    return [sum(lens[:i]) for i in range(len(lens) + 1)]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """Stand-ins with the signatures that are used."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):  # type: ignore[no-untyped-def]
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert [max_q, max_k] == [int(x.diff().max()) for x in (cu_seq_q, cu_seq_k)]
        return _attend_packed(q, k, v, cu_seq_q, cu_seq_k)

    def flash_varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):  # type: ignore[no-untyped-def]
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    def efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
        if attn_bias is None:
            return _attend(q, k, v)
        rows, keys = map(_offsets, attn_bias)
        return _attend_packed(q[0], k[0], v[0], rows, keys)[None]

    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(q_seqlen: list[int], kv_seqlen: list[int]) -> Any:
            return q_seqlen, kv_seqlen

    bias = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    ops = {
        "memory_efficient_attention": efficient,
        "fmha": types.SimpleNamespace(attn_bias=bias),
    }
    return {
        "varlen": module("torch.nn.attention.varlen", varlen_attn=varlen_attn),
        "flash_attn": module(
            "flash_attn", flash_attn_func=_attend, flash_attn_varlen_func=flash_varlen
        ),
        "flash_attn_3": module(
            "flash_attn_interface",
            flash_attn_func=lambda *qkv: (_attend(*qkv), None),
            flash_attn_varlen_func=flash_varlen,
        ),
        "xformers": module("xformers", ops=module("xformers.ops", **ops)),
    }


@BOTH
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "xformers", "varlen"])
@pytest.mark.usefixtures("packages")
def test_packages_get_their_layout_and_are_judged(name: str, direction: str, case: Case) -> None:
    workload = Attention(Problem(case, "bfloat16", direction), CPU)
    if name == "varlen" and case is DENSE:
        with pytest.raises(peers.CannotTakeError, match="ragged"):
            workload.run(name)
        return
    run = workload.run(name)
    workload.check(name, run)
    first, again = run(), run()
    assert len(first) == (1 if direction == FORWARD else 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_a_wrong_package_is_refused(
    name: str, packages: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        return q * 0.5

    owner = packages[name] if name == "flash_attn" else packages[name].ops
    entry = "flash_attn_varlen_func" if name == "flash_attn" else "memory_efficient_attention"
    monkeypatch.setattr(owner, entry, wrong)
    workload = Attention(Problem(RAGGED, "bfloat16", FORWARD), CPU)
    with pytest.raises(WrongResultError, match=name):
        workload.check(name, workload.run(name))


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "varlen"])
@pytest.mark.usefixtures("packages")
def test_who_takes_half_precision_alone_says_so(name: str) -> None:
    with pytest.raises(peers.CannotTakeError, match="float16 and bfloat16"):
        Attention(Problem(RAGGED, "float32", FORWARD), CPU).run(name)


@BOTH
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_backend_of_sdpa_by_name(direction: str, case: Case) -> None:
    workload = Attention(Problem(case, "float32", direction), CPU)
    workload.check("sdpa_math", workload.run("sdpa_math"))
    if case is RAGGED:
        with pytest.raises(peers.CannotTakeError, match="no mask"):
            workload.run("sdpa_flash")
    else:
        workload.check("sdpa_flash", workload.run("sdpa_flash"))


def test_flex_has_no_backward_on_the_cpu() -> None:
    with pytest.raises(peers.CannotTakeError, match="backward"):
        Attention(Problem(RAGGED, "float32", FORWARD_BACKWARD), CPU).run("flex")


@pytest.mark.slow
@BOTH
def test_flex_on_the_cpu_beside_compile(case: Case) -> None:
    workload = Attention(Problem(case, "float32", FORWARD), CPU)
    runs = {impl: workload.run(impl) for impl in ("compile", "flex")}
    for impl, run in runs.items():
        workload.check(impl, run)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    runs["compile"]()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted, "compiled again"


def _table(profile: str = "smoke", **options: Any) -> Table:
    return Table(PROFILES[profile], CPU, ResidentPeak(enabled=False), lambda: 1.0, **options)


def test_a_peer_that_fails_is_left_out_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(name: str, *args: Any) -> Any:
        if name == "xformers":
            raise peers.CannotTakeError("not today")
        warnings.warn("the head is too wide", stacklevel=2)
        raise RuntimeError("no kernel\nmore of it")

    monkeypatch.setattr(peers, "prepare", prepare)
    table = _table()
    workload = Attention(Problem(DENSE, "float32", FORWARD), CPU)
    table.measure(workload, impls=("eager", "sdpa_cudnn", "xformers", "mmfast"), memory="")
    assert {row["impl"] for row in table.rows} == {"eager", "mmfast"}
    whys = {entry["what"].rpartition(" ")[2]: entry["why"] for entry in table.left_out}
    assert whys["sdpa_cudnn"] == "RuntimeError: no kernel; the head is too wide"
    assert whys["xformers"] == "not today"
    assert table.refused == []


@pytest.mark.usefixtures("packages")
def test_peers_are_timed_and_may_be_the_best() -> None:
    table = _table()
    workload = Attention(Problem(RAGGED, "bfloat16", FORWARD_BACKWARD), CPU)
    table.measure(workload, impls=("eager", "flash_attn", "xformers", "mmfast"), memory="asked")
    assert {row["impl"] for row in table.rows} == {"eager", "flash_attn", "xformers", "mmfast"}
    assert {row["best_peer"] for row in table.rows} <= {"eager", "flash_attn", "xformers"}
    assert all(row["peak_extra_bytes"] > 0 for row in table.rows)


def test_flex_has_time_of_its_own() -> None:
    table = _table(compile_s=0.0)
    table.measure(
        Attention(Problem(DENSE, "float32", FORWARD), CPU), impls=("flex", "compile", "mmfast")
    )
    assert [entry["what"].rpartition(" ")[2] for entry in table.left_out] == ["flex", "compile"]
    assert all("no time" in entry["why"] for entry in table.left_out)


def test_which_peers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.offered(CPU) == (("flex",), {})
    monkeypatch.setattr(peers, "_is_there", lambda module: module != "xformers")
    names, absent = peers.offered(CUDA)
    assert set(names) == set(peers.NAMES) - {"xformers"}
    assert list(absent) == ["xformers"] and "pip install xformers" in absent["xformers"]
    assert set(peers.NAMES) | {"eager", "sdpa", "compile", "mmfast", "liger"} == set(IMPLS)


@pytest.mark.parametrize(
    ("device", "profile", "expected"),
    [(CPU, "quick", ()), (CPU, "full", ("flex",)), (CUDA, "quick", tuple(peers.NAMES))],
)
def test_where_peers_are_measured(
    device: torch.device, profile: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_is_there", lambda module: True)
    monkeypatch.setattr(liger, "offered", lambda on: None if on.type == "cuda" else False)
    made = measuring.Measuring(
        PROFILES[profile], device, ["float32"], measuring.PARTS, lambda: 1.0, lambda *_: None
    )
    made._find_peers()
    assert made._peers == expected
    said = [entry["what"] for entry in made.left_out]
    assert said == (["gates, all cases: liger"] if device is CUDA else [])


# --- Liger ----------------------------------------------------------------------------------


class WritesOverItsInputs(torch.autograd.Function):
    """As Liger's backward does."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.a, ctx.b = a, b
        return gate_eager.glu(a, b, activation="silu")

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            a, b = (x.detach().requires_grad_() for x in (ctx.a, ctx.b))
            out = gate_eager.glu(a, b, activation="silu")
        da, db = torch.autograd.grad(out, (a, b), dout)
        ctx.a.data.copy_(da)
        ctx.b.data.copy_(db)
        return da, db


def test_liger_may_write_over_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = types.ModuleType("functional")
    functional.liger_swiglu = WritesOverItsInputs.apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("transformers"))
    case = GATES["swiglu_short"]
    assert liger.takes(case) and not liger.takes(GATES["geglu_packed_short"])
    workload = Gate(GateProblem(case, "float32", FORWARD_BACKWARD), CPU)
    before = {name: x.detach().clone() for name, x in workload._leaves.items()}
    run = workload.run("liger")
    for _ in range(3):
        workload.check("liger", run)
        run()
    assert all(torch.equal(x, before[name]) for name, x in workload._leaves.items())


@pytest.mark.usefixtures("packages")
def test_a_whole_run_with_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on the CPU by a device's clock, with stand-ins: rows, reasons, report, plots."""

    class Event:
        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.at - self.at)

    clock = DeviceClock(Event, lambda: None, lambda seconds: None, lambda: None)
    smoke = PROFILES["smoke"]
    monkeypatch.setattr(timing, "clock_of", lambda on, by_the_host: clock)
    made = measuring.Measuring(
        smoke, CPU, ["float32", "bfloat16"], ["attention"], lambda: 1.0, lambda *_: None
    )
    monkeypatch.setattr(made, "_find_peers", lambda: setattr(made, "_peers", peers.NAMES))
    monkeypatch.setattr(memory, "_can_reset_peak", lambda: False)
    made.run()
    assert made.refused == []
    timed = {(row["impl"], row["dtype"]) for row in made.rows}
    for name in ("flash_attn", "flash_attn_3", "varlen"):
        assert (name, "bfloat16") in timed and (name, "float32") not in timed
    for name in ("sdpa_math", "sdpa_flash", "xformers"):
        assert {(name, "float32"), (name, "bfloat16")} <= timed
    ragged = {row["impl"] for row in made.rows if row["ragged"]}
    assert "varlen" in ragged and "sdpa_flash" not in ragged
    whys = {entry["what"].rpartition(" ")[2]: entry["why"] for entry in made.left_out}
    assert {"sdpa_cudnn", "sdpa_flash", "flash_attn", "flex"} <= set(whys)
    facts = {**dict.fromkeys(results.MACHINE, "x"), "device": "cuda", "started": "now"}
    written = {"machine": facts, "rows": made.rows, "left_out": made.left_out, "profile": "smoke"}
    written["summary"] = results.summarise(made.rows)
    results.check(written)
    assert "takes no mask" in report.render(written, plots.draw(written, None))
