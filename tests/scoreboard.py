"""The figures of docs/reliability.md: `python tests/scoreboard.py` prints the table of errors.

Every functional case x dtype x implementation, forward and backward; per result the largest error
over eager's error (results of 1,000 numbers or more), and the largest part of the allowance that
was used (above 100 % the test fails).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from conftest import IMPLEMENTATIONS

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import functional_cases, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORWARD = ("out", "lse", "importance", "weights")


def main() -> None:
    over_eager: dict[tuple[str, torch.dtype, str], tuple[float, str]] = defaultdict(lambda: (0, ""))
    used: dict[tuple[str, torch.dtype, str], float] = defaultdict(float)
    judged: dict[str, int] = defaultdict(int)
    for case in functional_cases():
        for dtype in DTYPES:
            against = tolerance.truth(make_inputs(case, dtype))
            for implementation in IMPLEMENTATIONS:
                with implementation.active():
                    results = tolerance.run(mmfast.cross_attention, against.inputs)
                for verdict in tolerance.assert_accurate(results, against):
                    judged[str(implementation)] += 1
                    kind = "forward" if verdict.name in FORWARD else "gradients"
                    key = (str(implementation), dtype, kind)
                    if verdict.allowed > 0:
                        used[key] = max(used[key], verdict.error / verdict.allowed)
                    # Of a few numbers eager gets some exact by luck: a ratio says nothing there.
                    if results[verdict.name].numel() >= 1000 and verdict.eager_error > 0:
                        found = (verdict.ratio, f"{case.name} {verdict.name}")
                        over_eager[key] = max(over_eager[key], found)
    print("| implementation | dtype | forward: error / eager's | gradients: error / eager's |")
    print("|---|---|---|---|")
    for implementation in map(str, IMPLEMENTATIONS):
        for dtype in DTYPES:
            cells = []
            for kind in ("forward", "gradients"):
                ratio, where = over_eager[implementation, dtype, kind]
                share = used[implementation, dtype, kind]
                cells.append(f"{ratio:.2f} ({where}); {share:.0%} of the allowance")
            name = str(dtype).removeprefix("torch.")
            print(f"| {implementation} | {name} | {cells[0]} | {cells[1]} |")
    print("\nresults judged: " + ", ".join(f"{name} {n}" for name, n in judged.items()))


if __name__ == "__main__":
    main()
