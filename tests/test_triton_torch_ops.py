"""The torch ops of the Triton kernels: schemas, and what importing them needs."""

from __future__ import annotations

import pytest
import torch
from fresh_process import run_python
from mmfast.kernels import _torch_ops
from triton_helpers import requires_triton

NAMES = [(op, way) for op, ways in _torch_ops.SCHEMAS.items() for way in ways]


@pytest.mark.parametrize("op, way", NAMES)
def test_schema_is_that_of_the_compiled_library(op, way, compiled_library):
    """Whichever defines an op first, the other finds what it would have defined."""
    found = getattr(torch.ops.mmfast, f"{op}_{way}", None)
    if found is None:
        pytest.skip("neither the library nor the Triton kernels have defined it in this process")
    ours = torch._C.parse_schema(f"mmfast::{op}_{way}{_torch_ops.SCHEMAS[op][way]}")
    assert str(found.default._schema) == str(ours)


@requires_triton
def test_registration_without_the_library_and_without_a_gpu():
    """In a fresh process: schemas are defined, launchers are found, the second call is idle."""
    script = """
import torch
from mmfast.kernels import _torch_ops
_torch_ops.register()
_torch_ops.register()
for op, ways in _torch_ops.SCHEMAS.items():
    for way, schema in ways.items():
        name = f"mmfast::{op}_{way}"
        found = getattr(torch.ops.mmfast, f"{op}_{way}").default._schema
        assert str(found) == str(torch._C.parse_schema(name + schema)), found
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
        assert callable(_torch_ops.OPS[op][way])
assert not torch.cuda.is_initialized()
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_schemas_need_no_triton():
    script = """
import sys
sys.modules["triton"] = None
from mmfast.kernels import _torch_ops
try:
    _torch_ops.OPS["glu"]
except ImportError:
    print("needs triton")
"""
    assert run_python("-c", script).stdout == "needs triton\n"
