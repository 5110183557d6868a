"""The CUDA kernels of cross_attention's forward, executed on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import cuda_host
import pytest
import torch
from cuda_host import host  # noqa: F401

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, functional_cases, make_inputs

pytestmark = pytest.mark.usefixtures("host")

NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


# --- helpers --------------------------------------------------------------------------------------


def forward(case: Case, dtype: torch.dtype, seed: int = 0, poisoned: bool = True) -> Any:
    """Results of a case, held against the ruler. NaN is in everything that takes no part."""
    inputs = make_inputs(case, dtype)
    against = tolerance.truth(inputs, backward=False)
    cuda_host.seed(seed)
    taken = inputs.poisoned() if poisoned and case.layout == "bhnd" else inputs
    results = tolerance.run(mmfast.cross_attention, taken, backward=False)
    tolerance.assert_accurate(results, against)
    return results


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The kernels that `call` launches, as "fwd_kernel<FwdForm<bf16, 64, 1, false> >"."""
    names = [name.replace("mmfast::", "") for name in cuda_host.kernels_of(call)]
    return [name.removeprefix("cross_attention_") for name in names]


def only_out(name: str) -> Case:
    """A case of the registry, without what other kernels than the forward's give."""
    return dataclasses.replace(CROSS_ATTENTION[name], importance=False, weights=False)


# --- the registry ---------------------------------------------------------------------------------

TAKEN = [case.name for case in functional_cases() if max(case.D, case.Dv) <= cuda_host.WIDEST]


def _forward_cases() -> list[Any]:
    """Every case in every dtype. Quick is the one after that in which `test_gradients` is."""
    cases = []
    for number, name in enumerate(TAKEN):
        for place, dtype in enumerate(cuda_host.DTYPES):
            quick = place == (number + 1) % len(cuda_host.DTYPES)
            marks = [] if quick else [pytest.mark.slow]
            cases.append(pytest.param(name, dtype, id=f"{name}-{NAMES[dtype]}", marks=marks))
    return cases


@pytest.mark.parametrize("name, dtype", _forward_cases())
def test_forward(name, dtype):
    forward(only_out(name), dtype, zlib.crc32(name.encode()))


@pytest.mark.parametrize("name, dtype", cuda_host.attention_cases())
def test_gradients(name, dtype):
    cuda_host.check_attention(name, dtype)


# --- instances ------------------------------------------------------------------------------------


class Instance(NamedTuple):
    """FwdForm<T, WIDTH, GROUPS, FULL> of cross_attention_fwd_form.cuh."""

    dtype: str
    width: int
    groups: int
    full: bool

    @property
    def keys(self) -> int:
        """Of a tile."""
        if self.dtype == "float":
            return 32 if self.width <= 128 else 16
        return 64 if self.width <= 128 else 32

    @property
    def sms(self) -> int:
        """Of a device that this instance's case fills, and no larger instance's."""
        return 1 if self.groups == 2 else 8

    def case(self) -> Case:
        """A problem that this instance is for: three whole tiles of keys and a part of one, two
        tiles of rows of which the last is not whole, items of different lengths."""
        rows = 64 * self.groups
        M = 3 * self.keys + 7
        N = 2 * rows - 9
        D = self.width - 8 if self.width > 32 else 32  # the last chunk is padding
        case = Case("instance", 2, 2, N, M, D, Dv=self.width, kv_lens=(M, M - self.keys),
                    is_causal=True, gate="head", magnitude=3.0)  # fmt: skip
        if self.full:
            case = dataclasses.replace(case, segments="images", segment_rule="at_most", bias="1HNM",
                                       mask="B1NM", mask_kind="dead_columns", dropout_p=0.2,
                                       gate="full")  # fmt: skip
        return case


