"""Plans of projected attention: equal ways to compute it, what each costs, and which to take."""

from mmfast.planning.choice import (
    Plan,
    PlanCost,
    choose,
    choose_compiled,
    current_plan,
    plan,
    use_plan,
)
from mmfast.planning.shapes import PLANS, AttentionShapes

__all__ = [
    "PLANS",
    "AttentionShapes",
    "Plan",
    "PlanCost",
    "choose",
    "choose_compiled",
    "current_plan",
    "plan",
    "use_plan",
]
