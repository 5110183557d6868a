"""Triton kernels, installed as `mmfast.kernels`.

The folder lies beside `mmfast/` in the tree, so a Python started there finds it under the top-level
name `kernels`, which belongs to a package of Hugging Face. That import gets the package where it is
installed, and is refused where it is not.
"""

if __name__ != "mmfast.kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _tree = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _elsewhere = [path for path in sys.path if os.path.abspath(path) != _tree]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is None or _spec.loader is None:
        raise ImportError(
            "this folder is mmfast.kernels, not a top-level package `kernels`; import "
            "mmfast.kernels, or install the package `kernels` if that is what is meant"
        )
    # What stands in sys.modules when an import ends is what was imported.
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
