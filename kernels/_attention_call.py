"""Between torch and the attention kernels: what they are given, their forms, memory of results.

A new shape compiles nothing new: sizes and strides are run-time integers that Triton does not
specialise; head widths, which dims a mask or bias has, and block sizes are constants, in `Form`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from mmfast.kernels import _tuning
from mmfast.kernels._launch import ceil_div, power_of_two, vector_width
from mmfast.kernels._tuning import AttentionTile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_STRIDED = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "gate", "mask", "bias")
INTEGERS = [
    *(f"{name}_{dim}" for name in _STRIDED for dim in "bhn"),
    "threshold", "heads", "G", "N", "M",
]  # fmt: skip
"""Names of the integers that the kernels share: `mask_b` is the stride of dim B of the mask."""

LOG2E = 1.4426950408889634
MIN_BLOCK = 16  # a side of a product on tensor cores
MAX_BLOCK = 256
WIDEST = 256  # a row of a tile that is held as a whole
MOST_PLANS = 4096
KEEP_EVERYWHERE = False  # for tests of what is kept


class Given(NamedTuple):
    """What may be given or not, and None where it is not; lengths and segments are int32.

    Made within a kernel: integers are passed one by one, because Triton compiles anew for the
    values of those that come in a tuple. The strides are those of dims B, H, N in units of the
    form's vec, 0 where the size is 1.
    """

    kv_lens: Any
    q_lens: Any
    q_segments: Any
    kv_segments: Any
    mask: Any
    bias: Any
    mask_strides: Any
    bias_strides: Any
    seed: Any
    threshold: Any  # of the random words that survive dropout, less 2**31


class Sizes(NamedTuple):
    """`heads` = H / G share a key head. Made within a kernel."""

    heads: Any
    G: Any
    N: Any
    M: Any


class Width(NamedTuple):
    """A head width, and the one or two powers of two (0: one) that hold it."""

    size: int
    first: int
    second: int


class Form(NamedTuple):
    """What a kernel is compiled for."""

    qk: Width
    v: Width
    vec: int  # strides of q, k, v and what is like them are in units of this many elements
    block_n: int
    block_m: int
    packed: bool
    causal: bool
    at_most: bool
    sparse: bool  # keys within the length may be seen by no row, and hold anything
    mask_dims: int
    mask_vec: int
    bias_dims: int
    bias_vec: int
    gate: int  # 0 none, 1 a logit for each head, 2 for each output
    dropout: bool
    negative: bool  # the scale, which comes without its sign
    precision: str
    weights: int  # gradient of the weights: 0 none, 1 of the head mean, 2 of each head
    far: bool  # rows of one tile lie more than 2^31 elements apart


@lru_cache(maxsize=256)
def parts(width: int, halve: int) -> Width:
    """One power of two that holds the width, or two where together they are less.

    Two halves as well from `halve` on: fewer registers are taken at once.
    """
    whole = max(MIN_BLOCK, power_of_two(width))
    first = whole // 2
    if whole >= halve and width > first + first // 2:
        return Width(width, first, first)
    second = max(MIN_BLOCK, power_of_two(width - first)) if width > first else 0
    if width > MIN_BLOCK and first + second < whole:
        return Width(width, first, second)
    return Width(width, whole, 0)


def pair_strides(tensor: Tensor | None) -> tuple[tuple[int, int, int], int, int]:
    """(strides, dims, vec) of a `[B|1, H|1, N|1, M|1]` tensor as `_attention.load_pairs` has it."""
    if tensor is None:
        return (0, 0, 0), 0, 1
    B, H, N, M = tensor.shape
    sb, sh, sn, _ = tensor.stride()
    strides = sb * (B > 1), sh * (H > 1), sn * (N > 1)
    vec = vector_width(tensor.element_size(), *strides) if M > 1 else 1
    sb, sh, sn = strides
    dims = 4 * (H > 1) + 2 * (N > 1) + (M > 1)
    return (sb // vec, sh // vec, sn // vec), dims, vec


def strides_of(tensor: Tensor, vec: int) -> tuple[int, int, int]:
    """Of dims B, H, N, in units of `vec` elements, 0 where the size is 1."""
    sb, sh, sn, _ = tensor.stride()
    B, H, N, _ = tensor.shape
    return sb * (B > 1) // vec, sh * (H > 1) // vec, sn * (N > 1) // vec


def common_vec(*tensors: Tensor) -> int:
    """The widest access that the strides of all these `[B, H, N, D]` tensors allow."""
    bits = 0
    for tensor in tensors:
        sb, sh, sn = strides_of(tensor, 1)
        bits |= sb | sh | sn
    return vector_width(tensors[0].element_size(), bits)


def empty_following(tensor: Tensor, width: int) -> Tensor:
    """An uninitialised `[B, H, N, width]` that lies in memory as `tensor` does."""
    B, H, N, _ = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((B, N, H, width)).transpose(1, 2)
    return tensor.new_empty((B, H, N, width))


def gate_strides(gate: Tensor | None) -> tuple[int, int, int]:
    """Of dims B, H, N of a `[B, N, H]` or `[B, N, H, Dv]` gate; 0 where B is 1, as when packed."""
    if gate is None:
        return 0, 0, 0
    return gate.stride(0) * (gate.shape[0] > 1), gate.stride(2), gate.stride(1)


def far(tensor: Tensor) -> bool:
    """Do offsets within one tile of its rows need more than 32 bits?"""
    return tensor.shape[2] > 1 and tensor.stride(2) >= 2**31 // MAX_BLOCK


def describe(tensor: Tensor, keys: int, width: Width) -> TensorDescriptor | None:
    """For `[1, 1, keys, part]` of a `[B, G, M, D]`; None where the hardware takes no such tensor.

    It wants addresses and strides in multiples of 16 bytes, and all parts are of one size here.
    """
    unit = 16 // tensor.element_size()
    if (width.second or width.first) != width.first or width.size % unit or tensor.numel() == 0:
        return None
    strides = [
        step if size > 1 else unit for step, size in zip(tensor.stride()[:3], tensor.shape[:3])
    ]
    aligned = tensor.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in strides)
    if not aligned:
        return None
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, keys, width.first])


def _packed_layout(tensor: Tensor) -> tuple[int, ...]:
    """What a launch depends on of a `[1, H, T, D]`: T, which is another in every batch, only where
    rows of a head lie together, so that strides of a result like it depend on T."""
    _, H, T, D = tensor.shape
    _, by_head, by_row, _ = tensor.stride()
    return H, D, by_head, by_row, T if by_head >= by_row else T > 1


def plan_key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    q_starts: Tensor | None,
    kv_starts: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    *scalars: float,
) -> tuple[Any, ...] | None:
    """All that a launch depends on but the tensors' addresses; None where it is not to be kept.

    Nothing is kept off the GPU, where tests change the rules, and while tiles are measured.
    """
    if not (q.is_cuda or KEEP_EVERYWHERE) or _tuning.TUNED:
        return None
    dense = kv_starts is None
    return (
        (q.shape, q.stride()) if q_starts is None else _packed_layout(q), q.dtype, q.device,
        (k.shape, k.stride(), v.shape, v.stride())
        if dense
        else (_packed_layout(k), _packed_layout(v)),
        kv_lens is None, q_lens is None, q_segments is None, kv_segments is None,
        None if mask is None else (mask.shape, mask.stride()),
        None if bias is None else (bias.shape, bias.stride(), bias.dtype),
        None if q_starts is None else q_starts.shape,
        None if kv_starts is None else kv_starts.shape,
        None if gate is None else (gate.stride(), gate.dtype), seed is None, scalars,
        q.dtype is torch.float32 and _tuning.precision(q.device, q.dtype),
    )  # fmt: skip


class Call:
    """The arguments of an op, ready for its kernels."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        kv_lens: Tensor | None,
        q_lens: Tensor | None,
        q_segments: Tensor | None,
        kv_segments: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None,
        q_starts: Tensor | None,
        kv_starts: Tensor | None,
        gate: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        is_causal: bool,
        segment_rule: int,
        max_q: int,
        max_kv: int,
    ) -> None:
        self.q, self.k, self.v, self.gate = q, k, v, gate
        self.q_starts, self.kv_starts = q_starts, kv_starts
        self.B, self.H, self.N, self.D = q.shape
        self.G, self.M = k.shape[1], k.shape[2]
        if q_starts is not None:
            self.B, self.N = q_starts.numel() - 1, max_q
        if kv_starts is not None:
            self.B, self.M = kv_starts.numel() - 1, max_kv
        self.Dv = self.D if v is None else v.shape[3]
        self.heads = self.H // self.G
        self.scale = abs(scale) * LOG2E
        self.natural_scale = scale
        self.signed_scale = scale * LOG2E
        self.keep_scale = 1.0 / (1.0 - dropout_p)
        mask_strides, mask_dims, mask_vec = pair_strides(mask)
        bias_strides, bias_dims, bias_vec = pair_strides(bias)
        threshold = 0
        if seed is not None:
            threshold = min(int(dropout_p * 2**32), 2**32 - 1) - 2**31
        self.bias = bias
        self.given = (
            kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, seed
        )  # fmt: skip
        self.sizes = (
            *mask_strides, *bias_strides, threshold, self.heads, self.G, self.N, self.M
        )  # fmt: skip
        narrow, narrow_v = _tuning.halves(_tuning.arch(q.device), q.element_size())
        self.form = Form(
            parts(self.D, narrow), parts(self.Dv, narrow_v), 1, 0, 0, False, is_causal,
            segment_rule == 1, mask is not None or kv_segments is not None, mask_dims, mask_vec,
            bias_dims, bias_vec, 0 if gate is None else gate.dim() - 2, seed is not None,
            scale < 0, _tuning.precision(q.device, q.dtype), 0,
            any(far(tensor) for tensor in (q, k, v) if tensor is not None),
        )  # fmt: skip

    def tile(self, kernel: str) -> AttentionTile:
        """The block sizes of a kernel for this call."""
        return _tuning.attention_tile(
            kernel,
            _tuning.arch(self.q.device),
            max(width.first + width.second for width in (self.form.qk, self.form.v)),
            self.q.element_size(),
            self.heads * self.N,
            self.M,
            # The pass over keys has no path without causal masks.
            self.form.sparse
            or self.form.dropout
            or self.bias is not None
            or (kernel == "dkv" and self.form.causal),
            _tuning.tuned(self.q.device),
        )

    def described(self, form: Form) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """Descriptors of k and v for the tiles of a form, where that pays and layouts allow."""
        if not self.wants_descriptors():
            return None, None
        described_v = None if self.v is None else describe(self.v, form.block_m, form.v)
        return describe(self.k, form.block_m, form.qk), described_v

    def wants_descriptors(self) -> bool:
        """See `_tuning.wants_descriptors`."""
        work = self.B * self.H * self.N * self.M * (self.D + self.Dv)
        return _tuning.wants_descriptors(_tuning.arch(self.q.device), work)

    def row_tiles(self, rows: int) -> tuple[bool, int, int]:
        """(packed, tiles of a head, tiles of a key head) with so many rows to a tile."""
        heads = self.heads
        if heads > 1 and rows > self.N:
            return True, 1, ceil_div(heads * self.N, rows)
        each = ceil_div(self.N, rows)
        return False, each, heads * each
