"""Sums over pairs of the CUDA kernels, executed on the CPU: importance, attention weights, their
gradients, and the gradients of biases that are broadcast.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager

import cuda_host
import pytest
import torch
from cuda_gates import same_bits_whatever_the_schedule
from cuda_host import host  # noqa: F401
from torch import Tensor

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, make_inputs

pytestmark = pytest.mark.usefixtures("host")

TILE = 64  # rows and keys of a tile of pairs
NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
PAIRS = "cross_attention_pairs_kernel"


def _sums_pairs(case: Case) -> bool:
    """Has it a result of this file's kernels? A whole bias has its gradient from another pass."""
    dims = set(case.bias or "") - {"1"}
    broadcast = case.bias is not None and dims != set("BHNM")
    return bool(case.importance or case.weights or broadcast)


CASES = [one for one in cuda_host.attention_cases() if _sums_pairs(CROSS_ATTENTION[one.values[0]])]


@contextmanager
def launches() -> Iterator[list[dict]]:
    """What is launched within the context: kernel, grid, threads, shared."""
    library = cuda_host.library()
    library.mmfast_host_launches.restype = ctypes.c_char_p
    library.mmfast_host_clear_counters()
    found: list[dict] = []
    yield found
    found += json.loads(library.mmfast_host_launches())


