"""What the attention kernels do by shape and layout, interpreted under the guard."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_helpers import interpreted, requires_triton  # noqa: F401

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, make_inputs

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]


def check(case: Case, dtype: torch.dtype = torch.float32, poison: bool = True):
    inputs = make_inputs(case, dtype)
    with mmfast.use_backend("triton"):
        results = tolerance.run(
            mmfast.cross_attention, inputs.poisoned() if poison else inputs
        )  # fmt: skip
    tolerance.assert_accurate(results, tolerance.truth(inputs))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("D", [16, 32, 40, 64, 72, 80, 96, 128, 192, 256])
def test_widths(D, dtype):
    """Five tiles of keys and a tail, whole and in parts, ragged."""
    check(Case("widths", 2, 1, 9, 141, D, kv_lens=(141, 66)), dtype)


@pytest.mark.parametrize("D, first, second", [
    (1, 16, 0), (16, 16, 0), (17, 32, 0), (40, 32, 16), (48, 32, 16), (64, 64, 0), (72, 64, 16),
    (80, 64, 16), (96, 64, 32), (97, 128, 0), (128, 128, 0), (160, 128, 32), (192, 128, 64),
    (193, 128, 128), (256, 128, 128),
])  # fmt: skip
def test_parts_of_a_width(D, first, second):
    """The least that tensor cores have to multiply."""
    from mmfast.kernels._attention_call import parts

    assert parts(D, 256) == (D, first, second)


@pytest.mark.parametrize("programs", [1, 7, 64])
@pytest.mark.parametrize("name", ["key_ranges_gate", "results_everything", "gqa_3_ragged"])
def test_any_number_of_splits(name, programs, monkeypatch):
    """One, which is what large problems have, and several."""
    from mmfast.kernels import _tuning

    monkeypatch.setattr(_tuning, "ATTENTION_PROGRAMS", programs)
    check(CROSS_ATTENTION[name])


def test_splits_cover_the_keys():
    from mmfast.kernels import _tuning

    for programs in (0, 1, 3, 100, 1000):
        for keys in (0, 1, 31, 32, 33, 1000, 4096):
            count, chunk = _tuning.key_splits(programs, keys, 32)
            assert chunk % 32 == 0 and count >= 1
            assert count == 1 or (count - 1) * chunk < keys <= count * chunk
            assert count == 1 or count * programs <= _tuning.ATTENTION_PROGRAMS


def _launches(monkeypatch):
    from mmfast.kernels import _launch

    seen, run = [], _launch._run

    def recorded(kernel, programs, args, constants):
        seen.append((kernel.fn.__name__, programs, constants))
        run(kernel, programs, args, constants)

    monkeypatch.setattr(_launch, "_run", recorded)
    return seen


def test_what_is_launched(monkeypatch):
    """Two kernels more for splits, none for what nobody asked for, none for nothing."""
    q, k = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 50, 16)
    seen = _launches(monkeypatch)

    def names():
        found = [name.removeprefix("cross_attention_").removesuffix("_kernel") for name, *_ in seen]
        seen.clear()
        return found

    with mmfast.use_backend("triton"):
        mmfast.cross_attention(q, k, k)
        assert names() == ["fwd"]
        mmfast.cross_attention(
            q[:1, :1], k.repeat(1, 1, 9, 1)[:1, :1], k.repeat(1, 1, 9, 1)[:1, :1]
        )
        assert names() == ["fwd", "merge"]
        x = q.clone().requires_grad_()
        mmfast.cross_attention(x, k, k).sum().backward()
        assert names() == ["fwd", "rows", "dkv", "dq"]
        mmfast.cross_attention(q, k, k, return_importance=True, return_weights=True)
        assert names() == ["fwd", "pairs", "pairs"]
        mmfast.cross_attention(q[:0], k[:0], k[:0])
        mmfast.cross_attention(q[:, :, :0], k, k)
        assert names() == []


def test_few_queries_of_many_heads_share_a_tile(monkeypatch):
    seen = _launches(monkeypatch)
    q, k = torch.randn(1, 16, 3, 16), torch.randn(1, 2, 20, 16)
    with mmfast.use_backend("triton"):
        out = mmfast.cross_attention(q, k, k)
    ((_, programs, constants),) = seen
    assert constants["FORM"].packed and programs == 2
    torch.testing.assert_close(out, mmfast.reference.cross_attention(q, k, k))


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "nbhd", "packed", "sliced", "misaligned"])
def test_memory_of_the_results_follows_the_inputs(layout):
    results = check(Case("layout", 2, 3, 20, 35, 16, layout=layout), poison=False)
    for name in ("out", "dq", "dk", "dv"):
        straight = results[name].is_contiguous()
        assert straight or results[name].transpose(1, 2).is_contiguous(), name
        assert straight == (layout in ("bhnd", "sliced", "misaligned")), name


def test_results_do_not_depend_on_what_is_padded_to():
    """More padding, the same bits."""
    q = torch.randn(2, 2, 20, 16)
    k, lens = torch.randn(2, 2, 90, 16), torch.tensor([70, 33])
    with mmfast.use_backend("triton"):
        some = mmfast.cross_attention(q, k[:, :, :72], k[:, :, :72], kv_lens=lens)
        more = mmfast.cross_attention(q, k, k, kv_lens=lens)
    torch.testing.assert_close(some, more)


def test_offsets_beyond_32_bits():
    """Rows and heads that lie 2^31 elements apart; the memory between is never touched."""
    apart = 2**31 + 16

    def far(stride_h, stride_n):
        memory = torch.UntypedStorage(2 * (stride_h + 3 * stride_n + 64))
        tensor = torch.empty(0, dtype=torch.float16)
        tensor.set_(memory, 0, (1, 2, 3, 16), (0, stride_h, stride_n, 1))
        return tensor.copy_(torch.randn(1, 2, 3, 16))

    with mmfast.use_backend("triton"):
        for q in (far(apart, 16), far(16, apart // 2)):
            got = mmfast.cross_attention(q, q, q)
            near = q.contiguous()
            torch.testing.assert_close(got, mmfast.cross_attention(near, near, near))


def test_an_incoming_gradient_whose_rows_lie_apart():
    """A view of something larger: the rows of its tiles need 64-bit offsets of their own."""
    apart = 2**31 // 16
    memory = torch.UntypedStorage(2 * (20 * apart + 64))  # never touched but for its rows
    dout = torch.empty(0, dtype=torch.float16)
    dout.set_(memory, 0, (1, 1, 20, 16), (0, 0, apart, 1)).copy_(torch.randn(1, 1, 20, 16))
    q, k = torch.randn(1, 1, 20, 16).half().requires_grad_(), torch.randn(1, 1, 40, 16).half()
    grads = []
    for incoming in (dout, dout.contiguous()):
        with mmfast.use_backend("triton"):
            out = mmfast.cross_attention(q, k, k)
            grads += torch.autograd.grad(out, q, incoming)
    assert torch.equal(*grads)


def test_gradients_that_nobody_needs():
    from mmfast.kernels.cross_attention_bwd import cross_attention_bwd

    case = CROSS_ATTENTION["dropout_gate_bias"]
    inputs = make_inputs(case)
    options = inputs.options
    common = (None, None, None, None, None, options["bias"], None, None,
              options["gate"], torch.tensor([5]), 0.25, case.dropout_p, False, 0, 0, 0)  # fmt: skip
    from mmfast.kernels.cross_attention import cross_attention_fwd

    out, lse = cross_attention_fwd(inputs.q, inputs.k, inputs.v, *common)
    given = (inputs.dout, None, inputs.q, inputs.k, inputs.v, out, lse, *common)
    some, every = (cross_attention_bwd(*given, bias, True) for bias in (False, True))
    assert some[3].shape == (0,) and every[3].shape == options["bias"].shape
    for a, b in zip(some[:3] + some[4:], every[:3] + every[4:], strict=True):
        assert torch.equal(a, b)
    bare = (None,) * 10 + (0.25, 0.0, False, 0, 0, 0)
    *_, dbias, dgate = cross_attention_bwd(
        inputs.dout, None, inputs.q, inputs.k, inputs.v, out, lse, *bare, False, True
    )
    assert dbias.shape == dgate.shape == (0,)


def test_a_gradient_through_the_lse_alone():
    q, k = torch.randn(1, 2, 20, 16, requires_grad=True), torch.randn(1, 2, 40, 16)
    with mmfast.use_backend("triton"):
        lse = mmfast.cross_attention(q, k, k, return_lse=True).lse
        (dq,) = torch.autograd.grad(lse.sum(), q)
    expected = mmfast.reference.cross_attention(q, k, k, return_lse=True).lse
    torch.testing.assert_close(dq, torch.autograd.grad(expected.sum(), q)[0])


@pytest.mark.parametrize("D", [16, 72, 128, 192])
def test_values_in_halves(D, monkeypatch):
    """As where products take their operands from registers."""
    from mmfast.kernels import _tuning

    monkeypatch.setattr(_tuning, "halves", lambda name, itemsize: (128, 64))
    check(Case("halves", 1, 2, 9, 70, D, Dv=64, kv_lens=(67,)))


@pytest.mark.parametrize("case", [
    Case("plain", 2, 2, 20, 141, 64, kv_lens=(141, 70), layout="bnhd"),
    Case("halves", 1, 2, 9, 70, 256, kv_lens=(67,), G=1),
    Case("shared", 2, 2, 20, 70, 16, layout="expanded_b"),  # no stride: not described
    Case("parts", 1, 1, 20, 70, 72),  # two sizes: not described
    Case("misaligned", 1, 2, 20, 70, 32, layout="misaligned"),
    Case("everything", 2, 4, 20, 140, 32, G=2, Dv=48, bias="B1NM", segments="images",
         kv_lens=(140, 60), dropout_p=0.2, gate="full", is_causal=True),
    Case("pairs", 2, 2, 20, 140, 32, importance=True, weights=True, kv_lens=(140, 60)),
], ids=lambda case: case.name)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_keys_read_by_descriptors(case, dtype, monkeypatch):
    from mmfast.kernels import _tuning

    monkeypatch.setattr(_tuning, "wants_descriptors", lambda name, work: True)
    seen = _described(monkeypatch)
    check(case, dtype, poison=case.layout == "bhnd")
    assert any(seen) == (case.name not in ("shared", "parts", "misaligned"))


def _described(monkeypatch):
    from mmfast.kernels import _launch
    from triton.tools.tensor_descriptor import TensorDescriptor

    seen, run = [], _launch._run

    def recorded(kernel, programs, args, constants):
        seen.append(any(isinstance(arg, TensorDescriptor) for arg in args))
        run(kernel, programs, args, constants)

    monkeypatch.setattr(_launch, "_run", recorded)
    return seen


def test_when_descriptors_are_wanted():
    from mmfast.kernels._tuning import wants_descriptors

    assert wants_descriptors("sm_90", 10**12) and wants_descriptors("sm_120", 10**12)
    assert not wants_descriptors("sm_90", 10**6)
    assert not any(wants_descriptors(name, 10**12) for name in ("sm_89", "gfx942", "interpreted"))


@pytest.mark.parametrize("change", [
    "nothing", "scale", "causal", "rule", "no mask", "float32 bias", "bias shape", "gate", "lens",
    "layout", "key layout", "keys", "dropout", "no dropout",
])  # fmt: skip
def test_what_is_kept_of_a_launch(change, monkeypatch):
    """A second call that differs in one thing is not taken for the first."""
    from mmfast.kernels import _attention_call, cross_attention

    monkeypatch.setattr(_attention_call, "KEEP_EVERYWHERE", True)
    monkeypatch.setattr(cross_attention, "_plans", {})
    case = Case("kept", 2, 4, 20, 70, 16, G=2, segments="images", mask="B1NM", bias="1HNM",
                bias_dtype="same", gate="head", kv_lens=(70, 33), dropout_p=0.2)  # fmt: skip
    changes = {
        "scale": {"scale": -0.7}, "causal": {"is_causal": True},
        "rule": {"segment_rule": "at_most"},
        "no mask": {"mask": None}, "bias shape": {"bias": "B11M"}, "gate": {"gate": "full"},
        "lens": {"kv_lens": None}, "layout": {"layout": "bnhd", "kv_layout": "bhnd"},
        "key layout": {"kv_layout": "nbhd"}, "keys": {"M": 90}, "dropout": {"dropout_p": 0.5},
        "no dropout": {"dropout_p": 0.0},
    }  # fmt: skip
    dtype = torch.float16
    first, other = case, dataclasses.replace(case, **changes.get(change, {}))
    if change == "float32 bias":
        other = dataclasses.replace(case, bias_dtype="float32")
    for one in (first, other, first):
        inputs = make_inputs(one, dtype)
        with mmfast.use_backend("triton"):
            results = tolerance.run(mmfast.cross_attention, inputs, backward=False)
        tolerance.assert_accurate(results, tolerance.truth(inputs, backward=False))
    assert len(cross_attention._plans) == (1 if change == "nothing" else 2)
