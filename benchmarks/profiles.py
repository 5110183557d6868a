"""How much to measure: `quick` (the default), `full` (everything) and `smoke` (does it run?)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from mmfast.testing.cases import CROSS_ATTENTION, Case, performance_cases
from mmfast.testing.gate_cases import GateCase, performance_gate_cases

from .drop_in import CASES as MODELS
from .drop_in import HEAVY, DropInPlan
from .layers import CASES as LAYERS
from .layers import LayerCase
from .stacks import CASES as STACKS
from .stacks import DROP_IN, StackCase
from .stacks import OPS as STACK_OPS
from .timing import Effort

LONGEST = Case("longest", 1, 1, 8192, 8192, 64, layout="bnhd", tags=("performance",))
"""The memory case: a score matrix of 256 MiB per head in float32."""
TINY = CROSS_ATTENTION["tiny"]
"""The overhead case: 1x1x1x1x16."""
GATES = {case.name: case for case in performance_gate_cases()}


@dataclass(frozen=True)
class GatePlan:
    """Which gating cases are measured in each dtype, and how thoroughly.

    `thorough`: the cases that are measured with torch.compile and with their memory, in
    `thorough_dtypes`. `compile_s`: the time that torch.compile may take in all.
    """

    cases: dict[str, tuple[GateCase, ...]]
    thorough: frozenset[str]
    thorough_dtypes: tuple[str, ...]
    layers: tuple[LayerCase, ...]
    effort: Effort
    compile_s: float


@dataclass(frozen=True)
class StackPlan:
    """Which modules and stacks are measured in each dtype, and how thoroughly.

    `memory_dtypes`: in which their memory is.
    """

    cases: dict[str, tuple[StackCase, ...]]
    memory_dtypes: tuple[str, ...]
    effort: Effort
    compile_s: float


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
    gates: GatePlan
    stacks: StackPlan
    drop_in: DropInPlan
    effort: Effort
    training_s: float
    compile_s: float
    deadline_s: float


def _shrunk(case: Case) -> Case:
    lens = None if case.kv_lens is None else (24, 9)
    return dataclasses.replace(case, B=2, H=2, G=2, N=min(case.N, 16), M=24, kv_lens=lens)


def _shrunk_stack(case: StackCase) -> StackCase:
    return dataclasses.replace(
        case, B=2, N=2, M=6, width=16, heads=2, context_width=16, hidden=16 if case.hidden else 0,
        layers=min(case.layers, 2), lens=(6, 3) if case.lens else (),
    )  # fmt: skip


def _some(kinds: tuple[str, ...], *shapes: str) -> tuple[GateCase, ...]:
    return tuple(GATES[f"{kind}_{shape}"] for kind in kinds for shape in shapes)


_CASES = tuple(performance_cases())
_ALL = tuple(case.name for case in _CASES)
_DTYPES = ("float32", "bfloat16")
_KINDS = tuple(dict.fromkeys(name.rpartition("_")[0] for name in GATES))
_ONE_AN_OP = ("tanh_gate", "swiglu", "geglu_packed", "gmu", "ada_layer_norm_zero", "mag")
_SMOKE_GATES = tuple(
    dataclasses.replace(case, shape=(2, 3, 20)) for case in _some(_ONE_AN_OP, "short")
)
_SMOKE_STACKS = tuple(
    _shrunk_stack(next(case for case in STACKS if case.op == op)) for op in STACK_OPS
)

PROFILES = {
    "smoke": Profile(
        name="smoke",
        clips=60,
        steps=2,
        batch_size=8,
        cases=tuple(_shrunk(case) for case in _CASES[:2]),
        longest=dataclasses.replace(LONGEST, N=256, M=256),
        module_cases=(_CASES[1].name,),
        gates=GatePlan(
            cases={"float32": _SMOKE_GATES, "bfloat16": _SMOKE_GATES[:1]},
            thorough=frozenset(case.name for case in _SMOKE_GATES),
            thorough_dtypes=_DTYPES,
            layers=(dataclasses.replace(LAYERS[0], N=4, width=32, hidden=48),),
            effort=Effort(budget_s=0.01, min_rounds=2, max_rounds=3, sample_s=0.0),
            compile_s=0.0,
        ),
        stacks=StackPlan(
            cases=dict.fromkeys(_DTYPES, _SMOKE_STACKS),
            memory_dtypes=_DTYPES,
            effort=Effort(budget_s=0.01, min_rounds=2, max_rounds=3, sample_s=0.0),
            compile_s=0.0,
        ),
        drop_in=DropInPlan(("lxmert", "bart"), "tiny", None, Effort(0.0, min_rounds=2)),
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
        gates=GatePlan(
            cases={
                "float32": _some(_KINDS, "vision", "short", "wide")
                + _some(("tanh_gate", "ada_layer_norm_zero"), "long"),
                "bfloat16": _some(_KINDS, "vision") + _some(("swiglu", "gmu"), "long"),
            },
            thorough=frozenset(case.name for case in _some(_ONE_AN_OP, "vision")),
            thorough_dtypes=("float32",),
            layers=LAYERS,
            effort=Effort(budget_s=0.2, min_rounds=3, max_rounds=60, settle=True),
            compile_s=45.0,
        ),
        stacks=StackPlan(
            cases={
                "float32": STACKS,
                "bfloat16": tuple(case for case in STACKS if case.ours != DROP_IN),
            },
            memory_dtypes=("float32",),
            effort=Effort(budget_s=0.3, min_rounds=3, max_rounds=40),
            compile_s=0.0,
        ),
        drop_in=DropInPlan(
            tuple(name for name in MODELS if name not in HEAVY),
            "base",
            2,
            Effort(0.0, min_rounds=3),
            budget_s=150.0,
        ),
        effort=Effort(budget_s=0.5, min_rounds=3, max_rounds=60),
        training_s=75.0,
        compile_s=60.0,
        deadline_s=660.0,
    ),
    "full": Profile(
        name="full",
        clips=5000,
        steps=1000,
        batch_size=32,
        cases=_CASES,
        longest=LONGEST,
        module_cases=_ALL,
        gates=GatePlan(
            cases=dict.fromkeys(_DTYPES, tuple(GATES.values())),
            thorough=frozenset(GATES),
            thorough_dtypes=_DTYPES,
            layers=LAYERS,
            effort=Effort(budget_s=2.0, min_rounds=7, max_rounds=200, settle=True),
            compile_s=math.inf,
        ),
        stacks=StackPlan(
            cases=dict.fromkeys(_DTYPES, STACKS),
            memory_dtypes=_DTYPES,
            effort=Effort(budget_s=6.0, min_rounds=7, max_rounds=200),
            compile_s=math.inf,
        ),
        drop_in=DropInPlan(MODELS, "base", None, Effort(0.0, min_rounds=7)),
        effort=Effort(budget_s=8.0, min_rounds=7, max_rounds=200),
        training_s=math.inf,
        compile_s=math.inf,
        deadline_s=math.inf,
    ),
}
