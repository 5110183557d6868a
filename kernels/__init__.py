"""Triton kernels, installed as `mmfast.kernels`.

The folder lies beside `mmfast/` in the tree, so a Python started there could find it under the
top-level name `kernels`, which belongs to another package. That import is refused.
"""

if __name__ != "mmfast.kernels":
    raise ImportError(
        "this folder is mmfast.kernels, not a top-level package `kernels`; "
        "import mmfast.kernels, or run Python from another folder to reach the package `kernels`"
    )
