"""The peers of attention that not every machine and not every problem has: SDPA's backends by name,
FlexAttention, torch's attention over packed sequences, flash-attn, xFormers.

A peer gets the problem in the layout it likes best, `[B, N, H, D]` or with the valid keys packed
one after the other, and gives its gradients in that layout: what it takes to get there and back is
done outside the clock, in the peer's favour. A package is imported only where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Results = tuple[Tensor, ...]

SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
FLEX = "flex"
PACKAGES = {
    "varlen": ("torch.nn.attention.varlen", "this PyTorch has no torch.nn.attention.varlen"),
    "flash_attn": ("flash_attn", "not installed; pip install flash-attn"),
    "flash_attn_3": ("flash_attn_interface", "not installed; build hopper/ of flash-attention"),
    "xformers": ("xformers", "not installed; pip install xformers"),
}
"""By peer: the module that has to be there, and what is said where it is not."""
NAMES = (*SDPA, FLEX, *PACKAGES)
_HALF = (torch.float16, torch.bfloat16)


class CannotTakeError(RuntimeError):
    """A peer does not do this problem; the message says why."""


class Inputs(NamedTuple):
    """`kv_lens [B]` int32 and `mask [B,1,1,M]` bool (True = may attend) say the same; None = dense.
    `dout` is None for a forward alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv_lens: Tensor | None
    mask: Tensor | None
    dout: Tensor | None


class Prepared(NamedTuple):
    """A peer ready to run: `call(*leaves)` gives out, whose gradient is `dout` (None: forward).

    `restored` makes `[B, H, N, D]` of what a run returns, `(out,)` or `(out, dq, dk, dv)`.
    """

    leaves: tuple[Tensor, Tensor, Tensor]
    call: Call
    dout: Tensor | None
    restored: Callable[[Results], Results]

    def run(self) -> Results:
        out = self.call(*self.leaves)
        if self.dout is None:
            return (out,)
        return (out, *torch.autograd.grad(out, self.leaves, self.dout))


def offered(on: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """The peers to try on this device, and why others are not there."""
    if on.type != "cuda":
        return (FLEX,), {}
    absent = {}
    for name, (module, why) in PACKAGES.items():
        if not _is_there(module):
            absent[name] = why
    return tuple(name for name in NAMES if name not in absent), absent


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent is not there
        return False


def prepare(name: str, inputs: Inputs, compiler: Callable[[Any], Any]) -> Prepared:
    """The peer of this name on these inputs; `compiler` is torch.compile for this one problem.

    Raises CannotTakeError where it is known not to do the problem; other exceptions come from the
    peer itself. KeyError for an unknown name.
    """
    if name in SDPA:
        return _sdpa(SDPA[name], inputs)
    if name == FLEX:
        return _flex(inputs, compiler)
    makers = {
        "varlen": _varlen,
        "flash_attn": _flash_attn,
        "flash_attn_3": _flash_attn,
        "xformers": _xformers,
    }
    return makers[name](inputs, importlib.import_module(PACKAGES[name][0]))


# --- in place: [B, H, N, D] ---------------------------------------------------------------------


def _in_place(inputs: Inputs, call: Call) -> Prepared:
    return Prepared((inputs.q, inputs.k, inputs.v), call, inputs.dout, tuple)


def _sdpa(backend: SDPBackend, inputs: Inputs) -> Prepared:
    if backend is SDPBackend.FLASH_ATTENTION and inputs.mask is not None:
        raise CannotTakeError("SDPA's flash backend takes no mask")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask)

    return _in_place(inputs, call)


def _flex(inputs: Inputs, compiler: Callable[[Any], Any]) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, lens = inputs.q, inputs.k, inputs.kv_lens
    if q.device.type == "cpu" and inputs.dout is not None:
        raise CannotTakeError("FlexAttention has no backward on the CPU")
    block_mask = None
    if lens is not None:

        def within(b: Tensor, h: Tensor, n: Tensor, m: Tensor) -> Tensor:
            return m < lens[b]

        sizes = (q.shape[0], None, q.shape[2], k.shape[2])
        block_mask = create_block_mask(within, *sizes, device=q.device)
    compiled = compiler(flex_attention)
    return _in_place(inputs, lambda q, k, v: compiled(q, k, v, block_mask=block_mask))


