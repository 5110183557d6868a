"""A process of its own for test_hub_layers.py: `kernelize` one module of each kind with the layers
of the repository in argv[1], offline, and print what came out as JSON.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.lxmert.modeling_lxmert import LxmertAttention, LxmertConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5_OmniAdaLayerNormZero,
    Qwen2_5_OmniAdaLayerNormZero_Final,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

import mmfast
from kernels import (
    LocalLayerRepository,
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)

LLAMA = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=1)
LXMERT = LxmertConfig(hidden_size=24, num_attention_heads=3)
LENS = torch.tensor([7, 3])


class ActAndMul(nn.Module):
    """What vLLM and `kernels-community` call SiluAndMul and the like, in torch."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return self.act(a) * b


def kinds(*names: str) -> dict[str, type[nn.Module]]:
    """A class for each, as a layer is found by the class of the module."""
    return {name: type(name, (ActAndMul,), {}) for name in names}


ACTS = kinds("SiluAndMul", "GeluAndMul", "GeluTanhAndMul")


def _lxmert_mask(like: Tensor) -> Tensor:
    hidden = torch.arange(7) >= LENS[:, None]
    return torch.zeros(2, 1, 1, 7, dtype=like.dtype).masked_fill(
        hidden[:, None, None], torch.finfo(like.dtype).min
    )


def rows(*shape: int) -> Tensor:
    return torch.randn(shape)


def cases() -> dict[str, tuple[nn.Module, list[Tensor], Callable[..., Any]]]:
    """By layer: the module, its differentiable inputs, and how it is called on them."""
    padding = torch.arange(7) >= LENS[:, None]

    def plainly(module: nn.Module, *inputs: Tensor) -> Any:
        return module(*inputs)

    def lxmert(module: nn.Module, x: Tensor, context: Tensor) -> Any:
        return module(x, context, _lxmert_mask(x))

    def mha(module: nn.Module, x: Tensor, context: Tensor) -> Any:
        return module(x, context, context, key_padding_mask=padding)

    x, context = rows(2, 5, 24), rows(2, 7, 24)
    return {
        "SiluAndMul": (ACTS["SiluAndMul"](nn.SiLU()), [rows(2, 5, 48)], plainly),
        "GeluAndMul": (ACTS["GeluAndMul"](nn.GELU()), [rows(2, 5, 48)], plainly),
        "GeluTanhAndMul": (ACTS["GeluTanhAndMul"](nn.GELU("tanh")), [rows(2, 5, 48)], plainly),
        "GatedMLP": (LlamaMLP(LLAMA), [x], plainly),
        "RMSNorm": (LlamaRMSNorm(24), [x], plainly),
        "RMSNormZeroCentered": (Qwen3NextRMSNorm(24), [x], plainly),
        "AdaLayerNormZero": (Qwen2_5_OmniAdaLayerNormZero(24), [x, rows(2, 24)], plainly),
        "AdaLayerNormZeroFinal": (
            Qwen2_5_OmniAdaLayerNormZero_Final(24), [x, rows(2, 24)], plainly,
        ),
        "LxmertAttention": (LxmertAttention(LXMERT), [x, context], lxmert),
        "MultiheadAttention": (nn.MultiheadAttention(24, 3, batch_first=True), [x, context], mha),
    }  # fmt: skip


def tensors(result: Any) -> list[Tensor]:
    return [t for t in result if t is not None] if isinstance(result, tuple) else [result]


def results(module: nn.Module, inputs: list[Tensor], call: Callable[..., Any]) -> list[Tensor]:
    """Outputs, and gradients of inputs and parameters."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = tensors(call(module, *inputs))
    generator = torch.Generator().manual_seed(1)
    total = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs)
    wanted = [*inputs, *module.parameters()]
    return [*outs, *torch.autograd.grad(total, wanted)]


def error(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest, of what is not 0 but for rounding (the gradient of a bias of keys)."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(got, truth, strict=True)]
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in pairs if float(b.abs().max()) > 1e-9
    )


class Counted:
    """How often the ops of mmfast, or its attention module, are called."""

    PLACES = (
        *((mmfast, name) for name in ("glu", "glu_packed", "modulate", "cross_attention")),
        (mmfast.nn.MultiheadAttention, "forward"),
    )

    def __enter__(self) -> Counted:
        self.calls = 0
        self._kept = [getattr(owner, name) for owner, name in self.PLACES]
        for (owner, name), op in zip(self.PLACES, self._kept):
            setattr(owner, name, self._counting(op))
        return self

    def _counting(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return op(*args, **options)

        return counted

    def __exit__(self, *_: object) -> None:
        for (owner, name), op in zip(self.PLACES, self._kept):
            setattr(owner, name, op)


def main(repository: Path) -> dict[str, Any]:
    """What `kernelize` made of each module; the mode that asks for most comes first."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for name, (module, inputs, call) in cases().items():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=1.6 / parameter.shape[-1] ** 0.5)
        module.eval()
        exact = copy.deepcopy(module).double()
        truth = results(exact, [x.double() for x in inputs], call)
        before = results(module, inputs, call)
        replace_kernel_forward_from_hub(type(module), name)
        layer = LocalLayerRepository(repo_path=repository, layer_name=name)
        keys = set(module.state_dict())
        with use_kernel_mapping({name: {"cpu": layer, "cuda": layer}}):
            kernelize(module, mode=Mode.TRAINING, device="cpu", use_fallback=False)
            with Counted() as counted:
                after = results(module, inputs, call)
            compiles = True
            try:
                mode = Mode.TRAINING | Mode.TORCH_COMPILE
                kernelize(module, mode=mode, device="cpu", use_fallback=False)
            except ValueError:
                compiles = False
            graph = None
            if compiles and name in ("GatedMLP", "LxmertAttention"):
                compiled = torch.compile(module, backend="eager", fullgraph=True)
                graph = error(results(compiled, inputs, call), truth)
        told[name] = {
            "error": error(after, truth),
            "stock": error(before, truth),
            "calls": counted.calls,
            "layer": module.forward.__func__.__module__,
            "same_keys": set(module.state_dict()) == keys,
            "compiles": compiles,
            "graph": graph,
        }
    attention, (x, context), _ = cases()["LxmertAttention"]
    layer = LocalLayerRepository(repo_path=repository, layer_name="LxmertAttention")
    with use_kernel_mapping({"LxmertAttention": {"cpu": layer}}):
        kernelize(attention, mode=Mode.INFERENCE, device="cpu")
    told["weights"] = list(attention(x, context, _lxmert_mask(x), output_attentions=True)[1].shape)
    return told


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
