"""report.html: one file that needs nothing else, plots inlined, no script, no reference outside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from . import drop_in
from .report_texts import CAPTIONS, CSS, DROP_IN, METHOD, METHOD_ON_A_DEVICE
from .results import ALL_GATES, APART, GROUP, by_kind, find
from .stacks import POOLING
from .stats import geometric_mean
from .terminal import (
    LONG_NAMES,
    mean_name,
    milliseconds,
    on_device,
    percent,
    plans_line,
    ratio,
    sections,
    share,
    size,
    timed_in,
)


def render(results: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>mmfast benchmarks</title><style>{CSS}</style></head><body>",
        *_head(results),
        *_drop_in(results, plots),
        *_training(results.get("training"), plots),
        *_kernels(results, plots),
        *_plans(results.get("plans"), plots),
        *_apart(results["rows"], plots),
        *_notes(results),
        "</body></html>",
    ]
    return "\n".join(parts)


def _head(results: Mapping[str, Any]) -> Iterable[str]:
    machine = results["machine"]
    yield "<h1>mmfast benchmarks</h1>"
    yield (
        f"<p class=note>{escape(machine['processor'])}, {escape(machine['instruction_set'])}, "
        f"{machine['threads']} threads &middot; torch {escape(machine['torch'])} &middot; mmfast "
        f"{escape(machine['mmfast'])} at {escape(machine['commit'])} &middot; "
        f"{escape(machine['started'])} &middot; profile {escape(results['profile'])}</p>"
    )
    yield "<div class=cards>"
    for value, text, good in _cards(results):
        yield f"<div class='card{'' if good else ' bad'}'><b>{value}</b>{escape(text)}</div>"
    yield "</div>"


def _cards(results: Mapping[str, Any]) -> Iterable[tuple[str, str, bool]]:
    models = drop_in.compared(results["rows"])
    if mean := geometric_mean(entry.ratio for entry in models):
        yield ratio(mean), f"faster: {len(models)} models of transformers, patched", mean >= 1.0
    for entry in results["summary"]:
        if entry["op"] == "cross_attention" and entry["dtype"] == "float32":
            lengths = "ragged" if entry["ragged"] else "dense"
            value = entry["mean_vs_best_peer"]
            text = f"faster than the best peer: {lengths} {LONG_NAMES[entry['direction']]}, float32"
            yield ratio(value), text, value >= 1.0
        if entry["op"] == POOLING and entry["dtype"] == "float32":
            value = entry["mean_vs_best_peer"]
            text = f"faster than torch.nn: {POOLING}, {LONG_NAMES[entry['direction']]}, float32"
            yield ratio(value), text, value >= 1.0
        if entry["op"] == ALL_GATES and entry["dtype"] == "float32":
            value = entry["mean_vs_eager"]
            text = f"faster than eager: gates, {LONG_NAMES[entry['direction']]}, float32"
            yield ratio(value), text, value >= 1.0
    if training := results.get("training"):
        value = training["step_ratio"]["eager"]
        text = "faster training steps than torch.nn's attention, same losses"
        yield ratio(value), text, value >= 1.0
    wanted = {"case": "longest", "dtype": "float32", "direction": "forward"}
    mine = find(results["rows"], impl="mmfast", **wanted)
    eager = find(results["rows"], impl="eager", **wanted)
    if mine and eager and eager["peak_extra_bytes"]:
        part = 100 * mine["peak_extra_bytes"] / eager["peak_extra_bytes"]
        yield f"{part:.2f} %", "of eager's memory for one long forward", part < 2.0


def _drop_in(results: Mapping[str, Any], plots: Mapping[str, bytes]) -> Iterable[str]:
    told = {entry["case"]: entry for entry in results.get("drop_in") or ()}
    found = drop_in.compared(results["rows"])
    if not found:
        return
    yield f"<h2>Drop-in: models of transformers{escape(on_device(results['machine']))}</h2>"
    yield f"<p>{escape(DROP_IN)}</p>"
    yield _figure(plots, "drop_in", "Left: above 1 the patched model is faster. Dashed: the mean.")
    header = ["model", "faster by", "stock ms", "at its", "patched ms", "memory, % of stock's"]
    header += ["modelled", "modules swapped", "left", "difference"]
    lines = []
    for entry in found:
        more = told[entry.case]
        lines.append(
            [
                f"{entry.case} ({more['parameters'] / 1e6:.0f} M)",
                ratio(entry.ratio), f"{entry.stock_ms:.0f}", entry.stock, f"{entry.ms:.0f}",
                f"{100 * entry.memory:.0f} of {size(entry.stock_bytes)}", ratio(more["estimate"]),
                str(more["swapped"]), str(more["left"]), f"{more['error']:.1g}",
            ]
        )  # fmt: skip
    yield _table(header, lines, judged=header.index("faster by"))
    inputs = [[entry["case"], entry["model"], entry["inputs"]] for entry in told.values()]
    table = _table(["model", "class", "its batch"], inputs)
    yield f"<details><summary>the batches</summary>{table}</details>"


def _training(training: Mapping[str, Any] | None, plots: Mapping[str, bytes]) -> Iterable[str]:
    if training is None:
        return
    data, agreement = training["data"], training["agreement"]
    yield "<h2>Real data: audio-visual digits</h2>"
    yield (
        f"<p>{data['train_items']} training and {data['test_items']} held-out items: "
        f"{escape(data['images'])}; {escape(data['audio'])}. Audio has {data['audio_frames_mean']} "
        f"frames on average and {data['audio_frames_max']} at most; "
        f"{data['train_without_image']} training items have no image and "
        f"{data['train_without_audio']} no sound; {escape(data['held_out'])}. The network has "
        f"{training['parameters']:,} parameters: an encoder per modality, then audio attends to "
        "the image and the image to the audio. Its twins differ in the attention modules alone and "
        "start from the same weights.</p>"
    )
    yield _figure(
        plots, "data", "Held-out items: noisy picture, log-mel spectrum of the noisy word."
    )
    header = ["attention", "ms a step (p50)", "mmfast is faster by", "peak memory of a step"]
    header += ["accuracy: both", "image missing", "audio missing"]
    lines = []
    for name, step in training["step_ms"].items():
        accuracy = [f"{value:.3f}" for value in training["accuracy"][name].values()]
        faster = ratio(training["step_ratio"].get(name))
        memory = size(training["step_peak_bytes"][name])
        lines.append([name, f"{step['p50']:.1f}", faster, memory, *accuracy])
    yield _table(header, lines)
    yield (
        "<p class=note>eager: torch.nn.MultiheadAttention with default arguments; sdpa: the same "
        "with need_weights=False; mmfast: every module replaced by "
        "mmfast.nn.MultiheadAttention.from_torch.</p>"
    )
    yield _figure(plots, "training", f"{training['steps']} steps each, same seed and batches.")
    yield "<h3>The same numbers</h3>"
    yield _table(
        ["on one batch, same weights", "eager", "mmfast"],
        [
            ["loss", *(f"{agreement['loss'][name]:.7f}" for name in ("eager", "mmfast"))],
            [
                "largest error of the outputs (against float64)",
                f"{agreement['eager_error']:.2g}",
                f"{agreement['mmfast_error']:.2g}",
            ],
        ],
    )
    yield (
        f"<p>Largest difference between the two: outputs {agreement['logits_max_difference']:.2g}, "
        f"gradients {agreement['gradient_max_difference']:.2g} (the largest gradient is "
        f"{agreement['gradient_largest']:.2g}).</p>"
    )
    yield "<h3>A missing modality without a workaround</h3>"
    found = training["without_workaround"]
    yield _table(
        ["", "items with NaN outputs", "parameters with NaN gradients"],
        [
            [
                name,
                f"{value['items_nan']} of {value['items_absent']} with a missing modality",
                f"{value['parameters_nan']} of {value['parameters']}",
            ]
            for name, value in found.items()
        ],
    )
    yield (
        "<p class=note>The loss here is taken over the complete items only. torch needs its "
        "workaround (attend to a padded row, then zero the result); mmfast has none.</p>"
    )


def _kernels(results: Mapping[str, Any], plots: Mapping[str, bytes]) -> Iterable[str]:
    rows = [row for row in results["rows"] if row["case"] not in APART]
    shown: tuple[str, ...] = ()
    where = on_device(results["machine"])
    for section, dtype, direction, chosen in sections(rows):
        if section not in shown:
            yield f"<h2>{escape(section + where)}</h2>"
        if (section, dtype) != shown:
            caption = CAPTIONS.get(section, "Above 1 mmfast is faster.")
            yield _figure(plots, f"ratios_{section}_{dtype}".replace(" ", "_"), caption)
        shown = section, dtype
        yield f"<h3>{escape(dtype)}, {LONG_NAMES[direction]}</h3>"
        if section == ALL_GATES:
            yield _kinds_table(by_kind(rows, dtype=dtype, direction=direction))
            yield f"<details><summary>every case</summary>{_rows_table(chosen)}</details>"
        else:
            yield _rows_table(chosen)


def _kinds_table(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["geometric means", "cases", "vs eager", "vs torch.compile", "vs best peer"]
    header += ["worst case", "% of clone(), mean", "least"]
    lines = [
        [
            kind,
            str(entry["cases"]),
            ratio(entry["mean_vs_eager"]),
            _compared_with_compile(entry),
            ratio(entry["mean_vs_best_peer"]),
            f"{ratio(entry['worst_vs_best_peer'])} {entry['worst_case'].removeprefix(f'{kind}_')}",
            percent(entry["mean_pct_of_clone"]),
            percent(entry["worst_pct_of_clone"]),
        ]
        for kind, entry in kinds.items()
    ]
    return _table(header, lines, judged=header.index("worst case"))


def _compared_with_compile(entry: Mapping[str, Any]) -> str:
    """With the number of cases, where torch.compile was measured in some only."""
    text, count = ratio(entry["mean_vs_compile"]), entry["compiled_cases"]
    return f"{text} ({count})" if 0 < count < entry["cases"] else text


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    impls = timed_in(rows)
    copied = any(row["pct_of_clone"] is not None for row in rows)
    header = ["case", *(f"{name} ms" for name in impls), "p20 to p80"]
    header += ["vs eager", "vs best peer", "memory, % of eager's", "% of peak"]
    header += ["% of clone()"] if copied else []
    lines: list[list[str]] = []
    for group in dict.fromkeys(tuple(row[key] for key in GROUP) for row in rows):
        same = dict(zip(GROUP, group))
        mine = find(rows, impl="mmfast", **same)
        if mine is None:
            continue
        eager = find(rows, impl="eager", **same)
        best = mine["ratio_vs_best_peer"]
        lines.append(
            [
                same["case"] + (" ragged" if same["ragged"] else ""),
                *(milliseconds(find(rows, impl=name, **same)) for name in impls),
                f"{mine['p20_ms']:.3g} to {mine['p80_ms']:.3g}",
                ratio(mine["ratio_vs_eager"]),
                f"{ratio(best)} {mine['best_peer'] or ''}",
                share(mine["peak_extra_bytes"], eager and eager["peak_extra_bytes"]),
                "" if mine["pct_of_peak"] is None else f"{mine['pct_of_peak']:.0f}",
                *([_clone_share(mine)] if copied else []),
            ]
        )
    return _table(header, lines, judged=header.index("vs best peer"))


def _clone_share(row: Mapping[str, Any]) -> str:
    """In brackets where caches have a say."""
    text = percent(row["pct_of_clone"])
    return text if row["beyond_cache"] else f"({text})"


def _plans(plans: Mapping[str, Any] | None, plots: Mapping[str, bytes]) -> Iterable[str]:
    line = plans_line(plans)
    if plans is None or not line:
        return
    told = plans["summary"]
    yield "<h2>The planner</h2>"
    yield (
        "<p>One CrossModalAttention on a grid of shapes, dense and ragged, by each plan that it "
        "can follow: keys and values projected as they are, the valid rows packed first, or the "
        "projections absorbed into queries and output. All give the same result, which was "
        "checked; the planner chooses from the sizes.</p>"
    )
    yield f"<p>{escape(line[0].upper() + line[1:])}.</p>"
    yield _figure(plots, "plans", "Left: a curve that stays at 1 chose the best plan each time.")
    always = told["mean_ratio_of_always"]
    yield _table(
        ["plan", "was the best", "was chosen", "mean time, of the best plan's"],
        [
            [f"always {name}", str(told["best"].get(name, 0)), str(told["chosen"].get(name, 0)),
             f"{value:.3f}"]
            for name, value in always.items()
        ] + [["as planned", "", "", f"{told['mean_ratio']:.3f}"]],
    )  # fmt: skip


def _apart(rows: Sequence[Mapping[str, Any]], plots: Mapping[str, bytes]) -> Iterable[str]:
    apart = [row for row in rows if row["case"] in APART]
    if not apart:
        return
    yield "<h2>Memory of a long call, cost of a small one</h2>"
    yield _figure(plots, "memory", "Peak extra memory at N = M = 8192, one head (quick, full).")
    dtypes = dict.fromkeys(row["dtype"] for row in apart)
    for direction, long_name in LONG_NAMES.items():
        for dtype in dtypes:
            same = (dtype, direction)
            if chosen := [row for row in apart if (row["dtype"], row["direction"]) == same]:
                title = long_name if len(dtypes) == 1 else f"{dtype}, {long_name}"
                yield f"<h3>{title}</h3>{_rows_table(chosen)}"
    yield "<p class=note>tiny is 1x1x1x1x16: the price of a call. Neither is in a mean above.</p>"


def _notes(results: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Means</h2>"
    lines = [
        [
            mean_name(entry),
            str(entry["cases"]),
            ratio(entry["mean_vs_eager"]),
            _compared_with_compile(entry),
            ratio(entry["mean_vs_best_peer"]),
            f"{ratio(entry['worst_vs_best_peer'])} {entry['worst_case']}",
            percent(entry["worst_pct_of_clone"]),
        ]
        for entry in results["summary"]
    ]
    header = ["geometric mean over the cases", "cases", "vs eager", "vs torch.compile"]
    header += ["vs best peer", "worst case", "least % of clone()"]
    yield _table(header, lines, judged=header.index("vs best peer"))
    yield "<h2>Machine</h2>"
    yield _table(["", ""], [[key, str(value)] for key, value in results["machine"].items()])
    yield "<h2>Method</h2>"
    method = METHOD + (METHOD_ON_A_DEVICE if results["machine"]["device"] == "cuda" else ())
    yield from (f"<p>{escape(paragraph)}</p>" for paragraph in method)
    if results["left_out"]:
        yield "<h2>Left out</h2><ul>"
        for why in dict.fromkeys(entry["why"] for entry in results["left_out"]):
            what = [entry["what"] for entry in results["left_out"] if entry["why"] == why]
            yield f"<li>{escape(why)}<br><span class=note>{escape('; '.join(what))}</span></li>"
        yield "</ul>"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], judged: int | None = None) -> str:
    """`judged`: the column whose ratio is coloured by being above 1."""
    html = [
        "<div class=scroll><table><tr>",
        *(f"<th>{escape(name)}</th>" for name in header),
        "</tr>",
    ]
    for line in lines:
        html.append("<tr>")
        for column, text in enumerate(line):
            kind = ""
            if column == judged and text[:1].isdigit():
                kind = " class=good" if float(text.split("x")[0]) >= 1.0 else " class=bad"
            html.append(f"<td{kind}>{escape(text)}</td>")
        html.append("</tr>")
    return "".join([*html, "</table></div>"])


def _figure(plots: Mapping[str, bytes], name: str, caption: str) -> str:
    if name not in plots:
        return ""
    data = base64.b64encode(plots[name]).decode()
    image = f"<img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
