"""The CUDA kernels of cross_attention's backward, executed on the CPU.

The registry's cases, forward and backward, are in test_cuda_cross_attention.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import cuda_host
import pytest
import torch
from cuda_host import host  # noqa: F401

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import Case, make_inputs

pytestmark = pytest.mark.usefixtures("host")

NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ROWS, KEYS, SPLITS = "rows_kernel", "dkv_kernel", "add_splits_kernel"


# --- helpers --------------------------------------------------------------------------------------


def check(case: Case, dtype: torch.dtype, seed: int = 0) -> tolerance.Results:
    """Forward and backward of a case by the ruler. NaN is in everything that takes no part."""
    inputs = make_inputs(case, dtype)
    against = tolerance.truth(inputs)
    cuda_host.seed(seed)
    taken = inputs.poisoned() if case.layout == "bhnd" else inputs
    results = tolerance.run(mmfast.cross_attention, taken)
    tolerance.assert_accurate(results, against)
    return results


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The kernels that `call` launches, as "dq_kernel<QueriesPass<bf16, 64, false> >"."""
    names = [name.replace("mmfast::", "") for name in cuda_host.kernels_of(call)]
    return [name.removeprefix("cross_attention_") for name in names]


# --- instances ------------------------------------------------------------------------------------


class Instance(NamedTuple):
    """KeysPass and QueriesPass<T, WIDTH, FULL>."""

    dtype: str
    width: int
    full: bool

    @property
    def names(self) -> set[str]:
        arguments = f"<{self.dtype}, {self.width}, {str(self.full).lower()}> >"
        return {f"dkv_kernel<KeysPass{arguments}", f"dq_kernel<QueriesPass{arguments}"}

    def case(self) -> Case:
        """Three or more tiles of rows for the pass over keys, and of keys for the other, of which
        the last is not whole; two or more of what a block holds. No case of two instances."""
        few = self.width == 256 or (self.dtype == "float" and self.width == 128)
        N, M = (70, 75) if few else (135, 140)
        D = self.width - 8 if self.width > 32 else 32  # the last chunk is padding
        case = Case("instance", 2, 2, N, M, D, G=1, Dv=self.width, kv_lens=(M, M - 37),
                    is_causal=True, magnitude=2.0, gate="head", dlse=True)  # fmt: skip
        if self.full:
            case = dataclasses.replace(case, segments="images", segment_rule="at_most", bias="BHNM",
                                       mask="B1NM", mask_kind="dead_columns", dropout_p=0.2,
                                       gate="full")  # fmt: skip
        return case


INSTANCES = [
    *(Instance(dtype, width, False) for dtype in ("bf16", "f16") for width in (32, 64, 96, 128)),
    *(Instance(dtype, width, True) for dtype in DTYPES for width in (64, 128, 256)),
]


@functools.cache
def compiled(name: str) -> set[Instance]:
    """The instances of a pass in the library, by its symbols."""
    path = str(cuda_host.library()._name)
    symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"_kernel<(?:mmfast::)?{name}<(?:mmfast::)?(\w+), (\d+), (\w+)>", symbols)
    return {Instance(t, int(width), full == "true") for t, width, full in found}


@pytest.mark.parametrize("name", ["KeysPass", "QueriesPass"])
def test_the_instances_that_ship_are_those_that_are_tested(name):
    assert compiled(name) == set(INSTANCES)


@pytest.mark.parametrize("one", INSTANCES, ids=lambda one: "-".join(map(str, one)))
def test_instance(one):
    """It is the one that its case launches, and it is right."""
    with cuda_host.device(1):
        found = kernels_of(lambda: check(one.case(), DTYPES[one.dtype], seed=1))
    assert {name for name in found if "Pass<" in name} == one.names
    assert f"rows_kernel<{one.dtype}>" in found


@pytest.mark.parametrize("one", [one for one in INSTANCES if one.full and one.dtype != "f16"],
                         ids=lambda one: "-".join(map(str, one)))  # fmt: skip
