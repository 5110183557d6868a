"""The one registry of problems: tests, property tests and benchmarks all take theirs from here.

A `Case` is data: sizes and options, no tensors. `make_inputs(case, dtype, seed)` makes the tensors.
Adding a case adds it to every test of its op, for every dtype, backend and instruction set.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmfast.testing.inputs import LAYOUTS, Inputs, make_inputs

__all__ = [
    "CROSS_ATTENTION",
    "LAYOUTS",
    "Case",
    "Inputs",
    "functional_cases",
    "make_inputs",
    "performance_cases",
]


@dataclass(frozen=True)
class Case:
    """One `cross_attention` problem.

    `mask` and `bias` name the dims they span, "1" where they broadcast: "B11M", "NM", "" (0-D).
    """

    name: str
    B: int
    H: int
    N: int
    M: int
    D: int
    G: int = 0  # 0: as H
    Dv: int = 0  # 0: as D
    kv_lens: tuple[int, ...] | None = None
    q_lens: tuple[int, ...] | None = None
    segments: str | None = None  # "images", "orphan", "shuffled", "apart"
    segment_rule: str = "equal"
    mask: str | None = None
    mask_kind: str = "random"  # "dead_rows", "dead_columns", "dead_item", "tiles", "none", "all"
    bias: str | None = None
    bias_dtype: str = "same"  # "float32"
    bias_kind: str = "normal"  # "infinite": some entries and whole rows are -inf
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    gate: str | None = None  # "head": [B, N, H]; "full": [B, N, H, Dv]
    gate_dtype: str = "same"
    dlse: bool = False  # a gradient comes in through the LSE as well
    importance: bool = False
    weights: bool | str = False
    layout: str = "bhnd"
    kv_layout: str = ""  # "": as q
    magnitude: float = 1.0  # of q
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "G", self.G or self.H)
        object.__setattr__(self, "Dv", self.Dv or self.D)
        object.__setattr__(self, "kv_layout", self.kv_layout or self.layout)

    @property
    def ragged(self) -> bool:
        """Do the items have lengths of their own?"""
        return self.kv_lens is not None

    @property
    def pairs(self) -> int:
        """Query-key pairs within the lengths, over all heads: the work that has to be done."""
        kv = self.kv_lens or (self.M,) * self.B
        rows = self.q_lens or (self.N,) * self.B
        return self.H * sum(m * n for m, n in zip(kv, rows, strict=True))

    def flops(self, backward: bool) -> int:
        """Multiply-adds count as two; the backward has five products where the forward has two."""
        forward = 2 * self.pairs * (self.D + self.Dv)
        return forward + (2 * self.pairs * (3 * self.D + 2 * self.Dv) if backward else 0)


# --- the cases ----------------------------------------------------------------------------------


def _functional() -> list[Case]:
    """Small problems that between them use every argument in every form."""
    cases = [
        Case("tiny", 1, 1, 1, 1, 16),
        Case("one_key", 2, 2, 5, 1, 16),
        Case("dense", 2, 3, 37, 53, 64),
        Case("dense_long", 1, 2, 130, 300, 32),
        Case("one_query", 3, 4, 1, 197, 64),
        Case("big_scores", 1, 2, 33, 65, 64, magnitude=12.0),
        Case("scale", 1, 2, 9, 33, 16, scale=0.7),
        Case("scale_negative", 1, 2, 9, 33, 16, scale=-0.3),
        Case("scale_zero", 1, 2, 9, 33, 16, scale=0.0),
    ]
    cases += [Case(f"width_{D}", 2, 2, 18, 35, D) for D in (1, 2, 3, 8, 17, 48, 72, 80, 96, 128)]
    cases += [Case(f"width_{D}", 1, 1, 7, 35, D) for D in (160, 256, 333, 512)]
    cases += [
        Case(f"widths_{D}_{Dv}", 1, 2, 19, 40, D, Dv=Dv)
        for D, Dv in ((64, 1), (1, 64), (17, 80), (96, 33), (64, 128), (16, 512))
    ]
    cases += [
        Case(f"empty_{name}", *sizes, 16)
        for name, sizes in (
            ("batch", (0, 2, 5, 7)),
            ("rows", (2, 2, 0, 7)),
            ("keys", (2, 2, 5, 0)),
            ("all", (0, 2, 0, 0)),
        )
    ]
    cases += [
        Case("gqa_2", 2, 4, 17, 33, 32, G=2),
        Case("gqa_1", 2, 6, 17, 33, 32, G=1),
        Case("gqa_3_ragged", 2, 6, 70, 90, 32, G=2, kv_lens=(90, 31), gate="head"),
    ]
    cases += [
        Case("lens", 4, 2, 35, 150, 32, kv_lens=(150, 64, 1, 0)),
        Case("lens_all_zero", 2, 2, 5, 9, 16, kv_lens=(0, 0)),
        Case("lens_odd", 5, 2, 3, 131, 64, kv_lens=(129, 127, 65, 63, 17)),
        Case("q_lens", 4, 2, 70, 40, 32, q_lens=(70, 33, 1, 0)),
        Case("both_lens", 4, 2, 70, 90, 32, kv_lens=(90, 3, 0, 65), q_lens=(1, 70, 65, 0)),
        Case("one_query_lens", 3, 4, 1, 197, 64, kv_lens=(197, 5, 0)),
    ]
    cases += [
        Case("causal", 2, 2, 66, 66, 32, is_causal=True),
        Case("causal_wide", 1, 2, 20, 150, 32, is_causal=True),
        Case("causal_tall", 1, 2, 150, 20, 32, is_causal=True),
        Case("causal_lens", 3, 2, 70, 90, 32, is_causal=True, kv_lens=(90, 40, 0),
             q_lens=(70, 60, 9)),
        Case("causal_kv_lens", 3, 2, 70, 90, 32, is_causal=True, kv_lens=(90, 40, 0)),
        Case("causal_q_lens", 2, 2, 70, 90, 32, is_causal=True, q_lens=(40, 3)),
    ]  # fmt: skip
    for rule in ("equal", "at_most"):
        for kind in ("images", "orphan", "shuffled", "apart"):
            cases.append(
                Case(f"segments_{rule}_{kind}", 2, 2, 75, 140, 32, segments=kind, segment_rule=rule)
            )
    cases += [
        Case("segments_lens", 2, 2, 75, 140, 32, segments="images", kv_lens=(140, 60)),
        Case("segments_everything", 2, 4, 75, 140, 32, G=2, segments="images",
             segment_rule="at_most", kv_lens=(140, 60), q_lens=(40, 75), is_causal=True,
             bias="1HNM", gate="full", dropout_p=0.2),
    ]  # fmt: skip
    cases += [
        Case(f"mask_{dims or 'scalar'}", 2, 3, 21, 45, 16, mask=dims)
        for dims in ("BHNM", "B1NM", "B11M", "11NM", "1HN1", "BH11", "NM", "1M", "M", "HNM", "N1")
    ]
    cases += [
        Case("mask_scalar_true", 2, 3, 21, 45, 16, mask="", mask_kind="all"),
        Case("mask_scalar_false", 2, 3, 21, 45, 16, mask="", mask_kind="none"),
        Case("mask_dead_rows", 2, 2, 40, 70, 16, mask="B1NM", mask_kind="dead_rows"),
        Case("mask_dead_columns", 2, 2, 40, 70, 16, mask="BHNM", mask_kind="dead_columns"),
        Case("mask_dead_item", 2, 2, 40, 70, 16, mask="B11M", mask_kind="dead_item"),
        Case("mask_tiles", 1, 2, 140, 200, 32, mask="11NM", mask_kind="tiles"),
        Case("mask_lens", 2, 2, 40, 70, 16, mask="BHNM", kv_lens=(70, 20), q_lens=(13, 40)),
    ]
    # Every subset of broadcast dims; B, H, N, M > 1, so that each sum is over several terms.
    for subset in range(16):
        dims = "".join(letter if subset >> i & 1 else "1" for i, letter in enumerate("BHNM"))
        cases.append(Case(f"bias_{dims}", 2, 3, 21, 37, 16, bias=dims))
    cases += [
        Case(f"bias_{dims or 'scalar'}", 2, 3, 21, 37, 16, bias=dims)
        for dims in ("", "M", "NM", "N1", "HNM")
    ]
    cases += [
        Case("bias_float32", 2, 3, 21, 80, 16, bias="1HNM", bias_dtype="float32"),
        Case("bias_float32_row", 2, 3, 21, 80, 16, bias="B11M", bias_dtype="float32"),
        Case("bias_infinite", 2, 3, 21, 37, 16, bias="BHNM", bias_kind="infinite"),
        Case("bias_lens", 2, 3, 70, 90, 16, bias="1HNM", kv_lens=(90, 33), q_lens=(20, 70)),
        Case("bias_mask", 2, 3, 21, 37, 16, bias="BHNM", mask="B1NM", mask_kind="dead_rows"),
        Case("bias_gqa", 2, 4, 21, 70, 16, G=2, bias="BH1M"),
        Case("bias_causal", 2, 2, 70, 70, 16, bias="1HNM", is_causal=True),
    ]
    cases += [
        Case("gate_head", 2, 3, 21, 37, 16, gate="head"),
        Case("gate_full", 2, 3, 21, 37, 16, gate="full"),
        Case("gate_head_float32", 2, 3, 21, 37, 16, gate="head", gate_dtype="float32"),
        Case("gate_full_float32", 2, 3, 21, 37, 16, Dv=33, gate="full", gate_dtype="float32"),
        Case("gate_lens", 3, 3, 40, 70, 16, gate="full", kv_lens=(70, 0, 9), q_lens=(40, 9, 0)),
    ]
    cases += [
        Case("dropout", 2, 3, 21, 70, 16, dropout_p=0.3),
        Case("dropout_odd", 2, 3, 70, 131, 24, dropout_p=0.6, kv_lens=(131, 66)),
        Case("dropout_high", 1, 1, 5, 9, 8, dropout_p=0.99),
        Case("dropout_gate_bias", 2, 4, 21, 37, 16, G=2, dropout_p=0.1, gate="full", bias="1HNM"),
    ]
    cases += [
        Case("dlse", 2, 3, 21, 70, 16, dlse=True),
        Case("dlse_lens_gate", 3, 3, 40, 70, 16, dlse=True, gate="head", kv_lens=(70, 0, 9)),
        Case("importance", 2, 3, 21, 70, 16, importance=True),
        Case("importance_lens", 3, 4, 75, 140, 32, G=2, importance=True, kv_lens=(140, 0, 65),
             q_lens=(75, 9, 40)),
        Case("weights_mean", 2, 3, 21, 70, 16, weights=True),
        Case("weights_per_head", 2, 3, 21, 70, 16, weights="per_head"),
        Case("weights_mask", 2, 3, 21, 70, 16, weights="mean", mask="B1NM", mask_kind="dead_rows"),
        Case("results_everything", 2, 4, 75, 140, 32, G=2, Dv=48, importance=True, dlse=True,
             weights="per_head", bias="B1NM", segments="images", segment_rule="at_most",
             kv_lens=(140, 60), dropout_p=0.2, gate="full", is_causal=True),
        Case("results_mean_bias", 2, 4, 40, 70, 16, importance=True, weights="mean", bias="1HN1"),
    ]  # fmt: skip
    cases += [
        Case(f"layout_{layout}", 2, 3, 37, 70, 32, kv_lens=(70, 33), layout=layout)
        for layout in LAYOUTS
    ]
    cases += [
        Case("layout_mixed", 2, 4, 37, 70, 32, G=2, Dv=24, layout="bnhd", kv_layout="packed"),
        Case("layout_mixed_back", 2, 4, 37, 70, 32, layout="sliced", kv_layout="bnhd", bias="1HNM",
             gate="full", importance=True),
        Case("layout_misaligned_odd", 2, 3, 37, 70, 17, layout="misaligned"),
    ]  # fmt: skip
    # Paths that kernels choose by shape: few rows on a key head, ranges of keys, chunks of rows.
    cases += [
        Case("few_rows_everything", 2, 4, 2, 150, 32, G=2, Dv=48, importance=True, dlse=True,
             weights="per_head", bias="B1NM", segments="images", segment_rule="at_most",
             kv_lens=(150, 60), dropout_p=0.2, gate="full", is_causal=True),
        Case("few_rows_mask", 2, 3, 3, 70, 17, mask="BHNM", mask_kind="dead_columns",
             kv_lens=(70, 20), q_lens=(3, 1)),
        Case("few_rows_heads", 8, 12, 1, 70, 40, layout="bnhd", bias="1H1M", gate="head",
             kv_lens=(70, 64, 65, 1, 0, 33, 9, 17)),
        Case("key_ranges", 1, 2, 37, 1100, 16, bias="1HN1", dlse=True, importance=True,
             dropout_p=0.1),
        Case("key_ranges_gate", 1, 2, 37, 1100, 16, bias="111M", weights=True, gate="head"),
        Case("key_ranges_scalar", 1, 4, 37, 1300, 16, G=2, bias="1111", kv_lens=(700,)),
        Case("key_ranges_few_rows", 1, 2, 2, 1100, 16, bias="11N1", importance=True, dlse=True),
        Case("row_chunks", 1, 2, 230, 70, 16, G=1, mask="11NM", mask_kind="tiles", gate="full",
             q_lens=(221,)),
    ]  # fmt: skip
    return cases


# name: B, H, N, M, D of shared problems in multimodal models, and where each is from.
_SHAPES = {
    "vqa": (8, 12, 40, 36, 64),  # LXMERT text over region features
    "caption": (8, 12, 128, 197, 64),  # text over ViT-B/16 patches
    "qformer": (8, 12, 32, 257, 64),  # BLIP-2 queries over ViT-g
    "align": (16, 8, 64, 50, 64),  # audio over text (MulT)
    "mllama": (2, 16, 128, 1601, 128),  # text over four image tiles
    "detect": (4, 8, 100, 850, 32),  # object queries over a feature map
    "speech": (2, 12, 448, 1500, 64),  # Whisper decoder over audio
    "pool": (8, 12, 1, 577, 64),  # attention pooling
    "square": (1, 12, 2048, 2048, 64),  # long video tokens
}


def _ragged_lens(B: int, M: int) -> tuple[int, ...]:
    """Evenly from a quarter to the whole of M, mean 62.5 %, the long ones not all at the end."""
    if B == 1:
        return (round(0.625 * M),)
    even = [round(M * (0.25 + 0.75 * i / (B - 1))) for i in range(B)]
    return tuple(even[i * 5 % B] if B % 5 else even[i] for i in range(B))


def _performance() -> list[Case]:
    """The shapes that are timed, dense and ragged, in the memory layout of a projection."""
    cases = []
    for name, (B, H, N, M, D) in _SHAPES.items():
        cases.append(Case(name, B, H, N, M, D, layout="bnhd", tags=("performance",)))
        lens = _ragged_lens(B, M)
        cases.append(dataclasses.replace(cases[-1], name=f"{name}_ragged", kv_lens=lens))
    return cases


def _index(cases: list[Case]) -> dict[str, Case]:
    index = {case.name: case for case in cases}
    assert len(index) == len(cases), "two cases have the same name"
    return index


CROSS_ATTENTION: dict[str, Case] = _index(_functional() + _performance())


def functional_cases() -> list[Case]:
    """The small problems of the tests."""
    return [case for case in CROSS_ATTENTION.values() if "performance" not in case.tags]


def performance_cases() -> list[Case]:
    """The problems that are timed."""
    return [case for case in CROSS_ATTENTION.values() if "performance" in case.tags]
