"""The pictures of a run, drawn without a display and returned as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from . import drop_in, plans
from .data.audiovisual import AudioVisual
from .layers import PEERS as LAYERS
from .results import ALL_GATES, APART, by_kind, find
from .stacks import ALL_STACKS
from .stats import geometric_mean
from .terminal import USUAL, section_of

COLOURS = {"mmfast": "#1b9e77", "eager": "#8a8f98", "sdpa": "#5b7db1", "compile": "#c28f3c"}
OTHER = "#9c89b8"
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "font.size": 9,
    "figure.dpi": 130,
    "svg.hashsalt": "mmfast",
}


def draw(results: Mapping[str, Any], data: AudioVisual | None) -> dict[str, bytes]:
    """PNG files by name: what there are results for."""
    with plt.rc_context(_STYLE):
        figures: dict[str, Figure] = {}
        rows = results["rows"]
        for name, dtype in dict.fromkeys((section_of(row), row["dtype"]) for row in rows):
            if name in LAYERS or name == drop_in.OP:  # the former have a case or two each
                continue
            if name == ALL_STACKS:
                drawn = _stacks(rows, dtype)
            else:
                drawn = _gates(rows, dtype) if name == ALL_GATES else _ratios(rows, name, dtype)
            figures[f"ratios_{name}_{dtype}".replace(" ", "_")] = drawn
        if any(row["op"] == drop_in.OP for row in rows):
            figures["drop_in"] = _drop_in(rows)
        if any(row["case"] == "longest" for row in results["rows"]):
            figures["memory"] = _memory(results["rows"])
        if results.get("plans", {}).get("rows"):
            figures["plans"] = plans.draw(results["plans"]["rows"])
        if results.get("training"):
            figures["training"] = _training(results["training"])
        if data is not None:
            figures["data"] = _examples(data)
        return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _ratios(rows: list[dict[str, Any]], op: str, dtype: str) -> Figure:
    """Bars: how many times faster than the best peer, per case."""
    mine = [
        row
        for row in rows
        if (row["op"], row["dtype"], row["impl"]) == (op, dtype, "mmfast")
        and row["case"] not in APART
        and row["ratio_vs_best_peer"] is not None
    ]
    cases = list(dict.fromkeys(row["case"] for row in mine))
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    for panel, direction in zip(panels, ("forward", "forward_backward")):
        for offset, ragged in ((-0.2, False), (0.2, True)):
            found = [find(mine, case=c, ragged=ragged, direction=direction) for c in cases]
            heights = [row["ratio_vs_best_peer"] if row else np.nan for row in found]
            bars = panel.bar(
                np.arange(len(cases)) + offset,
                heights,
                width=0.38,
                color=COLOURS["mmfast"] if ragged else "#a6d8c4",
                label="ragged lengths" if ragged else "dense",
            )
            panel.bar_label(bars, fmt="%.1f", fontsize=6.5)
        panel.axhline(1.0, color="#444444", linewidth=1)
        panel.set_xticks(range(len(cases)), cases, rotation=30)
        panel.set_title(direction.replace("_", " + "), loc="left")
    usual = {row["impl"] for row in rows if row["op"] == op} <= set(USUAL)
    best = "best of eager, SDPA, compile" if usual else "best peer"
    panels[0].set_ylabel(f"times faster than the\n{best}")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=2, loc="upper right")
    figure.suptitle(f"{op}, {dtype}", x=0.06, y=1.03, ha="left", fontweight="bold")
    return figure


def _gates(rows: list[dict[str, Any]], dtype: str) -> Figure:
    """Bars: geometric means over the shapes of each kind of gate; diamonds: the worst shape."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
    for panel, direction in zip(panels, ("forward", "forward_backward")):
        kinds = by_kind(rows, dtype=dtype, direction=direction)
        place = np.arange(len(kinds))
        for offset, key, colour, label in (
            (-0.2, "mean_vs_eager", "#a6d8c4", "than eager"),
            (0.2, "mean_vs_compile", COLOURS["mmfast"], "than torch.compile, where measured"),
        ):
            heights = [entry[key] or np.nan for entry in kinds.values()]
            bars = panel.bar(place + offset, heights, width=0.38, color=colour, label=label)
            if offset < 0:
                panel.bar_label(bars, fmt="%.1f", fontsize=6.5)
                continue
            for x, height in zip(place + offset, heights):  # at the foot: the diamond is above
                if not np.isnan(height):
                    text = f"{height:.1f}"
                    panel.text(x, 0.12, text, color="white", fontsize=6.5, ha="center")
        worst = [entry["worst_vs_best_peer"] for entry in kinds.values()]
        colours = ["#222222" if value >= 1.0 else "#b3261e" for value in worst]
        label = "worst shape, than its best peer"
        panel.scatter(place, worst, marker="D", s=16, c=colours, zorder=3, label=label)
        panel.axhline(1.0, color="#444444", linewidth=1)
        panel.set_xticks(place, list(kinds), rotation=35, ha="right")
        panel.set_title(direction.replace("_", " + "), loc="left")
    panels[0].set_ylabel("times faster")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        frameon=False,
        ncols=3,
        loc="upper right",
        bbox_to_anchor=(0.92, 1.06),
    )
    figure.suptitle(f"gates, {dtype}", x=0.06, y=1.03, ha="left", fontweight="bold")
    return figure


