"""What the terminal shows: a progress bar while measuring, tables at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import drop_in
from .gates import OPS as GATE_OPS
from .impls import PEERS
from .results import ALL_GATES, GROUP, by_kind, find
from .stacks import ALL_STACKS
from .stacks import OPS as STACK_OPS
from .stats import geometric_mean

LONG_NAMES = {"forward": "forward", "forward_backward": "forward + backward"}
_SHORT = {"forward": "fwd", "forward_backward": "fwd+bwd", "float32": "fp32", "bfloat16": "bf16"}
USUAL = ("eager", "sdpa", "compile", "mmfast")
MOST_SHOWN = 5  # implementations that a terminal has room for
_WITH_LENGTHS = ("cross_attention", "MultiheadAttention", "GatedCrossAttentionBlock")


def progress_bar(console: Console) -> Progress:
    """One line; transient, so that only the tables stay."""
    return Progress(
        TextColumn("[bold]benchmarks[/bold]"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )


def show(console: Console, results: Mapping[str, Any]) -> None:
    """Everything, most important last."""
    rows = results["rows"]
    where = on_device(results["machine"])
    for section, dtype, direction, chosen in sections(rows):
        title = f"{section}, {dtype}, {LONG_NAMES[direction]}{where}"
        if section == ALL_GATES:
            same = {"dtype": dtype, "direction": direction}
            console.print(kinds_table(f"{title}: geometric means", by_kind(rows, **same)))
        else:
            console.print(kernel_table(f"{title} (p50, ms)", chosen))
    if results.get("training"):
        console.print(training_table(results["training"]))
    if results.get("drop_in"):
        console.print(drop_in_table(rows))
    summary = [entry for entry in results["summary"] if entry["op"] not in GATE_OPS]
    if others := [entry for entry in summary if entry["op"] != ALL_GATES]:
        console.print(summary_table(others))
    if totals := {mean_name(entry): entry for entry in summary if entry["op"] == ALL_GATES}:
        console.print(kinds_table("geometric means over all cases of the gates", totals))
    if told := plans_line(results.get("plans")):
        console.print(told)
    machine = results["machine"]
    console.print(
        f"{machine['processor']}, {machine['instruction_set']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, mmfast {machine['mmfast']} at {machine['commit']}, "
        f"{machine['backend']}; {results['seconds']:.0f} s"
    )
    console.print(
        "x eager, x best: times faster than eager, than the best peer measured. mem %: peak memory "
        "beyond the inputs, of eager's. peak %: of what this machine's measured peaks allow. "
        "x comp: than torch.compile, where measured. clone %: least bandwidth, of clone()'s, of "
        "tensors beyond the last-level cache. Every case of the gates is in report.html."
    )
    if left_out := results["left_out"]:
        console.print(f"left out: {len(left_out)} measurements, listed in results.json")
        for why in dict.fromkeys(entry["why"] for entry in left_out):
            count = sum(entry["why"] == why for entry in left_out)
            console.print(Text(f"  {count} x {why.splitlines()[0]}"))


def plans_line(plans: Mapping[str, Any] | None) -> str:
    """How often the planner is right; empty where that was not measured."""
    if not plans or not plans["rows"]:
        return ""
    told = plans["summary"]
    return (
        f"planner: within 10 % of the best plan in {told['share_near_best']:.1%} of "
        f"{told['problems']} problems, {told['mean_ratio']:.3f} times its time on average, "
        f"{told['worst_ratio']:.2f} at worst; rates: {told['source']}"
    )


def on_device(machine: Mapping[str, Any]) -> str:
    """For the titles of tables that hold figures of a GPU: which."""
    return f" on {machine['processor']}" if machine["device"] == "cuda" else ""


def sections(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, str, str, list[Mapping[str, Any]]]]:
    """(section, dtype, direction, rows): a section is an op, all stacks or all gates. Models of
    transformers are in none: they have a table of their own."""
    rows = [row for row in rows if row["op"] != drop_in.OP]
    names = [section_of(row) for row in rows]
    for section in dict.fromkeys(names):
        mine = [row for row, name in zip(rows, names) if name == section]
        for dtype in dict.fromkeys(row["dtype"] for row in mine):
            for direction in LONG_NAMES:
                same = (dtype, direction)
                if chosen := [row for row in mine if (row["dtype"], row["direction"]) == same]:
                    yield section, dtype, direction, chosen


def section_of(row: Mapping[str, Any]) -> str:
    """The heading under which a row is shown."""
    if row["op"] in STACK_OPS:
        return ALL_STACKS
    return ALL_GATES if row["op"] in GATE_OPS else row["op"]


def timed_in(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The implementations that have a row here, mmfast last."""
    found = {row["impl"] for row in rows}
    return tuple(impl for impl in (*PEERS, "mmfast") if impl in found)


