"""Results that do not fit the last-level cache: the kernels write them past the caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmfast


def _cache() -> int:
    """Bytes of the last-level cache, from where the kernels know it, or what they then assume."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=2**25)


CACHE = _cache()

pytestmark = [
    pytest.mark.usefixtures("compiled_library"),
    pytest.mark.skipif(CACHE > 2**29, reason=f"a cache of {CACHE} bytes: too much memory"),
]


def _calls(B, N, C, dtype):
    """op -> (function of its tensors, the tensors), each a form with code of its own."""
    g = torch.Generator().manual_seed(C)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    x, y, wide = draw(B, N, C), draw(B, N, C), draw(B, N, C)
    item, channel, mask = draw(B, C), draw(C), torch.rand(B, N, generator=g) < 0.8
    present = torch.rand(B, 3, generator=g) < 0.7
    present[:, 0] = True
    softmax = {"mode": "softmax", "present": present}
    return {
        "gate_scalar": (mmfast.gated_residual, [x, y, draw(1)], {}),
        "gate_item": (mmfast.gated_residual, [x, y, item], {"row_mask": mask}),
        "gate_full": (mmfast.gated_residual, [x, y, wide], {"activation": "sigmoid"}),
        "glu": (mmfast.glu, [x, y], {}),
        "glu_packed": (mmfast.glu_packed, [torch.cat([x, y], -1)], {"activation": "gelu"}),
        "mix": (lambda a, b, c, w, **o: mmfast.fuse([a, b, c], w, **o),
                [x, y, wide, draw(B, N, 3)], softmax),
        "mix_channels": (lambda a, b, c, w, **o: mmfast.fuse([a, b, c], w, **o),
                         [x, y, wide, draw(1, 1, 3, C)], softmax),
        "pair": (lambda a, b, w, **o: mmfast.fuse([a, b], w, **o), [x, y, wide], {"mode": "gmu"}),
        "film": (lambda a, s, t: mmfast.modulate(a, s, t, norm=None), [x, item, draw(B, C)], {}),
        "norm": (lambda a, s: mmfast.modulate(a, s, norm="rms"), [x, item], {}),
        "zero": (lambda a, r, s, t, v: torch.cat(
            mmfast.modulate(a, s, t, residual=r, gate=v)), [x, y, item, draw(B, C), channel], {}),
        "mag": (lambda a, h, w: mmfast.adaptation_gate(a, h, weight=w, beta=0.5),
                [x, y, channel], {}),
    }  # fmt: skip


FORMS = list(_calls(1, 1, 2, torch.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("C", [1024, 1001], ids=["aligned", "misaligned"])
def test_equal_to_the_reference(C, dtype, form, gate_implementation):
    if gate_implementation.isa in (None, "generic"):
        pytest.skip("the generic kernels and the reference have no such stores")
    B = 3
    N = CACHE // (2 * dtype.itemsize * B * C) + 2  # two tensors are more than the cache
    function, tensors, options = _calls(B, N, C, dtype)[form]
    dout = torch.randn(B, N, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for backend in (gate_implementation.backend, "reference"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with mmfast.use_backend(backend):
            out = function(*leaves, **options)
            incoming = dout if out.shape == dout.shape else torch.cat([dout, dout])
            results.append((out, *torch.autograd.grad(out, leaves, incoming)))
    for got, expected in zip(*results, strict=True):
        # Gradients of what rows share are long sums: their size is that of the largest.
        close = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-4}
        close["atol"] = close["rtol"] * float(expected.abs().max()) / 10
        torch.testing.assert_close(got, expected, **close)