INSTANCES = [
    *(
        Instance(dtype, width, groups, False)
        for dtype in ("bf16", "f16")
        for width, groups in (
            (32, 1), (64, 1), (64, 2), (96, 1), (96, 2), (128, 1), (128, 2), (256, 1)
        )
    ),
    *(Instance("float", width, 1, False) for width in (64, 128, 256)),
    *(Instance(dtype, width, 1, True) for dtype in DTYPES for width in (64, 128, 256)),
]  # fmt: skip


@functools.cache
def compiled() -> set[Instance]:
    """The instances in the library, by its symbols."""
    path = str(cuda_host.library()._name)
    symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"FwdForm<(?:mmfast::)?(\w+), (\d+), (\d+), (true|false)>", symbols)
    return {
        Instance(t, int(width), int(groups), full == "true") for t, width, groups, full in found
    }


def test_the_instances_that_ship_are_those_that_are_tested():
    assert compiled() == set(INSTANCES)


@pytest.mark.parametrize("one", INSTANCES, ids=lambda one: "-".join(map(str, one)))
def test_instance(one):
    """It is the one that its case launches, and it is right."""
    name = f"fwd_kernel<FwdForm<{one.dtype}, {one.width}, {one.groups}, {str(one.full).lower()}> >"
    with cuda_host.device(one.sms):
        found = kernels_of(lambda: forward(one.case(), DTYPES[one.dtype], seed=1))
    assert found == [name]


def test_many_rows_take_tall_tiles_and_few_do_not():
    """Where tiles of 128 rows still fill the device, and hardly more of them are padding."""
    for N, sms, groups in ((256, 1, 2), (256, 500, 1), (60, 1, 1), (200, 1, 2), (130, 1, 1)):
        case = Case("rows", 1, 2, N, 70, 64)
        with cuda_host.device(sms):
            found = kernels_of(lambda case=case: forward(case, torch.bfloat16))
        assert f"fwd_kernel<FwdForm<bf16, 64, {groups}, false> >" in found, (N, sms, found)


@pytest.mark.parametrize(
    "options", [{"scale": 0.0}, {"scale": -1.0}, {"D": 20}, {"layout": "misaligned"},
                {"mask": "M"}, {"bias": "1H1M"}, {"segments": "images"}, {"dropout_p": 0.1}],
    ids=str,
)  # fmt: skip
def test_what_the_plain_instances_do_not_take(options):
    case = Case("full", **{"B": 1, "H": 1, "N": 5, "M": 70, "D": 16, **options})
    (found,) = kernels_of(lambda: forward(case, torch.bfloat16))
    assert found == "fwd_kernel<FwdForm<bf16, 64, 1, true> >"


# --- splits of the keys ---------------------------------------------------------------------------

SPLIT_CASES = (
    Case("plain", 1, 2, 5, 700, 64, Dv=20),
    Case("odd", 1, 2, 5, 700, 33),
    Case("gates", 2, 4, 5, 700, 32, G=2, gate="full", kv_lens=(700, 130)),
    Case("causal", 1, 1, 70, 700, 32, is_causal=True, q_lens=(60,)),
    Case("nothing", 4, 1, 5, 700, 16, kv_lens=(700, 0, 3, 64)),
    Case("everything", 2, 4, 75, 700, 32, G=2, Dv=48, bias="B1NM", segments="images",
         segment_rule="at_most", mask="11NM", mask_kind="tiles", kv_lens=(700, 60), dropout_p=0.2,
         gate="head", is_causal=True),
)  # fmt: skip


@pytest.mark.parametrize("dtype", cuda_host.DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: case.name)
def test_splits(case, dtype):
    """Cut into splits and merged, the result is as right as in one piece."""
    with cuda_host.device(400):
        found = kernels_of(lambda: forward(case, dtype))
    assert len(found) == 2 and found[1] == f"merge_kernel<{NAMES[dtype]}>"
    with cuda_host.device(1):
        assert len(kernels_of(lambda: forward(case, dtype))) == 1


