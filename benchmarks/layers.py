"""The gated layers of `mmfast.nn` and the layers of transformers that they stand for, one set of
weights: GatedMLP beside LlamaMLP, GatedCrossAttentionBlock beside MllamaCrossAttentionDecoderLayer.

`eager` and `sdpa` are transformers' layer with that attention (an MLP has `eager` alone), `compile`
is `torch.compile` of the last of them. Their mask is made before the clock starts.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mmfast.nn

from .impls import Run, freshly_compiled
from .modules import judge_plainly
from .problems import BaseProblem

MLP, BLOCK = "GatedMLP", "GatedCrossAttentionBlock"
PEERS = {MLP: ("eager",), BLOCK: ("eager", "sdpa")}


@dataclass(frozen=True)
class LayerCase:
    """Sizes of one layer. `lens`: of the context, padded to the longest; the block has one."""

    op: str
    name: str
    B: int
    N: int
    width: int
    hidden: int
    heads: int = 0
    kv_heads: int = 0
    lens: tuple[int, ...] = ()


CASES = (
    LayerCase(MLP, "vision", 2, 197, 768, 2048),
    LayerCase(MLP, "short", 4, 16, 256, 688),
    LayerCase(BLOCK, "text", 4, 64, 512, 1408, 8, 2, (400, 320, 200, 70)),
)
"""As wide as one machine's patience allows; mllama itself is eight times as wide."""


@dataclass(frozen=True)
class LayerProblem(BaseProblem):
    """One layer, in a dtype and a direction."""

    case: LayerCase
    case_type: ClassVar[type] = LayerCase

    @property
    def ragged(self) -> bool:
        return len(set(self.case.lens)) > 1


class MissingTransformersError(RuntimeError):
    """transformers is not installed; the message says what to do."""


def transformers_layers(model: str) -> Any:
    """The module `transformers.models.<model>.modeling_<model>`."""
    try:
        return importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError as error:
        raise MissingTransformersError(f"{error}; pip install transformers") from None


