"""The benchmark suite: `python -m benchmarks` from the repository root (or `make bench`).

It measures; it is not part of the wheel and nothing imports it.
"""
