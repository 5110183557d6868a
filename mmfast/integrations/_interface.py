"""`attn_implementation="mmfast"`: what transformers finds by that name, attention and masks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._inside import LEFT_ALONE, NAME, records_attention

# Each changes the result and is not something `cross_attention` computes: the model's own function
# does, as it is written.
_NOT_OURS = ("softcap", "s_aux", "cache")

CHUNKS = "mmfast_chunks"
"""Argument with the `Layout` of packed rows that attend within their item only."""


def register_attention() -> None:
    """Make `attn_implementation="mmfast"` known to transformers.

    `mmfast.patch` does this itself. Call it to load or build a model with that name::

        mmfast.register_attention()
        model = AutoModel.from_pretrained(path, attn_implementation="mmfast")

    Nothing changes for models that do not ask for it. Models whose attention is written out take
    the name and ignore it: `mmfast.patch(model)` reaches these as well.

    Raises:
        ImportError: transformers is not installed, or older than 4.57.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_attention: needs transformers 4.57 or newer; install it with "
            "pip install -U transformers"
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for an attention: `mmfast.cross_attention`.

    `query` `[B, H, N, D]`, `key` and `value` `[B, G, M, D]`. A mask that is absent is not taken for
    a causal one, whatever the module says of itself: `is_causal` counts only as an argument, and
    only for as many keys as queries. The weights come where the model collects them.
    """
    if kwargs.get(CHUNKS) is not None:
        attention_mask = PackedMask(kwargs[CHUNKS], kwargs[CHUNKS])
    special = [name for name in _NOT_OURS if kwargs.get(name) is not None]
    if special or (module.__dict__.get(LEFT_ALONE) and not isinstance(attention_mask, PackedMask)):
        return _own_function(module, special)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            **({} if position_bias is None else {"position_bias": position_bias}), **kwargs,
        )  # fmt: skip
    packed = isinstance(attention_mask, PackedMask)
    need_weights = not packed and (bool(kwargs.get("output_attentions")) or records_attention())
    causal = bool(is_causal) and attention_mask is None and 1 < query.shape[2] == key.shape[2]
    return attend(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
        position_bias=position_bias, is_causal=causal, need_weights=need_weights,
    )  # fmt: skip


def _own_function(module: nn.Module, special: list[str]) -> Callable[..., Any]:
    """The eager function in the file of the module's class."""
    for cls in type(module).__mro__:
        file = sys.modules.get(cls.__module__)
        function = getattr(file, "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f"mmfast: {type(module).__name__} asks for {', '.join(special) or 'its own attention'}, "
        f"and its file has no eager_attention_forward to fall back on; load the model with "
        f'attn_implementation="eager"'
    )


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers gives each layer: additive, `[B, 1, N, M]`, as `eager` has it.

    Models with attention written out add it to their scores, whatever implementation they are told
    to use. Key padding alone is a view of `[B, 1, 1, M]`: no memory for each query.
    """
    from transformers import masking_utils

    # transformers 4.57 has no such function, and says cache_position in place of q_length.
    rows_are_alike = getattr(masking_utils, "bidirectional_mask_function", mask)
    length = kwargs.get("q_length")
    if kwargs.get("mask_function") is rows_are_alike and isinstance(length, int) and not args:
        row = masking_utils.eager_mask(**{**kwargs, "q_length": 1})
        return None if row is None else row.expand(-1, -1, length, -1)
    made: Tensor | None = masking_utils.eager_mask(*args, **kwargs)
    return made


class Previous:
    """The attention implementation a patched model had; kept on the model.

    Unpickling one registers the name that the model's configuration holds now.
    """

    def __init__(self, name: str | None) -> None:
        register_attention()
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return (Previous, (self.name,))
