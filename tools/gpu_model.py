"""A cycle budget of a kernel's hot loop. Modelled, not measured: it names the limiter, no more.

Of one trip of the loop, for each pipe of a multiprocessor, the cycles in which it is busy: what an
instruction costs (`Chip.cycles`), times the warps that share the pipe. "No overlap" is the time of
the products, plus the busiest pipe of what stands between them (the issue of all instructions,
multiply and add, integers and comparisons, special functions). Reads of shared and tensor memory
feed the products: those take the longer of tensor time and such reads. Held against published
figures (tests/test_gpu_model.py, docs/triton-attention.md) it is within 15 % for FlashAttention-2;
it ranks neighbouring tiles wrongly at times. Latency, bank conflicts, clocks that fall under load
and the cost of a launch are not in it.

Where the numbers are from. Units, clocks, dense tensor peaks with float32 sums, bandwidths: white
papers and data sheets of the A100, RTX A6000 (GA102), L40S (AD102), H100, B200, RTX 5090 (GB202),
MI300X (CDNA3) and MI355X (CDNA4); the H100's clock is that of its PCIe form, below the 1.83 GHz of
the SXM form's data sheet (989 TFLOP/s). Costs: the throughput table of the CUDA C++ Programming
Guide (float32 64 or 128 lanes a cycle, integers and comparisons 64, special functions 16) and 128
bytes a cycle of shared memory. `mma.sync` on an H100 reaches 62 % of the peak (Luo et al.,
arXiv:2402.13499). Assumed, since nobody publishes them: F2FP at the rate of integers, tensor memory
at a register of a warp a cycle, bandwidths of L2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil

from machine_code import Instruction, Tensor

PARTITIONS = 4  # of a multiprocessor: every architecture here has four, each with a scheduler
LATENCY = 1500  # cycles from a program's start to its first product: two trips to memory and back


@dataclass(frozen=True)
class Chip:
    """A GPU. Rates of a partition: `cycles` of a warp's instruction by kind, products (`macs`) a
    cycle by (unit, bits). Of the multiprocessor: registers and shared memory (KiB, and that of one
    program), warps, bytes of shared memory a cycle. Of the chip: TB/s of memory and of L2.
    """

    name: str
    target: str
    units: int
    ghz: float
    macs: dict[tuple[str, int], float]
    memory: float
    l2: float
    cycles: dict[str, float]
    shared: int
    program_shared: int
    warps: int = 64
    lanes: int = 32
    registers: int = 65536  # of a multiprocessor, 32 bits; AMD: of one lane on a partition
    shared_bytes: int = 128
    joined: bool = False  # all vector instructions go through one pipe

    def peak(self, unit: str, bits: int) -> float:
        """TFLOP/s of this tensor instruction, dense."""
        return self.macs[unit, bits] * PARTITIONS * 2 * self.units * self.ghz / 1000


def _costs(fma: float, alu: float, xu: float, imad: float, pair: float = 1) -> dict[str, float]:
    """Cycles of a warp's instruction on its pipe. pair: of packed float32 (FFMA2), times `fma`."""
    return {"fma": fma, "fma2": fma * pair, "imad": imad, "alu": alu, "convert": alu, "move": alu,
            "mufu": xu, "xu": xu}  # fmt: skip


AMPERE = _costs(2, 2, 8, 2)
CONSUMER = _costs(1, 2, 8, 2)
HOPPER = _costs(1, 2, 8, 2)
BLACKWELL = _costs(1, 2, 8, 2, pair=2)
# A wave of 64 lanes on 16: four cycles; special functions at a quarter of that, on CDNA4 a half.
CDNA3 = _costs(4, 4, 16, 8)
CDNA4 = _costs(4, 4, 8, 8)

CHIPS = {
    chip.target: chip
    for chip in (
        Chip("A100 SXM", "sm_80", 108, 1.41, {("HMMA", 16): 256, ("HMMA", 32): 128},
             2.039, 7.2, AMPERE, 164, 163),
        Chip("RTX A6000", "sm_86", 84, 1.80, {("HMMA", 16): 128, ("HMMA", 32): 64},
             0.768, 4.0, CONSUMER, 100, 99, warps=48),
        Chip("L40S", "sm_89", 142, 2.52, {("HMMA", 16): 128, ("HMMA", 32): 64},
             0.864, 5.0, CONSUMER, 100, 99, warps=48),
        Chip("H100 SXM", "sm_90", 132, 1.755,
             {("HGMMA", 16): 512, ("HGMMA", 32): 256, ("HMMA", 16): 317, ("HMMA", 32): 159},
             3.35, 7.2, HOPPER, 228, 227),
        Chip("B200", "sm_100", 148, 1.85,
             {("tcgen05", 16): 1024, ("tcgen05", 32): 512, ("HMMA", 16): 256, ("HMMA", 32): 128},
             8.0, 12.0, BLACKWELL, 228, 227),
        Chip("RTX 5090", "sm_120", 170, 2.41, {("HMMA", 16): 64, ("HMMA", 32): 32},
             1.792, 6.0, BLACKWELL, 100, 99, warps=48),
        Chip("MI300X", "gfx942", 304, 2.1, {("MFMA", 16): 256, ("MFMA", 32): 32},
             5.3, 17.2, CDNA3, 64, 64, warps=32, lanes=64, registers=512, joined=True),
        Chip("MI355X", "gfx950", 256, 2.4, {("MFMA", 16): 512, ("MFMA", 32): 32},
             8.0, 17.2, CDNA4, 160, 160, warps=32, lanes=64, registers=512,
             shared_bytes=256, joined=True),
    )
}  # fmt: skip


