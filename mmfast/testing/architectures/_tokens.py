"""Token ids of padded texts, and what is compared of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def token_ids(mask: Tensor, vocabulary: int, special: int = 4) -> Tensor:
    """Random ids from `special` on where mask is 1, and 0 in the padding."""
    return torch.randint(special, vocabulary, mask.shape) * mask


def with_images(ids: Tensor, mask: Tensor, image_token: int, count: int, offset: int = 1) -> Tensor:
    """`ids` with `count` image tokens in each row, `offset` after its first token."""
    start = mask.argmax(1, keepdim=True) + offset
    place = torch.arange(mask.shape[1])
    return ids.masked_fill((place >= start) & (place < start + count), image_token)


def logits_of_tokens(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits of the rows that `attention_mask` calls tokens."""
    return {"logits": result.logits[inputs["attention_mask"].bool()]}
