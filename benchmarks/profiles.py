"""How much to measure: `quick` (the default), `full` (everything) and `smoke` (does it run?)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from mmfast.testing.cases import CROSS_ATTENTION, Case, performance_cases

from .timing import Effort

LONGEST = Case("longest", 1, 1, 8192, 8192, 64, layout="bnhd", tags=("performance",))
"""The memory case: a score matrix of 256 MiB per head in float32."""
TINY = CROSS_ATTENTION["tiny"]
"""The overhead case: 1x1x1x1x16."""


@dataclass(frozen=True)
class Profile:
    """What one run does. Times are seconds; `deadline_s` counts from the start of the program:
    past it no new measurement starts, and the results say what was left out."""

    name: str
    clips: int
    steps: int
    batch_size: int
    cases: tuple[Case, ...]
    longest: Case
    module_cases: tuple[str, ...]
    effort: Effort
    training_s: float
    compile_s: float
    deadline_s: float


def _shrunk(case: Case) -> Case:
    lens = None if case.kv_lens is None else (24, 9)
    return dataclasses.replace(case, B=2, H=2, G=2, N=min(case.N, 16), M=24, kv_lens=lens)


_CASES = tuple(performance_cases())
_ALL = tuple(case.name for case in _CASES)

PROFILES = {
    "smoke": Profile(
        name="smoke",
        clips=60,
        steps=2,
        batch_size=8,
        cases=tuple(_shrunk(case) for case in _CASES[:2]),
        longest=dataclasses.replace(LONGEST, N=256, M=256),
        module_cases=(_CASES[1].name,),
        effort=Effort(budget_s=0.01, min_rounds=2, max_rounds=3, sample_s=0.0),
        training_s=math.inf,
        compile_s=0.0,
        deadline_s=math.inf,
    ),
    "quick": Profile(
        name="quick",
        clips=3000,
        steps=250,
        batch_size=32,
        cases=_CASES,
        longest=LONGEST,
        module_cases=("vqa_ragged", "caption_ragged", "detect_ragged"),
        effort=Effort(budget_s=0.5, min_rounds=3, max_rounds=60),
        training_s=75.0,
        compile_s=60.0,
        deadline_s=320.0,
    ),
    "full": Profile(
        name="full",
        clips=5000,
        steps=1000,
        batch_size=32,
        cases=_CASES,
        longest=LONGEST,
        module_cases=_ALL,
        effort=Effort(budget_s=8.0, min_rounds=7, max_rounds=200),
        training_s=math.inf,
        compile_s=math.inf,
        deadline_s=math.inf,
    ),
}
