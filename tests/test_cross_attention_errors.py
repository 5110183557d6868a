"""Every message of bad input, whole: op, argument, expected, got, remedy. Also under compile."""

from __future__ import annotations

import pytest
import torch

import mmfast

B, H, N, M, D, Dv = 2, 4, 5, 7, 8, 6


def _base():
    return {
        "q": torch.zeros(B, H, N, D),
        "k": torch.zeros(B, H, M, D),
        "v": torch.zeros(B, H, M, Dv),
    }


def _zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


_LENS = "give one integer for each"
_INTEGER = "must be an integer tensor (int32 is taken as it is), got"
_INTEGER_FIX = "convert it with .to(torch.int32)"
_BROADCAST = (
    "which does not broadcast to [B, H, N, M] = [2, 4, 5, 7]; every dim must be 1 or that size"
)
_SPARSE = "convert it with .to_dense(), or pad it and pass lengths"

# name: (changes to the arguments, exception, message after "cross_attention: ")
ERRORS = {
    # --- q, k, v ---
    "q not a tensor": (
        {"q": [1.0]},
        TypeError,
        "q must be a torch.Tensor, got list; convert it with torch.as_tensor",
    ),
    "v not a tensor": (
        {"v": 1.0},
        TypeError,
        "v must be a torch.Tensor, got float; convert it with torch.as_tensor",
    ),
    "k sparse": (
        {"k": _zeros(B, H, M, D).to_sparse()},
        TypeError,
        f"k must be a dense (strided) tensor, got layout torch.sparse_coo; {_SPARSE}",
    ),
    "q without heads": (
        {"q": _zeros(B, N, D)},
        ValueError,
        "q has 3 dims (shape [2, 5, 8]), expected [B, H, N, D]; "
        "add the missing dims with unsqueeze or split the heads with unflatten",
    ),
    "v without heads": (
        {"v": _zeros(M, Dv)},
        ValueError,
        "v has 2 dims (shape [7, 6]), expected [B, G, M, Dv]; "
        "add the missing dims with unsqueeze or split the heads with unflatten",
    ),
    "k batch": (
        {"k": _zeros(1, H, M, D)},
        ValueError,
        "k has B=1 but q has B=2; both must match; expand the smaller one",
    ),
    "v batch": (
        {"v": _zeros(3, H, M, Dv)},
        ValueError,
        "v has B=3 but q has B=2; both must match; expand the smaller one",
    ),
    "k width": (
        {"k": _zeros(B, H, M, 96), "q": _zeros(B, H, N, 64)},
        ValueError,
        "k has D=96 but q has D=64; both must match; project them to one head width",
    ),
    "v keys": (
        {"v": _zeros(B, H, M + 1, Dv)},
        ValueError,
        "v has M=8 but k has M=7; both must match; keys and values come in pairs",
    ),
    "v heads": (
        {"v": _zeros(B, 2, M, Dv)},
        ValueError,
        "v has G=2 but k has G=4; both must match; keys and values come in pairs",
    ),
    "H not a multiple of G": (
        {"k": _zeros(B, 3, M, D), "v": _zeros(B, 3, M, Dv)},
        ValueError,
        "q has H=4 heads, which is not a multiple of the G=3 heads of k; "
        "repeat the key and value heads or change H",
    ),
    "more key heads than heads": (
        {"k": _zeros(B, 8, M, D), "v": _zeros(B, 8, M, Dv)},
        ValueError,
        "q has H=4 heads, which is not a multiple of the G=8 heads of k; "
        "repeat the key and value heads or change H",
    ),
    "no heads": (
        {"k": _zeros(B, 0, M, D), "v": _zeros(B, 0, M, Dv)},
        ValueError,
        "q has H=4 and k has G=0 heads; both must be at least 1",
    ),
    "no width": (
        {"v": _zeros(B, H, M, 0)},
        ValueError,
        "D=8 and Dv=0; head widths must be at least 1",
    ),
    "q integer": (
        {"q": _zeros(B, H, N, D, dtype=torch.int64)},
        TypeError,
        "q has dtype torch.int64, expected float32, bfloat16, float16 or float64; "
        "convert q, k and v with .float()",
    ),
    "q complex": (
        {"q": _zeros(B, H, N, D, dtype=torch.complex64)},
        TypeError,
        "q has dtype torch.complex64, expected float32, bfloat16, float16 or float64; "
        "convert q, k and v with .float()",
    ),
    "k dtype": (
        {"k": _zeros(B, H, M, D, dtype=torch.float16)},
        TypeError,
        "k has dtype torch.float16 but q has torch.float32; both must match; "
        "convert it with .to(q.dtype) or use autocast",
    ),
    "v dtype": (
        {"v": _zeros(B, H, M, Dv, dtype=torch.float64)},
        TypeError,
        "v has dtype torch.float64 but q has torch.float32; both must match; "
        "convert it with .to(q.dtype) or use autocast",
    ),
    "k device": (
        {"k": _zeros(B, H, M, D, device="meta")},
        ValueError,
        "k is on meta but q is on cpu; move all tensors to one device",
    ),
    "q device": (
        {"q": _zeros(B, H, N, D, device="meta")},
        ValueError,
        "k is on cpu but q is on meta; move all tensors to one device",
    ),
    # --- lengths ---
    "kv_lens a list": (
        {"kv_lens": [1, 2]},
        TypeError,
        "kv_lens must be a torch.Tensor, got list; convert it with torch.as_tensor",
    ),
    "kv_lens float": (
        {"kv_lens": torch.tensor([1.0, 2.0])},
        TypeError,
        f"kv_lens {_INTEGER} torch.float32; {_INTEGER_FIX}",
    ),
    "q_lens bool": (
        {"q_lens": torch.tensor([True, False])},
        TypeError,
        f"q_lens {_INTEGER} torch.bool; {_INTEGER_FIX}",
    ),
    "kv_lens of one item": (
        {"kv_lens": torch.tensor([1])},
        ValueError,
        f"kv_lens has shape [1], expected [2]; {_LENS}",
    ),
    "q_lens as a column": (
        {"q_lens": torch.tensor([[1], [2]])},
        ValueError,
        f"q_lens has shape [2, 1], expected [2]; {_LENS}",
    ),
    "kv_lens elsewhere": (
        {"kv_lens": _zeros(B, dtype=torch.int32, device="meta")},
        ValueError,
        "kv_lens is on meta but q is on cpu; move all tensors to one device",
    ),
    "kv_lens beyond M": (
        {"kv_lens": torch.tensor([3, 8])},
        ValueError,
        "kv_lens holds 8, allowed are 0 to 7; clamp it",
    ),
    "kv_lens negative": (
        {"kv_lens": torch.tensor([-1, 3], dtype=torch.int32)},
        ValueError,
        "kv_lens holds -1, allowed are 0 to 7; clamp it",
    ),
    "kv_lens beyond int32": (
        {"kv_lens": torch.tensor([2**32, 0])},
        ValueError,
        "kv_lens holds 4294967296, allowed are 0 to 7; clamp it",
    ),
    "q_lens beyond N": (
        {"q_lens": torch.tensor([6, 0], dtype=torch.uint8)},
        ValueError,
        "q_lens holds 6, allowed are 0 to 5; clamp it",
    ),
    # --- segments ---
    "q_segments alone": (
        {"q_segments": _zeros(B, N, dtype=torch.int32)},
        ValueError,
        "kv_segments is missing; q_segments and kv_segments come together or not at all",
    ),
    "kv_segments alone": (
        {"kv_segments": _zeros(B, M, dtype=torch.int32)},
        ValueError,
        "q_segments is missing; q_segments and kv_segments come together or not at all",
    ),
    "q_segments of the wrong length": (
        {
            "q_segments": _zeros(B, M, dtype=torch.int32),
            "kv_segments": _zeros(B, M, dtype=torch.int32),
        },
        ValueError,
        f"q_segments has shape [2, 7], expected [2, 5]; {_LENS}",
    ),
    "kv_segments of the wrong length": (
        {
            "q_segments": _zeros(B, N, dtype=torch.int32),
            "kv_segments": _zeros(M, dtype=torch.int32),
        },
        ValueError,
        f"kv_segments has shape [7], expected [2, 7]; {_LENS}",
    ),
    "segments float": (
        {"q_segments": _zeros(B, N), "kv_segments": _zeros(B, M)},
        TypeError,
        f"q_segments {_INTEGER} torch.float32; {_INTEGER_FIX}",
    ),
    "segments beyond int32": (
        {
            "q_segments": torch.full((B, N), 2**31),
            "kv_segments": _zeros(B, M, dtype=torch.int64),
        },
        ValueError,
        "q_segments holds 2147483648, allowed are -2147483648 to 2147483647; renumber it",
    ),
    "segment_rule": (
        {"segment_rule": "below"},
        ValueError,
        "segment_rule is 'below'; it must be 'equal' or 'at_most'",
    ),
    # --- mask, bias, gate ---
    "mask float": (
        {"mask": _zeros(N, M)},
        TypeError,
        "mask must be bool (True = may attend), got torch.float32; "
        "give additive scores as bias, or convert it with .bool()",
    ),
    "mask a list": (
        {"mask": [True]},
        TypeError,
        "mask must be a torch.Tensor, got list; convert it with torch.as_tensor",
    ),
    "mask elsewhere": (
        {"mask": _zeros(N, M, dtype=torch.bool, device="meta")},
        ValueError,
        "mask is on meta but q is on cpu; move all tensors to one device",
    ),
    "mask does not broadcast": (
        {"mask": _zeros(B, M, dtype=torch.bool)},
        ValueError,
        f"mask has shape [2, 7], {_BROADCAST}",
    ),
    "mask with too many dims": (
        {"mask": _zeros(1, B, H, N, M, dtype=torch.bool)},
        ValueError,
        f"mask has shape [1, 2, 4, 5, 7], {_BROADCAST}",
    ),
    "bias bool": (
        {"bias": _zeros(N, M, dtype=torch.bool)},
        TypeError,
        "bias must be torch.float32 (the dtype of q), got torch.bool; "
        "convert it with .to(q.dtype)",
    ),
    "bias float64": (
        {"bias": _zeros(N, M, dtype=torch.float64)},
        TypeError,
        "bias must be torch.float32 (the dtype of q), got torch.float64; "
        "convert it with .to(q.dtype)",
    ),
    "bias bfloat16 beside float16": (
        {
            **{name: tensor.half() for name, tensor in _base().items()},
            "bias": _zeros(N, M, dtype=torch.bfloat16),
        },
        TypeError,
        "bias must be torch.float16 (the dtype of q) or torch.float32, got torch.bfloat16; "
        "convert it with .to(q.dtype)",
    ),
    "bias float32 beside float64": (
        {**{name: tensor.double() for name, tensor in _base().items()}, "bias": _zeros(N, M)},
        TypeError,
        "bias must be torch.float64 (the dtype of q), got torch.float32; "
        "convert it with .to(q.dtype)",
    ),
    "bias does not broadcast": (
        {"bias": _zeros(H, 1, N)},
        ValueError,
        f"bias has shape [4, 1, 5], {_BROADCAST}",
    ),
    "bias elsewhere": (
        {"bias": _zeros(N, M, device="meta")},
        ValueError,
        "bias is on meta but q is on cpu; move all tensors to one device",
    ),
    "gate heads first": (
        {"gate": _zeros(B, H, N)},
        ValueError,
        "gate has shape [2, 4, 5], expected [B, N, H] = [2, 5, 4] or "
        "[B, N, H, Dv] = [2, 5, 4, 6]; it holds one logit for each row and head, "
        "or for each output",
    ),
    "gate width": (
        {"gate": _zeros(B, N, H, D)},
        ValueError,
        "gate has shape [2, 5, 4, 8], expected [B, N, H] = [2, 5, 4] or "
        "[B, N, H, Dv] = [2, 5, 4, 6]; it holds one logit for each row and head, "
        "or for each output",
    ),
    "gate dtype": (
        {"gate": _zeros(B, N, H, dtype=torch.bfloat16)},
        TypeError,
        "gate must be torch.float32 (the dtype of q), got torch.bfloat16; "
        "convert it with .to(q.dtype)",
    ),
    "gate elsewhere": (
        {"gate": _zeros(B, N, H, device="meta")},
        ValueError,
        "gate is on meta but q is on cpu; move all tensors to one device",
    ),
    # --- numbers and flags ---
    "scale a tensor": (
        {"scale": torch.tensor(0.5)},
        TypeError,
        "scale must be a Python number or None, got Tensor; "
        "a learned scale can be multiplied into q",
    ),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
    "dropout_p 1": (
        {"dropout_p": 1.0},
        ValueError,
        "dropout_p is 1.0, expected 0 <= dropout_p < 1; "
        "it is the probability that a weight is dropped",
    ),
    "dropout_p negative": (
        {"dropout_p": -0.1},
        ValueError,
        "dropout_p is -0.1, expected 0 <= dropout_p < 1; "
        "it is the probability that a weight is dropped",
    ),
    "dropout_p a string": (
        {"dropout_p": "0.1"},
        TypeError,
        "dropout_p must be a Python number, got str; convert it with float()",
    ),
    "return_weights": (
        {"return_weights": "max"},
        ValueError,
        "return_weights is 'max'; it must be False, True, 'mean' or 'per_head'",
    ),
}  # fmt: skip


