"""Norms, gated MLPs, aligners and chunks of decoders: each registered class against its stock one.

The models as wholes are in test_architectures.py.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations.registry import rows
from mmfast.testing.architectures import _harness, all_architectures

pytest.importorskip("transformers", reason="transformers is not installed")

_ADAPTERS = "mmfast.integrations.adapters."


def _stock(module: str) -> list[str]:
    """Addresses of the classes whose adapter is in a file."""
    return [w for w, row in rows().items() if row.mixin.__module__ == _ADAPTERS + module]


def _cls(where: str) -> Any:
    module, _, name = where.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _strong(module: nn.Module) -> nn.Module:
    _harness.strong_weights(module)
    return module


def _agree(module: nn.Module, *args: Any, dtype: torch.dtype = torch.float32) -> None:
    """Output and gradients, patched, are as near the float64 ones as the stock ones are.

    Up to two roundings: some norms are in float32 whatever they are given, also as the truth.
    """

    def results(of: nn.Module, to: torch.dtype) -> dict[str, Tensor]:
        of = of.to(to)
        given = [x.to(to).requires_grad_() if x.is_floating_point() else x for x in args]
        out = of(*given)
        out.float().square().mean().backward()
        grads = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
        return {"out": out.detach(), "dx": given[0].grad, **grads}

    exact, peer = results(copy.deepcopy(module), torch.float64), copy.deepcopy(module)
    ours = copy.deepcopy(module)
    assert len(mmfast.patch(ours).swapped) == 1
    expected, got = results(peer, dtype), results(ours, dtype)
    assert set(got) == set(expected)
    for name, value in got.items():
        right = exact[name]
        error, stock = ((x.double() - right).abs().max() for x in (value, expected[name]))
        floor = 2 * torch.finfo(dtype).eps * float(right.abs().max())
        assert value.dtype == expected[name].dtype
        assert float(error) <= 3 * float(stock) + floor, (name, float(error), float(stock))


_FEW = ("llama", "llama4", "idefics", "gemma3", "phi3", "qwen2_5_omni")
"""Folders with one of each form; importing the files of all takes most of the time."""


def _few_or_all(module: str) -> Any:
    places = _stock(module)
    few = [where for where in places if where.split(".")[2] in _FEW]
    assert len(few) < 10 and len(places) > 35
    rest = [where for where in places if where not in few]
    marked = pytest.param(rest, marks=pytest.mark.slow, id="others")
    return pytest.mark.parametrize("places", [pytest.param(few, id="few"), marked])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@_few_or_all("rms_norm")
def test_norms(places: list[str], dtype: torch.dtype) -> None:
    """Every RMSNorm class."""
    for where in places:
        torch.manual_seed(0)
        _agree(_strong(_cls(where)(48)), torch.randn(2, 5, 3, 48), dtype=dtype)


def _mlp(where: str, act: nn.Module) -> nn.Module:
    """A stock MLP with projections of 16 to 40 and back."""
    cls = _cls(where)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    if "gate_up_proj" in cls.forward.__code__.co_names:
        module.gate_up_proj = nn.Linear(16, 80, bias=False)
    else:
        module.gate_proj, module.up_proj = nn.Linear(16, 40), nn.Linear(16, 40)
    module.down_proj = nn.Linear(40, 16, bias=False)
    module.act_fn = module.activation_fn = act
    return _strong(module)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "sigmoid"])
@_few_or_all("glu_mlp")
def test_gated_mlps(places: list[str], act: str) -> None:
    """Every gated MLP with every activation."""
    from transformers.activations import ACT2FN

    for where in places:
        torch.manual_seed(0)
        _agree(_mlp(where, ACT2FN[act]), torch.randn(2, 5, 16))


def test_an_activation_that_is_not_ours_or_that_somebody_watches() -> None:
    """The stock forward runs: an unknown activation, and a hook that sees it."""
    seen: list[int] = []
    for act in (nn.Mish(), nn.SiLU()):
        module = _mlp("transformers.models.llama.modeling_llama.LlamaMLP", act)
        x = torch.randn(2, 16)
        expected = module(x)
        mmfast.patch(module)
        act.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(module(x), expected)
    assert len(seen) == 2


def _aligner() -> nn.Module:
    from transformers import EvollaConfig
    from transformers.models.evolla.modeling_evolla import EvollaSequenceAlignerCrossAttention

    config = EvollaConfig(hidden_size=32, num_attention_heads=4, aligner_ffn_mult=2)
    aligner = EvollaSequenceAlignerCrossAttention(config, 24, None, 20)
    return _strong(aligner).eval()


@pytest.mark.parametrize("lost", [(), (0,), (0, 1)])
def test_an_aligner_with_sources_that_items_lack(lost: tuple[int, ...]) -> None:
    """Two of Evolla's three sources; an item without any gets the mean of all values, as there."""
    torch.manual_seed(0)
    aligner = _aligner()
    text, protein, msa = torch.randn(2, 6, 32), torch.randn(2, 5, 24), torch.randn(2, 3, 20)
    has = torch.ones(2, dtype=torch.bool)
    has[list(lost)] = False
    given: dict[str, Any] = {
        "protein_batch_mask": has, "msa_batch_mask": has, "query_attn_mask": torch.ones(2, 6),
    }  # fmt: skip
    expected = aligner(text, protein, None, msa, **given)
    mmfast.patch(aligner)
    got = aligner(text, protein, None, msa, **given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _logits(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_omni_dit", "mllama", "idefics", "evolla"])
def test_another_attention_after_the_patch(name: str) -> None:
    """A model that is told to use another implementation afterwards is still right."""
    case = all_architectures()[name]
    model, inputs = _harness.tiny(case)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    expected = case.outputs(_logits(model, inputs), inputs)
    mmfast.patch(model)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    with _harness.counted():
        got = case.outputs(_logits(model, inputs), inputs)
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=2e-4, atol=2e-4)


def test_router_logits_keep_their_shape() -> None:
    """Recorded router logits have a row for each row of the padded batch, tokens and padding."""
    case = all_architectures()["qwen3_next"]
    model, inputs = _harness.tiny(case)
    expected = _logits(model, inputs, output_router_logits=True).router_logits
    mmfast.patch(model)
    with _harness.counted() as calls:
        got = _logits(model, inputs, output_router_logits=True).router_logits
    assert calls.packed == 0 and len(got) == len(expected) > 0
    token = inputs["attention_mask"].flatten().bool()
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a[token], b[token], rtol=1e-4, atol=1e-4)


