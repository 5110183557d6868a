"""`PackedTokens` and `ProjectedContext`: what they hold, where they come from, what they refuse."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmfast.nn.packed_tokens as implementation
from mmfast.nn import CrossModalAttention, MultiheadAttention, PackedTokens, ProjectedContext

B, L, C = 3, 4, 2
LENS = torch.tensor([4, 0, 2])
HOLES = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def padded(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, L, C)))


# --- from and to padded ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=5), st.booleans(), st.booleans())
def test_a_padded_batch_and_back(lens: list[int], by_mask: bool, seq_first: bool) -> None:
    x = torch.randn(5, len(lens), 3).transpose(0, 1) if seq_first else torch.randn(len(lens), 5, 3)
    pad = torch.arange(5) >= torch.tensor(lens, dtype=torch.int64).reshape(-1, 1)
    x = x.masked_fill(pad[..., None], float("nan"))
    given_as: dict[str, Any] = {"padding_mask": pad} if by_mask else {"lens": torch.tensor(lens)}
    if not lens:
        given_as = {}
    packed = PackedTokens.from_padded(x, **given_as)
    assert packed.lens.tolist() == lens and packed.batch == len(lens)
    assert packed.total == sum(lens) and packed.max_len == max(lens, default=5)
    assert packed.items.tolist() == [b for b, n in enumerate(lens) for _ in range(n)]
    assert packed.positions is None and packed.length == 5
    assert torch.equal(
        packed.values, torch.cat([x[b, :n] for b, n in enumerate(lens)] or [x[0:0, 0]])
    )
    assert torch.equal(packed.to_padded(), x.nan_to_num(0.0))
    assert torch.equal(packed.to_padded(7)[:, :5], x.nan_to_num(0.0))
    assert (packed.to_padded(7)[:, 5:] == 0).all()


def test_holes_keep_their_positions() -> None:
    x = padded()
    packed = PackedTokens.from_padded(x, padding_mask=HOLES)
    assert packed.positions is not None
    assert packed.positions.tolist() == [0, 2, 0, 1, 2, 3] and packed.lens.tolist() == [2, 0, 4]
    assert torch.equal(packed.to_padded(), x.masked_fill(HOLES[..., None], 0.0))
    dense = packed.without_holes()
    assert dense.positions is None and torch.equal(dense.to_padded()[0, :2], x[0, [0, 2]])


def test_nothing_is_padding_nothing_is_copied() -> None:
    x = padded()
    for packed in (PackedTokens.from_padded(x), PackedTokens.from_padded(x, torch.tensor([L] * B))):
        assert packed.values.data_ptr() == x.data_ptr()
        assert packed.to_padded().data_ptr() == x.data_ptr()


@pytest.mark.parametrize("how", [{}, {"lens": LENS}, {"padding_mask": HOLES}], ids=str)
def test_gradients(how: dict[str, Any]) -> None:
    x = padded().double().requires_grad_()

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        packed = PackedTokens.from_padded(x, **how)
        both = PackedTokens.join([packed, packed.with_values(packed.values.sin())])
        return packed.with_values(packed.values.square()).to_padded(), both.values

    assert torch.autograd.gradcheck(call, (x,)) and torch.autograd.gradgradcheck(call, (x,))


def test_jagged_tensors() -> None:
    items = [torch.randn(n, C) for n in (3, 0, 2)]
    nested = torch.nested.nested_tensor(items, layout=torch.jagged, requires_grad=True)
    packed = PackedTokens.from_nested(nested)
    assert packed.lens.tolist() == [3, 0, 2] and packed.max_len == 3
    back = packed.with_values(packed.values * 2).to_nested()
    total = nested + back  # torch adds only what shares its offsets
    (grad,) = torch.autograd.grad(total.values().sum(), nested)
    assert (grad.values() == 3).all()
    assert torch.equal(PackedTokens.from_padded(padded(), LENS).to_nested().offsets().diff(), LENS)


def test_join_goes_item_by_item() -> None:
    a, b = (
        PackedTokens.from_padded(padded(), LENS),
        PackedTokens.from_padded(padded(), padding_mask=HOLES),
    )
    joined = PackedTokens.join([a, b, a])
    expected = [stream.values[stream.items == item] for item in range(B) for stream in (a, b, a)]
    assert torch.equal(joined.values, torch.cat(expected))
    assert joined.lens.tolist() == [10, 0, 8] and joined.max_len == 10
    assert PackedTokens.join([a]).positions is None


def test_under_compile() -> None:
    packed = PackedTokens.from_padded(padded(), LENS)

    def call(packed: PackedTokens) -> tuple[PackedTokens, Tensor, Tensor, Tensor]:
        twice = packed.with_values(packed.values * 2)
        return twice, twice.to_padded(), PackedTokens.join([packed, twice]).values, packed.lens

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, expected in zip(compiled(packed)[1:], call(packed)[1:], strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(compiled(packed)[0].values, packed.values * 2)


def test_other_dtypes_and_the_example() -> None:
    packed = PackedTokens.from_padded(padded(), padding_mask=HOLES)
    half = packed.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.lens, packed.lens)
    assert packed.to(torch.float32) is packed and packed.to("meta").device.type == "meta"
    assert "batch=3, tokens=6, max_len=4" in repr(packed)
    assert doctest.testmod(implementation).failed == 0


OFFSETS = torch.tensor([0, 4, 4, 6])
MISTAKES: list[tuple[Any, type[Exception], str]] = [
    (lambda: PackedTokens([1], OFFSETS), TypeError, "values must be a dense torch"),
    (lambda: PackedTokens(torch.ones(6), OFFSETS.float()), TypeError, "cu_seqlens must be an"),
    (lambda: PackedTokens(torch.ones(7), OFFSETS), ValueError, "must rise from 0 to the 7 rows"),
    (lambda: PackedTokens(torch.ones(6), OFFSETS.flip(0)), ValueError, "must rise from 0 to the 6"),
    (lambda: PackedTokens(torch.ones(6), OFFSETS, 3), ValueError, "max_len is 3 but the longest"),
    (lambda: PackedTokens(torch.ones(6), OFFSETS[None]), ValueError, r"has shape \[1, 4\]"),
    (lambda: PackedTokens(torch.ones(6), OFFSETS.to("meta")), ValueError, "is on meta but values"),
    (lambda: PackedTokens(torch.ones(6), OFFSETS, length=2), ValueError, "length is 2 but max_len"),
    (
        lambda: PackedTokens(torch.ones(6), OFFSETS, positions=OFFSETS),
        ValueError,
        r"positions has shape \[4\], expected \[6\]",
    ),
    (lambda: PackedTokens.from_padded(torch.ones(3)), ValueError, "x must be a dense"),
    (lambda: PackedTokens.from_padded(padded(), LENS + 1), ValueError, "lens holds 5, allowed"),
    (lambda: PackedTokens.from_padded(padded(), LENS - 1), ValueError, "lens holds -1, allowed"),
    (lambda: PackedTokens.from_padded(padded(), LENS[:2]), ValueError, r"must be \[3\], got \[2\]"),
    (lambda: PackedTokens.from_padded(padded(), LENS, HOLES), ValueError, "give lens or"),
    (lambda: PackedTokens.from_padded(padded(), None, HOLES.int()), TypeError, "must be bool"),
    (lambda: PackedTokens.from_nested(padded()), TypeError, "must be a nested"),
    (lambda: PackedTokens.from_padded(padded(), LENS).to_padded(3), ValueError, "the longest"),
    (
        lambda: PackedTokens.from_padded(padded(), LENS).with_values(torch.ones(5)),
        ValueError,
        "values has 5 rows, expected 6",
    ),
    (lambda: PackedTokens.join([]), ValueError, "there are no streams"),
    (
        lambda: PackedTokens.join(
            [PackedTokens.from_padded(padded()), PackedTokens.from_padded(padded(2, L, C))]
        ),
        ValueError,
        "a stream has 2 items but the first has 3",
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", MISTAKES, ids=[m[2] for m in MISTAKES])
def test_errors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# --- ProjectedContext --------------------------------------------------------------------------

MODULES = [
    lambda: CrossModalAttention(8, 2, num_kv_heads=1, context_dim=6, qk_norm="rms", gate="head"),
    lambda: MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True),
    lambda: MultiheadAttention(8, 2, bias=False),
]


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("form", ["padded", "packed", "holes", "jagged"])
def test_a_prepared_context_is_the_context(make: Any, form: str) -> None:
    """For any number of calls, reordered too, and with gradients."""
    module = make()
    width = module._plan_sizes().context_dim
    context = torch.randn(B, L, width, requires_grad=True)
    lens = LENS if form != "holes" else None
    given: Any = context
    if form == "packed":
        given, lens = PackedTokens.from_padded(context, LENS), None
    elif form == "holes":
        given = PackedTokens.from_padded(context, padding_mask=HOLES)
    elif form == "jagged":
        given = torch.nested.nested_tensor_from_jagged(
            torch.randn(6, width), torch.tensor([0, 4, 4, 6])
        )
        lens = None
    prepared = module.prepare_context(given, lens)
    assert prepared.packed == (form != "padded") and prepared.batch == B
    for rows in (1, 5):
        x = torch.randn(B, rows, 8)
        expected = module.attend(x, given, context_lens=lens)
        torch.testing.assert_close(module.attend(x, prepared), expected)
    order = torch.tensor([2, 0, 0, 1])
    x = torch.randn(4, 2, 8)
    back = module.attend(x, prepared.select(order))
    for i, item in enumerate(order.tolist()):
        whole = module.attend(x[i].expand(B, 2, 8), given, context_lens=lens)
        torch.testing.assert_close(back[i], whole[item])
    if form != "jagged":
        grads = [
            torch.autograd.grad(
                module.attend(x[:B], source, context_lens=n).sum(), context, retain_graph=True
            )[0]
            for source, n in ((given, lens), (prepared, None))
        ]
        torch.testing.assert_close(*grads)


def test_a_prepared_context_of_another_kind_is_refused() -> None:
    module = CrossModalAttention(8, 2)
    prepared = module.prepare_context(torch.randn(4, L, 8))
    x = torch.randn(2, 1, 8)
    with pytest.raises(ValueError, match="made for a batch of 4 but x has 2; call prepare_context"):
        module(x, prepared)
    with pytest.raises(ValueError, match="context_lens comes with a projected context"):
        module(torch.randn(4, 1, 8), prepared, context_lens=torch.ones(4).long())
    with pytest.raises(ValueError, match="is on meta but x is on cpu; call prepare_context again"):
        module(torch.randn(4, 1, 8), prepared.to("meta"))
    with pytest.raises(ValueError, match="has 2 heads of widths 4 and 4, expected 4 of 2 and 2"):
        CrossModalAttention(8, 4)(torch.randn(4, 1, 8), prepared)
    for items in (torch.tensor([0.0]), torch.tensor([[0]]), [0]):
        with pytest.raises(ValueError, match="items must be integers"):
            prepared.select(items)
    with pytest.raises(ValueError, match="items holds 4, allowed are 0 to 3"):
        prepared.select(torch.tensor([0, 4]))
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 4}):
        stock = MultiheadAttention(8, 2, **options)
        with pytest.raises(ValueError, match="call the module with query, key and value instead"):
            stock.prepare_context(torch.randn(2, L, 8))
    k, v = prepared.k, prepared.v
    with pytest.raises(ValueError, match="both hold the same keys"):
        ProjectedContext(k, v[:, :, 1:])
    with pytest.raises(ValueError, match="cu_seqlens needs max_len"):
        ProjectedContext(k[0], v[0], cu_seqlens=torch.tensor([0, L]))


@pytest.mark.parametrize("make", MODULES)
def test_projections_as_one(make: Any) -> None:
    """One product with `kv_weights`, taken apart by `kv_heads`, is what `prepare_context` does."""
    module = make()
    context = torch.randn(B, L, module._plan_sizes().context_dim)
    with torch.no_grad():
        k, v = module.kv_heads(torch.nn.functional.linear(context, *module.kv_weights()))
        prepared = module.prepare_context(context)
    torch.testing.assert_close(k.transpose(1, 2), prepared.k)
    torch.testing.assert_close(v.transpose(1, 2), prepared.v)
