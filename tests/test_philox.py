"""Philox4x32-10 against the known answers of Random123, and the dropout mask built on it."""

import pytest
import torch

from mmfast.reference.philox import dropout_keep, dropout_threshold, dropout_words, philox4x32

# kat_vectors of Random123: counter (4 words), key (2 words), result (4 words).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _tensors(values):
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox4x32(_tensors(counter), _tensors(key))
    assert tuple(int(word) for word in words) == expected


def _scalar_philox(counter, key):
    """Philox4x32-10 once more, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_words_of_every_element():
    B, H, N, M = 2, 3, 4, 11
    seed = 0x7EDCBA9876543210
    words = dropout_words(torch.tensor([seed]), B, H, N, M)
    assert words.shape == (B, H, N, M)
    for b in range(B):
        for h in range(H):
            for n in range(N):
                for m in range(M):
                    block = _scalar_philox(
                        (n, m >> 2, b * H + h, 0), (seed & 0xFFFFFFFF, seed >> 32)
                    )
                    assert int(words[b, h, n, m]) == block[m & 3]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0 - 2.0**-40])
def test_threshold_and_rate(p):
    assert 0 <= dropout_threshold(p) <= 2**32 - 1
    keep = dropout_keep(torch.tensor([7]), p, 2, 2, 64, 256)
    count = keep.numel()
    deviation = abs(keep.double().mean().item() - (1 - p))
    assert deviation <= 5 * (max(p * (1 - p), 1e-9) / count) ** 0.5


def test_mask_does_not_depend_on_the_extent():
    """Element (b, h, n, m) is dropped or kept whatever the number of rows and keys beside it."""
    seed = torch.tensor([123])
    whole = dropout_words(seed, 1, 2, 9, 14)
    assert torch.equal(whole[:, :, :5, :6], dropout_words(seed, 1, 2, 5, 6))


def test_empty():
    assert dropout_words(torch.tensor([1]), 0, 2, 3, 4).shape == (0, 2, 3, 4)
    assert dropout_words(torch.tensor([1]), 1, 2, 3, 0).shape == (1, 2, 3, 0)
