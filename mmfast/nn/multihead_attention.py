"""`torch.nn.MultiheadAttention` on `mmfast.cross_attention`: same weights and calls, less work."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from mmfast.nn._masks import KeyPadding, attention_mask, bias_dtype, key_padding, top_left_causal
from mmfast.nn._mha_checks import check_arguments
from mmfast.nn._tokens import Tokens
from mmfast.ops.cross_attention import cross_attention

_NO_PADDING = KeyPadding()
_M = TypeVar("_M", bound=torch.nn.Module)


def _no_native_fast_path(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing; see `MultiheadAttention._stand_before_fast_path`."""


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""Multi-head attention, a drop-in for `torch.nn.MultiheadAttention`.

    The constructor, the parameters and their initialisation, the state dict, the arguments of
    `forward` and its results are PyTorch's, in every form: `batch_first` or not, batched (3-D) or
    not (2-D), `kdim`/`vdim`, `add_bias_kv`, `add_zero_attn`, bool and float masks, `need_weights`.
    It is a subclass, so `isinstance` checks (FSDP wrapping, weight initialisation) hold too.
    `MultiheadAttention.from_torch(module)` takes an existing module's place and shares its weights.

    What differs, all of it on purpose:

    - **A row with nothing to attend** (every key masked) has weights 0 and attention result 0, so
      its output is the bias of the output projection, and its gradients are finite. PyTorch does
      the same with `need_weights=False` and gives NaN with `need_weights=True`, its default. (For
      an output of exactly 0 use `mmfast.nn.CrossModalAttention`.)
    - **Padding is not computed.** A `key_padding_mask` with its padding on the right is recognised
      as lengths: padded keys are neither projected nor attended to, and may hold NaN. For other
      patterns the attention skips what no query sees. The values are only looked at on the CPU.
    - **Masks are not expanded** to `[B * H, L, S]`.
    - **Returned weights are before dropout**; PyTorch returns them after it, in training.
    - **The native fast path is not taken**, neither here nor by a `TransformerEncoderLayer` that
      holds this module: in eval mode that layer would bypass it. A nested tensor (also the one that
      `TransformerEncoder` makes of a padded batch in eval mode under `no_grad`) is handed to
      PyTorch's own implementation, errors included.
    - **TorchScript**: `torch.jit.script` compiles PyTorch's own module with these weights.

    Shapes and meaning of everything else: see `torch.nn.MultiheadAttention`.

    Errors are ValueError and, at the same time, the AssertionError or RuntimeError PyTorch raises.

    Example:
        >>> import torch, mmfast
        >>> _ = torch.manual_seed(0)
        >>> attention = mmfast.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> text, image = torch.randn(2, 5, 64), torch.randn(2, 9, 64)
        >>> padding = torch.arange(9) >= torch.tensor([[9], [4]])  # item 1 has 4 patches
        >>> out, weights = attention(text, image, image, key_padding_mask=padding)
        >>> out.shape, weights.shape
        (torch.Size([2, 5, 64]), torch.Size([2, 5, 9]))
        >>> bool((weights[1, :, 4:] == 0).all())
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self._stand_before_fast_path()

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention) -> MultiheadAttention:
        """A module that shares the parameters of `module` (the same objects) and its settings.

        Training mode and forward hooks are kept. `module` itself is not changed and stays usable.

        Raises:
            TypeError: `module` is not a `torch.nn.MultiheadAttention`, is a subclass with a
                `forward` of its own, or is parametrized (convert it first, parametrize after).
        """
        if not isinstance(module, torch.nn.MultiheadAttention):
            raise TypeError(
                f"MultiheadAttention.from_torch: expected a torch.nn.MultiheadAttention but got "
                f"{type(module).__name__}"
            )
        stock = type(module).forward in (torch.nn.MultiheadAttention.forward, cls.forward)
        if not stock or parametrize.is_parametrized(module):
            raise TypeError(
                f"MultiheadAttention.from_torch: {type(module).__name__} has a forward or "
                f"parametrizations of its own, which would be lost; convert the plain "
                f"torch.nn.MultiheadAttention before changing it"
            )
        shared = _share(module, cls)
        shared._stand_before_fast_path()
        return shared

    def _stand_before_fast_path(self) -> None:
        # torch.nn.TransformerEncoderLayer in eval mode does not call self_attn but hands its
        # weights to a native kernel, unless a forward hook hangs somewhere below the layer. The
        # output projection is never called as a module (neither here nor in torch), so a hook
        # there says "call me" without costing anything per call.
        self.out_proj.register_forward_pre_hook(_no_native_fast_path)

    def __prepare_scriptable__(self) -> torch.nn.MultiheadAttention:
        return _share(self, torch.nn.MultiheadAttention)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`; arguments as `torch.nn.MultiheadAttention`.

        Returns `(output, weights)`; `weights` is None unless `need_weights`.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        batched = query.dim() == 3
        check_arguments(
            query, key, value, key_padding_mask, attn_mask, is_causal, need_weights,
            self.embed_dim, self.kdim, self.vdim, self.num_heads, self.out_proj.weight,
            batch_dim=0 if self.batch_first else 1,
        )  # fmt: skip
        batch_first = self.batch_first or not batched
        if not batched:
            query, key, value = _batch_of_one(query, key, value)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        if batch_first:
            batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        else:
            queries, batch, keys = query.shape[0], query.shape[1], key.shape[0]

        # As in torch: the hint replaces the mask only where nothing else needs the mask.
        causal = is_causal and key_padding_mask is None and not need_weights
        if causal:
            attn_mask = None

        padding = _NO_PADDING
        if key_padding_mask is not None:
            padding = key_padding(key_padding_mask, queries)
        q, k, v = self._project(query, key, value, padding.pad, batch_first)
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._extend(k, v)
            extra = k.shape[2] - keys
            if key_padding_mask is not None:
                padding = key_padding(F.pad(key_padding_mask, (0, extra)), queries)
            if attn_mask is not None:
                attn_mask = F.pad(attn_mask, (0, extra))
            keys += extra

        segment_rule = "equal"
        if causal and queries != keys:
            causal, segment_rule = False, "at_most"
            padding = top_left_causal(batch, queries, keys, query.device)
        mask = bias = None
        if attn_mask is not None:
            mask, bias = attention_mask(attn_mask, batch, self.num_heads, q.dtype)
        if padding.bias is not None:
            padding_bias = bias_dtype(padding.bias, q.dtype)
            bias = padding_bias if bias is None else bias + padding_bias

        result = cross_attention(
            q, k, v,
            kv_lens=padding.kv_lens, q_segments=padding.q_segments,
            kv_segments=padding.kv_segments, segment_rule=segment_rule,
            mask=mask, bias=bias, is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=need_weights and ("mean" if average_attn_weights else "per_head"),
        )  # fmt: skip
        if isinstance(result, Tensor):
            attended, weights = result, None
        else:
            attended, weights = result.out, result.weights

        # [B, H, N, D] is [B, N, H, D] in memory: a view for batch_first, a copy otherwise.
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        attended = attended.permute(order).reshape(*query.shape)
        output = F.linear(attended, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            output = output.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, pad: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, L, D]`: views of the projections, never copied.

        One product for self-attention, two where key and value are the same tensor, else three.
        """
        width, heads = self.embed_dim, (self.num_heads, self.head_dim)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        packed, weight, bias = self._qkv_same_embed_dim, self.in_proj_weight, self.in_proj_bias

        tokens = None
        if pad is not None:
            work = (self.kdim + self.vdim) * width
            tokens = Tokens(pad if batch_first else pad.t(), work)
            if tokens.full or (query is key and tokens.index is None):
                tokens = None  # nothing to skip, or a padded row is a query too and is needed

        if packed and key is value:
            if query is key and tokens is None:
                q, k, v = _heads(F.linear(query, weight, bias), 3, *heads).unbind(-3)
                return q.permute(order), k.permute(order), v.permute(order)
            w_q, w_kv = weight.split([width, 2 * width])
            b_q, b_kv = (None, None) if bias is None else bias.split([width, 2 * width])
            k, v = _heads(_linear(key, w_kv, b_kv, tokens), 2, *heads).unbind(-3)
            q = _heads(F.linear(query, w_q, b_q), *heads)
            return q.permute(order), k.permute(order), v.permute(order)

        if packed:
            w_q, w_k, w_v = weight.chunk(3)
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        q = _heads(F.linear(query, w_q, b_q), *heads)
        k = _heads(_linear(key, w_k, b_k, tokens), *heads)
        v = _heads(_linear(value, w_v, b_v, tokens), *heads)
        return q.permute(order), k.permute(order), v.permute(order)

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned key and value and the zero key and value, where asked for."""
        batch, heads, _, dim = k.shape
        more_k, more_v = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            for bias, into in ((self.bias_k, more_k), (self.bias_v, more_v)):
                into.append(bias.view(1, heads, 1, dim).expand(batch, heads, 1, dim))
        if self.add_zero_attn:
            zero = k.new_zeros(1, 1, 1, 1).expand(batch, heads, 1, dim)
            more_k.append(zero)
            more_v.append(zero)
        return torch.cat(more_k, dim=2), torch.cat(more_v, dim=2)


