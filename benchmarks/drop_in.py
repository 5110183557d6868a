"""Whole models of transformers, as they are and after `mmfast.patch(model)`: time and peak memory
of a forward on a padded batch, float32, 60 % of the tokens valid.

Models have the published base sizes and random weights; `mmfast.testing.architectures` builds them.
The stock model is measured at each attention implementation that it has, `eager` and `sdpa`, and
the fastest of them counts. All twins of a model share its weights and differ in nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import mmfast
from mmfast.testing.architectures import Architecture, Size, all_architectures
from mmfast.testing.architectures._harness import strong_weights

from .layers import MissingTransformersError
from .memory import step_peak
from .problems import FORWARD
from .results import group_rows
from .timing import Effort, interleave
from .workloads import WrongResultError

OP = "drop-in"
CASES = (
    "lxmert", "visual_bert", "vilt", "flava", "bridgetower", "clip", "git", "bart", "t5",
    "moonshine", "whisper", "blip-retrieval", "grounding_dino",
)  # fmt: skip
HEAVY = ("whisper", "blip-retrieval", "grounding_dino")
"""So much sound and such large pictures that one forward takes seconds."""
INSTEAD = {"grounding_dino": ("enc_outputs_class",)}
"""Results that are compared in place of the case's outputs: the queries are those places of the
picture that score best, and which these are roundings decide, in the stock model as well."""
STOCK = ("eager", "sdpa")
TOLERANCE = 1e-3
"""Of the largest value: a dozen layers with weights of gain 1.6 turn roundings into 1e-5 to 2e-4,
and a mask, scale or bias that is lost into 0.3 to 20."""


@dataclass(frozen=True)
class DropInPlan:
    """Which models are measured, and how thoroughly.

    `items`: so many of the batch, spread over it, so that the share of padding stays; None: all.
    `budget_s`: past it no further model is begun.
    """

    cases: tuple[str, ...]
    size: Size
    items: int | None
    effort: Effort
    budget_s: float = math.inf


class Found(NamedTuple):
    """`rows` of the table; what else is known of each model measured; what was not, and why; and
    which patched models were refused as wrong."""

    rows: list[dict[str, Any]]
    models: list[dict[str, Any]]
    left_out: list[dict[str, str]]
    refused: list[str]


def measure(
    plan: DropInPlan,
    device: torch.device,
    left_s: Callable[[], float] = lambda: math.inf,
    tick: Callable[[str], None] = lambda what: None,
    tell: Callable[[str], None] = lambda line: None,
    out_of_time: str = "no time",
) -> Found:
    """Measure the models of a plan. Nothing new begins once `left_s()` is 0. `tick` hears of each
    before it is built, `tell` what came out."""
    found = Found([], [], [], [])
    end = time.perf_counter() + plan.budget_s
    for name in plan.cases:
        tick(f"{OP}, {name}")
        what = f"{OP} {name}"
        try:
            if left_s() <= 0.0 or time.perf_counter() > end:
                found.left_out.append({"what": what, "why": out_of_time})
                continue
            model = Model(name, plan, device)
        except MissingTransformersError as error:
            found.left_out.append({"what": what, "why": str(error)})
            continue
        try:
            rows, told = model.measure(plan.effort)
            found.rows.extend(rows)
            found.models.append(told)
            for attention, fault in told["stock_faults"].items():
                why = f"transformers' own differs from its sdpa: {fault}"
                found.left_out.append({"what": f"{what}: {attention}", "why": why})
            (entry,) = compared(rows)
            tell(
                f"{name}: {entry.ratio:.2f}x, {entry.stock_ms:.0f} ms {entry.stock} to "
                f"{entry.ms:.0f}, memory {100 * entry.memory:.0f} %"
            )
        except WrongResultError as error:
            found.left_out.append({"what": what, "why": f"refused, its numbers are wrong: {error}"})
            found.refused.append(str(error))
        del model
        gc.collect()  # a model of transformers is full of cycles
    return found


class Model:
    """One model and its twins on one batch."""

    def __init__(self, name: str, plan: DropInPlan, device: torch.device) -> None:
        with _transformers():
            self.case: Architecture = all_architectures()[name]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                with _without_initial_weights():
                    self._stock = self.case.build(plan.size).eval()
                self._stock.tie_weights()  # type: ignore[operator]
                _weights(self._stock)
                inputs = self.case.inputs(self._stock, plan.size)
        self.name, self._device = name, device
        self._stock.to(device)
        self.inputs = {key: _to(value, device) for key, value in _items(inputs, plan.items).items()}

    def twin(self, attention: str | None = None) -> nn.Module:
        """A copy on the same parameters and buffers; `attention`: by the name transformers has."""
        shared = [*self._stock.parameters(), *self._stock.buffers()]
        twin = copy.deepcopy(self._stock, {id(tensor): tensor for tensor in shared})
        if attention is not None:
            twin.set_attn_implementation(attention)  # type: ignore[operator]
        return twin

    def outputs(self, result: Any) -> dict[str, Tensor]:
        """What is compared: rows of padding are not among it."""
        if self.name in INSTEAD:
            found = {name: getattr(result, name) for name in INSTEAD[self.name]}
            return {name: x.masked_fill(x.isneginf(), 0.0) for name, x in found.items()}
        return self.case.outputs(result, self.inputs)

    def forward(self, model: nn.Module) -> Callable[[], Any]:
        """A call of a twin, ready to be timed."""

        def run() -> Any:
            with torch.no_grad():
                return model(**self.inputs)

        return run

    def measure(self, effort: Effort) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of the table, and what else is known of the model.

        Raises WrongResultError where the patched model is not the model that it was.
        """
        with _transformers():
            runs, peaks, truth, faults = self._stock_runs()
            patched = self.twin()
            report = mmfast.patch(patched)
            runs["mmfast"] = self.forward(patched)
            got, peaks["mmfast"] = self._first(runs["mmfast"])
            error = judge(self.name, got, truth)
            taken = interleave(runs, effort, self._device, warm=True)
        group = {
            "op": OP, "case": self.name, "ragged": True, "dtype": "float32", "direction": FORWARD,
        }  # fmt: skip
        told = {
            "case": self.name,
            "model": type(self._stock).__name__,
            "parameters": sum(p.numel() for p in self._stock.parameters()),
            "inputs": described(self.inputs),
            "swapped": len(report.swapped),
            "left": len(report.left),
            "estimate": report.estimate(),
            "error": error,
            "stock_faults": faults,
        }
        return group_rows(group, taken, peaks, None), told

    def _stock_runs(
        self,
    ) -> tuple[dict[str, Any], dict[str, int], dict[str, Tensor], dict[str, str]]:
        """Calls of the stock model, as many as differ, the peak memory of each, the outputs, and
        what is wrong with those of its attentions that are not measured for it.

        What sdpa gives is the truth where there is one: it is what transformers takes by itself.
        """
        runs: dict[str, Any] = {}
        peaks: dict[str, int] = {}
        outputs: dict[str, dict[str, Tensor]] = {}
        fused: dict[str, int] = {}
        for attention in STOCK:
            try:
                run = self.forward(self.twin(attention))
            except ValueError:  # the model has no such implementation
                continue
            with _fused_calls() as calls:
                outputs[attention], peak = self._first(run)
            fused[attention] = len(calls)
            if attention != "eager" and fused[attention] == fused.get("eager"):
                continue  # its attention is written out in its own code: twice the same model
            runs[attention], peaks[attention] = run, peak
        truth = outputs[list(runs)[-1]]
        faults: dict[str, str] = {}
        for attention in list(runs):
            try:
                judge(self.name, outputs[attention], truth)
            except WrongResultError as error:
                faults[attention] = str(error)
                del runs[attention], peaks[attention]
        return runs, peaks, truth, faults

    def _first(self, run: Callable[[], Any]) -> tuple[dict[str, Tensor], int]:
        """The outputs of a first call, and the peak memory of it."""
        kept: list[Any] = []
        peak = step_peak(lambda: kept.append(run()), self._device)
        return self.outputs(kept[0]), peak