# --- [B, N, H, D], or packed --------------------------------------------------------------------


def _sequence_first(inputs: Inputs, call: Call) -> Prepared:
    """`call` takes and gives `[B, N, H, D]`."""
    trains = inputs.dout is not None
    leaves = tuple(
        x.detach().transpose(1, 2).requires_grad_(trains) for x in (inputs.q, inputs.k, inputs.v)
    )
    dout = None if inputs.dout is None else inputs.dout.transpose(1, 2)
    return Prepared(leaves, call, dout, lambda results: tuple(x.transpose(1, 2) for x in results))


class Packing(NamedTuple):
    """How sequences lie one after the other: int32 `[B + 1]` offsets and the longest of each."""

    q_offsets: Tensor
    kv_offsets: Tensor
    N: int
    M: int


def _packed(inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor, Packing], Tensor]) -> Prepared:
    """`call` takes `[B * N, H, D]` rows and `[sum of lens, H, D]` keys and values."""
    q, k, v, lens, mask, dout = inputs
    assert lens is not None and mask is not None
    B, H, N, _ = q.shape
    M = k.shape[2]
    valid = mask.flatten().nonzero().squeeze(1)

    def rows(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 2).flatten(0, 1)

    leaves = tuple(
        x.requires_grad_(dout is not None) for x in (rows(q), rows(k)[valid], rows(v)[valid])
    )
    steps = torch.full_like(lens, N)
    offsets = [F.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in (steps, lens)]
    packing = Packing(*offsets, N, int(lens.max()))

    def padded(x: Tensor) -> Tensor:
        whole = x.new_zeros(B * M, H, x.shape[-1]).index_copy(0, valid, x)
        return whole.unflatten(0, (B, M)).transpose(1, 2)

    def restored(results: Results) -> Results:
        of_rows = [x.detach().unflatten(0, (B, N)).transpose(1, 2) for x in results[:2]]
        return (*of_rows, *(padded(x) for x in results[2:]))

    return Prepared(
        leaves,
        lambda q, k, v: call(q, k, v, packing),
        None if dout is None else rows(dout),
        restored,
    )


def _need_half(who: str, inputs: Inputs) -> None:
    if inputs.q.dtype not in _HALF:
        raise CannotTakeError(f"{who} takes float16 and bfloat16")


def _varlen(inputs: Inputs, module: Any) -> Prepared:
    _need_half("torch's varlen_attn", inputs)
    if inputs.kv_lens is None:
        raise CannotTakeError("varlen_attn is for ragged problems; sdpa_flash is its dense form")
    return _packed(
        inputs,
        lambda q, k, v, p: module.varlen_attn(q, k, v, p.q_offsets, p.kv_offsets, p.N, p.M),
    )


def _flash_attn(inputs: Inputs, module: Any) -> Prepared:
    _need_half("flash-attn", inputs)

    def first(result: Any) -> Tensor:  # some versions give the LSE as well
        return result[0] if isinstance(result, tuple) else result

    if inputs.kv_lens is None:
        return _sequence_first(inputs, lambda q, k, v: first(module.flash_attn_func(q, k, v)))
    return _packed(
        inputs,
        lambda q, k, v, p: first(
            module.flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_q=p.q_offsets,
                cu_seqlens_k=p.kv_offsets,
                max_seqlen_q=p.N,
                max_seqlen_k=p.M,
            )
        ),
    )


def _xformers(inputs: Inputs, module: Any) -> Prepared:
    ops = importlib.import_module("xformers.ops")
    if inputs.kv_lens is None:
        return _sequence_first(inputs, ops.memory_efficient_attention)
    lens = inputs.kv_lens.tolist()
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens([inputs.q.shape[2]] * len(lens), lens)

    def call(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        one = (x.unsqueeze(0) for x in (q, k, v))
        return ops.memory_efficient_attention(*one, attn_bias=bias).squeeze(0)

    return _packed(inputs, call)
