"""What tests and benchmarks share: the registry of cases, the ruler, the eager peer."""
