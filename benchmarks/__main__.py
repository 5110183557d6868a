"""`python -m benchmarks`: measure, and write results.json, the plots and report.html.

Exit status: 0; 1 when a kernel was refused as wrong or the main job's data are missing; 2 for wrong
arguments.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from . import machine, plans, plots, report, training
from .data import MissingDataError, audiovisual
from .files import write_atomically
from .measuring import PARTS, Measuring
from .profiles import PROFILES, Profile
from .results import summarise, write_json
from .terminal import progress_bar, show

OUT = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    given = parser.parse_args(arguments)
    console = Console()
    return Suite(PROFILES[given.profile], given.out, console, given.parts).run()


class Suite:
    """One run of a profile."""

    def __init__(
        self, profile: Profile, out: Path, console: Console, parts: Sequence[str] = PARTS
    ) -> None:
        self.profile, self.out, self.console, self.parts = profile, out, console, parts
        self.device = machine.device()
        self.started = time.perf_counter()
        dtypes = ["float32"]
        if machine.bf16_is_fast(self.device):
            dtypes.append("bfloat16")
        self.dtypes = dtypes
        self._stage = ""

    def run(self) -> int:
        """Measure, write, show."""
        results: dict[str, Any] = {"machine": machine.describe(self.device)}
        left_out: list[dict[str, str]] = []
        short: list[dict[str, str]] = []
        data = None
        table = Measuring(
            self.profile, self.device, self.dtypes, self.parts, self._left_s, self._tick,
            self._tell,
        )  # fmt: skip
        with progress_bar(self.console) as bar:
            self._bar(bar, table)
            gc.collect()
            gc.freeze()  # what was imported is there to stay: collections between samples are short
            self._tick("this machine's peaks", 0)
            results["machine"] |= self._peaks()
            if "training" in self.parts:
                self._tick("digits and speech", 3)
                try:
                    data = audiovisual.load(self.profile.clips, cache=self.out / "cache")
                    results["training"] = trained = self._train(data)
                    if trained["steps"] < trained["steps_wanted"]:
                        why = f"this machine is slow: {trained['steps']} training steps, not "
                        why += f"{trained['steps_wanted']}; PROFILE=full has"
                        short.append({"what": "audio-visual digits: training steps", "why": why})
                except MissingDataError as error:
                    left_out.append({"what": "audio-visual digits: training", "why": str(error)})
            table.run()
            self._tick("writing the report", 0)
            results |= {
                "rows": table.rows,
                "summary": summarise(table.rows),
                "drop_in": table.models,
                "plans": {"summary": plans.summary(table.plans), "rows": table.plans},
                "left_out": left_out + short + table.left_out,
                "profile": self.profile.name,
                "parts": list(self.parts),
                "seconds": round(time.perf_counter() - self.started, 1),
            }
            self._write(results, data)
        show(self.console, results)
        for name in ("results.json", "report.html"):
            self.console.print(f"{name}: {self.out / name}", soft_wrap=True)
        for entry in left_out:
            self.console.print(Text(f"not measured: {entry['what']}: {entry['why']}", style="red"))
        for why in table.refused:
            self.console.print(Text(f"refused to time it: {why}", style="red"))
        return 1 if table.refused or left_out else 0

    def _write(self, results: dict[str, Any], data: audiovisual.AudioVisual | None) -> None:
        write_json(self.out / "results.json", results)
        drawn = plots.draw(results, data)
        for name, content in drawn.items():
            write_atomically(self.out / f"{name}.png", content)
        write_atomically(self.out / "report.html", report.render(results, drawn))

    def _peaks(self) -> dict[str, Any]:
        return {
            "gemm_gflops": {
                dtype: round(machine.gemm_peak(getattr(torch, dtype), self.device) / 1e9, 1)
                for dtype in self.dtypes
            },
            "clone_gb_per_s": round(machine.clone_bandwidth(self.device) / 1e9, 1),
        }

    def _train(self, data: audiovisual.AudioVisual) -> dict[str, Any]:
        profile = self.profile
        self._tick("training the twins", 12)
        return training.run(
            data,
            steps=profile.steps,
            batch_size=profile.batch_size,
            seed=0,
            device=self.device,
            budget_s=profile.training_s,
            tick=lambda: self._tick("training the twins", 40 / profile.steps),
        )

    def _left_s(self) -> float:
        return self.profile.deadline_s - (time.perf_counter() - self.started)

    def _bar(self, bar: Progress, measuring: Measuring) -> None:
        total = measuring.total + (3 + 12 + 40 if "training" in self.parts else 0)
        self._progress, self._task = bar, bar.add_task("", total=total)

    def _tell(self, line: str) -> None:
        self.console.print(f"{time.perf_counter() - self.started:4.0f} s  {line}", highlight=False)

    def _tick(self, what: str, weight: float) -> None:
        """Say what is being done now; `weight` is the share of what has just begun."""
        self._progress.update(self._task, description=what, advance=weight)
        stage = what.split(",")[0]
        if stage != self._stage and not self.console.is_terminal:  # a log has no bar
            self.console.print(f"{time.perf_counter() - self.started:4.0f} s  {stage}")
        self._stage = stage


if __name__ == "__main__":
    sys.exit(main())
