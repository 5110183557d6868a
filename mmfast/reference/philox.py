"""Philox4x32-10, the counter-based generator behind dropout, in torch int64 arithmetic.

The dropout mask is a pure function of (seed, b, h, n, m), so every backend drops the same elements
and a backward or a recompute regenerates the mask instead of storing it. The kernels do the same
arithmetic in 32-bit registers.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `x * constant` for `0 <= x < 2**32`.

    The constant is split into 16-bit halves: the 64-bit product would overflow int64, which
    compiled code may treat as undefined.
    """
    low = x * (constant & 0xFFFF)
    middle = x * (constant >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each counter.

    `counter` and `key` are int64 tensors of values in `[0, 2**32)` that broadcast together; so are
    the four results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """An element is kept when its 32 random bits, as an unsigned integer, are at least this."""
    return min(int(p * 2**32), 2**32 - 1)


def dropout_words(seed: Tensor, B: int, H: int, N: int, M: int) -> Tensor:
    """The random word of every attention weight: int64 `[B, H, N, M]`, values in `[0, 2**32)`.

    key = (low, high 32 bits of `seed`); counter = (n, m // 4, low, high 32 bits of b * H + h);
    element m takes word m % 4 of the block. `seed` is an int64 tensor of one element.
    """
    device = seed.device
    seed = seed.reshape(())
    n = torch.arange(N, device=device)[None, :, None]
    m = torch.arange((M + 3) // 4, device=device)[None, None, :]
    row = torch.arange(B * H, device=device)[:, None, None]
    counter = torch.broadcast_tensors(n, m, row & _MASK, row >> 32)
    words = philox4x32(tuple(counter), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).reshape(B, H, N, (M + 3) // 4 * 4)[..., :M]


def dropout_keep(seed: Tensor, p: float, B: int, H: int, N: int, M: int) -> Tensor:
    """bool `[B, H, N, M]`: True where an attention weight survives dropout of probability `p`."""
    return dropout_words(seed, B, H, N, M) >= dropout_threshold(p)
