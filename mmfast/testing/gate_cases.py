"""The registry of gating problems: tests, property tests and benchmarks take theirs from here.

A `GateCase` is data: sizes and options, no tensors. `make_gate_inputs(case, dtype)` makes these.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmfast.testing.gate_inputs import GATE_LAYOUTS, GateInputs, make_gate_inputs

__all__ = [
    "GATES",
    "GATE_LAYOUTS",
    "GateCase",
    "GateInputs",
    "functional_gate_cases",
    "make_gate_inputs",
    "performance_gate_cases",
]


_Sides = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class GateCase:
    """One problem of a gating op.

    `shape` is that of the data, `[B, ..., C]` (for `glu_packed` C is the width of the result).
    `sides` are the tensors beside the data and the dims they span: "B", "N" (all dims between the
    first and the last), "C", "K" or "1"; two letters are one row an item: `("gate", "BC")`.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    activation: str = ""
    sides: tuple[tuple[str, str], ...] = ()
    side_dtype: str = "same"  # "float32"
    side_layout: str = "dense"  # "chunk": a slice of a wider projection
    row_mask: str = ""  # "BN", "B1", "1N"
    K: int = 0
    mode: str = ""
    present: str = ""  # "random" (one item has nothing), "all", "none"
    norm: str | None = "layer"
    residual: bool = False
    beta: float = 1.0
    eps: float = 1e-5
    layout: str = "dense"
    magnitude: float = 1.0  # of the data
    special: str = ""  # "infinite_logits", "zero_rows", "offset"
    tags: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Of one data tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def units(self, backward: bool) -> int:
        """Data tensors that must be read or written once: the u of a memory pass."""
        forward, gradients = {
            "gated_residual": (3, 3),
            "glu": (3, 5),
            "glu_packed": (3, 5),
            "fuse": (self.K + 1, 2 * self.K + 1),
            "modulate": (4, 6) if self.residual else (2, 3),
            "adaptation_gate": (3, 5),
        }[self.op]
        # A logit or gate as large as the data is one more; its gradient another.
        wide = sum(set("BNC") <= set(form) for _, form in self.sides)
        wide *= self.K if self.op == "fuse" and any("K" in form for _, form in self.sides) else 1
        return forward + wide + (gradients + 2 * wide if backward else 0)


# --- the cases ----------------------------------------------------------------------------------

_WIDTHS = (1, 2, 3, 17, 64, 100, 257, 1040)
_EMPTY = {"batch": (0, 3, 8), "rows": (2, 0, 8), "channels": (2, 3, 0)}
_RANKS = {"1d": (33,), "2d": (5, 33), "4d": (2, 3, 4, 33), "5d": (2, 1, 3, 2, 17)}


def _gated_residual() -> list[GateCase]:
    op = "gated_residual"

    def case(name: str, shape: tuple[int, ...], form: str = "1", **more: object) -> GateCase:
        more.setdefault("activation", "tanh")
        return GateCase(op, name, shape, sides=(("gate", form),), **more)  # type: ignore[arg-type]

    cases = [case(f"width_{C}", (2, 5, C), "C") for C in _WIDTHS]
    cases += [case(f"empty_{name}", shape) for name, shape in _EMPTY.items()]
    cases += [case(f"rank_{name}", shape) for name, shape in _RANKS.items()]
    for activation in ("tanh", "sigmoid", "identity"):
        for form in ("", "1", "C", "BC", "1C", "B1", "BNC", "BN1", "B1C", "1NC", "1N1", "11C"):
            name = f"{activation}_{form or 'scalar'}"
            cases.append(case(name, (3, 7, 37), form, activation=activation))
    cases += [
        case("item_4d", (2, 3, 4, 33), "BC"),
        case("rows_4d", (2, 3, 4, 33), "BN1", activation="sigmoid"),
        case("same_4d", (2, 3, 4, 33), "BNC", row_mask="BN"),
        case("many_rows", (2, 1030, 24), "1"),
        case("many_rows_channel", (3, 700, 40), "C", activation="sigmoid"),
        case("many_items", (130, 9, 24), "BC", row_mask="BN"),
        case("long_row", (1, 2, 9001), "C"),
        case("large_gate", (2, 5, 64), "C", magnitude=1.0, special="large_sides"),
        case("tiny_gate", (2, 5, 64), "C", special="tiny_sides"),
        case("float32_gate", (3, 7, 64), "BC", side_dtype="float32"),
        case("float32_same", (3, 7, 64), "BNC", side_dtype="float32", row_mask="BN"),
        case("chunk", (3, 7, 64), "BC", side_layout="chunk", activation="identity"),
        case("chunk_rows", (3, 7, 64), "BNC", side_layout="chunk", activation="identity"),
    ]
    for mask in ("BN", "B1", "1N", "11"):
        for form in ("1", "C", "BC", "BNC", "BN1"):
            cases.append(case(f"mask_{mask}_{form}", (3, 7, 37), form, row_mask=mask))
    cases += [case(f"layout_{x}", (3, 7, 40), "BC", layout=x, row_mask="BN") for x in GATE_LAYOUTS]
    cases += [case(f"layout_{x}_same", (3, 7, 17), "BNC", layout=x) for x in GATE_LAYOUTS]
    return cases


