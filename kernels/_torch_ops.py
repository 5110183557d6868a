"""The Triton kernels as torch ops of the namespace mmfast, for CUDA tensors.

`OPS[op]` gives an op's launchers, importing its module when it is first asked for; `register()`
makes them the CUDA implementation of `torch.ops.mmfast.<op>_<part>`. The compiled library
defines the same schemas (a test compares them), so `register` defines only those that are not
there: load the library first, it cannot define what exists.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_MASKS = (
    "Tensor? kv_lens, Tensor? q_lens, Tensor? q_segments, Tensor? kv_segments, Tensor? mask, "
    "Tensor? bias, Tensor? q_starts, Tensor? kv_starts, "
)
_DROPOUT = "Tensor? gate, Tensor? seed, float scale, float dropout_p, "
_RULES = "bool is_causal, int segment_rule, int max_q, int max_kv"

SCHEMAS: dict[str, dict[str, str]] = {
    "cross_attention": {
        "fwd": f"(Tensor q, Tensor k, Tensor? v, {_MASKS}{_DROPOUT}{_RULES}) -> (Tensor, Tensor)",
        "bwd": (
            "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor? v, Tensor out, Tensor lse, "
            f"{_MASKS}{_DROPOUT}{_RULES}, bool need_dbias, bool need_dk) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
        "probs": (
            f"(Tensor q, Tensor k, Tensor lse, {_MASKS}float scale, {_RULES}, bool importance, "
            "int weights) -> (Tensor, Tensor)"
        ),
        "probs_bwd": (
            "(Tensor? dimportance, Tensor? dweights, Tensor q, Tensor k, Tensor lse, "
            f"{_MASKS}float scale, {_RULES}, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)"
        ),
    },
    "gated_residual": {
        "fwd": "(Tensor x, Tensor y, Tensor gate, Tensor? row_mask, int activation) -> Tensor",
        "bwd": (
            "(Tensor dout, Tensor y, Tensor gate, Tensor? row_mask, int activation, bool need_dy, "
            "bool need_dgate) -> (Tensor, Tensor)"
        ),
    },
    "glu": {
        "fwd": "(Tensor a, Tensor b, int activation) -> Tensor",
        "bwd": "(Tensor dout, Tensor a, Tensor b, int activation) -> (Tensor, Tensor)",
    },
    "glu_packed": {
        "fwd": "(Tensor ab, int activation) -> Tensor",
        "bwd": "(Tensor dout, Tensor ab, int activation) -> Tensor",
    },
    "fuse": {
        "fwd": "(Tensor[] features, Tensor logits, Tensor? present, int mode) -> Tensor",
        "bwd": (
            "(Tensor dout, Tensor[] features, Tensor logits, Tensor? present, int mode, "
            "bool need_dfeatures, bool need_dlogits) -> (Tensor[], Tensor)"
        ),
    },
    "modulate": {
        "fwd": (
            "(Tensor x, Tensor? residual, Tensor? gate, Tensor? scale, Tensor? shift, "
            "Tensor? weight, Tensor? bias, int norm, float eps) -> (Tensor, Tensor)"
        ),
        "bwd": (
            "(Tensor? dout, Tensor? dh, Tensor x, Tensor? h, Tensor? gate, Tensor? scale, "
            "Tensor? weight, Tensor? bias, int norm, float eps, Tensor? shift, bool[] needs) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
    },
    "adaptation_gate": {
        "fwd": (
            "(Tensor z, Tensor h, Tensor? weight, Tensor? bias, Tensor? row_mask, float beta, "
            "float eps) -> Tensor"
        ),
        "bwd": (
            "(Tensor dout, Tensor z, Tensor h, Tensor? weight, Tensor? bias, Tensor? row_mask, "
            "float beta, float eps, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
        ),
    },
}

# Where a launcher is not in the module of its op's name.
_MODULES = {
    "cross_attention_bwd": "cross_attention_bwd",
    "cross_attention_probs": "cross_attention_probs",
    "cross_attention_probs_bwd": "cross_attention_probs",
    "glu_packed_fwd": "glu",
    "glu_packed_bwd": "glu",
    "fuse_bwd": "fuse_bwd",
    "modulate_bwd": "modulate_bwd",
    "adaptation_gate_bwd": "adaptation_gate_bwd",
}


class _Launchers(Mapping[str, dict[str, Callable[..., Any]]]):
    """op -> {"fwd": launcher, "bwd": launcher, ...}; ImportError where triton is missing."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Callable[..., Any]]] = {}

    def __getitem__(self, op: str) -> dict[str, Callable[..., Any]]:
        if op not in self._found:
            launchers = {}
            for way in SCHEMAS[op]:
                name = f"{op}_{way}"
                module = importlib.import_module(f"{__package__}.{_MODULES.get(name, op)}")
                launchers[way] = getattr(module, name)
            self._found[op] = launchers
        return self._found[op]

    def __iter__(self) -> Iterator[str]:
        return iter(SCHEMAS)

    def __len__(self) -> int:
        return len(SCHEMAS)


OPS = _Launchers()
_libraries: list[torch.library.Library] = []  # registrations live as long as these


def register() -> None:
    """Make the launchers the CUDA implementation of the ops. The second call does nothing.

    Under TRITON_INTERPRET=1 they are only defined: nothing goes through torch's dispatcher there.
    """
    if _libraries:
        return
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    library = torch.library.Library("mmfast", "FRAGMENT")
    _libraries.append(library)
    for op, ways in SCHEMAS.items():
        for way, schema in ways.items():
            name = f"{op}_{way}"
            if not hasattr(torch.ops.mmfast, name):
                library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            if not interprets:
                library.impl(name, _lazily(op, way), "CUDA")


def _lazily(op: str, way: str) -> Callable[..., Any]:
    """The launcher, whose module is imported when it is first called."""

    def launcher(*args: Any) -> Any:
        return OPS[op][way](*args)

    return launcher
