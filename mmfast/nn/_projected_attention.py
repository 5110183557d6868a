"""What the attention modules share: one attention between projections, by any of three plans.

- "projected": keys and values are projected, padding included.
- "packed": only the tokens are (mmfast/nn/packed_tokens.py); the attention runs on packed keys.
- "absorbed": they are not; the attention runs on the context itself (mmfast/nn/_absorbed.py).

All give the same results. Which one is taken is up to the planner (mmfast/planning).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast import planning
from mmfast.nn import _absorbed, _checks, _rows
from mmfast.nn._absorbed import Absorbed
from mmfast.nn._conditions import Conditions, Wanted
from mmfast.nn._planned import Planned
from mmfast.nn._streams import Source, like, packed_by_lens, stream_of, valid_rows
from mmfast.nn._tokens import padded_rows, take_rows
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext
from mmfast.ops._autograd import in_eager
from mmfast.ops._shared_keys import shared_refusal
from mmfast.ops.cross_attention import CrossAttentionOutput, cross_attention

_NO_CONDITIONS, _NOTHING_ELSE = Conditions(), Wanted()

_ONLY_THE_RESULT = {"return_lse": False, "return_importance": False, "return_weights": False}


class ProjectedAttention(Planned):
    """A mixin: `attend`, `prepare_context`, `kv_weights` and `explain` over its projections."""

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    training: bool

    # --- what a class gives ----------------------------------------------------------------------

    _dead_rows_are_zero: bool
    """Rows with nothing to attend give exactly 0, else the bias of the output projection."""

    def _hold(self, plan: str) -> Any:
        """Views of parameters for one call: what the next three methods get as `held`."""
        return None

    def _query_heads(self, rows: Tensor, held: Any) -> Tensor:
        """`[..., embed_dim]` -> `[..., H, D]`"""
        raise NotImplementedError

    def _key_value_heads(self, rows: Tensor, held: Any) -> tuple[Tensor, Tensor]:
        """`[..., C]` -> `[..., G, D]` and `[..., G, Dv]`"""
        raise NotImplementedError

    def _absorbed(self, held: Any) -> Absorbed:
        """The projections of keys and values as views."""
        raise NotImplementedError

    def _merged_heads(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Queries, keys and values of a stream that attends to itself, if one product gives all."""
        return None

    def _gate_logits(self, rows: Tensor) -> Tensor | None:
        """`[..., embed_dim]` -> `[..., H]` or `[..., H, Dv]`"""
        return None

    def _result(self, attended: Tensor) -> Tensor:
        """`[..., H * Dv]` -> `[..., embed_dim]`"""
        raise NotImplementedError

    def _a_weight(self) -> Any:
        """A weight, for its dtype and whether it learns."""
        raise NotImplementedError

    def _has_result_bias(self) -> bool:
        raise NotImplementedError

    def _no_single_context(self) -> str | None:
        """Why this module cannot `attend` to one context."""
        return None

    # --- what users call -------------------------------------------------------------------------

    def attend(
        self,
        x: Any,
        context: Any,
        *,
        context_lens: Tensor | None = None,
        x_lens: Tensor | None = None,
        x_segments: Tensor | None = None,
        context_segments: Tensor | None = None,
        segment_rule: str = "equal",
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        return_lse: bool = False,
        return_importance: bool = False,
        return_weights: bool | str = False,
    ) -> Any:
        """Attend from `x` to `context`.

        Args:
            x: `[B, N, embed_dim]`, a jagged `torch.nested` tensor, or `PackedTokens`.
            context: `[B, M, context_dim]`, jagged, `PackedTokens`, or the `ProjectedContext` that
                `prepare_context` gave. M = 0 is a batch in which nobody has a context.
            context_lens: `[B]` integers in `[0, M]`: valid rows of a dense context; 0 = none.
            x_lens: `[B]` integers in `[0, N]`: valid rows of a dense x; the others come out 0.
            x_segments, context_segments, segment_rule: `[B, N]` and `[B, M]` integers: row n sees
                row m where the segments are equal ("equal": text sees its own image) or
                `context_segments <= x_segments` ("at_most": all images so far).
            mask: bool, broadcasts to `[B, H, N, M]`, True = may attend.
            bias: added to the scores, broadcasts to `[B, H, N, M]`.
            is_causal: bottom-right aligned on the true lengths, as `mmfast.cross_attention`.
            return_lse, return_importance, return_weights: as `mmfast.cross_attention`.

        All but x and context is in padded coordinates whatever form these come in: N and M are
        `length` of a `PackedTokens`, the longest item of a jagged tensor.

        Returns:
            The result in the form of x; with any `return_*`
            `CrossAttentionOutput(out, lse, importance, weights)` with None for what was not asked.

        Raises:
            ValueError, TypeError: wrong widths, dtypes, devices or batch sizes; a
                `ProjectedContext` of another batch, device or module; or from
                `mmfast.cross_attention`, whose `kv_lens`, `q_lens`, `q_segments` and `kv_segments`
                are `context_lens`, `x_lens`, `x_segments` and `context_segments` here.
        """
        op = type(self).__name__
        self._require_single_context("attend")
        stream = stream_of(op, "x", x, x_lens, self.embed_dim, "embed_dim")
        source = self._source(op, stream, context, context_lens)
        wanted = Wanted(return_lse, return_importance, return_weights)
        conditions = Conditions(
            x_segments, context_segments, segment_rule, mask, bias, bool(is_causal)
        )
        if isinstance(stream, Tensor) and x_lens is not None:
            sizes = self._plan_sizes()
            work = sizes.num_heads * (sizes.head_dim + sizes.value_head_dim) * self.embed_dim
            stream = packed_by_lens(stream, x_lens, work)
            if isinstance(stream, PackedTokens):
                x_lens = None
        out, lse, importance, weights = self._attend_padded_or_not(
            stream, source, conditions, wanted, x_lens
        )
        out = like(x, out)
        return CrossAttentionOutput(out, lse, importance, weights) if wanted.some() else out

    def prepare_context(self, context: Any, context_lens: Tensor | None = None) -> ProjectedContext:
        """Project a context once, to attend to it many times: `attend(x, prepared)`.

        Args:
            context: `[B, M, context_dim]`, a jagged `torch.nested` tensor, or `PackedTokens`.
            context_lens: `[B]` integers in `[0, M]`: valid rows of a dense context.

        The keys and values come packed where `context` does, or where its lengths can be read for
        nothing and leave something out.

        Raises:
            ValueError, TypeError: wrong width, dtype, device or lengths.
        """
        op = type(self).__name__
        self._require_single_context("prepare_context")
        sizes, held = self._plan_sizes(), self._hold("packed")
        stream = stream_of(op, "context", context, context_lens, sizes.context_dim, "context_dim")
        _checks.require_weight_dtype(op, self._a_weight(), context=_tensor(stream))
        source = Source(stream, context_lens)
        work = sizes.num_kv_heads * (sizes.head_dim + sizes.value_head_dim) * sizes.context_dim
        if source.packed is None:
            source = Source(packed_by_lens(stream, source.lens, work), source.lens)  # type: ignore[arg-type]
        packed = source.packed
        if packed is None:
            k, v = self._key_value_heads(source.rows(fill=torch.is_grad_enabled()), held)
            return ProjectedContext(k.transpose(1, 2), v.transpose(1, 2), lens=source.lens)
        k, v = self._key_value_heads(packed.values, held)
        return ProjectedContext(
            k.transpose(0, 1), v.transpose(0, 1), cu_seqlens=packed.cu_seqlens,
            max_len=packed.length,
        )  # fmt: skip

    # --- one attention ---------------------------------------------------------------------------

    def _require_single_context(self, method: str) -> None:
        reason = self._no_single_context()
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__}.{method}: {reason}; call the module with query, key and "
                f"value instead"
            )

    def _source(
        self, op: str, x: Tensor | PackedTokens, context: Any, lens: Tensor | None
    ) -> Source | ProjectedContext:
        weight, sizes = self._a_weight(), self._plan_sizes()
        if isinstance(context, ProjectedContext):
            if lens is not None:
                raise ValueError(
                    f"{op}: context_lens comes with a projected context, which holds its lengths; "
                    f"give them to prepare_context"
                )
            context.check(op, x, sizes.num_kv_heads, sizes.head_dim, sizes.value_head_dim)
            _checks.require_weight_dtype(op, weight, x=_tensor(x))
            return context
        stream = stream_of(op, "context", context, lens, sizes.context_dim, "context_dim")
        batch = x.batch if isinstance(x, PackedTokens) else x.shape[0]
        source = Source(stream, lens)
        if source.batch != batch:
            raise ValueError(
                f"{op}: context has B={source.batch} but x has B={batch}; both must match; give an "
                f"item without context the length 0 in context_lens"
            )
        _checks.require_weight_dtype(op, weight, x=_tensor(x), context=_tensor(stream))
        return source

    def _attend_padded_or_not(
        self,
        x: Tensor | PackedTokens,
        source: Source | ProjectedContext,
        conditions: Conditions,
        wanted: Wanted,
        x_lens: Tensor | None,
    ) -> tuple[Tensor | PackedTokens, Tensor | None, Tensor | None, Tensor | None]:
        """`_attend` on streams; one with holes is padded where padded coordinates matter."""
        repack: PackedTokens | None = None
        has_holes = isinstance(x, PackedTokens) and x.positions is not None
        if has_holes and (conditions.some() or wanted.some()):
            assert isinstance(x, PackedTokens)
            repack, x = x, x.to_padded()
            conditions = conditions.within(valid_rows(repack)[:, None, :, None])
        padded_keys = conditions.some() or bool(wanted.importance or wanted.weights)
        if padded_keys and isinstance(source, Source) and source.holes:
            assert source.packed is not None
            conditions = conditions.within(valid_rows(source.packed)[:, None, None, :])
            source = Source(source.packed.to_padded())
        rows = x.values if isinstance(x, PackedTokens) else x
        pad = None
        if x_lens is not None and isinstance(x, Tensor):
            pad = padded_rows(x_lens, x.shape[1]).unsqueeze(-1)
            if torch.is_grad_enabled():
                rows = x = x.masked_fill(pad, 0.0)
        packed = x if isinstance(x, PackedTokens) else None
        out, lse, importance, weights = self._attend(
            rows, source, conditions, wanted, packed=packed, x_lens=x_lens
        )
        if pad is not None:
            out = out.masked_fill(pad, 0.0)
        if packed is not None:
            return packed.with_values(out), lse, importance, weights
        if repack is not None:
            index = repack.padded_index(repack.length)
            out = out.flatten(0, 1) if index is None else take_rows(out.flatten(0, 1), index)
            return repack.with_values(out), lse, importance, weights
        return out, lse, importance, weights

    def _attend(
        self,
        rows: Tensor,
        source: Source | ProjectedContext,
        conditions: Conditions = _NO_CONDITIONS,
        wanted: Wanted = _NOTHING_ELSE,
        *,
        packed: PackedTokens | None = None,
        x_lens: Tensor | None = None,
        seq_first: bool = False,
        plan: str | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(out, lse, importance, weights) of rows `[B, N, E]`, `[N, B, E]` or packed `[T, E]`."""
        if plan is None:
            plan = self._plan_for(rows, source, packed, seq_first)
        scale = self.head_dim**-0.5
        options: dict[str, Any] = conditions._asdict()
        options.update(
            scale=scale, dropout_p=self.dropout if self.training else 0.0,
            return_importance=wanted.importance, return_weights=wanted.weights, q_lens=x_lens,
        )  # fmt: skip
        if packed is not None:
            options.update(q_cu_seqlens=packed.cu_seqlens, max_q_len=packed.length)
        seed = None
        if options["dropout_p"] > 0.0:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=rows.device)
            options["dropout_seed"] = seed

        merged = None
        if plan == "projected" and isinstance(source, Source) and source.dense is rows:
            merged = self._merged_heads(rows)
        held = self._hold(plan) if merged is None else None
        absorbed = self._absorbed(held) if plan == "absorbed" else None
        q = self._query_heads(rows, held) if merged is None else merged[0]
        gate = self._gate_logits(rows)
        heads: Tensor | None = None
        if absorbed is not None:
            heads = _absorbed.keep_in_graph(q.flatten(0, -3), absorbed.k_bias)
            q = _absorbed.absorb_queries(heads, absorbed.k).unflatten(1, q.shape[:-2])
            if packed is None:
                q = q.permute(_rows.ABSORBED_TO_OP[seq_first])
        else:
            q = q.transpose(0, 1) if packed is not None else q.permute(_rows.ROWS_TO_OP[seq_first])
            options["gate"] = gate
        if merged is None:
            k, v = self._keys_and_values(plan, source, options, held, rows)
        else:
            options["kv_lens"] = source.lens
            k, v = (x.permute(_rows.ROWS_TO_OP[seq_first]) for x in merged[1:])

        # Which rows attend to nothing follows from the lengths alone, or else from the lse.
        sums_matter = absorbed is not None and absorbed.v_bias is not None
        by_lse = conditions.some() or source.keys == 0
        zero_dead = self._dead_rows_are_zero and (by_lse or source.has_empty)
        zero_dead = zero_dead and (sums_matter or self._has_result_bias())
        needs_lse = by_lse and (zero_dead or sums_matter)
        options["return_lse"] = wanted.lse or needs_lse
        result = cross_attention(q, k, v, **options)
        attended, lse, importance, weights = (
            (result, None, None, None) if isinstance(result, Tensor) else result
        )

        if absorbed is not None:
            if packed is None:
                attended = attended.permute(_rows.OP_TO_ABSORBED[seq_first])
            sums = None
            if sums_matter and seed is not None:
                # What dropout leaves of a row: the same call over values of 1.
                options.update(_ONLY_THE_RESULT)
                sums = cross_attention(q, k, k.new_ones(()).expand(*k.shape[:-1], 1), **options)
                sums = sums if packed is not None else sums.permute(_rows.OP_TO_ABSORBED[seq_first])
                sums = sums.flatten(1)
            elif sums_matter and by_lse:
                assert lse is not None
                alive = (lse > -torch.inf).to(attended.dtype)
                sums = _rows.to_rows(alive.transpose(0, 1), packed, seq_first).flatten(1)
            attended = _absorbed.project_attended(
                attended.flatten(1, -2), absorbed.v, absorbed.v_bias, sums
            )
            attended = attended.unflatten(0, rows.shape[:-1])
            if gate is not None:
                attended = _rows.gated(attended, gate)
            if wanted.lse and absorbed.k_bias is not None:
                assert heads is not None and lse is not None
                extra = _absorbed.key_bias_scores(heads, absorbed.k_bias, scale)
                extra = _rows.to_padded(extra.unflatten(0, rows.shape[:-1]), packed, seq_first)
                lse = lse + extra.masked_fill(lse == -torch.inf, 0.0)
        elif packed is not None:
            attended = attended.transpose(0, 1)
        else:
            attended = attended.permute(_rows.OP_TO_ROWS[seq_first])
        attended = attended.flatten(-2)
        if sums_matter and not by_lse and not self._dead_rows_are_zero:
            attended = _rows.without_dead(attended, source, None, packed, seq_first)
        out = self._result(attended)
        if zero_dead:
            out = _rows.without_dead(out, source, lse if by_lse else None, packed, seq_first)
        return out, lse if wanted.lse else None, importance, weights

    def _keys_and_values(
        self,
        plan: str,
        source: Source | ProjectedContext,
        options: dict[str, Any],
        held: Any,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values as the op takes them; what goes with them is put into `options`."""
        if isinstance(source, ProjectedContext):
            if source.packed:
                options.update(kv_cu_seqlens=source.cu_seqlens, max_kv_len=source.max_len)
            else:
                options["kv_lens"] = source.lens
            return source.k, source.v
        if plan == "packed" or (plan == "absorbed" and source.packed is not None):
            packed = source.in_pack()
            options.update(kv_cu_seqlens=packed.cu_seqlens, max_kv_len=source.keys)
            if plan == "absorbed":
                return packed.values.unsqueeze(0), None
            k, v = self._key_value_heads(packed.values, held)
            return k.transpose(0, 1), v.transpose(0, 1)
        options["kv_lens"] = source.lens
        if plan == "absorbed":
            return source.items_first().unsqueeze(1), None
        # A row that is a query as well is needed as it is.
        fill = torch.is_grad_enabled() and source.dense is not rows
        k, v = self._key_value_heads(source.rows(fill), held)
        order = _rows.ROWS_TO_OP[source.seq_first]
        return k.permute(order), v.permute(order)

    def _plan_for(
        self,
        rows: Tensor,
        source: Source | ProjectedContext,
        packed: PackedTokens | None = None,
        seq_first: bool = False,
    ) -> str:
        """The plan for a call; a projected context has only its own."""
        if isinstance(source, ProjectedContext):
            return "packed" if source.packed else "projected"
        refused = self._plan_refusals()
        queries = packed.length if packed is not None else rows.shape[1 - seq_first]
        context = source.dense if source.packed is None else source.packed.values
        assert context is not None
        for _ in range(2):
            if in_eager() and not rows.is_meta:
                plan = self._planned_eagerly(rows, context, source, packed, queries, refused)
            else:
                plan = planning.choose_compiled(
                    queries, *self._plan_sizes()[2:], refused=tuple(refused)
                )
            if plan != "absorbed":
                break
            keys = context[None, None] if source.packed is not None else context.unsqueeze(1)
            reason = shared_refusal(keys)
            if reason is None:
                break
            refused = {**refused, "absorbed": reason}
        if plan == "projected" and source.packed is not None:
            return plan if planning.current_plan() == "projected" else "packed"
        return plan

    def _planned_eagerly(
        self,
        rows: Tensor,
        context: Tensor,
        source: Source,
        packed: PackedTokens | None,
        queries: int,
        refused: Mapping[str, str],
    ) -> str:
        device, dtype, context_grad = rows.device, rows.dtype, context.requires_grad
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        training = torch.is_grad_enabled() and (
            context_grad
            or rows.requires_grad
            or getattr(self._a_weight(), "requires_grad", False)  # quantised: a method
        )
        return self._choose_plan(
            source.batch, queries, source.keys, dtype=dtype, device=device, training=training,
            tokens=source.tokens, query_tokens=None if packed is None else packed.total,
            context_grad=context_grad, context_packed=source.packed is not None, refused=refused,
        )  # fmt: skip


def _tensor(stream: Tensor | PackedTokens) -> Tensor:
    return stream.values if isinstance(stream, PackedTokens) else stream
