"""Which plan: by the modelled cost, by a comparison of sizes under torch.compile, or by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mmfast.planning import rates, table
from mmfast.planning.costs import Piece, pieces
from mmfast.planning.shapes import PLANS, AttentionShapes

_forced = "auto"

_FIFTEENTHS = 16


@dataclass(frozen=True)
class PlanCost:
    """The work of one plan: FLOPs, bytes that pass memory, modelled seconds; `why_not`: it cannot
    be taken here, and why."""

    name: str
    flops: float
    bytes: float
    seconds: float
    why_not: str | None = None


@dataclass(frozen=True)
class Plan:
    """The plan for a call: its name, why it was taken, and what every plan would cost.

    `title` names the sizes, `source` where the rates come from. `str(plan)` is a table;
    `plan.show()` prints one.
    """

    name: str
    why: str
    costs: tuple[PlanCost, ...]
    title: str = ""
    source: str = ""

    def __str__(self) -> str:
        return table.as_text(self)

    def show(self) -> None:
        """Print the table, with `rich` where that is installed and a terminal listens."""
        table.show(self)


@contextmanager
def use_plan(name: str) -> Iterator[None]:
    """Within this context modules with projected attention follow the plan `name`.

    Args:
        name: "projected", "packed", "absorbed", or "auto" (the cheapest by the cost model).

    A plan never changes a result beyond rounding. Where the named one cannot be taken (nothing is
    known of the lengths, a norm stands between projection and attention) the call is "projected"
    and `module.explain()` says why. The choice is process-wide, not per thread. Raises ValueError
    for an unknown name.

    Example:
        >>> import torch, mmfast
        >>> attention = mmfast.nn.CrossModalAttention(64, 4)
        >>> with mmfast.use_plan("absorbed"):
        ...     out = attention(torch.randn(2, 1, 64), torch.randn(2, 50, 64))
        >>> out.shape
        torch.Size([2, 1, 64])
    """
    global _forced
    if name != "auto" and name not in PLANS:
        raise ValueError(
            f'use_plan: there is no plan {name!r}; plans are {", ".join(PLANS)}, and "auto"'
        )
    before = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = before


def current_plan() -> str:
    """The name asked for: "auto", or a plan's."""
    return _forced


def plan(
    shapes: AttentionShapes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    training: bool = False,
    *,
    refused: Mapping[str, str] | None = None,
) -> Plan:
    """The plan for these sizes, what every plan costs, and why this one is taken.

    Args:
        shapes: the sizes.
        dtype: of the products: that of autocast where it is on.
        device: where the call runs.
        training: whether a backward follows.
        refused: plan -> why it cannot be taken. "projected" always can.

    Example:
        >>> import mmfast
        >>> shapes = mmfast.planning.AttentionShapes(8, 1, 577, 768, 768, 12, 12, 64, 64)
        >>> mmfast.plan(shapes).name
        'absorbed'
    """
    reasons = dict(refused or {})
    if shapes.tokens is None:
        reasons.setdefault("packed", "how many rows are valid is not known on the host")
    device = torch.device(device)
    machine = rates.rates_for(dtype, device, torch.get_num_threads())
    work_of = {name: list(pieces(name, shapes, dtype.itemsize, training)) for name in PLANS}
    costs = []
    for name, work in work_of.items():
        costs.append(
            PlanCost(
                name,
                sum(piece.flops for piece in work),
                sum(p.bytes + (p.elements + p.others) * dtype.itemsize for p in work),
                machine.seconds(work),
                reasons.get(name) if name != "projected" else None,
            )
        )
    able = [cost for cost in costs if cost.why_not is None]
    best = min(able, key=lambda cost: cost.seconds)
    why = _why(best, costs, shapes, work_of, machine)
    if _forced != "auto":
        asked = next(cost for cost in costs if cost.name == _forced)
        if asked.why_not is None:
            best, why = asked, f'asked for with use_plan("{_forced}")'
        else:
            best, why = costs[0], f'use_plan("{_forced}") cannot be followed: {asked.why_not}'
    return Plan(
        best.name, why, tuple(costs), _title(shapes, dtype, device, training), machine.source
    )