def test_a_split_keeps_what_is_not_a_number():
    """A NaN that a row sees is in its result, whatever the merge's weight of its split."""
    q, k, v = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 700, 16), torch.ones(1, 1, 700, 16)
    k[..., 650, 0], q[..., 1, 0] = float("nan"), 1.0
    with cuda_host.device(400):
        out, lse = mmfast.cross_attention(q, k, v, return_lse=True)[:2]
    assert out.isnan().all() and lse.isnan().all()  # 0 * NaN is NaN, in the first row as well


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sms", [1, 400])
@pytest.mark.parametrize(
    "case",
    [Case("plain", 1, 2, 150, 300, 64, is_causal=True), *SPLIT_CASES[2:]],
    ids=lambda case: case.name,
)
def test_the_same_bits_whatever_the_schedule(case, sms):
    """Warps and lanes take turns in another order each time."""
    inputs = make_inputs(case, torch.bfloat16).poisoned()
    library = cuda_host.library()
    results = []
    with cuda_host.device(sms):
        for schedule in (0, 0, 0, 1, 2):
            before = library.mmfast_host_schedule(schedule)
            cuda_host.seed(len(results))
            results.append(tolerance.run(mmfast.cross_attention, inputs, backward=False))
            library.mmfast_host_schedule(before)
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_many_keys(full):
    """Thousands of tiles, of keys that lie in one place: their mean is exact."""
    q = torch.randn(1, 1, 3, 32).bfloat16()
    k = torch.randn(1, 1, 1, 32).bfloat16().expand(1, 1, 70_001, 32)
    v = torch.full((1, 1, 1, 32), 0.5).bfloat16().expand(1, 1, 70_001, 32)
    mask = torch.ones(1, dtype=torch.bool) if full else None
    for sms in (1, 108):
        with cuda_host.device(sms):
            found = mmfast.cross_attention(q, k, v, mask=mask, return_lse=True)
        assert (found.out == 0.5).all()
        scores = (q.double() @ k[:, :, :1].double().mT).squeeze(-1) * 32**-0.5
        expected = scores + torch.tensor(70_001.0).double().log()
        torch.testing.assert_close(found.lse, expected.float(), rtol=1e-6, atol=1e-5)


def test_offsets_beyond_32_bits():
    """Keys and values of which the last is 2^33 bytes away: no other memory is touched."""
    far = 2**30
    memory = torch.empty(2 * far + 64, dtype=torch.float32)
    k = memory.as_strided((1, 1, 3, 32), (0, 0, far, 1))
    v = memory[32:].as_strided((1, 1, 3, 32), (0, 0, far, 1))
    k.copy_(torch.randn(1, 1, 3, 32))
    v.copy_(torch.randn(1, 1, 3, 32))
    q = torch.randn(1, 1, 5, 32)
    found = mmfast.cross_attention(q, k, v)
    expected = mmfast.reference.cross_attention(q, k.clone(), v.clone())
    torch.testing.assert_close(
        found, expected if isinstance(expected, torch.Tensor) else expected[0]
    )


def test_no_bank_conflicts():
    """Of ldmatrix, of the copies and of the stores, in a whole and in an odd width."""
    library = cuda_host.library()
    before = library.mmfast_host_counting(1)
    try:
        library.mmfast_host_clear_counters()
        for one in INSTANCES:
            if one.width in (32, 64, 96) and one.dtype != "f16":
                with cuda_host.device(one.sms):
                    forward(dataclasses.replace(one.case(), B=1, H=1, G=1, kv_lens=None),
                            DTYPES[one.dtype])  # fmt: skip
        found = {name: of for name, of in cuda_host.counters().items() if "fwd_kernel" in name}
    finally:
        library.mmfast_host_counting(before)
    assert len(found) == 8
    for name, of in found.items():
        assert of["ldmatrix"] > 0
        for what in ("ldmatrix_conflicts", "copy_conflicts", "shared_store_conflicts"):
            assert of[what] == 0, (name, what)
