"""`mmfast.patch(model)`: exchange the classes of modules in place, and back."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from mmfast.integrations._attention import COMPAT
from mmfast.integrations._inside import LEFT_ALONE, NAME, chooses_by_name
from mmfast.integrations._interface import Previous
from mmfast.integrations._swapped import stock_of, swapped
from mmfast.integrations.fingerprints import changed
from mmfast.integrations.registry import Adapter, Row, adapter_for
from mmfast.integrations.report import Left, Report, Swapped

_PREVIOUS = "_mmfast_previous"
_EXCLUDED = "excluded"
_BEFORE = "patched before"
_UNKNOWN = "no adapter for this class"

Names = str | type | Iterable["str | type"] | None


def patch(
    model: nn.Module,
    *,
    include: Names = None,
    exclude: Names = None,
    strict: bool = False,
    hf_compat: bool = True,
) -> Report:
    """Speed up a model in place: its attentions, layers and gates run on mmfast from now on.

    Parameters, `state_dict`, hooks, dtype, device, tied weights and the training flag stay as they
    are; outputs and gradients are the same up to rounding, but for rows of padding: layers that
    know which rows are padding compute nothing for them and give 0 there. `report.undo()`, or
    `mmfast.unpatch(model)` for a copy, takes it back. Patching twice changes nothing more.

    Modules are exchanged by exact class. Those of `torch.nn`: `MultiheadAttention`, the transformer
    layers and stacks. Those of transformers: the ones in the README's table; the source of each is
    compared with the ones its adapter was tested with, and a class that has changed is left alone.
    Models of transformers that look their attention up by name get `attn_implementation="mmfast"`.

    Args:
        model: any module. Patch it before `torch.compile`, DDP or `fully_shard` wrap it; the hooks
            of accelerate and the adapters of PEFT may come before or after.
        include: only these and what is inside them: names of modules, as patterns
            (`"encoder.layer.*"`), names of classes, or classes. One, or several.
        exclude: all but these and what is inside them.
        strict: raise where anything is left that could have been exchanged.
        hf_compat: a row that may see nothing gets the mean of all values, as in transformers;
            False: it gets 0, as everywhere else in mmfast. The classes of torch.nn give NaN there,
            and their exchanged ones never do.

    Returns:
        `Report`: `swapped`, `left` (with reasons), `table()`, `estimate()`, `undo()`.

    Raises:
        TypeError: model is not a module.
        RuntimeError: with `strict`, naming what would be left and why; the model is then unchanged.

    Example:
        >>> import torch, mmfast
        >>> model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(32, 2, batch_first=True))
        >>> report = mmfast.patch(model)
        >>> [row.cls for row in report.swapped][0]
        'TransformerEncoderLayer'
        >>> report.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"patch: model must be a torch.nn.Module, got {type(model).__name__}; for a pipeline "
            f"give its .model"
        )
    wanted = _wanted(model, include, exclude)
    rows: list[Swapped] = []
    left: list[Left] = []
    by_name = False
    # What is inside first: whether a layer can be exchanged may depend on its attention.
    for name, module in reversed(list(model.named_modules())):
        cls = type(module).__name__
        if stock_of(module) is not None:
            left.append(Left(name, cls, _BEFORE))
            continue
        row = adapter_for(type(module))
        named = row is None and chooses_by_name(module)
        if row is None and not named:
            if _is_candidate(module):
                left.append(Left(name, cls, _UNKNOWN if name in wanted else _EXCLUDED))
            continue
        reason = None if name in wanted else _EXCLUDED
        if reason is None and row is not None:
            reason = _why_not(row, module)
        if reason is not None:
            left.append(Left(name, cls, reason))
        elif row is None:
            by_name = True
            rows.append(Swapped(name, cls, "attention", "name"))
        else:
            _exchange(row, module)
            packs = row.kind == "layer"
            weights = sum(p.numel() for p in module.parameters()) if packs else 0
            rows.append(Swapped(name, cls, row.kind, "class", weights))
    rows.reverse()
    left.reverse()
    if by_name:
        rows, more = _choose_by_name(model, rows)
        left += more
    _set_flags(model, rows, left, hf_compat)
    report = Report(model, rows, left)
    if strict:
        _require_nothing_left(report)
    return report


