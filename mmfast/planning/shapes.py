"""The sizes of one cross-attention with its projections, and what the plans make of them."""

from __future__ import annotations

from dataclasses import dataclass

PLANS = ("projected", "packed", "absorbed")
"""Equal ways to compute `softmax(q k^T) v` between its projections; docs/planner.md has them."""


@dataclass(frozen=True)
class AttentionShapes:
    """The sizes that a plan's cost follows from.

    Args:
        batch: items B.
        queries: rows N of an item's queries, padding included.
        keys: rows M of an item's context, padding included.
        embed_dim: width of the queries' stream and of the result.
        context_dim: width C of the context.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, a divisor of H.
        head_dim: width D of a query and key head.
        value_head_dim: width Dv of a value head.
        tokens: valid rows of the context in all items together. None where the host does not know
            them: nothing can be packed then, and nothing is known to be padding.
        query_tokens: the same of the queries; None as if none were padding.
        context_grad: whether the context gets a gradient in training.
        context_packed: the context comes packed (`mmfast.nn.PackedTokens`, a jagged tensor).

    Raises:
        ValueError: a size below 0, or more tokens than rows.

    Example:
        >>> from mmfast.planning import AttentionShapes
        >>> AttentionShapes(8, 1, 577, 768, 768, 12, 12, 64, 64).valid_keys
        4616
    """

    batch: int
    queries: int
    keys: int
    embed_dim: int
    context_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    tokens: int | None = None
    query_tokens: int | None = None
    context_grad: bool = True
    context_packed: bool = False

    def __post_init__(self) -> None:
        for name in (
            "batch", "queries", "keys", "embed_dim", "context_dim", "num_heads", "num_kv_heads",
            "head_dim", "value_head_dim", "tokens", "query_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"AttentionShapes: {name} must be at least 0, got {value}")
        for name, rows in (("tokens", self.keys), ("query_tokens", self.queries)):
            value = getattr(self, name)
            if value is not None and value > self.batch * rows:
                raise ValueError(
                    f"AttentionShapes: {name}={value} are more than the {self.batch} x {rows} rows "
                    f"that there are"
                )

    @property
    def valid_keys(self) -> int:
        """Rows of the context that are not known to be padding."""
        return self.batch * self.keys if self.tokens is None else self.tokens

    @property
    def valid_queries(self) -> int:
        """Rows of the queries that are not known to be padding."""
        return self.batch * self.queries if self.query_tokens is None else self.query_tokens
