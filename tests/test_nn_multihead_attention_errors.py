"""Errors and warnings of `mmfast.nn.MultiheadAttention`, and the example in its docstring."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from mha_helpers import (  # noqa: F401  fixtures
    B,
    E,
    H,
    L,
    MultiheadAttention,
    S,
    counted_calls,
    implementation,
    pair,
    seeded,
)
from torch import Tensor

# --- errors and warnings -----------------------------------------------------------------------

Q, K = torch.zeros(B, L, E), torch.zeros(B, S, E)
MISTAKES: list[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any], str]] = [
    ("1-D query", (Q[0, 0], K, K), {}, "2D or batched 3D tensor but received 1-D"),
    ("2-D key", (Q, K[0], K), {}, "`value` to be 3-D but found 2-D and 3-D tensors"),
    ("2-D value", (Q, K, K[0]), {}, "`value` to be 3-D but found 3-D and 2-D tensors"),
    ("3-D key", (Q[0], K, K[0]), {}, "`value` to be 2-D but found 3-D and 2-D tensors"),
    ("width", (Q[..., 1:], K, K), {}, "expecting embedding dimension of 24, but got 23"),
    ("key width", (Q, K[..., 1:], K), {}, "key has width 23 and value 24"),
    ("key count", (Q, K, K[:, 1:]), {}, "key's sequence and batch dims"),
    ("batch", (Q[1:], K, K), {}, "query has batch size 2 but key has 3"),
    ("dtype", (Q.double(), K, K), {}, "have dtypes torch.float64, torch.float32"),
    (
        "padding dims",
        (Q, K, K),
        {"key_padding_mask": torch.zeros(S, dtype=torch.bool)},
        "expected `key_padding_mask` to be `None` or 2-D but found 1-D",
    ),
    (
        "padding shape",
        (Q, K, K),
        {"key_padding_mask": torch.zeros(B, L, dtype=torch.bool)},
        r"expected key_padding_mask of shape \(3, 7\)",
    ),
    (
        "padding dtype",
        (Q, K, K),
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.uint8)},
        "only bool and floating types of key_padding_mask",
    ),
    (
        "mask dims",
        (Q, K, K),
        {"attn_mask": torch.zeros(S)},
        "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D",
    ),
    (
        "mask dtype",
        (Q, K, K),
        {"attn_mask": torch.zeros(L, S).int()},
        "floating types of attn_mask",
    ),
    ("2-D mask", (Q, K, K), {"attn_mask": torch.zeros(S, L)}, "The shape of the 2D attn_mask is"),
    (
        "3-D mask",
        (Q, K, K),
        {"attn_mask": torch.zeros(B, L, S)},
        r"The shape of the 3D attn_mask is .*, but should be \(12, 5, 7\)",
    ),
    (
        "3-D mask unbatched",
        (Q[0], K[0], K[0]),
        {"attn_mask": torch.zeros(B, L, S)},
        r"Expected `attn_mask` shape to be \(4, 5, 7\)",
    ),
    (
        "hint alone",
        (Q, K, K),
        {"is_causal": True},
        "Need attn_mask if specifying the is_causal hint",
    ),
]


@pytest.mark.parametrize("label, inputs, options, message", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_errors(
    label: str, inputs: tuple[Tensor, ...], options: dict[str, Any], message: str
) -> None:
    """One error type for `except` clauses written for PyTorch and for mmfast."""
    _, ours = pair()
    for kind in (ValueError, AssertionError, RuntimeError):
        with pytest.raises(kind, match=message) as caught:
            ours(*inputs, **options)
    assert str(caught.value).startswith("MultiheadAttention: ")


@pytest.mark.parametrize("options", [{"embed_dim": 0}, {"num_heads": 0}, {"num_heads": 5}])
def test_constructor_errors_are_torch_s(options: dict[str, int]) -> None:
    options = {"embed_dim": E, "num_heads": H, **options}
    with pytest.raises((ValueError, AssertionError)) as theirs:
        torch.nn.MultiheadAttention(**options)
    with pytest.raises(type(theirs.value), match=str(theirs.value)[:20]):
        MultiheadAttention(**options)


def test_mismatched_mask_types_warn() -> None:
    _, ours = pair()
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        ours(Q, K, K, key_padding_mask=torch.zeros(B, S) > 0, attn_mask=torch.zeros(L, S))


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(implementation).failed == 0
