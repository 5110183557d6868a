"""Attention modules and stacks of `mmfast.nn` and what torch.nn has for the same job, one set of
weights: attention pooling, Q-Former attention, a cross-attention block over a padded context,
layers that all attend to one context, and generation over it.

`sdpa` is the module of torch.nn as its own layers call it (`need_weights=False`), `eager` the same
with its default, `need_weights=True`, and `compile` is `torch.compile` of `sdpa`. Padding comes to
torch as a boolean mask and to mmfast as lengths, both made before the clock starts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import mmfast.nn

from .impls import Run, freshly_compiled
from .modules import judge_plainly
from .problems import DIRECTIONS, FORWARD, BaseProblem

POOLING, QFORMER = "attention pooling", "Q-Former attention"
BLOCK, LAYERS, DECODING = "cross-attention block", "layers over one context", "decoding steps"
OPS = (POOLING, QFORMER, BLOCK, LAYERS, DECODING)
ALL_STACKS = "modules and stacks"
"""The heading under which all of them are shown."""
DROP_IN, CROSS_MODAL = "MultiheadAttention", "CrossModalAttention"


@dataclass(frozen=True)
class StackCase:
    """Sizes of one module: `N` queries of `width` over `M` rows of `context_width`.

    `ours`: the class of mmfast.nn, where there is more than one for the job. `lens`: valid rows of
    the context, default all. Queries of DECODING are steps, each of which adds one.
    """

    op: str
    name: str
    B: int
    N: int
    M: int
    width: int
    heads: int
    context_width: int
    hidden: int = 0
    layers: int = 0
    ours: str = ""
    lens: tuple[int, ...] = ()


def _attentions(op: str, name: str, *sizes: int) -> tuple[StackCase, ...]:
    return (
        StackCase(op, f"{name} drop-in", *sizes, ours=DROP_IN),
        StackCase(op, name, *sizes, ours=CROSS_MODAL),
    )


_LENS = (197, 170, 150, 130, 110, 90, 62, 37)  # 60 %
CASES = (
    *_attentions(POOLING, "pool 8x1x577x768", 8, 1, 577, 768, 12, 768),
    *_attentions(POOLING, "pool 8x1x729x1152", 8, 1, 729, 1152, 16, 1152),
    *_attentions(QFORMER, "qformer 8x32x257", 8, 32, 257, 768, 12, 1408),
    *_attentions(QFORMER, "qformer 2x32x257", 2, 32, 257, 768, 12, 1408),
    StackCase(BLOCK, "block 8x32x197x512", 8, 32, 197, 512, 8, 512, 2048, 1, lens=_LENS),
    StackCase(
        BLOCK, "block 4x64x577x768", 4, 64, 577, 768, 12, 768, 3072, 1, lens=(577, 400, 260, 148)
    ),
    StackCase(
        LAYERS, "6 layers 4x32x400x512", 4, 32, 400, 512, 8, 512, 2048, 6, lens=(400, 280, 180, 100)
    ),
    StackCase(
        DECODING, "8 steps 4x400x512", 4, 8, 400, 512, 8, 512, 2048, 6, lens=(400, 280, 180, 100)
    ),
)


@dataclass(frozen=True)
class StackProblem(BaseProblem):
    """One module, in a dtype and a direction."""

    case: StackCase
    case_type: ClassVar[type] = StackCase

    @property
    def ragged(self) -> bool:
        return len(set(self.case.lens)) > 1


def directions_of(case: StackCase) -> tuple[str, ...]:
    """Nothing is learnt from while generating."""
    return (FORWARD,) if case.op == DECODING else DIRECTIONS


class Stack:
    """A module and its peers: everything inside it is part of what is timed."""

    def __init__(self, problem: StackProblem, device: torch.device) -> None:
        self.problem, case, dtype = problem, problem.case, problem.torch_dtype
        self.op, self._kind = case.op, _KINDS[case.op]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = self._kind.make(case)
            for name, parameter in theirs.named_parameters():
                if name.endswith("bias"):  # zeros would hide that one is lost
                    nn.init.normal_(parameter, std=0.1)
        self._theirs = theirs.to(device=device, dtype=dtype).train(problem.trains)
        self._ours = self._kind.ours(case, self._theirs).train(problem.trains)
        generator = torch.Generator().manual_seed(case.N * 8191 + case.M)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        self._inputs = [make(case.B, case.N, case.width), make(case.B, case.M, case.context_width)]
        for x in self._inputs:
            x.requires_grad_(problem.trains)
        self._dout = make(case.B, case.N, case.width)
        self._lens = self._padding = None
        if case.lens:
            self._lens = torch.tensor(case.lens, device=device)
            self._padding = torch.arange(case.M, device=device) >= self._lens[:, None]
        self._truth: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def run(self, impl: str) -> Run:
        if impl == "mmfast":
            call = functools.partial(self._kind.our_way, self._ours, self._lens)
            return self._call(call, _parameters(self._ours, self._theirs))
        module = _with_weights(self._theirs) if impl == "eager" else self._theirs
        call = functools.partial(self._kind.their_way, module, self._padding)
        call = freshly_compiled(call) if impl == "compile" else call
        return self._call(call, _parameters(module, module))

    def _call(self, function: Callable[..., Tensor], parameters: Sequence[Sequence[Tensor]]) -> Run:
        inputs, dout = self._inputs, self._dout
        wanted = (*inputs, *(p for same in parameters for p in same))

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*inputs),)

        def forward_backward() -> tuple[Tensor, ...]:
            out = function(*inputs)
            return (out, *torch.autograd.grad(out, wanted, dout))

        return forward_backward if self.problem.trains else forward

    def check(self, impl: str, run: Run) -> None:
        """Against torch's module in float64, at most a few times as far off as torch's own."""
        if self._truth is None:
            self._truth = self._exact(), self.run("eager")()
        got = run()
        if impl == "mmfast" and len(got) > 1:
            left, parts = list(got[3:]), _parameters(self._ours, self._theirs)
            grads = [torch.cat([left.pop(0) for _ in same]) for same in parts]
            got = (*got[:3], *grads)
        judge_plainly(f"{impl} on {self.op} {self.problem.case.name}", got, *self._truth)

    def _exact(self) -> tuple[Tensor, ...]:
        twin, trains = copy.copy(self), self.problem.trains
        twin._theirs = copy.deepcopy(self._theirs).double()
        twin._dout = self._dout.double()
        twin._inputs = [x.detach().double().requires_grad_(trains) for x in self._inputs]
        return twin.run("sdpa")()

    def least_s(self) -> None:
        """Not modelled, as for `modules.Module`."""
        return None

    def clone(self) -> None:
        return None


# --- torch's modules ---------------------------------------------------------------------------


class _Block(nn.TransformerDecoderLayer):
    """A pre-norm decoder layer of torch without its self-attention."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.norm1, self.norm2 = self.norm2, self.norm3
        del self.self_attn, self.dropout1, self.norm3

    def forward(self, x: Tensor, context: Tensor, padding: Tensor | None) -> Tensor:
        x = x + self._mha_block(self.norm1(x), context, None, padding)
        return x + self._ff_block(self.norm2(x))