def _why(
    best: PlanCost,
    costs: Sequence[PlanCost],
    s: AttentionShapes,
    work_of: Mapping[str, Sequence[Piece]],
    machine: rates.Rates,
) -> str:
    """What makes the cheapest plan the cheapest."""
    projected, _, absorbed = costs
    saved = [p for p in work_of["projected"] if p.what.split(":")[0] in ("keys", "values")]
    projecting = table.duration(machine.seconds(saved))
    if best.name == "absorbed":
        return (
            f"it does without the projections of keys and values, {projecting} of the projected "
            f"plan's {table.duration(projected.seconds)}"
        )
    if best.name == "packed":
        padding = 1.0 - s.valid_keys / max(1, s.batch * s.keys)
        return f"{padding:.0%} of the context's rows are padding, which it does not project"
    if absorbed.why_not is not None:
        return "the least modelled time of those that can be"
    return (
        f"{s.queries} queries of {s.num_heads} heads are too many to attend to a context of width "
        f"{s.context_dim} as it is, for {projecting} of projections"
    )


def _title(s: AttentionShapes, dtype: torch.dtype, device: torch.device, training: bool) -> str:
    filled = ""
    if s.tokens is not None and s.tokens < s.batch * s.keys:
        filled = f" ({s.tokens / (s.batch * s.keys):.0%} valid)"
    return (
        f"{s.batch} x {s.queries} queries over {s.keys} keys{filled} of width {s.context_dim}, "
        f"{s.num_heads} heads, {str(dtype).removeprefix('torch.')} on {device.type}, "
        f"{'with backward' if training else 'forward'}"
    )


def choose(
    batch: int, queries: int, keys: int, embed_dim: int, context_dim: int, num_heads: int,
    num_kv_heads: int, head_dim: int, value_head_dim: int, tokens: int | None,
    query_tokens: int | None, context_grad: bool, context_packed: bool, dtype: torch.dtype,
    device: torch.device, training: bool, refused: Sequence[str] = (),
) -> str:  # fmt: skip
    """`plan(...).name` for the sizes of `AttentionShapes`, in the time of a look into a table.

    refused: a tuple of the names of plans that cannot be taken. Valid tokens count in sixteenths
    of the rows, so that a batch of other lengths is no other problem.
    """
    if _forced != "auto":
        if _forced in refused or (_forced == "packed" and tokens is None):
            return "projected"
        return _forced
    if tokens is not None:
        tokens = _rounded(tokens, batch * keys)
    if query_tokens is not None:
        query_tokens = _rounded(query_tokens, batch * queries)
    return _chosen(
        batch, queries, keys, embed_dim, context_dim, num_heads, num_kv_heads, head_dim,
        value_head_dim, tokens, query_tokens, context_grad, context_packed, dtype, device, training,
        refused, torch.get_num_threads(),
    )  # fmt: skip


def _rounded(tokens: int, rows: int) -> int:
    return -(-tokens * _FIFTEENTHS // rows) * rows // _FIFTEENTHS if rows else 0


@lru_cache(maxsize=4096)
def _chosen(*key: Any) -> str:
    *sizes, dtype, device, training, refused, _ = key
    return plan(
        AttentionShapes(*sizes), dtype, device, training, refused=dict.fromkeys(refused, "refused")
    ).name


def forget() -> None:
    """Read the rates again and choose anew: they were measured, or deleted."""
    rates.forget()
    _chosen.cache_clear()


def choose_compiled(
    queries: int, num_heads: int, num_kv_heads: int, head_dim: int, value_head_dim: int,
    refused: Sequence[str] = (),
) -> str:  # fmt: skip
    """The plan of a call that torch.compile traces: a comparison of sizes, one guard on N.

    Absorbed where its products with the context, `2 N H` for each of its channels, are less than
    half of those of the projections that it saves, `G (D + Dv)`.
    """
    name = _forced
    if name == "auto":
        few = 4 * queries * num_heads < num_kv_heads * (head_dim + value_head_dim)
        name = "absorbed" if few else "projected"
    return "projected" if name == "packed" or name in refused else name
