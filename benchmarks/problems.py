"""What a workload is given: a case of a registry, in a dtype and a direction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
DIRECTIONS = (FORWARD, FORWARD_BACKWARD)

P = TypeVar("P", bound="BaseProblem")


@dataclass(frozen=True)
class BaseProblem:
    """What all problems have in common; a class of problems says which cases it takes."""

    case: Any
    dtype: str
    direction: str

    case_type: ClassVar[type]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def trains(self) -> bool:
        return self.direction == FORWARD_BACKWARD

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def ragged(self) -> bool:
        """Are there lengths of keys?"""
        return False

    def group(self, op: str) -> dict[str, Any]:
        """What the rows of this problem have in common."""
        return {
            "op": op,
            "case": self.name,
            "ragged": self.ragged,
            "dtype": self.dtype,
            "direction": self.direction,
        }

    def label(self, op: str) -> str:
        """For messages."""
        return f"{op} {self.name}{' ragged' if self.ragged else ''} {self.dtype} {self.direction}"

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls: type[P], fields: dict[str, Any]) -> P:
        """The problem that `to_json` was called on, after a journey as JSON."""
        case = {name: _tuples(value) for name, value in fields["case"].items()}
        return cls(cls.case_type(**case), fields["dtype"], fields["direction"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
