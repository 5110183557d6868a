"""`mmfast.nn.TransformerEncoder`, `TransformerDecoder` and their layers against PyTorch's."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import check_autocast, check_compiled
from stack_helpers import (
    FF,
    INF,
    M_LENS,
    N_LENS,
    B,
    C,
    H,
    M,
    N,
    as_float,
    causal,
    check,
    forced_packing,  # noqa: F401
    holes,
    padding,
    quiet_norms,
    run,
    same,
    seeded,  # noqa: F401
)
from torch import Tensor

import mmfast.nn.transformer_decoder as decoder_file
import mmfast.nn.transformer_encoder as encoder_file
from mmfast.nn import (
    MultiheadAttention,
    PackedTokens,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)


def layer(kind: str, ours: bool = False, **options: Any) -> Any:
    options = {"dropout": 0.0, "batch_first": True, **options}
    classes: Any = {
        ("encoder", False): torch.nn.TransformerEncoderLayer,
        ("encoder", True): TransformerEncoderLayer,
        ("decoder", False): torch.nn.TransformerDecoderLayer,
        ("decoder", True): TransformerDecoderLayer,
    }
    return classes[kind, ours](C, H, FF, **options)


def stack(kind: str, **options: Any) -> Any:
    """PyTorch's, two layers that differ and a final norm."""
    cls: Any = torch.nn.TransformerEncoder if kind == "encoder" else torch.nn.TransformerDecoder
    return quiet_norms(cls(layer(kind, **options), 2, torch.nn.LayerNorm(C)))


def converted(theirs: Any) -> Any:
    """Ours with copies of the weights."""
    copied = copy.deepcopy(theirs)
    encoder = isinstance(theirs, torch.nn.TransformerEncoder)
    return (TransformerEncoder if encoder else TransformerDecoder).from_torch(copied)


def streams_for(kind: str, batch_first: bool = True) -> list[Tensor]:
    both = [torch.randn(B, N, C), torch.randn(B, M, C)]
    both = both[: 1 if kind == "encoder" else 2]
    return both if batch_first else [x.transpose(0, 1).contiguous() for x in both]


N_PAD, M_PAD = padding(N_LENS, N), padding(M_LENS, M)
SOME = torch.randn(N, N, generator=torch.Generator().manual_seed(1))
ACROSS = torch.randn(N, M, generator=torch.Generator().manual_seed(2))
PER_HEAD = torch.randn(B * H, N, N, generator=torch.Generator().manual_seed(5))

# The names of torch.nn.TransformerDecoder; an encoder takes what begins with tgt.
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"tgt_mask": causal(N)},
    "causal hint": {"tgt_mask": as_float(causal(N)), "tgt_is_causal": True},
    "scores": {"tgt_mask": SOME, "memory_mask": ACROSS},
    "per head": {"tgt_mask": PER_HEAD, "tgt_key_padding_mask": as_float(N_PAD)},
    "padding": {"tgt_key_padding_mask": N_PAD, "memory_key_padding_mask": M_PAD},
    "padding, causal": {
        "tgt_mask": causal(N), "tgt_key_padding_mask": N_PAD,
        "memory_key_padding_mask": as_float(M_PAD),
    },
    "holes": {"tgt_key_padding_mask": holes(N), "memory_key_padding_mask": holes(M)},
    "holes, scores": {
        "tgt_mask": SOME.masked_fill(SOME > 1, -INF), "memory_mask": ACROSS > 1.5,
        "tgt_key_padding_mask": padding(N_LENS, N).flip(1), "memory_key_padding_mask": holes(M),
    },
    "padding with scores": {
        "memory_key_padding_mask": torch.randn(
            B, M, generator=torch.Generator().manual_seed(4)
        ).masked_fill(holes(M), -INF),
    },
    "memory causal": {
        "memory_mask": ~torch.ones(N, M, dtype=torch.bool).tril(), "memory_is_causal": True,
        "memory_key_padding_mask": M_PAD,
    },
}  # fmt: skip


def for_encoder(options: dict[str, Any]) -> dict[str, Any]:
    names = {
        "tgt_mask": "mask",
        "tgt_key_padding_mask": "src_key_padding_mask",
        "tgt_is_causal": "is_causal",
    }
    return {names[name]: value for name, value in options.items() if name in names}


