"""PEFT, accelerate and quantisation, on modules of `mmfast.nn` and on patched models.

What stands behind a Linear (an adapter, an int8 weight, a weight that is elsewhere until it is
called) must have its effect: results are held against the same weights merged or dequantised.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem_helpers import MODULES, TEXT_PAD, Case, close, made, stock_model
from nn_helpers import loud
from torch import Tensor, nn

import mmfast
from mmfast.testing.architectures import _harness

peft = pytest.importorskip("peft", reason="peft is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

# Fixtures count as used where they are named.
__all__ = ["stock_model"]

CPU = torch.device("cpu")


@pytest.fixture(params=MODULES)
def module_case(request: pytest.FixtureRequest) -> Case:
    return MODULES[request.param]


def far(got: Tensor, other: Tensor) -> bool:
    return float((got - other).abs().max()) > 0.05 * float(other.abs().max())


def linears(model: nn.Module) -> list[str]:
    """Linears, and attentions of torch.nn: their out_proj goes with them."""
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    return names + [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]


def with_lora(model: nn.Module, targets: list[str] | None = None, **options: Any) -> Any:
    if targets is None:
        targets = linears(model)
    config = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, lora_dropout=0.0, **options
    )
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def lora_gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor | None]:
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    grads = torch.autograd.grad(out.square().sum(), list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


# --- PEFT ----------------------------------------------------------------------------------------


def test_lora_on_modules(module_case: Case) -> None:
    """As with the adapters merged; every adapter learns; without them the module as it was."""
    module, call = made(module_case), module_case.call
    base = call(module).detach()
    adapted = with_lora(copy.deepcopy(module))
    inner = adapted.get_base_model()
    out = call(inner)
    assert far(out, base)
    for name, gradient in lora_gradients(adapted, out).items():
        silent = any(f"{part}." in name for part in module_case.silent)
        assert silent or (gradient is not None and bool(gradient.any())), name
    with adapted.disable_adapter():
        close(call(inner), base)
    close(call(adapted.merge_and_unload()), out)


def test_lora_on_separate_weights_of_an_attention() -> None:
    """PEFT reaches q, k and v of other widths as parameters only."""
    layer = mmfast.nn.CrossModalEncoderLayer(32, 4, 48, 0.0, context_dim=24)
    encoder = loud(mmfast.nn.CrossModalEncoder(layer, 2)).eval()
    text, image, lens = torch.randn(2, 5, 32), torch.randn(2, 9, 24), torch.tensor([9, 4])
    names = [n for n, _ in encoder.named_parameters() if n.endswith("proj_weight")]
    base = encoder(text, image, memory_lens=lens).detach()
    adapted = with_lora(encoder, [], target_parameters=names)
    out = adapted.get_base_model()(text, image, memory_lens=lens)
    assert far(out, base)
    assert all(g is not None and g.any() for g in lora_gradients(adapted, out).values())
    close(adapted.merge_and_unload()(text, image, memory_lens=lens), out)


def test_lora_on_an_output_projection_alone() -> None:
    """torch.nn reads the weight of `out_proj`, so that LoRA there has no effect; here it has."""
    attention = loud(mmfast.nn.MultiheadAttention(32, 4, batch_first=True))
    x = torch.randn(2, 5, 32)
    base = attention(x, x, x)[0].detach()
    adapted = with_lora(attention, ["out_proj"])
    out = adapted(x, x, x)[0]
    assert far(out, base)
    close(adapted.merge_and_unload()(x, x, x)[0], out)


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """In eval mode with frozen weights PyTorch's fast path goes past the adapters of PEFT."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora_on_a_patched_torch_model(first: str) -> None:
    """The results and gradients that PEFT gives PyTorch's own layers, padding left out."""
    torch.manual_seed(0)
    stock = loud(nn.Transformer(32, 4, 1, 1, 48, 0.0, batch_first=True)).eval()
    source, target = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    pad = torch.arange(7) >= torch.tensor([[7], [4]])

    def call(model: Any) -> Tensor:
        return model(source, target, src_key_padding_mask=pad, memory_key_padding_mask=pad)

    theirs = with_lora(copy.deepcopy(stock))
    expected = call(theirs)
    ours, report = copy.deepcopy(stock), None
    if first == "patch":
        report = mmfast.patch(ours)
    ours = with_lora(ours)
    if report is None:
        report = mmfast.patch(ours)
    assert {row.cls for row in report.swapped} >= {"MultiheadAttention", "TransformerEncoderLayer"}
    with _harness.counted() as calls:
        out = call(ours)
    assert calls.attention == 3
    close(out, expected)
    wanted = lora_gradients(theirs, expected)
    for name, gradient in lora_gradients(ours, out).items():
        close(gradient, wanted[name], 1e-4)
    report.undo()
    assert torch.equal(call(ours), expected)


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora_on_a_patched_model(model: tuple[nn.Module, Any], first: str, tmp_path: Path) -> None:
    """In either order, with the same gradients; the saved adapter fits the stock model."""
    stock, call = model
    theirs = with_lora(copy.deepcopy(stock))
    expected = call(theirs)
    ours, report = copy.deepcopy(stock), None
    if first == "patch":
        report = mmfast.patch(ours)
    ours = with_lora(ours)
    if report is None:
        report = mmfast.patch(ours)
    with _harness.counted() as calls:
        out = call(ours)
    assert calls.attention > 0 and calls.packed > 0
    close(out, expected)
    wanted = {k: v for k, v in lora_gradients(theirs, expected).items() if v is not None}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in lora_gradients(ours, out).items():
        if name in wanted:
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5 * largest)
        else:
            assert gradient is None, name
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path).eval()
    close(call(loaded), expected)
    report.undo()
    assert torch.equal(call(ours), expected)


