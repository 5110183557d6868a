"""The only tolerances of the project: how wrong may a result be?

A result may be off from the float64 reference by at most `c` times what the plain eager code is off
in the same dtype (c = 2 forward, 3 gradients), plus a rounding floor. This holds for the largest
error and for the root mean square, so that neither one bad element nor a small error everywhere
passes. NaN and a misplaced infinity fail; zeros that the mask makes must be exact zeros.

The LSE and the importance are float32 whatever the storage dtype, and the peer computes them from
float32 scores: an off-by-one in a mask or a rounded scale shows there even where bfloat16 hides it
in `out`. The LSE is always judged.

The floor is what rounding costs an algorithm that is right: `u` (the unit roundoff) times the size
of the terms that are summed, not of their sum, which may cancel to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import reference
from mmfast.reference.philox import dropout_keep
from mmfast.testing import eager
from mmfast.testing.cases import Inputs

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
STORED_ROUNDINGS = 2.0  # of results and intermediates kept in the storage dtype
SUM_ROUNDINGS = 4.0  # of terms summed in the compute dtype

Results = dict[str, Tensor]


class Verdict(NamedTuple):
    """One result against the ruler."""

    name: str
    error: float  # largest absolute error
    allowed: float
    eager_error: float
    rms: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        """NaN compares false, so it fails."""
        return self.error <= self.allowed and self.rms <= self.rms_allowed

    @property
    def ratio(self) -> float:
        """Error over eager's error: the figure of the scoreboard; 0 when both are exact."""
        if self.error == 0:
            return 0.0
        return self.error / self.eager_error if self.eager_error > 0 else float("inf")

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.error:.3g} (allowed {self.allowed:.3g}, eager "
            f"{self.eager_error:.3g}), rms {self.rms:.3g} (allowed {self.rms_allowed:.3g})"
        )


# --- running ------------------------------------------------------------------------------------


def run(function: Callable[..., Any], inputs: Inputs, backward: bool = True) -> Results:
    """`out`, `lse` and what the case asks for, and the gradients, of `function` on `inputs`.

    Every call draws the same dropout seed. Tensors keep their memory layout.
    """
    options = dict(inputs.options)
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    leaves |= {name: options.pop(name) for name in ("bias", "gate") if name in options}
    if backward:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    q, k, v, *_ = leaves.values()
    side = {name: leaf for name, leaf in leaves.items() if name in ("bias", "gate")}
    torch.manual_seed(inputs.seed)
    with torch.set_grad_enabled(backward):
        output = function(q, k, v, **options, **side, return_lse=True)
    results = {name: part.detach() for name, part in output._asdict().items() if part is not None}
    if backward:
        incoming = (inputs.dout, inputs.dlse, inputs.dimportance, inputs.dweights)
        pairs = [(o, g) for o, g in zip(output, incoming, strict=True) if g is not None]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], list(leaves.values()), [g.to(o.dtype) for o, g in pairs]
        )
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


class Truth(NamedTuple):
    """What results are held against: made once for each inputs."""

    inputs: Inputs
    exact: Results  # float64 reference
    peer: Results  # eager in the same dtype
    stored: dict[str, float]  # size of what a kernel rounds to the storage dtype
    sums: dict[str, float]  # size of the terms that it sums in the compute dtype


def truth(inputs: Inputs, backward: bool = True) -> Truth:
    """The float64 reference, the eager peer and the rounding scales of `inputs`."""
    exact = run(reference.cross_attention, inputs.to(torch.float64), backward)
    peer = run(eager.cross_attention, inputs, backward)
    stored, sums = _rounding_scales(inputs.to(torch.float64), exact)
    return Truth(inputs, exact, peer, stored, sums)


