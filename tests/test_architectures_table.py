"""README's and the manual's tables of architectures are what the registry says."""

from __future__ import annotations

import architectures_table as tables
import pytest

PROMISED = (
    "lxmert", "mllama", "idefics", "idefics2", "blip", "blip_2", "instructblip", "bridgetower",
    "flava", "visual_bert", "vilt", "align", "clip", "clipseg", "owlvit", "owlv2",
    "grounding_dino", "mm_grounding_dino", "whisper", "bart", "musicgen", "t5", "pix2struct",
    "seamless_m4t", "kosmos2", "git", "sam", "sam2", "perceiver", "speecht5", "detr",
    "conditional_detr", "deformable_detr", "rt_detr", "dab_detr", "table_transformer",
    "mask2former", "oneformer", "aria", "qwen2_5_omni", "qwen3_next", "gemma3", "llama4",
    "chameleon", "janus", "siglip", "moonshine", "dia", "evolla",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "table"), [("README.md", tables.short), ("docs/drop-in.md", tables.long)]
)
def test_the_tables_are_current(name: str, table: object) -> None:
    text = (tables.ROOT / name).read_text(encoding="utf-8")
    wanted = tables.written(text, table(tables.supported()), name)  # type: ignore[operator]
    assert text == wanted, "run python tools/architectures_table.py"


def test_what_was_promised_is_there_and_tested() -> None:
    found = tables.supported()
    assert [name for name in PROMISED if name not in found or not found[name].tested] == []


@pytest.mark.parametrize(
    ("case", "folder"),
    [("blip", "blip"), ("blip-retrieval", "blip"), ("blip-2", "blip_2"), ("xclip", "x_clip"),
     ("idefics3", "idefics3"), ("kosmos-2", "kosmos2"), ("vit", "vit")],
)  # fmt: skip
def test_the_folder_of_a_case(case: str, folder: str) -> None:
    assert (
        tables._folder(case, ["blip", "blip_2", "idefics", "kosmos2", "vilt", "x_clip"]) == folder
    )


def test_a_table_stands_between_its_markers() -> None:
    text = f"before\n{tables.START}\n| old |\n{tables.END}\nafter\n"
    new = tables.written(text, iter(["| new |"]), "x")
    assert new == text.replace("old", "new") == tables.written(new, iter(["| new |"]), "x")
    with pytest.raises(ValueError, match="x: expected one"):
        tables.written(text + text, iter([]), "x")
