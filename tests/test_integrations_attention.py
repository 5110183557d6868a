"""The attention that patched models call: every mask means what it means to transformers."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations import _interface, _masks
from mmfast.integrations._attention import COMPAT, PackedMask, attend
from mmfast.integrations._masks import recognised

B, H, G, N, M, D, DV = 3, 4, 2, 7, 7, 8, 6
LEAST = torch.finfo(torch.float32).min
LENS = torch.tensor([7, 4, 1])


def additive(see: Tensor, masked: float = LEAST) -> Tensor:
    return torch.zeros(see.shape).masked_fill(~see, masked)


def key_padding(valid: Tensor, rows: int = N) -> Tensor:
    return valid[:, None, None, :].expand(-1, 1, rows, -1)


RIGHT = torch.arange(M) < LENS[:, None]
LEFT = RIGHT.flip(1)
HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1], [1] * 7]).bool()
CAUSAL = torch.ones(N, M).tril().bool()[None, None]
DISTANCE = torch.arange(N)[:, None] - torch.arange(M)
BLOCKS = torch.arange(N)[:, None] // 2 == torch.arange(M) // 2
ONE_EMPTY = torch.arange(M) < torch.tensor([7, 0, 3])[:, None]
FOUR_SEEN = torch.arange(M) < torch.full((B, 1, 1, 1), 4)
SEEN = torch.arange(M) <= torch.arange(2)[:, None] + 3

# name -> (bool mask [B, 1, N, M], whether lengths or causality are read off it, queries)
MASKS: dict[str, tuple[Tensor, bool, int]] = {
    "right padding": (key_padding(RIGHT), True, N),
    "right padding, in memory": (key_padding(RIGHT).contiguous(), True, N),
    "right padding, one row for all": (RIGHT[:, None, None, :], True, N),
    "left padding": (key_padding(LEFT), True, N),
    "padding within": (key_padding(HOLES).contiguous(), True, N),
    "nothing masked": (key_padding(torch.ones(B, M).bool()), True, N),
    "an item without keys": (key_padding(ONE_EMPTY), True, N),
    "causal": (CAUSAL.expand(B, 1, N, M), True, N),
    "causal, right padding": (CAUSAL & key_padding(RIGHT), True, N),
    "causal, left padding": (CAUSAL & key_padding(LEFT), True, N),
    "causal, padding within": (CAUSAL & key_padding(HOLES), True, N),
    "causal, two rows at the end": (CAUSAL[:, :, -2:].expand(B, 1, 2, M), True, 2),
    "static cache: two rows after three": (SEEN[None, None].expand(B, 1, 2, M), True, 2),
    "one row of a static cache": (FOUR_SEEN, True, 1),
    "sliding window": ((CAUSAL & (DISTANCE < 3)).expand(B, 1, N, M), False, N),
    "sliding window, padded": (CAUSAL & (DISTANCE < 3) & key_padding(RIGHT), False, N),
    "blocks that see themselves": ((CAUSAL | BLOCKS).expand(B, 1, N, M), False, N),
    "upside down": (CAUSAL.transpose(2, 3).expand(B, 1, N, M), False, N),
    "rows and keys padded": (key_padding(RIGHT) & RIGHT[:, None, :, None], False, N),
}  # fmt: skip


def heads(rows: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(B, rows, H, D, generator=generator).transpose(1, 2)
    k = torch.randn(B, M, G, D, generator=generator).transpose(1, 2)
    v = torch.randn(B, M, G, DV, generator=generator).transpose(1, 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What transformers computes, `[B, N, H, Dv]`, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        # The least float32, as it is there: in float64 as well it buries every score.
        scores = scores + mask.double()
    return (scores.softmax(-1) @ v).transpose(1, 2)


def close(got: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(got.double(), right, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("form", ["additive", "bool", "negative infinity"])
@pytest.mark.parametrize("name", list(MASKS))
def test_masks(name: str, form: str) -> None:
    see, known, rows = MASKS[name]
    q, k, v = heads(rows)
    right = eager(q, k, v, additive(see), 0.3)
    mask = see if form == "bool" else additive(see, LEAST if form == "additive" else -math.inf)
    assert (recognised(mask) is not None) == known
    out, weights = attend(nn.Identity(), q, k, v, mask, scaling=0.3)
    assert out.shape == (B, rows, H, DV) and out.is_contiguous() and weights is None
    rows_seen = see.any(-1)[:, 0].expand(B, rows)
    if name == "causal, right padding":  # rows of padding are left out
        assert not out[~RIGHT].any()
        rows_seen = RIGHT
    close(out[rows_seen], right[rows_seen])
    close(attend(nn.Identity(), q, k, v, mask, scaling=0.3)[0][rows_seen], right[rows_seen])


@pytest.mark.parametrize("name", [n for n, (see, _, _) in MASKS.items() if not see.any(-1).all()])
def test_rows_that_see_nothing(name: str) -> None:
    """The mean of all values as in transformers; 0 where the patch says so."""
    see, _, rows = MASKS[name]
    q, k, v = heads(rows)
    right = eager(q, k, v, additive(see), 0.3)
    out, weights = attend(nn.Identity(), q, k, v, additive(see), scaling=0.3, need_weights=True)
    close(out, right)
    assert weights is not None
    close(weights.sum(-1), torch.ones(B, H, rows, dtype=torch.float64))
    ours = nn.Identity()
    ours.__dict__[COMPAT] = False
    out, _ = attend(ours, q, k, v, additive(see), scaling=0.3)
    seen = see.any(-1)[:, 0].expand(B, rows)
    assert not out[~seen].any()
    close(out[seen], right[seen])


@pytest.mark.parametrize("name", list(MASKS))
def test_position_bias(name: str) -> None:
    """Added to the scores beside any mask, with a gradient."""
    see, _, rows = MASKS[name]
    q, k, v = heads(rows)
    bias = torch.randn(1, H, rows, M, generator=torch.Generator().manual_seed(1))
    seen = see.any(-1)[:, 0].expand(B, rows)
    seen = RIGHT if name == "causal, right padding" else seen
    right = eager(q, k, v, additive(see) + bias, 1.0)
    bias.requires_grad_()
    out, _ = attend(nn.Identity(), q, k, v, additive(see), scaling=1.0, position_bias=bias)
    close(out[seen], right[seen])
    twin = bias.detach().double().requires_grad_()
    eager(q, k, v, additive(see).double() + twin, 1.0)[seen].square().sum().backward()
    out[seen].square().sum().backward()
    assert bias.grad is not None and twin.grad is not None
    torch.testing.assert_close(bias.grad.double(), twin.grad, atol=2e-5, rtol=2e-5)


def test_a_mask_that_adds_is_added() -> None:
    q, k, v = heads()
    mask = torch.randn(B, 1, N, M) + additive(key_padding(RIGHT))
    assert recognised(mask) is None
    out, _ = attend(nn.Identity(), q, k, v, mask, scaling=0.5)
    close(out, eager(q, k, v, mask, 0.5))
    per_head = torch.randn(B, H, N, M)
    close(attend(nn.Identity(), q, k, v, per_head)[0], eager(q, k, v, per_head, D**-0.5))


@pytest.mark.parametrize("rows", ["in memory", "one for all"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_mask_is_read_again(inference: bool, rows: str) -> None:
    """Also in inference mode, whose tensors do not count what is written to them."""
    with torch.inference_mode(inference):
        memory = additive(key_padding(RIGHT, N if rows == "in memory" else 1)).clone()
        mask = memory.expand(-1, -1, N, -1)
        first = recognised(mask)
        assert first is not None and first is recognised(mask)
        memory[0, :, :, 5:] = LEAST
        second = recognised(mask)
        assert second is not None and second.lens is not None
        assert second.lens.tolist() == [5, 4, 1]


@pytest.mark.parametrize("form", ["additive", "bool", "one row for all"])
@pytest.mark.parametrize("inference", [False, True])
def test_masks_are_forgotten_with_what_was_read(inference: bool, form: str) -> None:
    """Nothing is kept alive, nor saved with a mask."""
    gc.collect()
    before = len(_masks._KEPT)
    with torch.inference_mode(inference):
        for _ in range(5):
            see = key_padding(RIGHT, 1).clone().expand(-1, -1, N, -1)
            mask = additive(see) if form == "additive" else see
            mask = see.contiguous() if form == "bool" else mask
            pattern = recognised(mask)
            assert pattern is not None and pattern.layout().total == 12
            assert not mask.__dict__
            del mask, see, pattern
    gc.collect()
    assert len(_masks._KEPT) == before


def test_weights_are_those_of_the_softmax() -> None:
    see = MASKS["causal, left padding"][0]
    q, k, v = heads()
    _, weights = attend(nn.Identity(), q, k, v, additive(see), scaling=0.3, need_weights=True)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 0.3
    right = (scores + additive(see).double()).softmax(-1)
    assert weights is not None
    close(weights, right)


class Causal(nn.Module):
    """A module that says of itself that it is causal."""

    is_causal = True


def test_causality_is_never_guessed() -> None:
    q, k, v = heads()
    out, _ = _interface.attention(Causal(), q, k, v, None, scaling=0.3)
    close(out, eager(q, k, v, None, 0.3))
    out, _ = _interface.attention(Causal(), q, k, v, None, scaling=0.3, is_causal=True)
    close(out, eager(q, k, v, additive(CAUSAL), 0.3))
    # An argument that says causal does not count beside a mask, nor for keys of another stream.
    mask = additive(key_padding(RIGHT))
    out, _ = _interface.attention(Causal(), q, k, v, mask, scaling=0.3, is_causal=True)
    close(out, eager(q, k, v, mask, 0.3))
    short = q[:, :, :2]
    out, _ = _interface.attention(Causal(), short, k, v, None, scaling=0.3, is_causal=True)
    close(out, eager(short, k, v, None, 0.3))


def test_what_is_not_computed_goes_to_the_model() -> None:
    """A soft cap: the eager function in the file of the module's class."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2Config

    config = Gemma2Config(
        hidden_size=16, num_attention_heads=H, num_key_value_heads=G, head_dim=D,
        attn_logit_softcapping=2.0,
    )  # fmt: skip
    module = Gemma2Attention(config, 0).eval()
    q, k, v = heads()
    out, _ = _interface.attention(module, q, k, v, None, scaling=0.3, softcap=2.0)
    k2, v2 = k.repeat_interleave(2, 1).double(), v.repeat_interleave(2, 1).double()
    scores = 2.0 * (q.double() @ k2.transpose(2, 3) * 0.3 / 2.0).tanh()
    close(out, (scores.softmax(-1) @ v2).transpose(1, 2))
    with pytest.raises(ValueError, match=r"softcap.*attn_implementation"):
        _interface.attention(nn.Identity(), q, k, v, None, softcap=2.0)


