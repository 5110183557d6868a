"""examples/image_text_audio: on made-up stamps, on a package made here, and on the real one."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "image_text_audio"
COLOURS = ((200, 30, 30), (30, 160, 40), (40, 60, 210))
WORDS = ("a red barn", "the green hills", "some blue water")


class Example(NamedTuple):
    """The modules of the example."""

    stamps: ModuleType
    encoders: ModuleType
    picture: ModuleType
    train: ModuleType


@pytest.fixture(scope="module")
def example() -> Iterator[Example]:
    """As when train.py is run: its folder is where Python looks first."""
    sys.path.insert(0, str(FOLDER))
    before = dict.fromkeys(Example._fields)
    before |= {name: sys.modules.pop(name, None) for name in Example._fields}
    try:
        yield Example(*(__import__(name) for name in Example._fields))
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def made_up(stamps: ModuleType, count: int = 36) -> Any:
    """Three classes that each modality tells apart: a colour, words, a pitch."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = np.full((count, stamps.SIDE, stamps.SIDE, 3), 255, dtype=np.uint8)
    sounds = []
    for item, label in enumerate(labels):
        x, y = rng.integers(0, stamps.SIDE - 50, 2)
        images[item, y : y + 50, x : x + 50] = COLOURS[label]
        frames = rng.normal(size=(int(rng.integers(20, 60)), stamps.MELS)).astype(np.float16)
        frames[:, 8 * label : 8 * label + 8] += 3
        nothing = np.zeros((0, stamps.MELS), dtype=np.float16)
        sounds.append([nothing, frames] if item % 2 else [frames, nothing])
    captions = [f"{WORDS[label]}, number {item}" for item, label in enumerate(labels)]
    names = [f"kind{label}/{item}" for item, label in enumerate(labels)]
    return stamps.Stamps(images, captions, sounds, labels, names, ["kind0", "kind1", "kind2"])


# --- training, tables, pictures --------------------------------------------------------------


