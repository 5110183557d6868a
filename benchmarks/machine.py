"""What is measured on: processor, versions, commit, and the machine's own measured peaks."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mmfast
from mmfast import _library

ROOT = Path(__file__).resolve().parent.parent


def device() -> torch.device:
    """The CUDA device where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bf16_is_fast(on: torch.device) -> bool:
    """Has this processor instructions for bfloat16 products (AVX512_BF16, AMX, tensor cores)?"""
    if on.type == "cuda":
        return torch.cuda.get_device_capability(on) >= (8, 0)
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def describe(on: torch.device) -> dict[str, Any]:
    """The `machine` part of results.json, without the measured peaks."""
    status = _library.status()
    device = {} if on.type != "cuda" else _device_facts(on)
    return {
        "processor": torch.cuda.get_device_name(on) if on.type == "cuda" else _processor(),
        "instruction_set": _instruction_set(on),
        "device": on.type,
        "cores": _cores(),
        "last_level_cache_mib": round(last_level_cache(on) / 2**20, 1),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmfast": mmfast.__version__,
        "commit": commit(),
        "backend": "compiled library" if status.loaded else f"reference only: {status.reason}",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **device,
    }


_BESIDE = ("triton", "flash-attn", "xformers", "liger-kernel")


def _device_facts(on: torch.device) -> dict[str, Any]:
    """Of a GPU and what it is compared with there."""
    properties = torch.cuda.get_device_properties(on)
    versions = {}
    for package in _BESIDE:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "host": _processor(),
        "devices": torch.cuda.device_count(),
        "multiprocessors": properties.multi_processor_count,
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "runtime": f"HIP {torch.version.hip}"
        if torch.version.hip
        else f"CUDA {torch.version.cuda}",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "packages": versions,
    }


def _instruction_set(on: torch.device) -> str:
    if on.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(on).gcnArchName
        return "sm_{}{}".format(*torch.cuda.get_device_capability(on))
    return _library.isa_current() or torch.backends.cpu.get_cpu_capability()


def commit() -> str:
    """The checkout's commit, with "+changes" when tracked files differ; "unknown" outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages / 2**30, 1)


@lru_cache(maxsize=2)
def last_level_cache(on: torch.device) -> int:
    """Bytes; where the system does not say, 32 MiB, which the CPU kernels assume as well."""
    if on.type == "cuda":
        return torch.cuda.get_device_properties(on).L2_cache_size
    sizes = [32 << 20]
    for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(level.read_text().strip().removesuffix("K")) << 10)
    return max(sizes[1:] or sizes)


@lru_cache(maxsize=8)
def gemm_peak(dtype: torch.dtype, on: torch.device) -> float:
    """FLOP/s of the best square `torch.mm` of this dtype: the ceiling that `pct_of_peak` uses."""
    best = 0.0
    for side in (1024, 1536) if on.type == "cpu" else (4096, 8192):
        a = torch.randn(side, side, device=on).to(dtype)
        out = torch.empty_like(a)
        best = max(best, 2.0 * side**3 / _least(lambda a=a, out=out: torch.mm(a, a, out=out), on))
    return best


def bandwidth(size: int, on: torch.device) -> float:
    """Bytes/s moved (read + written) for a tensor of about `size` bytes, in or out of cache alike:
    the better of `clone()`, which also pays for fresh pages, and `copy_()` into existing memory."""
    return _bandwidth(1 << max(12, math.ceil(math.log2(max(size, 1)))), on)["best"]


def clone_bandwidth(on: torch.device, size: int = 1 << 28) -> float:
    """Bytes/s of `clone()` beyond the last-level cache."""
    return _bandwidth(size, on)["clone"]


@lru_cache(maxsize=64)
def _bandwidth(size: int, on: torch.device) -> dict[str, float]:
    x = torch.ones(max(1, size // 8), device=on)  # half of the bytes are read, half are written
    y = torch.empty_like(x)
    moved = 2.0 * x.numel() * x.element_size()
    clone, copy = moved / _least(x.clone, on), moved / _least(lambda: y.copy_(x), on)
    return {"clone": clone, "best": max(clone, copy)}


def synchronised(run: Callable[[], object], on: torch.device) -> Callable[[], object]:
    """`run` for a clock that does not know of CUDA: it returns when the device has finished."""
    if on.type != "cuda":
        return run

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


def _least(run: Callable[[], object], on: torch.device, seconds: float = 0.15) -> float:
    """The least time of one call among those that fit into `seconds` (at least 3), by the clock
    that the suite reads: on a device with the cache flushed."""
    from . import clocks  # which needs this module

    clock = clocks.clock_of(on)
    clock.sample(run, 1)
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < 1000):
        taken.append(clock.sample(run, 1))
    return min(taken)