def rows_of_padding(options: dict[str, Any], batch_first: bool) -> Tensor | None:
    mask = options.get("tgt_key_padding_mask")
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask == -INF
    return mask if batch_first else mask.t()


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
def test_constructors_and_state_dicts(kind: str) -> None:
    theirs_cls: Any = type(layer(kind))
    ours_cls: Any = type(layer(kind, True))
    mine, expected = (inspect.signature(cls.__init__).parameters for cls in (ours_cls, theirs_cls))
    assert list(mine) == list(expected)
    assert [p.default for p in mine.values()] == [p.default for p in expected.values()]
    forward, wanted = (inspect.signature(cls.forward) for cls in (ours_cls, theirs_cls))
    assert list(forward.parameters) == list(wanted.parameters)
    torch.manual_seed(1)
    theirs = layer(kind)
    torch.manual_seed(1)
    ours = layer(kind, True)
    for (name, a), (other, b) in zip(
        theirs.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, theirs_cls)
    whole: Any = TransformerEncoder if kind == "encoder" else TransformerDecoder
    made = whole(ours, 2, torch.nn.LayerNorm(C))
    assert list(made.state_dict()) == list(stack(kind).state_dict())
    assert type(whole(theirs, 2).layers[0]) is ours_cls
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301
        inputs = streams_for(kind)
        assert torch.equal(copied(*inputs), made(*inputs))
    assert all(p.is_meta for p in layer(kind, True, device="meta").parameters())
    assert layer(kind, True, dtype=torch.float64)(
        *[x.double() for x in streams_for(kind)]
    ).dtype == torch.float64  # fmt: skip


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_from_torch_shares_and_refuses(kind: str) -> None:
    theirs = stack(kind)
    cls: Any = TransformerEncoder if kind == "encoder" else TransformerDecoder
    ours = cls.from_torch(theirs.eval())
    assert not ours.training and not ours.layers[1].training
    assert [id(p) for p in ours.parameters()] == [id(p) for p in theirs.parameters()]
    assert type(theirs.layers[0].self_attn) is torch.nn.MultiheadAttention

    class Own(type(theirs.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Any:
            return args[0]

    with pytest.raises(TypeError, match="but got Linear"):
        cls.from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Own has a forward of its own"):
        type(ours.layers[0]).from_torch(Own(C, H))
    # A layer of the user's stays, and is called as PyTorch calls it.
    made = cls(Own(C, H), 2)
    inputs = streams_for(kind)
    assert made(*inputs) is inputs[0]


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


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_hooks_and_replaced_attention(kind: str, packing: str) -> None:
    theirs, inputs = stack(kind), streams_for(kind)
    options = MASKS["padding"] if kind == "decoder" else for_encoder(MASKS["padding"])

    def call(module: Any, *leaves: Tensor) -> Tensor:
        return module(*leaves, **options)

    ours = converted(theirs)
    seen: list[Any] = []
    ours.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    check(theirs, ours, call, inputs, N_PAD)
    assert seen[0].shape == (B, N, C)

    ours = converted(theirs)
    ours.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    del seen[:]
    check(theirs, ours, call, inputs, N_PAD)
    assert seen[0].shape == (B, N, C)

    class Mine(torch.nn.MultiheadAttention):
        pass

    ours = converted(theirs)
    old = ours.layers[0].self_attn
    ours.layers[0].self_attn = Mine(C, H, batch_first=True)
    ours.layers[0].self_attn.load_state_dict(old.state_dict())
    check(theirs, ours, call, inputs, N_PAD)
    with pytest.raises(TypeError, match="was replaced or has hooks"):
        ours(PackedTokens.from_padded(inputs[0], lens=N_LENS), *inputs[1:])


def test_norms_of_the_user() -> None:
    """Another norm, and one with a hook, run as modules."""
    theirs = quiet_norms(layer("encoder"))
    theirs.norm1 = torch.nn.Identity()
    ours = TransformerEncoderLayer.from_torch(theirs)
    seen: list[Tensor] = []
    ours.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(B, N, C)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    ours.norm1, ours.norm2 = torch.nn.RMSNorm(C, eps=1e-6), torch.nn.RMSNorm(C)
    other = torch.nn.TransformerEncoderLayer(C, H, FF, 0.0, batch_first=True)
    for name, module in ours.named_children():
        setattr(other, name, module)
    torch.testing.assert_close(ours(x), other(x), rtol=1e-4, atol=1e-4)


def test_the_layers_call_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmfast.nn._sublayers as sublayers

    calls: list[str] = []
    for name in ("modulate", "glu_packed"):
        op = getattr(sublayers, name)
        monkeypatch.setattr(
            sublayers, name, lambda *a, _op=op, _n=name, **k: calls.append(_n) or _op(*a, **k)
        )
    layer("decoder", True, activation="swiglu", norm_first=True)(*streams_for("decoder"))
    assert sorted(calls) == ["glu_packed", "modulate", "modulate", "modulate"]


def test_packed_layers_compute_no_padding(packing: str) -> None:
    ours = converted(stack("decoder"))
    rows: list[int] = []
    for module in ours.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args: rows.append(args[0].shape[:-1].numel())
            )
    ours(*streams_for("decoder"), **MASKS["padding"])
    valid = int((~N_PAD).sum()) if packing == "packed" else B * N
    assert rows == [valid] * 4


def test_dropout_is_applied_and_reproducible(packing: str) -> None:
    ours = converted(stack("decoder", dropout=0.5))
    inputs, options = streams_for("decoder"), MASKS["padding"]
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(ours(*inputs, **options))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    ours.eval()
    assert torch.equal(ours(*inputs, **options), ours(*inputs, **options))


@pytest.mark.parametrize("kind", [pytest.param("encoder", marks=pytest.mark.slow), "decoder"])
def test_compile(kind: str) -> None:
    options = MASKS["padding"] if kind == "decoder" else for_encoder(MASKS["padding"])
    ours = converted(stack(kind))
    ours.layers = ours.layers[:1]  # seconds a layer
    check_compiled(ours, lambda module, *x: module(*x, **options), *streams_for(kind))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_autocast(kind: str, packing: str) -> None:
    options = MASKS["padding"] if kind == "decoder" else for_encoder(MASKS["padding"])
    ours = converted(stack(kind))
    check_autocast(ours, lambda module, *x: module(*x, **options), *streams_for(kind))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_empty_batches_and_items(kind: str, packing: str) -> None:
    ours = converted(stack(kind))
    for shape in ((0, N, C), (B, 0, C)):
        inputs = [torch.randn(shape)] + ([torch.randn(shape[0], M, C)] if kind == "decoder" else [])
        assert ours(*inputs).shape == shape
    inputs = streams_for(kind)
    name = "src" if kind == "encoder" else "tgt"
    nothing = torch.ones(B, N, dtype=torch.bool)
    results = run(ours, lambda m, *x: m(*x, **{f"{name}_key_padding_mask": nothing}), inputs)
    assert all((x == 0).all() for x in results.values())


def test_a_memory_that_is_all_padding_gives_the_bias(packing: str) -> None:
    """As PyTorch with need_weights=False."""
    theirs, inputs = stack("decoder"), streams_for("decoder")
    gone = padding(torch.tensor([0, 7, 2]), M)
    check(theirs, converted(theirs), lambda m, *x: m(*x, memory_key_padding_mask=gone), inputs)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_compiles_pytorchs_own(kind: str) -> None:
    ours, inputs = converted(stack(kind)).eval(), streams_for(kind)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(*inputs), ours(*inputs), rtol=1e-5, atol=1e-5)
    assert type(ours.layers[0].self_attn) is MultiheadAttention
    with pytest.raises(TypeError, match="has no gated units"):
        torch.jit.script(layer(kind, True, activation="swiglu"))


