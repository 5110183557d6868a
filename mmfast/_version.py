"""The one place that holds the version; pyproject.toml and the library build read it."""

__version__ = "0.1.0"
