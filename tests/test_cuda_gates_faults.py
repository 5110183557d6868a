"""Faults planted in the CUDA kernels of the gates are found.

By the ruler and random schedules in the plain library, by AddressSanitizer and ThreadSanitizer in
theirs. Without a fault the same calls pass.
"""

from __future__ import annotations

import pytest
import torch
from planted_cuda import Fault, Faults

from mmfast import reference

FAULTS = Faults(
    "gates",
    ("gated_residual_f32", "gated_residual.cpp", "fuse_f32", "fuse.cpp", "column_sums"),
    # the second stage leaves out what one warp has summed
    Fault(
        "dropped_term",
        "cuda/column_sums.cuh",
        "for (int w = 1; w < kColumnSumWarps; ++w)",
        "for (int w = PLANTED ? 2 : 1; w < kColumnSumWarps; ++w)",
    ),
    # sums over thread rows are read before they are written
    Fault(
        "missing_barrier_read_after_write",
        "cuda/rows.cuh",
        "store_shared(buffer + i * kRowThreads + thread, v[i]);\n  sync_threads();",
        "store_shared(buffer + i * kRowThreads + thread, v[i]);\n"
        "  if (!PLANTED) sync_threads();",
    ),
    # the sums of the next batch of modalities are written while others still read these
    Fault(
        "missing_barrier_write_after_read",
        "cuda/rows.cuh",
        "  constexpr int WARPS = kRowThreads / 32;\n  sync_threads();",
        "  constexpr int WARPS = kRowThreads / 32;\n  if (!PLANTED) sync_threads();",
    ),
    # weights are read before the block has made them
    Fault(
        "missing_barrier_of_the_weights",
        "cuda/fuse_weights.cuh",
        "    if (tables.slopes != nullptr) store_shared(tables.slopes + i, slope);\n  }\n"
        "  sync_threads();",
        "    if (tables.slopes != nullptr) store_shared(tables.slopes + i, slope);\n  }\n"
        "  if (!PLANTED) sync_threads();",
    ),
    # one element more than the row has
    Fault("past_the_end", "cuda/rows.cuh", "} else if (left >= V) {",
          "} else if (left >= V - (PLANTED ? 1 : 0)) {"),
    Fault("written_past_the_end", "cuda/rows.cuh", "if (left < V) {",
          "if (left < V - (PLANTED ? 1 : 0)) {"),
    # 16-byte accesses to rows that do not begin at multiples
    Fault(
        "misaligned",
        "cuda/row_tiles.h",
        "return uintptr_t(x.data) % 16 == 0 &&",
        "if (PLANTED) return true;\n  return uintptr_t(x.data) % 16 == 0 &&",
    ),
    # a warp leaves a sum before the others have come to it
    Fault(
        "divergent_sum",
        "cuda/gated_residual.cuh",
        "  float total[1] = {0.0f};\n#pragma unroll\n"
        "  for (int j = 0; j < V; ++j) total[0] += sums[j];\n"
        "  team_sums<1>(total, lanes_log2, buffer);",
        "  float total[1] = {0.0f};\n#pragma unroll\n"
        "  for (int j = 0; j < V; ++j) total[0] += sums[j];\n"
        "  if (PLANTED && !there) return;\n"
        "  team_sums<1>(total, lanes_log2, buffer);",
    ),
    # an absent modality counts with whatever it holds
    Fault("absent_is_read", "cuda/fuse_weights.cuh",
          "const bool there = n + row < end && is_there(a, i0, n + row, k);",
          "const bool there = n + row < end && (PLANTED || is_there(a, i0, n + row, k));"),
    # the mean over the modalities is missing in the gradient of the softmax
    Fault("no_mean", "cuda/fuse_bwd.cuh", "return slope * (load_shared(d + k) - mean);",
          "return slope * (load_shared(d + k) - (PLANTED ? 0.0f : mean));"),
    # one storage dtype is enough
    edits=tuple(
        Fault(op, f"bindings/cuda_{op}.cpp", f"{op}_cuda_{dtype}", f"{op}_cuda_f32")
        for op in ("gated_residual", "fuse")
        for dtype in ("bf16", "f16")
    ),
)  # fmt: skip