def _one_layer(name: str, part: Callable[[nn.Module], bool]) -> nn.Module:
    model, _ = _harness.tiny(all_architectures()[name])
    return next(m for m in model.modules() if part(m))


def test_windows_and_images_are_one_call_each_layer() -> None:
    """Chunks of several lengths in one call are each chunk by itself."""
    torch.manual_seed(0)
    layer = _one_layer("qwen2_vl", lambda m: type(m).__name__ == "VisionAttention")
    rows_, starts = torch.randn(37, 32), torch.tensor([0, 5, 6, 30, 37])
    angle = torch.randn(37, 16)
    given = {"cu_seqlens": starts, "position_embeddings": (angle.cos(), angle.sin())}
    expected = layer(rows_, **given)
    model = nn.ModuleList([layer])
    mmfast.patch(model)
    layer.config._attn_implementation = "mmfast"  # type: ignore[union-attr]
    with _harness.counted() as calls:
        got = layer(rows_, **given)
    assert calls.attention == 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_diffusion_layer_without_shared_blocks() -> None:
    """Blocks that differ between items are taken from the mask as it is."""
    torch.manual_seed(0)
    layer = _one_layer("qwen2_5_omni_dit", lambda m: type(m).__name__ == "DiTDecoderLayer")
    x, t, angle = torch.randn(2, 12, 64), torch.randn(2, 64), torch.randn(2, 12, 16)
    block = torch.arange(12) // torch.tensor([[3], [4]])
    difference = (block[:, None, :] - block[:, :, None])[:, None].expand(2, 4, 12, 12)
    given = {"position_embeddings": (angle.cos(), angle.sin()), "block_diff": difference}
    expected = layer(x, t, **given)
    mmfast.patch(layer)
    torch.testing.assert_close(layer(x, t, **given), expected, rtol=1e-4, atol=1e-4)
