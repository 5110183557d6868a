"""Twins of PyTorch's transformer stacks and ours, and masks for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from stack_helpers import (
    FF,
    INF,
    M_LENS,
    N_LENS,
    B,
    C,
    H,
    M,
    N,
    as_float,
    causal,
    holes,
    padding,
    quiet_norms,
)
from torch import Tensor

from mmfast.nn import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)


def layer(kind: str, ours: bool = False, **options: Any) -> Any:
    options = {"dropout": 0.0, "batch_first": True, **options}
    classes: Any = {
        ("encoder", False): torch.nn.TransformerEncoderLayer,
        ("encoder", True): TransformerEncoderLayer,
        ("decoder", False): torch.nn.TransformerDecoderLayer,
        ("decoder", True): TransformerDecoderLayer,
    }
    return classes[kind, ours](C, H, FF, **options)


def stack(kind: str, **options: Any) -> Any:
    """PyTorch's, two layers that differ and a final norm."""
    cls: Any = torch.nn.TransformerEncoder if kind == "encoder" else torch.nn.TransformerDecoder
    return quiet_norms(cls(layer(kind, **options), 2, torch.nn.LayerNorm(C)))


def converted(theirs: Any) -> Any:
    """Ours with copies of the weights."""
    copied = copy.deepcopy(theirs)
    encoder = isinstance(theirs, torch.nn.TransformerEncoder)
    return (TransformerEncoder if encoder else TransformerDecoder).from_torch(copied)


def streams_for(kind: str, batch_first: bool = True) -> list[Tensor]:
    both = [torch.randn(B, N, C), torch.randn(B, M, C)]
    both = both[: 1 if kind == "encoder" else 2]
    return both if batch_first else [x.transpose(0, 1).contiguous() for x in both]


N_PAD, M_PAD = padding(N_LENS, N), padding(M_LENS, M)
SOME = torch.randn(N, N, generator=torch.Generator().manual_seed(1))
ACROSS = torch.randn(N, M, generator=torch.Generator().manual_seed(2))
PER_HEAD = torch.randn(B * H, N, N, generator=torch.Generator().manual_seed(5))

# The names of torch.nn.TransformerDecoder; an encoder takes what begins with tgt.
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"tgt_mask": causal(N)},
    "causal hint": {"tgt_mask": as_float(causal(N)), "tgt_is_causal": True},
    "scores": {"tgt_mask": SOME, "memory_mask": ACROSS},
    "per head": {"tgt_mask": PER_HEAD, "tgt_key_padding_mask": as_float(N_PAD)},
    "padding": {"tgt_key_padding_mask": N_PAD, "memory_key_padding_mask": M_PAD},
    "padding, causal": {
        "tgt_mask": causal(N), "tgt_key_padding_mask": N_PAD,
        "memory_key_padding_mask": as_float(M_PAD),
    },
    "holes": {"tgt_key_padding_mask": holes(N), "memory_key_padding_mask": holes(M)},
    "holes, scores": {
        "tgt_mask": SOME.masked_fill(SOME > 1, -INF), "memory_mask": ACROSS > 1.5,
        "tgt_key_padding_mask": padding(N_LENS, N).flip(1), "memory_key_padding_mask": holes(M),
    },
    "padding with scores": {
        "memory_key_padding_mask": torch.randn(
            B, M, generator=torch.Generator().manual_seed(4)
        ).masked_fill(holes(M), -INF),
    },
    "memory causal": {
        "memory_mask": ~torch.ones(N, M, dtype=torch.bool).tril(), "memory_is_causal": True,
        "memory_key_padding_mask": M_PAD,
    },
}  # fmt: skip


def for_encoder(options: dict[str, Any]) -> dict[str, Any]:
    names = {
        "tgt_mask": "mask",
        "tgt_key_padding_mask": "src_key_padding_mask",
        "tgt_is_causal": "is_causal",
    }
    return {names[name]: value for name, value in options.items() if name in names}


def rows_of_padding(options: dict[str, Any], batch_first: bool) -> Tensor | None:
    mask = options.get("tgt_key_padding_mask")
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask == -INF
    return mask if batch_first else mask.t()
