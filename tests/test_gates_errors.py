"""Bad input to the gating ops: every message names op, argument, expected, got and remedy."""

from __future__ import annotations

import re

import pytest
import torch

import mmfast

X = torch.ones(2, 3, 4)
OTHER = torch.ones(2, 3, 5)
HALF = X.half()
META = torch.ones(2, 3, 4, device="meta")
SPARSE = X.to_sparse()
INTEGERS = torch.ones(2, 3, 4, dtype=torch.int64)
GATE = torch.zeros(1)
ROWS = torch.ones(2, 3, dtype=torch.bool)
LOGITS = torch.zeros(2)
EMPTY = torch.ones(0, 4)


def residual(**change):
    given = {"x": X, "y": X, "gate": GATE, **change}
    return lambda: mmfast.gated_residual(**given)


def glu(a=X, b=X, activation="silu"):
    return lambda: mmfast.glu(a, b, activation)


def packed(ab=X, activation="silu"):
    return lambda: mmfast.glu_packed(ab, activation)


def fuse(**change):
    given = {"features": [X, X], "logits": LOGITS, "mode": "softmax", **change}
    return lambda: mmfast.fuse(**given)


def modulate(x=X, **given):
    return lambda: mmfast.modulate(x, **given)


def adapt(**change):
    given = {"z": X, "h": X, **change}
    return lambda: mmfast.adaptation_gate(**given)


