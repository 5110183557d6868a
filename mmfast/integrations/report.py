"""What a patch did: which modules it sped up, which it left and why, and the way back."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Swapped:
    """A module that runs on mmfast now."""

    name: str
    """Where it is in the model."""
    cls: str
    """Its class."""
    kind: str
    """attention, layer (computes no padding), mlp, gate, norm, module."""
    how: str
    """"class" (its class was exchanged) or "name" (attn_implementation)."""
    weights: int = 0
    """Parameters whose work on padding is left out."""


@dataclass(frozen=True)
class Left:
    """A module that could have been sped up and was not."""

    name: str
    cls: str
    reason: str


class Report:
    """What `mmfast.patch` did to a model. `print(report)`, or `report.table()` for rich.

    Attributes:
        swapped: the modules that run on mmfast now, `Swapped(name, cls, kind, how, weights)`.
        left: those that were left, `Left(name, cls, reason)`.
    """

    def __init__(self, model: nn.Module, swapped: list[Swapped], left: list[Left]) -> None:
        self.swapped = swapped
        self.left = left
        self._model = weakref.ref(model)
        modules = dict(model.named_modules())
        self._modules = weakref.WeakSet(modules[row.name] for row in swapped)
        self._class = type(model).__name__
        tables = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        self._weights = sum(p.numel() for p in model.parameters() if id(p) not in tables)

    def undo(self) -> None:
        """Give every module of this report the class and every configuration the name it had.

        Exact: the same objects, parameters and hooks. Nothing happens the second time, or where the
        model is gone. Modules that were moved to another device or dtype stay there.

        Raises:
            RuntimeError: a module was wrapped after the patch in a way that builds on its class
                (`fully_shard`): undo before that.
        """
        from mmfast.integrations.patching import restore

        model = self._model()
        if model is not None:
            restore(model, set(self._modules))  # their names change where PEFT wraps them

    def skipped_share(self) -> float:
        """Share of the parameters, embedding tables aside, that padding no longer meets."""
        packed = sum(row.weights for row in self.swapped)
        return packed / self._weights if self._weights else 0.0

    def estimate(self, valid: float = 0.6) -> float:
        """How many times as fast a padded batch should be, modelled and not measured.

        `1 / (1 - share * (1 - valid))`, for work in proportion to parameters, with `share` of them
        in layers that compute no padding and `valid` of the tokens not padding. Faster attention
        and gates come on top; what has no padding gains nothing here.

        Raises:
            ValueError: valid is not in (0, 1].
        """
        if not 0 < valid <= 1:
            raise ValueError(
                f"estimate: valid is the share of tokens that are not padding, in (0, 1], got "
                f"{valid}"
            )
        return 1.0 / (1.0 - self.skipped_share() * (1.0 - valid))

    def table(self) -> Any:
        """A `rich.table.Table`: a row for each class that was swapped or left.

        Raises:
            ImportError: rich is not installed.
        """
        from rich.table import Table

        table = Table(title=f"mmfast.patch({self._class})", caption=self._caption())
        for column in ("class", "modules", "result", "what happens to it"):
            table.add_column(column, justify="right" if column == "modules" else "left")
        for cls, count, result, what in self._lines():
            table.add_row(cls, str(count), result, what)
        return table

    def __str__(self) -> str:
        lines = self._lines()
        width = max((len(cls) for cls, *_ in lines), default=0)
        text = [f"mmfast.patch({self._class})"]
        for cls, count, result, what in lines:
            text.append(f"  {cls:<{width}} x{count:<4} {result:<8} {what}")
        return "\n".join([*text, self._caption()])

    def __repr__(self) -> str:
        return f"<Report of {self._class}: {len(self.swapped)} swapped, {len(self.left)} left>"

    def _lines(self) -> list[tuple[str, int, str, str]]:
        swapped = Counter((row.cls, _WHAT.get(row.kind, row.kind)) for row in self.swapped)
        left = Counter((row.cls, row.reason) for row in self.left)
        return [
            *((cls, n, "swapped", what) for (cls, what), n in sorted(swapped.items())),
            *((cls, n, "left", reason) for (cls, reason), n in sorted(left.items())),
        ]

    def _caption(self) -> str:
        share = self.skipped_share()
        return (
            f"{len(self.swapped)} swapped, {len(self.left)} left; {share:.0%} of the parameters "
            f"compute no padding: about x{self.estimate():.2f} at 60 % valid tokens (modelled)"
        )


_WHAT = {
    "attention": "fused attention",
    "layer": "padding left out",
    "mlp": "fused gate",
    "gate": "fused gate",
    "norm": "fused modulation",
    "module": "its mmfast.nn class",
}
