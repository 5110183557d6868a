"""A stack of layers that all attend to one context."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.utils.checkpoint import checkpoint

from mmfast.nn import _checks
from mmfast.nn._layer_streams import conditions, is_causal_mask
from mmfast.nn._layers import Asked, Context
from mmfast.nn._plain import unwrapped
from mmfast.nn._sublayers import apply_norm
from mmfast.nn.context_cache import Caching
from mmfast.nn.cross_modal_encoder_layer import (
    CrossModalEncoderLayer,
    CrossModalOutput,
    LayerCall,
)

_OP = "CrossModalEncoder"


class CrossModalEncoder(Caching):
    r"""Layers in turn, all of which attend to one context.

    Both streams are packed once, run through all layers as valid tokens alone, and are padded once
    at the end. `prepare_context` projects the keys and values of all layers once; what it returns
    takes the place of the context in any number of calls, and `step` generates with it.

    Args:
        layer: a `CrossModalEncoderLayer` (copied `num_layers` times, as `torch.nn` does) or a list
            of them, which may differ.
        num_layers: number of copies; not with a list.
        norm: a module after the last layer.
        checkpoint: in training, keep only the input of each layer and compute the rest again in
            the backward.

    State dicts are those of `torch.nn.TransformerDecoder` (without cross-attention:
    `torch.nn.TransformerEncoder`); `from_torch` shares the weights of either.

    Raises:
        TypeError: something else than layers of this kind.
        ValueError: no layer; a number beside a list.

    Example:
        >>> import torch, mmfast
        >>> layer = mmfast.nn.CrossModalEncoderLayer(64, 4, context_dim=96, norm_first=True)
        >>> stack = mmfast.nn.CrossModalEncoder(layer, num_layers=3, norm=torch.nn.LayerNorm(64))
        >>> text, image = torch.randn(2, 5, 64), torch.randn(2, 9, 96)
        >>> stack(text, image, memory_lens=torch.tensor([9, 0])).shape
        torch.Size([2, 5, 64])
    """

    _blank = True

    def __init__(
        self,
        layer: CrossModalEncoderLayer | Sequence[CrossModalEncoderLayer],
        num_layers: int | None = None,
        norm: Module | None = None,
        *,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(layer, Module) and not isinstance(layer, ModuleList):
            _checks.require_sizes(_OP, num_layers=0 if num_layers is None else num_layers)
            layers = [copy.deepcopy(layer) for _ in range(num_layers or 0)]
        else:
            layers = list(layer)  # type: ignore[arg-type]
            if num_layers is not None and num_layers != len(layers):
                raise ValueError(
                    f"{_OP}: num_layers is {num_layers} but {len(layers)} layers came; leave "
                    f"num_layers out beside a list"
                )
        if not layers:
            raise ValueError(f"{_OP}: there are no layers; give at least one")
        for one in layers:
            if not isinstance(one, CrossModalEncoderLayer):
                raise TypeError(
                    f"{_OP}: a layer is {type(one).__name__}, expected CrossModalEncoderLayer; "
                    f"convert layers of torch.nn with CrossModalEncoderLayer.from_torch"
                )
        self.layers = ModuleList(layers)
        self.num_layers = len(layers)
        self.norm = norm
        self.checkpoint = checkpoint

    @classmethod
    def from_torch(cls, stack: Module, *, checkpoint: bool = False) -> CrossModalEncoder:
        """A stack that shares the parameters of a decoder or encoder of `torch.nn`.

        Raises:
            TypeError: another module, or a layer with a `forward` of its own.
        """
        if not isinstance(stack, torch.nn.TransformerDecoder | torch.nn.TransformerEncoder):
            raise TypeError(
                f"{_OP}.from_torch: expected a torch.nn.TransformerDecoder or TransformerEncoder "
                f"but got {type(stack).__name__}"
            )
        layers = [CrossModalEncoderLayer.from_torch(layer) for layer in stack.layers]
        shared = cls(layers, norm=stack.norm, checkpoint=checkpoint)
        return shared.train(stack.training)

    def extra_repr(self) -> str:
        """The setting that the submodules do not show."""
        return f"checkpoint={self.checkpoint}"

    def forward(
        self,
        tgt: Any,
        memory: Any = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        tgt_lens: Tensor | None = None,
        memory_lens: Tensor | None = None,
        return_importance: bool = False,
        return_weights: bool | str = False,
    ) -> Any:
        """`tgt` through all layers; arguments as `CrossModalEncoderLayer.forward`.

        `memory` may also be a `ContextCache` of `prepare_context`. `tgt_is_causal=None` looks
        whether `tgt_mask` is the causal mask, where looking costs nothing.

        Returns:
            As `tgt`; with any `return_*` a `CrossModalOutput`, whose statistics have a dim of
            layers (those with that attention) after the batch.
        """
        causal = is_causal_mask(tgt_mask, tgt_is_causal)
        asks = return_importance or return_weights is not False
        masked = (tgt_mask is not None and not causal) or memory_mask is not None
        first: Any = self.layers[0]
        stream = first.open(_OP, tgt, tgt_key_padding_mask, tgt_lens, in_place=masked or asks)
        options: dict[str, Any] = {}
        attention = next((x.self_attn for x in self.layers if x.self_attn is not None), None)
        if attention is not None:
            heads = unwrapped(attention).num_heads
            options = conditions(_OP, stream, None, tgt_mask, causal, heads)
        contexts: list[Context] = []
        if self._crossing():
            contexts = self._contexts(
                _OP, stream, memory, memory_mask, memory_is_causal, memory_key_padding_mask,
                memory_lens, in_place=asks,
            )  # fmt: skip
        elif memory is not None:
            raise ValueError(
                f"{_OP}: memory came but the layers have no cross-attention; leave it out"
            )
        x, found, following = stream.values, [], iter(contexts)
        again = self.checkpoint and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            context = None if layer.multihead_attn is None else next(following)
            asked = Asked(return_importance, return_weights, {}) if asks else None
            call = LayerCall(stream, x, options, context, asked)
            x = checkpoint(layer, call, use_reentrant=False) if again else layer(call)
            if asked is not None:
                found.append(asked.found)
        out = stream.close(x if self.norm is None else apply_norm(self.norm, x))
        if not asks:
            return out
        joint = {
            name: torch.stack([part[name] for part in found if part.get(name) is not None], 1)
            for name in CrossModalOutput._fields
            if any(part.get(name) is not None for part in found)
        }
        return CrossModalOutput(out, **joint)
