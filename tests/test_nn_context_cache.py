"""`ContextCache`: a context projected once for all layers, and decoding step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack_helpers import (
    FF,
    INF,
    B,
    C,
    H,
    M,
    N,
    as_float,
    causal,
    forced_packing,  # noqa: F401
    holes,
    padding,
    quiet_norms,
    run,
    same,
    seeded,  # noqa: F401
)
from torch import Tensor

import mmfast.nn.context_cache as implementation
from mmfast.nn import (
    ContextCache,
    CrossModalEncoder,
    CrossModalEncoderLayer,
    PackedTokens,
    TransformerDecoder,
    TransformerDecoderLayer,
)

WIDE = 20
LENS = torch.tensor([4, 0, 7])


def stack(layers: int = 3, **options: Any) -> CrossModalEncoder:
    options = {"dropout": 0.0, "context_dim": WIDE, **options}
    made = [CrossModalEncoderLayer(C, H, FF, **options) for _ in range(layers)]
    return quiet_norms(CrossModalEncoder(made, norm=torch.nn.LayerNorm(C)))


def drop_in() -> TransformerDecoder:
    layer = TransformerDecoderLayer(C, H, FF, 0.0, batch_first=True, norm_first=True)
    return quiet_norms(TransformerDecoder(layer, 2, torch.nn.LayerNorm(C)))


def streams(wide: int = WIDE) -> list[Tensor]:
    return [torch.randn(B, N, C), torch.randn(B, M, wide)]


CONTEXTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # arguments of prepare_context, and of forward
    "dense": ({}, {}),
    "lens": ({"memory_lens": LENS}, {"memory_lens": LENS}),
    "mask": (
        {"memory_key_padding_mask": as_float(padding(LENS, M))},
        {"memory_key_padding_mask": padding(LENS, M)},
    ),
    "holes": ({"memory_key_padding_mask": holes(M)}, {"memory_key_padding_mask": holes(M)}),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("train", [False, True])
def test_caching_is_recomputing(context: str, train: bool, packing: str) -> None:
    """Results, and gradients of the context and of each layer's own weights."""
    prepare, forward = CONTEXTS[context]
    module, inputs = stack(gate="scalar").train(train), streams()

    def cached(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        cache = module.prepare_context(memory, **prepare)
        assert len(cache.contexts) == 3 and cache.batch == B
        return module(x, cache) + module(2 * x, cache)

    def direct(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        return module(x, memory, **forward) + module(2 * x, memory, **forward)

    same(run(module, direct, inputs), run(module, cached, inputs))


def test_ragged_contexts_and_masks(packing: str) -> None:
    module, (x, memory) = stack(), streams()
    mask = torch.randn(N, M) > 0.5
    expected = module(x, memory, memory_mask=mask, memory_lens=LENS)
    cache = module.prepare_context(memory, LENS)
    torch.testing.assert_close(module(x, cache, memory_mask=mask), expected)
    packed = PackedTokens.from_padded(memory, lens=LENS)
    expected = module(x, memory, memory_lens=LENS)
    for form in (packed, packed.to_nested()):
        torch.testing.assert_close(module(x, module.prepare_context(form)), expected)
    cache = module.prepare_context(memory, memory_key_padding_mask=holes(M))
    with pytest.raises(ValueError, match="has forgotten the positions; pass the memory itself"):
        module(x, cache, memory_mask=mask)


@pytest.mark.parametrize("form", ["dense", "lens", "packed"])
@pytest.mark.parametrize("wide", [C, WIDE])
def test_one_product_for_all_layers(form: str, wide: int) -> None:
    """What accelerators do: keys and values of all layers are views of one result."""
    module, inputs = stack(context_dim=wide), streams(wide)
    attentions = [layer.multihead_attn for layer in module.layers]

    def context_of(memory: Tensor) -> tuple[Any, Any]:
        if form == "packed":
            return PackedTokens.from_padded(memory, lens=LENS), None
        return memory, LENS if form == "lens" else None

    def jointly(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        contexts = implementation.project_jointly(
            [layer.multihead_attn for layer in module.layers], *context_of(memory)
        )
        bases = {context.k.untyped_storage().data_ptr() for context in contexts}
        bases |= {context.v.untyped_storage().data_ptr() for context in contexts}
        assert len(bases) == 1
        return module(x, ContextCache(contexts))

    def one_by_one(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        context, lens = context_of(memory)
        contexts = [layer.multihead_attn.prepare_context(context, lens) for layer in module.layers]
        return module(x, ContextCache(contexts))

    assert len(attentions) == 3
    same(run(module, one_by_one, inputs), run(module, jointly, inputs))


def test_within_a_call_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    """The way that `forward` takes there, on a CPU."""
    module, inputs = stack(), streams()
    calls: list[int] = []

    def jointly(layers: Any, *args: Any) -> ContextCache:
        calls.append(len(layers))
        attentions = [layer.multihead_attn for layer in layers]
        return ContextCache(implementation.project_jointly(attentions, *args))

    for options in (
        {},
        {"memory_lens": LENS},
        {"memory_key_padding_mask": holes(M)},
        {"memory_mask": torch.randn(N, M)},
    ):

        def call(module: Any, *leaves: Tensor, options: Any = options) -> Tensor:
            return module(*leaves, **options)

        expected = run(module, call, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(implementation, "_hoists", lambda *args: True)
            patch.setattr(implementation, "project_for_all", jointly)
            same(expected, run(module, call, inputs))
    assert calls == [3] * 4


@pytest.mark.parametrize("make", [stack, drop_in])
def test_steps_are_the_rows_of_a_causal_call(make: Any, packing: str) -> None:
    module = make().eval()
    x, memory = streams(C if make is drop_in else WIDE)
    x = torch.randn(B, 40, C)
    with torch.no_grad():
        cache = module.prepare_context(memory, LENS)
        expected = module(x, cache, tgt_mask=causal(40))
        parts = [module.step(x[:, :7], cache)]  # a prompt
        parts += [module.step(x[:, i : i + 1], cache) for i in range(7, 38)]  # the buffer grows
        parts.append(module.step(x[:, 38:], cache))
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)
    cache.reset()
    assert cache.length == 0
    torch.testing.assert_close(module.step(x[:, :7], cache), parts[0])
    assert not module.step(x[:, 7:8], cache).requires_grad


@pytest.mark.slow
def test_compile_takes_caches_and_packed_tokens() -> None:
    module, (x, memory) = stack(1), streams()
    cache = module.prepare_context(memory, LENS)
    compiled = torch.compile(lambda m, *args: m(*args), fullgraph=True, backend="aot_eager")
    packed = PackedTokens.from_padded(x, lens=torch.tensor([5, 2, 0]))
    torch.testing.assert_close(compiled(module, x, cache), module(x, cache))
    context = PackedTokens.from_padded(memory, lens=LENS)
    for given in (context, cache):
        got, expected = compiled(module, packed, given), module(packed, given)
        torch.testing.assert_close(got.values, expected.values)


def test_prompts_that_see_all_of_themselves() -> None:
    module = stack().eval()
    x, memory = streams()
    cache = module.prepare_context(memory)
    torch.testing.assert_close(module.step(x, cache, tgt_is_causal=False), module(x, memory))


def test_beams_are_reordered(packing: str) -> None:
    module = stack().eval()
    x, memory = streams()
    order = torch.tensor([2, 2, 0, 1])
    cache = module.prepare_context(memory, LENS)
    module.step(x[:, :3], cache)
    beams = cache.select(order)
    assert beams.batch == 4 and beams.length == 3
    got = module.step(x[order, 3:4], beams)
    torch.testing.assert_close(got, module.step(x[:, 3:4], cache)[order], rtol=1e-5, atol=1e-5)
    assert (beams.length, cache.length) == (4, 4)


def test_moving(packing: str) -> None:
    module = stack().eval()
    x, memory = streams()
    cache = module.prepare_context(memory, LENS)
    module.step(x[:, :2], cache)
    wide = cache.to(torch.float64)
    assert wide.dtype == torch.float64 and wide.length == 2
    got = module.double().step(x[:, 2:3].double(), wide)
    torch.testing.assert_close(got.float(), module.float().step(x[:, 2:3], cache))
    assert "ContextCache(layers=3, batch=3, length=3" in repr(cache)


def test_memory_content_past_the_lengths_is_irrelevant(packing: str) -> None:
    module, inputs = stack(), streams()
    dirty = [inputs[0], inputs[1].masked_fill(padding(LENS, M)[..., None], INF)]

    def call(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        return module(x, module.prepare_context(memory, LENS))

    same(run(module, call, inputs), run(module, call, dirty), 1e-6)


def test_a_cache_of_something_else() -> None:
    module, (x, memory) = stack(), streams()
    cache = module.prepare_context(memory)
    layer = CrossModalEncoderLayer(2 * C, H, FF, context_dim=WIDE)
    wider = CrossModalEncoder(layer, 3)
    cases = [
        (module, x[:2], cache, "made for a batch of 3 but tgt has 2; call prepare_context again"),
        (stack(2), x, cache, "made for 3 layers but the stack has 2"),
        (module, x, wider.prepare_context(memory), "heads of widths"),
        (module, x, cache.to("meta"), "is on meta but tgt is on cpu; call prepare_context again"),
    ]
    for stacked, tgt, wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            stacked(tgt, wrong)
        with pytest.raises(ValueError, match=message):
            stacked.step(tgt, wrong)
    with pytest.raises(ValueError, match="a context cache knows its lengths"):
        module(x, cache, memory_lens=LENS)
    with pytest.raises(ValueError, match="there are no contexts"):
        ContextCache([])
    other = module.prepare_context(memory[:2])
    with pytest.raises(ValueError, match="layer 1 has a context of batch 2"):
        ContextCache([cache.contexts[0], other.contexts[0]])
    with pytest.raises(ValueError, match="memory has width 16 but the module was made for 20"):
        module.prepare_context(x)
    with pytest.raises(ValueError, match="adds scores other than 0 and -inf"):
        module.prepare_context(memory, memory_key_padding_mask=torch.randn(B, M))
    with pytest.raises(TypeError, match="no layer has a cross-attention"):
        stack(cross_attention=False).prepare_context(memory)
    with pytest.raises(TypeError, match="tgt is ragged"):
        module.step(PackedTokens.from_padded(x), cache)
    plain = TransformerDecoder(drop_in().layers[0], 1)
    plain.layers[0].multihead_attn = torch.nn.MultiheadAttention(C, H)
    with pytest.raises(TypeError, match="convert the stack with from_torch"):
        plain.prepare_context(x)