def test_instance_on_probabilities(one):
    """Without values: what comes in is for importance and weights."""
    N = 40 if one.width == 256 else 70
    case = Case("probabilities", 2, 2, N, 75, one.width, G=1, importance=True, bias="BHNM",
                weights="mean" if one.width == 128 else "per_head", kv_lens=(75, 40))  # fmt: skip
    with cuda_host.device(1):
        found = kernels_of(lambda: check(case, DTYPES[one.dtype]))
    assert [name for name in found if name in one.names] == sorted(one.names) * 2


# --- splits ---------------------------------------------------------------------------------------

SPLIT_CASES = (
    Case("plain", 1, 2, 150, 300, 64, Dv=20),
    Case("odd", 1, 1, 150, 170, 33, Dv=35),
    Case("gate", 2, 4, 40, 150, 32, G=2, gate="full", kv_lens=(150, 130)),
    Case("causal", 1, 1, 170, 300, 32, is_causal=True, q_lens=(160,)),
    Case("nothing", 4, 1, 70, 170, 16, kv_lens=(170, 0, 3, 64), q_lens=(70, 70, 1, 0)),
    Case("bias", 1, 1, 70, 300, 16, bias="BHNM", kv_lens=(290,)),
    Case("row_bias", 2, 2, 70, 170, 16, bias="1HN1"),
    Case("probabilities", 1, 2, 70, 170, 32, importance=True, weights="mean", bias="B111"),
    Case("everything", 2, 4, 75, 300, 32, G=2, Dv=48, bias="B1NM", segments="images",
         segment_rule="at_most", mask="11NM", mask_kind="tiles", kv_lens=(300, 60), dropout_p=0.2,
         gate="head", is_causal=True, importance=True, weights="per_head", dlse=True),
)  # fmt: skip


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)],
    ids=NAMES.get,
)
@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: case.name)
def test_splits(case, dtype):
    """Sums that are cut and added are as right as in one piece."""
    with cuda_host.device(200):
        found = kernels_of(lambda: check(case, dtype))
    assert SPLITS in found


def test_no_splits_where_tiles_fill_the_device():
    case = Case("full", 2, 2, 70, 150, 32)
    with cuda_host.device(1):
        assert SPLITS not in kernels_of(lambda: check(case, torch.bfloat16))


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sms", [1, 200])
@pytest.mark.parametrize("case", [SPLIT_CASES[3], SPLIT_CASES[-1]], ids=lambda case: case.name)
def test_the_same_bits_whatever_the_schedule(case, sms):
    """Warps and lanes take turns in another order each time."""
    inputs = make_inputs(case, torch.bfloat16).poisoned()
    library = cuda_host.library()
    results = []
    with cuda_host.device(sms):
        for schedule in (0, 0, 1, 2):
            before = library.mmfast_host_schedule(schedule)
            cuda_host.seed(len(results))
            results.append(tolerance.run(mmfast.cross_attention, inputs))
            library.mmfast_host_schedule(before)
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


# --- incoming gradients ---------------------------------------------------------------------------


def _gradients(dout: torch.Tensor, q, k, v, **options: Any) -> list[torch.Tensor]:
    leaves = [one.detach().requires_grad_() for one in (q, k, v)]
    out = mmfast.cross_attention(*leaves, **options)
    return list(torch.autograd.grad(out, leaves, dout))


def _inputs(dtype: torch.dtype, D: int = 32, Dv: int = 32):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 37, D), torch.randn(2, 2, 75, D)
    return q.to(dtype), k.to(dtype), torch.randn(2, 2, 75, Dv).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
def test_incoming_gradients_in_any_strides(dtype, gate):
    """Expanded, transposed, sliced and misaligned ones give the bits that a copy gives."""
    q, k, v = _inputs(dtype)
    options = {"gate": torch.randn(2, 37, 2).to(dtype)} if gate else {}
    shape = (2, 2, 37, 32)
    for dout in (
        torch.randn(1).to(dtype).expand(shape),
        torch.randn(2, 1, 37, 32).to(dtype).expand(shape),
        torch.randn(2, 2, 1, 32).to(dtype).expand(shape),
        torch.randn(2, 37, 2, 32).to(dtype).transpose(1, 2),
        torch.randn(2, 2, 37, 50).to(dtype)[..., 3:35],
        torch.randn(2, 2, 32, 37).to(dtype).mT,
        torch.randn(2, 2, 74, 32).to(dtype)[:, :, ::2],
    ):
        expected = _gradients(dout.contiguous(), q, k, v, **options)
        for got, other in zip(_gradients(dout, q, k, v, **options), expected, strict=True):
            assert torch.equal(got, other)


