"""Many tokens become one: learned queries attend to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import LayerNorm, Module, Parameter

from mmfast.nn import _checks
from mmfast.nn.cross_modal_attention import CrossModalAttention
from mmfast.nn.gated_cross_attention_block import _FeedForward
from mmfast.nn.packed_tokens import PackedTokens

_OP = "AttentionPooling"


class AttentionPoolingOutput(NamedTuple):
    """What `AttentionPooling` returns when the importance is asked for."""

    out: Tensor
    importance: Tensor


class AttentionPooling(Module):
    r"""Tokens of any number become one vector (or a few): learned queries attend to them::

        h   = CrossModalAttention(queries, x)
        out = h                                     or, with hidden_features,
        out = h + feed_forward(LayerNorm(h))        SigLIP's head (Zhai et al. 2023)

    With one query the cheap plan is to absorb the projections of keys and values: the tokens are
    then read once and never projected (`module.attention.explain()`).

    **Missing modality.** An item without tokens gives exactly 0, and changes no gradient.

    Args:
        embed_dim: width of the queries and of the result.
        num_heads: attention heads.
        num_queries: how many vectors an item gives; None: one, without a dim for it.
        context_dim: width of x; default `embed_dim`.
        hidden_features: width of a feed-forward network after the attention; default: none.
        activation: of it: "gelu_tanh", "gelu" (erf), "silu" or "relu".
        eps: of its norm.
        bias: biases in the projections.
        dropout: of attention weights, in training.
        device, dtype: of the parameters.

    Parameters: `queries` `[num_queries, embed_dim]` (at first normal, of variance
    `1 / embed_dim`), `attention` (`CrossModalAttention`), and with `hidden_features` `norm` and
    `feed_forward`.

    Raises:
        ValueError: sizes below 1 or that do not divide, and tokens of another width.

    Example:
        >>> import torch, mmfast
        >>> _ = torch.manual_seed(0)
        >>> pool = mmfast.nn.AttentionPooling(64, 4)
        >>> patches = torch.randn(3, 9, 64)
        >>> pooled, importance = pool(patches, torch.tensor([9, 4, 0]), return_importance=True)
        >>> pooled.shape, importance.shape, bool((pooled[2] == 0).all())
        (torch.Size([3, 64]), torch.Size([3, 4, 9]), True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_queries: int | None = None,
        context_dim: int | None = None,
        hidden_features: int | None = None,
        activation: str = "gelu_tanh",
        eps: float = 1e-6,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.require_sizes(_OP, num_queries=num_queries, hidden_features=hidden_features)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_queries = embed_dim, num_queries
        self.queries = Parameter(torch.empty(num_queries or 1, embed_dim, **factory))
        self.attention = CrossModalAttention(
            embed_dim, num_heads, context_dim=context_dim, bias=bias, dropout=dropout, **factory
        )
        self.norm = self.feed_forward = None
        if hidden_features is not None:
            self.norm = LayerNorm(embed_dim, eps=eps, **factory)
            self.feed_forward = _FeedForward(embed_dim, hidden_features, activation, bias, factory)
        self._reset_queries()

    def reset_parameters(self) -> None:
        """Every part anew."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        self._reset_queries()

    def _reset_queries(self) -> None:
        torch.nn.init.normal_(self.queries, std=self.embed_dim**-0.5)

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return f"embed_dim={self.embed_dim}, num_queries={self.num_queries}"

    def forward(
        self,
        x: Tensor | PackedTokens,
        lens: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        return_importance: bool = False,
    ) -> Tensor | AttentionPoolingOutput:
        """Pool.

        Args:
            x: `[B, N, context_dim]`, or `PackedTokens`, or a jagged nested tensor.
            lens: `[B]` integers: the valid tokens of each item of a padded x. Padding may be NaN.
            padding_mask: bool `[B, N]`, True at padding, in any pattern; give one of the two.
            return_importance: also how much of each query's attention each token got,
                `[B, num_heads, N]` float32, summed over the queries.

        Returns:
            `[B, embed_dim]`, or `[B, num_queries, embed_dim]` where `num_queries` is given;
            0 for items without tokens. With `return_importance`
            `AttentionPoolingOutput(out, importance)`.
        """
        if isinstance(x, Tensor) and x.is_nested:
            x = PackedTokens.from_nested(x)
        mask = empty = None
        if isinstance(x, PackedTokens):
            if lens is not None or padding_mask is not None:
                raise ValueError(
                    f"{_OP}: packed tokens know their lengths; leave lens and padding_mask out"
                )
            batch, empty = x.batch, x.lens == 0
        else:
            width = self.attention.context_dim
            _checks.require_stream(_OP, "x", x, width, "context_dim", dims=3)
            batch = x.shape[0]
            if lens is not None:
                _checks.require_lens(_OP, "lens", lens, x)
                empty = lens == 0
            if padding_mask is not None:
                self._check_mask(padding_mask, x, lens)
                x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)  # NaN times 0 is NaN
                mask, empty = padding_mask.logical_not()[:, None, None], padding_mask.all(1)
        queries = self.queries.expand(batch, -1, -1)
        result = self.attention(
            queries, x, context_lens=lens, mask=mask, return_importance=return_importance
        )
        out = result.out if return_importance else result
        if self.feed_forward is not None:
            assert self.norm is not None
            out = out + self.feed_forward(self.norm(out))
            if not isinstance(x, PackedTokens) and x.shape[1] == 0:
                out = torch.zeros_like(out)
            elif empty is not None:
                out = out.masked_fill(empty.view(-1, 1, 1), 0.0)
        out = out.squeeze(1) if self.num_queries is None else out
        return AttentionPoolingOutput(out, result.importance) if return_importance else out

    @staticmethod
    def _check_mask(padding_mask: Any, x: Tensor, lens: Tensor | None) -> None:
        if lens is not None:
            raise ValueError(f"{_OP}: give lens or padding_mask, not both")
        if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
            got = getattr(padding_mask, "dtype", type(padding_mask).__name__)
            raise TypeError(
                f"{_OP}: padding_mask must be a bool tensor, True at padding, got {got}; convert "
                f"it with padding_mask != 0"
            )
        if padding_mask.shape != x.shape[:2]:
            raise ValueError(
                f"{_OP}: padding_mask has shape {list(padding_mask.shape)}, expected "
                f"{list(x.shape[:2])}; give one bool for each row of x"
            )
