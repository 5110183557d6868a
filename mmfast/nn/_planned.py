"""What modules with projected attention share: choosing a plan for a call, and telling of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mmfast import planning
from mmfast.planning import AttentionShapes, Plan

_NOTHING: Mapping[str, str] = {}


class PlanSizes(NamedTuple):
    """The sizes of `AttentionShapes` that a module has by itself."""

    embed_dim: int
    context_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int


class Planned:
    """A mixin for modules; a class gives `_plan_sizes`, and `_plan_refusals` where it has any."""

    def _plan_sizes(self) -> PlanSizes:
        raise NotImplementedError

    def _plan_refusals(self) -> Mapping[str, str]:
        """Plan -> why this module can never follow it."""
        return _NOTHING

    def _choose_plan(
        self,
        batch: int,
        queries: int,
        keys: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        training: bool,
        tokens: int | None = None,
        query_tokens: int | None = None,
        context_grad: bool = True,
        context_packed: bool = False,
        refused: Mapping[str, str] = _NOTHING,
    ) -> str:
        """The plan for a call, which `explain` remembers.

        Arguments as of `AttentionShapes` and `plan`; `refused` holds all that this call cannot
        follow, the module's own refusals included.
        """
        sizes = self._plan_sizes()
        if torch.compiler.is_compiling():
            return planning.choose_compiled(queries, *sizes[2:], tuple(refused))
        shapes = (
            batch, queries, keys, *sizes, tokens, query_tokens, context_grad, context_packed,
        )  # fmt: skip
        # Not an attribute that Module.__setattr__ would look at: 1 us.
        self.__dict__["_planned_call"] = (shapes, dtype, device, training, refused)
        return planning.choose(*shapes, dtype, device, training, tuple(refused))

    def explain(
        self,
        batch: int | None = None,
        queries: int | None = None,
        keys: int | None = None,
        *,
        tokens: int | None = None,
        query_tokens: int | None = None,
        context_grad: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        training: bool | None = None,
    ) -> Plan:
        """Print which plan the last call followed and what every plan costs, as a table.

        With sizes, of a call of these sizes: `batch` items of `queries` rows and of `keys` context
        rows, of which `tokens` and `query_tokens` in all items together are valid (see
        `mmfast.planning.AttentionShapes`). dtype and device default to the parameters', training
        to the module's mode. Calls through `torch.compile` are not remembered.

        Returns:
            `mmfast.planning.Plan`, what was printed.

        Raises:
            ValueError: no sizes and no call before, or some of the three sizes without the others.

        Example:
            >>> import torch, mmfast
            >>> attention = mmfast.nn.CrossModalAttention(768, 12)
            >>> plan = attention.explain(8, 1, 577, training=False)  # doctest: +ELLIPSIS
            8 x 1 queries over 577 keys of width 768, 12 heads, float32 on cpu, forward
               plan ...
            *  absorbed ...
            absorbed: ...
            >>> plan.name
            'absorbed'
        """
        given = (batch, queries, keys)
        if batch is None or queries is None or keys is None:
            call = self.__dict__.get("_planned_call")
            if call is None or given != (None, None, None):
                raise ValueError(
                    f"{type(self).__name__}.explain: expected batch, queries and keys, or none of "
                    f"them after a call; got batch={batch}, queries={queries}, keys={keys} and "
                    f"{'no call' if call is None else 'a call'} before"
                )
            sizes, call_dtype, call_device, call_training, refused = call
            shapes = AttentionShapes(*sizes)
        else:
            shapes = AttentionShapes(
                batch, queries, keys, *self._plan_sizes(), tokens, query_tokens, context_grad
            )
            parameter: Any = next(self.parameters())  # type: ignore[attr-defined]
            call_dtype, call_device = parameter.dtype, parameter.device
            call_training, refused = self.training, self._plan_refusals()  # type: ignore[attr-defined]
        plan = planning.plan(
            shapes,
            call_dtype if dtype is None else dtype,
            call_device if device is None else device,
            call_training if training is None else training,
            refused=refused,
        )
        plan.show()
        return plan