class Layer:
    """A gated layer and its peers: everything inside it is part of what is timed."""

    def __init__(self, problem: LayerProblem, device: torch.device) -> None:
        self.problem, self._case = problem, problem.case
        self.op = problem.case.op
        self.peers = PEERS[self.op]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._mmfast = (_mlp if self.op == MLP else _block)(self._case)
        self._mmfast.to(device=device, dtype=problem.torch_dtype)
        self._theirs = (_llama_mlp if self.op == MLP else _mllama_layer)(self._case, self._mmfast)
        g = torch.Generator().manual_seed(7)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(device=device, dtype=problem.torch_dtype)

        B, N, width = self._case.B, self._case.N, self._case.width
        self._inputs = [make(B, N, width)]
        self._lens = self._mask = None
        if lens := self._case.lens:
            self._inputs.append(make(B, max(lens), width))
            self._lens = torch.tensor(lens, device=device)
            hidden = torch.arange(max(lens), device=device) >= self._lens[:, None]
            mask = torch.zeros(B, 1, N, max(lens), dtype=problem.torch_dtype, device=device)
            low = torch.finfo(problem.torch_dtype).min
            self._mask = mask.masked_fill(hidden[:, None, None], low)
        for x in self._inputs:
            x.requires_grad_(problem.trains)
        self._dout = make(B, N, width)
        self._truth: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def run(self, impl: str) -> Run:
        if impl == "mmfast":
            return self._call(self._our_way)
        attention = self.peers[-1] if impl == "compile" else impl
        theirs = self._their_way(attention)
        return self._call(freshly_compiled(theirs) if impl == "compile" else theirs)

    def _our_way(self, x: Tensor, *context: Tensor) -> Tensor:
        options = {} if self._lens is None else {"context_lens": self._lens}
        return self._mmfast(x, *context, **options)

    def _their_way(self, attention: str) -> Callable[..., Tensor]:
        layer, mask = self._theirs, self._mask
        if self.op == MLP:
            return layer
        layer = copy.copy(layer)  # the weights stay shared
        layer._modules = {**layer._modules, "cross_attn": copy.copy(layer.cross_attn)}
        layer.cross_attn.config = copy.copy(layer.cross_attn.config)
        layer.cross_attn.config._attn_implementation = attention

        def call(x: Tensor, context: Tensor) -> Tensor:
            return layer(
                x,
                cross_attention_states=context,
                cross_attention_mask=mask,
                attention_mask=None,
                full_text_row_masked_out_mask=None,
            )

        return call

    def _call(self, function: Callable[..., Tensor]) -> Run:
        inputs, dout = self._inputs, self._dout
        wanted = (*inputs, *self._mmfast.parameters())

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*inputs),)

        def forward_backward() -> tuple[Tensor, ...]:
            out = function(*inputs)
            return (out, *torch.autograd.grad(out, wanted, dout))

        return forward_backward if self.problem.trains else forward

    def check(self, impl: str, run: Run) -> None:
        """Against transformers' layer in float64, at most a few times as far off as that one."""
        if self._truth is None:
            exact = Layer(dataclasses.replace(self.problem, dtype="float64"), self._dout.device)
            self._truth = exact._with_values_of(self).run("eager")(), self.run("eager")()
        who = f"{impl} on {self.op} {self._case.name}"
        # What one number stands for, a gate, has a gradient that sums as many terms as there are
        # outputs: that they cancel makes their rounding no smaller.
        judge_plainly(who, run(), *self._truth, scalars=float(self._dout.float().norm()))

    def _with_values_of(self, other: Layer) -> Layer:
        trains = self.problem.trains
        with torch.no_grad():
            for mine, theirs in zip(self._mmfast.parameters(), other._mmfast.parameters()):
                mine.copy_(theirs)
        self._inputs = [x.detach().double().requires_grad_(trains) for x in other._inputs]
        self._dout = other._dout.double()
        return self

    def least_s(self) -> None:
        """Not modelled, as for `modules.Module`."""
        return None

    def clone(self) -> None:
        return None


def _mlp(case: LayerCase) -> nn.Module:
    return mmfast.nn.GatedMLP(case.width, case.hidden, bias=False)


def _llama_mlp(case: LayerCase, mine: nn.Module) -> nn.Module:
    llama = transformers_layers("llama")
    config = llama.LlamaConfig(
        hidden_size=case.width, intermediate_size=case.hidden, num_attention_heads=1
    )
    return _with_weights(llama.LlamaMLP(config), dict(mine.named_parameters()))


def _block(case: LayerCase) -> nn.Module:
    return mmfast.nn.GatedCrossAttentionBlock(
        case.width,
        case.heads,
        num_kv_heads=case.kv_heads,
        qk_norm="rms",
        hidden_features=case.hidden,
        gate_init=0.5,
    )


_MLLAMA = {
    "attn_norm.weight": "input_layernorm.weight",
    "ff_norm.weight": "post_attention_layernorm.weight",
    "attention.out_proj.weight": "cross_attn.o_proj.weight",
    "attn_gate": "cross_attn_attn_gate",
    "ff_gate": "cross_attn_mlp_gate",
}


def _mllama_layer(case: LayerCase, mine: nn.Module) -> nn.Module:
    models = transformers_layers("mllama")
    config = models.MllamaTextConfig(
        hidden_size=case.width,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.hidden,
        rms_norm_eps=1e-5,
        dropout=0.0,
    )
    layer = models.MllamaCrossAttentionDecoderLayer(config, layer_idx=0)
    weights = {}
    for name, weight in mine.named_parameters():
        usual = name.replace("attention.", "cross_attn.").replace("feed_forward", "mlp")
        weights[_MLLAMA.get(name, usual)] = weight
    return _with_weights(layer, weights)


def _with_weights(layer: nn.Module, weights: dict[str, Any]) -> nn.Module:
    layer.load_state_dict(weights, assign=True)  # the very same parameters
    return layer
