"""The suite tests itself, the part for GPUs: clocks and results, with fakes: there is no device."""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from . import (
    clocks,
    machine,
    memory,
    peers,
    report,
    results,
    terminal,
    timing,
)
from .clocks import DeviceClock, HostClock, clock_of
from .impls import IMPLS
from .problems import FORWARD
from .timing import Effort

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
