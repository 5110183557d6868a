"""cross_attention in Triton, interpreted under the guard: the registry, forward and backward."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import interpreted, requires_triton  # noqa: F401

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, functional_cases, make_inputs

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]

WIDEST = 256
# 156 s of the suite on two cores; test_any_number_of_splits has it in float32 as well.
LONGEST = "results_everything"


def _cases():
    """Every case in float32 but the longest; in float16 every third; the others as slow tests."""
    number = 0
    for case in functional_cases():
        if max(case.D, case.Dv) <= WIDEST:
            marks = [pytest.mark.slow] if case.name == LONGEST else []
            yield pytest.param(case.name, torch.float32, id=f"{case.name}-float32", marks=marks)
            marks = [pytest.mark.slow] if number % 3 else []
            yield pytest.param(case.name, torch.float16, id=f"{case.name}-float16", marks=marks)
            number += 1


@pytest.mark.parametrize("name, dtype", _cases())
def test_case(name, dtype, monkeypatch):
    """By the ruler, with NaN in everything that takes no part; no input is written to.

    The NaN need copies, which lie in memory in one way: cases of layouts go without.
    """
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    against = tolerance.truth(inputs)
    taken = inputs if "layout" in name or inputs.case.layout != "bhnd" else inputs.poisoned()
    tensors = {"q": taken.q, "k": taken.k, "v": taken.v, **taken.options}
    before = {n: t.clone() for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    if dtype == torch.float16:  # float32 has splits, as small problems do; here there are none
        from mmfast.kernels import _tuning

        monkeypatch.setattr(_tuning, "ATTENTION_PROGRAMS", 1)
    with mmfast.use_backend("triton"):
        results = tolerance.run(mmfast.cross_attention, taken)
    tolerance.assert_accurate(results, against)
    for n, kept in before.items():
        assert torch.equal(tensors[n].nan_to_num(777.0), kept.nan_to_num(777.0)), f"{n} was written"