def _glu() -> list[GateCase]:
    cases = []
    for op in ("glu", "glu_packed"):
        cases += [GateCase(op, f"width_{C}", (2, 5, C), "silu") for C in _WIDTHS]
        cases += [GateCase(op, f"empty_{n}", shape, "silu") for n, shape in _EMPTY.items()]
        cases += [GateCase(op, f"rank_{n}", shape, "gelu") for n, shape in _RANKS.items()]
        for activation in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "identity"):
            cases += [
                GateCase(op, activation, (3, 7, 70), activation),
                GateCase(op, f"{activation}_large", (3, 7, 70), activation, magnitude=30.0),
                GateCase(op, f"{activation}_tiny", (3, 7, 70), activation, magnitude=1e-3),
            ]
        cases += [GateCase(op, f"layout_{x}", (3, 7, 40), "silu", layout=x) for x in GATE_LAYOUTS]
        cases.append(GateCase(op, "many_rows", (2, 300, 130), "silu"))
    return cases


def _fuse() -> list[GateCase]:
    def case(
        name: str, shape: tuple[int, ...], K: int, mode: str, form: str, **more: object
    ) -> GateCase:
        sides = (("logits", form),)
        return GateCase("fuse", name, shape, K=K, mode=mode, sides=sides, **more)  # type: ignore[arg-type]

    modes = ("softmax", "sigmoid", "gmu")
    cases = [case(f"width_{C}", (2, 5, C), 3, "softmax", "BNK") for C in _WIDTHS]
    cases += [case(f"empty_{name}", shape, 3, "softmax", "K") for name, shape in _EMPTY.items()]
    cases += [
        case(f"rank_{name}", shape, 3, "softmax", "BNK", present="random")
        for name, shape in _RANKS.items()
        if len(shape) > 1
    ]
    for mode in modes:
        for form in ("K", "BK", "1K", "BNK", "1NK", "B1K", "BNKC", "BNK1", "1NKC", "B1KC", "11K1"):
            for present in ("", "random"):
                name = f"{mode}_{form}" + ("_present" if present else "")
                cases.append(case(name, (4, 7, 37), 3, mode, form, present=present))
        cases += [
            case(f"{mode}_one", (4, 7, 37), 1, mode, "K", present="random"),
            case(f"{mode}_two", (4, 7, 37), 2, mode, "BK", present="random"),
            case(f"{mode}_many", (2, 3, 20), 19, mode, "BNK", present="random"),
            case(f"{mode}_many_channels", (2, 3, 20), 9, mode, "BNKC", present="random"),
            case(f"{mode}_none", (3, 4, 20), 3, mode, "BNK", present="none"),
            case(f"{mode}_float32", (3, 4, 33), 3, mode, "BNK", side_dtype="float32"),
            case(f"{mode}_float32_channels", (3, 4, 33), 3, mode, "BNKC", side_dtype="float32"),
            case(f"{mode}_large", (3, 4, 33), 3, mode, "BNK", magnitude=30.0),
            case(f"{mode}_infinite", (3, 9, 33), 3, mode, "BNK", special="infinite_logits",
                 present="random"),
            case(f"{mode}_infinite_channels", (3, 5, 33), 3, mode, "BNKC",
                 special="infinite_logits", present="random"),
            case(f"{mode}_rows", (2, 700, 24), 3, mode, "K", present="random"),
            case(f"{mode}_rows_channels", (2, 300, 24), 3, mode, "1NKC"),
            case(f"{mode}_4d", (2, 3, 4, 20), 3, mode, "BNKC", present="random"),
            case(f"{mode}_4d_item", (2, 3, 4, 20), 3, mode, "BK", present="random"),
        ]  # fmt: skip
    for form in ("BNC", "BN1", "1NC", "B1C", "111", "1N1"):
        for present in ("", "random"):
            name = f"pair_{form}" + ("_present" if present else "")
            cases.append(case(name, (4, 7, 37), 2, "gmu", form, present=present))
    cases += [
        case("pair_two_channels", (4, 7, 2), 2, "gmu", "BNC"),
        case("pair_tiny", (4, 7, 33), 2, "gmu", "BNC", magnitude=1e-3),
        case("pair_infinite", (4, 7, 33), 2, "gmu", "BNC", special="infinite_logits"),
        case("pair_2d", (4, 33), 2, "gmu", "BC", present="random"),
        case("pair_4d", (2, 3, 4, 20), 2, "gmu", "BNC", present="random"),
        case("two_channels_each", (4, 7, 2), 2, "gmu", "BNK1"),
    ]
    cases += [
        case(f"layout_{x}", (3, 7, 40), 3, "softmax", "BNK", layout=x, present="random")
        for x in GATE_LAYOUTS
    ]
    cases += [case(f"layout_{x}_pair", (3, 7, 17), 2, "gmu", "BNC", layout=x) for x in GATE_LAYOUTS]
    return cases


