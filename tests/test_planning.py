"""Plans of projected attention: the work of each, the choice, how it is forced and told."""

from __future__ import annotations

import dataclasses
import math
import threading
import timeit

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast import planning
from mmfast.planning import PLANS, AttentionShapes, choice, costs, measuring, table
from mmfast.planning.rates import Coefficients, Rates

POOL = AttentionShapes(8, 1, 577, 768, 768, 12, 12, 64, 64)
CAPTION = AttentionShapes(8, 128, 197, 768, 768, 12, 12, 64, 64)
MANY = dataclasses.replace(CAPTION, tokens=900)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def assumed(tmp_path, monkeypatch):
    """No rates that were measured on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.forget()
    yield
    choice.forget()


def arguments(s: AttentionShapes) -> tuple:
    return dataclasses.astuple(s)


def choose(s: AttentionShapes, dtype=torch.float32, training=False, refused=()) -> str:
    return planning.choose(*arguments(s), dtype, CPU, training, refused)


# --- what a plan costs ----------------------------------------------------------------------------


def flops(plan: str, s: AttentionShapes, training: bool = False) -> float:
    return sum(piece.flops for piece in costs.pieces(plan, s, 4, training))


def test_flops_are_those_of_the_formulas():
    B, N, M, E, C, H, D = 8, 1, 577, 768, 768, 12, 64
    around = 2 * 2 * B * N * E * H * D
    assert flops("projected", POOL) == around + 2 * 2 * B * M * C * H * D + 4 * B * H * N * M * D
    assert flops("absorbed", POOL) == around + 2 * 2 * B * N * H * D * C + 4 * B * H * N * M * C
    half = dataclasses.replace(POOL, tokens=B * M // 2)
    valid = B * M // 2
    assert flops("packed", half) == around + 2 * 2 * valid * C * H * D + 4 * H * N * valid * D


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        return function(*args, **(kwargs or {}))


def test_bytes_are_what_is_read_and_written():
    """Of the plan that projects, forward: weights, streams, and what is between."""
    B, N, M, E, C, H, D = 8, 1, 577, 768, 768, 12, 64
    around = 2 * (E * H * D + B * N * (E + H * D))
    keys = 2 * (C * H * D + B * M * (C + H * D))
    attention = 2 * B * M * H * D + 2 * B * N * H * D
    for dtype in (torch.float32, torch.bfloat16):
        found = planning.plan(POOL, dtype).costs[0].bytes
        assert found == dtype.itemsize * (around + keys + attention)


def test_the_flops_are_what_torch_computes():
    """Of the products of the backward as well, in the plain operations."""
    B, N, M, E, C, H, D = 2, 3, 5, 32, 48, 4, 8
    s = AttentionShapes(B, N, M, E, C, H, H, D, D)
    x = torch.randn(B, N, E, requires_grad=True)
    context = torch.randn(B, M, C, requires_grad=True)
    w_q, w_k, w_v = (torch.randn(H * D, w, requires_grad=True) for w in (E, C, C))
    w_o = torch.randn(E, H * D, requires_grad=True)

    def projected():
        q, k, v = (
            (y @ w.t()).unflatten(-1, (H, D)).transpose(1, 2)
            for y, w in ((x, w_q), (context, w_k), (context, w_v))
        )
        p = (q @ k.transpose(-2, -1)).softmax(-1)
        return (p @ v).transpose(1, 2).flatten(2) @ w_o.t()

    def absorbed():
        q = (x @ w_q.t()).view(B * N, H, D).transpose(0, 1)
        q = torch.bmm(q, w_k.view(H, D, C)).view(H, B, N, C).transpose(0, 1).reshape(B, H * N, C)
        p = (q @ context.transpose(-2, -1)).softmax(-1)
        o = (p @ context).view(B, H, N, C).transpose(0, 1).reshape(H, B * N, C)
        o = torch.bmm(o, w_v.view(H, D, C).transpose(1, 2)).transpose(0, 1).reshape(B, N, H * D)
        return o @ w_o.t()

    for name, plan in (("projected", projected), ("absorbed", absorbed)):
        with torch.no_grad(), Products() as counter:
            plan()
        assert counter.flops == flops(name, s)
        with Products() as counter:
            plan().sum().backward()
        # A fused backward computes the scores again, which torch has kept.
        width = C if name == "absorbed" else D
        again = 2 * B * H * N * M * width
        assert counter.flops + again == flops(name, s, training=True)


@pytest.mark.parametrize("plan", PLANS)
def test_cost_grows_with_every_size(plan):
    known = dataclasses.replace(MANY, tokens=100)
    base = planning.plan(known)
    at = PLANS.index(plan)
    for name in ("queries", "embed_dim", "context_dim", "num_heads", "head_dim", "tokens"):
        more = dataclasses.replace(known, **{name: 2 * getattr(known, name)})
        if name == "num_heads":
            more = dataclasses.replace(more, num_kv_heads=24)
        for training in (False, True):
            base = planning.plan(known, training=training).costs[at]
            cost = planning.plan(more, training=training).costs[at]
            assert cost.flops >= base.flops and cost.seconds >= base.seconds, name
            if plan != "projected" or name != "tokens":
                assert cost.seconds > base.seconds, name


def test_padding_costs_the_projected_plan_alone():
    full, part = (dataclasses.replace(POOL, tokens=n) for n in (8 * 577, 8 * 200))
    before, after = planning.plan(full).costs, planning.plan(part).costs
    assert after[0].seconds > 0.95 * before[0].seconds
    assert after[1].seconds < 0.5 * before[1].seconds


def test_a_packed_context_need_not_be_packed():
    packed = dataclasses.replace(MANY, context_packed=True)
    loose, ready = planning.plan(MANY).costs, planning.plan(packed).costs
    assert ready[1].seconds < loose[1].seconds
    assert ready[0].seconds > loose[0].seconds  # it would have to be padded
    assert [cost.flops for cost in ready] == [cost.flops for cost in loose]


def test_shared_key_heads_save_weights_not_scores():
    """Grouped queries meet the weights of one head together."""
    few = dataclasses.replace(POOL, num_kv_heads=2)
    assert flops("absorbed", few) == flops("absorbed", POOL)
    assert planning.plan(few).costs[2].bytes < planning.plan(POOL).costs[2].bytes
    assert flops("projected", few) < flops("projected", POOL)


def test_a_frozen_context_saves_its_gradient():
    frozen = dataclasses.replace(CAPTION, context_grad=False)
    for with_grad, without in zip(
        planning.plan(CAPTION, training=True).costs, planning.plan(frozen, training=True).costs
    ):
        assert without.flops < with_grad.flops
        assert without.seconds < with_grad.seconds
    assert planning.plan(CAPTION).costs == planning.plan(frozen).costs


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("field", ["batch", "queries", "keys"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_to_do_is_a_number(plan, field, training):
    empty = dataclasses.replace(POOL, tokens=0, **{field: 0})
    cost = planning.plan(empty, training=training).costs[PLANS.index(plan)]
    assert math.isfinite(cost.seconds) and math.isfinite(cost.flops) and cost.seconds >= 0


@pytest.mark.parametrize(
    "field, value", [("batch", -1), ("keys", -5), ("tokens", -1), ("head_dim", -64)]
)
def test_sizes_below_0_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least 0, got {value}"):
        dataclasses.replace(POOL, **{field: value})


@pytest.mark.parametrize("field", ["tokens", "query_tokens"])
def test_more_tokens_than_rows_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=9999 are more than the 8 x"):
        dataclasses.replace(POOL, **{field: 9999})


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_shapes_of_which_there_is_no_doubt(dtype, training):
    """What was measured of these: docs/planner.md. No machine is known where it is otherwise."""
    assert planning.plan(POOL, dtype, training=training).name == "absorbed"
    assert planning.plan(CAPTION, dtype, training=training).name == "projected"
    assert planning.plan(MANY, dtype, training=training).name == "packed"


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_the_number_of_threads_is_not_in_the_way(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert choose(POOL) == "absorbed"
    assert choose(CAPTION) == "projected"
    assert choose(MANY) == "packed"


@pytest.mark.parametrize("able", [{}, {"amx_bf16": True}, {"avx512_bf16": True}])
@pytest.mark.parametrize("wide", ["AVX512", "AVX2", "DEFAULT", "SVE256"])
def test_unknown_processors_have_sensible_rates(able, wide, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: wide)
    for dtype in (torch.float32, torch.bfloat16):
        assert planning.plan(POOL, dtype).name == "absorbed"
        assert planning.plan(CAPTION, dtype).name == "projected"


def test_gpu_rates_are_assumed_without_one():
    """A batch that keeps a GPU busy; in a smaller one the calls decide, which absorbed has more."""
    for training in (False, True):
        for s, name in ((POOL, "absorbed"), (CAPTION, "projected")):
            s = dataclasses.replace(s, batch=128)
            assert planning.plan(s, torch.bfloat16, "cuda", training).name == name


def test_choose_is_plan():
    for s in (POOL, CAPTION, MANY, dataclasses.replace(POOL, queries=40)):
        for dtype in (torch.float32, torch.bfloat16):
            for training in (False, True):
                assert choose(s, dtype, training) == planning.plan(s, dtype, CPU, training).name


def test_choose_refuses():
    assert choose(POOL, refused=("absorbed",)) == "projected"
    assert choose(MANY, refused=("packed",)) == "projected"
    assert choose(dataclasses.replace(MANY, tokens=None)) == "projected"  # nothing can be packed


def test_choose_is_quick():
    """At most 2 us once a problem is known (1.1 us measured); ten times that on a busy machine."""
    choose(POOL)
    call = (*arguments(POOL), torch.float32, CPU, False)
    timer = timeit.Timer(lambda: planning.choose(*call))
    assert min(timer.repeat(20, 200)) / 200 < 20e-6


def test_similar_lengths_are_one_problem():
    """Every batch has other lengths: the table must not grow with them."""
    choice._chosen.cache_clear()
    for tokens in range(0, 8 * 577, 7):
        choose(dataclasses.replace(POOL, tokens=tokens))
    assert choice._chosen.cache_info().currsize <= 17


@pytest.mark.parametrize("rows", [1, 3, 15, 16, 17, 1000])
def test_rounded_tokens_are_never_more_than_rows(rows):
    found = [choice._rounded(tokens, rows) for tokens in range(rows + 1)]
    assert found[0] == 0 and found[-1] == rows
    assert all(0 <= value <= rows for value in found)
    assert found == sorted(found)
    assert choice._rounded(0, 0) == 0


def test_the_compiled_rule_is_careful():
    """It takes the absorbed plan only where the model does, whatever the batch."""
    for queries in (1, 2, 4, 8, 16, 32, 64, 256):
        for H, G, D in ((12, 12, 64), (16, 4, 64), (8, 8, 32), (16, 16, 128)):
            name = planning.choose_compiled(queries, H, G, D, D)
            assert name in ("projected", "absorbed")
            if name == "absorbed":
                for batch in (2, 16):
                    s = AttentionShapes(batch, queries, 500, H * D, H * D, H, G, D, D)
                    assert choose(s) == "absorbed", (queries, H, G, D)
    assert planning.choose_compiled(1, 12, 12, 64, 64) == "absorbed"
    assert planning.choose_compiled(1, 12, 12, 64, 64, ("absorbed",)) == "projected"
    assert planning.choose_compiled(128, 12, 12, 64, 64) == "projected"


def test_the_compiled_rule_compiles_with_any_size():
    def call(x):
        name = planning.choose_compiled(x.shape[0], 12, 12, 64, 64)
        return x * (2.0 if name == "absorbed" else 3.0)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for rows in (2, 3, 5, 40, 50, 4):
        x = torch.ones(rows, 2)
        assert torch.equal(compiled(x), call(x))
    with mmfast.use_plan("projected"):
        x = torch.ones(2, 2)
        assert torch.equal(compiled(x), 3.0 * x)


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_use_plan_forces(name):
    with mmfast.use_plan(name):
        assert planning.current_plan() == name
        assert choose(MANY) == name
        plan = planning.plan(MANY)
        assert plan.name == name and f'use_plan("{name}")' in plan.why
    assert planning.current_plan() == "auto"


def test_a_plan_that_cannot_be_followed_falls_back():
    with mmfast.use_plan("absorbed"):
        assert choose(POOL, refused=("absorbed",)) == "projected"
        plan = planning.plan(POOL, refused={"absorbed": "a norm is in between"})
        assert plan.name == "projected"
        assert plan.why == 'use_plan("absorbed") cannot be followed: a norm is in between'
    with mmfast.use_plan("packed"):
        assert choose(POOL) == "projected"
        assert "not known on the host" in planning.plan(POOL).why
        assert planning.choose_compiled(1, 12, 12, 64, 64) == "projected"


def test_use_plan_nests_and_ends_with_an_error():
    with mmfast.use_plan("absorbed"):
        with mmfast.use_plan("auto"):
            assert choose(CAPTION) == "projected"
        assert choose(CAPTION) == "absorbed"
        with pytest.raises(ZeroDivisionError), mmfast.use_plan("packed"):
            _ = 1 // 0
        assert planning.current_plan() == "absorbed"
    assert planning.current_plan() == "auto"


def test_use_plan_is_of_the_process():
    seen = []
    with mmfast.use_plan("packed"):
        thread = threading.Thread(target=lambda: seen.append(planning.current_plan()))
        thread.start()
        thread.join()
    assert seen == ["packed"]


@pytest.mark.parametrize("name", ["Absorbed", "", "fastest", None, 3])
def test_unknown_plans_are_refused(name):
    wrong = pytest.raises(ValueError, match=r"use_plan: there is no plan .* projected, packed, ab")
    with wrong, mmfast.use_plan(name):
        pass
    assert planning.current_plan() == "auto"


# --- telling --------------------------------------------------------------------------------------


def test_the_table_tells_all_of_it():
    plan = planning.plan(MANY, refused={"absorbed": "a norm is in between"})
    text = str(plan)
    lines = text.splitlines()
    assert lines[0] == (
        "8 x 128 queries over 197 keys (57% valid) of width 768, 12 heads, float32 on cpu, forward"
    )
    assert [line.split()[0] for line in lines[2:5]] == ["projected", "*", "absorbed"]
    assert lines[4].endswith("not here: a norm is in between")
    assert lines[5].startswith("packed: ")
    assert plan.source == "assumed; python -m mmfast tune measures them"


def test_the_reason_is_told():
    assert "does without the projections of keys and values" in planning.plan(POOL).why
    assert planning.plan(MANY).why.startswith("43% of the context's rows are padding")
    assert "128 queries of 12 heads are too many" in planning.plan(CAPTION).why
    refused = {"absorbed": "a norm is in between"}
    assert planning.plan(CAPTION, refused=refused).why.startswith("the least modelled time of tho")


def test_show_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    plan = planning.plan(POOL)
    plan.show()
    assert capsys.readouterr().out == f"{plan}\n"


def test_show_with_rich(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    planning.plan(POOL, refused={"packed": "[holes]"}).show()
    shown = capsys.readouterr().out
    assert "absorbed" in shown and "GFLOP" not in shown and "[holes]" in shown


@pytest.mark.parametrize(
    "number, text", [(0, "0"), (999, "999"), (1234, "1.23 k"), (5.6e9, "5.6 G"), (2e13, "20 T")]
)
def test_numbers(number, text):
    assert table._scaled(number) == text


# --- rates ----------------------------------------------------------------------------------------


def test_the_fit_finds_what_made_the_times():
    true = Coefficients(5e-6, 1e-11, 2e-10, 3e-10, 0.0)
    pieces = [costs.attention(pairs, 1.0, keys, D, D, 4)
              for pairs in (10.0, 1e4, 1e6) for keys in (1e2, 1e4) for D in (16, 64)]  # fmt: skip
    times = [Rates({"attention": true}, "").seconds([piece]) for piece in pieces]
    found = measuring.fit(pieces, times)
    assert found == pytest.approx(true, rel=1e-3, abs=1e-16)


def test_the_fit_has_nothing_below_0():
    pieces = [costs.gemm(rows, 64, 64) for rows in (1, 2, 4, 8, 1024)]
    times = [1e-3, 1e-3, 1e-3, 1e-3, 1e-6]  # the more the faster
    found = measuring.fit(pieces, times)
    assert min(found) >= 0.0 and max(found) > 0.0


def test_a_device_that_queues_does_not_wait_for_calls():
    kinds = {"gemm": Coefficients(call=1.0, flop=1e-9)}
    work = [costs.gemm(1000, 1000, 1000)._replace(calls=3)]
    assert Rates(kinds, "").seconds(work) == pytest.approx(5.0)
    assert Rates(kinds, "", overlaps=True).seconds(work) == pytest.approx(3.0)
