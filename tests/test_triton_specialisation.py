"""Triton specialises a kernel on none of the integers that it is given.

A new shape then compiles nothing new. Triton is asked as in a launch, without a GPU, about what
every launcher launches: the calls of tools/triton_problems.py and tools/attention_problems.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_helpers import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import attention_problems
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._blocks import stride_pair
from mmfast.kernels._launch import unspecialised
from mmfast.kernels._torch_ops import OPS
from mmfast.kernels.cross_attention_probs import cross_attention_probs, cross_attention_probs_bwd
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton_problems import problems, tensor
from triton_report import TARGETS, Launch, recorded

BACKENDS = {name: make_backend(TARGETS[name]) for name in ("sm_90", "gfx942")}
DTYPE = torch.bfloat16


def specialised(launch: Launch, target: str) -> dict[str, Any]:
    """(type, attribute) of each parameter, nested as the argument is, by Triton's own binder."""
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKENDS[target])
    bound, kinds, _ = bind(*launch.args, **launch.constants)
    return dict(zip(bound, kinds, strict=True))


def integers(name: str, value: Any, kind: Any, attribute: Any) -> Iterator[tuple[str, int, Any]]:
    """(name, value, (type, attribute)) of each int in an argument."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from integers(f"{name}[{i}]", part, kind[i], attribute[i])
    elif type(value) is int:
        yield name, value, (kind, attribute)


def faults(launches: Sequence[Launch]) -> list[str]:
    """Integers that a kernel is specialised on."""
    found = []
    for launch in launches:
        values = dict(zip(launch.kernel.arg_names, launch.args)) | launch.constants
        for target in BACKENDS:
            for name, (kind, attribute) in specialised(launch, target).items():
                if launch.kernel.params[launch.kernel.arg_names.index(name)].is_constexpr:
                    continue
                found += [
                    f"{launch.kernel.__name__}, {each} = {value} on {target}: {seen}"
                    for each, value, seen in integers(name, values[name], kind, attribute)
                    if seen[0] not in ("i32", "i64") or seen[1]
                ]
    return found


def one_kernel(launches: Sequence[Launch]) -> list[str]:
    """Where ints of other values, but in tuples, make another kernel."""
    found = []
    for launch in launches:
        for target in BACKENDS:
            ways = []
            for value in (1, 16, 17):
                args = tuple([value if type(arg) is int else arg for arg in launch.args])
                ways.append(specialised(Launch(launch.kernel, 1, args, launch.constants), target))
            if ways[0] != ways[1] or ways[1] != ways[2]:
                found.append(f"{launch.kernel.__name__} on {target}")
    return found


# --- what the launchers launch --------------------------------------------------------------------


def gates() -> list[Launch]:
    with recorded() as launches:
        for problem in problems():
            problem.call(OPS[problem.op][problem.way], DTYPE)
    return launches


def attention(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    forms = (*attention_problems.FORMS, "bias gradient")
    launches = []
    for name in ("vqa", "pool"):
        shape = attention_problems.OURS[name]
        for way in ("fwd", "bwd"):
            for form in forms:
                problem = attention_problems.Problem(way, form, shape)
                launches += problem.launches(DTYPE, "sm_90", None)
    wide = attention_problems.Shape(8, 12, 2, 36, 264)
    for way in ("fwd", "bwd"):
        launches += attention_problems.Problem(way, "shared", wide).launches(DTYPE, "sm_90", None)
    monkeypatch.setattr(_tuning, "arch", lambda device: "sm_90")
    with recorded() as more:
        _probabilities()
    return launches + more


def _probabilities() -> None:
    B, H, N, M, D = 8, 12, 40, 36, 64
    q, k = (tensor(DTYPE, B, size, H, D).transpose(1, 2) for size in (N, M))
    lse, mask = tensor(torch.float32, B, H, N), tensor(torch.bool, B, 1, N, M)
    bias = tensor(DTYPE, 1, H, N, M)
    options = (
        tensor(torch.int32, B),
        None,
        None,
        None,
        mask,
        bias,
        None,
        None,
        0.125,
        False,
        0,
        0,
        0,
    )
    for weights in (1, 2):
        cross_attention_probs(q, k, lse, *options, True, weights)
    dimportance, dweights = tensor(torch.float32, B, H, M), tensor(DTYPE, B, H, N, M)
    cross_attention_probs_bwd(dimportance, dweights, q, k, lse, *options, True)


def test_gates() -> None:
    launches = gates()
    assert {launch.kernel.__name__ for launch in launches} >= {
        "gated_residual_bwd_kernel", "gated_residual_bwd_rows_kernel", "glu_bwd_kernel",
        "fuse_fwd_kernel", "fuse_bwd_kernel", "fuse_bwd_rows_kernel", "modulate_bwd_kernel",
        "adaptation_gate_bwd_kernel", "column_sums_kernel",
    }  # fmt: skip
    assert faults(launches) == []
    assert one_kernel(launches) == []


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = attention(monkeypatch)
    names = {launch.kernel.__name__ for launch in launches}
    assert {
        "cross_attention_fwd_kernel", "cross_attention_merge_kernel", "clear_outside_kernel",
        "cross_attention_shared_scores_kernel", "cross_attention_shared_keys_kernel",
    } <= names  # fmt: skip
    assert len(names) >= 11
    assert faults(launches) == []
    assert one_kernel(launches) == []


# --- tuples, for a number of tensors that is open -------------------------------------------------


def fuse_of(N: int, room: int) -> set[Any]:
    """What is compiled to fuse three features, with room after each item, forward and backward."""

    def data() -> torch.Tensor:
        return tensor(DTYPE, 4, N + room, 24)[:, :N]

    with recorded() as launches:
        for logits in (tensor(DTYPE, 4, N, 3, 24), tensor(DTYPE, 4, N, 3, 1)):
            features = [data(), data(), tensor(DTYPE, 4, N, 24)]
            OPS["fuse"]["fwd"](features, logits, None, 0)
            OPS["fuse"]["bwd"](data(), features, logits, None, 0, True, True)
    return {
        (launch.kernel.__name__, *launch.constants.items(), *specialised(launch, target).items())
        for launch in launches
        for target in BACKENDS
    }


@pytest.mark.parametrize(("N", "room"), [(17, 5), (32, 16), (16, 1), (33, 15), (100, 28)])
def test_features_of_any_strides_are_one_kernel(N: int, room: int) -> None:
    assert fuse_of(N, room) == fuse_of(64, 3)


@given(st.lists(st.tuples(*[st.integers(0, 2**40)] * 2), max_size=4))
def test_what_strides_are_in_tuples(strides: list[tuple[int, int]]) -> None:
    coded = unspecialised(strides)
    assert all(value != 1 and value % 16 for pair in coded for value in pair)
    assert [stride_pair.fn(pair) for pair in coded] == strides


# --- the check itself -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "in_tuple"])
def planted_kernel(first, n, m, in_tuple, K: tl.constexpr):
    pass


@pytest.mark.parametrize(
    ("args", "places"),
    [
        ((3, 3, (3, (3, 3))), []),
        ((16, 3, (3, None)), []),
        ((1, 3, (3, 0.5)), []),
        ((3, 16, ()), ["m = 16"]),
        ((3, 1, ()), ["m = 1"]),
        ((3, 3, (3, (16, 3))), ["in_tuple[1][0] = 16"]),
        ((3, 3, (1, (3, 0))), ["in_tuple[0] = 1", "in_tuple[1][1] = 0"]),
    ],
)
def test_planted_faults_are_found(args: tuple[Any, ...], places: list[str]) -> None:
    launch = Launch(planted_kernel, 1, (torch.empty(4), *args), {"K": 16})
    found = faults([launch])
    assert [text.partition(", ")[2].partition(" on ")[0] for text in found] == places * 2
    assert len(one_kernel([launch])) == 2  # m
