"""Whether a class is still the one that its adapter was written for, by its source.

`fingerprints.json` holds, for each class with an adapter and each class it relies on, the
fingerprints of the sources that it was tested with, and in which versions of transformers these
are. `tools/fingerprints.py` writes it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import json
import sys
import tokenize
from importlib import resources
from typing import Any

from mmfast.integrations.registry import Row


def fingerprint(source: str) -> str:
    """Of a class's source: the same for other comments, docstrings, white space and Pythons."""
    lines = source.splitlines(keepends=True)
    cut: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cut.append((token.start, token.end))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            assert text.end_lineno is not None and text.end_col_offset is not None
            # Columns of ast count bytes; a docstring starts and ends on ASCII.
            start = len(lines[text.lineno - 1].encode()[: text.col_offset].decode())
            end = len(lines[text.end_lineno - 1].encode()[: text.end_col_offset].decode())
            cut.append(((text.lineno, start), (text.end_lineno, end)))
    for (row, start), (end_row, end) in sorted(cut, reverse=True):
        if row == end_row:
            lines[row - 1] = lines[row - 1][:start] + lines[row - 1][end:]
        else:
            lines[row - 1] = lines[row - 1][:start]
            lines[row : end_row - 1] = [""] * (end_row - 1 - row)
            lines[end_row - 1] = lines[end_row - 1][end:]
    return hashlib.sha256("".join("".join(lines).split()).encode()).hexdigest()[:16]


@functools.cache
def class_fingerprint(cls: type[Any]) -> str | None:
    """Of a class in memory; None where its source cannot be read."""
    try:
        return fingerprint(inspect.getsource(cls))
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def known() -> dict[str, dict[str, list[str]]]:
    """`{address of a class: {fingerprint: [versions of transformers]}}`"""
    text = resources.files("mmfast.integrations").joinpath("fingerprints.json").read_text("utf-8")
    data: dict[str, dict[str, list[str]]] = json.loads(text)
    return data


def addresses(row: Row) -> tuple[str, ...]:
    """The classes whose source matters to a row."""
    module = row.target.rpartition(".")[0]
    return (row.target, *(f"{module}.{name}" for name in row.relies_on))


def changed(row: Row) -> str | None:
    """Why the sources of a row are not those its adapter was written for; None where they are."""
    if not row.fingerprinted:
        return None
    for where in addresses(row):
        module, _, name = where.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        prints = known().get(where, {})
        versions = sorted({v for of in prints.values() for v in of}, key=by_number)
        if cls is None:
            return f"{where} is not there; known to work: transformers {', '.join(versions)}"
        if class_fingerprint(cls) not in prints:
            return (
                f"the source of {where} is not one its adapter was written for; known to work: "
                f"transformers {', '.join(versions) or '(none)'}"
            )
    return None


def by_number(version: str) -> list[int]:
    """What versions are sorted by."""
    return [int(part) for part in version.split(".") if part.isdigit()]
