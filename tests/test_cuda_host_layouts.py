"""Which lane holds which element: the host run's mma and ldmatrix against two other statements.

The first is written down here from the PTX manual ("Matrix Fragments for mma.m16n8k16", "...
mma.m16n8k8", "ldmatrix") and holds the host run in every test run. The second is CuTe's, read from
NVIDIA's headers (PyPI: nvidia-cutlass), and holds the first; it needs that package.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "cuda_host_layouts.cu"
LANES = range(32)

# (lane, number of the element among the lane's) -> (row, column): A is [M, K], B [N, K], C [M, N].
Place = Callable[[int, int], tuple[int, int]]


def _a16(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)


def _b16(lane: int, i: int) -> tuple[int, int]:
    return lane // 4, 2 * (lane % 4) + i % 2 + 8 * (i // 2)


def _a8(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)


def _b8(lane: int, i: int) -> tuple[int, int]:
    return lane // 4, lane % 4 + 4 * i


def _c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


PLACES: dict[str, tuple[Place, Place, int]] = {
    "bf16": (_a16, _b16, 16),
    "f16": (_a16, _b16, 16),
    "tf32": (_a8, _b8, 8),
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def matrix_place(lane: int, register: int, half: int, transposed: bool) -> tuple[int, int]:
    """(row among all rows, element of 16 bits) that ldmatrix gives a lane."""
    row, element = lane // 4, 2 * (lane % 4) + half
    return (8 * register + element, row) if transposed else (8 * register + row, element)


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    if str(ROOT / "tools") not in sys.path:
        sys.path.insert(0, str(ROOT / "tools"))
    import host_build
    import native_build

    try:
        path = host_build.build("plain", name="layouts", ops=(), sources=(SOURCE,))
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    return ctypes.CDLL(str(path))


def fragment(matrix: torch.Tensor, place: Place, count: int) -> np.ndarray:
    """`[32, words]`: what each lane holds of a matrix, as 32-bit words."""
    elements = torch.stack(
        [torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in LANES]
    )
    return elements.contiguous().view(torch.int32).numpy().astype(np.uint32)


@pytest.mark.parametrize("kind", PLACES)
def test_products(kind: str) -> None:
    """Whole numbers, which every dtype holds and every order of sums gives exactly."""
    place_a, place_b, depth = PLACES[kind]
    made = torch.Generator().manual_seed(3)
    a = torch.randint(-8, 9, (16, depth), generator=made).to(DTYPES[kind])
    b = torch.randint(-8, 9, (8, depth), generator=made).to(DTYPES[kind])
    c = torch.randint(-99, 99, (16, 8), generator=made).float()
    words = 16 // DTYPES[kind].itemsize
    held_a, held_b = fragment(a, place_a, words), fragment(b, place_b, words // 2)
    held_c = np.array([[c[_c(lane, i)] for i in range(4)] for lane in LANES], np.float32)
    status = library().run_product(
        kind.encode(), *(ctypes.c_void_p(x.ctypes.data) for x in (held_a, held_b, held_c))
    )
    assert status == 0
    wanted = a.double() @ b.double().T + c.double()
    for lane, i in itertools.product(LANES, range(4)):
        assert held_c[lane, i] == wanted[_c(lane, i)], (lane, i)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("matrices", [2, 4])
def test_matrices(matrices: int, transposed: bool) -> None:
    rows = np.zeros(32 * 8 + 8, np.uint16)
    rows = rows[-rows.ctypes.data % 16 // 2 :][: 32 * 8].reshape(32, 8)  # aligned to 16 bytes
    rows[:] = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    loaded = np.zeros((32, 4), np.uint32)
    library().run_matrices(
        matrices, int(transposed), *(ctypes.c_void_p(x.ctypes.data) for x in (rows, loaded))
    )
    for lane, register, half in itertools.product(LANES, range(matrices), range(2)):
        wanted = rows[matrix_place(lane, register, half, transposed)]
        assert loaded[lane, register] >> (16 * half) & 0xFFFF == wanted, (lane, register, half)


# --- CuTe -----------------------------------------------------------------------------------------


def _headers() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "source" / "include" / "cute"
    return path / "atom" if path.exists() else None


needs_cute = pytest.mark.skipif(
    _headers() is None, reason="CuTe's headers: pip install --no-deps nvidia-cutlass"
)


class Layout:
    """`Layout<Shape<...>, Stride<...>>`: the place of (thread, value), first modes fastest."""

    def __init__(self, text: str) -> None:
        nested = re.sub(r"\b(?:Shape|Stride)\b|\s", "", text)
        nested = re.sub(r"_(\d+)", r"\1", nested).replace("<", "[").replace(">", "]")
        self.shape, self.stride = json.loads(f"[{nested}]")

    def __call__(self, thread: int, value: int) -> int:
        return sum(
            _offset(index, shape, stride)
            for index, shape, stride in zip((thread, value), self.shape, self.stride)
        )


def _offset(index: int, shape: int | list[int], stride: int | list[int]) -> int:
    if isinstance(shape, int) and isinstance(stride, int):
        return index * stride
    assert isinstance(shape, list) and isinstance(stride, list)
    total = 0
    for size, step in zip(shape, stride):
        total, index = total + index % size * step, index // size
    return total


def cute_layout(header: str, owner: str, name: str) -> Layout:
    """A layout of a traits class, followed through base classes and aliases of the header."""
    folder = _headers()
    assert folder is not None
    text = (folder / header).read_text()
    found = re.search(
        rf"struct \w+_Traits<{owner}>(?P<base>[^{{]*){{(?P<body>.*?)\n}};", text, re.S
    )
    assert found, f"{header} has no traits of {owner}"
    alias = re.search(rf"using {name}\s*=\s*(.*?);", found["body"], re.S)
    if alias is None:
        base = re.search(r"_Traits<(\w+)>", found["base"])
        assert base, f"{owner} has no {name}"
        return cute_layout(header, base[1], name)
    said = alias[1].strip()
    if not said.startswith("Layout<"):
        named = re.search(rf"using {said}\s*=\s*(.*?);", text, re.S)
        assert named, said
        said = named[1].strip()
    return Layout(said.removeprefix("Layout<").removesuffix(">"))


@needs_cute
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, owner",
    [
        ("bf16", "SM80_16x8x16_F32BF16BF16F32_TN"),
        ("f16", "SM80_16x8x16_F32F16F16F32_TN"),
        ("tf32", "SM80_16x8x8_F32TF32TF32F32_TN"),
    ],
)
def test_products_are_cutes(kind: str, owner: str) -> None:
    place_a, place_b, depth = PLACES[kind]
    values = 16 * depth // 32
    for name, place, count, rows in (
        ("ALayout", place_a, values, 16),
        ("BLayout", place_b, values // 2, 8),
        ("CLayout", _c, 4, 16),
    ):
        layout = cute_layout("mma_traits_sm80.hpp", owner, name)
        for lane, i in itertools.product(LANES, range(count)):
            row, column = place(lane, i)
            assert layout(lane, i) == row + rows * column, (name, lane, i)


@needs_cute
@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, matrices, transposed",
    [
        ("SM75_U32x2_LDSM_N", 2, False),
        ("SM75_U32x4_LDSM_N", 4, False),
        ("SM75_U16x4_LDSM_T", 2, True),
        ("SM75_U16x8_LDSM_T", 4, True),
    ],
)
def test_matrices_are_cutes(owner: str, matrices: int, transposed: bool) -> None:
    """CuTe counts bits: 128 of each row, in the order of the rows."""
    layout = cute_layout("copy_traits_sm75.hpp", owner, "DstLayout")
    for lane, register, half in itertools.product(LANES, range(matrices), range(2)):
        row, element = matrix_place(lane, register, half, transposed)
        bit = layout(lane, 32 * register + 16 * half)
        assert bit == 128 * row + 16 * element, (lane, register, half)
