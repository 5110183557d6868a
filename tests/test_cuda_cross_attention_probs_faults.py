"""Faults planted in the CUDA kernel that sums over pairs are found.

By the ruler, by random schedules and by the host run's own reports in the plain library, by
AddressSanitizer and ThreadSanitizer in theirs. Without a fault the same calls pass.
"""

from __future__ import annotations

import pytest
import torch
from planted_cuda import Fault, Faults

from mmfast.reference.philox import dropout_keep

KERNEL, PLAN = "cuda/cross_attention_pairs.cuh", "cuda/cross_attention_pairs.cu"
BINDING = "bindings/cuda_cross_attention.cpp"

FAULTS = Faults(
    "pairs",
    ("cross_attention_pairs_f32", "cross_attention_pairs.cu", "column_sums", "cross_attention.cpp"),
    # a piece is multiplied before all of it is there
    Fault("missing_barrier_read_after_write", KERNEL,
          "sync_threads();  // this piece is there for all",
          "if (!PLANTED) sync_threads();  // this piece is there for all"),
    Fault("loose_wait", KERNEL, "    cp_async_wait<0>();",
          "    if (PLANTED) cp_async_wait<1>(); else cp_async_wait<0>();"),
    # the sums of a warp go where others still multiply
    Fault("missing_barrier_write_after_read", KERNEL,
          "  sync_threads();  // the tiles become",
          "  if (!PLANTED) sync_threads();  // the tiles become"),
    Fault("missing_barrier_before_rows", KERNEL,
          "  sync_threads();\n  const int32_t N = p.a.rules.N, M = p.a.rules.M;",
          "  if (!PLANTED) sync_threads();\n  const int32_t N = p.a.rules.N, M = p.a.rules.M;"),
    Fault("missing_barrier_before_columns", KERNEL,
          "  sync_threads();\n  const int column = int(threadIdx.x);",
          "  if (!PLANTED) sync_threads();\n  const int column = int(threadIdx.x);"),
    # the next piece goes where this one is multiplied
    Fault("one_buffer", KERNEL, "load_piece<T, VALUES>(p.a, block, loading, rows + (buffer ^ 1) *",
          "load_piece<T, VALUES>(p.a, block, loading, rows + (buffer ^ (PLANTED ? 0 : 1)) *"),
    # some lanes leave an exchange to the others
    Fault("divergent_shuffle", KERNEL, "    for (int mask = 4; mask < 32; mask *= 2) {",
          "    for (int mask = 4; mask < (PLANTED && lane < 16 ? 16 : 32); mask *= 2) {"),
    Fault("skipped_barrier", KERNEL, "sync_threads();  // the tiles become",
          "if (!(PLANTED && warp_id() == 1)) sync_threads();  // the tiles become"),
    # more shared memory than the launch gives
    Fault("shared_overrun", KERNEL, "T* keys = shared.take<T>(2 * PIECE::ELEMENTS);",
          "T* keys = shared.take<T>((PLANTED ? 3 : 2) * PIECE::ELEMENTS);"),
    # 16-byte stores to rows that begin anywhere
    Fault("misaligned_store", KERNEL, "const bool aligned = M % 4 == 0;",
          "const bool aligned = PLANTED || M % 4 == 0;"),
    Fault("read_past_the_end", KERNEL, "i < rows_left ? q +", "i < rows_left + PLANTED ? q +"),
    Fault("written_past_the_end", KERNEL, "if (n >= N || m >= M) continue;",
          "if (n >= N + PLANTED || m >= M) continue;"),
    # what the ruler sees
    Fault("one_key_too_many", KERNEL, "bool allowed = m < r.row.end;",
          "bool allowed = m < r.row.end + PLANTED;"),
    Fault("one_step_too_few", KERNEL, "for (; step < block.end; ++step) {",
          "for (; step < block.end - PLANTED; ++step) {"),
    Fault("one_warp_too_few", KERNEL, "for (int warp = 0; warp < kPairsThreads / 32; ++warp)",
          "for (int warp = PLANTED; warp < kPairsThreads / 32; ++warp)"),
    Fault("old_sums", KERNEL, "    clear(scores);", "    if (!PLANTED) clear(scores);"),
    Fault("old_products", KERNEL, "if constexpr (VALUES) clear(products);",
          "if constexpr (VALUES) if (!PLANTED) clear(products);"),
    Fault("other_key", KERNEL, "survivors >> i & 1", "survivors >> (i ^ PLANTED) & 1"),
    Fault("no_delta", KERNEL, "(kept - delta[i >> 1])", "(kept - (PLANTED ? 0 : delta[i >> 1]))"),
    Fault("not_the_mean", PLAN, "p.factor = a.weights_mean ?",
          "p.factor = a.weights_mean && !PLANTED ?"),
    # The backwards of this library are the sums over pairs alone, and dlse is delta. One storage
    # dtype is enough.
    edits=(
        Fault("", BINDING, "run(x, cross_attention_fwd_workspace, cross_attention_fwd);",
              'x.call.fail("not here");'),
        Fault("", BINDING, "run(x, cross_attention_bwd_workspace, cross_attention_bwd);",
              "a.delta = const_cast<float*>(a.dlse);\n"
              "run(x, cross_attention_dbias_pairs_workspace, cross_attention_dbias_pairs);"),
        Fault("", BINDING, "cross_attention_probs_bwd_workspace, cross_attention_probs_bwd",
              "cross_attention_dbias_pairs_workspace, cross_attention_dbias_pairs"),
        Fault("", PLAN, "launch_pairs<bf16>", "launch_pairs<float>"),
        Fault("", PLAN, "launch_pairs<f16>", "launch_pairs<float>"),
    ),
)  # fmt: skip

