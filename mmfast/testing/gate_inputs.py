"""The tensors of a gating case: values, memory layouts, masks, incoming gradients."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.reference._compute import per_item

if TYPE_CHECKING:
    from mmfast.testing.gate_cases import GateCase

GATE_LAYOUTS = (
    "dense",  # contiguous
    "sequence_first",  # [N, B, C] memory
    "sliced",  # rows and channels cut out of something larger
    "misaligned",  # starts one element after an aligned address
    "expanded_items",  # one item shared by the batch, stride 0
    "expanded_rows",  # one row shared by the item, stride 0
    "columns",  # last dim strided: the one layout that is copied
)

_DATA = {
    "gated_residual": ("x", "y"),
    "glu": ("a", "b"),
    "glu_packed": ("ab",),
    "modulate": ("x",),
    "adaptation_gate": ("z", "h"),
}


@dataclass
class GateInputs:
    """The tensors of a case (`leaves` have gradients) and the incoming gradients of its results."""

    case: GateCase
    leaves: dict[str, Tensor]
    options: dict[str, Any]
    incoming: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the data."""
        return next(iter(self.leaves.values())).dtype

    def call(self, function: Callable[..., Any], leaves: dict[str, Tensor] | None = None) -> Any:
        """`function`, in the op's signature, on these tensors (or on others in their place)."""
        leaves = dict(self.leaves if leaves is None else leaves)
        if self.case.op == "fuse":
            features = [leaves.pop(f"x{k}") for k in range(self.case.K)]
            return function(features, leaves.pop("logits"), **self.options)
        data = [leaves.pop(name) for name in _DATA[self.case.op]]
        if self.case.op == "gated_residual":
            data.append(leaves.pop("gate"))
        return function(*data, **leaves, **self.options)

    def to(self, dtype: torch.dtype) -> GateInputs:
        """The same values in another dtype; masks stay."""

        def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(dtype) for name, tensor in tensors.items()}

        return dataclasses.replace(self, leaves=cast(self.leaves), incoming=cast(self.incoming))

    def unused(self) -> dict[str, Tensor]:
        """bool for each leaf of which a part takes no part, True there: its gradient is 0."""
        case = self.case
        keep = self.options.get("row_mask")
        if keep is not None:
            name = "y" if case.op == "gated_residual" else "h"
            return {name: ~keep.unsqueeze(-1).expand(case.shape)}
        present = self.options.get("present")
        if present is None:
            return {}
        masks = {}
        for k in range(case.K):
            absent = ~present[:, k]
            masks[f"x{k}"] = absent.reshape(-1, *(1,) * (len(case.shape) - 1)).expand(case.shape)
        return masks

    def poisoned(self, value: float = float("nan")) -> GateInputs:
        """With `value` in everything that takes no part; memory is copied."""
        leaves = dict(self.leaves)
        for name, where in self.unused().items():
            leaves[name] = leaves[name].masked_fill(where, value)
        return dataclasses.replace(self, leaves=leaves)


def make_gate_inputs(
    case: GateCase, dtype: torch.dtype = torch.float32, seed: int = 0
) -> GateInputs:
    """The tensors of `case`. The same values for every dtype, rounded to it."""
    g = torch.Generator().manual_seed(zlib.crc32(f"{case.op}/{case.name}/{seed}".encode()))
    names = _DATA.get(case.op, tuple(f"x{k}" for k in range(case.K)))
    if case.residual:
        names = (*names, "residual")
    shape = case.shape
    leaves = {name: _data(case, _wide(case), dtype, g) for name in names}
    if case.special == "offset":
        leaves["x"] = (leaves["x"] + 1000).to(dtype)
    if case.special == "zero_rows":
        leaves["h"][0, ::2] = 0
        leaves["z"][0, ::3] = 0
    for name, form in case.sides:
        leaves[name] = _side(case, name, spanned(form, case), dtype, g)

    options: dict[str, Any] = {}
    if case.activation:
        options["activation"] = case.activation
    if case.op == "modulate":
        options |= {"norm": case.norm, "eps": case.eps}
    if case.op == "adaptation_gate":
        options |= {"beta": case.beta, "eps": case.eps}
    if case.op == "fuse":
        options["mode"] = case.mode
    if case.row_mask:
        options["row_mask"] = torch.rand(spanned(case.row_mask, case), generator=g) < 0.6
    if case.present:
        options["present"] = _present(case, g)
    incoming = {"out": torch.randn(shape, generator=g).to(dtype)}
    if case.residual:
        incoming["h"] = torch.randn(shape, generator=g).to(dtype)
    return GateInputs(case, leaves, options, incoming)


