"""results.json: `{"machine": {...}, "rows": [...], ...}`, its schema, and how it is written.

A row is one implementation of one problem. Times are milliseconds per call; ratios are above 1
where this implementation is the faster one; `best_peer` is the fastest other implementation that
was measured, so it is never mmfast. `pct_of_clone` is what an op that is bound by memory reaches of
the bandwidth that `clone()` had in the same rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .files import write_atomically
from .gates import OPS as GATE_OPS
from .impls import IMPLS
from .problems import DIRECTIONS
from .stats import geometric_mean, quantiles

ROW: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "case": (str,),
    "ragged": (bool,),
    "dtype": (str,),
    "direction": (str,),
    "impl": (str,),
    "p20_ms": (float,),
    "p50_ms": (float,),
    "p80_ms": (float,),
    "ratio_vs_eager": (float, type(None)),
    "best_peer": (str, type(None)),
    "ratio_vs_best_peer": (float, type(None)),
    "peak_extra_bytes": (int, type(None)),
    "pct_of_peak": (float, type(None)),
    "pct_of_clone": (float, type(None)),
    "beyond_cache": (bool, type(None)),
}
MACHINE = (
    "processor", "instruction_set", "threads", "torch", "mmfast", "commit", "device",
    "gemm_gflops", "clone_gb_per_s", "last_level_cache_mib",
)  # fmt: skip
GROUP = ("op", "case", "ragged", "dtype", "direction")
APART = ("tiny", "longest")
"""Cases that measure the cost of a call and the memory of a long one: in no geometric mean."""
ALL_GATES = "gates"
"""In the summary: all gating ops together."""


class Copied(NamedTuple):
    """How long `clone()` takes for as many bytes as a workload must move, and whether these are
    beyond the last-level cache."""

    seconds: float
    beyond_cache: bool


def group_rows(
    group: Mapping[str, Any],
    taken: Mapping[str, Sequence[float]],
    peak_bytes: Mapping[str, int | None],
    least_s: float | None,
    copied: Copied | None = None,
) -> list[dict[str, Any]]:
    """The rows of one group of implementations timed together.

    `group`: the values of GROUP. `taken`: seconds per call, by implementation. `least_s`: the least
    time that the machine's own peaks allow, or None. `copied`: for an op that is bound by memory.
    """
    spread = {impl: quantiles([1e3 * s for s in sample]) for impl, sample in taken.items()}
    peers = {impl: q.p50 for impl, q in spread.items() if impl != "mmfast"}
    best = min(peers, key=lambda impl: peers[impl]) if peers else None
    rows = []
    for impl, q in spread.items():
        rows.append(
            {
                **{key: group[key] for key in GROUP},
                "impl": impl,
                "p20_ms": q.p20,
                "p50_ms": q.p50,
                "p80_ms": q.p80,
                "ratio_vs_eager": peers["eager"] / q.p50 if "eager" in peers else None,
                "best_peer": best,
                "ratio_vs_best_peer": peers[best] / q.p50 if best else None,
                "peak_extra_bytes": peak_bytes.get(impl),
                "pct_of_peak": None if least_s is None else 1e5 * least_s / q.p50,
                "pct_of_clone": None if copied is None else 1e5 * copied.seconds / q.p50,
                "beyond_cache": None if copied is None else copied.beyond_cache,
            }
        )
    return rows


def check(results: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the place, when this is not what results.json promises."""
    missing = [key for key in MACHINE if key not in results.get("machine", {})]
    if missing:
        raise ValueError(f"results: machine lacks {', '.join(missing)}")
    for index, row in enumerate(results["rows"]):
        if set(row) != set(ROW):
            odd = sorted(set(row) ^ set(ROW))
            raise ValueError(f"results: row {index} has or lacks {', '.join(odd)}")
        for key, kinds in ROW.items():
            value = row[key]
            if type(value) not in kinds:
                raise ValueError(f"results: row {index}: {key} is {value!r}, expected {kinds}")
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"results: row {index}: {key} is {value!r}")
        if row["impl"] not in IMPLS or row["direction"] not in DIRECTIONS:
            raise ValueError(f"results: row {index}: {row['impl']}, {row['direction']} is unknown")
        if not row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]:
            raise ValueError(f"results: row {index}: quantiles are not in order")


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of mmfast's rows, per op, dtype, raggedness and direction, and of all gates together: what
    `aggregate` says."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in _compared(rows):
        key = (row["dtype"], row["ragged"], row["direction"])
        groups.setdefault((row["op"], *key), []).append(row)
    for row in _compared(rows):  # after the ops
        if row["op"] in GATE_OPS:
            key = (row["dtype"], row["ragged"], row["direction"])
            groups.setdefault((ALL_GATES, *key), []).append(row)
    return [
        {**dict(zip(("op", "dtype", "ragged", "direction"), key)), **aggregate(members, rows)}
        for key, members in groups.items()
    ]


def by_kind(rows: Sequence[Mapping[str, Any]], **same: Any) -> dict[str, dict[str, Any]]:
    """What `aggregate` says of each kind of gate ("swiglu"), over its shapes, among mmfast's rows
    with these values."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in _compared(rows):
        if row["op"] in GATE_OPS and all(row[key] == value for key, value in same.items()):
            kinds.setdefault(row["case"].rpartition("_")[0], []).append(row)
    return {kind: aggregate(members, rows) for kind, members in kinds.items()}


def _compared(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [
        row
        for row in rows
        if row["impl"] == "mmfast" and row["case"] not in APART and row["best_peer"]
    ]


def aggregate(
    members: Sequence[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Of some of mmfast's rows: the geometric means of the ratios to the best peer, to eager and,
    over the cases that have it, to torch.compile; the worst case; and of the cases beyond the
    last-level cache the mean and the least percentage of clone()'s bandwidth."""
    compiled = {_key(row): row["p50_ms"] for row in rows if row["impl"] == "compile"}
    versus_compile = [
        compiled[_key(row)] / row["p50_ms"] for row in members if _key(row) in compiled
    ]
    worst = min(members, key=lambda row: row["ratio_vs_best_peer"])
    eager = [row["ratio_vs_eager"] for row in members if row["ratio_vs_eager"] is not None]
    large = [row["pct_of_clone"] for row in members if row["beyond_cache"]]
    return {
        "cases": len(members),
        "mean_vs_best_peer": geometric_mean(row["ratio_vs_best_peer"] for row in members),
        "mean_vs_eager": geometric_mean(eager),
        "compiled_cases": len(versus_compile),
        "mean_vs_compile": geometric_mean(versus_compile),
        "worst_case": worst["case"],
        "worst_vs_best_peer": worst["ratio_vs_best_peer"],
        "mean_pct_of_clone": geometric_mean(large),
        "worst_pct_of_clone": min(large, default=None),
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in GROUP)


def find(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    """The first row with these values, or None."""
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Check, then write. NaN and infinity are refused: they are not JSON."""
    check(results)
    write_atomically(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
