"""Whether a kernel takes keys that are the values too, as wide as a context."""

from __future__ import annotations

from torch import Tensor

from mmfast import dispatch

_OP = "cross_attention"


def shared_refusal(keys: Tensor) -> str | None:
    """Why `cross_attention(q, keys, None)` would be slower than it need be; None: it is not.

    keys: `[B, G, M, D]`; q has their dtype, device and width. Where there is no kernel at all, for
    no width, there is no reason.
    """
    try:
        row = dispatch.select(_OP, keys, keys, None, True)
    except RuntimeError:
        return f"the backend asked for takes no keys of width {keys.shape[3]}"
    if not row.composed or dispatch.current_backend() == row.backend:
        return None
    narrow = keys[..., :1]
    if dispatch.select(_OP, narrow, narrow, None, False).composed:
        return None
    return f"no kernel takes keys of width {keys.shape[3]} here"