# --- accelerate ----------------------------------------------------------------------------------


@torch.no_grad()
def test_modules_whose_weights_are_elsewhere(module_case: Case) -> None:
    """Weights that are only there while their module is called."""
    module, call = made(module_case), module_case.call
    expected = call(module)
    moved = accelerate.cpu_offload(copy.deepcopy(module), execution_device=CPU)
    assert all(parameter.is_meta for parameter in moved.parameters())
    close(call(moved), expected)


@pytest.mark.parametrize("first", ["patch", "offload"])
@torch.no_grad()
def test_a_patched_model_whose_weights_are_elsewhere(
    model: tuple[nn.Module, Any], first: str
) -> None:
    """Hooks of accelerate before or after the patch; also undone, and with the hooks gone."""
    stock, call = model
    expected = call(stock)
    ours, report = copy.deepcopy(stock), None
    if first == "patch":
        report = mmfast.patch(ours)
    ours = accelerate.cpu_offload(ours, execution_device=CPU)
    if report is None:
        report = mmfast.patch(ours)
    with _harness.counted() as calls:
        close(call(ours), expected)
    assert calls.attention > 0
    accelerate.hooks.remove_hook_from_submodules(ours)
    with _harness.counted() as calls:
        close(call(ours), expected)
    assert calls.attention > 0
    report.undo()
    with _harness.counted() as calls:
        assert torch.equal(call(ours), expected)
    assert calls.attention == 0


@pytest.mark.parametrize("first", ["patch", "offload"])
@torch.no_grad()
def test_a_patched_torch_model_whose_weights_are_elsewhere(first: str) -> None:
    """Attentions of torch have weights of their own, so that accelerate replaces their forward.

    (Torch's own layers fail here: they read the weights of an output projection never called.)
    """
    case = MODULES["TransformerDecoder"]
    layer = nn.TransformerDecoderLayer(32, 4, 48, 0.0, batch_first=True)
    model = loud(nn.TransformerDecoder(layer, 2)).eval()
    expected, report = case.call(copy.deepcopy(model)), None
    before = [type(module) for module in model.modules()]
    if first == "patch":
        report = mmfast.patch(model)
    accelerate.cpu_offload(model, execution_device=CPU)
    if report is None:
        report = mmfast.patch(model)
    assert len(report.swapped) == 7
    assert not report.left
    for _ in range(2):
        with _harness.counted() as calls:
            out = case.call(model)
        assert calls.attention == 4
        close(out[~TEXT_PAD], expected[~TEXT_PAD])
        accelerate.hooks.remove_hook_from_submodules(model)
    report.undo()
    assert [type(module) for module in model.modules()] == before
    with _harness.counted() as calls:
        assert torch.equal(case.call(model), expected)
    assert calls.attention == 0


