"""Writes the tables of supported architectures into README.md and docs/drop-in.md, between markers.

    python tools/architectures_table.py           write
    python tools/architectures_table.py --check   exit 1 where a file is not what would be written

What is known comes from the registry of adapters and from the cases of the parity tests; neither
needs transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmfast.integrations.registry import rows
from mmfast.testing.architectures import all_architectures

ROOT = Path(__file__).resolve().parent.parent
START = "<!-- architectures: made by tools/architectures_table.py -->"
END = "<!-- /architectures -->"


@dataclass
class Supported:
    """What there is for one model type of transformers: names of classes by kind of adapter, and
    whether the parity tests have a case of it, and of its `generate()`."""

    classes: dict[str, list[str]] = field(default_factory=dict)
    tested: bool = False
    generates: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """In words, what `mmfast.patch` does."""
        padding = ("no padding computed in layers",) if "layer" in self.classes else ()
        gates = ("fused gates",) if self.classes.keys() & {"gate", "mlp", "norm"} else ()
        return (*padding, "fused attention", *gates)


def supported() -> dict[str, Supported]:
    """Every model type that has adapters or a parity test, in alphabetical order."""
    found: dict[str, Supported] = {}
    for row in rows().values():
        if row.model_type != "torch.nn":
            kinds = found.setdefault(row.model_type, Supported()).classes
            kinds.setdefault(row.kind, []).append(row.target.rpartition(".")[2])
    folders = list(found)
    for name, case in all_architectures().items():
        entry = found.setdefault(_folder(name, folders), Supported())
        entry.tested = True
        entry.generates |= case.generate is not None
    return dict(sorted(found.items()))


def _folder(case: str, folders: list[str]) -> str:
    """The folder of transformers that a case is about: blip of "blip-retrieval"."""
    name = case.replace("-", "_")
    for folder in sorted(folders, key=len, reverse=True):
        if name.replace("_", "") == folder.replace("_", "") or name.startswith(f"{folder}_"):
            return folder
    return name


def short(types: Mapping[str, Supported]) -> Iterator[str]:
    """The README's table: a row for each thing that is done, with the model types it is done to."""
    tested = {name: entry for name, entry in types.items() if entry.tested}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, entry in tested.items():
        groups.setdefault(entry.features, []).append(f"{name}*" if entry.generates else name)
    yield f"| what `mmfast.patch` does | {len(tested)} model types; * `generate()` too |"
    yield "|---|---|"
    for features in sorted(groups, key=lambda key: (-len(key), key)):
        yield f"| {', '.join(features)} | {', '.join(groups[features])} |"


def long(types: Mapping[str, Supported]) -> Iterator[str]:
    """The manual's table: a row for each model type that is tested, with its classes, and below it
    the other model types of which there are classes."""
    header = ("model type", "attention by class", "layers that compute no padding", "other")
    yield f"| {' | '.join(header)} | `generate()` |"
    yield "|---|---|---|---|---|"
    for name, entry in types.items():
        if entry.tested:
            others = [_classes(entry, kind) for kind in ("gate", "mlp", "norm", "module")]
            cells = (
                name,
                _classes(entry, "attention"),
                _classes(entry, "layer"),
                ", ".join(filter(None, others)),
                "tested" if entry.generates else "",
            )
            yield f"| {' | '.join(cells)} |"
    if untested := [name for name, entry in types.items() if not entry.tested]:
        yield ""
        yield "Adapters know classes of these too, without a parity test of their own:"
        yield f"{', '.join(untested)}."


def _classes(entry: Supported, kind: str) -> str:
    return ", ".join(f"`{name}`" for name in entry.classes.get(kind, ()))


def written(text: str, lines: Iterator[str], where: str) -> str:
    """`text` with the table between its markers. Raises ValueError unless there is one of each."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{where}: expected one {START} and one {END}")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + "\n".join([START, *lines, END]) + after


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    types = supported()
    stale = []
    for name, table in (("README.md", short), ("docs/drop-in.md", long)):
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = written(old, table(types), name)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'not current' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
