"""What each plan has to compute: its products, the attention between them, the bytes it moves.

A plan is a list of pieces of work (`pieces`); rates.py says how long a piece takes on a machine.
The sizes are those of docs/planner.md; `F` products of `rows x depth` by `depth x cols` each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mmfast.planning.shapes import AttentionShapes


class Piece(NamedTuple):
    """Work of one kind.

    `kind`: "gemm" (`count` products of `[rows, depth]` by `[depth, cols]`), "attention" (the fused
    kernel on keys and values of its own), "shared" (on keys that are the values, wide heads) or
    "move" (nothing but memory). `bytes_` is what has to pass memory, `calls` how often something
    is called.
    """

    what: str
    kind: str
    flops: float
    bytes_: float
    rows: int
    calls: int = 1


def pieces(plan: str, s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    """The work of a plan, that of its backward included where `training`."""
    yield from _WORK[plan](s, itemsize, training)


def _gemm(
    what: str, rows: int, cols: int, depth: int, itemsize: int, training: bool,
    count: int = 1, input_grad: bool = True,
) -> Iterator[Piece]:  # fmt: skip
    """`count` projections of `[rows, depth]` by weights `[depth, cols]`, and their gradients."""
    flops = 2.0 * rows * cols * depth * count
    moved = float(itemsize) * count * (rows * depth + depth * cols + rows * cols)
    yield Piece(what, "gemm", flops, moved, rows)
    if training:
        yield Piece(f"{what}: gradient of the weights", "gemm", flops, moved, rows, 2)
        if input_grad:
            yield Piece(f"{what}: gradient of the input", "gemm", flops, moved, rows)


def _around(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    """What all plans have: the projections of the queries and of the result."""
    rows, H = s.valid_queries, s.num_heads
    yield from _gemm("queries", rows, H * s.head_dim, s.embed_dim, itemsize, training)
    yield from _gemm("result", rows, s.embed_dim, H * s.value_head_dim, itemsize, training)


def _attention(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    """The fused kernel on projected keys and values; it skips padding in every plan."""
    B, H, G, D, Dv = s.batch, s.num_heads, s.num_kv_heads, s.head_dim, s.value_head_dim
    rows = s.valid_queries * H
    pairs = 0.0 if B == 0 else rows * s.valid_keys / B
    flops = 2.0 * pairs * (D + Dv)
    moved = float(itemsize) * (rows * (D + Dv) + s.valid_keys * G * (D + Dv))
    yield Piece("attention", "attention", flops, moved, s.queries)
    if training:
        yield Piece("attention: backward", "attention", flops * 2.5, 2.5 * moved, s.queries, 3)


def _key_projections(
    s: AttentionShapes, rows: int, itemsize: int, training: bool
) -> Iterator[Piece]:
    G, C = s.num_kv_heads, s.context_dim
    grad = s.context_grad
    yield from _gemm("keys", rows, G * s.head_dim, C, itemsize, training, input_grad=grad)
    yield from _gemm("values", rows, G * s.value_head_dim, C, itemsize, training, input_grad=grad)


def _projected(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    yield from _around(s, itemsize, training)
    yield from _key_projections(s, s.batch * s.keys, itemsize, training)
    yield from _attention(s, itemsize, training)


def _packed(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    yield from _around(s, itemsize, training)
    if not s.context_packed:
        moved = 2.0 * itemsize * s.valid_keys * s.context_dim
        yield Piece("packing", "move", 0.0, moved, s.valid_keys, 4)
        if training and s.context_grad:
            moved += float(itemsize) * s.batch * s.keys * s.context_dim
            yield Piece("packing: backward", "move", 0.0, moved, s.valid_keys, 3)
    yield from _key_projections(s, s.valid_keys, itemsize, training)
    yield from _attention(s, itemsize, training)


def _absorbed(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    B, H, C = s.batch, s.num_heads, s.context_dim
    rows = s.valid_queries
    yield from _around(s, itemsize, training)
    yield from _gemm("queries into the context", rows, C, s.head_dim, itemsize, training, H)
    pairs = 0.0 if B == 0 else float(rows) * H * s.valid_keys / B
    flops = 4.0 * pairs * C
    moved = float(itemsize) * (2 * rows * H * C + s.valid_keys * C)
    yield Piece("attention", "shared", flops, moved, s.queries * H)
    if training:
        factor = 2.5 if s.context_grad else 1.5
        yield Piece("attention: backward", "shared", factor * flops, 2 * moved, s.queries * H, 3)
    yield from _gemm("values of the result", rows, s.value_head_dim, C, itemsize, training, H)


_WORK = {"projected": _projected, "packed": _packed, "absorbed": _absorbed}
