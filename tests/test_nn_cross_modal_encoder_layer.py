"""`CrossModalEncoderLayer` against plain torch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_modal_helpers import KINDS, MISSING, N_PAD, WIDE, layer, stack, streams
from stack_helpers import (
    FF,
    INF,
    N_LENS,
    B,
    C,
    H,
    M,
    N,
    as_float,
    check,
    forced_packing,  # noqa: F401
    holes,
    padding,
    run,
    same,
    seeded,  # noqa: F401
)
from torch import Tensor

from mmfast.nn import (
    CrossModalEncoder,
    CrossModalEncoderLayer,
    MultiheadAttention,
    PackedTokens,
)


def plain_attention(
    attention: MultiheadAttention, x: Tensor, memory: Tensor, seen: Tensor
) -> Tensor:
    """`seen` bool `[B, N, M]`; rows that see nothing are 0."""
    weight, bias, E = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
    parts = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    q_w, k_w, v_w = parts if weight is None else weight.chunk(3)
    q_b, k_b, v_b = bias.chunk(3)
    q, k, v = (
        F.linear(t, w, b).unflatten(-1, (H, E // H)).transpose(1, 2)
        for t, w, b in ((x, q_w, q_b), (memory, k_w, k_b), (memory, v_w, v_b))
    )
    scores = (q @ k.mT) * (E // H) ** -0.5
    dead = ~seen.any(-1)[:, None, :, None]
    scores = scores.masked_fill(~seen[:, None] & ~dead, -INF)
    mixed = scores.softmax(-1) @ v if memory.shape[1] else torch.zeros_like(q)
    out = F.linear(mixed.transpose(1, 2).flatten(2), attention.out_proj.weight)
    return (out + attention.out_proj.bias).masked_fill(dead[:, 0], 0.0)


def plain(
    module: CrossModalEncoderLayer,
    x: Tensor,
    memory: Tensor,
    x_pad: Tensor | None = None,
    memory_pad: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    x_pad = torch.zeros(x.shape[:2], dtype=torch.bool) if x_pad is None else x_pad
    if memory_pad is None:
        memory_pad = torch.zeros(memory.shape[:2], dtype=torch.bool)

    def of_itself(h: Tensor) -> Tensor:
        seen = (~x_pad)[:, None].expand(-1, h.shape[1], -1)
        seen = seen.tril() if is_causal else seen
        return plain_attention(module.self_attn, h, h, seen)

    def of_memory(h: Tensor) -> Tensor:
        seen = (~memory_pad)[:, None].expand(-1, h.shape[1], -1)
        out = plain_attention(module.multihead_attn, h, memory, seen)
        return out if module.cross_gate is None else torch.tanh(module.cross_gate) * out

    def fed(h: Tensor) -> Tensor:
        hidden = module.linear1(h)
        if module.glu is None:
            return module.linear2(module.activation(hidden))
        gate, value = hidden.chunk(2, -1)
        return module.linear2(F.silu(gate) * value)

    branches = [of_itself] if module.self_attn is not None else []
    branches += [of_memory] if module.multihead_attn is not None else []
    for i, branch in enumerate([*branches, fed], 1):
        norm = getattr(module, f"norm{i}")
        x = x + branch(norm(x)) if module.norm_first else norm(x + branch(x))
    return x.masked_fill(x_pad[..., None], 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", ["none", "lens", "holes"])
def test_against_plain_torch(kind: str, lengths: str, packing: str) -> None:
    module = layer(**KINDS[kind])
    crosses = module.multihead_attn is not None
    x_pad = memory_pad = None
    options: dict[str, Any] = {"tgt_is_causal": lengths == "lens"}
    if lengths == "lens":
        x_pad, memory_pad = N_PAD, padding(MISSING, M)
        options |= {"tgt_lens": N_LENS, "memory_lens": MISSING if crosses else None}
    elif lengths == "holes":
        x_pad, memory_pad = holes(N), holes(M)
        memory_pad[2] = True
        options["tgt_key_padding_mask"] = x_pad
        options["memory_key_padding_mask"] = as_float(memory_pad) if crosses else None
    inputs = streams()

    def mine(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        return module(x, memory if crosses else None, **options)

    def theirs(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        return plain(module, x, memory, x_pad, memory_pad, lengths == "lens")

    check(module, module, mine, inputs, reference=theirs)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_missing_modality_adds_nothing(norm_first: bool, packing: str) -> None:
    """However it is said; its content is irrelevant, its gradient 0."""
    module, (x, memory) = layer(norm_first=norm_first), streams()
    none = torch.zeros(B, dtype=torch.int64)
    expected = run(module, lambda m, x: m(x), [x])
    for options in (
        {"memory_lens": none},
        {"memory_key_padding_mask": padding(none, M)},
        {"memory_mask": torch.ones(N, M, dtype=torch.bool)},
        {"memory_mask": torch.full((N, M), -INF)},
    ):
        content = memory if "memory_mask" in options else torch.full_like(memory, float("nan"))
        got = run(module, lambda m, x, y, o=options: m(x, y, **o), [x, content])
        assert (got.pop("dinput1") == 0).all()
        same(expected, got, 1e-6)
    empty = run(module, lambda m, x: m(x, torch.empty(B, 0, WIDE)), [x])
    same(expected, empty, 1e-6)
    some = torch.tensor([0, 3, 0])
    got, full = module(x, memory, memory_lens=some), module(x)
    torch.testing.assert_close(got[[0, 2]], full[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[1], full[1], atol=1e-3)


def test_every_form_of_a_ragged_stream_agrees(packing: str) -> None:
    module = layer(norm_first=True)
    x_pad = padding(N_LENS, N)

    def forms(x: Tensor, lens: Tensor) -> dict[str, Any]:
        packed = PackedTokens.from_padded(x, lens=lens)
        return {"dense": x, "packed": packed, "jagged": packed.to_nested()}

    def call(kinds: tuple[str, str]) -> Any:
        def inner(module: Any, x: Tensor, memory: Tensor) -> Tensor:
            lens = {} if kinds[0] != "dense" else {"tgt_lens": N_LENS}
            lens |= {} if kinds[1] != "dense" else {"memory_lens": MISSING}
            out = module(forms(x, N_LENS)[kinds[0]], forms(memory, MISSING)[kinds[1]], **lens)
            if kinds[0] == "jagged":
                out = PackedTokens.from_nested(out)
            return out.to_padded(N) if isinstance(out, PackedTokens) else out

        return inner

    inputs = streams()
    expected = run(module, call(("dense", "dense")), inputs, x_pad)
    for kinds in (("packed", "dense"), ("dense", "packed"), ("jagged", "packed")):
        same(expected, run(module, call(kinds), inputs, x_pad))


def test_projected_context_takes_the_place_of_the_memory(packing: str) -> None:
    module, inputs = layer(gate="scalar"), streams()

    def prepared(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        context = module.multihead_attn.prepare_context(memory, MISSING)
        return module(x, context, memory_mask=ACROSS)

    def direct(module: Any, x: Tensor, memory: Tensor) -> Tensor:
        return module(x, memory, memory_lens=MISSING, memory_mask=ACROSS)

    same(run(module, direct, inputs), run(module, prepared, inputs))
    context = module.multihead_attn.prepare_context(inputs[1])
    with pytest.raises(ValueError, match="was projected before and knows its lengths"):
        module(inputs[0], context, memory_lens=MISSING)
    with pytest.raises(ValueError, match="made for a batch of 3 but x has 2"):
        module(inputs[0][:2], context)


ACROSS = torch.randn(N, M, generator=torch.Generator().manual_seed(2)) > 0


def test_unbatched_and_sequence_first(packing: str) -> None:
    module = layer()
    (x, memory), options = streams(), {"tgt_lens": N_LENS, "memory_lens": MISSING}
    expected = module(x, memory, **options)
    turned = layer(batch_first=False)
    turned.load_state_dict(module.state_dict())
    got = turned(x.transpose(0, 1), memory.transpose(0, 1), **options)
    assert got.is_contiguous()
    torch.testing.assert_close(got.transpose(0, 1), expected, rtol=1e-5, atol=1e-5)
    one = module(x[0], memory[0, :4])
    torch.testing.assert_close(one, expected[0], rtol=1e-5, atol=1e-5)


def test_factory_arguments_reset_and_copies() -> None:
    module = stack(gate="vector")
    inputs = streams()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert torch.equal(copied(*inputs), module(*inputs))
    made = CrossModalEncoderLayer(C, H, FF, device="meta", gate="scalar")
    assert all(p.is_meta for p in made.parameters())
    fresh = made.to_empty(device="cpu")
    for state in (fresh, module.layers[0]):
        state.reset_parameters()
        assert all(p.isfinite().all() for p in state.parameters())
        assert (state.cross_gate == 0).all()
    assert "CrossModalEncoderLayer(" in repr(module) and "gate='vector'" in repr(module)
    shut = layer(gate="scalar", norm_first=True)
    torch.nn.init.zeros_(shut.cross_gate)
    torch.testing.assert_close(shut(*inputs), shut(inputs[0]), rtol=1e-6, atol=1e-6)


def test_wrong_arguments() -> None:
    module, (x, memory) = layer(), streams()
    for options, message in (
        ({"nhead": 3}, "d_model=16 is not a multiple of nhead=3"),
        ({"dim_feedforward": 0}, "dim_feedforward is 0; it must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 <= dropout < 1"),
        ({"gate": "row"}, "gate is 'row'; it must be None, 'scalar' or 'vector'"),
        ({"gate": "scalar", "cross_attention": False}, "needs cross_attention"),
        ({"self_attention": False, "cross_attention": False}, "are both off"),
    ):
        with pytest.raises(ValueError, match=message):
            CrossModalEncoderLayer(**{"d_model": C, "nhead": H, **options})  # type: ignore[arg-type]
    for args, options, message in (
        ((x, x), {}, "memory has width 16 but the module was made for 20"),
        ((x, memory[:2]), {}, "memory has a batch of 2 but tgt has 3.*length 0"),
        ((x, memory), {"memory_lens": torch.tensor([1, 2])}, r"memory_lens has shape \[2\]"),
        (
            (x, memory),
            {"tgt_lens": N_LENS, "tgt_key_padding_mask": N_PAD},
            "tgt has a padding mask and lengths",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            module(*args, **options)
    with pytest.raises(TypeError, match="memory_lens must be an integer tensor"):
        module(x, memory, memory_lens=torch.ones(B))
    for made in (layer(cross_attention=False), stack(cross_attention=False)):
        with pytest.raises(ValueError, match="memory came but the layer"):
            made(x, memory)
    with pytest.raises(ValueError, match="there are no layers"):
        CrossModalEncoder([])
    with pytest.raises(ValueError, match="num_layers is 3 but 1 layers came"):
        CrossModalEncoder([layer()], 3)
    with pytest.raises(TypeError, match="a layer is Linear, expected CrossModalEncoderLayer"):
        CrossModalEncoder(torch.nn.Linear(2, 2), 2)  # type: ignore[arg-type]
