"""Classes `(adapter, stock class)`, made when a module of the stock class is first patched.

They carry the stock class's `__name__`, since sharding policies and device maps go by it, and can
be pickled: their qualified name is the stock class's address, from which `__getattr__` makes them
again in another process.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

_MADE: dict[str, type[nn.Module]] = {}


def address(cls: type) -> str:
    """`package.module.Class`"""
    return f"{cls.__module__}.{cls.__qualname__}"


def swapped(stock: type[nn.Module], adapter: type[nn.Module]) -> type[nn.Module]:
    """The class that modules of `stock` get; always the same one."""
    name = address(stock).replace(".", "/")
    made = _MADE.get(name)
    if made is None:
        facts = {
            "__module__": __name__, "__qualname__": name, "__doc__": stock.__doc__,
            "_mmfast_stock": stock,
        }  # fmt: skip
        made = _MADE[name] = type(stock.__name__, (adapter, stock), facts)
    return made


def stock_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that a patched module had, None for one that is not patched."""
    return type(module).__dict__.get("_mmfast_stock")


def __getattr__(name: str) -> Any:
    # Only addresses of registered classes: unpickling cannot reach for anything else.
    if "/" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmfast.integrations.registry import adapter_at

    where = name.replace("/", ".")
    adapter = adapter_at(where)
    if adapter is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: this version of mmfast has no adapter "
            f"for {where}"
        )
    module, _, cls = where.rpartition(".")
    return swapped(getattr(importlib.import_module(module), cls), adapter.mixin)
