"""Builds the layer repository of hub/ for Hugging Face `kernels`: `python tools/hub_layers.py OUT`.

OUT/build/torch-<backend>/ gets the Python files of hub/torch-ext and a metadata.json with their
digests, for each backend that hub/build.toml names. The layers are Python over the installed
mmfast, so there is nothing to compile and one build serves every torch. The same sources give the
same bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # which pytest brings
    import tomli as tomllib

HUB = Path(__file__).resolve().parent.parent / "hub"


def build(out: Path, hub: Path = HUB) -> list[Path]:
    """The folders written, one a backend; what they held before is gone.

    Raises FileNotFoundError without a build.toml, and KeyError where it lacks a field.
    """
    general = tomllib.loads((hub / "build.toml").read_text(encoding="utf-8"))["general"]
    package = general["name"].replace("-", "_")
    sources = sorted((hub / "torch-ext" / package).rglob("*.py"))
    folders = []
    for backend in general["backends"]:
        folder = out / "build" / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        for source in sources:
            target = folder / source.relative_to(hub / "torch-ext" / package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        text = json.dumps(_metadata(general, package, backend, folder), indent=2)
        (folder / "metadata.json").write_text(text + "\n", encoding="utf-8")
        folders.append(folder)
    return folders


def _metadata(general: dict[str, Any], package: str, backend: str, folder: Path) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(folder.rglob("*.py"))
    }
    whole = hashlib.sha256(b"".join(name.encode() + files[name] for name in files)).hexdigest()
    return {
        "name": general["name"],
        # The name of the imported module: another content is another module.
        "id": f"_{package}_{backend}_{whole[:8]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in files.items()},
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/hub_layers.py", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the repository; build/ is made in it")
    for folder in build(parser.parse_args(arguments).out):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