def _plain_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def kernel_table(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """One line a case: milliseconds of each implementation, ratios, memory, share of peak.

    Of many implementations the best peer alone is beside the usual ones: the report has them all.
    """
    rows = list(rows)
    table = _plain_table(title)
    table.add_column("case", no_wrap=True)
    impls = timed_in(rows)
    many = len(impls) > MOST_SHOWN
    if many:
        impls = tuple(impl for impl in impls if impl in USUAL)
    for name in (*impls, *(["best peer"] if many else []), "x eager", "x best", "mem %", "peak %"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in dict.fromkeys(tuple(row[key] for key in GROUP) for row in rows):
        same = dict(zip(GROUP, group))
        mine = find(rows, impl="mmfast", **same)
        if mine is None:
            continue
        eager = find(rows, impl="eager", **same)
        table.add_row(
            same["case"] + (" ragged" if same["ragged"] else ""),
            *(milliseconds(find(rows, impl=name, **same)) for name in impls),
            *([_best(rows, mine, same)] if many else []),
            ratio(mine["ratio_vs_eager"]),
            coloured(mine["ratio_vs_best_peer"]),
            share(mine["peak_extra_bytes"], eager and eager["peak_extra_bytes"]),
            "" if mine["pct_of_peak"] is None else f"{mine['pct_of_peak']:.0f}",
        )
    return table


def _best(rows: Iterable[Mapping[str, Any]], mine: Mapping[str, Any], same: Any) -> str:
    name = mine["best_peer"]
    return f"{milliseconds(find(rows, impl=name, **same))} {name}" if name else "-"


def training_table(training: Mapping[str, Any]) -> Table:
    """The twins: time, memory, accuracy."""
    table = _plain_table(f"audio-visual digits: {training['steps']} training steps, same seed")
    for name in (
        "attention",
        "step ms",
        "vs mmfast",
        "step memory",
        "both",
        "no image",
        "no audio",
    ):
        table.add_column(name, justify="left" if name == "attention" else "right")
    for name, step in training["step_ms"].items():
        slower = training["step_ratio"].get(name)
        table.add_row(
            name,
            f"{step['p50']:.1f}",
            "" if slower is None else f"{slower:.2f}x",
            size(training["step_peak_bytes"][name]),
            *(f"{value:.3f}" for value in training["accuracy"][name].values()),
        )
    return table


def drop_in_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Models of transformers before and after the patch, and the mean."""
    found = drop_in.compared(rows)
    table = _plain_table("mmfast.patch(model): transformers, float32, a padded batch (p50, ms)")
    table.add_column("model", no_wrap=True)
    for name in ("stock", "patched", "x stock", "memory", "mem %"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in found:
        table.add_row(
            entry.case, f"{entry.stock_ms:.0f} {entry.stock}", f"{entry.ms:.0f}",
            coloured(entry.ratio), size(entry.stock_bytes), f"{100 * entry.memory:.0f}",
        )  # fmt: skip
    mean = geometric_mean(entry.ratio for entry in found)
    memory = geometric_mean(entry.memory for entry in found)
    if mean is not None and memory is not None:
        table.add_section()
        table.add_row("geometric mean", "", "", coloured(mean), "", f"{100 * memory:.0f}")
    return table


def summary_table(summary: Iterable[Mapping[str, Any]]) -> Table:
    """Geometric means over the cases."""
    table = _plain_table("geometric means over the cases")
    table.add_column("", no_wrap=True)
    for name in ("cases", "x eager", "x best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst", no_wrap=True)
    for entry in summary:
        table.add_row(
            mean_name(entry),
            str(entry["cases"]),
            ratio(entry["mean_vs_eager"]),
            coloured(entry["mean_vs_best_peer"]),
            coloured(entry["worst_vs_best_peer"], entry["worst_case"]),
        )
    return table


def kinds_table(title: str, kinds: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line for each kind of gate, or op: what `results.aggregate` says."""
    table = _plain_table(title)
    table.add_column("", no_wrap=True)
    for name in ("cases", "x eager", "x comp", "x best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst")
    table.add_column("clone %", justify="right", no_wrap=True)
    for kind, entry in kinds.items():
        table.add_row(
            kind,
            str(entry["cases"]),
            ratio(entry["mean_vs_eager"]),
            ratio(entry["mean_vs_compile"]),
            coloured(entry["mean_vs_best_peer"]),
            coloured(entry["worst_vs_best_peer"], entry["worst_case"].removeprefix(f"{kind}_")),
            percent(entry["worst_pct_of_clone"]),
        )
    return table


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def milliseconds(row: Mapping[str, Any] | None) -> str:
    """p50 with three significant digits; a dash where it was not measured."""
    if row is None:
        return "-"
    value = row["p50_ms"]
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def coloured(value: float | None, note: str = "") -> Text:
    """Green above 1, red below."""
    if value is None:
        return Text("-")
    text = f"{ratio(value)} {note}".rstrip()
    return Text(text, style="green" if value >= 1.0 else "red")


def size(count: int | None) -> str:
    """Bytes in the unit that reads well."""
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def share(mine: int | None, of: int | None) -> str:
    """Own bytes as a percentage of eager's."""
    if mine is None or not of:
        return "-"
    percent = 100 * mine / of
    return f"{percent:.0f}" if percent >= 10 else f"{percent:.1f}"


def mean_name(entry: Mapping[str, Any]) -> str:
    """What a line of the means is about."""
    lengths = ""
    if entry["op"] in _WITH_LENGTHS:
        lengths = "ragged " if entry["ragged"] else "dense  "
    return f"{entry['op']} {_SHORT[entry['dtype']]} {lengths}{_SHORT[entry['direction']]}"