class _WithWeights(nn.MultiheadAttention):
    """What `need_weights=True`, torch's default, does: eager products and a softmax."""

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*inputs, **{**options, "need_weights": True})


def _with_weights(module: nn.Module) -> nn.Module:
    """A copy on the same parameters."""
    twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for part in twin.modules():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = _WithWeights
    return twin


def _make_attention(case: StackCase) -> nn.Module:
    width = case.context_width
    return nn.MultiheadAttention(case.width, case.heads, kdim=width, vdim=width, batch_first=True)


def _sizes(case: StackCase) -> dict[str, Any]:
    return {
        "d_model": case.width, "nhead": case.heads, "dim_feedforward": case.hidden, "dropout": 0.0,
        "batch_first": True, "norm_first": True, "activation": nn.functional.gelu,
    }  # fmt: skip


def _make_block(case: StackCase) -> nn.Module:
    return _Block(**_sizes(case))


def _make_decoder(case: StackCase) -> nn.Module:
    layer = nn.TransformerDecoderLayer(**_sizes(case))
    return nn.TransformerDecoder(layer, case.layers, nn.LayerNorm(case.width))


def _attend(module: nn.Module, padding: Tensor | None, x: Tensor, context: Tensor) -> Tensor:
    return module(x, context, context, key_padding_mask=padding, need_weights=False)[0]