def _stacks(rows: list[dict[str, Any]], dtype: str) -> Figure:
    """Bars: how many times faster than the best peer each module is, forward above."""
    mine = [
        row
        for row in rows
        if section_of(row) == ALL_STACKS and (row["dtype"], row["impl"]) == (dtype, "mmfast")
    ]
    cases = list(dict.fromkeys(row["case"] for row in mine))
    figure, panel = plt.subplots(figsize=(8, 0.6 + 0.36 * len(cases)))
    place = np.arange(len(cases))
    for offset, direction, colour in (
        (-0.2, "forward", "#a6d8c4"),
        (0.2, "forward_backward", COLOURS["mmfast"]),
    ):
        found = [find(mine, case=case, direction=direction) for case in cases]
        lengths = [(row["ratio_vs_best_peer"] if row else None) or np.nan for row in found]
        label = direction.replace("_", " + ")
        bars = panel.barh(place + offset, lengths, height=0.38, color=colour, label=label)
        texts = ["" if np.isnan(length) else f"{length:.1f}" for length in lengths]
        panel.bar_label(bars, texts, fontsize=6.5, padding=2)
    panel.axvline(1.0, color="#444444", linewidth=1)
    panel.set_yticks(place, cases)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.grid(visible=True, axis="x")
    panel.set_xlabel("times faster than the best of torch.nn")
    panel.legend(frameon=False, loc="lower right")
    panel.set_title(f"{ALL_STACKS}, {dtype}", loc="left", fontweight="bold")
    return figure


def _drop_in(rows: list[dict[str, Any]]) -> Figure:
    """Bars: times faster than the stock model at its fastest, and peak memory as a share of its."""
    compared = drop_in.compared(rows)
    place = np.arange(len(compared))
    figure, (faster, memory) = plt.subplots(
        1,
        2,
        figsize=(9, 0.8 + 0.3 * len(compared)),
        sharey=True,
        gridspec_kw={"width_ratios": (2, 1)},
    )
    ratios = [entry.ratio for entry in compared]
    colours = [COLOURS["mmfast"] if ratio >= 1.0 else "#b3261e" for ratio in ratios]
    bars = faster.barh(place, ratios, height=0.7, color=colours)
    faster.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    mean = geometric_mean(ratios)
    faster.axvline(mean, color="#444444", linewidth=0.8, linestyle="--")
    faster.set_title(f"times faster than transformers (mean {mean:.2f})", loc="left")
    shares = [100 * entry.memory for entry in compared]
    bars = memory.barh(place, shares, height=0.7, color="#a6d8c4")
    memory.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    memory.set_title("peak memory, % of it", loc="left")
    for panel, one in ((faster, 1.0), (memory, 100.0)):
        panel.axvline(one, color="#444444", linewidth=1)
        panel.grid(visible=False, axis="y")
        panel.grid(visible=True, axis="x")
        panel.margins(x=0.12)
    faster.set_yticks(place, [entry.case for entry in compared])
    faster.invert_yaxis()
    figure.tight_layout()
    return figure


