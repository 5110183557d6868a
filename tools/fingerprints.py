"""Write the fingerprints of the transformers classes that mmfast's adapters were written for.

    python tools/fingerprints.py            add the installed version's to fingerprints.json
    python tools/fingerprints.py --known    only note the version where its source is known already
    python tools/fingerprints.py --but mllama   add all but new sources of these models
    python tools/fingerprints.py --check    exit 1 where the installed version's are not in it

Run it after writing an adapter or after the parity tests have passed on another version; it reads
sources and runs no model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from mmfast.integrations.fingerprints import addresses, by_number, class_fingerprint
from mmfast.integrations.registry import rows

FILE = Path(__file__).resolve().parent.parent / "mmfast" / "integrations" / "fingerprints.json"


def installed() -> dict[str, str]:
    """{address: fingerprint} of every class that a row needs and this installation has."""
    found = {}
    for row in rows().values():
        if not row.fingerprinted:
            continue
        for where in addresses(row):
            module, _, name = where.rpartition(".")
            try:
                cls = getattr(importlib.import_module(module), name, None)
            except ImportError:
                continue
            mark = None if cls is None else class_fingerprint(cls)
            if mark is not None:
                found[where] = mark
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--known", action="store_true", help="add no new source")
    parser.add_argument("--but", nargs="+", default=[], metavar="MODEL", help="none of these")
    arguments = parser.parse_args()
    import transformers

    old = json.loads(FILE.read_text(encoding="utf-8"))
    needed = {w for row in rows().values() if row.fingerprinted for w in addresses(row)}
    new = {where: prints for where, prints in old.items() if where in needed}
    for where, mark in installed().items():
        barred = arguments.known or where.split(".")[2] in arguments.but
        if barred and mark not in new.get(where, {}):
            continue
        versions = new.setdefault(where, {}).setdefault(mark, [])
        if transformers.__version__ not in versions:
            versions.append(transformers.__version__)
            versions.sort(key=by_number)
    text = json.dumps(new, indent=1, sort_keys=True) + "\n"
    if arguments.check:
        return int(text != FILE.read_text(encoding="utf-8"))
    FILE.write_text(text, encoding="utf-8")
    print(f"{len(new)} classes, transformers {transformers.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