_FEEDING = ("tensor", "shared", "tmem")


@dataclass(frozen=True)
class Budget:
    """Cycles of a multiprocessor for one trip of one program's loop, by pipe."""

    pipes: dict[str, float]

    @property
    def cycles(self) -> float:
        """Without overlap: the products, then the largest other pipe."""
        return self.products + self.pipes[self.other]

    @property
    def products(self) -> float:
        """Tensor time, or that of fetching what the tensor cores need where it is longer."""
        return max(self.pipes[pipe] for pipe in _FEEDING)

    @property
    def other(self) -> str:
        """The busiest pipe of those that do the softmax."""
        return max(self.pipes.keys() - set(_FEEDING), key=lambda pipe: (self.pipes[pipe], pipe))

    @property
    def limiter(self) -> str:
        """What takes longest, and what is added to it."""
        products = max(_FEEDING, key=self.pipes.__getitem__)
        if self.products >= self.pipes[self.other]:
            return f"{products}, then {self.other}"
        return f"{self.other}, then {products}"


def budget(hot: Iterable[Instruction], warps: int, chip: Chip) -> Budget:
    """The budget of one trip through these instructions, by a program of so many warps."""
    pipes = dict.fromkeys(("tensor", "issue", "fma", "alu", "special", "shared", "tmem"), 0.0)
    tensor = operands = 0.0
    for one in hot:
        share = warps / PARTITIONS
        pipe = _PIPES.get(one.kind)
        pipes["issue"] += share
        if one.tensor is not None:
            tensor += tensor_cycles(one.tensor, warps, chip)
            operands += _products(one.tensor, warps) * one.tensor.operand_bytes
        elif pipe == "shared":
            bits = one.bits or 32
            pipes["shared"] += warps * chip.lanes * bits / 8 / chip.shared_bytes
        elif pipe == "tmem":
            pipes["tmem"] += share * one.bits / 32
        elif pipe is not None:
            packed = one.kind == "fma" and one.name.split(".")[0].endswith("2")
            packed = packed or one.name.startswith("v_pk_")
            pipes[pipe] += share * chip.cycles["fma2" if packed else one.kind]
    # Products that fetch their operands themselves cannot go faster than those come.
    pipes["tensor"] = max(tensor, operands / chip.shared_bytes)
    if chip.joined:
        pipes["vector"] = sum(pipes.pop(pipe) for pipe in ("fma", "alu", "special"))
    return Budget(pipes)


_PIPES = {
    "fma": "fma", "imad": "fma", "alu": "alu", "convert": "alu", "move": "alu",
    "mufu": "special", "xu": "special", "tmem": "tmem",
    "ldsm": "shared", "stsm": "shared", "lds": "shared", "sts": "shared",
}  # fmt: skip


def _products(tensor: Tensor, warps: int) -> float:
    """How many products one instruction of the code is, for all warps of a program."""
    return warps / tensor.group if tensor.group else 1


def tensor_cycles(tensor: Tensor, warps: int, chip: Chip) -> float:
    """Of a multiprocessor's tensor cores, for one instruction of the code."""
    rate = chip.macs[tensor.unit, tensor.bits] * PARTITIONS
    return _products(tensor, warps) * tensor.macs / rate


def products(hot: Iterable[Instruction], warps: int) -> float:
    """Products that are summed in one trip by a program of so many warps."""
    return sum(
        _products(one.tensor, warps) * one.tensor.macs for one in hot if one.tensor is not None
    )


def resident(registers: int, shared: int, warps: int, chip: Chip) -> int:
    """Programs at once on a multiprocessor: by registers of a thread, shared bytes, and warps."""
    if chip.lanes == 64:
        of_registers = chip.registers // _up(max(registers, 1), 8) * PARTITIONS // warps
        overhead = 0
    else:
        of_registers = chip.registers // (_up(registers, 8) * chip.lanes * warps)
        overhead = 1024
    of_shared = chip.shared * 1024 // (shared + overhead) if shared + overhead else 32
    return min(of_registers, of_shared, chip.warps // warps, 32)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Work:
    """What a kernel is launched for: programs, trips of the hot loop in each (on average), FLOP
    that the op needs, bytes that must pass memory once, bytes that programs ask of L2.
    """

    programs: int
    trips: float
    flop: float
    bytes: float
    l2_bytes: float


@dataclass(frozen=True)
class Estimate:
    """Modelled, not measured. Seconds of the whole kernel, and what limits it."""

    seconds: float
    tflops: float
    limiter: str
    budget: Budget = field(repr=False)


def estimate(
    hot: Iterable[Instruction], outside: int, warps: int, occupancy: int, work: Work, chip: Chip
) -> Estimate:
    """The time of a kernel. outside: instructions of a warp before and after the loop.

    The busiest multiprocessor has `ceil(programs / units)` programs; those that are resident at
    once hide one another's latency, no more.
    """
    trip = budget(hot, warps, chip)
    start = LATENCY / max(1, occupancy) + outside * warps / PARTITIONS
    busiest = ceil(work.programs / chip.units)
    seconds = {
        "": busiest * (work.trips * trip.cycles + start) / chip.ghz / 1e9,
        "memory": work.bytes / chip.memory / 1e12,
        "L2": work.l2_bytes / chip.l2 / 1e12,
    }
    limiter = max(seconds, key=seconds.__getitem__)
    most = seconds[limiter]
    name = limiter or trip.limiter
    if not limiter and busiest * start > busiest * work.trips * trip.cycles:
        name = "start"
    return Estimate(most, work.flop / most / 1e12, name, trip)