BAD = [
    # gated_residual
    (residual(x=3.0), TypeError, "gated_residual: x must be a torch.Tensor, got float; convert it"),
    (residual(x=SPARSE), TypeError, "gated_residual: x must be a dense (strided) tensor, got lay"),
    (residual(x=INTEGERS), TypeError, "gated_residual: x has dtype torch.int64, expected float32, "
     "bfloat16, float16 or float64; convert it with .float()"),
    (residual(x=torch.tensor(1.0)), ValueError, "gated_residual: x has shape [], expected [...,"),
    (residual(y=None), TypeError, "gated_residual: y must be a torch.Tensor, got NoneType"),
    (residual(y=OTHER), ValueError, "gated_residual: y has shape [2, 3, 5] but x has [2, 3, 4]; "
     "both must match; project or expand one to the other"),
    (residual(y=HALF), TypeError, "gated_residual: y has dtype torch.float16 but x has "
     "torch.float32; both must match; convert it with .to(x.dtype) or use autocast"),
    (residual(y=META), ValueError, "gated_residual: y is on meta but x is on cpu; move all"),
    (residual(gate=0.5), TypeError, "gated_residual: gate must be a torch.Tensor, got float"),
    (residual(gate=GATE.half()), TypeError, "gated_residual: gate has dtype torch.float16, "
     "expected torch.float32, as x has; convert it with .to(x.dtype)"),
    (residual(x=HALF, y=HALF, gate=GATE.double()), TypeError, "gated_residual: gate has dtype "
     "torch.float64, expected torch.float16 or torch.float32, as x has"),
    (residual(gate=GATE.to("meta")), ValueError, "gated_residual: gate is on meta but x is on cpu"),
    (residual(gate=torch.zeros(3)), ValueError, "gated_residual: gate has shape [3] but x has "
     "[2, 3, 4]; give [1], [C], [B, C], or x's rank with each dim that of x or 1"),
    (residual(gate=torch.zeros(3, 4)), ValueError, "gated_residual: gate has shape [3, 4] but x"),
    (residual(gate=torch.zeros(2, 2, 4)), ValueError, "gated_residual: gate has shape [2, 2, 4]"),
    (residual(gate=torch.zeros(1, 2, 3, 4)), ValueError, "gated_residual: gate has shape [1, 2, "),
    (residual(activation="relu"), ValueError, "gated_residual: activation is 'relu'; it must be "
     "one of 'tanh', 'sigmoid', 'identity'"),
    (residual(activation=[]), ValueError, "gated_residual: activation is []; it must be one of"),
    (residual(row_mask=True), TypeError, "gated_residual: row_mask must be a torch.Tensor, got bo"),
    (residual(row_mask=ROWS.float()), TypeError, "gated_residual: row_mask must be bool (True = "
     "the row takes part), got torch.float32; convert it with .bool()"),
    (residual(row_mask=ROWS[:, :2]), ValueError, "gated_residual: row_mask has shape [2, 2], "
     "expected [2, 3] or 1 in place of any size; it holds one bool for each row of x"),
    (residual(row_mask=ROWS[0]), ValueError, "gated_residual: row_mask has shape [3], expected"),
    (residual(row_mask=ROWS.to("meta")), ValueError, "gated_residual: row_mask is on meta but x"),
    # glu
    (glu(a="x"), TypeError, "glu: a must be a torch.Tensor, got str"),
    (glu(a=INTEGERS, b=INTEGERS), TypeError, "glu: a has dtype torch.int64, expected float32"),
    (glu(b=OTHER), ValueError, "glu: b has shape [2, 3, 5] but a has [2, 3, 4]; both must match"),
    (glu(b=HALF), TypeError, "glu: b has dtype torch.float16 but a has torch.float32; both must"),
    (glu(b=META), ValueError, "glu: b is on meta but a is on cpu; move all tensors to one device"),
    (glu(b=None), TypeError, "glu: b must be a torch.Tensor, got NoneType"),
    (glu(activation="swish"), ValueError, "glu: activation is 'swish'; it must be one of 'silu', "
     "'gelu', 'gelu_tanh', 'relu', 'sigmoid', 'identity'"),
    (packed(ab=1), TypeError, "glu_packed: ab must be a torch.Tensor, got int"),
    (packed(ab=OTHER), ValueError, "glu_packed: ab has shape [2, 3, 5], its last dim must be even"),
    (packed(ab=INTEGERS), TypeError, "glu_packed: ab has dtype torch.int64, expected float32"),
    (packed(ab=torch.tensor(1.0)), ValueError, "glu_packed: ab has shape [], expected [..., C]"),
    (packed(activation=None), ValueError, "glu_packed: activation is None; it must be one of"),
    # fuse
    (fuse(features=X), TypeError, "fuse: features must be a list or tuple of tensors, got Tensor; "
     "unbind a stacked tensor with .unbind(dim)"),
    (fuse(features=[]), ValueError, "fuse: features is empty; give at least one tensor"),
    (fuse(features=[X, 2]), TypeError, "fuse: features[1] must be a torch.Tensor, got int"),
    (fuse(features=[INTEGERS]), TypeError, "fuse: features[0] has dtype torch.int64, expected"),
    (fuse(features=[X, OTHER]), ValueError, "fuse: features[1] has shape [2, 3, 5] but features[0]"
     " has [2, 3, 4]; both must match"),
    (fuse(features=[X, HALF]), TypeError, "fuse: features[1] has dtype torch.float16 but"),
    (fuse(features=[X, META]), ValueError, "fuse: features[1] is on meta but features[0] is on"),
    (fuse(features=[torch.ones(4)] * 2), ValueError, "fuse: features[0] has shape [4], expected "
     "[B, ..., C]; unsqueeze a dim of items"),
    (fuse(logits=None), TypeError, "fuse: logits must be a torch.Tensor, got NoneType"),
    (fuse(logits=LOGITS.half()), TypeError, "fuse: logits has dtype torch.float16, expected"),
    (fuse(logits=LOGITS.to("meta")), ValueError, "fuse: logits is on meta but features[0] is on"),
    (fuse(logits=torch.zeros(3)), ValueError, "fuse: logits has shape [3] but there are K=2 "
     "features of shape [2, 3, 4]; give [K], [B, K], [B, ..., K] or [B, ..., K, C]"),
    (fuse(logits=torch.zeros(3, 2)), ValueError, "fuse: logits has shape [3, 2] but there are K=2"),
    (fuse(logits=torch.zeros(2, 3, 2, 3)), ValueError, "fuse: logits has shape [2, 3, 2, 3] but"),
    (fuse(logits=torch.zeros(2, 3, 4)), ValueError, "fuse: logits has shape [2, 3, 4] but there"),
    (fuse(logits=torch.zeros(())), ValueError, "fuse: logits has shape [] but there are K=2"),
    (fuse(logits=torch.zeros(2, 3, 3), mode="gmu"), ValueError, "or [B, ..., C] or [B, ..., 1] fo"),
    (fuse(mode="mean"), ValueError, "fuse: mode is 'mean'; it must be 'softmax', 'sigmoid' or"),
    (fuse(mode=None), ValueError, "fuse: mode is None; it must be 'softmax', 'sigmoid' or 'gmu'"),
    (fuse(present=torch.ones(2, 2)), TypeError, "fuse: present must be bool (True = the item has "
     "the modality), got torch.float32; convert it with .bool()"),
    (fuse(present=torch.ones(3, 2).bool()), ValueError, "fuse: present has shape [3, 2], expected "
     "[B, K] = [2, 2]; it holds one bool for each item and modality"),
    (fuse(present=[[True]]), TypeError, "fuse: present must be a torch.Tensor, got list"),
    (fuse(present=torch.ones(2, 2, device="meta").bool()), ValueError, "fuse: present is on meta"),
    # modulate
    (modulate(x=None), TypeError, "modulate: x must be a torch.Tensor, got NoneType"),
    (modulate(x=INTEGERS), TypeError, "modulate: x has dtype torch.int64, expected float32"),
    (modulate(residual=OTHER), ValueError, "modulate: residual has shape [2, 3, 5] but x has"),
    (modulate(residual=HALF), TypeError, "modulate: residual has dtype torch.float16 but x has"),
    (modulate(gate=torch.ones(4)), ValueError, "modulate: gate comes without a residual; give the"),
    (modulate(scale=1.0), TypeError, "modulate: scale must be a torch.Tensor, got float"),
    (modulate(scale=torch.ones(1)), ValueError, "modulate: scale has shape [1] but x has [2, 3, 4]"
     "; give [C], [B, C], or x's rank with each dim before C that of x or 1"),
    (modulate(shift=torch.ones(3, 4)), ValueError, "modulate: shift has shape [3, 4] but x has"),
    (modulate(shift=torch.ones(4).half()), TypeError, "modulate: shift has dtype torch.float16"),
    (modulate(scale=META), ValueError, "modulate: scale is on meta but x is on cpu"),
    (modulate(weight=torch.ones(2, 4)), ValueError, "modulate: weight has shape [2, 4], expected "
     "[C] = [4]; it holds one value for each channel"),
    (modulate(bias=torch.ones(5)), ValueError, "modulate: bias has shape [5], expected [C] = [4]"),
    (modulate(norm="batch"), ValueError, "modulate: norm is 'batch'; it must be 'layer', 'rms' or"),
    (modulate(norm=[]), ValueError, "modulate: norm is []; it must be 'layer', 'rms' or None"),
    (modulate(eps=0.0), ValueError, "modulate: eps is 0.0; it must be finite and above 0"),
    (modulate(eps=float("nan")), ValueError, "modulate: eps is nan; it must be finite and above 0"),
    # adaptation_gate
    (adapt(z=1), TypeError, "adaptation_gate: z must be a torch.Tensor, got int"),
    (adapt(h=OTHER), ValueError, "adaptation_gate: h has shape [2, 3, 5] but z has [2, 3, 4]"),
    (adapt(h=HALF), TypeError, "adaptation_gate: h has dtype torch.float16 but z has"),
    (adapt(weight=torch.ones(3)), ValueError, "adaptation_gate: weight has shape [3], expected"),
    (adapt(bias=torch.ones(4).half()), TypeError, "adaptation_gate: bias has dtype torch.float16"),
    (adapt(beta=-1.0), ValueError, "adaptation_gate: beta is -1.0; it must be finite and at least"),
    (adapt(beta=float("inf")), ValueError, "adaptation_gate: beta is inf; it must be finite"),
    (adapt(eps=-1.0), ValueError, "adaptation_gate: eps is -1.0; it must be finite and above 0"),
    (adapt(row_mask=ROWS.int()), TypeError, "adaptation_gate: row_mask must be bool (True = the"),
    (adapt(row_mask=ROWS[:1, :2]), ValueError, "adaptation_gate: row_mask has shape [1, 2], exp"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[row[2][:70] for row in BAD])
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_bad_input_is_refused_while_compiling():
    compiled = torch.compile(lambda x, y: mmfast.glu(x, y), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="both must match"):
        compiled(X, OTHER)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_is_something(shape, backend):
    """Empty tensors are no error; gradients of what stands beside them are 0."""
    x = torch.ones(shape, requires_grad=True)
    gate = torch.ones(1, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    logits = torch.ones(2, requires_grad=True)
    results = [
        mmfast.gated_residual(x, x, gate),
        mmfast.glu(x, x),
        mmfast.fuse([x, x], logits, mode="softmax"),
        mmfast.modulate(x, weight=weight),
        mmfast.adaptation_gate(x, x, weight=weight),
    ]
    for result in results:
        assert result.shape == x.shape
    torch.cat([result.flatten() for result in results]).sum().backward()
    for leaf in (x, gate, weight, logits):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_empty_and_single_rows_of_two_dims(backend):
    assert mmfast.glu_packed(EMPTY).shape == (0, 2)
    assert mmfast.glu(torch.ones(1), torch.ones(1)).shape == (1,)