def _memory(rows: list[dict[str, Any]]) -> Figure:
    """Bars on a log scale: peak extra bytes of the longest case."""
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
    for panel, direction in zip(panels, ("forward", "forward_backward")):
        found = [row for row in rows if row["case"] == "longest" and row["direction"] == direction]
        found = [row for row in found if row["dtype"] == "float32" and row["peak_extra_bytes"]]
        names = [row["impl"] for row in found]
        bars = panel.bar(
            names,
            [row["peak_extra_bytes"] / 2**20 for row in found],
            color=[COLOURS.get(name, OTHER) for name in names],
        )
        panel.bar_label(bars, fmt="%.0f")
        if len(names) > 4:
            panel.tick_params(axis="x", rotation=60)
        panel.set_yscale("log")
        panel.set_title(direction.replace("_", " + "), loc="left")
    panels[0].set_ylabel("peak extra memory, MiB")
    return figure


def _training(training: Mapping[str, Any]) -> Figure:
    """Loss of the twins, time per step, held-out accuracy."""
    names = list(training["step_ms"])
    figure, (loss, step, right) = plt.subplots(
        1, 3, figsize=(10, 2.9), gridspec_kw={"width_ratios": (2, 1, 2)}
    )
    for name in names:
        values = np.asarray(training["losses"][name])
        width = max(1, len(values) // 25)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        line = {"eager": "-", "sdpa": "-", "mmfast": "--"}[name]
        loss.plot(smooth, line, color=COLOURS[name], label=name, linewidth=1.5)
    loss.set_title("training loss (the lines coincide)", loc="left")
    loss.set_xlabel("step")
    loss.legend(frameon=False)
    times = [training["step_ms"][name] for name in names]
    middle = [value["p50"] for value in times]
    spread = [
        [value["p50"] - value["p20"] for value in times],
        [value["p80"] - value["p50"] for value in times],
    ]
    bars = step.bar(names, middle, yerr=spread, color=[COLOURS[name] for name in names])
    step.bar_label(bars, fmt="%.0f", label_type="center", color="white")
    step.set_title("ms a step", loc="left")
    given = list(training["accuracy"]["mmfast"])
    for index, name in enumerate(names):
        heights = [training["accuracy"][name][key] for key in given]
        place = np.arange(len(given)) + 0.26 * (index - 1)
        right.bar(place, heights, width=0.25, color=COLOURS[name], label=name)
    right.set_xticks(range(len(given)), [key.replace("_", " ") for key in given])
    right.set_ylim(0, 1)
    right.set_title("held-out accuracy", loc="left")
    figure.tight_layout()
    return figure


def _examples(data: AudioVisual) -> Figure:
    """Six held-out items: the noisy picture above its spoken word."""
    count = min(6, len(data.test.labels))
    figure, panels = plt.subplots(2, count, figsize=(9, 3.2), squeeze=False)
    for item in range(count):
        top, bottom = panels[0][item], panels[1][item]
        top.imshow(data.test.images[item], cmap="gray")
        top.set_title(f"{data.test.labels[item]}", loc="left")
        sound = data.test.frames[item, : data.test.lens[item]].T
        bottom.imshow(sound, aspect="auto", origin="lower", cmap="magma")
        bottom.set_xlabel(f"{data.test.lens[item]} frames")
        for panel in (top, bottom):
            panel.grid(visible=False)
            panel.set_xticks([])
            panel.set_yticks([])
    figure.tight_layout()
    return figure