def test_accelerate_trains_a_patched_model(model: tuple[nn.Module, Any]) -> None:
    """Two steps of `prepare`d SGD: the loss of the stock model."""
    stock, call = model

    def train(model: nn.Module) -> list[float]:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for _ in range(3):
            loss = call(model).square().mean()
            losses.append(float(loss))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    patched = copy.deepcopy(stock)
    mmfast.patch(patched)
    expected = train(copy.deepcopy(stock))
    assert expected[2] < 0.99 * expected[0]
    assert train(patched) == pytest.approx(expected, rel=1e-4)


# --- quantisation --------------------------------------------------------------------------------


def int8_weights(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def dequantised(model: nn.Module, quantised: nn.Module) -> nn.Module:
    """`model` with the weights that a quantised copy of it stands for."""
    for ours, theirs in zip(model.modules(), quantised.modules(), strict=True):
        if type(theirs) is nn.Linear:
            ours.weight.data = theirs.weight.dequantize()  # type: ignore[union-attr,operator]
    return model


def dynamically_quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in every PyTorch that is supported
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def test_modules_with_int8_weights(module_case: Case) -> None:
    module, call = made(module_case), module_case.call
    quantised = int8_weights(copy.deepcopy(module))
    expected = call(dequantised(copy.deepcopy(module), quantised))
    close(call(quantised), expected)
    assert relative(expected, call(module)) > 1e-4


@torch.no_grad()
def test_modules_with_dynamically_quantised_linears(module_case: Case) -> None:
    module, call = made(module_case), module_case.call
    assert 1e-4 < relative(call(dynamically_quantised(module)), call(module)) < 0.1


@pytest.mark.parametrize("first", ["patch", "int8"])
@torch.no_grad()
def test_a_patched_model_with_int8_weights(model: tuple[nn.Module, Any], first: str) -> None:
    stock, call = model
    theirs = int8_weights(copy.deepcopy(stock))
    expected, ours = call(theirs), copy.deepcopy(stock)
    if first == "patch":
        mmfast.patch(ours)
    int8_weights(ours)
    if first != "patch":
        mmfast.patch(ours)
    with _harness.counted() as calls:
        close(call(ours), expected)
    assert calls.attention > 0
    assert relative(expected, call(stock)) > 1e-4


@torch.no_grad()
def test_a_patched_model_with_dynamically_quantised_linears(model: tuple[nn.Module, Any]) -> None:
    """No further from the unquantised model: activations have other ranges without padding."""
    stock, call = model
    expected = call(stock)
    theirs = dynamically_quantised(copy.deepcopy(stock))
    mmfast.patch(ours := dynamically_quantised(copy.deepcopy(stock)))
    with _harness.counted() as calls:
        error = relative(call(ours), expected)
    assert calls.attention > 0
    assert 1e-4 < error < 1.5 * relative(call(theirs), expected)


@torch.no_grad()
def test_a_patched_torch_encoder_with_dynamically_quantised_linears() -> None:
    """In inference PyTorch's own layer fails here: its fast path reads the weights."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    encoder = loud(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    x, pad = torch.randn(2, 5, 32), torch.arange(5) >= torch.tensor([[5], [3]])
    expected = encoder(x, src_key_padding_mask=pad)[~pad]
    quantised = dynamically_quantised(encoder)
    mmfast.patch(quantised)
    out = quantised(x, src_key_padding_mask=pad)
    assert 1e-4 < relative(out[~pad], expected) < 0.1