def test_wrong_arguments() -> None:
    ours, (x, m) = converted(stack("decoder")), streams_for("decoder")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((x[..., 1:], m), {}, "tgt has width 15 but the module was made for 16"),
        ((x, m[:2]), {}, "memory has a batch of 2 but tgt has 3"),
        ((x[0, 0], m), {}, r"tgt has shape \[16\], expected \[batch, tokens, 16\]"),
        ((x, m), {"tgt_key_padding_mask": M_PAD}, r"padding mask of tgt has shape \[3, 7\]"),
        ((x, m), {"tgt_key_padding_mask": N_PAD.int()}, "only bool and floating types"),
        ((x, m), {"tgt_mask": torch.zeros(N, M)}, r"mask has shape \[5, 7\], expected \[5, 5\]"),
        ((x, m), {"memory_mask": torch.zeros(2, N, M)}, r"expected \[5, 7\] or \[6, 5, 7\]"),
        ((x, m), {"tgt_mask": causal(N).int()}, "only bool and floating types of masks"),
    ]
    for args, options, message in cases:
        for errors in (ValueError, (AssertionError, RuntimeError)):
            if "batch of 2" in message and errors is not ValueError:
                continue
            with pytest.raises(errors, match=message):
                ours(*args, **options)
    with pytest.raises(TypeError, match="or PackedTokens, got list"):
        ours([1], m)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu"):
        layer("encoder", True, activation="softmax")


def test_attention_is_ours_and_checks_pass() -> None:
    assert type(layer("decoder", True).multihead_attn) is MultiheadAttention
    for module in (encoder_file, decoder_file):
        assert doctest.testmod(module).failed == 0
