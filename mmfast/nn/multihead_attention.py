"""`torch.nn.MultiheadAttention` on `mmfast.cross_attention`: same weights and calls, less work."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from mmfast import planning
from mmfast.nn._absorbed import Absorbed
from mmfast.nn._attend_call import AttendCall
from mmfast.nn._conditions import Conditions, Wanted
from mmfast.nn._masks import KeyPadding, attention_mask, bias_dtype, key_padding, top_left_causal
from mmfast.nn._mha_checks import check_arguments
from mmfast.nn._planned import PlanSizes
from mmfast.nn._projected_attention import ProjectedAttention
from mmfast.nn._streams import Source
from mmfast.nn._tokens import Tokens, readable
from mmfast.nn.projected_context import ProjectedContext

_NO_PADDING = KeyPadding()
_M = TypeVar("_M", bound=torch.nn.Module)


def _no_native_fast_path(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing; see `MultiheadAttention._stand_before_fast_path`."""


class MultiheadAttention(ProjectedAttention, torch.nn.MultiheadAttention):
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

    Where key and value are one tensor its projections are done for all rows, for its tokens alone,
    or, with few queries, absorbed into the queries and the result: see `explain()` and
    `mmfast.use_plan`. Beside `forward`, `attend(x, context)` takes packed and jagged streams and
    what `prepare_context` projected once (batch first, whatever `batch_first` says).

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

    _drop_weights = False
    """Set on an instance whose only caller throws the weights away: they are not computed, whatever
    `need_weights` says, unless a hook would see them."""

    def _stand_before_fast_path(self) -> None:
        # torch.nn.TransformerEncoderLayer in eval mode does not call self_attn but hands its
        # weights to a native kernel, unless a forward hook hangs somewhere below the layer. A plain
        # output projection is never called as a module (neither here nor in torch), so a hook
        # there says "call me" without costing anything per call.
        self.out_proj.register_forward_pre_hook(_no_native_fast_path)

    def _stand_aside(self) -> None:
        """The opposite, wherever the output projection is wrapped."""
        for module in self.out_proj.modules():
            _unhook(module)

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
        call: Any = query
        if isinstance(call, AttendCall):
            return call.run(self), None
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        need_weights = need_weights and (not self._drop_weights or bool(self._forward_hooks))
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
        k = v = None
        if key is not value or self._no_single_context() is not None:
            k, v = self._two_contexts(key, value, padding.pad, batch_first)
            extra = k.shape[2] - keys
            if extra > 0:
                if key_padding_mask is not None:
                    padding = key_padding(F.pad(key_padding_mask, (0, extra)), queries)
                if attn_mask is not None:
                    attn_mask = F.pad(attn_mask, (0, extra))
                keys += extra

        segment_rule, segments = "equal", (padding.q_segments, padding.kv_segments)
        if causal and queries != keys:
            causal, segment_rule = False, "at_most"
            segments = top_left_causal(batch, queries, keys, query.device)[1:3]
        mask = bias = None
        device = query.device.type
        dtype = query.dtype
        if attn_mask is not None or padding.bias is not None:
            if device != "meta" and torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            if attn_mask is not None:
                mask, bias = attention_mask(attn_mask, batch, self.num_heads, dtype)
            if padding.bias is not None:
                padding_bias = bias_dtype(padding.bias, dtype)
                bias = padding_bias if bias is None else bias + padding_bias
        conditions = Conditions(*segments, segment_rule, mask, bias, causal)
        wanted = Wanted(weights=need_weights and ("mean" if average_attn_weights else "per_head"))

        source: Source | ProjectedContext
        if k is not None and v is not None:
            source = ProjectedContext(k, v, lens=padding.kv_lens)
        else:
            source = Source(
                key, padding.kv_lens, padding.pad, seq_first=not batch_first, holes=padding.holes
            )
        output, _, _, weights = self._follow_plan(
            query, source, conditions, wanted, padding.holes, not batch_first
        )
        if not batched:
            output = output.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _follow_plan(
        self,
        query: Tensor,
        source: Source | ProjectedContext,
        conditions: Conditions,
        wanted: Wanted,
        holes: bool,
        seq_first: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """`_attend`, by the plan that suits; without padding keys in holes where it packs them."""
        plan = None
        if isinstance(source, Source):
            if query is source.dense and source.tokens == source.batch * source.keys:
                # One product gives queries, keys and values: nothing to plan unless asked to.
                plan = "projected" if planning.current_plan() == "auto" else None
            elif holes and source.pad is not None and not wanted.weights:
                others = conditions._replace(q_segments=None, kv_segments=None)
                if readable(source.pad) and not others.some():
                    source.tokens = source.pad.numel() - int(source.pad.sum())
                    plan = self._plan_for(query, source, None, seq_first)
                    if plan == "packed":
                        conditions = Conditions()
        return self._attend(query, source, conditions, wanted, seq_first=seq_first, plan=plan)

    def _two_contexts(
        self, key: Tensor, value: Tensor, pad: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, S, D]` of streams of their own, extended where asked for."""
        tokens = None
        if pad is not None:
            work = (self.kdim + self.vdim) * self.embed_dim
            tokens = Tokens(pad if batch_first else pad.t(), work)
        held = self._hold("absorbed")
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        heads = (self.num_heads, self.head_dim)
        k = _heads(_linear(key, held.k, held.k_bias, tokens), *heads).permute(order)
        v = _heads(_linear(value, held.v, held.v_bias, tokens), *heads).permute(order)
        return self._extend(k, v)

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned key and value and the zero key and value, where asked for."""
        if self.bias_k is None and not self.add_zero_attn:
            return k, v
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

    def kv_weights(self) -> tuple[Tensor, Tensor | None]:
        """The projections of keys and values as one: weight `[2 * embed_dim, kdim]`, and bias.

        Keys come first. For a stack that projects one context for all its layers at once;
        `kv_heads` takes the result apart.
        """
        self._require_single_context("kv_weights")
        held = self._hold("packed")
        if held.kv is not None:
            return held.kv, held.kv_bias
        bias = None if held.k_bias is None else torch.cat([held.k_bias, held.v_bias])
        return torch.cat([held.k, held.v]), bias

    def kv_heads(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., H, D]` in what `kv_weights` give, `[..., 2 * embed_dim]`."""
        k, v = _heads(projected, 2, self.num_heads, self.head_dim).unbind(-3)
        return k, v

    # --- what attend needs -----------------------------------------------------------------------

    _dead_rows_are_zero = False

    def _hold(self, plan: str) -> _Held:
        # One split: its gradient is one concatenation, that of each slice would be a whole.
        width = self.embed_dim
        bias: Tensor | None = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            return _Held(
                self.q_proj_weight, biases[0], k=self.k_proj_weight, k_bias=biases[1],
                v=self.v_proj_weight, v_bias=biases[2],
            )  # fmt: skip
        weight = self.in_proj_weight
        if plan == "absorbed":
            q, k, v = weight.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            return _Held(q, biases[0], k=k, k_bias=biases[1], v=v, v_bias=biases[2])
        q, kv = weight.split([width, 2 * width])
        if bias is None:
            return _Held(q, None, kv)
        q_bias, kv_bias = bias.split([width, 2 * width])
        return _Held(q, q_bias, kv, kv_bias)

    def _query_heads(self, rows: Tensor, held: _Held) -> Tensor:
        return _heads(F.linear(rows, held.q, held.q_bias), self.num_heads, self.head_dim)

    def _key_value_heads(self, rows: Tensor, held: _Held) -> tuple[Tensor, Tensor]:
        if held.kv is not None:
            return self.kv_heads(F.linear(rows, held.kv, held.kv_bias))
        heads = (self.num_heads, self.head_dim)
        k, v = F.linear(rows, held.k, held.k_bias), F.linear(rows, held.v, held.v_bias)
        return _heads(k, *heads), _heads(v, *heads)

    def _merged_heads(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if not self._qkv_same_embed_dim:
            return None
        projected = F.linear(rows, self.in_proj_weight, self.in_proj_bias)
        q, k, v = _heads(projected, 3, self.num_heads, self.head_dim).unbind(-3)
        return q, k, v

    def _result(self, attended: Tensor) -> Tensor:
        out_proj = self.out_proj
        if _read(out_proj):
            return F.linear(attended, out_proj.weight, out_proj.bias)
        return out_proj(attended)

    def _a_weight(self) -> Tensor:
        return self.out_proj.weight

    def _has_result_bias(self) -> bool:
        return self.out_proj.bias is not None

    def _absorbed(self, held: _Held) -> Absorbed:
        shape = (self.num_heads, self.head_dim, self.kdim)
        return Absorbed(held.k.view(shape), held.k_bias, held.v.view(shape), held.v_bias)

    def _plan_sizes(self) -> PlanSizes:
        H, D = self.num_heads, self.head_dim
        return PlanSizes(self.embed_dim, self.kdim, H, H, D, D)

    def _plan_refusals(self) -> Mapping[str, str]:
        reason = self._no_single_context()
        return _NOTHING if reason is None else {"packed": reason, "absorbed": reason}

    def _no_single_context(self) -> str | None:
        if self.bias_k is not None or self.add_zero_attn:
            return "add_bias_kv and add_zero_attn give every item keys that are not in its context"
        if self.kdim != self.vdim:
            return f"keys of width kdim={self.kdim} and values of vdim={self.vdim} are two contexts"
        return None


_NOTHING: Mapping[str, str] = {}


class _Held(NamedTuple):
    """The projections as views of the parameters: keys and values together, or one by one."""

    q: Tensor
    q_bias: Tensor | None
    kv: Tensor | None = None
    kv_bias: Tensor | None = None
    k: Any = None
    k_bias: Any = None
    v: Any = None
    v_bias: Any = None


def _heads(x: Tensor, *sizes: int) -> Tensor:
    """Split the last dimension; always a view."""
    return x.view(*x.shape[:-1], *sizes)


def _read(out_proj: torch.nn.Module) -> bool:
    """Is it the module that PyTorch put there, whose weights may be read? Else it is called.

    In torch it is always read: LoRA there has no effect, offloaded weights are missing.
    """
    if type(out_proj) is not NonDynamicallyQuantizableLinear or "forward" in out_proj.__dict__:
        return False
    hooks = out_proj._forward_pre_hooks
    return not out_proj._forward_hooks and all(
        hook is _no_native_fast_path for hook in hooks.values()
    )


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
    _unhook(out_proj)
    shared._modules["out_proj"] = out_proj
    return shared


def _unhook(module: torch.nn.Module) -> None:
    for handle, hook in list(module._forward_pre_hooks.items()):
        if hook is _no_native_fast_path:
            del module._forward_pre_hooks[handle]


def _shallow_copy(module: torch.nn.Module, cls: type[_M]) -> _M:
    new = cls.__new__(cls)
    for name, value in module.__dict__.items():
        new.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    return new
