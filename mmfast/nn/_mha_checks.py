"""Argument checks of `MultiheadAttention`, in the order and with the words of PyTorch's own."""

from __future__ import annotations

import warnings
from typing import NoReturn

import torch
from torch import Tensor


class ArgumentError(ValueError, AssertionError, RuntimeError):
    """A wrong argument of `MultiheadAttention`.

    PyTorch raises AssertionError for some mistakes and RuntimeError for others, mmfast ValueError.
    This is all three, so that `except` clauses written for either keep working.
    """


def _fail(message: str) -> NoReturn:
    raise ArgumentError(f"MultiheadAttention: {message}")


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    embed_dim: int,
    kdim: int,
    vdim: int,
    num_heads: int,
    weight: Tensor,
    batch_dim: int,
) -> None:
    """Raise `ArgumentError` for anything `forward` could not use; warn where PyTorch warns.

    The shape of a mask that the causal hint replaces is not looked at: PyTorch does not either, and
    callers pass a dummy.
    """
    dims = query.dim()
    if dims not in (2, 3):
        _fail(
            f"query should be unbatched 2D or batched 3D tensor but received {dims}-D query tensor"
        )
    if key.dim() != dims or value.dim() != dims:
        _fail(
            f"For {'batched' if dims == 3 else 'unbatched'} ({dims}-D) `query`, expected `key` and "
            f"`value` to be {dims}-D but found {key.dim()}-D and {value.dim()}-D tensors "
            f"respectively"
        )
    if key_padding_mask is not None or attn_mask is not None:
        replaced = is_causal and key_padding_mask is None and not need_weights
        _check_masks(query, key, key_padding_mask, attn_mask, replaced, num_heads, batch_dim)
    if is_causal and attn_mask is None:
        _fail(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module "
            "method `generate_square_subsequent_mask` to create this mask."
        )
    if query.shape[-1] != embed_dim:
        _fail(f"was expecting embedding dimension of {embed_dim}, but got {query.shape[-1]}")
    if key.shape[:-1] != value.shape[:-1]:
        _fail(
            f"key's sequence and batch dims {key.shape[:-1]} do not match value's "
            f"{value.shape[:-1]}; give one value per key"
        )
    if key.shape[-1] != kdim or value.shape[-1] != vdim:
        _fail(
            f"key has width {key.shape[-1]} and value {value.shape[-1]}, but the module was made "
            f"for kdim={kdim} and vdim={vdim}; pass kdim and vdim to the constructor"
        )
    if dims == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
        _fail(
            f"query has batch size {query.shape[batch_dim]} but key has {key.shape[batch_dim]} "
            f"(dimension {batch_dim}); both must match, and batch_first says which dimension it is"
        )
    if not query.dtype == key.dtype == value.dtype == weight.dtype:
        device = query.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            _fail(
                f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}, "
                f"but the weights are {weight.dtype}; convert one of them, or use torch.autocast"
            )


def _check_masks(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    replaced: bool,
    num_heads: int,
    batch_dim: int,
) -> None:
    dims = query.dim()
    kind = "batched (3-D)" if dims == 3 else "unbatched (2-D)"
    if dims == 3:
        batch, queries, keys = (
            query.shape[batch_dim],
            query.shape[1 - batch_dim],
            key.shape[1 - batch_dim],
        )
    else:
        batch, queries, keys = 1, query.shape[0], key.shape[0]

    if key_padding_mask is not None:
        if key_padding_mask.dim() != dims - 1:
            _fail(
                f"For {kind} `query`, expected `key_padding_mask` to be `None` or {dims - 1}-D but "
                f"found {key_padding_mask.dim()}-D tensor instead"
            )
        _check_mask_dtype("key_padding_mask", key_padding_mask)
        expected = (batch, keys) if dims == 3 else (keys,)
        if key_padding_mask.shape != expected:
            _fail(
                f"expected key_padding_mask of shape {expected} (batch, keys) but got "
                f"{tuple(key_padding_mask.shape)}"
            )
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            _fail(
                f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found "
                f"{attn_mask.dim()}-D tensor instead"
            )
        _check_mask_dtype("attn_mask", attn_mask)
        if replaced:
            return
        if attn_mask.dim() == 2 and attn_mask.shape != (queries, keys):
            _fail(
                f"The shape of the 2D attn_mask is {attn_mask.shape}, but should be "
                f"{(queries, keys)}."
            )
        expected_3d = (batch * num_heads, queries, keys)
        if attn_mask.dim() == 3 and attn_mask.shape != expected_3d:
            _fail(
                f"The shape of the 3D attn_mask is {attn_mask.shape}, but should be {expected_3d}."
                if dims == 3
                else f"Expected `attn_mask` shape to be {expected_3d} but got {attn_mask.shape}"
            )
        if key_padding_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same "
                "type for both instead.",
                stacklevel=4,
            )


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _fail(f"only bool and floating types of {name} are supported, but got {mask.dtype}")
