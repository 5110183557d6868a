"""A plan as a table: of `rich` where that is installed and a terminal listens, else of text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfast.planning.choice import Plan

_HEAD = ("", "plan", "FLOP", "bytes", "modelled", "")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """A row for each plan: a mark, the name, FLOPs, bytes, modelled time, why it cannot be."""
    return [
        (
            "*" if cost.name == plan.name else "",
            cost.name,
            _scaled(cost.flops),
            _scaled(cost.bytes),
            duration(cost.seconds),
            "" if cost.why_not is None else f"not here: {cost.why_not}",
        )
        for cost in plan.costs
    ]


def as_text(plan: Plan) -> str:
    """The table as aligned text, with the title above and the reason below."""
    table = [_HEAD, *rows(plan)]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if column < 2 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        + f"  {row[5]}"
        for row in table
    ]
    return "\n".join(line.rstrip() for line in [plan.title, *lines, f"{plan.name}: {plan.why}"])


def show(plan: Plan) -> None:
    """Print the table."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(as_text(plan))
        return
    if not sys.stdout.isatty():
        print(as_text(plan))
        return
    table = Table(title=plan.title, title_justify="left", caption=f"{plan.name}: {plan.why}",
                  caption_justify="left")  # fmt: skip
    for column, head in enumerate(_HEAD):
        table.add_column(head, justify="right" if 2 <= column < 5 else "left")
    for row in rows(plan):
        table.add_row(*map(Text, row), style="bold" if row[0] else "")
    Console().print(table)


def _scaled(number: float) -> str:
    for scale, letter in _UNITS:
        if number >= scale:
            return f"{number / scale:.3g} {letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """As "1.2 ms" or "34 us"."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
