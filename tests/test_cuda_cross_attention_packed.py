"""Packed rows in the CUDA kernels of cross_attention, executed on the CPU.

By the ruler on cases of the registry, and bit for bit against the padded form, which has the same
tiles in the same order.
"""

from __future__ import annotations

import zlib
from typing import Any

import cuda_host
import pytest
import torch
from cuda_host import host  # noqa: F401

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, functional_cases, make_inputs
from mmfast.testing.packing import SIDES, packed

pytestmark = pytest.mark.usefixtures("host")


def results(case: Case, dtype: torch.dtype, sides: tuple[str, ...] = ()) -> tolerance.Results:
    """Of a case, packed where `sides` says so, with NaN in everything that takes no part."""
    function = packed(mmfast.cross_attention, sides) if sides else mmfast.cross_attention
    return tolerance.run(function, make_inputs(case, dtype).poisoned())


# --- right ----------------------------------------------------------------------------------------


def _cases() -> list[Any]:
    """Every case in one dtype with one side packed, in turns; a few of them are quick."""
    quick = (
        "both_lens", "causal_lens", "segments_everything", "bias_lens", "mask_lens", "gate_lens",
        "dropout_odd", "dlse_lens_gate", "importance_lens", "results_everything", "layout_bnhd",
        "layout_misaligned_odd", "few_rows_everything", "few_rows_heads", "empty_keys",
        "empty_rows", "empty_batch", "key_ranges_scalar",
    )  # fmt: skip
    names = [c.name for c in functional_cases() if max(c.D, c.Dv) <= cuda_host.WIDEST]
    cases = []
    for number, name in enumerate(names):
        dtype, sides = cuda_host.DTYPES[number % 3], SIDES[number // 3 % 3]
        marks = [] if name in quick else [pytest.mark.slow]
        label = f"{name}-{str(dtype).removeprefix('torch.')}-{'_'.join(sides)}"
        cases.append(pytest.param(name, dtype, sides, id=label, marks=marks))
    return cases


@pytest.mark.parametrize("name, dtype, sides", _cases())
def test_case(name, dtype, sides):
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    cuda_host.seed(zlib.crc32(name.encode()))
    found = tolerance.run(packed(mmfast.cross_attention, sides), inputs)
    tolerance.assert_accurate(found, tolerance.truth(inputs))


# --- the bits of the padded form ------------------------------------------------------------------

CASES = {
    "plain": {},
    "causal": {"is_causal": True, "dlse": True, "G": 1},
    "gate": {"gate": "full", "D": 33},
    "gate_head": {"gate": "head", "gate_dtype": "float32"},
    "dropout": {"dropout_p": 0.3, "gate": "head"},
    "bias": {"bias": "1HNM", "mask": "B1NM", "mask_kind": "dead_rows"},
    "segments": {"segments": "images", "bias": "BHNM"},
    "probs": {"importance": True, "weights": "mean", "bias": "11NM"},
    "whole": {"kv_lens": None, "q_lens": None},
}


@pytest.mark.parametrize("sms, N, M", [(1, 70, 150), (200, 20, 700)], ids=["whole", "splits"])
@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_padded_form(name, sms, N, M):
    number = list(CASES).index(name) + (sms == 1)
    dtype = cuda_host.DTYPES[number % 3]
    given = {"kv_lens": (M, 0, M // 3), "q_lens": (9, N, 0), "layout": "bnhd", "D": 32}
    case = Case(name, 3, 2, N, M, **{**given, **CASES[name]})
    with cuda_host.device(sms):
        padded: tolerance.Results = {}
        launched = cuda_host.kernels_of(lambda: padded.update(results(case, dtype)))
        for kernel in ("merge", "add_splits") if sms > 1 else ():
            assert any(kernel in one for one in launched)
        for sides in SIDES:
            found = results(case, dtype, sides)
            assert found.keys() == padded.keys()
            for result, expected in padded.items():
                assert torch.equal(found[result], expected), (result, sides)


# --- rows of no item ------------------------------------------------------------------------------


def _calls(T: int, starts: torch.Tensor, longest: int, dtype: torch.dtype, gate_dims: int) -> Any:
    """Results and gradients of the ops themselves, both sides packed alike."""
    H, D = 2, 32
    generator = torch.Generator().manual_seed(T)
    q, k, v, dout = (torch.randn(1, H, T, D, generator=generator).to(dtype) for _ in range(4))
    gate = torch.randn((1, T, H, D)[:gate_dims], generator=generator)
    lens = (starts[1:] - starts[:-1]).clamp(max=longest)
    at = torch.arange(T)
    of_item = ((at >= starts[:-1, None]) & (at < (starts[:-1] + lens)[:, None])).any(0)
    nan = torch.nan
    q, k, v, dout = (x.masked_fill(~of_item[:, None], nan) for x in (q, k, v, dout))
    gate = gate.masked_fill(~of_item.view(1, T, *(1,) * (gate_dims - 2)), nan)
    options = lens, lens, *(None,) * 4, starts, starts, gate, None
    numbers = D**-0.5, 0.0, False, 0, longest, longest
    out, lse = cuda_host.op("cross_attention_fwd")(q, k, v, *options, *numbers)
    gradients = cuda_host.op("cross_attention_bwd")(
        dout, None, q, k, v, out.masked_fill(~of_item[:, None], nan), lse, *options, *numbers,
        False, True,
    )  # fmt: skip
    dq, dk, dv, _, dgate = gradients
    B = len(lens)
    probs = cuda_host.op("cross_attention_probs_bwd")(
        torch.ones(B, H, longest), None, q, k, lse, *options[:8], numbers[0], *numbers[2:], False
    )
    results = {"out": out, "dq": dq, "dk": dk, "dv": dv, "dq_probs": probs[0], "dk_probs": probs[1]}
    rows = {name: x[0].transpose(0, 1).flatten(1) for name, x in results.items()}
    return of_item, {**rows, "dgate": dgate[0].flatten(1)}


@pytest.mark.parametrize("dtype, gate_dims", [(torch.float32, 3), (torch.bfloat16, 4)])
@pytest.mark.parametrize(
    "lengths, before, after, longest",
    [
        ((5, 0, 3), 2, 4, 5),
        ((4, 9), 0, 0, 7),  # longer than the longest: as if it ended there
        ((0, 0), 3, 2, 1),
        (tuple(n % 3 for n in range(270)), 40, 300, 2),  # more than a block of rows and of items
    ],
    ids=["two", "longer_than_the_longest", "empty", "many"],
)
def test_rows_of_no_item_are_zero(lengths, before, after, longest, dtype, gate_dims):
    """Whatever is in them, and in what comes in for them."""
    ends = torch.tensor((before, *lengths)).cumsum(0)
    starts = ends.to(torch.int32)
    of_item, found = _calls(int(ends[-1]) + after, starts, longest, dtype, gate_dims)
    for name, rows in found.items():
        assert rows.isfinite().all(), name
        assert not rows[~of_item].any(), name
        assert name.startswith(("dk", "dq")) or rows[of_item].any(1).all(), name


@pytest.mark.parametrize("longest", [0, 2])
@pytest.mark.parametrize("T", [0, 3])
def test_no_rows_at_all(T, longest):
    """Items without rows, with and without rows of no item around them."""
    starts = torch.full((3,), T // 2, dtype=torch.int32)
    of_item, found = _calls(T, starts, longest, torch.float32, 3)
    assert not of_item.any()
    for name, rows in found.items():
        assert rows.shape[0] == T and not rows.any(), name


# --- what is refused ------------------------------------------------------------------------------


def test_keys_for_values_are_refused():
    """The public function gives k as v; only a caller of the op itself can leave it out."""
    q = torch.randn(1, 1, 3, 16)
    options = (*(None,) * 10, 0.25, 0.0, False, 0, 0, 0)
    with pytest.raises(RuntimeError, match="values of their own: give k as v"):
        cuda_host.op("cross_attention_fwd")(q, q, None, *options)
    with mmfast.use_backend("reference"):
        expected = mmfast.cross_attention(q, q, None)
    torch.testing.assert_close(mmfast.cross_attention(q, q, None), expected)


def test_packed_results_of_another_form_are_refused():
    q = torch.randn(1, 1, 4, 16)
    starts, lens = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    options = (None, lens, *(None,) * 4, starts, None, None, None, 0.25, 0.0, False, 0, 4, 0)
    out, lse = cuda_host.op("cross_attention_fwd")(q, q, q, *options)
    with pytest.raises(RuntimeError, match="dout must be"):
        cuda_host.op("cross_attention_bwd")(
            out[:, :, 1:], None, q, q, q, out, lse, *options, False, True
        )