def _modulate() -> list[GateCase]:
    both: _Sides = (("scale", "BC"), ("shift", "BC"))
    zero = (("gate", "BC"), *both)

    def case(name: str, shape: tuple[int, ...], **more: object) -> GateCase:
        more.setdefault("sides", both)
        return GateCase("modulate", name, shape, **more)  # type: ignore[arg-type]

    def all_sides(form: str) -> tuple[tuple[str, str], ...]:
        return (("gate", form), ("scale", form), ("shift", form), ("weight", "C"), ("bias", "C"))

    cases = [case(f"width_{C}", (2, 5, C)) for C in _WIDTHS if C > 1]
    # A row of one channel has no variance: its normalised value is 0.
    cases += [case("width_1", (2, 5, 1), norm="rms"), case("width_1_layer", (2, 5, 1))]
    cases += [case(f"empty_{n}", shape, sides=()) for n, shape in _EMPTY.items()]
    cases += [case(f"rank_{n}", shape, sides=(("scale", "C"),)) for n, shape in _RANKS.items()]
    for norm in (None, "layer", "rms"):
        label = norm or "film"
        for form in ("C", "BC", "1C", "BNC", "1NC", "B1C"):
            sides: _Sides = (("scale", form), ("shift", form))
            cases.append(case(f"{label}_{form}", (3, 7, 37), norm=norm, sides=sides))
            sides = all_sides(form)
            cases.append(case(f"{label}_all_{form}", (3, 7, 37), norm=norm, sides=sides,
                              residual=True))  # fmt: skip
        for alone in ("scale", "shift", "weight", "bias"):
            form = "BC" if alone in ("scale", "shift") else "C"
            sides = ((alone, form),)
            cases.append(case(f"{label}_{alone}", (3, 7, 37), norm=norm, sides=sides))
        cases += [
            case(f"{label}_plain", (3, 7, 37), norm=norm, sides=()),
            case(f"{label}_residual", (3, 7, 37), norm=norm, residual=True),
            case(f"{label}_residual_plain", (3, 7, 37), norm=norm, sides=(), residual=True),
            case(f"{label}_zero", (3, 7, 37), norm=norm, sides=zero, residual=True),
            case(f"{label}_mixed", (3, 7, 37), norm=norm, residual=True,
                 sides=(("gate", "BNC"), ("scale", "BC"), ("shift", "C"), ("weight", "C"))),
            case(f"{label}_float32", (3, 7, 37), norm=norm, sides=all_sides("BC"), residual=True,
                 side_dtype="float32"),
            case(f"{label}_chunk", (3, 7, 40), norm=norm, sides=zero, residual=True,
                 side_layout="chunk"),
            case(f"{label}_large", (3, 7, 40), norm=norm, magnitude=100.0),
            case(f"{label}_many_rows", (2, 700, 40), norm=norm, sides=all_sides("BC"),
                 residual=True),
            case(f"{label}_many_items", (130, 3, 24), norm=norm, sides=zero, residual=True),
        ]  # fmt: skip
    cases += [
        case("offset", (2, 5, 100), special="offset"),
        case("long_row", (1, 3, 9001), sides=all_sides("C"), residual=True),
        case("item_4d", (2, 3, 4, 33), sides=all_sides("BC"), residual=True),
        case("rows_4d", (2, 3, 4, 33), sides=(("scale", "BNC"),)),
        case("eps", (2, 5, 64), eps=0.1),
    ]
    cases += [
        case(f"layout_{x}", (3, 7, 40), layout=x, sides=zero, residual=True) for x in GATE_LAYOUTS
    ]
    return cases