def _heads(x: Tensor, *sizes: int) -> Tensor:
    """Split the last dimension; always a view."""
    return x.view(*x.shape[:-1], *sizes)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tokens | None) -> Tensor:
    """`F.linear` on the rows that hold tokens; the result is padded again."""
    if tokens is None:
        return F.linear(x, weight, bias)
    return tokens.put(F.linear(tokens.take(x), weight, bias))


def _batch_of_one(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add a batch dimension, and keep "the same tensor" true where it was."""
    key_ = key.unsqueeze(0)
    value_ = key_ if value is key else value.unsqueeze(0)
    query_ = key_ if query is key else query.unsqueeze(0)
    return query_, key_, value_


def _share(module: torch.nn.MultiheadAttention, cls: type[_M]) -> _M:
    """`module` as a `cls`: the same parameters, its own registries and its own `out_proj`."""
    shared = _shallow_copy(module, cls)
    out_proj = _shallow_copy(module.out_proj, type(module.out_proj))
    for handle, hook in list(out_proj._forward_pre_hooks.items()):
        if hook is _no_native_fast_path:
            del out_proj._forward_pre_hooks[handle]
    shared._modules["out_proj"] = out_proj
    return shared


def _shallow_copy(module: torch.nn.Module, cls: type[_M]) -> _M:
    new = cls.__new__(cls)
    for name, value in module.__dict__.items():
        new.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    return new
