"""`cross_attention` on packed rows: what the padded form gives, bit for bit on the CPU."""

from __future__ import annotations

import pytest
import torch

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, functional_cases, make_inputs
from mmfast.testing.packing import SIDES, packed

SIDE_IDS = ["_and_".join(sides) for sides in SIDES]
NAMES = [case.name for case in functional_cases()]
FEW = ["dense", "both_lens", "causal_lens", "one_query_lens", "segments_everything", "gqa_3_ragged"]


def _both(name, dtype, sides):
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    expected = tolerance.run(mmfast.cross_attention, inputs)
    return expected, tolerance.run(packed(mmfast.cross_attention, sides), inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sides", "dtype"),
    [(("q",), torch.float32), (("kv",), torch.float32), (("q", "kv"), torch.bfloat16)],
    ids=["q-float32", "kv-float32", "q_and_kv-bfloat16"],
)
def test_every_case_equals_its_padded_form(name, sides, dtype):
    """Rows of no item are NaN; the kernels read what lies elsewhere in the same order."""
    expected, got = _both(name, dtype, sides)
    for result, tensor in expected.items():
        assert torch.equal(got[result], tensor), result


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("sides", SIDES, ids=SIDE_IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["float16", "float64"])
def test_each_kernel(name, dtype, sides, implementation):
    """Every instruction set and the reference, under the one ruler."""
    against = tolerance.truth(make_inputs(CROSS_ATTENTION[name], dtype))
    results = tolerance.run(packed(mmfast.cross_attention, sides), against.inputs)
    tolerance.assert_accurate(results, against)


def _problem():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(7, 2, 8, generator=g).transpose(0, 1)
    k = torch.randn(9, 2, 8, generator=g).transpose(0, 1)
    return q, k, torch.tensor([0, 3, 3, 7]), torch.tensor([0, 0, 4, 9])


def test_lengths_are_read_where_they_are_not_given(implementation):
    q, k, rows, keys = _problem()
    asked = {"return_lse": True, "return_importance": True, "return_weights": True}
    result = mmfast.cross_attention(q, k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys, **asked)
    assert result.out.shape == (2, 7, 8)
    assert result.lse.shape == (3, 2, 4)
    assert result.importance.shape == (3, 2, 5)
    assert result.weights.shape == (3, 4, 5)
    assert not result.out[:, :3].any()  # the first item has no keys
    more = mmfast.cross_attention(
        q, k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys, max_q_len=6, max_kv_len=11, **asked
    )
    torch.testing.assert_close(more.out, result.out)
    assert more.weights.shape == (3, 6, 11)
    torch.testing.assert_close(more.weights[:, :4, :5], result.weights)


def test_no_items(implementation):
    q, k, *_ = _problem()
    none = torch.zeros(1, dtype=torch.int32)
    out = mmfast.cross_attention(q, k, k, q_cu_seqlens=none, kv_cu_seqlens=none)
    assert torch.equal(out, torch.zeros_like(q))


def test_gradients_of_rows_outside_are_zero(implementation):
    q, k, rows, keys = _problem()
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    out = mmfast.cross_attention(q, k, k * 1, q_cu_seqlens=rows[1:], kv_cu_seqlens=keys[1:])
    assert not out[:, :3].any()
    assert out[:, 3:].any()
    dq, dk = torch.autograd.grad(out.sum(), [q, k])
    assert not dq[:, :3].any()
    assert dk[:, :9].any()


def test_compiled(implementation):
    q, k, rows, keys = _problem()

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(q, k, rows, keys):
        return mmfast.cross_attention(
            q, k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys, max_q_len=4, max_kv_len=5
        )

    expected = mmfast.cross_attention(q, k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys)
    torch.testing.assert_close(attend(q, k, rows, keys), expected)


