"""Attention weights that a layer asks for and throws away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from mmfast.ops._autograd import in_eager

_unwanted: ContextVar[bool] = ContextVar("mmfast_unwanted_weights", default=False)


def in_plain_eager() -> bool:
    """Neither torch.compile nor functorch is at work: what is not computed has to be said."""
    return not torch.compiler.is_compiling() and in_eager()


@contextlib.contextmanager
def no_weights() -> Iterator[None]:
    """Attentions inside need not give the weights that they are asked for."""
    token = _unwanted.set(True)
    try:
        yield
    finally:
        _unwanted.reset(token)


def unwanted() -> bool:
    """Whether nobody will look at weights that are asked for now."""
    return _unwanted.get() and in_plain_eager()