def spanned(form: str, case: GateCase) -> tuple[int, ...]:
    """The shape that a form such as "BNC" names. The middle letter stands for all middle dims."""
    sizes = {"B": case.shape[0], "C": case.shape[-1], "K": case.K, "1": 1}
    middle = case.shape[1:-1]
    masks_rows = bool(case.row_mask) and form == case.row_mask
    if len(form) <= 2 and not masks_rows:
        return tuple(sizes[letter] for letter in form)
    between = middle if form[1] == "N" else (1,) * len(middle)
    return (sizes[form[0]], *between, *(sizes[letter] for letter in form[2:]))


def _wide(case: GateCase) -> tuple[int, ...]:
    return (*case.shape[:-1], 2 * case.shape[-1]) if case.op == "glu_packed" else case.shape


def _data(case: GateCase, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    if case.layout == "dense":
        return (torch.randn(shape, generator=g) * case.magnitude).to(dtype)
    B, N, C = shape
    if case.layout == "sequence_first":
        x = torch.randn(N, B, C, generator=g).transpose(0, 1)
    elif case.layout == "sliced":
        x = torch.randn(B + 1, N + 3, C + 5, generator=g)[1:, 2:-1, 3:-2]
    elif case.layout == "misaligned":
        x = torch.randn(B * N * C + 1, generator=g)[1:].view(B, N, C)
    elif case.layout == "expanded_items":
        x = torch.randn(1, N, C, generator=g).expand(B, N, C)
    elif case.layout == "expanded_rows":
        x = torch.randn(B, 1, C, generator=g).expand(B, N, C)
    elif case.layout == "columns":
        x = torch.randn(B, C, N, generator=g).transpose(1, 2)
    else:
        raise ValueError(f"unknown layout {case.layout!r}; use one of {', '.join(GATE_LAYOUTS)}")
    return cast_in_place(x, dtype)


def cast_in_place(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Another dtype with the very same strides and offset: `.to` would straighten them out."""
    storage = torch.empty(0).set_(tensor.untyped_storage()).to(dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _side(
    case: GateCase, name: str, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator
) -> Tensor:
    if case.side_layout == "chunk":
        values = torch.randn(*shape[:-1], 3 * shape[-1], generator=g)
        values = values[..., shape[-1] : 2 * shape[-1]]
    else:
        values = torch.randn(shape, generator=g)
    if name == "weight":
        values = 1 + 0.3 * values
    elif name == "logits":
        values = 2 * values
    if case.special == "large_sides":
        values = values * 50
    elif case.special == "tiny_sides":
        values = values * 1e-4
    elif case.special == "infinite_logits":
        draw = torch.rand(shape, generator=g)
        values = values.masked_fill(draw < 0.25, float("-inf"))
        values = values.masked_fill(draw > 0.85, float("inf"))
        values[:, 0] = float("-inf")
    if case.side_dtype == "float32" and dtype != torch.float64:
        return values
    return cast_in_place(values, dtype) if case.side_layout == "chunk" else values.to(dtype)


def _present(case: GateCase, g: torch.Generator) -> Tensor:
    B = case.shape[0]
    if case.present == "none":
        return torch.zeros(B, case.K, dtype=torch.bool)
    if case.present == "all":
        return torch.ones(B, case.K, dtype=torch.bool)
    present = torch.rand(B, case.K, generator=g) < 0.6
    present[0] = False
    return present


def full_sides(inputs: GateInputs) -> dict[str, Tensor]:
    """Each side tensor as large as the data, values repeated: its gradient is not summed yet."""
    from mmfast.reference.fuse import spread_logits

    case = inputs.case
    x = next(iter(inputs.leaves.values()))
    full = {}
    for name, _ in case.sides:
        side = inputs.leaves[name]
        if name == "logits":
            pair, spread = spread_logits(side, x, case.K, case.mode)
            lead, C = case.shape[:-1], case.shape[-1]
            wide = spread.expand(*lead, 1 if pair else case.K, C)
            full[name] = (wide.squeeze(-2) if pair else wide).contiguous()
        else:
            full[name] = per_item(side, x).expand(case.shape).contiguous()
    return full
