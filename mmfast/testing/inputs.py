"""The tensors of a case: values, memory layouts, masks, segments, incoming gradients."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.reference.cross_attention import allowed_pairs

if TYPE_CHECKING:
    from mmfast.testing.cases import Case

LAYOUTS = (
    "bhnd",  # contiguous
    "bnhd",  # [B, N, H, D] memory, as after a projection
    "nbhd",  # sequence first, as in nn.MultiheadAttention
    "packed",  # one of three slices of a fused [B, N, 3, H, D] projection
    "sliced",  # rows and widths cut out of something larger
    "misaligned",  # starts one element after an aligned address
    "expanded_b",  # one item shared by the batch, stride 0
    "expanded_h",  # one head shared by all, stride 0
    "columns",  # last dim strided: the one layout that is copied
)


@dataclass
class Inputs:
    """The tensors of a case and the incoming gradients of its results."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor | None
    dimportance: Tensor | None
    dweights: Tensor | None
    seed: int

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype; integers and masks stay."""

        def cast(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        fields = {f.name: cast(getattr(self, f.name)) for f in dataclasses.fields(self)}
        fields["options"] = {name: cast(value) for name, value in self.options.items()}
        return Inputs(**fields)

    def allowed(self) -> Tensor:
        """bool `[B, H, N, M]`."""
        names = ("kv_lens", "q_lens", "q_segments", "kv_segments", "segment_rule", "mask")
        given = {name: self.options[name] for name in names if name in self.options}
        pairs = allowed_pairs(self.q, self.k, is_causal=self.case.is_causal, **given)
        return pairs.expand(self.case.B, self.case.H, self.case.N, self.case.M)

    def key_seen(self) -> Tensor:
        """bool `[B, G, M]`: does any row of any of its heads see the key?"""
        c = self.case
        return self.allowed().any(2).reshape(c.B, c.G, c.H // c.G, c.M).any(2)

    def row_sees(self) -> Tensor:
        """bool `[B, H, N]`: may the row see anything?"""
        return self.allowed().any(3)

    def poisoned(self, value: float = float("nan")) -> Inputs:
        """With `value` in every key, value and query row that takes no part; memory is copied."""
        unseen, blind = ~self.key_seen()[..., None], ~self.row_sees()[..., None]
        return dataclasses.replace(
            self,
            q=self.q.masked_fill(blind, value),
            k=self.k.masked_fill(unseen, value),
            v=self.v.masked_fill(unseen, value),
        )


def _seed(name: str, seed: int) -> int:
    return zlib.crc32(f"{name}/{seed}".encode())


def _laid_out(layout: str, sizes: tuple[int, int, int, int], g: torch.Generator) -> Tensor:
    """Normal float32 values `[B, H, N, D]` in this memory layout."""
    B, H, N, D = sizes
    if layout == "bhnd":
        return torch.randn(B, H, N, D, generator=g)
    if layout == "bnhd":
        return torch.randn(B, N, H, D, generator=g).transpose(1, 2)
    if layout == "nbhd":
        return torch.randn(N, B, H, D, generator=g).permute(1, 2, 0, 3)
    if layout == "packed":
        return torch.randn(B, N, 3, H, D, generator=g)[:, :, 1].transpose(1, 2)
    if layout == "sliced":
        return torch.randn(B + 1, H + 1, N + 3, D + 5, generator=g)[1:, 1:, 2:-1, 3:-2]
    if layout == "misaligned":
        return torch.randn(B * H * N * D + 1, generator=g)[1:].view(B, H, N, D)
    if layout == "expanded_b":
        return torch.randn(min(B, 1), H, N, D, generator=g).expand(B, H, N, D)
    if layout == "expanded_h":
        return torch.randn(B, 1, N, D, generator=g).expand(B, H, N, D)
    if layout == "columns":
        return torch.randn(B, H, D, N, generator=g).transpose(2, 3)
    raise ValueError(f"unknown layout {layout!r}; it must be one of {', '.join(LAYOUTS)}")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Another dtype with the very same strides and offset: `.to` would straighten them out."""
    if tensor.dtype == dtype:
        return tensor
    storage = torch.empty(0).set_(tensor.untyped_storage()).to(dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _spanning(dims: str, case: Case) -> tuple[int, ...]:
    sizes = {"B": case.B, "H": case.H, "N": case.N, "M": case.M, "1": 1}
    return tuple(sizes[letter] for letter in dims)


def _mask(case: Case, g: torch.Generator) -> Tensor:
    assert case.mask is not None
    shape = _spanning(case.mask, case)
    mask = torch.rand(shape, generator=g) < 0.7
    if case.mask_kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    if case.mask_kind == "all":
        return torch.ones(shape, dtype=torch.bool)
    if case.mask_kind == "dead_rows":
        mask[..., ::5, :] = False
    elif case.mask_kind == "dead_columns":
        mask[..., 1::3] = False
    elif case.mask_kind == "dead_item":
        mask[0] = False
    elif case.mask_kind == "tiles":
        rows, columns = torch.arange(shape[-2]) // 64, torch.arange(shape[-1]) // 64
        mask = mask & ((rows[:, None] + columns) % 2 == 0)
    return mask


def _bias(case: Case, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    assert case.bias is not None
    bias = torch.randn(_spanning(case.bias, case), generator=g)
    if case.bias_kind == "infinite":
        bias = bias.masked_fill(torch.rand(bias.shape, generator=g) < 0.2, float("-inf"))
        bias[..., ::4, :] = float("-inf")
    return bias.to(_side_dtype(case.bias_dtype, dtype))


def _side_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name == "float32" and dtype != torch.float64 else dtype


def _segments(case: Case, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """int32 `[B, N]` and `[B, M]`."""
    images = 4

    def draw(low: int, length: int) -> Tensor:
        return torch.randint(low, images, (case.B, length), generator=g, dtype=torch.int32)

    rows, keys = draw(-1, case.N), draw(0, case.M)  # -1: text before the first image
    if case.segments == "shuffled":
        return rows, keys
    rows, keys = rows.sort(dim=1).values, keys.sort(dim=1).values
    if case.segments == "apart":  # no item has a number of another
        own = 10 * torch.arange(case.B, dtype=torch.int32)[:, None]
        return rows + own, keys + own
    if case.segments == "orphan":
        keys[:, case.M // 2 :] += 100  # images that no text refers to
    return rows, keys


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """The tensors of `case`. The same values for every dtype, rounded to it."""
    g = torch.Generator().manual_seed(_seed(case.name, seed))
    B, H, G, N, M, D, Dv = case.B, case.H, case.G, case.N, case.M, case.D, case.Dv
    q = _laid_out(case.layout, (B, H, N, D), g)
    if case.magnitude != 1.0:
        q *= case.magnitude
    q = _cast(q, dtype)
    k = _cast(_laid_out(case.kv_layout, (B, G, M, D), g), dtype)
    v = _cast(_laid_out(case.kv_layout, (B, G, M, Dv), g), dtype)

    options: dict[str, Any] = {}
    if case.kv_lens is not None:
        options["kv_lens"] = torch.tensor(case.kv_lens, dtype=torch.int32)
    if case.q_lens is not None:
        options["q_lens"] = torch.tensor(case.q_lens, dtype=torch.int32)
    if case.segments is not None:
        options["q_segments"], options["kv_segments"] = _segments(case, g)
        options["segment_rule"] = case.segment_rule
    if case.mask is not None:
        options["mask"] = _mask(case, g)
    if case.bias is not None:
        options["bias"] = _bias(case, dtype, g)
    if case.is_causal:
        options["is_causal"] = True
    if case.scale is not None:
        options["scale"] = case.scale
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
    if case.gate is not None:
        shape = (B, N, H) if case.gate == "head" else (B, N, H, Dv)
        gate = 2 * torch.randn(shape, generator=g)
        options["gate"] = gate.to(_side_dtype(case.gate_dtype, dtype))
    if case.importance:
        options["return_importance"] = True
    if case.weights:
        options["return_weights"] = case.weights

    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    per_head = case.weights == "per_head"
    dout = torch.randn(B, H, N, Dv, generator=g).to(dtype)
    dlse = torch.randn(B, H, N, generator=g).to(statistic)
    dimportance = torch.randn(B, H, M, generator=g).to(statistic)
    dweights = torch.randn((B, H, N, M) if per_head else (B, N, M), generator=g).to(dtype)
    return Inputs(
        case, q, k, v, options, dout,
        dlse if case.dlse else None,
        dimportance if case.importance else None,
        dweights if case.weights else None,
        seed=_seed(case.name, seed) ^ 1,
    )  # fmt: skip