def _rounding_scales(inputs: Inputs, exact: Results) -> tuple[dict[str, float], dict[str, float]]:
    """Largest sizes, per result, of the stored and of the summed terms.

    Roundings of different stored elements are independent: their squares add. Sums are bounded by
    the sum of absolute terms.
    """
    c, options = inputs.case, inputs.options
    scale = abs(c.D**-0.5 if c.scale is None else c.scale)
    groups = c.H // c.G
    q = inputs.q.masked_fill(~inputs.row_sees()[..., None], 0.0)
    unseen = ~inputs.key_seen()[..., None]
    k = inputs.k.masked_fill(unseen, 0.0).repeat_interleave(groups, 1)
    v = inputs.v.masked_fill(unseen, 0.0).repeat_interleave(groups, 1)

    bias = options.get("bias", torch.zeros(()))
    finite_bias = bias.masked_fill(bias.isinf(), 0.0).abs()
    live = exact["lse"] > float("-inf")
    scores = scale * (q @ k.transpose(-2, -1)) + bias
    lse = exact["lse"].masked_fill(~live, 0.0)[..., None]
    seen = inputs.allowed() & live[..., None]
    p = (scores - lse).masked_fill(~seen, float("-inf")).exp()
    score_terms = scale * (q.abs() @ k.abs().transpose(-2, -1)) + finite_bias + 1.0
    score_size = score_terms.masked_fill(~seen, 0.0)

    keep = torch.ones_like(p)
    if c.dropout_p:
        torch.manual_seed(inputs.seed)
        seed = torch.randint(0, 2**63 - 1, (1,))
        keep = dropout_keep(seed, c.dropout_p, c.B, c.H, c.N, c.M).double() / (1.0 - c.dropout_p)
    gate = torch.ones(c.B, c.H, c.N, 1)
    if "gate" in options:
        logits = options["gate"].transpose(1, 2)
        gate = torch.sigmoid(logits if logits.dim() == 4 else logits[..., None])
    pk = p * keep

    stored = {"out": (pk**2) @ (v**2) * gate**2, "weights": p, "lse": torch.zeros(1)}
    stored["importance"] = torch.zeros(1)
    # An error in a score is a relative error of its P: hence the factor of the score's size.
    worst = score_size.amax(-1, keepdim=True) if c.M else score_size.new_zeros(c.B, c.H, c.N, 1)
    sums = {"out": worst * (pk @ v.abs()) * gate, "weights": worst * p, "lse": worst}
    sums["importance"] = (worst * p).sum(2)
    if "dq" in exact:
        dout = inputs.dout.masked_fill(~live[..., None], 0.0)
        ungated = dout * gate
        dp = keep * (ungated @ v.transpose(-2, -1))
        dp_terms = keep * (ungated.abs() @ v.abs().transpose(-2, -1))
        extra = torch.zeros_like(p)
        if inputs.dimportance is not None:
            extra = extra + inputs.dimportance[:, :, None, :]
        if inputs.dweights is not None:
            per_head = inputs.dweights.dim() == 4
            extra = extra + (inputs.dweights if per_head else inputs.dweights[:, None] / c.H)
        dp, dp_terms = dp + extra, dp_terms + extra.abs()
        out = exact["out"]
        delta = (p * dp).sum(-1, keepdim=True)
        delta_terms = (p * dp_terms).sum(-1, keepdim=True)
        delta_squares = ((dout * out) ** 2).sum(-1, keepdim=True)
        dlse = 0.0 if inputs.dlse is None else inputs.dlse[..., None]
        # dout * sigmoid(gate) is stored, where there is a gate, before it meets v.
        dp_squares = keep**2 * (ungated**2 @ v.transpose(-2, -1) ** 2) * ("gate" in options)
        ds = p * (dp - delta + dlse)
        ds_squares = ds**2 + p**2 * (dp_squares + delta_squares)
        dlse_size = 0.0 if inputs.dlse is None else inputs.dlse.abs()[..., None]
        ds_terms = worst * p * (dp_terms + delta_terms + dlse_size)

        def grouped(x: Tensor) -> Tensor:
            return x.unflatten(1, (c.G, groups)).sum(2)

        # Gradients of importance and weights are added to the others in the storage dtype: both
        # summands are rounded, and may cancel.
        via_p = p * extra
        rest = (ds - via_p) * float(bool(via_p.any()))
        stored["dq"] = scale**2 * (ds_squares @ k**2 + _two_squares(via_p, rest, k))
        sums["dq"] = scale * (ds_terms @ k.abs())
        columns = [x.transpose(-2, -1) for x in (ds_squares, via_p, rest, ds_terms)]
        dk_squares = columns[0] @ q**2 + _two_squares(columns[1], columns[2], q)
        stored["dk"] = grouped(scale**2 * dk_squares)
        sums["dk"] = grouped(scale * (columns[3] @ q.abs()))
        stored["dv"] = grouped((pk**2).transpose(-2, -1) @ ungated**2)
        sums["dv"] = grouped((worst * pk).transpose(-2, -1) @ ungated.abs())
        if "dbias" in exact:
            shape = exact["dbias"].shape
            summands = via_p.sum_to_size(shape) ** 2 + rest.sum_to_size(shape) ** 2
            stored["dbias"] = ds_squares.sum_to_size(shape) + summands
            sums["dbias"] = ds_terms.sum_to_size(shape)
        if "dgate" in exact:
            squares = (dout * out) ** 2
            terms = worst * (dout.abs() * gate * (pk @ v.abs()))
            if exact["dgate"].dim() == 3:
                squares, terms = squares.sum(-1), terms.sum(-1)
            stored["dgate"], sums["dgate"] = squares, terms
    return (
        {name: largest(x) ** (1.0 if name == "weights" else 0.5) for name, x in stored.items()},
        {name: largest(x) for name, x in sums.items()},
    )


