"""FSDP2: modules of `mmfast.nn` and patched models under `fully_shard`."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from ecosystem_helpers import MODULES, close, made, stock_model
from torch import nn

import mmfast
from mmfast.testing.architectures import _harness

pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

# Fixtures count as used where they are named.
__all__ = ["stock_model"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A device mesh of this process alone."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def shard(model: nn.Module, mesh: Any, units: str) -> nn.Module:
    """`fully_shard` on every module whose class ends in `units`, then on the whole."""
    from torch.distributed.fsdp import fully_shard

    for module in reversed(list(model.modules())):
        if module is not model and type(module).__name__.endswith(units):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_sharded(whole: nn.Module, sharded: nn.Module, call: Any) -> None:
    expected, out = call(whole), call(sharded)
    close(out, expected)
    for model, result in ((whole, expected), (sharded, out)):
        model.zero_grad()
        result.square().sum().backward()
    for (name, theirs), ours in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.full_tensor().any(), name
        else:
            close(ours.grad.full_tensor(), theirs.grad, 1e-4)


@pytest.mark.parametrize("units", ["Layer", "Attention"])
@pytest.mark.parametrize(
    "name",
    ["CrossModalEncoder", "TransformerEncoder", "GatedCrossAttentionBlock",
     "MultimodalTransformer"],
)  # fmt: skip
def test_sharded_modules(name: str, units: str, one_process: Any) -> None:
    """Layers under `fully_shard`, or attentions, whose methods a layer would rather call."""
    module = made(MODULES[name])
    sharded = shard(copy.deepcopy(module), one_process, units)
    check_sharded(module, sharded, MODULES[name].call)


@pytest.mark.parametrize("units", ["Layer", "Attention"])
def test_a_sharded_patched_model(
    model: tuple[nn.Module, Any], units: str, one_process: Any
) -> None:
    stock, call = copy.deepcopy(model[0]), model[1]
    report = mmfast.patch(ours := copy.deepcopy(stock))
    sharded = shard(ours, one_process, units)
    with _harness.counted() as calls:
        check_sharded(stock, sharded, call)
    assert calls.attention > 0
    if units == "Layer":
        with pytest.raises(RuntimeError, match="undo the patch before what wrapped it"):
            report.undo()


_TWO = """
    import copy, sys
    import torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    import mmfast
    from nn_helpers import loud

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    stock = loud(torch.nn.Transformer(32, 4, 1, 1, 48, 0.0, batch_first=True))
    ours = copy.deepcopy(stock)
    mmfast.patch(ours)
    for module in reversed(list(ours.modules())):
        if type(module).__name__.endswith("Layer"):
            fully_shard(module, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    lens = torch.tensor([7, 4])
    source, target = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    pad = torch.arange(7) >= lens[:, None]

    def loss(model, items):
        out = model(source[items], target[items], src_key_padding_mask=pad[items],
                    memory_key_padding_mask=pad[items])
        return out.square().sum()

    loss(stock, slice(0, 2)).backward()
    loss(ours, slice(rank, rank + 1)).backward()
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert mine.to_local().numel() < theirs.numel() or theirs.shape[0] == 1, name
        wanted = theirs.grad / 2  # the mean over the processes
        torch.testing.assert_close(
            mine.grad.full_tensor(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        )
    dist.destroy_process_group()
"""


def test_two_processes_share_a_patched_model(tmp_path: Path) -> None:
    """Each holds half of every parameter and sees one item; the gradient is that of both."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", textwrap.dedent(_TWO), str(rank), str(tmp_path / "store")],
            env=environment,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
