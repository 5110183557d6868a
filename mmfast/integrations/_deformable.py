"""Deformable attention: each query reads a few points of every feature map, bilinearly.

`F.grid_sample`, which the models use on a CPU, wants the values of a head as a picture and gives
all samples of all levels before they are weighed: D times the memory of the weights. Here the four
pixels round each point are rows of one table, and `F.embedding_bag` weighs and sums them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Indices of pixels are computed in the dtype of the coordinates, which holds them exactly so far.
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}
# Rows at a time where no gradient is needed: what is computed of them stays in the cache.
_ROWS = 1024


def why_not(values: Tensor) -> str | None:
    """Why `deformable` does not take `[B, S, H, D]` values; None: it does."""
    if not values.is_cpu:
        return "it is for CPUs"
    if values.dtype not in _EXACT:
        return f"it is for float32 and float64, not {values.dtype}"
    if values[0].numel() >= _EXACT[values.dtype] or values.numel() >= 2**31:
        return "too many values"
    return None


def deformable(
    values: Tensor,
    shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    weights: Tensor,
    items: Tensor,
) -> Tensor:
    """Sum over levels and points of `weights * values(reference + offsets)`.

    Args:
        values: `[B, S, H, D]`, the feature maps one after the other.
        shapes: height and width of each; the sum of the products is S.
        reference: `[R, L or 1, 2]`, x and y in [0, 1] of each query at each level; or
            `[R, L or 1, 4]` with the width and height of a box.
        offsets: `[R, H, L, P, 2]` in pixels, or (boxes) such that P is half the box.
        weights: `[R, H, L, P]`.
        items: int32 `[R]`, the item of the batch that the query is of.

    Returns:
        `[R, H, D]`. A point outside of a map is 0, as are pixels' shares outside.

    Source: Zhu et al. 2021, Deformable DETR.
    """
    B, S, H, D = values.shape
    table = values.reshape(B * S * H, D)
    grid = _Grid(shapes, weights.shape[1:], offsets)
    first = items * (S * H)
    rows = offsets.shape[0]
    needs_grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in (values, reference, offsets, weights)
    )
    if needs_grad or rows <= _ROWS:
        return _sampled(table, grid, reference, offsets, weights, first)
    out = values.new_empty(rows, H, D)
    for at in range(0, rows, _ROWS):
        part = slice(at, at + _ROWS)
        out[part] = _sampled(
            table, grid, reference[part], offsets[part], weights[part], first[part]
        )
    return out


class _Grid:
    """Facts about the maps for each of a query's H * L * P points, for x and y `[2, 1, H * L * P]`.

    Operations whose innermost dimension is short run at a tenth of the speed: points are one.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], points: torch.Size, like: Tensor) -> None:
        def spread(values: Any) -> Tensor:
            return like.new_tensor(values)[..., None].expand(*points).reshape(-1)

        H = points[0]
        width, height = [shape[1] for shape in shapes], [shape[0] for shape in shapes]
        starts = [sum(map(math.prod, shapes[:level])) * H for level in range(len(shapes))]
        x_start = [[start + head for start in starts] for head in range(H)]
        self.points = points
        self.sizes = torch.stack((spread(width), spread(height)))[:, None]
        self.stride = torch.stack((spread([H] * len(shapes)), spread([w * H for w in width])))
        self.stride = self.stride[:, None]
        self.start = torch.stack((spread(x_start), spread([0] * len(shapes))))[:, None]
        self.last = self.sizes - 1


def _sampled(
    table: Tensor, grid: _Grid, reference: Tensor, offsets: Tensor, weights: Tensor, first: Tensor
) -> Tensor:
    H, L, P = grid.points
    rows = offsets.shape[0]

    def spread(x: Tensor) -> Tensor:
        """`[R, L or 1, 2]` -> `[2, R, H * L * P]`"""
        x = x.permute(2, 0, 1)[:, :, None, :, None]
        return x.expand(2, rows, H, L, P).reshape(2, rows, -1)

    moved = offsets.reshape(rows, -1, 2).permute(2, 0, 1)
    if reference.shape[-1] == 4:
        moved = moved * spread(reference[..., 2:] * (0.5 / P)) * grid.sizes
    at = torch.addcmul(moved - 0.5, spread(reference[..., :2]), grid.sizes)
    with torch.no_grad():
        low = at.floor()
        high = low + 1
        near = low.clamp(min=0).minimum(grid.last)
        far = high.clamp(min=0).minimum(grid.last)
        has_near, has_far = near == low, far == high
        (x0, y0) = torch.addcmul(grid.start, near, grid.stride).view(2, rows, H, -1)
        (x1, y1) = torch.addcmul(grid.start, far, grid.stride).view(2, rows, H, -1)
        index = torch.stack((y0 + x0, y0 + x1, y1 + x0, y1 + x1), 2)
        index = index.to(torch.int32).view(rows, -1).add_(first[:, None])
    part = at - low
    far_x, far_y = (part * has_far).view(2, rows, H, -1)
    near_x, near_y = ((1 - part) * has_near).view(2, rows, H, -1)
    weights = weights.view(rows, H, -1)
    near_y, far_y = near_y * weights, far_y * weights
    share = torch.stack((near_y * near_x, near_y * far_x, far_y * near_x, far_y * far_x), 2)
    out = F.embedding_bag(
        index.view(rows * H, -1), table, per_sample_weights=share.view(rows * H, -1), mode="sum"
    )
    return out.view(rows, H, -1)
