"""Derivatives: gradcheck in float64, second order, forward mode, vmap, hooks, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import mmfast
from mmfast.testing.cases import Case, make_inputs

_SIZES = {"B": 2, "H": 2, "N": 3, "M": 4, "D": 3, "G": 1, "Dv": 2}
_LENS = {"kv_lens": (4, 2), "q_lens": (2, 3)}

# Small, because every input element costs two calls.
GRADCHECK = [
    Case("plain", **_SIZES),
    Case("lens", **_SIZES, **_LENS),
    Case("missing", **{**_SIZES, "kv_lens": (4, 0)}),
    Case("causal", **_SIZES, is_causal=True),
    Case("segments", **_SIZES, segments="images", segment_rule="at_most"),
    Case("mask", **_SIZES, mask="BHNM", mask_kind="dead_rows"),
    Case("gate_head", **_SIZES, gate="head"),
    Case("gate_full", **_SIZES, gate="full", **_LENS),
    Case("dropout", **_SIZES, dropout_p=0.4, gate="head"),
    Case("importance", **_SIZES, importance=True, **_LENS),
    Case("weights_mean", **_SIZES, weights="mean", bias="1HNM"),
    Case("weights_per_head", **_SIZES, weights="per_head", **_LENS),
    Case("everything", **_SIZES, importance=True, weights="mean", bias="B1NM", gate="full",
         dropout_p=0.3, is_causal=True, layout="bnhd"),
    *[
        Case(f"bias_{dims}", **_SIZES, bias=dims)
        for dims in ("BHNM", "1HNM", "B1NM", "BH1M", "BHN1", "11NM", "1H1M", "B11M", "1111", "NM")
    ],
]  # fmt: skip


def _function(case):
    """A function of the differentiable inputs that gives every result, the LSE included."""
    inputs = make_inputs(case, torch.float64)
    options = dict(inputs.options)
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    leaves |= {name: options.pop(name) for name in ("bias", "gate") if name in options}
    names = list(leaves)

    def function(*tensors):
        torch.manual_seed(3)  # the same dropout mask every time
        q, k, v, *side = tensors
        result = mmfast.cross_attention(
            q, k, v, **options, **dict(zip(names[3:], side, strict=True)), return_lse=True
        )
        # Where a row sees nothing its LSE is -inf: differences of it mean nothing.
        parts = [result.out, result.lse.masked_fill(result.lse.isinf(), 0.0)]
        parts += [part for part in result[2:] if part is not None]
        return tuple(parts)

    return function, [leaf.detach().clone().requires_grad_() for leaf in leaves.values()]


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda case: case.name)
def test_gradcheck(case, implementation):
    function, leaves = _function(case)
    assert gradcheck(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize(
    "case", [c for c in GRADCHECK if not c.name.startswith("bias_") or c.name == "bias_B1NM"],
    ids=lambda case: case.name,
)  # fmt: skip
def test_gradgradcheck_on_the_reference(case):
    with mmfast.use_backend("reference"):
        function, leaves = _function(case)
        assert gradgradcheck(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda case: case.name)
def test_forward_mode(case):
    """`auto` finds the backend that has forward-mode derivatives."""
    function, leaves = _function(case)
    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)


# --- second order and forward mode on the compiled backend: right, or a clear error -------------


def _qkv(dtype=torch.float64, **sizes):
    inputs = make_inputs(Case("qkv", **{**_SIZES, **sizes}), dtype)
    return [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize("flags", [{}, {"return_importance": True}, {"return_weights": True}])
def test_double_backward_says_what_to_do(flags):
    leaves = _qkv()
    with mmfast.use_backend("cpu"):
        result = mmfast.cross_attention(*leaves, **flags)
    last = [part for part in result if part is not None][-1] if flags else result
    # create_graph alone is no error, and gives the same gradient.
    graphed = torch.autograd.grad(last.square().sum(), leaves[:2], create_graph=True)
    plain = torch.autograd.grad(last.square().sum(), leaves[:2], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(graphed, plain, strict=True))
    with pytest.raises(RuntimeError, match=r"mmfast.use_backend\('reference'\)"):
        torch.autograd.grad(graphed[0].sum(), leaves[0])


def test_jvp_of_torch_func_is_right():
    q, k, v = (t.detach() for t in _qkv())
    tangents = tuple(torch.randn_like(t) for t in (q, k, v))
    out, tangent = torch.func.jvp(mmfast.cross_attention, (q, k, v), tangents)
    step = 1e-6
    ahead, behind = (
        mmfast.cross_attention(*(t + s * d for t, d in zip((q, k, v), tangents, strict=True)))
        for s in (step, -step)
    )
    torch.testing.assert_close(out, mmfast.cross_attention(q, k, v))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    assert tangent.abs().max() > 1e-3


@pytest.mark.usefixtures("compiled_library")
def test_forward_mode_on_a_named_backend_is_refused():
    q, k, v = (t.detach() for t in _qkv())
    with mmfast.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="forward-mode differentiation needs an op composed"):
            torch.func.jvp(lambda q: mmfast.cross_attention(q, k, v), (q,), (q,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, q)
            with pytest.raises(RuntimeError, match="forward-mode differentiation needs"):
                mmfast.cross_attention(dual, k, v)
            mmfast.cross_attention(q, k, v)  # no tangent here: nothing to refuse


def test_torch_func_grad_and_hessian():
    q, k, v = (t.detach() for t in _qkv())

    def loss(q):
        return mmfast.cross_attention(q, k, v, kv_lens=torch.tensor([4, 1])).sin().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    hessian = torch.func.hessian(loss)(q)
    size = q.numel()
    flat = hessian.reshape(size, size)
    torch.testing.assert_close(flat, flat.T)
    assert flat.abs().max() > 1e-4


# --- vmap --------------------------------------------------------------------------------------


def _slices(function, count, *stacks):
    results = [function(*(stack[i] for stack in stacks)) for i in range(count)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def test_vmap(backend):
    sets = [_qkv(torch.float32) for _ in range(3)]
    q, k, v = (torch.stack([s[i].detach() + j for j, s in enumerate(sets)]) for i in range(3))
    lens = torch.tensor([[4, 0], [1, 3], [2, 2]])

    def function(q, k, v, lens):
        return tuple(
            mmfast.cross_attention(
                q, k, v, kv_lens=lens, return_lse=True, return_importance=True, return_weights=True
            )
        )

    got = torch.func.vmap(function)(q, k, v, lens)
    for part, expected in zip(got, _slices(function, 3, q, k, v, lens), strict=True):
        torch.testing.assert_close(part, expected)
    moved = torch.func.vmap(function, in_dims=(2, 0, 0, 0))(q.movedim(0, 2), k, v, lens)
    for part, expected in zip(moved, got, strict=True):
        torch.testing.assert_close(part, expected)
    shared = torch.func.vmap(lambda q: mmfast.cross_attention(q, k[0], v[0]))(q)
    expected = torch.stack([mmfast.cross_attention(q[i], k[0], v[0]) for i in range(3)])
    torch.testing.assert_close(shared, expected)


def test_gradient_through_vmap(backend):
    q, k, v = (t.detach()[None].repeat(3, 1, 1, 1, 1) for t in _qkv())
    q = (q + torch.arange(3.0).reshape(3, 1, 1, 1, 1)).requires_grad_()
    torch.func.vmap(mmfast.cross_attention)(q, k, v).sin().sum().backward()
    expected = torch.stack([mmfast.cross_attention(q[i], k[i], v[i]) for i in range(3)])
    (dq,) = torch.autograd.grad(expected.sin().sum(), q)
    torch.testing.assert_close(q.grad, dq)


def test_per_sample_gradients():
    q, k, v = (t.detach() for t in _qkv(torch.float32))

    def loss(q, k, v):
        return mmfast.cross_attention(q[None], k[None], v[None]).sin().sum()

    got = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    expected = torch.stack([torch.func.grad(loss)(q[i], k[i], v[i]) for i in range(2)])
    torch.testing.assert_close(got, expected)


def test_is_grads_batched(backend):
    q, k, v = _qkv()
    out = mmfast.cross_attention(q, k, v)
    incoming = torch.randn(4, *out.shape, dtype=out.dtype)
    (got,) = torch.autograd.grad(out, q, incoming, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(out, q, g, retain_graph=True)[0] for g in incoming]
    torch.testing.assert_close(got, torch.stack(expected))


# --- which gradients are asked for ----------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "gate"])
def test_one_gradient_alone(wanted, backend):
    inputs = make_inputs(Case("alone", **_SIZES, bias="1HN1", gate="head"), torch.float64)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    tensors |= {"bias": inputs.options["bias"], "gate": inputs.options["gate"]}

    def gradients(names):
        leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
        q, k, v, bias, gate = leaves.values()
        out = mmfast.cross_attention(q, k, v, bias=bias, gate=gate)
        assert out.requires_grad
        return dict(
            zip(
                names, torch.autograd.grad(out.sin().sum(), [leaves[n] for n in names]), strict=True
            )
        )

    assert torch.equal(gradients([wanted])[wanted], gradients(list(tensors))[wanted])


def test_no_gradient_asked_for(backend):
    q, k, v = (t.detach() for t in _qkv())
    assert not mmfast.cross_attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not mmfast.cross_attention(*_qkv()).requires_grad
    with torch.inference_mode():
        assert mmfast.cross_attention(q, k, v).is_inference()


@pytest.mark.parametrize("part", ["lse", "importance", "weights"])
def test_loss_on_another_result_alone(part, backend):
    leaves = _qkv()
    flags = {"return_lse": True, "return_importance": True, "return_weights": True}
    got = torch.autograd.grad(
        getattr(mmfast.cross_attention(*leaves, **flags), part).sin().sum(),
        leaves,
        allow_unused=True,
        materialize_grads=True,
    )
    expected = torch.autograd.grad(
        getattr(mmfast.reference.cross_attention(*leaves, **flags), part).sin().sum(),
        leaves,
        allow_unused=True,
        materialize_grads=True,
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- training around it ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sees_the_same_dropout(reentrant, backend):
    def gradients(checkpointed):
        leaves = _qkv(N=9, M=33)
        torch.manual_seed(11)

        def block(q, k, v):
            hidden = mmfast.cross_attention(q, k, v, dropout_p=0.5)
            return hidden + mmfast.cross_attention(q, k, v, dropout_p=0.5)

        out = (
            checkpoint(block, *leaves, use_reentrant=reentrant) if checkpointed else block(*leaves)
        )
        return (
            torch.autograd.grad(out.sin().sum(), leaves)
            if not reentrant
            else _backward(out, leaves)
        )

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def _backward(out, leaves):
    out.sin().sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """float32 parameters and activations are cast as F.scaled_dot_product_attention casts them."""
    leaves = _qkv(torch.float32)
    gate = torch.randn(2, 3, 2, requires_grad=True)
    bias = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        result = mmfast.cross_attention(*leaves, bias=bias, gate=gate, return_lse=True)
        assert (
            torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True).dtype
            == dtype
        )
    assert result.out.dtype == dtype
    assert result.lse.dtype == torch.float32
    result.out.float().sum().backward()
    for leaf in (*leaves, gate, bias):
        assert leaf.grad.dtype == torch.float32
    low = [leaf.detach().to(dtype) for leaf in leaves]
    expected = mmfast.cross_attention(*low, bias=bias.detach(), gate=gate.detach().to(dtype))
    assert torch.equal(result.out, expected)


def test_autocast_mixes_dtypes(backend):
    """float32 parameters beside bfloat16 activations."""
    q, k, v = (t.detach() for t in _qkv(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mmfast.cross_attention(q, k.bfloat16(), v)
        wide = mmfast.cross_attention(*(t.double() for t in (q, k, v)))
    assert out.dtype == torch.bfloat16
    assert wide.dtype == torch.float64  # as torch: float64 is left alone


def test_hooks_and_anomaly_mode(backend):
    leaves = _qkv()
    seen = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: (seen.append(t.shape), t.clone())[1], lambda t: t
        ),
        torch.autograd.set_detect_anomaly(True),
    ):
        out = mmfast.cross_attention(*leaves)
        got = torch.autograd.grad(out.sin().sum(), leaves)
    assert seen
    expected = torch.autograd.grad(mmfast.cross_attention(*leaves).sin().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
