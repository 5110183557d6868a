"""Faults planted in the CUDA kernels of modulate and adaptation_gate: the harness finds them.

Results are held against those of the same library without the fault, in several random schedules;
what is a race or an access out of bounds is looked for by the sanitizer as well.
"""

from __future__ import annotations

import pytest
import torch
from planted_cuda import Fault, Faults

_BARRIER_OF_SUMS = "    sync_threads();\n    const int32_t warps = lanes_ / 32"

FAULTS = Faults(
    "norms",
    ("modulate.", "modulate_f32", "adaptation_gate.", "adaptation_gate_f32", "column_sums"),
    # the second stage leaves out what one warp has summed
    Fault("dropped_term", "cuda/column_sums.cuh", "for (int w = 1; w < kColumnSumWarps; ++w)",
          "for (int w = PLANTED ? 2 : 1; w < kColumnSumWarps; ++w)"),
    # the sums of warps are read before they are written
    Fault("missing_barrier_in_sum", "cuda/row_norm.cuh", _BARRIER_OF_SUMS,
          _BARRIER_OF_SUMS.replace("sync", "if (!PLANTED) sync", 1)),
    # the next sums are written where others may still read
    Fault("one_half_for_all_sums", "cuda/row_norm.cuh", "(odd_ ? COUNT * kWarps : 0)",
          "(odd_ && !PLANTED ? COUNT * kWarps : 0)"),
    # column sums are read before every team has added its rows
    Fault("missing_barrier_before_total", "cuda/modulate_bwd.cuh", "    sync_threads();\n",
          "    if (!PLANTED) sync_threads();\n"),
    # one element, or one vector, more or less than the row has
    Fault("past_the_end", "cuda/row_norm.cuh", "return at(item) < columns;",
          "return at(item) < columns + (PLANTED ? 1 : 0);"),
    Fault("short_of_the_end", "cuda/row_norm.cuh",
          "int64_t all)\n      : first(tile_start + int64_t(lane) * VEC), columns(all),",
          "int64_t all)\n      : first(tile_start + int64_t(lane) * VEC), "
          "columns(all - (PLANTED ? 1 : 0)),"),
    # the last row of every chunk is left out
    Fault("dropped_row", "cuda/modulate_bwd.cuh",
          "count = left < a.chunk_rows ? left : a.chunk_rows;",
          "count = (left < a.chunk_rows ? left : a.chunk_rows) - (PLANTED ? 1 : 0);"),
    # the gradient of an rms norm as if a mean had been subtracted
    Fault("mean_of_rms", "cuda/modulate_bwd.cuh", "if (a.norm == RowNorm::RMS) means[0] = 0;",
          "if (a.norm == RowNorm::RMS && !PLANTED) means[0] = 0;"),
    # a scale that differs from row to row is taken out of the sums as if it did not
    Fault("scale_of_first_row", "cuda/modulate.cu",
          "scale.data != nullptr && ((scale.s1 != 0",
          "scale.data != nullptr && !PLANTED && ((scale.s1 != 0"),
    # a row moves as far as h is long, not at most as far as z is
    Fault("no_limit", "cuda/adaptation_gate.cuh", "if (!(ratio < 1)) return d;",
          "if (PLANTED || !(ratio < 1)) return d;"),
    # a masked row of h is read
    Fault("masked_is_read", "cuda/adaptation_gate.cuh",
          "moved = row_is_on(a.row_mask, at.i0, at.i1);",
          "moved = PLANTED || row_is_on(a.row_mask, at.i0, at.i1);"),
    # alpha counts as a constant in the gradient
    Fault("constant_alpha", "cuda/adaptation_gate_bwd.cuh",
          "s.of_h = d.by_h > 0 ?", "s.of_h = !PLANTED && d.by_h > 0 ?"),
    edits=(
        Fault("f32", "cuda/row_plans.h",
              "  if (dtype == DType::F32)\n    f(float{});\n  else if (dtype == DType::BF16)\n"
              "    f(bf16{});\n  else\n    f(f16{});",
              "  (void)dtype;\n  f(float{});"),
    ),
)  # fmt: skip

RACES = ("missing_barrier_in_sum", "one_half_for_all_sums", "missing_barrier_before_total")


PROBLEMS = ((1, 70, 601), (2, 70, 601), (1, 1100, 24))  # norm, rows of an item, columns
SMALL = ((1, 4, 301), (1, 40, 24))  # for the sanitizers, under which threads are slow


def calls(ops, problems=PROBLEMS):
    """`modulate` and `adaptation_gate`, forward and backward, of rows of several warps and others.

    ops: `name -> op`. Some rows do not begin at multiples of 16 bytes; in PROBLEMS there are
    several blocks for each sum.
    """
    g = torch.Generator().manual_seed(0)

    def data(N: int, C: int, count: int):
        return [torch.randn(2, N, C, generator=g) for _ in range(count)]

    for norm, N, C in problems:
        dout, dh, x, h, scale = data(N, C, 5)
        gate, weight = torch.randn(2, 1, C, generator=g), torch.randn(C, generator=g)
        rest = (weight, weight, norm, 1e-5)
        yield from ops("modulate_fwd")(x, h, gate, scale, None, *rest)
        yield from ops("modulate_bwd")(dout, dh, x, h, gate, scale, *rest, gate, [True] * 7)
        dout, z, h = data(N, C, 3)
        h[0, 0] = 0.0
        mask = torch.rand(2, N, generator=g) < 0.7
        h = h.masked_fill(~mask.unsqueeze(-1), float("nan"))
        rest = (z, h, weight, weight, mask, 0.5, 1e-5)
        yield ops("adaptation_gate_fwd")(*rest)
        yield from ops("adaptation_gate_bwd")(dout, *rest, [True] * 4)


def results():
    return list(calls(FAULTS.op))


def same(found, expected):
    return all(
        torch.allclose(got, want, rtol=1e-3, atol=1e-3)
        for got, want in zip(found, expected, strict=True)
    )


def test_nothing_is_found_where_nothing_is_planted():
    expected = results()
    assert all(result.isfinite().all() for result in expected)
    for seed in range(3):
        FAULTS.seed(seed)
        assert same(results(), expected)


# past_the_end writes over what lies behind the results: only the sanitizer's process may do that.
@pytest.mark.parametrize("name", [name for name in FAULTS.names if name != "past_the_end"])
def test_fault_is_found(name):
    """By its results or by the harness, in at most eight schedules."""
    expected = results()
    for seed in range(8):
        FAULTS.seed(seed)
        with FAULTS.switched_on(name):
            try:
                found = results()
            except RuntimeError:
                return
        if not same(found, expected):
            return
    pytest.fail(f"{name} was not found")


SCRIPT = """
from test_cuda_norms_faults import SMALL, calls
print(len(list(calls(lambda name: getattr(ops, name), SMALL))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", RACES)
def test_race_is_found_by_thread_sanitizer(name):
    done = FAULTS.run("tsan", name, SCRIPT)
    assert "data race" in done.stderr and "row_norm.cuh" in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_overrun_is_found_by_address_sanitizer():
    done = FAULTS.run("asan", "past_the_end", SCRIPT)
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizer_finds_nothing_where_nothing_is_planted(mode):
    done = FAULTS.run(mode, None, SCRIPT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr
