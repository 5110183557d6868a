"""What each plan has to compute: its products, the attention between them, what it moves.

A plan is a list of pieces of work (`pieces`); rates.py says how long a piece takes on a machine.
docs/planner.md derives the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mmfast.planning.shapes import AttentionShapes

KINDS = ("gemm", "attention", "attention_backward", "shared", "shared_backward", "move", "step")
"""Kinds of work: matrix products; the fused attention; the fused attention whose keys are its
values, with heads as wide as the context; their backward passes; copying and gathering rows; and
what is called without computing anything: views, Python and autograd round the others."""

_STEPS = {"projected": (60, 400), "packed": (150, 520), "absorbed": (120, 560)}
"""In a forward and in a backward, counted in the time of a view: tiny problems, where nothing else
takes time (docs/planner.md)."""


class Piece(NamedTuple):
    """Work of one kind, and what its time follows from.

    `flops`: of products. `elements`: of the operand that all rows share: weights, keys and values;
    they are read and laid out for the products whether one row needs them or a thousand. `scores`:
    exponentials. `bytes`: what is copied. `calls`: of functions. `others`: elements of the other
    operand and of the result, which cost next to nothing beside the FLOPs.
    """

    what: str
    kind: str
    flops: float = 0.0
    elements: float = 0.0
    scores: float = 0.0
    bytes: float = 0.0
    calls: int = 1
    others: float = 0.0


def pieces(plan: str, s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    """The work of a plan, that of its backward included where `training`."""
    forward, backward = _STEPS[plan]
    yield Piece("calls", "step", calls=forward + backward * training)
    yield from _WORK[plan](s, itemsize, training)


def gemm(rows: int, cols: int, depth: int, count: int = 1) -> Piece:
    """`count` products of `[rows, depth]` by `[depth, cols]`, in one call."""
    flops = 2.0 * rows * cols * depth * count
    others = float(count * rows * (depth + cols))
    return Piece("product", "gemm", flops, float(cols * depth * count), others=others)


def attention(pairs: float, rows: float, keys: float, D: int, Dv: int, G: int) -> Piece:
    """`rows` of queries of all heads, `pairs` scores of width D and as many weights on values of
    width Dv; `keys` of G heads."""
    flops, elements = 2.0 * pairs * (D + Dv), keys * G * (D + Dv)
    return Piece("attention", "attention", flops, elements, pairs, others=rows * (D + Dv))


def attention_backward(
    pairs: float, rows: float, keys: float, D: int, Dv: int, G: int
) -> Piece:  # fmt: skip
    """S and dP again, dV, dK and dQ: five products for the forward's two."""
    return Piece(
        "attention: backward", "attention_backward", 2.0 * pairs * (3 * D + 2 * Dv),
        keys * G * (D + Dv), pairs, others=2.0 * (rows + keys * G) * (D + Dv),
    )  # fmt: skip


def shared(pairs: float, rows: float, keys: float, C: int) -> Piece:
    """Scores with a context of width C and weights on that same context."""
    return Piece("attention", "shared", 4.0 * pairs * C, keys * C, pairs, others=2.0 * rows * C)


def shared_backward(
    pairs: float, rows: float, keys: float, C: int, context_grad: bool
) -> Piece:  # fmt: skip
    """S, dP and dQ, and the two products of the context's gradient where it has one."""
    flops = 2.0 * pairs * C * (5 if context_grad else 3)
    elements = keys * C * (2 if context_grad else 1)
    return Piece(
        "attention: backward", "shared_backward", flops, elements, pairs, others=4.0 * rows * C
    )


def move(rows: float, width: int, itemsize: int) -> Piece:
    """Rows read and written."""
    return Piece("rows moved", "move", bytes=2.0 * rows * width * itemsize)


def _projection(
    what: str, rows: int, cols: int, depth: int, training: bool,
    count: int = 1, input_grad: bool = True,
) -> Iterator[Piece]:  # fmt: skip
    """A product with weights and those of its backward: each as many FLOPs as the forward."""
    forward = gemm(rows, cols, depth, count)
    yield forward._replace(what=what)
    if training:
        # The weights' gradient is written, as large as the weights are read; then accumulated.
        yield forward._replace(what=f"{what}: gradient of the weights", calls=2)
        if input_grad:
            yield forward._replace(what=f"{what}: gradient of the input")


def _around(s: AttentionShapes, training: bool) -> Iterator[Piece]:
    """What all plans have: the projections of the queries and of the result."""
    rows, H = s.valid_queries, s.num_heads
    yield from _projection("queries", rows, H * s.head_dim, s.embed_dim, training)
    yield from _projection("result", rows, s.embed_dim, H * s.value_head_dim, training)


def _pairs(s: AttentionShapes) -> float:
    """Scores of all heads; padding of either side has none."""
    if s.batch == 0:
        return 0.0
    return float(s.num_heads) * s.valid_queries * s.valid_keys / s.batch


def _attention(s: AttentionShapes, training: bool) -> Iterator[Piece]:
    rows = s.valid_queries * s.num_heads
    sizes = (rows, s.valid_keys, s.head_dim, s.value_head_dim, s.num_kv_heads)
    yield attention(_pairs(s), *sizes)
    if training:
        yield attention_backward(_pairs(s), *sizes)


def _keys_and_values(s: AttentionShapes, rows: int, training: bool) -> Iterator[Piece]:
    G, C, grad = s.num_kv_heads, s.context_dim, s.context_grad
    yield from _projection("keys", rows, G * s.head_dim, C, training, input_grad=grad)
    yield from _projection("values", rows, G * s.value_head_dim, C, training, input_grad=grad)
    if training and grad:
        yield move(rows, C, 4)._replace(what="sum of the context's gradients")


def _projected(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    yield from _around(s, training)
    if s.context_packed:
        yield move(s.batch * s.keys, s.context_dim, itemsize)._replace(what="padding")
    yield from _keys_and_values(s, s.batch * s.keys, training)
    yield from _attention(s, training)


def _packed(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    yield from _around(s, training)
    if not s.context_packed:
        yield move(s.valid_keys, s.context_dim, itemsize)._replace(what="packing")
        if training and s.context_grad:
            rows = s.valid_keys + 0.5 * s.batch * s.keys
            yield move(rows, s.context_dim, itemsize)._replace(
                what="unpacking the gradient", calls=3
            )
    yield from _keys_and_values(s, s.valid_keys, training)
    yield from _attention(s, training)


def _absorbed(s: AttentionShapes, itemsize: int, training: bool) -> Iterator[Piece]:
    G, C = s.num_kv_heads, s.context_dim
    rows = s.valid_queries * (s.num_heads // G if G else 0)  # that meet the weights of one head
    yield from _around(s, training)
    yield from _projection("queries into the context", rows, C, s.head_dim, training, G)
    sizes = (s.valid_queries * s.num_heads, s.valid_keys, C)
    yield shared(_pairs(s), *sizes)
    if training:
        yield shared_backward(_pairs(s), *sizes, s.context_grad)
    yield from _projection("values of the result", rows, s.value_head_dim, C, training, G)


_WORK = {"projected": _projected, "packed": _packed, "absorbed": _absorbed}