def unpatch(model: nn.Module) -> None:
    """Take back every patch of a model, also one that came with a copy or from a file.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a module was wrapped after the patch in a way that builds on its class.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    restore(model, None)


def restore(model: nn.Module, only: set[nn.Module] | None) -> None:
    """Give modules their stock classes; all of them, or these."""
    modules = [(n, m) for n, m in model.named_modules() if only is None or m in only]
    for name, module in modules:
        for cls in type(module).__mro__[1:]:
            if "_mmfast_stock" in cls.__dict__:
                raise RuntimeError(
                    f"unpatch: {name or 'the model'} became a {type(module).__name__} after the "
                    f"patch; undo the patch before what wrapped it (fully_shard)"
                )
    for _, module in modules:
        stock = stock_of(module)
        if stock is not None:
            if isinstance(module, Adapter):
                module._mmfast_remove()
            _change_class(module, stock)
        for flag in (COMPAT, LEFT_ALONE):
            module.__dict__.pop(flag, None)
    if not any(_uses_name(m) for n, m in modules):
        return
    for module in model.modules():
        previous = module.__dict__.pop(_PREVIOUS, None)
        if previous is not None:
            module.config._attn_implementation_internal = previous.name  # type: ignore[union-attr]
        module.__dict__.pop(LEFT_ALONE, None)


def _wanted(model: nn.Module, include: Names, exclude: Names) -> set[str]:
    """The names of the modules that include and exclude mean."""
    kept = () if include is None else _as_tuple("include", include)
    gone = () if exclude is None else _as_tuple("exclude", exclude)
    found: set[str] = set()
    state: dict[str, tuple[bool, bool]] = {}
    for name, module in model.named_modules():
        inside, outside = state.get(name.rpartition(".")[0], (include is None, False))
        inside = inside or any(_matches(of, name, module) for of in kept)
        outside = outside or any(_matches(of, name, module) for of in gone)
        state[name] = (inside, outside)
        if inside and not outside:
            found.add(name)
    return found


def _as_tuple(option: str, names: Any) -> tuple[str | type, ...]:
    values = (names,) if isinstance(names, str | type) else tuple(names)
    for value in values:
        if not isinstance(value, str | type):
            raise TypeError(
                f"patch: {option} takes names of modules, names of classes or classes, got "
                f"{type(value).__name__}"
            )
    return values


def _matches(wanted: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    return wanted == type(module).__name__ or fnmatch.fnmatchcase(name, wanted)


def _is_candidate(module: nn.Module) -> bool:
    """A class that a reader would expect to see in the report."""
    if not isinstance(module, nn.Module) or not module._modules:
        return False
    cls = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return True
    own = any(isinstance(child, nn.Linear) for child in module.children())
    return "Attention" in cls and own and not type(module).__module__.startswith("mmfast.")


def _why_not(row: Row, module: nn.Module) -> str | None:
    if "forward" in module.__dict__ and not _keeps_forward(module):
        return "its forward was replaced on the instance; patch before what did that (accelerate)"
    reason = changed(row)
    if reason is None and issubclass(row.mixin, Adapter):
        reason = row.mixin._mmfast_why_not(module)  # type: ignore[arg-type]
    return reason


def _exchange(row: Row, module: nn.Module) -> None:
    _change_class(module, swapped(type(module), row.mixin))
    if isinstance(module, Adapter):
        module._mmfast_install()


_FORWARDS = ("forward", "_old_forward")
"""Where accelerate's hooks, and what removing them leaves behind, keep a class's forward."""


def _keeps_forward(module: nn.Module) -> bool:
    """Is a forward on the instance one that `_change_class` can exchange?"""
    kept = [module.__dict__.get(name) for name in _FORWARDS]
    return any(getattr(forward, "__func__", None) is type(module).forward for forward in kept)


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    before = type(module).forward
    module.__class__ = cls
    for name in _FORWARDS:
        if getattr(module.__dict__.get(name), "__func__", None) is before:
            module.__dict__[name] = types.MethodType(cls.forward, module)


def _uses_name(module: nn.Module) -> bool:
    return chooses_by_name(module) or _PREVIOUS in module.__dict__


def _configs(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Modules that hold a configuration with an attention implementation, outermost first."""
    seen: set[int] = set()
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        if _is_model(module) or chooses_by_name(module):
            seen.add(id(config))
            yield module, config


def _is_model(module: nn.Module) -> bool:
    can = getattr(type(module), "_can_set_attn_implementation", None)
    return can is not None and bool(can())


def _choose_by_name(model: nn.Module, rows: list[Swapped]) -> tuple[list[Swapped], list[Left]]:
    """Set the name in the configurations; models that must keep theirs are left."""
    kept: set[int] = set()
    for module, config in _configs(model):
        if config._attn_implementation_internal == NAME:
            continue
        if getattr(config, "output_attentions", False):
            kept.add(id(config))
            continue
        module.__dict__[_PREVIOUS] = Previous(config._attn_implementation_internal)
        config._attn_implementation_internal = NAME
    modules = dict(model.named_modules())
    left = [
        Left(row.name, row.cls, "config.output_attentions=True asks for eager attention")
        for row in rows
        if row.how == "name" and id(getattr(modules[row.name], "config", None)) in kept
    ]
    names = {row.name for row in left}
    return [row for row in rows if row.name not in names], left


def _set_flags(model: nn.Module, rows: list[Swapped], left: list[Left], hf_compat: bool) -> None:
    modules = dict(model.named_modules())
    if not hf_compat:
        for row in rows:
            modules[row.name].__dict__[COMPAT] = False
    for other in left:
        if other.reason == _EXCLUDED and chooses_by_name(modules[other.name]):
            modules[other.name].__dict__[LEFT_ALONE] = True


def _require_nothing_left(report: Report) -> None:
    left = [row for row in report.left if row.reason not in (_EXCLUDED, _BEFORE)]
    if not left:
        return
    report.undo()
    first = "; ".join(f"{row.name or 'the model'} ({row.cls}): {row.reason}" for row in left[:5])
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    raise RuntimeError(
        f"patch: strict=True, and {len(left)} modules would be left: {first}{more}; name them in "
        f"exclude, or leave strict away"
    )
