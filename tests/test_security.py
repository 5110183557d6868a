"""What this code never does: unpickle, evaluate text, reach a network, obey a hidden setting."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("mmfast", "kernels")
EVERYTHING = (*PACKAGE, "benchmarks", "examples", "tools", "setup.py")

BANNED_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "socket", "ssl", "urllib", "http", "ftplib", "smtplib", "xmlrpc", "socketserver",
    "requests", "httpx", "aiohttp", "urllib3", "huggingface_hub", "torch.hub",
    "torch.utils.model_zoo", "webbrowser",
}  # fmt: skip
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save",
    "torch.hub.load", "torch.package.PackageImporter",
}  # fmt: skip
# A program starts others only where it builds or measures; the package itself never does.
NO_SUBPROCESS = PACKAGE


def python_files(root: Path, tops: tuple[str, ...]) -> Iterator[Path]:
    for top in tops:
        path = root / top
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()


def offences(root: Path) -> list[str]:
    """Every banned import or call in what is shipped or run for a user."""
    found = []
    for path in python_files(root, EVERYTHING):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in names_used(node):
                if any(name == bad or name.startswith(bad + ".") for bad in BANNED_MODULES):
                    found.append(f"{file}:{node.lineno} imports {name}")
                starts_programs = name.partition(".")[0] == "subprocess"
                if starts_programs and file.startswith(NO_SUBPROCESS):
                    found.append(f"{file}:{node.lineno} imports {name}")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in BANNED_CALLS:
                found.append(f"{file}:{node.lineno} calls {called}")
            if called in ("np.load", "numpy.load") and "allow_pickle=False" not in (
                ast.unparse(node)
            ):
                found.append(f"{file}:{node.lineno} calls {called} without allow_pickle=False")
            if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
                found.append(f"{file}:{node.lineno} starts a shell")
    return found


def names_used(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def variables_read(root: Path) -> dict[str, str]:
    """Environment variable -> the file that reads it.

    Constant names in os.environ[...], .get(...), getenv(...), in C++'s getenv, and every text that
    is itself an MMFAST_ name: a name that reaches os.environ through a variable is found too.
    """
    found: dict[str, str] = {}
    for path in python_files(root, EVERYTHING):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"MMFAST_[A-Z0-9_]+", node.value):
                    found[node.value] = file
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                reads = called.endswith(("environ.get", "environ.pop", "getenv"))
                if reads and node.args and isinstance(node.args[0], ast.Constant):
                    found[str(node.args[0].value)] = file
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
                loads = isinstance(node.ctx, ast.Load)
                if loads and isinstance(node.slice, ast.Constant):
                    found[str(node.slice.value)] = file
    for path in sorted((root / "csrc").rglob("*.[ch]*")):
        for name in re.findall(r'getenv\(\s*"([^"]+)"', path.read_text(encoding="utf-8")):
            found[name] = path.relative_to(root).as_posix()
    return found


def variables_documented(readme: str) -> set[str]:
    """The names in the first column of the README's table of environment variables."""
    section = re.search(r"^## Environment variables$(.*?)(?=^## |\Z)", readme, re.M | re.S)
    assert section is not None, "README.md has no section `## Environment variables`"
    return set(re.findall(r"^\| `([A-Z0-9_]+)`", section.group(1), re.M))


def test_nothing_unpickles_evaluates_or_reaches_a_network() -> None:
    assert offences(ROOT) == []


def test_environment_variables_are_the_documented_ones() -> None:
    read = variables_read(ROOT)
    documented = variables_documented((ROOT / "README.md").read_text(encoding="utf-8"))
    undocumented = {name: file for name, file in read.items() if name not in documented}
    assert undocumented == {}, "add them to the README's table, or do not read them"
    assert documented - set(read) == set(), "the README documents what nothing reads"


def test_no_variable_names_code() -> None:
    """The library's path is fixed: nothing from the environment reaches a load."""
    text = (ROOT / "mmfast" / "_library.py").read_text(encoding="utf-8")
    assert re.findall(r'environ\.get\("([^"]+)"', text) == ["MMFAST_ISA"]
    assert 'Path(__file__).parent / "_C.so"' in text


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import pickle", "imports pickle"),
        ("from urllib import request", "imports urllib.request"),
        ("import torch\nx = torch.load('f', weights_only=True)", "calls torch.load"),
        ("import numpy as np\nx = np.load('f')", "calls np.load without allow_pickle=False"),
        ("def f(text):\n    return eval(text)", "calls eval"),
        ("import subprocess", "imports subprocess"),
        ("run('ls', shell=True)", "starts a shell"),
    ],
)
def test_a_planted_offence_is_found(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "mmfast").mkdir()
    (tmp_path / "mmfast" / "x.py").write_text(code + "\n", encoding="utf-8")
    assert any(message in line for line in offences(tmp_path))


@pytest.mark.parametrize(
    "code",
    [
        'import os\nx = os.environ.get("MMFAST_SECRET")',
        'import os\nx = os.getenv("MMFAST_SECRET", "")',
        'import os\nx = os.environ["MMFAST_SECRET"]',
        'import os\nNAME = "MMFAST_SECRET"\nx = os.environ[NAME]',
    ],
)
def test_a_planted_variable_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "mmfast").mkdir()
    (tmp_path / "mmfast" / "x.py").write_text(code + "\n", encoding="utf-8")
    assert variables_read(tmp_path) == {"MMFAST_SECRET": "mmfast/x.py"}