def _two_squares(a: Tensor, b: Tensor, other: Tensor) -> Tensor:
    return (a @ other) ** 2 + (b @ other) ** 2


def largest(x: Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    return float(x.abs().max()) if x.numel() else 0.0


# --- judging ------------------------------------------------------------------------------------


def _errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error; infinite when a NaN or an infinity is misplaced."""
    if got.numel() == 0:
        return 0.0, 0.0
    got = got.double()
    difference = (got - exact).masked_fill(got == exact, 0.0).nan_to_num(float("inf"))
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def verdict(
    name: str,
    got: Tensor,
    expected: Tensor,
    peer: Tensor,
    stored: float,
    sums: float,
    storage: torch.dtype,
) -> Verdict:
    """One result against the float64 one and the peer's; see the top of this file.

    `stored` and `sums` are the sizes of the terms that are rounded to the storage dtype, and summed
    in the compute dtype. A name that begins with d is a gradient.
    """
    assert got.shape == expected.shape, f"{name} has shape {got.shape}, not {expected.shape}"
    # Where eager has nothing to offer, NaN in a row whose bias is -inf throughout, it sets no bar.
    known = torch.where(expected.isfinite() & ~peer.isfinite(), expected, peer.to(expected.dtype))
    eager_error, eager_rms = _errors(known, expected)
    error, rms = _errors(got, expected)
    factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
    compute = torch.promote_types(storage, torch.float32)
    finite = expected.masked_fill(~expected.isfinite(), 0.0)
    floor = (
        _unit_roundoff(got.dtype) * largest(finite)
        + STORED_ROUNDINGS * _unit_roundoff(storage) * stored
        + SUM_ROUNDINGS * _unit_roundoff(compute) * sums
    )
    max_allowed, rms_allowed = factor * eager_error + floor, factor * eager_rms + floor
    return Verdict(name, error, max_allowed, eager_error, rms, rms_allowed)


def judge(results: Results, against: Truth) -> list[Verdict]:
    """A verdict for each result. Missing results and wrong shapes or dtypes raise."""
    exact, peer, storage = against.exact, against.peer, against.inputs.q.dtype
    assert "lse" in results, "the LSE is always judged"
    return [
        verdict(
            name, got, exact[name], peer[name], against.stored[name], against.sums[name], storage
        )
        for name, got in results.items()
    ]


def assert_accurate(results: Results, against: Truth) -> list[Verdict]:
    """AssertionError, with every verdict, unless all results pass and masked zeros are exact."""
    verdicts = judge(results, against)
    if not all(verdict.ok for verdict in verdicts):
        inputs = against.inputs
        table = "\n".join(f"{'ok ' if v.ok else 'BAD'} {v}" for v in verdicts)
        raise AssertionError(f"{inputs.case.name} in {inputs.q.dtype}:\n{table}")
    assert_exact_zeros(results, against.inputs)
    return verdicts


def assert_exact_zeros(results: Results, inputs: Inputs) -> None:
    """What nobody sees, and a row that sees nothing, is exactly zero, with an LSE of -inf."""
    blind, unseen = ~inputs.row_sees(), ~inputs.key_seen()
    assert (results["lse"][blind] == float("-inf")).all(), "lse of a row that sees nothing"
    wheres = {"out": blind, "dq": blind, "dk": unseen, "dv": unseen}
    for name, where in wheres.items():
        if name in results:
            assert (results[name][where] == 0).all(), f"{name} is not exactly 0 where masked"