def _block(module: nn.Module, padding: Tensor | None, x: Tensor, context: Tensor) -> Tensor:
    return module(x, context, padding)


def _decode(module: nn.Module, padding: Tensor | None, x: Tensor, context: Tensor) -> Tensor:
    return module(x, context, memory_key_padding_mask=padding)


def _steps(module: nn.Module, padding: Tensor | None, x: Tensor, context: Tensor) -> Tensor:
    """Each step computes those before it and projects the context anew: torch.nn has no cache."""
    new = []
    for n in range(1, x.shape[1] + 1):
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=x.device, dtype=x.dtype)
        out = module(x[:, :n], context, mask, tgt_is_causal=True, memory_key_padding_mask=padding)
        new.append(out[:, -1])
    return torch.stack(new, dim=1)


# --- those of mmfast ---------------------------------------------------------------------------


def _our_attention(case: StackCase, theirs: Any) -> nn.Module:
    if case.ours == DROP_IN:
        return mmfast.nn.MultiheadAttention.from_torch(theirs)
    ours = mmfast.nn.CrossModalAttention(case.width, case.heads, context_dim=case.context_width)
    ours.to(theirs.out_proj.weight)
    with torch.no_grad():
        for mine, theirs_of_it in zip(_parameters(ours, theirs), theirs.parameters()):
            for parameter, value in zip(mine, theirs_of_it.chunk(len(mine))):
                parameter.copy_(value)
    return ours


def _parameters(module: Any, theirs: Any) -> list[tuple[Tensor, ...]]:
    """The module's parameters, each with those that torch's module has in one tensor, in torch's
    order. Only CrossModalAttention has parameters of its own."""
    if not isinstance(module, mmfast.nn.CrossModalAttention):
        return [(parameter,) for parameter in theirs.parameters()]
    projections = (module.q_proj, module.k_proj, module.v_proj)
    weights = tuple(projection.weight for projection in projections)
    packed = theirs.in_proj_weight is not None
    return [
        *([weights] if packed else [(weight,) for weight in weights]),
        tuple(projection.bias for projection in projections),
        *((parameter,) for parameter in module.out_proj.parameters()),
    ]


def _our_block(case: StackCase, theirs: nn.Module) -> nn.Module:
    layer = mmfast.nn.CrossModalEncoderLayer(**_sizes(case), self_attention=False)
    layer.load_state_dict(dict(theirs.named_parameters()), assign=True)  # the very same parameters
    return layer


def _our_stack(case: StackCase, theirs: Any) -> nn.Module:
    return mmfast.nn.CrossModalEncoder.from_torch(theirs)


def _we_attend(module: Any, lens: Tensor | None, x: Tensor, context: Tensor) -> Tensor:
    if isinstance(module, mmfast.nn.CrossModalAttention):
        return module(x, context, context_lens=lens)
    return module(x, context, context, need_weights=False)[0]


def _we_decode(module: Any, lens: Tensor | None, x: Tensor, context: Tensor) -> Tensor:
    return module(x, context, memory_lens=lens)


def _our_steps(module: Any, lens: Tensor | None, x: Tensor, context: Tensor) -> Tensor:
    """The context is projected once for all steps and layers, and each step once."""
    cache = module.prepare_context(context, lens)
    return torch.cat([module.step(new, cache) for new in x.split(1, dim=1)], dim=1)


class _Kind(NamedTuple):
    """What there is to an op: torch's module and ours on its weights, and how each is called, as
    `way(module, padding or lens, x, context)`."""

    make: Callable[[StackCase], nn.Module]
    ours: Callable[[StackCase, Any], nn.Module]
    their_way: Callable[..., Tensor]
    our_way: Callable[..., Tensor]


_KINDS = {
    POOLING: _Kind(_make_attention, _our_attention, _attend, _we_attend),
    QFORMER: _Kind(_make_attention, _our_attention, _attend, _we_attend),
    BLOCK: _Kind(_make_block, _our_block, _block, _we_decode),
    LAYERS: _Kind(_make_decoder, _our_stack, _decode, _we_decode),
    DECODING: _Kind(_make_decoder, _our_stack, _steps, _our_steps),
}