def test_it_runs_from_stamps_to_picture(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr(example.train, "BATCH", 12)
    text, path = io.StringIO(), tmp_path / "picture.png"
    console = Console(file=text, width=100)
    found = example.train.run(made_up(example.stamps), 20, path, console)
    assert found["all three"] > 0.8 > found["the most frequent class"]
    assert {"no image", "no text", "no audio"} < set(found)
    assert all(0.0 <= value <= 1.0 for value in found.values())
    for name in (*found, "most important", str(path.name)):
        assert name in text.getvalue().replace("\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_was_read_is_a_share_and_padding_none_of_it(example: Example) -> None:
    torch.manual_seed(0)
    part = made_up(example.stamps, 6)
    model = example.train.make_model(3).eval()
    batch = example.train.make_batch(part, range(6))
    said = example.picture.explain(model, batch.inputs, batch.lens)
    for name in example.picture.MODALITIES:
        share = said.read[name]
        torch.testing.assert_close(share.sum(dim=1), torch.ones(6))
        if name in batch.lens:
            beyond = torch.arange(share.shape[1]) >= batch.lens[name][:, None]
            assert bool((share[beyond] == 0).all())
    torch.testing.assert_close(said.weights.sum(dim=1), torch.ones(6))


def test_regions_are_erased_where_the_share_is_largest(example: Example) -> None:
    regions = example.encoders.REGIONS**2
    images = torch.zeros(1, 3, example.encoders.PIXELS, example.encoders.PIXELS)
    shares = torch.zeros(1, regions)
    shares[0, 9] = 1.0  # the second region of the second line
    white = example.train.erased(images, shares, 1)[0, 0]
    size = example.encoders.PIXELS // example.encoders.REGIONS
    assert bool((white[size : 2 * size, size : 2 * size] == 1).all())
    assert int(white.sum()) == size * size


def test_padding_of_a_batch_changes_nothing(example: Example) -> None:
    torch.manual_seed(0)
    part = made_up(example.stamps, 8)
    model = example.train.make_model(3).eval()
    together = example.train.make_batch(part, range(8))
    logits = model(together.inputs, lens=together.lens).logits["class"]
    for item in (0, 3):
        alone = example.train.make_batch(part, [item])
        mine = model(alone.inputs, lens=alone.lens).logits["class"]
        torch.testing.assert_close(mine[0], logits[item], rtol=1e-4, atol=1e-4)


def test_words_that_nobody_saw_share_pieces_with_known_ones(example: Example) -> None:
    pieces = example.encoders.pieces
    assert len(set(pieces("flower")) & set(pieces("sunflowers."))) >= 5
    assert 0 not in pieces("A") and len(pieces("A")) == 1  # 0 is no piece
    assert pieces("1/2") and pieces("—") and pieces("Owl,") == pieces("owl")


def test_no_caption_is_on_both_sides(example: Example) -> None:
    part = made_up(example.stamps)
    captions = [WORDS[0]] * 5 + ["A " + caption.upper() for caption in part.captions[5:]]
    train, test = example.stamps.split(part._replace(captions=captions))
    assert len(train.labels) + len(test.labels) == len(part.labels)
    assert not set(train.names) & set(test.names)
    assert not {c.casefold() for c in train.captions} & {c.casefold() for c in test.captions}
    counts = np.bincount(test.labels)
    assert counts.min() >= 3 and counts.max() <= 8


# --- reading the package ---------------------------------------------------------------------

SVG = (
    b"<svg xmlns='http://www.w3.org/2000/svg' width='20pt' height='10pt'>"
    b"<rect width='30' height='30' fill='#ff0000'/></svg>"
)


def made_package(path: Path, stamps: ModuleType) -> str:
    """A .deb with 20 stamps of one class and one of another; returns its SHA-256."""
    pictures, audio = pytest.importorskip("PIL.Image"), pytest.importorskip("soundfile")
    pytest.importorskip("resvg_py")
    png, ogg = io.BytesIO(), io.BytesIO()
    pictures.new("RGBA", (40, 20), (0, 0, 255, 255)).save(png, format="png")
    tone = np.sin(2 * np.pi * 440 * np.arange(22050) / 44100)
    audio.write(ogg, tone, 44100, format="OGG", subtype="VORBIS")
    files = {}
    for number in range(20):
        name = f"animals/owl{number}"
        files[f"{name}.svg" if number == 3 else f"{name}.png"] = (
            SVG if number == 3 else png.getvalue()
        )
        files[f"{name}.txt"] = f"An owl, {number}.\nfr.utf8=Une chouette".encode()
        files[f"{name}_desc_{stamps.LANGUAGES[number % 2]}.ogg"] = ogg.getvalue()
    files |= {"town/x.png": png.getvalue(), "town/x.txt": b"X", "town/x_desc_es.ogg": b"?"}
    files["animals/mute.png"], files["animals/mute.txt"] = png.getvalue(), b"No sound."
    del files["town/x_desc_es.ogg"]
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/tuxpaint/stamps/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    deb = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n\n"), ("data.tar.xz", data.getvalue())):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        deb += content + b"\n" * (len(content) % 2)
    path.write_bytes(deb)
    return hashlib.sha256(deb).hexdigest()


@pytest.fixture
def package(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a made package that passes for the real one."""
    path = tmp_path / example.stamps.FILE
    monkeypatch.setattr(example.stamps, "SHA256", made_package(path, example.stamps))
    return tmp_path


def test_a_package_is_read_as_it_is(example: Example, package: Path) -> None:
    found = example.stamps.load(package)
    side = example.stamps.SIDE
    assert found.classes == ["animals"]  # one stamp of town is too few, and a mute owl is no stamp
    assert sorted(found.captions) == sorted(f"An owl, {number}." for number in range(20))
    assert found.images.shape == (20, side, side, 3)
    for name, caption, image, sounds in zip(*found[4:5], found.captions, found.images, found[2]):
        number = int(caption[8:-1])
        assert name == f"animals/owl{number}"
        blue, red = (0, 0, 255), (255, 0, 0)
        assert image[side // 2, side // 2].tolist() == list(red if number == 3 else blue)
        assert image[2, 2].tolist() == [255, 255, 255]
        lengths = [len(sound) for sound in sounds]
        assert 40 < lengths.pop(number % 2) < 55 and not any(lengths)


@pytest.mark.parametrize("damage", [b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_the_cache_is_read_and_a_damaged_one_made_anew(
    example: Example, package: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = example.stamps.load(package)
    (cache,) = package.glob("stamps-*.safetensors")
    cache.write_bytes(damage)
    again = example.stamps.load(package)
    assert np.array_equal(first.images, again.images)
    monkeypatch.setattr(example.stamps, "_features", None)
    cached = example.stamps.load(package)
    assert cached.captions == first.captions
    assert sorted(path.name for path in package.iterdir()) == [cache.name, example.stamps.FILE]


def test_another_package_is_refused(example: Example, package: Path) -> None:
    path = package / example.stamps.FILE
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(example.stamps.MissingDataError, match=r"has SHA-256 .* damaged"):
        example.stamps.load(package)
    assert list(package.iterdir()) == [path]


def test_what_is_missing_is_said_with_the_command(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.train.main(["--data", str(tmp_path)]) == 1
    assert "apt-get download tuxpaint-stamps-default" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_missing_reader_is_named(
    example: Example, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(example.stamps.MissingDataError, match=r"soundfile.*requirements\.txt"):
        example.stamps.load(package)


@pytest.mark.slow
def test_the_real_stamps(example: Example) -> None:
    try:
        found = example.stamps.load()
    except example.stamps.MissingDataError as error:
        pytest.skip(str(error).splitlines()[0])
    assert len(found.labels) == 859 and len(found.classes) == 10
    assert all(any(len(sound) > 10 for sound in sounds) for sounds in found.sounds)
    assert all(found.captions)
    train, test = example.stamps.split(found)
    assert 0.2 < len(test.labels) / 859 < 0.3
    assert not {c.casefold() for c in train.captions} & {c.casefold() for c in test.captions}
