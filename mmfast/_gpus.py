"""What is installed for GPUs and what a GPU is: whether kernels can run there at all."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

import torch

from mmfast._torch_ops import asked_once

OLDEST_TRITON = (3, 8)
"""Those before do not compile named tuples of constants."""
OLDEST_GPU = (8, 0)


def unusable_triton() -> str | None:
    """Why the installed triton cannot compile the kernels; nothing is imported for that."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # built into something else: its own version says nothing
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is too old; pip install 'triton>={oldest}'"
    return None


@asked_once
def capability(device: torch.device) -> tuple[int, int]:
    """(9, 0); asked of the driver once for each device."""
    return torch.cuda.get_device_capability(device)


@asked_once
def unusable_gpu(device: torch.device) -> str | None:
    """Why no kernel of ours can run on this CUDA device."""
    if torch.version.hip is None:
        major, minor = capability(device)
        if (major, minor) < OLDEST_GPU:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability "
                f"{major}.{minor}; this backend takes 8.0 (Ampere) and newer"
            )
    return None
