"""One attention problem and the ways to compute it: mmfast and its peers.

All take the same tensors, in the memory layout of the registry's case (that of a projection). What
a peer needs besides, the boolean mask of the lengths, is made before the clock starts, in the
peer's favour. `eager` is what people write by hand, `sdpa` is `F.scaled_dot_product_attention`,
`compile` is `torch.compile` of `eager` at fixed shapes. The others are in peers.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import mmfast
from mmfast.testing.cases import Case, make_inputs

from . import liger, peers
from .peers import Inputs
from .problems import BaseProblem

OP = "cross_attention"
PEERS = ("eager", "sdpa", *peers.SDPA, "compile", *(peers.FLEX, *peers.PACKAGES), liger.NAME)
"""In the order of the tables; where each is measured, `peers.offered` and `liger.offered` say."""
IMPLS = ("mmfast", *PEERS)

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem(BaseProblem):
    """A case of the attention registry. Lengths are the only option timed here."""

    case: Case
    case_type: ClassVar[type] = Case

    @property
    def name(self) -> str:
        """The case without its raggedness, which is a column of its own."""
        return self.case.name.removesuffix("_ragged")

    @property
    def ragged(self) -> bool:
        return self.case.ragged

    def bytes(self) -> float:
        """That must be moved: the forward reads q, k, v and writes out; the backward reads these
        and dout and writes dq, dk, dv. Padded keys are not read; their gradients are written."""
        c = self.case
        valid = sum(c.kv_lens) if c.kv_lens is not None else c.B * c.M
        rows, keys = c.B * c.N * c.H, valid * c.G
        elements = (rows + keys) * (c.D + c.Dv)
        if self.trains:
            elements += 2 * rows * (c.D + c.Dv) + (keys + c.B * c.M * c.G) * (c.D + c.Dv)
        return float(elements * self.torch_dtype.itemsize)

    def tiny(self) -> Problem:
        """The same kind of problem with next to no work."""
        lens = (8, 4) if self.case.ragged else None
        small = dataclasses.replace(self.case, B=2, H=2, G=2, N=8, M=8, kv_lens=lens)
        return dataclasses.replace(self, case=small)

    def inputs(self, device: torch.device | str) -> Inputs:
        """The registry's tensors; q, k and v require gradients when the direction says so."""
        made = make_inputs(self.case, self.torch_dtype)
        q, k, v = (x.to(device).requires_grad_(self.trains) for x in (made.q, made.k, made.v))
        lens = mask = dout = None
        if self.case.ragged:
            lens = made.options["kv_lens"].to(device)
            mask = (torch.arange(self.case.M, device=device) < lens[:, None])[:, None, None, :]
        if self.trains:  # as it comes from an output projection: [B, N, H, D] in memory
            dout = made.dout.to(device).transpose(1, 2).contiguous().transpose(1, 2)
        return Inputs(q, k, v, lens, mask, dout)


def eager(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, mask: Tensor | None) -> Tensor:
    """The usual four lines."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention, with the mask where lengths are ragged."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def fused(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, mask: Tensor | None) -> Tensor:
    """mmfast, with the lengths."""
    return mmfast.cross_attention(q, k, v, kv_lens=kv_lens)


def function_of(impl: str) -> Attention:
    """The function of an implementation's name. Raises KeyError for an unknown one."""
    return {"mmfast": fused, "eager": eager, "sdpa": sdpa, "compile": eager}[impl]


def freshly_compiled(function: Callable[..., Any], keep: bool = False) -> Callable[..., Any]:
    """`torch.compile` for one problem. What was compiled before is forgotten, because past its
    limit of recompilations dynamo runs the function uncompiled without a word; `keep` it where
    another implementation of the same problem is among it."""
    if not keep:
        torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def make_run(attention: Attention, inputs: Inputs) -> Run:
    """A call of the implementation on these inputs: `(out,)`, or `(out, dq, dk, dv)`."""
    q, k, v, kv_lens, mask, dout = inputs

    def forward() -> tuple[Tensor, ...]:
        return (attention(q, k, v, kv_lens, mask),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attention(q, k, v, kv_lens, mask)
        return (out, *torch.autograd.grad(out, (q, k, v), dout))

    return forward if dout is None else forward_backward