def judge(who: str, got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The largest difference, of the largest value. Raises WrongResultError above TOLERANCE."""
    worst = 0.0
    for name, value in truth.items():
        size = float(value.abs().max())
        error = float((got[name] - value).abs().max()) / size
        if not error <= TOLERANCE:  # NaN compares false
            raise WrongResultError(f"{OP} {who}: {name} is off by {error:.3g} of its largest value")
        worst = max(worst, error)
    return worst


def described(inputs: Mapping[str, Any]) -> str:
    """Shapes, and of masks the share that is valid."""
    parts = []
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            text = f"{name} {'x'.join(map(str, value.shape))}"
            if name.endswith("mask") and value.dim() <= 3:
                text += f" ({float(value.float().mean()):.0%} valid)"
            parts.append(text)
    return ", ".join(parts)


def _weights(model: nn.Module) -> None:
    """Strong ones, from one pool of numbers: drawing hundreds of millions takes seconds.

    T5 scales no scores, for which its own initial weights make up: without, float32 has no digit of
    the stock model right after twelve layers.
    """
    pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))

    def draw(shape: torch.Size) -> Tensor:
        count = shape.numel()
        return pool.repeat(-(-count // pool.numel()))[:count].view(shape)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)  # what was not initialised may be anything
    strong_weights(model, draw=draw)
    for module in model.modules():
        if type(module).__name__ == "T5Attention":
            attention: Any = module
            with torch.no_grad():
                attention.q.weight *= attention.key_value_proj_dim**-0.5


def _items(inputs: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """`count` items of the batch, the first and the last among them, evenly spread."""
    batch = max(v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim())
    if count is None or count >= batch:
        return dict(inputs)
    chosen = torch.linspace(0, batch - 1, count).round().long()
    return {
        name: value[chosen]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _fused_calls() -> Iterator[list[int]]:
    """How often `F.scaled_dot_product_attention` is called: an entry for each."""
    calls: list[int] = []
    function = nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return function(*args, **options)

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", counted):
        yield calls


@contextlib.contextmanager
def _transformers() -> Iterator[None]:
    """Where transformers may import more of itself; it warns of what is measured on purpose."""
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise MissingTransformersError(f"{error}; pip install transformers") from None
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _without_initial_weights() -> contextlib.AbstractContextManager[Any]:
    """While it lasts, models are built without them, and with none tied: what takes seconds is
    replaced anyway."""
    for place in ("transformers.initialization", "transformers.modeling_utils"):
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(place).no_init_weights()
    return contextlib.nullcontext()


class Compared(NamedTuple):
    """A patched model beside the stock model at its fastest attention, `stock`."""

    case: str
    stock: str
    stock_ms: float
    ms: float
    ratio: float
    """Times faster."""
    memory: float
    """Peak memory, as a share of the stock model's."""
    bytes: int
    stock_bytes: int


def compared(rows: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """Of the rows of a table: the models of transformers, in their order."""
    mine = [row for row in rows if row["op"] == OP]
    found = []
    for case in dict.fromkeys(row["case"] for row in mine):
        of = {row["impl"]: row for row in mine if row["case"] == case}
        ours = of["mmfast"]
        stock = of[ours["best_peer"]]
        used, theirs = ours["peak_extra_bytes"], stock["peak_extra_bytes"]
        found.append(
            Compared(
                case, stock["impl"], stock["p50_ms"], ours["p50_ms"], ours["ratio_vs_best_peer"],
                used / theirs, used, theirs,
            )
        )  # fmt: skip
    return found
