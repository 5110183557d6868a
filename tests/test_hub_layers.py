"""The layer repository for Hugging Face `kernels`: what is built, and that `kernelize` takes it."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import hub_layers
import pytest
from fresh_process import ROOT, run_python

LAYERS = (
    "SiluAndMul", "GeluAndMul", "GeluTanhAndMul", "GatedMLP", "RMSNorm", "RMSNormZeroCentered",
    "AdaLayerNormZero", "AdaLayerNormZeroFinal", "LxmertAttention", "MultiheadAttention",
)  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    hub_layers.build(out)
    return out


@pytest.fixture(scope="module")
def told(repository: Path) -> dict[str, Any]:
    """What the process of hub_kernelize.py says, whose mmfast comes from the editable install."""
    try:
        metadata.version("kernels"), metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    script = str(ROOT / "tests" / "hub_kernelize.py")
    done = run_python(script, str(repository), environment={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_layer_is_tried() -> None:
    source = (ROOT / "hub" / "torch-ext" / "mmfast_layers" / "layers.py").read_text("utf-8")
    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert tuple(classes) == LAYERS


@pytest.mark.parametrize("name", LAYERS)
def test_kernelize_puts_the_layer_in_place(name: str, told: dict[str, Any]) -> None:
    """Outputs and gradients against float64, at most a few times as far off as the module's own."""
    found = told[name]
    assert found["calls"] > 0, "nothing of mmfast was called"
    assert found["layer"].startswith("_mmfast_layers_cpu_")
    assert found["error"] <= 3 * found["stock"] + 2e-6
    assert found["same_keys"]


def test_layers_say_truly_whether_they_compile(told: dict[str, Any]) -> None:
    able = {name for name in LAYERS if told[name]["compiles"]}
    assert able == set(LAYERS) - {"MultiheadAttention"}
    for name in ("GatedMLP", "LxmertAttention"):
        assert told[name]["graph"] <= 3 * told[name]["stock"] + 2e-6


def test_what_a_layer_lacks_the_module_does(told: dict[str, Any]) -> None:
    assert told["weights"] == [2, 3, 5, 7]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_metadata(device: str, repository: Path) -> None:
    folder = repository / "build" / f"torch-{device}"
    said = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert said["name"] == "mmfast-layers" and said["backend"] == {"type": device}
    assert said["id"].isidentifier()
    there = {path.name: path for path in folder.glob("*.py")}
    assert set(there) == set(said["digest"]["files"]) == {"__init__.py", "layers.py"}
    for name, digest in said["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256(there[name].read_bytes()).digest()


def test_the_same_sources_give_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    hub_layers.build(tmp_path)
    hub_layers.build(tmp_path)  # over what is there
    files = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        p.relative_to(repository): p.read_bytes() for p in repository.rglob("*") if p.is_file()
    }
    assert len(files) == 6
