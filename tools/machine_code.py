"""Machine code as instructions and loops: what sass.py and amdgcn.py make of their texts.

A loop is a natural loop: a jump back to a block through which every way into the block that jumps
goes. Of a loop the interesting instructions are those of its hot path: the way through it that
does the most tensor work, and of equals the shortest. Blocks that are rarely taken (a mask at the
last tile, a wait that is out of line) are not on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Tensor:
    """A tensor instruction: an m x n x k product.

    group: how many warps work on one product together (1; 4 for a warpgroup; 0 for all warps of a
    program, whose work one thread starts). operand_bytes: what it reads from shared memory itself.
    """

    shape: tuple[int, int, int]
    group: int
    unit: str  # HMMA, HGMMA, tcgen05, MFMA
    bits: int  # of an element: 16, 32 for TF32, 8
    operand_bytes: int = 0

    @property
    def macs(self) -> int:
        """Products that are summed."""
        m, n, k = self.shape
        return m * n * k


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    kind: what it does, in the words of the reader's table (`fma`, `alu`, `mufu`, `ldsm` ...).
    bits: of a memory access, for each thread. jump: the label it may go to. falls: whether the
    next instruction may follow.
    """

    name: str
    kind: str
    bits: int = 0
    tensor: Tensor | None = None
    jump: str | None = None
    falls: bool = True


@dataclass
class Loop:
    """A natural loop. `body` holds blocks; `hot` the instructions of the hot path of one trip."""

    header: int
    body: frozenset[int]
    hot: list[Instruction] = field(default_factory=list)
    every: list[Instruction] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """How many instructions of a kind are on the hot path."""
        return sum(one.kind == kind for one in self.hot)

    @cached_property
    def kinds(self) -> Counter[str]:
        """Instructions of the hot path by kind; accesses to memory with their width."""
        return Counter(f"{one.kind}.{one.bits}" if one.bits else one.kind for one in self.hot)

    @cached_property
    def tensors(self) -> Counter[Tensor]:
        """The tensor instructions of the hot path."""
        return Counter(one.tensor for one in self.hot if one.tensor)

    def anywhere(self, *kinds: str) -> int:
        """How many instructions of these kinds the loop holds, on the hot path or off it."""
        return sum(one.kind in kinds for one in self.every)


class Program:
    """The instructions of a kernel, in order, with labels (name -> index of an instruction)."""

    def __init__(self, instructions: Sequence[Instruction], labels: dict[str, int]) -> None:
        self.instructions = list(instructions)
        count = len(self.instructions)
        starts = {0, *(index for index in labels.values() if index < count)}
        starts |= {
            index + 1
            for index, one in enumerate(self.instructions[:-1])
            if one.jump is not None or not one.falls
        }
        self.starts = sorted(starts)
        self.ends = [*self.starts[1:], count]
        number = {start: block for block, start in enumerate(self.starts)}
        self.after: list[list[int]] = []
        for end in self.ends:
            last = self.instructions[end - 1]
            following = [number[end]] if last.falls and end < count else []
            if last.jump is not None and labels[last.jump] < count:
                following.append(number[labels[last.jump]])
            self.after.append(following)

    def block(self, block: int) -> list[Instruction]:
        """The instructions of a block."""
        return self.instructions[self.starts[block] : self.ends[block]]

    @cached_property
    def loops(self) -> list[Loop]:
        """Every natural loop; of one header one loop."""
        above = self._dominators()
        before: list[list[int]] = [[] for _ in self.after]
        bodies: dict[int, set[int]] = {}
        for block, following in enumerate(self.after):
            for one in following:
                before[one].append(block)
        for block, following in enumerate(self.after):
            for header in following:
                if block in above and header in above[block]:
                    body = bodies.setdefault(header, {header})
                    open_ = [block]
                    while open_:
                        one = open_.pop()
                        if one not in body:
                            body.add(one)
                            open_ += [each for each in before[one] if each in above]
        loops = []
        for header, body in sorted(bodies.items()):
            loop = Loop(header, frozenset(body))
            loop.every = [one for block in sorted(body) for one in self.block(block)]
            loop.hot = self._hot(loop)
            loops.append(loop)
        return loops

    def _dominators(self) -> dict[int, set[int]]:
        """Of each block that can be reached: the blocks on every way to it, itself among them."""
        order: list[int] = []
        seen, stack = {0}, [0]
        while stack:
            block = stack.pop()
            order.append(block)
            for one in self.after[block]:
                if one not in seen:
                    seen.add(one)
                    stack.append(one)
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for one in self.after[block]:
                before[one].append(block)
        above = {block: set(order) for block in order}
        above[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                now = set.intersection(*(above[one] for one in before[block])) | {block}
                if now != above[block]:
                    above[block], changed = now, True
        return above

    def _hot(self, loop: Loop) -> list[Instruction]:
        """The way from the header to a jump back with the most tensor work, of equals the shortest.

        Jumps back within are not taken: an inner loop counts once.
        """
        best: dict[int, tuple[int, int, list[int]]] = {}
        above = self._dominators()

        def way(block: int, passed: frozenset[int]) -> tuple[int, int, list[int]] | None:
            if block in best:
                return best[block]
            here = self.block(block)
            macs = sum(one.tensor.macs * (one.tensor.group or 1) for one in here if one.tensor)
            ways = []
            for one in self.after[block]:
                if one == loop.header:
                    ways.append((0, 0, []))
                elif one in loop.body and one not in above[block] and one not in passed:
                    further = way(one, passed | {block})
                    if further is not None:
                        ways.append(further)
            if not ways:
                return None
            work, short, blocks = max(ways, key=lambda each: each[:2])
            best[block] = (work + macs, short - len(here), [block, *blocks])
            return best[block]

        found = way(loop.header, frozenset())
        blocks = found[2] if found else sorted(loop.body)
        return [one for block in blocks for one in self.block(block)]

    @cached_property
    def tensor_loops(self) -> list[Loop]:
        """The innermost loops that do tensor work, the most work first, of equals the shortest."""
        working = [loop for loop in self.loops if any(one.tensor for one in loop.every)]
        inner = [
            loop for loop in working
            if not any(other.body < loop.body for other in working)
        ]  # fmt: skip
        return sorted(inner, key=lambda loop: (-_work(loop), len(loop.hot)))

    @cached_property
    def math_loops(self) -> list[Loop]:
        """Without tensor work: the innermost loops, the one with the most `fma` first."""
        inner = [
            loop for loop in self.loops
            if not any(other.body < loop.body for other in self.loops)
        ]  # fmt: skip
        return sorted(inner, key=lambda loop: -loop.count("fma"))


def _work(loop: Loop) -> int:
    return sum(one.macs * (one.group or 1) * n for one, n in loop.tensors.items())
