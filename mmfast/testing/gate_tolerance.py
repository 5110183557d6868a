"""The ruler of `mmfast.testing.tolerance` for the gating ops.

A result may be off from the float64 reference by at most `c` times what the eager twin is off in
the same dtype (c = 2 forward, 3 gradients), plus a rounding floor. Where the twin itself gives NaN
(it has no answer to a softmax of infinities) the floor alone counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import reference
from mmfast.reference._compute import per_item
from mmfast.reference.fuse import spread_logits
from mmfast.testing import gate_eager
from mmfast.testing.gate_inputs import GateInputs, full_sides
from mmfast.testing.tolerance import Results, Verdict, largest, verdict

FLOAT64_ROUNDINGS = 16.0


class GateTruth(NamedTuple):
    """What results are held against: made once for each inputs."""

    inputs: GateInputs
    exact: Results  # float64 reference
    peer: Results  # eager in the same dtype
    sums: dict[str, float]  # size of the terms that are summed in the compute dtype


def run_gate(function: Callable[..., Any], inputs: GateInputs, backward: bool = True) -> Results:
    """`out` (and `h`) and the gradients of `function` on `inputs`. Tensors keep their layout."""
    leaves = inputs.leaves
    if backward:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    with torch.set_grad_enabled(backward):
        output = inputs.call(function, leaves)
    parts = output._asdict() if hasattr(output, "_asdict") else {"out": output}
    results = {name: part.detach() for name, part in parts.items()}
    if backward:
        grads = torch.autograd.grad(
            list(parts.values()),
            list(leaves.values()),
            [inputs.incoming[name].to(part.dtype) for name, part in parts.items()],
        )
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def gate_truth(inputs: GateInputs, backward: bool = True) -> GateTruth:
    """The float64 reference, the eager twin and the rounding scales of `inputs`."""
    op = inputs.case.op
    exactly = inputs.to(torch.float64)
    exact = run_gate(getattr(reference, op), exactly, backward)
    peer = run_gate(getattr(gate_eager, op), inputs, backward)
    sums = {name: largest(_finite(result)) for name, result in exact.items()}
    if backward:
        sums |= _summed_sizes(exactly) | _norm_sizes(exactly)
    if inputs.dtype == torch.float64:  # the truth has no more digits: it rounds as well
        sums = {name: FLOAT64_ROUNDINGS * size for name, size in sums.items()}
    return GateTruth(inputs, exact, peer, sums)


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(~x.isfinite(), 0.0)


def _summed_sizes(inputs: GateInputs) -> dict[str, float]:
    """Of each side tensor's gradient: the largest sum of the absolute values of its terms.

    The terms are the gradients of a side tensor that is as large as the data.
    """
    full = full_sides(inputs)
    if not full:
        return {}
    function = getattr(reference, inputs.case.op)
    leaves = {name: full.get(name, leaf) for name, leaf in inputs.leaves.items()}
    spread = GateInputs(inputs.case, leaves, inputs.options, inputs.incoming)
    terms = run_gate(function, spread)
    x = next(iter(inputs.leaves.values()))
    sizes = {}
    for name in full:
        side, term = inputs.leaves[name], terms[f"d{name}"].abs()
        if name == "logits":
            pair, side = spread_logits(side, x, inputs.case.K, inputs.case.mode)
            term = term.unsqueeze(-2) if pair else term
        else:
            side = per_item(side, x)
        sizes[f"d{name}"] = largest(_finite(term.sum_to_size(side.shape)))
    return sizes


def _norm_sizes(inputs: GateInputs) -> dict[str, float]:
    """Of the gradients that come through a norm: the size of the terms whose difference they are.

    `rstd * (g - mean(g) - n * mean(g n))` may cancel to nothing.
    """
    case = inputs.case
    leaves = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    if case.op != "modulate" or not case.elements:
        return {}
    with torch.no_grad():
        g = inputs.incoming["out"] * leaves.get("weight", torch.ones(()))
        if "scale" in leaves:
            g = g * (1.0 + per_item(leaves["scale"], g))
        h = inputs.call(reference.modulate)[1] if case.residual else leaves["x"]
        if case.norm is not None:
            centred = h - h.mean(-1, keepdim=True) if case.norm == "layer" else h
            g = g * torch.rsqrt(centred.square().mean(-1, keepdim=True) + case.eps)
        if case.residual:
            g = g.abs() + inputs.incoming["h"].abs()
        gated = g * per_item(leaves["gate"], g) if "gate" in leaves else g
        return {"dx": largest(gated), "dresidual": largest(g)}


def judge_gate(results: Results, against: GateTruth) -> list[Verdict]:
    """A verdict for each result. Missing results and wrong shapes or dtypes raise."""
    inputs = against.inputs
    assert set(results) == set(against.exact), f"results {sorted(results)}"
    verdicts = []
    for name, got in results.items():
        leaf = inputs.leaves.get(name.removeprefix("d")) if name.startswith("d") else None
        wanted = inputs.dtype if leaf is None else leaf.dtype
        assert got.dtype == wanted, f"{name} is {got.dtype}, not {wanted}"
        peer = against.peer[name]
        twin = peer if bool(peer.isfinite().all()) else against.exact[name].to(got.dtype)
        sums = against.sums[name]
        verdicts.append(verdict(name, got, against.exact[name], twin, 0.0, sums, inputs.dtype))
    return verdicts


def assert_gate_accurate(results: Results, against: GateTruth) -> list[Verdict]:
    """AssertionError, with every verdict, unless all results pass and masked zeros are exact."""
    verdicts = judge_gate(results, against)
    if not all(one.ok for one in verdicts):
        inputs = against.inputs
        table = "\n".join(f"{'ok ' if one.ok else 'BAD'} {one}" for one in verdicts)
        raise AssertionError(f"{inputs.case.op} {inputs.case.name} in {inputs.dtype}:\n{table}")
    assert_gate_zeros(results, against.inputs)
    return verdicts


def assert_gate_zeros(results: Results, inputs: GateInputs) -> None:
    """What takes no part has a gradient of exactly 0; an item with nothing gives exactly 0."""
    for name, where in inputs.unused().items():
        if f"d{name}" in results:
            assert (results[f"d{name}"][where] == 0).all(), f"d{name} is not exactly 0 where masked"
    present = inputs.options.get("present")
    if present is not None and inputs.case.elements:
        assert (results["out"][~present.any(1)] == 0).all(), "an item without modalities is not 0"
