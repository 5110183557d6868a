"""Which class of torch.nn and transformers is sped up by which adapter."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from mmfast.integrations._swapped import address

Kind = Literal["attention", "layer", "mlp", "gate", "norm", "module"]


class Adapter(nn.Module):
    """Base of the mixins: what stands before a stock class in the class a patched module gets."""

    def _mmfast_why_not(self) -> str | None:
        """Why this very module (still of its stock class) is left as it is; None: it is not.

        Called as a function on the stock module: `Mixin._mmfast_why_not(module)`.
        """
        return None

    def _mmfast_install(self) -> None:
        """After the swap: hooks or flags that the adapter needs."""

    def _mmfast_remove(self) -> None:
        """Before the swap back: takes away what `_mmfast_install` gave."""


@dataclass(frozen=True)
class Row:
    """One class and its adapter."""

    target: str
    """Address of the stock class, `package.module.Class`."""
    mixin: type[nn.Module]
    kind: Kind
    relies_on: tuple[str, ...]
    """Classes of the same file whose source the adapter relies on too."""
    fingerprinted: bool
    """Whether the source has to be one that is known (not so for torch.nn's stable classes)."""

    @property
    def model_type(self) -> str:
        """Folder of transformers that the class is in; "torch.nn" elsewhere."""
        parts = self.target.split(".")
        return parts[2] if parts[:2] == ["transformers", "models"] else "torch.nn"


_ROWS: dict[str, Row] = {}
_loaded = False

_A = TypeVar("_A", bound=type[nn.Module])


def adapter(
    *targets: str, kind: Kind, relies_on: tuple[str, ...] = (), fingerprinted: bool = True
) -> Callable[[_A], _A]:
    """Register a mixin for classes, named by their addresses.

    Args:
        targets: `"transformers.models.lxmert.modeling_lxmert.LxmertAttention"`, ...
        kind: what the class is, for the report and the table of architectures.
        relies_on: names of classes in the same file whose source matters to the adapter as well: a
            layer's attention and feed-forward classes, where it changes what they are given.
        fingerprinted: False for classes with a stable interface of their own.

    Raises:
        ValueError: a class has an adapter already.
    """

    def register(mixin: _A) -> _A:
        for target in targets:
            if target in _ROWS:
                raise ValueError(f"adapter: {target} has one already, {_ROWS[target].mixin}")
            _ROWS[target] = Row(target, mixin, kind, relies_on, fingerprinted)
        return mixin

    return register


def rows() -> Mapping[str, Row]:
    """Every row by the address of its class."""
    global _loaded
    if not _loaded:
        importlib.import_module("mmfast.integrations.torch_nn")
        package = importlib.import_module("mmfast.integrations.adapters")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        _loaded = True
    return _ROWS


def adapter_at(where: str) -> Row | None:
    """The row of the class at an address."""
    return rows().get(where)


def adapter_for(cls: type[Any]) -> Row | None:
    """The row of exactly this class: a subclass may do other things."""
    return rows().get(address(cls))
