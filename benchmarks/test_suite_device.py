"""The suite tests itself, the part for GPUs: clocks and peers, with fakes: there is no device."""

from __future__ import annotations

import io
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from mmfast.testing import gate_eager
from mmfast.testing.cases import Case

from . import clocks, liger, machine, measuring, memory, peers, report, results, terminal, timing
from .clocks import DeviceClock, HostClock, clock_of
from .gates import Gate, GateProblem
from .impls import IMPLS, Problem
from .memory import ResidentPeak
from .problems import DIRECTIONS, FORWARD, FORWARD_BACKWARD
from .profiles import GATES, PROFILES
from .table import Table
from .timing import Effort
from .workloads import Attention, WrongResultError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RAGGED = Case("small", 2, 2, 9, 24, 16, layout="bnhd", kv_lens=(24, 11))
DENSE = Case("dense", 2, 2, 9, 24, 16, layout="bnhd")
BOTH = pytest.mark.parametrize("case", [RAGGED, DENSE], ids=lambda case: case.name)


# --- clocks ---------------------------------------------------------------------------------


class FakeDevice:
    """A stream on which work takes its milliseconds; `log` is what was queued, in order."""

    def __init__(self) -> None:
        self.now, self.log, self.led = 0.0, [], []

    def work(self, name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += milliseconds

        return run

    def busy(self, seconds: float) -> None:
        self.led.append(seconds)
        self.work("busy", 1e3 * seconds)()

    def event(self) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                device.log.append("event")
                self.at = device.now

            def elapsed_time(self, end: Any) -> float:
                assert device.log[-1] == "finish", "read before the device was waited for"
                return end.at - self.at

        return Event()

    def clock(self) -> DeviceClock:
        flush, finish = self.work("flush", 3.0), self.work("finish", 0.0)
        return DeviceClock(self.event, flush, self.busy, finish)


def test_a_device_sample_is_the_call_alone() -> None:
    device = FakeDevice()
    clock, run = device.clock(), device.work("run", 2.0)
    assert clock.sample(run, 2) == pytest.approx(2e-3)
    call = ["flush", "event", "run", "event"]
    assert device.log == ["finish", *call, *call, "finish"]
    device.log.clear()
    assert clock.sample(run, 1) == pytest.approx(2e-3)
    assert device.log == ["finish", "flush", "busy", "event", "run", "event", "finish"]
    assert 0.0 < device.led[0] < 1e-3  # as long as it took to queue the call


def test_the_wait_for_the_host_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 10.0, 10.002, 20.0, 29.0, 30.0, 39.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(ticks))
    device = FakeDevice()
    clock, run = device.clock(), device.work("run", 2.0)
    for _ in range(4):
        clock.sample(run, 1)
    assert device.led == pytest.approx([clocks.MOST_LEAD_S, 3e-3, 3e-3])


def test_how_many_calls_make_a_sample() -> None:
    clock = FakeDevice().clock()
    assert clock.calls(1e-6, 2e-3) == clocks.MOST_CALLS
    assert clock.calls(1.0, 2e-3) == 1
    assert HostClock().calls(0.5, 2.0) == 4


def test_the_host_s_clock_waits_once_a_sample() -> None:
    device = FakeDevice()
    HostClock(device.work("finish", 0.0)).sample(device.work("run", 1.0), 3)
    assert device.log == ["run", "run", "run", "finish"]


def test_device_rounds_are_interleaved() -> None:
    device = FakeDevice()
    runs = {"a": device.work("a", 1.0), "b": device.work("b", 4.0)}
    taken = timing.interleave(runs, Effort(0.0, 3, 3, sample_s=0.0), CPU, device.clock())
    assert taken["a"] == pytest.approx([1e-3] * 3)
    assert taken["b"] == pytest.approx([4e-3] * 3)
    assert [name for name in device.log if name in runs][-6:] == list("abbaab")


