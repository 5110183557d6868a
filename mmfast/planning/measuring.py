"""Measure the rates of a device: small pieces of work of every kind, and a fit to their times.

`python -m mmfast tune` calls `measure`; nothing else does. What is timed are the functions that the
modules call, on sizes at which one of the coefficients of rates.py has the say. Rounds are
interleaved, the least time of each counts: whatever else the machine does can only add to it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops.cross_attention import cross_attention
from mmfast.planning import costs
from mmfast.planning.costs import KINDS, Piece
from mmfast.planning.rates import Coefficients

ROUNDS = 7
SAMPLE_S = 2e-3


class Point(NamedTuple):
    """A piece of work and the function that does it."""

    piece: Piece
    run: Callable[[], object]


def measure(
    dtype: torch.dtype,
    device: torch.device,
    told: Callable[[str, tuple[float, ...]], None] = lambda kind, row: None,
    rounds: int = ROUNDS,
) -> dict[str, tuple[float, ...]]:
    """Kind of work -> its coefficients on this device, with as many threads as torch has now."""
    found: dict[str, tuple[float, ...]] = {}
    for kind in KINDS:
        points = list(_POINTS[kind](_Maker(dtype, device)))
        times = least([point.run for point in points], device, rounds)
        found[kind] = tuple(fit([point.piece for point in points], times))
        told(kind, found[kind])
    return found


def least(runs: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """The least seconds of a call of each run, timed round by round."""
    calls = []
    for run in runs:
        run()
        once = _sample(run, 1, device)
        calls.append(max(1, min(1000, int(SAMPLE_S / max(once, 1e-7)))))
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for index, run in enumerate(runs):
            best[index] = min(best[index], _sample(run, calls[index], device))
    return best


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def fit(pieces: Sequence[Piece], times: Sequence[float]) -> Coefficients:
    """The coefficients, none below 0, with the least sum of squared relative errors.

    All sets of coefficients that may be above 0 are tried: there are 31 at most.
    """
    features = torch.tensor(
        [[p.calls, p.flops, p.elements, p.scores, p.bytes] for p in pieces], dtype=torch.float64
    )
    relative = features / torch.tensor(times, dtype=torch.float64).unsqueeze(1)
    sizes = relative.norm(dim=0)
    here = [column for column in range(len(sizes)) if sizes[column] > 0.0]
    best, least_error = Coefficients(), float("inf")
    for count in range(1, len(here) + 1):
        for chosen in itertools.combinations(here, count):
            columns = list(chosen)
            matrix = relative[:, columns] / sizes[columns]
            ones = torch.ones(len(times), 1, dtype=torch.float64)
            solution = torch.linalg.lstsq(matrix, ones, driver="gelsd").solution
            error = float((matrix @ solution - ones).square().sum())
            if error < least_error and bool((solution >= 0.0).all()):
                row = [0.0] * len(sizes)
                for column, value in zip(columns, (solution.squeeze(1) / sizes[columns]).tolist()):
                    row[column] = value
                best, least_error = Coefficients(*row), error
    return best


# --- the pieces that are timed --------------------------------------------------------------------


class _Maker(NamedTuple):
    """Makes tensors of one dtype on one device."""

    dtype: torch.dtype
    device: torch.device

    def __call__(self, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        made = torch.randn(*shape, generator=generator, device=self.device)
        return made.to(self.dtype)

    @property
    def gpu(self) -> bool:
        """Sizes that take a processor a millisecond are nothing but a launch on a GPU."""
        return self.device.type == "cuda"


_PRODUCTS = (
    ((2, 64, 64), (4, 768, 768), (16, 768, 768), (64, 768, 768), (256, 768, 768),
     (1024, 768, 768), (16, 256, 256), (512, 256, 256)),
    ((2, 64, 64), (16, 8192, 8192), (64, 8192, 8192), (1024, 8192, 8192), (4096, 4096, 4096),
     (32768, 768, 768), (65536, 768, 768), (32768, 256, 256)),
)  # fmt: skip
"""Rows, columns, depth: on a processor, on a GPU."""


_WEIGHTS = 8


def _in_turn(make: _Maker, *shape: int) -> Iterator[Tensor]:
    """Other weights in each call, as in a network: they are not in the nearest cache any more."""
    return itertools.cycle([make(*shape) for _ in range(1 if make.gpu else _WEIGHTS)])


def _called(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Iterator[Tensor]
) -> Callable[[], object]:
    return lambda: product(x, next(weights))


def _products(make: _Maker) -> Iterator[Point]:
    for rows, cols, depth in _PRODUCTS[make.gpu]:
        x, weights = make(rows, depth), _in_turn(make, cols, depth)
        yield Point(costs.gemm(rows, cols, depth), _called(F.linear, x, weights))
    for rows in (4096, 16384) if make.gpu else (4, 32, 256):
        x, weights = make(12, rows, 64), _in_turn(make, 12, 64, 768)
        piece = costs.gemm(rows, 768, 64, 12)
        yield Point(piece, _called(torch.bmm, x, weights))
    for rows in (32768, 65536) if make.gpu else (16, 256, 1024):  # of weights: the rows' sum
        grad, x = make(rows, 768), make(rows, 768)
        yield Point(costs.gemm(rows, 768, 768), partial(torch.mm, grad.t(), x))


class _Attended(NamedTuple):
    """A call of `cross_attention` with what its backward needs."""

    inputs: tuple[Tensor, ...]
    out: Tensor
    grad: Tensor

    def backward(self) -> object:
        return torch.autograd.grad(self.out, self.inputs, self.grad, retain_graph=True)


_ATTENTION = ((1, 1, 1, 8, 16), (2, 8, 1, 512, 64), (2, 8, 8, 512, 64), (2, 8, 32, 256, 64),
              (2, 8, 128, 256, 64), (2, 8, 32, 256, 32), (1, 4, 128, 512, 32),
              (2, 8, 64, 50, 64), (1, 4, 64, 512, 128))  # fmt: skip
"""B, H, N, M, D."""
_SHARED = ((1, 1, 1, 8, 64), (2, 8, 1, 512, 512), (2, 12, 1, 256, 768), (2, 8, 4, 512, 256),
           (2, 8, 4, 256, 768), (2, 8, 16, 256, 512), (1, 12, 32, 256, 768))  # fmt: skip
"""B, H, N, M, C."""
_GPU_BATCH = 64
"""Times the batch, of all but the smallest."""


def _sizes(make: _Maker, sizes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, ...]]:
    yield sizes[0]
    for batch, *others in sizes[1:]:
        yield batch * (_GPU_BATCH if make.gpu else 1), *others


def _queries_keys_values(make: _Maker, B: int, H: int, N: int, M: int, D: int) -> list[Tensor]:
    return [make(B, rows, H, D).transpose(1, 2) for rows in (N, M, M)]


def _attention(make: _Maker) -> Iterator[Point]:
    for B, H, N, M, D in _sizes(make, _ATTENTION):
        q, k, v = _queries_keys_values(make, B, H, N, M, D)
        piece = costs.attention(B * H * N * M, B * H * N, B * M, D, D, H)
        yield Point(piece, partial(cross_attention, q, k, v))


def _attention_backward(make: _Maker) -> Iterator[Point]:
    for B, H, N, M, D in _sizes(make, _ATTENTION):
        inputs = [x.requires_grad_() for x in _queries_keys_values(make, B, H, N, M, D)]
        out = cross_attention(*inputs)
        assert isinstance(out, Tensor)
        piece = costs.attention_backward(B * H * N * M, B * H * N, B * M, D, D, H)
        yield Point(piece, _Attended(tuple(inputs), out, make(*out.shape)).backward)


def _shared(make: _Maker) -> Iterator[Point]:
    for B, H, N, M, C in _sizes(make, _SHARED):
        q, context = make(B, N, H, C).transpose(1, 2), make(B, 1, M, C)
        piece = costs.shared(B * H * N * M, B * H * N, B * M, C)
        yield Point(piece, partial(cross_attention, q, context, None))


def _shared_backward(make: _Maker) -> Iterator[Point]:
    for (B, H, N, M, C), context_grad in itertools.product(_sizes(make, _SHARED), (False, True)):
        q = make(B, N, H, C).transpose(1, 2).requires_grad_()
        context = make(B, 1, M, C).requires_grad_(context_grad)
        out = cross_attention(q, context, None)
        assert isinstance(out, Tensor)
        piece = costs.shared_backward(B * H * N * M, B * H * N, B * M, C, context_grad)
        inputs = (q, context) if context_grad else (q,)
        yield Point(piece, _Attended(inputs, out, make(*out.shape)).backward)


def _moves(make: _Maker) -> Iterator[Point]:
    for rows, width in ((8, 16), (4096, 768), (8192, 768)):
        rows *= _GPU_BATCH if make.gpu and rows > 8 else 1
        x = make(rows, width)
        index = torch.arange(0, rows, device=make.device)[: rows * 3 // 4]
        piece = costs.move(len(index), width, x.element_size())
        yield Point(piece, partial(x.index_select, 0, index))


def _steps(make: _Maker) -> Iterator[Point]:
    x = make(4, 64)
    yield Point(
        Piece("two views", "step", calls=2), lambda: x.unflatten(1, (4, 16)).transpose(0, 1)
    )


_POINTS: dict[str, Callable[[_Maker], Iterator[Point]]] = {
    "gemm": _products,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "shared": _shared,
    "shared_backward": _shared_backward,
    "move": _moves,
    "step": _steps,
}
