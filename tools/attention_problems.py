"""The calls of the attention launchers that tools/attention_report.py compiles, and their work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_model import Work
from mmfast.kernels import _tuning
from mmfast.kernels._tuning import AttentionTile
from triton_problems import tensor
from triton_report import Launch, recorded

# FLOP of one pair of a query and a key, for each element of a head: two for each product.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "pairs": 2}


@dataclass(frozen=True)
class Shape:
    """[B, H, N, M, D], with G key heads."""

    B: int
    H: int
    N: int
    M: int
    D: int
    G: int = 0

    @property
    def groups(self) -> int:
        """Key heads."""
        return self.G or self.H


def shape_of(width: int) -> Shape:
    """FlashAttention-2's headline shape for a width: 16k tokens, 2048 channels or nearly.

    arXiv:2307.08691, section 4.1.
    """
    return Shape(2, max(1, 2048 // width), 8192, 8192, width)


# What multimodal models have: the cases of the benchmark suite.
OURS = {
    "vqa": Shape(8, 12, 40, 36, 64),
    "caption": Shape(8, 12, 128, 197, 64),
    "qformer": Shape(8, 12, 32, 257, 64),
    "align": Shape(16, 8, 64, 50, 64),
    "mllama": Shape(2, 16, 128, 1601, 128),
    "detect": Shape(4, 8, 100, 850, 32),
    "speech": Shape(2, 12, 448, 1500, 64),
    "pool": Shape(8, 12, 1, 577, 64),
    "square": Shape(1, 12, 2048, 2048, 64),
}

BACKWARD = ("dq", "dkv", "pairs")

# Without options, with one each, with a key head for four heads, with the rows of all items packed.
FORMS = (
    "dense", "lengths", "causal", "segments", "mask", "bias", "gate", "dropout", "grouped",
    "packed",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A call: "fwd" or "bwd", with one option (`form`) or none ("dense").

    Of the form "bias gradient" the bias is that of all items, `[1, H, N, M]`, and needs a gradient;
    "shared": the keys are the values, and one key head has them for all.
    """

    way: str
    form: str
    shape: Shape
    only: str = ""  # of the kernels: the one that matters

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those with a loop of products that matter here."""
        if self.only:
            return (self.only,)
        if self.way == "fwd":
            return ("fwd",)
        return BACKWARD if self.form == "bias gradient" else BACKWARD[:2]

    def launches(self, dtype: torch.dtype, target: str, tile: AttentionTile | None) -> list[Launch]:
        """What the launcher launches on a target; with `tile` if one is given."""
        with _chosen(target, tile), recorded() as launches:
            if self.way == "fwd":
                self._forward(dtype)
            else:
                self._backward(dtype)
        return launches

    def _inputs(
        self, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor | None], list[Any], tuple[Any, ...]]:
        s, form = self.shape, self.form
        if form in ("grouped", "shared"):
            s = replace(s, G=1 if form == "shared" else max(1, s.H // 4))
        packed = form == "packed"
        B, N, M = (1, s.B * s.N, s.B * s.M) if packed else (s.B, s.N, s.M)
        q = tensor(dtype, B, N, s.H, s.D).transpose(1, 2)
        k, v = (tensor(dtype, B, M, s.groups, s.D).transpose(1, 2) for _ in range(2))
        integers = {
            "kv_lens": (s.B,), "q_lens": (s.B,), "q_segments": (s.B, s.N),
            "kv_segments": (s.B, s.M),
        }  # fmt: skip
        given = {
            "lengths": ("kv_lens",), "segments": ("q_segments", "kv_segments"),
            "packed": ("kv_lens", "q_lens"),
        }.get(form, ())  # fmt: skip
        options: list[Any] = [
            tensor(torch.int32, *integers[name]) if name in given else None
            for name in ("kv_lens", "q_lens", "q_segments", "kv_segments")
        ]
        options += [
            tensor(torch.bool, s.B, 1, s.N, s.M) if form == "mask" else None,
            tensor(dtype, 1, s.H, s.N, s.M) if form.startswith("bias") else None,
            tensor(torch.int32, s.B + 1) if packed else None,
            tensor(torch.int32, s.B + 1) if packed else None,
            tensor(dtype, s.B, s.N, s.H) if form == "gate" else None,
            tensor(torch.int64, 1) if form == "dropout" else None,
        ]
        numbers = s.D**-0.5, 0.1 if form == "dropout" else 0.0, form == "causal", 0
        numbers += (s.N, s.M) if packed else (0, 0)
        return [q, k, None if form == "shared" else v], options, numbers

    def _forward(self, dtype: torch.dtype) -> None:
        from mmfast.kernels.cross_attention import cross_attention_fwd

        tensors, options, numbers = self._inputs(dtype)
        cross_attention_fwd(*tensors, *options, *numbers)

    def _backward(self, dtype: torch.dtype) -> None:
        from mmfast.kernels.cross_attention_bwd import cross_attention_bwd

        tensors, options, numbers = self._inputs(dtype)
        q = tensors[0]
        s = self.shape
        lse = tensor(torch.float32, s.B, s.H, s.N)
        cross_attention_bwd(
            torch.empty_like(q), None, *tensors, torch.empty_like(q), lse, *options, *numbers,
            self.form == "bias gradient", True,
        )  # fmt: skip


@contextmanager
def _chosen(target: str, tile: AttentionTile | None) -> Iterator[None]:
    """The tuning table as on a device of a target; one tile for every kernel if given."""
    before = _tuning.arch, _tuning.attention_tile, _tuning.precision

    def precision(device: torch.device, dtype: torch.dtype) -> str:
        return "tf32x3" if dtype == torch.float32 and target.startswith("sm_") else "ieee"

    _tuning.arch, _tuning.precision = lambda device: target, precision
    if tile is not None:
        _tuning.attention_tile = lambda *key: tile
    try:
        yield
    finally:
        _tuning.arch, _tuning.attention_tile, _tuning.precision = before


def part_of(launch: Launch) -> str:
    """ "fwd", "merge", "dq", "dkv" ... of a kernel's name."""
    name = launch.kernel.__name__.removeprefix("cross_attention_").removesuffix("_kernel")
    return name.removeprefix("bwd_")


def work_of(launch: Launch, shape: Shape, itemsize: int) -> Work:
    """The work of a kernel that goes over tiles of keys (fwd, dq) or of rows (dkv)."""
    part, form = part_of(launch), launch.constants["FORM"]
    s, rows, keys = shape, form.block_n, form.block_m
    pairs = s.B * s.H * s.N * s.M
    padded = s.B * s.H * _up(s.N, rows) * _up(s.M, keys)
    if form.packed:
        padded = s.B * s.groups * _up(s.H // s.groups * s.N, rows) * _up(s.M, keys)
    trips = padded / (rows * keys) / launch.programs
    read = keys if part != "dkv" else rows
    unit = (s.B * s.H * s.N + s.B * s.groups * s.M) * s.D * itemsize
    return Work(
        programs=launch.programs,
        trips=trips,
        flop=2 * PRODUCTS[part] * pairs * s.D,
        bytes=unit * {"fwd": 2, "dq": 2.5, "dkv": 3, "pairs": 2}[part],
        l2_bytes=launch.programs * trips * read * 2 * s.D * itemsize,
    )


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