@pytest.mark.parametrize(
    ("keys", "most", "message"),
    [
        ([5, 4, 4, 1], 5, "must rise from 0"),
        ([0, 0, 4, 9], 4, "longer than max_q_len or max_kv_len"),
    ],
)
@pytest.mark.usefixtures("compiled_library")
def test_compiled_with_bad_lengths(keys, most, message):
    """A graph looks at no values; the kernels refuse what would read or leave the wrong memory."""
    q, k, rows, _ = _problem()

    @torch.compile(fullgraph=True, backend="eager")
    def attend(q, k, rows, keys):
        return mmfast.cross_attention(
            q, k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys, max_q_len=4, max_kv_len=most
        )

    with pytest.raises(RuntimeError, match=message):
        attend(q, k, rows, torch.tensor(keys))


def test_opcheck(backend):
    q, k, rows, keys = _problem()
    lens = [(x[1:] - x[:-1]).to(torch.int32) for x in (keys, rows)]
    starts = [x.to(torch.int32) for x in (rows, keys)]
    q, k, v = (x.unsqueeze(0).clone().requires_grad_() for x in (q, k, k))
    gate = torch.randn(1, 7, 2, requires_grad=True)
    args = (q, k, v, *lens, None, None, None, None, *starts, gate, None, 0.3, 0.0, False, 0, 4, 5)
    torch.library.opcheck(torch.ops.mmfast.cross_attention_fwd.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lens": torch.tensor([1, 1, 1])}, "kv_lens and kv_cu_seqlens are both given"),
        ({"q_lens": torch.tensor([1, 1, 1])}, "q_lens and q_cu_seqlens are both given"),
        ({"kv_cu_seqlens": torch.tensor([0, 4, 2, 9])}, "falls from 4 to 2 at position 2"),
        ({"kv_cu_seqlens": torch.tensor([0, 4, 5, 10])}, "holds 10, allowed are 0 to 9"),
        ({"kv_cu_seqlens": torch.tensor([0, 9])}, "has B=1 items but q_cu_seqlens has B=3"),
        ({"q_cu_seqlens": None}, "q has 3 dims"),
        ({"max_kv_len": 4}, "max_kv_len is 4 but kv_cu_seqlens has an item of length 5"),
        ({"q_cu_seqlens": torch.tensor([[0, 7]])}, "expected [B + 1]"),
        ({"gate": torch.zeros(6, 2)}, "expected [Tq, H] or [Tq, H, Dv] with Tq=7"),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, "does not broadcast"),
    ],
)
def test_bad_arguments(change, message):
    q, k, rows, keys = _problem()
    given = {"q_cu_seqlens": rows, "kv_cu_seqlens": keys} | change
    with pytest.raises(ValueError, match="cross_attention") as caught:
        mmfast.cross_attention(q, k, k, **given)
    assert message in str(caught.value)


def test_a_given_seed_takes_the_place_of_the_drawn_one(implementation):
    q, k, rows, keys = _problem()
    options = {"q_cu_seqlens": rows, "kv_cu_seqlens": keys, "dropout_p": 0.5}
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,))
    torch.manual_seed(5)
    drawn = mmfast.cross_attention(q, k, k, **options)
    assert torch.equal(mmfast.cross_attention(q, k, k, dropout_seed=seed, **options), drawn)
    with pytest.raises(TypeError, match="dropout_seed must be an int64 tensor"):
        mmfast.cross_attention(q, k, k, dropout_seed=seed.float(), **options)


def test_bad_types():
    q, k, rows, keys = _problem()
    with pytest.raises(TypeError, match="max_kv_len must be a Python int"):
        mmfast.cross_attention(
            q, k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys, max_kv_len=torch.tensor(5)
        )
    with pytest.raises(TypeError, match="kv_cu_seqlens must be an integer tensor"):
        mmfast.cross_attention(q, k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys.float())
    with pytest.raises(ValueError, match="go with q_cu_seqlens and kv_cu_seqlens"):
        mmfast.cross_attention(q[None], k[None], k[None], max_kv_len=9)
    with pytest.raises(ValueError, match="put the rows of all items one after the other"):
        mmfast.cross_attention(q[None], k, k, q_cu_seqlens=rows, kv_cu_seqlens=keys)
