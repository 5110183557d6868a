"""Several tasks over one vector of features: a head and a loss for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, ModuleDict

from mmfast.nn import _checks
from mmfast.nn._tokens import readable

Loss = str | Callable[[Tensor, Tensor], Tensor]
_NO_TARGET = -100  # as torch.nn.functional.cross_entropy has it


def make_heads(
    op: str, width: int, heads: Mapping[str, int | Module], factory: Mapping[str, Any]
) -> ModuleDict:
    """name -> number of outputs (a `torch.nn.Linear`) or any module over `[B, width]`."""
    modules: dict[str, Module] = {}
    for name, head in heads.items():
        if isinstance(head, Module):
            modules[name] = head
        elif isinstance(head, int) and not isinstance(head, bool) and head >= 1:
            modules[name] = Linear(width, head, **factory)
        else:
            raise ValueError(
                f"{op}: heads[{name!r}] is {head!r}; give its number of outputs (at least 1) or a "
                f"module that takes the features"
            )
    return ModuleDict(modules)


class TaskLosses:
    """What several heads are trained with.

    Args:
        op: the module that errors name.
        heads: the names of the heads.
        losses: name -> a name of `LOSSES`, or `loss(logits, target) -> scalar`; "cross_entropy" for
            heads of more than one output that have none.
        weights: name -> factor in the sum; 1 for those that have none.
    """

    def __init__(
        self,
        op: str,
        heads: Iterable[str],
        losses: Mapping[str, Loss],
        weights: Mapping[str, float],
    ) -> None:
        self._op, self._heads = op, tuple(heads)
        for argument, given in (("losses", losses), ("loss_weights", weights)):
            for name in given:
                if name not in self._heads:
                    raise ValueError(
                        f"{op}: {argument} has {name!r}, but the heads are {list(self._heads)}"
                    )
        for name, loss in losses.items():
            if not callable(loss):
                _checks.require_choice(op, f"losses[{name!r}]", loss, tuple(LOSSES))
        self._losses, self._weights = dict(losses), dict(weights)

    def check(self, targets: Any) -> None:
        """Raise for targets that no loss could use."""
        if not isinstance(targets, Mapping):
            raise TypeError(
                f"{self._op}: targets must be a mapping from heads to tensors, got "
                f"{type(targets).__name__}; give {{'task': target}}"
            )
        for name, target in targets.items():
            if name not in self._heads:
                raise ValueError(
                    f"{self._op}: targets has {name!r}, but the heads are {list(self._heads)}"
                )
            if not isinstance(target, Tensor):
                raise TypeError(
                    f"{self._op}: targets[{name!r}] must be a torch.Tensor, got "
                    f"{type(target).__name__}; leave a head without targets out"
                )
        if not targets:
            raise ValueError(
                f"{self._op}: targets is empty; give a target for at least one of the heads "
                f"{list(self._heads)}, or None for no loss"
            )

    def __call__(
        self, logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses of the heads that have targets, and each of them."""
        found = {}
        for name, target in targets.items():
            got = logits[name]
            loss = self._losses.get(name)
            if loss is None:
                if got.dim() < 2 or got.shape[1] < 2:
                    raise ValueError(
                        f"{self._op}: head {name!r} has one output, for which cross-entropy is "
                        f"always 0; say what its loss is: losses={{{name!r}: 'mse'}} or "
                        f"'binary_cross_entropy'"
                    )
                loss = "cross_entropy"
            if isinstance(loss, str):
                found[name] = LOSSES[loss](f"{self._op}: head {name!r}", got, target)
            else:
                found[name] = loss(got, target)
        terms = [self._weights.get(name, 1.0) * value for name, value in found.items()]
        return torch.stack(terms).sum(), found


def _cross_entropy(where: str, logits: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():  # probabilities of the classes
        known = _known(where, logits, target)
        rows = F.cross_entropy(logits, torch.where(known, target, 0.0), reduction="none")
        return _mean(rows, known.all(1))
    if target.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"{where} gives {list(logits.shape)} but its target has shape {list(target.shape)}; "
            f"expected class indices {[logits.shape[0], *logits.shape[2:]]}"
        )
    known = target != _NO_TARGET
    if readable(target) and not bool(
        (known.logical_not() | ((target >= 0) & (target < logits.shape[1]))).all()
    ):
        raise ValueError(
            f"{where} has {logits.shape[1]} classes but its target holds values from "
            f"{int(target.min())} to {int(target.max())}; expected 0 to {logits.shape[1] - 1}, or "
            f"{_NO_TARGET} for an item without a target"
        )
    rows = F.cross_entropy(logits, target.long(), reduction="none", ignore_index=_NO_TARGET)
    return _mean(rows, known)


def _elementwise(function: Callable[..., Tensor]) -> Callable[[str, Tensor, Tensor], Tensor]:
    def loss(where: str, logits: Tensor, target: Tensor) -> Tensor:
        if target.shape == logits.shape[:-1] and logits.shape[-1] == 1:
            target = target.unsqueeze(-1)
        known = _known(where, logits, target)
        return _mean(
            function(logits, torch.where(known, target, 0).to(logits.dtype), reduction="none"),
            known,
        )

    return loss


def _known(where: str, logits: Tensor, target: Tensor) -> Tensor:
    if target.shape != logits.shape:
        raise ValueError(
            f"{where} gives {list(logits.shape)} but its target has shape {list(target.shape)}; "
            f"both must match"
        )
    return target.isnan().logical_not() if target.is_floating_point() else target != _NO_TARGET


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Over what is known; 0 where nothing is."""
    return torch.where(known, values, 0.0).sum() / known.sum().clamp(min=1)


LOSSES: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _elementwise(F.binary_cross_entropy_with_logits),
    "mse": _elementwise(F.mse_loss),
    "l1": _elementwise(F.l1_loss),
}