def test_packed_rows_give_no_weights() -> None:
    q, k, v = (x[:1] for x in heads())
    pattern = recognised(key_padding(RIGHT[:1]))
    assert pattern is not None
    mask = PackedMask(pattern.layout(), pattern.layout())
    with pytest.raises(ValueError, match="output_attentions"):
        attend(nn.Identity(), q, k, v, mask, need_weights=True)


def config(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        **more,
    )  # fmt: skip


def llama(implementation: str, **more: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config(**more), attn_implementation=implementation)
    return model.eval()


def test_by_name() -> None:
    """A model that is built with the name, without a patch; a batch padded on the right."""
    mmfast.register_attention()
    ours, theirs = llama("mmfast"), llama("eager")
    ids, mask = torch.randint(0, 60, (3, 7)), RIGHT.long()
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    got = ours(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[RIGHT], expected[RIGHT])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_by_name(cache: str) -> None:
    """Prompts padded on the left, greedy and with beams."""
    mmfast.register_attention()
    ids, mask = torch.randint(3, 60, (3, 7)), LEFT.long()
    options = {
        "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": None, "cache_implementation": cache,
    }  # fmt: skip
    for beams in (1, 2) if cache == "dynamic" else (1,):
        expected = llama("eager").generate(ids, num_beams=beams, **options)
        assert torch.equal(llama("mmfast").generate(ids, num_beams=beams, **options), expected)


def test_attentions_are_recorded() -> None:
    """output_attentions=True gives the weights, where sdpa gives nothing."""
    mmfast.register_attention()
    ids = torch.randint(0, 60, (2, 5))
    expected = llama("eager")(input_ids=ids, output_attentions=True)
    got = llama("mmfast")(input_ids=ids, output_attentions=True)
    assert len(got.attentions) == len(expected.attentions) == 2
    for ours, theirs in zip(got.attentions, expected.attentions):
        torch.testing.assert_close(ours, theirs)


def test_compiled_by_name() -> None:
    """One graph, with the mask that transformers makes inside of it."""
    mmfast.register_attention()
    model = llama("mmfast")
    ids, mask = torch.randint(0, 60, (3, 7)), RIGHT.long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[RIGHT], expected[RIGHT])
