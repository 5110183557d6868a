"""Layers on mmfast's kernels for Hugging Face `kernels`: `kernelize` puts their forward in place of
that of a module of the same kind. The package mmfast has to be installed.
"""

from . import layers

__all__ = ["layers"]