def _sums(op):
    """The gradient of one gate for many rows: both stages, and sums over thread rows."""
    dout, y = torch.randn(2, 2, 1030, 24).unbind()
    _, dgate = op("gated_residual_bwd")(dout, y, torch.zeros(1, 1, 24), None, 0, False, True)
    return [dgate], [(dout * y).sum((0, 1), keepdim=True)]


def _row_gates(op):
    """A gate for each row: four lanes a row, of a block that has not rows for all its lanes."""
    dout, y = torch.randn(2, 2, 5, 24).unbind()
    _, dgate = op("gated_residual_bwd")(dout, y, torch.zeros(2, 5, 1), None, 0, False, True)
    return [dgate], [(dout * y).sum(-1, keepdim=True)]


def _softmax(op):
    """Two batches of modalities, a block for each row; one of them absent."""
    features = [torch.randn(2, 2, 520) for _ in range(8)]
    present = torch.ones(2, 8, dtype=torch.bool)
    present[:, 3] = False
    logits, dout = torch.randn(2, 2, 8, requires_grad=True), torch.randn(2, 2, 520)
    expected = reference.fuse(features, logits, mode="softmax", present=present)
    (dlogits,) = torch.autograd.grad(expected, logits, dout)
    features[3] = torch.full((2, 2, 520), float("nan"))
    arguments = features, logits.detach().unsqueeze(-1), present, 0
    out = op("fuse_fwd")(*arguments)
    _, got = op("fuse_bwd")(dout, *arguments, False, True)
    return [out, got.squeeze(-1)], [expected.detach(), dlogits]


def _shifted(op):
    """Rows that begin one element after a multiple of 16 bytes."""
    x, y = (torch.randn(33)[1:].view(1, 2, 16) for _ in range(2))
    return [op("gated_residual_fwd")(x, y, torch.ones(1, 1, 1), None, 2)], [x + y]


_CALLS = {
    "dropped_term": _sums,
    "missing_barrier_read_after_write": _sums,
    "missing_barrier_write_after_read": _softmax,
    "missing_barrier_of_the_weights": _softmax,
    "misaligned": _shifted,
    "divergent_sum": _row_gates,
    "absent_is_read": _softmax,
    "no_mean": _softmax,
}
_REPORTS = {"misaligned": "aligned", "divergent_sum": "shuffle"}


def _is_right(call):
    got, expected = call(FAULTS.op)
    pairs = zip(got, expected, strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in pairs)


@pytest.mark.parametrize("name", _CALLS)
def test_found_by_the_ruler_or_a_schedule(name):
    """A wrong result, or a report, under at least one of a few schedules; without it never."""
    right, reports = FAULTS.tried(name, lambda: _is_right(_CALLS[name]), 6)
    assert right < 6, f"{name} was not found"
    if name in _REPORTS:
        assert reports and all(_REPORTS[name] in report for report in reports), reports


_ROW_END = """
x, y = torch.randn(2, 1, 1, 7).unbind()
print(ops.gated_residual_fwd(x.clone(), y.clone(), torch.ones(1, 1, 1), None, 0).sum())
"""
_SUMS = """
dout, y = torch.randn(2, 2, 300, 24).unbind()
print(ops.gated_residual_bwd(dout, y, torch.zeros(1, 1, 24), None, 0, True, True)[1].sum())
"""
_SOFTMAX = """
features = [torch.randn(2, 2, 520) for _ in range(8)]
arguments = features, torch.randn(2, 2, 8, 1), None, 0
ops.fuse_fwd(*arguments)
print(ops.fuse_bwd(features[0], *arguments, True, True)[1].sum())
"""


def _under(mode, name, script, report):
    done = FAULTS.run(mode, None, script)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr
    done = FAULTS.run(mode, name, script)
    assert done.returncode != 0 and report in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["past_the_end", "written_past_the_end"])
def test_found_by_address_sanitizer(name):
    _under("asan", name, _ROW_END, "heap-buffer-overflow")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, script",
    [
        ("missing_barrier_read_after_write", _SUMS),
        ("missing_barrier_write_after_read", _SOFTMAX),
        ("missing_barrier_of_the_weights", _SOFTMAX),
    ],
)
def test_found_by_thread_sanitizer(name, script):
    _under("tsan", name, script, "data race")