def _adaptation_gate() -> list[GateCase]:
    affine = (("weight", "C"), ("bias", "C"))

    def case(name: str, shape: tuple[int, ...], **more: object) -> GateCase:
        more.setdefault("sides", affine)
        return GateCase("adaptation_gate", name, shape, **more)  # type: ignore[arg-type]

    cases = [case(f"width_{C}", (2, 5, C)) for C in _WIDTHS if C > 1]
    cases += [case(f"empty_{name}", shape) for name, shape in _EMPTY.items()]
    cases += [case(f"rank_{name}", shape) for name, shape in _RANKS.items()]
    cases += [case(f"beta_{beta}", (3, 7, 64), beta=beta) for beta in (0.0, 0.1, 0.7, 1.3, 50.0)]
    cases += [case(f"mask_{m}", (3, 7, 37), row_mask=m, beta=0.5) for m in ("BN", "B1", "1N", "11")]
    cases += [
        case("plain", (3, 7, 37), sides=(), beta=0.5),
        case("weight", (3, 7, 37), sides=affine[:1], beta=0.5),
        case("bias", (3, 7, 37), sides=affine[1:], beta=0.5),
        case("zero_rows", (3, 7, 37), special="zero_rows", beta=0.5),
        case("float32_sides", (3, 7, 64), side_dtype="float32", beta=0.5),
        case("large", (3, 7, 64), magnitude=100.0, beta=0.5),
        case("many_rows", (2, 700, 40), beta=0.5, row_mask="BN"),
        case("long_row", (1, 3, 9001), beta=0.5),
        case("eps", (3, 7, 64), eps=0.1),
        case("mask_4d", (2, 3, 4, 33), row_mask="BN", beta=0.5),
    ]
    cases += [case(f"layout_{x}", (3, 7, 40), layout=x, beta=0.5) for x in GATE_LAYOUTS]
    return cases


# B, N, C that are timed: widths of models from 256 to 4096, rows from 64 to 16k.
_SHAPES = {
    "short": (4, 16, 256),
    "vision": (8, 197, 768),
    "text": (8, 128, 1024),
    "wide": (2, 256, 4096),
    "long": (8, 2048, 1024),
}


def _performance() -> list[GateCase]:
    """What multimodal models do, at each of the shapes."""
    zero = (("gate", "BC"), ("scale", "BC"), ("shift", "BC"))
    kinds = {
        "tanh_gate": GateCase("gated_residual", "", (), "tanh", sides=(("gate", "1"),)),
        "tanh_gate_rows": GateCase(
            "gated_residual", "", (), "tanh", sides=(("gate", "C"),), row_mask="BN"
        ),
        "swiglu": GateCase("glu", "", (), "silu"),
        "geglu_packed": GateCase("glu_packed", "", (), "gelu"),
        "softmax_mix_3": GateCase("fuse", "", (), K=3, mode="softmax", sides=(("logits", "BNK"),)),
        "gmu": GateCase("fuse", "", (), K=2, mode="gmu", sides=(("logits", "BNC"),)),
        "film": GateCase("modulate", "", (), norm=None, sides=zero[1:]),
        "ada_layer_norm": GateCase("modulate", "", (), sides=zero[1:]),
        "ada_layer_norm_zero": GateCase("modulate", "", (), sides=zero, residual=True),
        "mag": GateCase(
            "adaptation_gate", "", (), sides=(("weight", "C"), ("bias", "C")), beta=0.5
        ),
    }
    return [
        dataclasses.replace(case, name=f"{kind}_{name}", shape=shape, tags=("performance", kind))
        for kind, case in kinds.items()
        for name, shape in _SHAPES.items()
    ]


def _index(cases: list[GateCase]) -> dict[str, GateCase]:
    index = {f"{case.op}-{case.name}": case for case in cases}
    assert len(index) == len(cases), "two cases have the same name"
    return index


GATES: dict[str, GateCase] = _index(
    _gated_residual() + _glu() + _fuse() + _modulate() + _adaptation_gate() + _performance()
)


def functional_gate_cases(op: str) -> list[str]:
    """The names of the small problems of an op."""
    return [
        name for name, case in GATES.items() if case.op == op and "performance" not in case.tags
    ]


def performance_gate_cases() -> list[GateCase]:
    """The problems that are timed."""
    return [case for case in GATES.values() if "performance" in case.tags]
