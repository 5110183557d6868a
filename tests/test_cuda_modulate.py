"""`modulate` in CUDA C++, executed on the CPU: the registry's cases, and its own paths."""

from __future__ import annotations

import pytest
from cuda_host import check_gate, gate_cases, host  # noqa: F401

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.parametrize("name, dtype", gate_cases("modulate"))
def test_case(name, dtype):
    check_gate(name, dtype)
