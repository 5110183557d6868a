"""Laws of the gating ops that hold for any input, on random problems (Hypothesis)."""

from __future__ import annotations

import torch
from conftest import GATE_IMPLEMENTATIONS
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast.testing.gate_cases import GATE_LAYOUTS, GateCase, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate

_WIDTHS = st.integers(1, 70) | st.sampled_from([96, 127, 128, 129, 512, 1000])
_SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9), _WIDTHS)
_IMPLEMENTATIONS = st.sampled_from(GATE_IMPLEMENTATIONS)
_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
_SIDE = st.sampled_from(["C", "BC", "1C", "BNC", "1NC", "B1C"])
_SEEDS = st.integers(0, 2**31)


@st.composite
def problems(draw):
    """A random GateCase of any op: any sizes, any combination of options."""
    op = draw(
        st.sampled_from(
            ["gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate"]
        )
    )
    shape = draw(_SHAPES)
    common = {
        "layout": draw(st.sampled_from(GATE_LAYOUTS)),
        "side_dtype": draw(st.sampled_from(["same", "float32"])),
        "side_layout": draw(st.sampled_from(["dense", "chunk"])),
        "magnitude": draw(st.sampled_from([1.0, 1.0, 0.01, 10.0])),
    }
    masks = st.sampled_from(["", "BN", "B1", "1N"])
    name = f"random{draw(_SEEDS)}"
    if op == "gated_residual":
        form = draw(st.sampled_from(["", "1", "C", "BC", "B1", "BNC", "BN1", "1NC", "1N1", "B1C"]))
        activation = draw(st.sampled_from(["tanh", "sigmoid", "identity"]))
        return GateCase(
            op, name, shape, activation, (("gate", form),), row_mask=draw(masks), **common
        )
    if op.startswith("glu"):
        names = ["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "identity"]
        return GateCase(op, name, shape, draw(st.sampled_from(names)), **common)
    if op == "fuse":
        mode, K = draw(st.sampled_from(["softmax", "sigmoid", "gmu"])), draw(st.integers(1, 6))
        forms = ["K", "BK", "1K", "BNK", "1NK", "BNKC", "BNK1", "1NKC", "B1KC"]
        if mode == "gmu" and K == 2:
            forms = ["BNC", "BN1", "1NC", "BNKC", "BNK1"]  # [B, ..., 2] has two readings
        sides = (("logits", draw(st.sampled_from(forms))),)
        present = draw(st.sampled_from(["", "random", "none"]))
        return GateCase(op, name, shape, sides=sides, K=K, mode=mode, present=present, **common)
    if op == "modulate":
        residual = draw(st.booleans())
        given_sides = [
            (side, draw(_SIDE)) for side in ("gate", "scale", "shift") if draw(st.booleans())
        ]
        given_sides += [(side, "C") for side in ("weight", "bias") if draw(st.booleans())]
        sides = tuple(side for side in given_sides if residual or side[0] != "gate")
        norm = draw(st.sampled_from([None, "layer", "rms"])) if shape[2] > 1 else None
        return GateCase(op, name, shape, sides=sides, norm=norm, residual=residual, **common)
    sides = tuple((side, "C") for side in ("weight", "bias") if draw(st.booleans()))
    shape = (*shape[:2], shape[2] + 1)
    beta = draw(st.sampled_from([0.0, 0.3, 2.0]))
    return GateCase(op, name, shape, sides=sides, beta=beta, row_mask=draw(masks), **common)


@given(case=problems(), dtype=_DTYPES, implementation=_IMPLEMENTATIONS)
def test_random_problems_obey_the_ruler(case, dtype, implementation):
    against = gate_truth(make_gate_inputs(case, dtype))
    with implementation.active():
        assert_gate_accurate(run_gate(getattr(mmfast, case.op), against.inputs), against)


def _normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _close(got, expected):
    """Equal up to the order of float64 sums."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@given(shape=_SHAPES, seed=_SEEDS, dtype=_DTYPES, implementation=_IMPLEMENTATIONS)
def test_a_gate_of_zero_is_the_identity(shape, seed, dtype, implementation):
    x, y = _normal(seed, *shape).to(dtype), _normal(seed + 1, *shape).to(dtype)
    with implementation.active():
        assert torch.equal(mmfast.gated_residual(x, y, x.new_zeros(1)), x)


@given(
    shape=_SHAPES, seed=_SEEDS, K=st.integers(1, 6), implementation=_IMPLEMENTATIONS,
    mode=st.sampled_from(["softmax", "sigmoid", "gmu"]), per_channel=st.booleans(),
)  # fmt: skip
def test_a_permutation_of_modalities_changes_nothing(
    shape, seed, K, implementation, mode, per_channel
):
    B, N, C = shape
    features = [_normal(seed + k, *shape) for k in range(K)]
    logits = _normal(seed + 77, B, N, K, C if per_channel else 1)
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(B, K, generator=g) < 0.7
    order = torch.randperm(K, generator=g).tolist()
    with implementation.active():
        got = mmfast.fuse(
            [features[k] for k in order], logits[:, :, order], mode=mode, present=present[:, order]
        )
        _close(got, mmfast.fuse(features, logits, mode=mode, present=present))


@given(
    shape=_SHAPES, seed=_SEEDS, K=st.integers(2, 6), implementation=_IMPLEMENTATIONS,
    mode=st.sampled_from(["softmax", "sigmoid", "gmu"]),
)  # fmt: skip
def test_an_absent_modality_is_as_if_it_were_not_given(shape, seed, K, implementation, mode):
    B, N = shape[:2]
    features = [_normal(seed + k, *shape) for k in range(K)]
    logits = _normal(seed + 77, B, N, K, 1)
    gone = seed % K
    present = torch.ones(B, K, dtype=torch.bool)
    present[:, gone] = False
    features[gone] = torch.full(shape, float("nan"), dtype=torch.float64)
    rest = [k for k in range(K) if k != gone]
    with implementation.active():
        got = mmfast.fuse(features, logits, mode=mode, present=present)
        _close(got, mmfast.fuse([features[k] for k in rest], logits[:, :, rest], mode=mode))


@given(shape=_SHAPES, seed=_SEEDS, K=st.integers(1, 6), implementation=_IMPLEMENTATIONS)
def test_a_mix_lies_between_its_features(shape, seed, K, implementation):
    """And a shift of all logits changes nothing: softmax weights sum to 1."""
    features = [_normal(seed + k, *shape) for k in range(K)]
    logits = 5 * _normal(seed + 77, shape[0], K)
    with implementation.active():
        out = mmfast.fuse(features, logits, mode="softmax")
        _close(mmfast.fuse(features, logits + 3.5, mode="softmax"), out)
    stacked = torch.stack(features)
    assert (out <= stacked.amax(0) + 1e-12).all()
    assert (out >= stacked.amin(0) - 1e-12).all()


@given(shape=_SHAPES, seed=_SEEDS, implementation=_IMPLEMENTATIONS, alpha=st.floats(-3, 3))
def test_linear_where_it_is(shape, seed, implementation, alpha):
    """gated_residual in (x, y), glu in b, fuse in the features, FiLM in x."""
    x, y, other = (_normal(seed + k, *shape) for k in range(3))
    gate, logits = _normal(seed + 9, shape[2]), _normal(seed + 10, 2)
    film = _normal(seed + 11, shape[0], shape[2])

    def linear(function, a, b):
        _close(function(a + alpha * b), function(a) + alpha * function(b))

    with implementation.active():
        linear(lambda t: mmfast.gated_residual(t, 2 * t, gate), x, other)
        linear(lambda t: mmfast.glu(y, t), x, other)
        linear(lambda t: mmfast.fuse([t, 3 * t], logits, mode="sigmoid"), x, other)
        linear(lambda t: mmfast.modulate(t, film, norm=None), x, other)


@given(shape=_SHAPES, seed=_SEEDS, implementation=_IMPLEMENTATIONS)
def test_the_norm_forgets_scale_and_offset(shape, seed, implementation):
    x = _normal(seed, *shape[:2], shape[2] + 2)
    with implementation.active():
        plain = mmfast.modulate(x, eps=1e-30)
        torch.testing.assert_close(mmfast.modulate(3 * x + 7, eps=1e-30), plain)
        rms = mmfast.modulate(x, norm="rms", eps=1e-30)
        torch.testing.assert_close(mmfast.modulate(5 * x, norm="rms", eps=1e-30), rms)
    _close(plain.mean(-1), torch.zeros(shape[:2], dtype=torch.float64))


@given(shape=_SHAPES, seed=_SEEDS, implementation=_IMPLEMENTATIONS, beta=st.floats(0, 2))
def test_the_displacement_is_no_longer_than_allowed(shape, seed, implementation, beta):
    """Of a displacement only the direction counts once it is too long; none is LayerNorm(z)."""
    shape = (*shape[:2], shape[2] + 2)
    z, h = _normal(seed, *shape), _normal(seed + 1, *shape)
    with implementation.active():
        far = mmfast.adaptation_gate(z, 1e3 * (1 + beta) * h, beta=beta)
        farther = mmfast.adaptation_gate(z, 1e6 * (1 + beta) * h, beta=beta)
        torch.testing.assert_close(far, farther)
        still = mmfast.adaptation_gate(z, 0 * h, beta=beta)
        torch.testing.assert_close(still, mmfast.modulate(z, eps=1e-5))


@given(shape=_SHAPES, seed=_SEEDS, implementation=_IMPLEMENTATIONS)
def test_packed_is_the_two_halves(shape, seed, implementation):
    a, b = _normal(seed, *shape), _normal(seed + 1, *shape)
    with implementation.active():
        _close(mmfast.glu_packed(torch.cat([a, b], -1)), mmfast.glu(a, b))
