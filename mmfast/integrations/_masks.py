"""What a dense mask of transformers says, in terms that leave work out: lengths and causality.

Models hand a mask `[B, 1, N, M]` (additive: 0 and the dtype's least value; or bool, True = may
attend) to every layer. Nearly always it is key padding, or causal, or both. That is read off its
values once a mask, and kept as long as the mask is there: layers that share it share the answer.
Reading waits for an accelerator once a mask; under torch.compile and in a graph capture nothing is
read, and the mask is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmfast.integrations._layout import Layout
from mmfast.ops._autograd import in_eager

# By the mask, which this does not keep alive, and no pattern may: none holds a view of its mask.
_KEPT: Any = WeakTensorKeyDictionary()

_T = TypeVar("_T")


class Pattern:
    """A mask that is (rows see) keys [of the right padding] [up to their own position].

    Attributes:
        valid: bool `[B, M]`: keys that some row sees.
        causal: row n sees key m where also `m <= n + (last valid key) - (last row)`: aligned
            bottom-right on `lens`, or on rows and keys that are padded alike (`rows_too`).
        rows_too: the queries are padded as the keys are; rows of padding come out 0.
        lens: int32 `[B]` where the padding is on the right, else None.
        dead: bool `[B, N]`, rows that see nothing; None where there is none.
        full: no key is padding.
    """

    def __init__(
        self, valid: Tensor, causal: bool, rows_too: bool, lens: Tensor | None, dead: Tensor | None
    ) -> None:
        self.valid = valid
        self.causal = causal
        self.rows_too = rows_too
        self.lens = lens
        self.dead = dead
        self.full = lens is not None and bool((lens == valid.shape[1]).all())
        self._layout: Layout | None = None

    def layout(self) -> Layout:
        """Where the valid keys are, for packing rows that are padded alike."""
        if self._layout is None:
            self._layout = Layout.of(self.valid)
        return self._layout


def allowed(mask: Tensor) -> Tensor:
    """bool, True = may attend, of an additive or bool mask."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def only_masks(mask: Tensor, see: Tensor) -> bool:
    """Whether an additive mask has nothing but 0 where it allows; a bias shows in its first row."""
    for of, seen in ((mask[:1, ..., :1, :], see[:1, ..., :1, :]), (mask, see)):
        if not bool(((of == 0) | ~seen).all()):
            return False
    return True


def readable(mask: Tensor) -> bool:
    """Whether Python may branch on the values of a mask."""
    if type(mask) is not Tensor or mask.requires_grad or not in_eager() or mask.is_meta:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def recognised(mask: Tensor) -> Pattern | None:
    """What a mask `[B, 1, N, M]` says; None where only the mask itself says it."""
    if mask.dim() != 4 or mask.shape[1] != 1 or not readable(mask):
        return None
    return remembered(mask, "pattern", lambda: _read(mask))


def remembered(mask: Tensor, what: Hashable, read: Callable[[], _T]) -> _T:
    """What `read` finds in a mask, found once as long as nobody writes to the mask.

    It must not hold a view of the mask, which would keep that alive for good.
    """
    # Tensors of inference mode do not count what is written to them: their values are compared.
    state: int | Tensor = _values(mask) if mask.is_inference() else mask._version
    kept: tuple[int | Tensor, dict[Hashable, Any]] | None = _KEPT.get(mask)
    if kept is None or not _same(kept[0], state):
        kept = (state.clone() if isinstance(state, Tensor) else state, {})
        _KEPT[mask] = kept
    # What was made in inference mode cannot be saved for a backward later on.
    key = (what, torch.is_inference_mode_enabled())
    if key not in kept[1]:
        kept[1][key] = read()
    found: _T = kept[1][key]
    return found


def _values(mask: Tensor) -> Tensor:
    """All that a mask says, once where its rows are one row."""
    return mask[:, :, :1] if mask.dim() == 4 and mask.stride(2) == 0 else mask


def _same(kept: int | Tensor, state: int | Tensor) -> bool:
    if isinstance(kept, Tensor) and isinstance(state, Tensor):
        return torch.equal(kept, state)
    return not isinstance(kept, Tensor) and not isinstance(state, Tensor) and kept == state


def _read(mask: Tensor) -> Pattern | None:
    N, M = mask.shape[2:]
    if N == 0 or M == 0:
        return None
    rows = mask[:, 0]
    if N > 1 and mask.stride(2) == 0:
        rows = rows[:, :1]
    see = allowed(rows)
    # A value between the two is a bias; -inf and the least value are both "masked".
    if rows.dtype != torch.bool and not only_masks(rows, see):
        return None
    last = see[:, -1].clone()
    if see.shape[1] == 1 or bool((see == last[:, None]).all()):
        lens = _right_padded(last)
        dead = ~last.any(1)
        none = dead[:, None].expand(-1, N) if bool(dead.any()) else None
        return Pattern(last, False, False, lens, none)
    lens = _right_padded(last)
    if lens is None or bool((lens == 0).any()):
        return _read_causal_with_holes(see, last)
    n = torch.arange(N, device=mask.device)[:, None]
    m = torch.arange(M, device=mask.device)
    # Queries at the end of what was seen so far: bottom-right on the lengths of the keys.
    if bool((see == (m <= n + (lens[:, None, None] - N))).all()):
        dead_rows = lens[:, None] - N + n[:, 0] < 0
        return Pattern(last, True, False, lens, dead_rows if bool(dead_rows.any()) else None)
    if N == M and bool((see == ((m <= n) & last[:, None])).all()):
        return Pattern(last, True, True, lens, None)
    return None


def _read_causal_with_holes(see: Tensor, last: Tensor) -> Pattern | None:
    """Causal self-attention with padding on the left or within: packed rows keep their order."""
    N, M = see.shape[1:]
    if N != M or not bool((see == (last[:, None] & torch.ones_like(see[:1]).tril())).all()):
        return None
    dead = ~see.any(2)
    return Pattern(last, True, True, None, dead if bool(dead.any()) else None)


def _right_padded(valid: Tensor) -> Tensor | None:
    """Lengths int32 `[B]` where no valid key follows one that is not."""
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        return None
    return valid.sum(1, dtype=torch.int32)


def padding_of(mask: Any, batch: int, length: int) -> Pattern | None:
    """The pattern of a self-attention's mask whose keys are rows `[batch, length]` of a stream."""
    if not isinstance(mask, Tensor):
        return None
    pattern = recognised(mask)
    if pattern is None or tuple(pattern.valid.shape) != (batch, length):
        return None
    # Causal, and the rows padded as the keys are: or nothing is padding.
    if pattern.causal and not (pattern.rows_too or pattern.full):
        return None
    return pattern
