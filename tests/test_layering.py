"""Who may import whom, read from the imports. A layer's row lists all that it may use."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Layer -> what its files may import besides the standard library and the layer itself. A name
# covers what lies below it ("torch" covers torch.nn). The first layer that matches a file counts.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mmfast/__init__.py", ("mmfast",)),
    ("mmfast/__main__.py", ("torch", "rich", "mmfast._library", "mmfast._pyb", "mmfast._version",
                            "mmfast.dispatch", "mmfast.planning", "mmfast._tune")),
    ("mmfast/_tune.py", ("torch", "rich", "mmfast.kernels", "mmfast.planning", "mmfast.testing")),
    ("mmfast/_user_files.py", ()),
    ("mmfast/_version.py", ()),
    ("mmfast/_library.py", ("torch", "mmfast._version")),
    ("mmfast/dispatch.py", ("torch", "mmfast.reference", "mmfast.kernels", "mmfast._library",
                            "mmfast._torch_ops", "mmfast._order", "mmfast._gpus")),
    ("mmfast/_gpus.py", ("torch", "mmfast._torch_ops")),
    ("mmfast/_torch_ops.py", ("torch",)),
    ("mmfast/_order.py", ()),
    ("mmfast/reference/", ("torch",)),
    ("mmfast/planning/", ("torch", "rich", "mmfast.ops", "mmfast._user_files",
                          "mmfast._version")),
    ("mmfast/ops/", ("torch", "mmfast.dispatch", "mmfast.reference")),
    ("mmfast/nn/_pretrained.py", ("torch", "safetensors", "mmfast._version")),
    ("mmfast/nn/", ("torch", "mmfast.ops", "mmfast.planning")),
    ("mmfast/testing/architectures/", ("torch", "transformers", "mmfast.ops", "mmfast.nn",
                                       "mmfast.integrations", "mmfast.testing")),
    ("mmfast/testing/", ("torch", "mmfast.reference", "mmfast.ops", "mmfast.dispatch")),
    ("mmfast/integrations/", ("torch", "transformers", "rich", "mmfast.ops", "mmfast.nn")),
    ("kernels/", ("torch", "triton", "mmfast.kernels", "mmfast._user_files",
                 "mmfast._version")),
    ("tests/", ("*", "!benchmarks")),
    ("benchmarks/", ("*", "!tests")),
    ("examples/", ("*", "!tests", "!benchmarks")),
)  # fmt: skip

# Only these modules may name these, whatever their layer allows.
RESERVED = {
    "mmfast.kernels": ("mmfast/dispatch.py", "mmfast/_tune.py", "kernels/", "tests/",
                       "benchmarks/"),
    "mmfast._library": ("mmfast/dispatch.py", "mmfast/__main__.py", "tests/", "benchmarks/"),
    "mmfast.integrations": ("mmfast/integrations/", "mmfast/__init__.py",
                            "mmfast/testing/architectures/", "tests/", "benchmarks/",
                            "examples/"),
}  # fmt: skip

# dispatch.py reaches for these when a call needs them: never at import.
LAZY = ("mmfast.kernels", "mmfast._library", "mmfast._pyb", "mmfast.integrations", "triton",
        "rich", "transformers")  # fmt: skip


def imports(path: Path, root: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it is executed at import) of every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, not lazy
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                start = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield f"{start}.{alias.name}", child.lineno, not lazy
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                if child.args and isinstance(child.args[0], ast.Constant):
                    yield str(child.args[0].value), child.lineno, not lazy
                yield from walk(child, lazy)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                yield from walk(child, inside)

    yield from walk(tree, False)


def module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "mmfast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def covers(rule: str, name: str) -> bool:
    return name == rule or name.startswith(rule + ".")


def allowed(name: str, layer: str, rules: tuple[str, ...]) -> bool:
    if any(rule.startswith("!") and covers(rule[1:], name) for rule in rules):
        return False
    if "*" in rules or name.partition(".")[0] in sys.stdlib_module_names:
        return True
    own = layer.removesuffix(".py").rstrip("/").replace("/", ".")
    # Exact for a package's own root: "mmfast" in a row of a subpackage would cover everything.
    return any(covers(rule, name) for rule in (*rules, own))


def violations(root: Path) -> list[str]:
    """Every import of mmfast/, kernels/, tests/, benchmarks/ and examples/ that breaks a rule."""
    found = []
    for top in ("mmfast", "kernels", "tests", "benchmarks", "examples"):
        for path in sorted((root / top).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            layer, rules = next((row for row in RULES if file.startswith(row[0])), ("", ()))
            if not layer:
                found.append(f"{file}: belongs to no layer; add its row to RULES")
                continue
            for name, line, at_import in imports(path, root):
                where = f"{file}:{line}"
                if not allowed(name, layer, rules):
                    found.append(f"{where} imports {name}, which {layer} may not")
                for reserved, users in RESERVED.items():
                    if covers(reserved, name) and not file.startswith(users):
                        found.append(f"{where} imports {name}; only {', '.join(users)} may")
                free = ("mmfast/__main__.py", "mmfast/integrations/",
                        "mmfast/testing/architectures/")  # fmt: skip
                eager = at_import and top == "mmfast" and not file.startswith(free)
                if eager and any(covers(lazy, name) for lazy in LAZY):
                    found.append(f"{where} imports {name} when it is imported itself")
    return found


def torch_headers_in_kernels(root: Path) -> list[str]:
    """Kernels take raw pointers: no file of csrc/cpu, cuda, common or host includes torch."""
    found = []
    for folder in ("cpu", "cuda", "common", "host"):
        for path in sorted((root / "csrc" / folder).glob("*")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if re.match(r'\s*#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)', line):
                    found.append(f"{path.relative_to(root).as_posix()}:{number} {line.strip()}")
    return found


def test_imports_obey_the_layers() -> None:
    assert violations(ROOT) == []


def test_kernels_know_no_torch_header() -> None:
    assert torch_headers_in_kernels(ROOT) == []


PLANTED = [
    ("mmfast/reference/x.py", "import numpy", "imports numpy, which mmfast/reference/ may not"),
    ("mmfast/reference/x.py", "from mmfast.ops import y", "which mmfast/reference/ may not"),
    ("mmfast/reference/x.py", "from ..ops.y import z", "imports mmfast.ops.y.z"),
    ("mmfast/ops/x.py", "from mmfast import nn", "imports mmfast.nn, which mmfast/ops/ may not"),
    ("mmfast/ops/x.py", "from mmfast import _library", "only mmfast/dispatch.py"),
    ("mmfast/ops/x.py", "def f():\n    from mmfast.kernels import x", "imports mmfast.kernels.x"),
    ("mmfast/nn/x.py", "from mmfast.reference import y", "which mmfast/nn/ may not"),
    ("mmfast/nn/x.py", "from mmfast.integrations import hf", "imports mmfast.integrations.hf"),
    ("mmfast/dispatch.py", "from mmfast import kernels", "when it is imported itself"),
    ("mmfast/dispatch.py", "from mmfast import _library", "when it is imported itself"),
    ("mmfast/__init__.py", "import mmfast.integrations.hf", "when it is imported itself"),
    ("mmfast/nn/x.py", "def f():\n    import mmfast.integrations.hf", "only mmfast/integrations/"),
    ("mmfast/new/x.py", "import torch", "belongs to no layer"),
    ("mmfast/testing/x.py", "from tests import y", "imports tests.y"),
    ("kernels/x.py", "from mmfast.ops import y", "imports mmfast.ops.y, which kernels/ may not"),
    ("tests/test_x.py", "from benchmarks import y", "imports benchmarks.y"),
    ("benchmarks/x.py", "import tests.y", "imports tests.y"),
    ("mmfast/ops/x.py", "import importlib\nimportlib.import_module('mmfast.nn')", "mmfast.nn"),
]


@pytest.mark.parametrize(("file", "code", "message"), PLANTED)
def test_a_planted_import_is_found(tmp_path: Path, file: str, code: str, message: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code + "\n", encoding="utf-8")
    found = violations(tmp_path)
    assert any(message in line for line in found), found


ALLOWED = [
    ("mmfast/ops/x.py", "import math\nimport torch.nn\nfrom mmfast.ops import y\nfrom . import z"),
    (
        "mmfast/dispatch.py",
        "def f():\n    from mmfast.kernels import x\n    import mmfast._library",
    ),
    ("mmfast/nn/x.py", "from mmfast.ops.y import z\nfrom mmfast.nn import w"),
    ("kernels/x.py", "import triton\nfrom mmfast.kernels import _blocks\nfrom ._blocks import y"),
    ("tests/test_x.py", "import mmfast.testing\nfrom mmfast import _library"),
]


@pytest.mark.parametrize(("file", "code"), ALLOWED)
def test_an_allowed_import_is_not(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code + "\n", encoding="utf-8")
    assert violations(tmp_path) == []


def test_a_planted_torch_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "csrc" / "cpu" / "x.h"
    path.parent.mkdir(parents=True)
    path.write_text("#include <torch/csrc/stable/tensor.h>\n", encoding="utf-8")
    assert torch_headers_in_kernels(tmp_path) == [
        "csrc/cpu/x.h:1 #include <torch/csrc/stable/tensor.h>"
    ]
