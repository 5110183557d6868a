"""What the tests of `mmfast.nn.MultiheadAttention` share: twins, runs, comparisons, masks.

Weights are N(0, 1.6 / sqrt(fan_in)), so that the softmax has something to decide and a wrong scale,
a lost mask or a lost bias shows. Errors are judged against PyTorch in float64.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from nn_helpers import Calls, assert_near, loud
from torch import Tensor

import mmfast.nn._projected_attention as implementation
from mmfast.nn import MultiheadAttention

B, L, S, E, H = 3, 5, 7, 24, 4
INF = float("inf")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="calls")
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counter = Calls()
    monkeypatch.setattr(implementation, "cross_attention", counter)
    return counter


def pair(**options: Any) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    """PyTorch's module and ours with the same weights (copies)."""
    options = {"embed_dim": E, "num_heads": H, "batch_first": True, **options}
    theirs = loud(torch.nn.MultiheadAttention(**options))
    ours = MultiheadAttention(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(module: Any, inputs: list[Tensor], same: str, **options: Any) -> dict[str, Tensor]:
    """Results and all gradients of one call, by name. `same`: which inputs are one."""
    dtype = module.out_proj.weight.dtype
    query, key, value = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs)
    if same in ("self", "kv"):
        value = key
    if same == "self":
        query = key
    leaves = {"query": query, "key": key, "value": value}
    for name in ("attn_mask", "key_padding_mask"):
        mask = options.get(name)
        if mask is not None and mask.is_floating_point():
            mask = options[name] = mask.detach().to(dtype, copy=True)
            if not ((mask == 0) | (mask == -INF)).all():  # not just a bool mask in other clothes
                leaves[name] = mask.requires_grad_()

    module.zero_grad()
    out, weights = module(query, key, value, **options)
    results = {"out": out} if weights is None else {"out": out, "weights": weights}
    generator = torch.Generator().manual_seed(5)
    loss = out.new_zeros(())
    for result in results.values():
        loss = loss + (result * torch.randn(result.shape, generator=generator).to(dtype)).sum()
    loss.backward()
    for name, leaf in (*leaves.items(), *module.named_parameters()):
        results["d" + name] = leaf.grad
    return {name: tensor.detach() for name, tensor in results.items()}


def check(
    theirs: torch.nn.MultiheadAttention,
    ours: MultiheadAttention,
    inputs: list[Tensor],
    same: str = "kv",
    **options: Any,
) -> None:
    """Ours is as close to PyTorch in float64 as PyTorch in the same dtype is, times 3."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        exact = run(copy.deepcopy(theirs).double(), inputs, same, **options)
        eager = run(theirs, inputs, same, **options)
        got = run(ours, inputs, same, **options)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert_near(name, got[name], expected, eager[name])


OPEN = 2


def padding_mask(kind: str, batch: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind.startswith("right"):
        lens = torch.tensor([keys, OPEN + 1, OPEN + 2, 5, 6][:batch])
        masked = torch.arange(keys) >= lens[:, None]
    elif kind.startswith("left"):
        masked = torch.arange(keys) < torch.tensor([0, OPEN, 1][:batch])[:, None]
    else:
        masked = torch.rand(batch, keys) < 0.4
        masked[:, OPEN] = False
        masked[0, OPEN - 1] = True
    if kind.endswith("inf"):
        return torch.zeros(batch, keys).masked_fill(masked, -INF)
    if kind.endswith("values"):
        return torch.randn(batch, keys).masked_fill(masked, -INF)
    return masked


def attention_mask(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (queries, keys) if "2d" in kind else (batch * H, queries, keys)
    masked = torch.rand(shape) < 0.3
    masked[..., OPEN] = False
    if kind.startswith("bool"):
        return masked
    return torch.randn(shape).masked_fill(masked, -INF)