def _arguments(changes):
    arguments = {**_base(), **changes}
    return [arguments.pop(name) for name in ("q", "k", "v")], arguments


@pytest.mark.parametrize("name", ERRORS)
def test_message(name, backend):
    changes, kind, message = ERRORS[name]
    args, options = _arguments(changes)
    with pytest.raises(kind) as caught:
        mmfast.cross_attention(*args, **options)
    assert str(caught.value) == f"cross_attention: {message}"


def test_bad_input_touches_nothing():
    """A rejected call draws no seed."""
    args, options = _arguments({"mask": _zeros(N, M), "dropout_p": 0.5})
    before = torch.get_rng_state()
    with pytest.raises(TypeError):
        mmfast.cross_attention(*args, **options)
    assert torch.equal(torch.get_rng_state(), before)


# One of each kind of check; values of tensors are known only when the graph runs.
_COMPILED = [
    "q without heads", "k width", "H not a multiple of G", "k dtype", "kv_lens float",
    "kv_lens of one item", "mask float", "bias does not broadcast", "gate heads first",
    "dropout_p 1", "segment_rule", "kv_lens beyond M", "kv_lens negative",
    "segments beyond int32",
]  # fmt: skip


@pytest.mark.parametrize("name", _COMPILED)
def test_message_under_compile(name, backend):
    changes, kind, message = ERRORS[name]
    args, options = _arguments(changes)
    torch.compiler.reset()
    compiled = torch.compile(mmfast.cross_attention, backend="aot_eager")
    with pytest.raises(kind) as caught:
        compiled(*args, **options)
    assert str(caught.value) == f"cross_attention: {message}"


@pytest.mark.parametrize("name", ["k width", "mask float", "kv_lens beyond M"])
def test_message_under_fullgraph(name, backend):
    """torch.compile may wrap an error raised while it traces; the sentence is in it."""
    changes, _, message = ERRORS[name]
    args, options = _arguments(changes)
    torch.compiler.reset()
    compiled = torch.compile(mmfast.cross_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception) as caught:
        compiled(*args, **options)
    assert message in str(caught.value)


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize(("D", "Dv"), [(8193, 16), (16, 8193)])
def test_the_torch_op_itself_refuses_wide_heads(D, Dv):
    """The kernels' buffers hold 8192: a caller past the public function must not pass them."""
    with mmfast.use_backend("cpu"):
        mmfast.cross_attention(*[torch.ones(1, 1, 1, 1)] * 3)  # loads
    q, k, v = torch.ones(1, 1, 2, D), torch.ones(1, 1, 3, D), torch.ones(1, 1, 3, Dv)
    with pytest.raises(RuntimeError, match="head widths"):
        torch.ops.mmfast.cross_attention_fwd(q, k, v, *[None] * 10, 1.0, 0.0, False, 0, 0, 0)