def test_which_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(clock_of(CPU), HostClock)
    assert isinstance(clock_of(CPU, by_the_host=True), HostClock)
    device, slept = FakeDevice(), []
    buffer = torch.ones(4)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: device.event())
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", device.work("finish", 0.0))
    monkeypatch.setattr(clocks, "_flush_buffer", lambda on: buffer)
    monkeypatch.setattr(clocks, "_cycles_per_second", lambda on: 2e9)
    clock = clock_of(CUDA)
    assert isinstance(clock, DeviceClock)
    for _ in range(2):
        assert clock.sample(device.work("run", 5.0), 1) == pytest.approx(5e-3)
    run = device.work("run", 5.0)
    clock.sample(run, 1)
    clock.sample(run, 1)
    assert not buffer.any()
    assert len(slept) == 1 and slept[0] < 5e-3 * 2e9
    assert isinstance(clock_of(CUDA, by_the_host=True), HostClock)


def test_a_device_s_peaks_are_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(clocks, "clock_of", lambda on: device.clock())
    assert machine._least(device.work("run", 40.0), CUDA) == pytest.approx(40e-3)
    assert device.log.count("flush") == 5


@pytest.mark.parametrize(
    ("hip", "cache", "expected"), [(None, 40, 256), (None, 100, 400), ("6.4", 4, 512)]
)
def test_what_is_flushed_is_larger_than_the_cache(
    hip: str | None, cache: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(machine, "last_level_cache", lambda on: cache << 20)
    assert clocks.flush_bytes(CUDA) == expected << 20


def test_memory_is_the_allocator_s_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 100, "peak": 900}  # 900: of something before

    def run() -> None:
        held["peak"] = max(held["peak"], held["now"] + 50)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"])
    )
    assert memory.step_peak(run, CUDA) == 50


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
        assert (max_q, max_k) == (9, 24)
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


# --- what the results say -------------------------------------------------------------------


def _results(device: str) -> dict[str, Any]:
    group = {"op": "cross_attention", "case": "x", "ragged": False, "dtype": "float32"}
    names = [*peers.NAMES, "eager", "sdpa", "compile", "mmfast"]
    taken = {impl: [1e-3 * (1 + i)] for i, impl in enumerate(names)}
    rows = results.group_rows({**group, "direction": FORWARD}, taken, {}, 5e-4)
    facts = dict.fromkeys(results.MACHINE, "x")
    facts |= {"processor": "NVIDIA Thing", "device": device, "started": "now", "backend": "x"}
    return {
        "machine": facts,
        "rows": rows,
        "summary": results.summarise(rows),
        "left_out": [],
        "profile": "quick",
        "seconds": 1.0,
    }


def test_tables_of_a_gpu_name_it() -> None:
    for device in ("cuda", "cpu"):
        made = _results(device)
        results.check(made)
        console = Console(width=120, record=True, file=io.StringIO())
        terminal.show(console, made)
        page = report.render(made, {})
        named = device == "cuda"
        assert ("cross_attention on NVIDIA Thing" in page) == named
        assert ("two events" in page) == named
        assert ("on NVIDIA Thing" in console.export_text()) == named
        for name in IMPLS:
            assert (f"<th>{name} ms</th>" in page) == (name != "liger")


def test_a_terminal_has_room_for_the_best_of_many() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.show(console, _results("cuda"))
    text = console.export_text()
    assert "1.00 sdpa_flash" in text and "flash_attn_3" not in text


def test_a_gpu_s_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = types.SimpleNamespace(
        multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
    )
    machine.last_level_cache.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda on: "NVIDIA Thing")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda on: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    described = machine.describe(CUDA)
    assert described["processor"] == "NVIDIA Thing" and described["instruction_set"] == "sm_90"
    assert described["last_level_cache_mib"] == 50.0 and described["device_memory_gib"] == 80.0
    assert described["packages"]["flash-attn"] == "not installed"
    machine.last_level_cache.cache_clear()