B, H, D = 2, 2, 40


def _problem(N, M, kv_lens=None):
    """q, k, P and the arguments of the probabilities' op."""
    q, k = torch.randn(B, H, N, D), torch.randn(B, H, M, D)
    scores = q @ k.mT * D**-0.5
    if kv_lens is not None:
        beyond = torch.arange(M)[None, :] >= kv_lens[:, None]
        scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    arguments = q, k, lse, kv_lens, *(None,) * 7, D**-0.5, False, 0, 0, 0
    return (scores - lse[..., None]).exp(), arguments


def _importance(op):
    P, arguments = _problem(140, 70)
    got, _ = op("cross_attention_probs")(*arguments, True, 0)
    return [got], [P.sum(2)]


def _weights(op):
    P, arguments = _problem(70, 70)
    _, got = op("cross_attention_probs")(*arguments, False, 2)
    return [got], [P]


def _lengths(op):
    """The keys beyond a length are those of the item's own row ends."""
    P, arguments = _problem(20, 70, torch.tensor([70, 33], dtype=torch.int32))
    _, got = op("cross_attention_probs")(*arguments, False, 1)
    return [got], [P.mean(1)]


def _odd(op):
    P, arguments = _problem(20, 71)
    _, got = op("cross_attention_probs")(*arguments, False, 1)
    return [got], [P.mean(1)]


def _bias(op, dropout_p=0.0):
    """dbias of [1, 1, N, M], of a backward whose delta is at hand."""
    N, M = 20, 70
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 1, N, M, generator=generator)
    q, k, v = (torch.randn(B, H, n, D, generator=generator) for n in (N, M, M))
    dout, delta = torch.randn(B, H, N, D, generator=generator), torch.randn(B, H, N)
    seed = torch.tensor([5]) if dropout_p else None
    scores = q @ k.mT * D**-0.5 + bias
    lse = torch.logsumexp(scores, -1)
    dP = dout @ v.mT
    if dropout_p:
        dP = dP * dropout_keep(seed, dropout_p, B, H, N, M) / (1 - dropout_p)
    dS = (scores - lse[..., None]).exp() * (dP - delta[..., None])
    got = op("cross_attention_bwd")(
        dout, delta, q, k, v, torch.zeros_like(dout), lse, *(None,) * 5, bias, None,
        None, None, seed, D**-0.5, dropout_p, False, 0, 0, 0, True, True,
    )[3]  # fmt: skip
    return [got], [dS.sum((0, 1), keepdim=True)]


def _dropout(op):
    return _bias(op, 0.3)


_CALLS = {
    "missing_barrier_read_after_write": _weights,
    "loose_wait": _weights,
    "missing_barrier_write_after_read": _weights,
    "missing_barrier_before_rows": _weights,
    "missing_barrier_before_columns": _importance,
    "one_buffer": _importance,
    "divergent_shuffle": _importance,
    "skipped_barrier": _importance,
    "shared_overrun": _weights,
    "misaligned_store": _odd,
    "one_key_too_many": _lengths,
    "one_step_too_few": _weights,
    "one_warp_too_few": _importance,
    "old_sums": _bias,
    "old_products": _bias,
    "other_key": _dropout,
    "no_delta": _bias,
    "not_the_mean": _odd,
}
_REPORTS = {
    "divergent_shuffle": "shuffle",
    "skipped_barrier": "sync_threads",
    "shared_overrun": "shared",
    "misaligned_store": "aligned",
}


def _is_right(call):
    got, expected = call(FAULTS.op)
    pairs = zip(got, expected, strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


@pytest.mark.parametrize("name", _CALLS)
def test_found_by_the_ruler_or_a_report(name):
    """A wrong result, or a report, under at least one of a few schedules; without it never."""
    FAULTS.multiprocessors(1)  # a block goes over several tiles
    right, reports = FAULTS.tried(name, lambda: _is_right(_CALLS[name]), 4)
    assert right < 4, f"{name} was not found"
    if name in _REPORTS:
        assert reports and all(_REPORTS[name] in report for report in reports), reports


_HEAD = """
q, k = torch.randn(1, 1, {N}, 16), torch.randn(1, 1, 20, 16)
lse = torch.logsumexp(q @ k.mT * 0.25, -1)
arguments = q, k, lse, *(None,) * 8, 0.25, False, 0, 0, 0
"""
_WEIGHTS = _HEAD.format(N=20) + "print(ops.cross_attention_probs(*arguments, False, 2)[1].sum())"
_IMPORTANCE = _HEAD.format(N=80) + "print(ops.cross_attention_probs(*arguments, True, 0)[0].sum())"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, name, script, report",
    [
        ("asan", "read_past_the_end", _WEIGHTS, "heap-buffer-overflow"),
        ("asan", "written_past_the_end", _WEIGHTS, "heap-buffer-overflow"),
        ("tsan", "missing_barrier_read_after_write", _WEIGHTS, "data race"),
        ("tsan", "missing_barrier_write_after_read", _WEIGHTS, "data race"),
        ("tsan", "missing_barrier_before_rows", _WEIGHTS, "data race"),
        ("tsan", "missing_barrier_before_columns", _IMPORTANCE, "data race"),
    ],
)
def test_found_by_a_sanitizer(mode, name, script, report):
    done = FAULTS.run(mode, None, script)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr
    done = FAULTS.run(mode, name, script)
    assert done.returncode != 0 and report in done.stderr, done.stderr
