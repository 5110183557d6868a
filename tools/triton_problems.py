"""The calls that tools/triton_report.py compiles: every path of every launcher, aligned shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Problem:
    """A call of a launcher.

    units: data tensors that it cannot but read or write once. vectors: vectors along the channels
    that all rows of a tile share: a thread reads its part of them for each tile, from the cache
    after the first. sums: float32 vectors that a program writes once for all of its rows.
    """

    op: str
    way: str
    name: str
    units: int
    call: Callable[[Callable[..., Any], torch.dtype], Any] = field(compare=False)
    vectors: int = 0
    sums: int = 0
    representative: bool = False


def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Without memory: a launch that is recorded needs sizes, strides and alignment alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


B, N, C = 8, 512, 1024


def problems() -> Iterator[Problem]:
    """Every path of every launcher, at a shape that is aligned."""
    yield from _gated_residual()
    yield from _glu()
    yield from _fuse()
    yield from _modulate()
    yield from _adaptation_gate()


def _gated_residual() -> Iterator[Problem]:
    gates = {
        "scalar": (1, 1, 1), "channel": (1, 1, C), "item": (B, 1, C), "item scalar": (B, 1, 1),
        "row": (B, N, 1), "position": (1, N, C), "full": (B, N, C),
    }  # fmt: skip
    masked = [(name, act, True) for name in gates for act in (0,)]
    plain = [(name, act, False) for name in gates for act in (0,)]
    plain += [("channel", 1, False), ("channel", 2, False), ("full", 1, True)]
    for name, act, mask in plain + masked:
        shape, full = gates[name], name == "full"

        def forward(launcher, dtype, shape=shape, masked=mask, act=act):
            x, y = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
            mask = tensor(torch.bool, B, N) if masked else None
            return launcher(x, y, tensor(dtype, *shape), mask, act)

        def backward(launcher, dtype, shape=shape, masked=mask, act=act):
            dout, y = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
            mask = tensor(torch.bool, B, N) if masked else None
            return launcher(dout, y, tensor(dtype, *shape), mask, act, True, True)

        label = f"gate {name}, {('tanh', 'sigmoid', 'identity')[act]}"
        label += ", row mask" if mask else ""
        vector = int(name in ("channel", "item", "position"))
        chosen = act == 0 and mask == (name == "item")
        # One position for all items: in the forward each row of a tile has its own gate.
        own = int(name == "position")
        yield Problem(
            "gated_residual", "fwd", label, 3 + full + own, forward, vector - own, 0,
            chosen and name in ("scalar", "item", "full"),
        )  # fmt: skip
        yield Problem(
            "gated_residual", "bwd", label, 5 if full else 3, backward, vector, vector,
            chosen and name in ("channel", "item", "row", "full"),
        )  # fmt: skip


def _glu() -> Iterator[Problem]:
    for act, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "identity")):

        def forward(launcher, dtype, act=act):
            return launcher(tensor(dtype, B, N, C), tensor(dtype, B, N, C), act)

        def backward(launcher, dtype, act=act):
            data = [tensor(dtype, B, N, C) for _ in range(3)]
            return launcher(*data, act)

        def packed(launcher, dtype, act=act):
            return launcher(tensor(dtype, B, N, 2 * C), act)

        def packed_backward(launcher, dtype, act=act):
            return launcher(tensor(dtype, B, N, C), tensor(dtype, B, N, 2 * C), act)

        yield Problem("glu", "fwd", name, 3, forward, representative=act == 0)
        yield Problem("glu", "bwd", name, 5, backward, representative=act == 1)
        yield Problem("glu_packed", "fwd", name, 3, packed)
        yield Problem("glu_packed", "bwd", name, 5, packed_backward, representative=act == 0)


def _fuse() -> Iterator[Problem]:
    forms = {
        "shared": (1, 1, 1), "item": (B, 1, 1), "row": (B, N, 1), "channel": (1, 1, C),
        "full": (B, N, C),
    }  # fmt: skip
    modes = ("softmax", "sigmoid", "gmu", "gmu pair")
    runs = [(m, 2 if m == 3 else 3, form, False) for m in range(4) for form in forms]
    runs += [(m, 2 if m == 3 else 3, form, True) for m in range(4) for form in ("row", "full")]
    runs += [(0, K, form, False) for K in (2, 8) for form in ("row", "channel", "full")]
    for mode, K, form, absent in runs:
        L = 1 if mode == 3 else K

        def arguments(dtype, mode=mode, K=K, form=form, L=L, absent=absent):
            xs = [tensor(dtype, B, N, C) for _ in range(K)]
            b, n, c = forms[form]
            return xs, tensor(dtype, b, n, L, c), tensor(torch.bool, B, K) if absent else None, mode

        def forward(launcher, dtype, arguments=arguments):
            return launcher(*arguments(dtype))

        def backward(launcher, dtype, arguments=arguments):
            return launcher(tensor(dtype, B, N, C), *arguments(dtype), True, True)

        label = f"{modes[mode]} of {K}, logits {form}" + (", absent" if absent else "")
        full, vectors = L * (form == "full"), L * (form == "channel")
        chosen = (mode, K, form, absent) in {
            (0, 3, "row", True), (0, 3, "shared", False), (3, 2, "full", False),
            (0, 3, "channel", False),
        }  # fmt: skip
        # The pair's one logit is read for each of its two weights: the second time from a register.
        yield Problem("fuse", "fwd", label, K + 1 + full, forward, vectors, 0, chosen)
        yield Problem(
            "fuse", "bwd", label, 2 * K + 1 + 2 * full, backward, vectors, vectors, chosen
        )


def _modulate() -> Iterator[Problem]:
    for norm, norm_name in enumerate(("none", "layer", "rms")):
        for gated in (False, True):

            def forward(launcher, dtype, norm=norm, gated=gated):
                x, item = tensor(dtype, B, N, C), tensor(dtype, B, 1, C)
                more = (tensor(dtype, B, N, C), item) if gated else (None, None)
                return launcher(x, *more, item, tensor(dtype, B, 1, C), None, None, norm, 1e-6)

            def backward(launcher, dtype, norm=norm, gated=gated):
                x, item = tensor(dtype, B, N, C), tensor(dtype, B, 1, C)
                h, dh = (tensor(dtype, B, N, C) if gated else None for _ in range(2))
                needs = [True, gated, gated, True, True, False, False]
                return launcher(
                    tensor(dtype, B, N, C), dh, x, h, item if gated else None, item, None, None,
                    norm, 1e-6, tensor(dtype, B, 1, C), needs,
                )  # fmt: skip

            label = f"norm {norm_name}, scale and shift" + (", residual and gate" if gated else "")
            yield Problem(
                "modulate", "fwd", label, 4 if gated else 2, forward, 3 if gated else 2, 0,
                norm == 1,
            )  # fmt: skip
            yield Problem(
                "modulate", "bwd", label, 6 if gated else 3, backward, 2 if gated else 1,
                3 if gated else 2, norm == 1,
            )  # fmt: skip


def _adaptation_gate() -> Iterator[Problem]:
    for masked in (False, True):

        def forward(launcher, dtype, masked=masked):
            z, h = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
            mask = tensor(torch.bool, B, N) if masked else None
            return launcher(z, h, tensor(dtype, C), tensor(dtype, C), mask, 1.0, 1e-5)

        def backward(launcher, dtype, masked=masked):
            dout, z, h = (tensor(dtype, B, N, C) for _ in range(3))
            mask = tensor(torch.bool, B, N) if masked else None
            vectors = tensor(dtype, C), tensor(dtype, C)
            return launcher(dout, z, h, *vectors, mask, 1.0, 1e-5, [True] * 4)

        label = "weight and bias" + (", row mask" if masked else "")
        yield Problem("adaptation_gate", "fwd", label, 3, forward, 2, 0, not masked)
        yield Problem("adaptation_gate", "bwd", label, 5, backward, 1, 2, not masked)
