"""What modules say of their plans: `explain()`, of the last call and of sizes."""

from __future__ import annotations

import doctest

import pytest
import torch

import mmfast
from mmfast import planning
from mmfast.nn import CrossModalAttention, MultiheadAttention, _planned
from mmfast.nn._planned import Planned
from mmfast.planning import PLANS, choice


@pytest.fixture(autouse=True)
def assumed(tmp_path, monkeypatch):
    """No rates that were measured on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.forget()
    yield
    choice.forget()


def attention(**options) -> CrossModalAttention:
    torch.manual_seed(0)
    return CrossModalAttention(64, 4, context_dim=96, **options)


def call(module, queries=1, keys=50, lens=None):
    x, context = torch.randn(3, queries, 64), torch.randn(3, keys, 96)
    return module(x, context, context_lens=None if lens is None else torch.tensor(lens))


def test_the_last_call(capsys):
    module = attention()
    with torch.no_grad():
        call(module, keys=1000)
    plan = module.explain()
    assert capsys.readouterr().out == f"{plan}\n"
    assert plan.name == "absorbed"
    assert plan.title == (
        "3 x 1 queries over 1000 keys of width 96, 4 heads, float32 on cpu, forward"
    )
    call(module, queries=40, lens=[50, 20, 0])
    plan = module.explain()
    assert plan.title.startswith("3 x 40 queries over 50 keys (47% valid)")
    assert plan.title.endswith("with backward")


def test_sizes():
    module = attention().eval()
    for queries, keys, tokens in ((1, 577, None), (256, 577, 2308), (256, 577, None)):
        plan = module.explain(8, queries, keys, tokens=tokens, training=False)
        assert plan.title.startswith(f"8 x {queries} queries over {keys} keys")
        assert plan.name == (
            "absorbed" if queries == 1 else "projected" if tokens is None else "packed"
        )
    assert module.explain(8, 1, 9).title.endswith("forward")  # eval mode
    assert module.train().explain(8, 1, 9).title.endswith("with backward")
    assert "bfloat16" in module.explain(8, 1, 9, dtype=torch.bfloat16).title


@pytest.mark.parametrize("sizes", [(), (8,), (8, 1), (None, 1, 577)])
def test_sizes_that_are_missing(sizes):
    with pytest.raises(ValueError, match=r"CrossModalAttention.explain: expected batch, queries a"):
        attention().explain(*sizes)


def test_some_sizes_are_not_completed_by_the_last_call():
    module = attention()
    call(module)
    with pytest.raises(ValueError, match=r"got batch=8, queries=None, keys=None and a call before"):
        module.explain(8)


@pytest.mark.parametrize("name", PLANS)
def test_a_forced_plan_is_told(name):
    module = attention()
    with mmfast.use_plan(name):
        call(module, lens=[50, 20, 3])
        plan = module.explain()
    assert plan.name == name
    assert plan.why == f'asked for with use_plan("{name}")'


def test_a_plan_that_algebra_forbids_is_told():
    module = attention(qk_norm="rms")
    with mmfast.use_plan("absorbed"):
        call(module)
        plan = module.explain()
    assert plan.name == "projected"
    assert 'use_plan("absorbed") cannot be followed' in plan.why and "norm" in plan.why
    assert "norm" in str(module.explain(8, 1, 577).costs[2].why_not)


def test_lengths_that_nobody_knows_are_told():
    module = attention()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with mmfast.use_plan("packed"):
        call(compiled, lens=[50, 20, 3])
        # torch.compile leaves nothing behind to tell of.
        with pytest.raises(ValueError, match="no call before"):
            module.explain()


def test_the_module_is_as_it_was():
    """What explain remembers is no state: not in the state dict, not in the way of copies."""
    import copy
    import pickle

    module = attention()
    keys = list(module.state_dict())
    call(module)
    assert list(module.state_dict()) == keys
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))  # noqa: S301  our own bytes
    assert twin.explain().name == module.explain().name


@pytest.mark.parametrize("module", [_planned, planning.choice, planning.shapes])
def test_the_examples_of_the_docstrings(module):
    tested = doctest.testmod(module)
    assert tested.failed == 0 and tested.attempted > 0


def test_multihead_attention_explains_too():
    module = MultiheadAttention(64, 4, batch_first=True)
    context = torch.randn(2, 30, 64)
    module(torch.randn(2, 3, 64), context, context, need_weights=False)
    assert module.explain().title.startswith("2 x 3 queries over 30 keys of width 64, 4 heads")
    assert isinstance(module, Planned)
