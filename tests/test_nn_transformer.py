"""`mmfast.nn.TransformerEncoder`, `TransformerDecoder` and their layers against PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stack_helpers import (
    INF,
    M_LENS,
    N_LENS,
    C,
    H,
    M,
    N,
    causal,
    check,
    forced_packing,  # noqa: F401
    padding,
    quiet_norms,
    run,
    same,
    seeded,  # noqa: F401
)
from torch import Tensor
from transformer_helpers import (
    M_PAD,
    MASKS,
    N_PAD,
    converted,
    for_encoder,
    layer,
    rows_of_padding,
    stack,
    streams_for,
)

from mmfast.nn import (
    PackedTokens,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_parity_with_gradients(kind: str, norm_first: bool, masks: str, packing: str) -> None:
    batch_first = len(masks) % 2 == 0
    options = MASKS[masks]
    where = rows_of_padding(options, batch_first)
    options = for_encoder(options) if kind == "encoder" else options
    theirs = stack(kind, norm_first=norm_first, batch_first=batch_first)
    inputs = streams_for(kind, batch_first)

    def call(module: Any, *leaves: Tensor) -> Tensor:
        return module(*leaves, **_in_dtype(options, leaves[0].dtype))

    check(theirs, converted(theirs), call, inputs, where)
    if where is not None:
        assert (converted(theirs)(*inputs, **options)[where] == 0).all()


def _in_dtype(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }


@pytest.mark.parametrize("masks", ["none", "causal", "padding"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_eval_without_gradients(kind: str, masks: str, packing: str) -> None:
    """Here PyTorch takes its native fast path, nested tensors included."""
    options = MASKS[masks] if kind == "decoder" else for_encoder(MASKS[masks])
    theirs, inputs = stack(kind, activation="gelu").eval(), streams_for(kind)
    with torch.no_grad():
        expected, got = theirs(*inputs, **options), converted(theirs)(*inputs, **options)
    where = rows_of_padding(MASKS[masks], True)
    if where is not None:
        expected, got = (x.masked_fill(where[..., None], 0.0) for x in (expected, got))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "activation", ["gelu", F.silu, torch.nn.GELU("tanh"), torch.tanh, torch.nn.ReLU()]
)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_any_activation_and_no_bias(kind: str, activation: Any) -> None:
    theirs = stack(kind, activation=activation, bias=False)
    check(theirs, converted(theirs), lambda module, *x: module(*x), streams_for(kind))


GLUS = {
    "swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu, "glu": torch.sigmoid, "bilinear": lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("activation", GLUS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_gated_units(activation: str, norm_first: bool) -> None:
    module = quiet_norms(layer("encoder", True, activation=activation, norm_first=norm_first))

    def plain(module: Any, x: Tensor) -> Tensor:
        def fed(h: Tensor) -> Tensor:
            gate, value = module.linear1(h).chunk(2, -1)
            return module.linear2(GLUS[activation](gate) * value)

        def attended(h: Tensor) -> Tensor:
            attention = module.self_attn
            return F.multi_head_attention_forward(
                *[h.transpose(0, 1)] * 3, C, H, attention.in_proj_weight, attention.in_proj_bias,
                None, None, False, 0.0, attention.out_proj.weight, attention.out_proj.bias,
                need_weights=False,
            )[0].transpose(0, 1)  # fmt: skip

        if norm_first:
            x = x + attended(module.norm1(x))
            return x + fed(module.norm2(x))
        x = module.norm1(x + attended(x))
        return module.norm2(x + fed(x))

    check(module, module, lambda m, x: m(x), streams_for("encoder"), reference=plain)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_single_layer(kind: str, packing: str) -> None:
    theirs = quiet_norms(layer(kind, batch_first=False))
    cls: Any = TransformerEncoderLayer if kind == "encoder" else TransformerDecoderLayer
    ours = cls.from_torch(copy.deepcopy(theirs))
    inputs, name = streams_for(kind, False), "src" if kind == "encoder" else "tgt"
    options = {f"{name}_key_padding_mask": N_PAD, f"{name}_mask": causal(N)}
    check(theirs, ours, lambda m, *x: m(*x, **options), inputs, N_PAD.t())
    single = [x[:, 0] for x in inputs]
    options = {f"{name}_key_padding_mask": N_PAD[1]}
    check(theirs, ours, lambda m, *x: m(*x, **options), single, N_PAD[1])
    assert (ours(*single, **options)[N_PAD[1]] == 0).all()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_padding_may_hold_nan(kind: str, packing: str) -> None:
    ours = converted(stack(kind, norm_first=True))
    inputs = streams_for(kind)
    options = MASKS["padding"] if kind == "decoder" else for_encoder(MASKS["padding"])
    dirty = [inputs[0].masked_fill(N_PAD[..., None], float("nan"))]
    if kind == "decoder":
        dirty.append(inputs[1].masked_fill(M_PAD[..., None], INF))

    def call(module: Any, *leaves: Tensor) -> Tensor:
        return module(*leaves, **options)

    clean, got = run(ours, call, inputs), run(ours, call, dirty)
    assert all(x.isfinite().all() for x in got.values())
    same(clean, got, 1e-6)
    assert (got["dinput0"][N_PAD] == 0).all()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("form", ["packed", "jagged"])
def test_ragged_input_is_as_padded_input(kind: str, form: str, packing: str) -> None:
    ours, inputs = converted(stack(kind)), streams_for(kind)
    padded = {"tgt_mask": causal(N), **MASKS["padding"]}
    ragged: dict[str, Any] = {"tgt_mask": causal(N)}
    if kind == "encoder":
        padded, ragged = for_encoder(padded), for_encoder(ragged)

    def call(module: Any, *leaves: Tensor) -> Tensor:
        streams: list[Any] = [
            PackedTokens.from_padded(x, lens=lens)
            for x, lens in zip(leaves, (N_LENS, M_LENS), strict=False)
        ]
        if form == "jagged":
            streams = [x.to_nested() for x in streams]
        out = module(*streams, **ragged)
        assert type(out) is type(streams[0]) and (form == "packed" or out.layout == torch.jagged)
        return (PackedTokens.from_nested(out) if form == "jagged" else out).to_padded(N)

    same(run(ours, lambda m, *x: m(*x, **padded), inputs), run(ours, call, inputs))
    name = "src" if kind == "encoder" else "tgt"
    packed = PackedTokens.from_padded(inputs[0], lens=N_LENS)
    with pytest.raises(ValueError, match="is ragged and knows its lengths"):
        ours(packed, *inputs[1:], **{f"{name}_key_padding_mask": N_PAD})


def test_a_memory_that_is_all_padding_gives_the_bias(packing: str) -> None:
    """As PyTorch with need_weights=False."""
    theirs, inputs = stack("decoder"), streams_for("decoder")
    gone = padding(torch.tensor([0, 7, 2]), M)
    check(theirs, converted(theirs), lambda m, *x: m(*x, memory_key_padding_mask=gone), inputs)
