"""gated_residual in Triton, interpreted under the guard."""

from __future__ import annotations

import pytest
from triton_helpers import check_case, interpreted, requires_triton, triton_cases  # noqa: F401

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]


@pytest.mark.parametrize("name, dtype", triton_cases("gated_residual"))
def test_case(name, dtype):
    check_case(name, dtype)