def test_offsets_beyond_32_bits():
    """Rows of the incoming gradient of which the last is 2^33 bytes away."""
    far, memory = 2**30, torch.empty(2 * 2**30 + 32)
    dout = memory.as_strided((1, 1, 3, 32), (0, 0, far, 1))
    dout.copy_(torch.randn(1, 1, 3, 32))
    q, k, v = (one[:1, :1, :3] for one in _inputs(torch.float32))
    expected = _gradients(dout.clone(memory_format=torch.contiguous_format), q, k, v)
    for got, other in zip(_gradients(dout, q, k, v), expected, strict=True):
        assert torch.equal(got, other)


# --- what takes no part ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(
    "options",
    [
        {"kv_lens": (75, 0), "q_lens": (9, 37)},
        {"kv_lens": (20, 64), "is_causal": True},
        {"mask": "B1NM", "mask_kind": "dead_rows"},
        {"mask": "B1NM", "mask_kind": "dead_rows", "gate": "full", "bias": "BHNM"},
        {"segments": "orphan"},
    ],
    ids=str,
)
def test_rows_that_see_nothing_may_hold_anything(options, dtype):
    """NaN in their output and in what comes in for it as well: gradients are as with zeros."""
    case = Case("rows", **{"B": 2, "H": 2, "N": 37, "M": 75, "D": 32, **options})
    inputs = make_inputs(case, dtype)
    assert not inputs.row_sees().all()
    blind = ~inputs.row_sees()[..., None]
    given, found = inputs.options, []
    forward, backward = cuda_host.op("cross_attention_fwd"), cuda_host.op("cross_attention_bwd")
    rules = [given.get(name) for name in ("kv_lens", "q_lens", "q_segments", "kv_segments", "mask")]
    rules += [given.get("bias"), None, None, given.get("gate"), None]
    scalars = (32**-0.5, 0.0, case.is_causal, 0, 0, 0)
    for value in (0.0, float("nan")):
        taken = inputs.poisoned(value)
        out, lse = forward(taken.q, taken.k, taken.v, *rules, *scalars)
        assert (out.masked_select(blind) == 0).all()
        out, dout = out.masked_fill(blind, value), inputs.dout.masked_fill(blind, value)
        dlse = torch.randn(2, 2, 37, generator=torch.manual_seed(1))
        dlse = dlse.masked_fill(blind[..., 0], value)
        found.append(
            backward(dout, dlse, taken.q, taken.k, taken.v, out, lse, *rules, *scalars, True, True)
        )
    for zeros, poisoned in zip(*found, strict=True):
        assert torch.equal(zeros, poisoned)


# --- bank conflicts -------------------------------------------------------------------------------


def test_no_bank_conflicts():
    """Of ldmatrix and of the copies, in widths that are whole and in those that are not."""
    library = cuda_host.library()
    before = library.mmfast_host_counting(1)
    try:
        library.mmfast_host_clear_counters()
        for one in INSTANCES:
            if one.dtype != "f16" and one.width in (32, 64, 96):
                case = dataclasses.replace(one.case(), B=1, H=1, G=1, kv_lens=None, bias=None)
                with cuda_host.device(1):
                    tolerance.run(mmfast.cross_attention, make_inputs(case, DTYPES[one.dtype]))
        found = {name: of for name, of in cuda_host.counters().items() if "Pass<" in name}
    finally:
        library.mmfast_host_counting(before)
    assert len(found) == 10
    for name, of in found.items():
        assert of["ldmatrix"] > 0
        assert of["ldmatrix_conflicts"] == 0 and of["copy_conflicts"] == 0, name