def check(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tolerance.Results:
    """`cuda_host.check_attention` of a case that is not in the registry."""
    inputs = make_inputs(case, dtype)
    against = tolerance.truth(inputs)
    cuda_host.seed(seed)
    results = tolerance.run(mmfast.cross_attention, inputs.poisoned())
    tolerance.assert_accurate(results, against)
    return results


def problem(dtype=torch.float32, B=2, H=3, N=70, M=140, D=40):
    """q, k and the LSE of q k^T."""
    generator = torch.Generator().manual_seed(B * H * N * M)
    q = torch.randn(B, H, N, D, generator=generator).to(dtype)
    k = torch.randn(B, H, M, D, generator=generator).to(dtype)
    return q, k, torch.logsumexp(q.float() @ k.float().mT * D**-0.5, -1)


def probabilities(q: Tensor, k: Tensor, lse: Tensor, weights: int, bias: Tensor | None = None):
    op = cuda_host.op("cross_attention_probs")
    return op(
        q, k, lse, *(None,) * 5, bias, None, None, q.shape[3] ** -0.5, False, 0, 0, 0, True, weights
    )


# --- right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, dtype", CASES)
def test_case(name, dtype):
    cuda_host.check_attention(name, dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        # three tiles of keys and of rows, the last ones of one element; a width of three pieces
        Case("tiles", 1, 2, 129, 129, 136, importance=True, weights="mean", bias="1HNM"),
        Case("tiles_columns", 2, 2, 129, 129, 72, Dv=144, importance=True, bias="1H1M"),
        # results in rows of 16 bytes, and in rows that begin anywhere
        Case("rows_even", 2, 2, 65, 72, 16, weights="per_head", bias="B1NM"),
        Case("rows_odd", 2, 2, 65, 71, 16, weights="per_head", bias="11NM"),
        Case("rows_dead", 2, 2, 20, 71, 16, weights="mean", bias="1HNM", bias_kind="infinite"),
        Case("everything", 2, 4, 70, 130, 16, G=2, bias="1H1M", gate="full", dropout_p=0.3,
             kv_lens=(130, 66), q_lens=(70, 9), is_causal=True, importance=True, dlse=True),
        Case("dropout", 2, 2, 33, 70, 16, bias="11NM", dropout_p=0.4),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_shapes(case, dtype):
    check(case, dtype)


def test_what_takes_no_part_in_bias_and_mask_may_be_nan():
    """A bias is read where a pair may attend, and its gradient is 0 elsewhere."""
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    mask = torch.rand(20, 20) < 0.6
    mask[:, 3], mask[5] = False, False
    bias = torch.randn(2, 20, 20)
    outputs, gradients = [], []
    for given in (bias.masked_fill(~mask, float("nan")), bias.masked_fill(~mask, 3.0)):
        given.requires_grad_()
        output = mmfast.cross_attention(
            q, k, v, mask=mask, bias=given, return_importance=True, return_weights=True
        )
        total = output.out.square().sum() + output.importance.square().sum()
        gradients.append(torch.autograd.grad(total + output.weights.square().sum(), given)[0])
        outputs.append(output)
    assert torch.equal(outputs[0].weights, outputs[1].weights)
    assert torch.equal(outputs[0].importance, outputs[1].importance)
    assert torch.equal(gradients[0], gradients[1])
    assert (gradients[0][:, ~mask] == 0).all()


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_rows_that_are_not_aligned(dtype):
    """Read element by element, they give the same bits."""
    q, k, lse = problem(dtype)
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (q, k)]
    assert shifted[0].data_ptr() % 16
    for got, expected in zip(
        probabilities(*shifted, lse, 2), probabilities(q, k, lse, 2), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("B, N, M", [(2, 0, 5), (2, 5, 0), (0, 5, 5)])
def test_nothing_to_sum(B, N, M):
    q, k = torch.randn(B, 3, N, 16), torch.randn(B, 3, M, 16)
    importance, weights = probabilities(q, k, torch.zeros(B, 3, N), 1)
    assert torch.equal(importance, torch.zeros(B, 3, M))
    assert torch.equal(weights, torch.zeros(B, N, M))
    bias = torch.zeros(1, 3, 1, M)
    dq, dk, dbias, dlse = cuda_host.op("cross_attention_probs_bwd")(
        torch.ones(B, 3, M), torch.ones(B, N, M), q, k, torch.zeros(B, 3, N), *(None,) * 5, bias,
        None, None, 0.25, False, 0, 0, 0, True,
    )  # fmt: skip
    for got, like in ((dq, q), (dk, k), (dbias, bias), (dlse, q[..., 0])):
        assert torch.equal(got, torch.zeros_like(like))


# --- instances, splits, order --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_every_instance_runs(dtype):
    """Those that csrc/cuda/cross_attention_pairs.cuh names, of this dtype."""
    with launches() as plain:
        check(Case("plain", 2, 2, 70, 70, 16, importance=True, weights="mean"), dtype)
    with launches() as full:
        check(Case("full", 2, 2, 70, 70, 16, importance=True, bias="11NM"), dtype)
    with launches() as rows:
        check(Case("rows", 2, 2, 70, 70, 16, bias="1HN1"), dtype)

    def kernels(found):
        names = {launch["kernel"].split("::")[-1] for launch in found}
        return {name for name in names if "pairs" in name or "dbias" in name}

    name = NAMES[dtype]
    assert kernels(plain) == {f"{PAIRS}<{name}, false, false>"}
    assert kernels(full) == {f"{PAIRS}<{name}, true, false>", f"{PAIRS}<{name}, true, true>"}
    assert kernels(rows) == {"cross_attention_dbias_rows_kernel"}


SPLIT = [
    # rows of an item and head; heads; items and heads; items, heads and rows
    Case("split_importance", 1, 1, 330, 70, 16, importance=True),
    Case("split_weights", 1, 5, 20, 70, 16, weights="mean", q_lens=(19,)),
    Case("split_bias", 3, 2, 20, 70, 16, bias="11NM", kv_lens=(70, 0, 33)),
    Case("split_columns", 3, 2, 140, 70, 16, bias="111M", dropout_p=0.2),
]


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
@pytest.mark.parametrize("multiprocessors", [1, 2, 108])
def test_splits(case, multiprocessors):
    """One multiprocessor has no use for splits; many of them take one tile each."""
    with cuda_host.device(multiprocessors), launches() as found:
        check(case)
    pairs = [one for one in found if PAIRS in one["kernel"]]
    sums = [one for one in found if "column_sums" in one["kernel"]]
    tiles = -(-case.M // TILE)
    assert pairs
    blocks = {one["grid"][0] for one in pairs}
    if multiprocessors == 1:
        assert blocks == {tiles} and not sums
    elif multiprocessors == 2:
        assert blocks == {tiles}  # as many as multiprocessors
    else:
        terms = {"split_importance": 6, "split_weights": 5, "split_bias": 6, "split_columns": 18}
        assert blocks == {tiles * terms[case.name]} and sums


@pytest.mark.parametrize("multiprocessors", [1, 108])
def test_same_bits_whatever_the_schedule(multiprocessors):
    case = Case("order", 2, 2, 70, 130, 16, importance=True, weights="mean", bias="1HNM",
                dropout_p=0.1)  # fmt: skip
    inputs = make_inputs(case, torch.bfloat16)
    with cuda_host.device(multiprocessors):
        same_bits_whatever_the_schedule(lambda: tolerance.run(mmfast.cross_attention, inputs))


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_no_bank_conflicts(dtype):
    library = cuda_host.library()
    library.mmfast_host_clear_counters()
    before = library.mmfast_host_counting(1)
    try:
        for weights in (1, 2):
            probabilities(*problem(dtype, B=1, H=2, N=64, M=128, D=64), weights)
    finally:
        library.mmfast_host_counting(before)
    (counted,) = (value for name, value in cuda_host.counters().items() if PAIRS in name)
    assert counted["ldmatrix"] > 0 and counted["mma"] > 0
    for what in ("ldmatrix", "shared_load", "shared_store", "copy"):
        assert counted[f"{what}_conflicts"] == 0, what
    assert counted["global_sectors"] == counted["global_sectors_least"]


# --- bad input, past the checks of the Python op -------------------------------------------------


def test_sizes_that_do_not_fit_an_integer_are_refused():
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16).expand(1, 1, 2**31 - 1, 16)
    with pytest.raises(RuntimeError, match="M=2147483647; a GPU kernel goes up to 2147418112"):
        probabilities(q, k, torch.zeros(1, 1, 1), 0)


@pytest.mark.parametrize(
    "dimportance, dweights, message",
    [
        (torch.zeros(2, 3, 7), None, "dimportance must be contiguous float32 of 840 elements"),
        (torch.zeros(2, 3, 140).half(), None, "dimportance must be contiguous float32"),
        (None, torch.zeros(2, 70, 140).half(), "dweights must be contiguous"),
        (None, torch.zeros(2, 3, 70, 7), "dweights must be contiguous"),
        (None, torch.zeros(2, 140, 70).mT, "dweights must be contiguous"),
    ],
)
def test_incoming_gradients_of_another_form_are_refused(dimportance, dweights, message):
    q, k, lse = problem()
    op = cuda_host.op("cross_attention_probs_bwd")
    with pytest.raises(RuntimeError, match=message):
        op(dimportance, dweights, q, k, lse, *(None,) * 8, 0.25, False, 0, 0, 0, False)


def test_other_lse_is_refused():
    q, k, lse = problem()
    for wrong in (lse[:1], lse.half(), lse.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="lse must be contiguous"):
            probabilities(q, k, wrong, 1)
