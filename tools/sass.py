"""Reads NVIDIA machine code: a cubin becomes a `Program` of classified instructions.

The disassembler is the one inside the triton wheel. Kinds of instructions, by the pipe they go to:
fma (float32 multiply and add), alu (integer, compare, select, minimum), convert (packing),
xu (conversions on the pipe of mufu),
mufu (exp2, reciprocal), imad, uniform (the scalar datapath), move, ldsm / lds / sts / stsm (shared
memory), ldg / stg, cp.async (LDGSTS), tma (UTMALDG, UBLKCP), spill.load / spill.store (LDL, STL),
tmem (tensor memory of sm_100), shuffle, barrier, branch, tensor, other.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

from machine_code import Instruction, Program, Tensor
from triton.knobs import nvidia

KINDS = {
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2",
    "alu": "FMNMX FMNMX3 FSETP FSEL FSET FCHK LOP3 IADD3 IADD VIADD LEA SHF SHL SHR SGXT ISETP SEL "
    "PRMT PLOP3 P2R R2P IMNMX VIMNMX VIMNMX3 IABS BMSK ISCADD LOP IADD2 VOTE VABSDIFF4",
    "imad": "IMAD IDP",
    "convert": "F2FP I2FP F2IP I2IP",
    "xu": "F2F F2I I2F FRND POPC FLO BREV",
    "mufu": "MUFU",
    "move": "MOV CS2R S2R S2UR R2UR LDC LDCU",
    "shuffle": "SHFL REDUX",
    "barrier": "BAR WARPSYNC DEPBAR LDGDEPBAR MEMBAR FENCE SYNCS WARPGROUP ARRIVES UTCBAR ERRBAR "
    "UTMACMDFLUSH ELECT",
    "branch": "BRA BRX JMP RET EXIT CALL BSSY BSYNC BREAK NANOSLEEP BPT",
    "ldsm": "LDSM",
    "stsm": "STSM",
    "lds": "LDS LDS.U",
    "sts": "STS ATOMS",
    "ldg": "LDG LD",
    "stg": "STG ST",
    "cp.async": "LDGSTS",
    "tma": "UTMALDG UBLKCP UTMASTG",
    "spill.load": "LDL",
    "spill.store": "STL",
    "tmem": "LDTM STTM UTCCP",
    "tensor": "HMMA IMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA",
}
KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
MEMORY = {"lds", "sts", "ldg", "stg", "cp.async", "spill.load", "spill.store"}
BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "96": 96, "128": 128}

_LINE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?U?P[0-9T]+)\s+)?"
    r"(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;?\s*$"
)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_FUNCTION = re.compile(r"^\.text\.([\w$]+):")


class Usage(NamedTuple):
    """What a kernel takes: 32-bit registers of a thread, bytes of its stack."""

    registers: int
    stack: int


def read(cubin: bytes) -> tuple[Program, Usage]:
    """The program of a cubin with one kernel, and what it takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run(nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return parse(text), Usage(int(found[1]), int(found[2]) + int(found[3]))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> Program:
    """The program of what `nvdisasm -c` prints."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    immediates: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            if found["name"] == "UMOV":
                register, _, value = found["operands"].partition(", ")
                if value.startswith("0x"):
                    immediates[register] = int(value, 16)
            instructions.append(
                _instruction(found["name"], found["predicate"], found["operands"], immediates)
            )
    return Program(instructions, labels)


def _instruction(
    name: str, predicate: str | None, operands: str, immediates: dict[str, int]
) -> Instruction:
    opcode, *modifiers = name.split(".")
    kind = KIND.get(opcode)
    if kind is None:
        kind = "uniform" if opcode.startswith("U") else "other"
    if kind == "tensor":
        return Instruction(name, kind, tensor=_tensor(opcode, modifiers, operands, immediates))
    if kind in MEMORY:
        return Instruction(name, kind, max(BITS.get(part, 0) for part in [*modifiers, ""]) or 32)
    if kind in ("ldsm", "stsm"):
        matrices = int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
        return Instruction(name, kind, 32 * matrices)
    if kind == "tmem":
        # LDTM.x64: 64 registers; LDTM.16dp32bit_t0_t15.x32: 32 of them.
        width = [int(part[1:]) for part in modifiers if re.fullmatch(r"x\d+", part)]
        return Instruction(name, kind, 32 * (width[0] if width else 1))
    if kind == "branch":
        return _branch(name, opcode, predicate, operands)
    return Instruction(name, kind)


def _branch(name: str, opcode: str, predicate: str | None, operands: str) -> Instruction:
    never = predicate in ("!PT", "!UPT")
    conditional = predicate not in (None, "PT", "UPT")
    if opcode in ("EXIT", "RET"):
        return Instruction(name, "branch", falls=conditional)
    target = re.search(r"`\((\.L_x_\d+)\)", operands)
    if opcode not in ("BRA", "JMP") or target is None or never:
        return Instruction(name, "branch")
    # `BRA.U !UP0, target` and `BRA.DIV R1, target` name their condition as an operand.
    conditional |= operands.split(",")[0].strip() not in ("", target[0])
    return Instruction(name, "branch", jump=target[1], falls=conditional)


def _tensor(opcode: str, modifiers: list[str], operands: str, immediates: dict[str, int]) -> Tensor:
    bits = 32 if "TF32" in modifiers else 8 if opcode[0] in "QI" or "QMMA" in opcode else 16
    if opcode.startswith("UTC"):
        # Shape and format are in the instruction descriptor. CUTLASS, cute/arch/mma_sm100_desc.hpp:
        # M / 16 at bit 24, N / 8 at bit 17, the format of A at bit 7 (2 is TF32 for UTCHMMA).
        register = re.search(r"idesc\[(\w+)\]", operands)
        descriptor = immediates.get(register[1], 0) if register else 0
        m, n = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
        if opcode == "UTCHMMA" and descriptor >> 7 & 7 == 2:
            bits = 32
        k = 256 // bits
        from_shared = n + m * operands.startswith("gdesc")
        return Tensor((m, n, k), 0, "tcgen05", bits, from_shared * k * bits // 8)
    shape = next(part for part in modifiers if part[0].isdigit())
    if "x" in shape:
        m, n, k = (int(size) for size in shape.split("x"))
        first = operands.split(",")[1].strip()
        from_shared = n + m * first.startswith("gdesc")
        return Tensor((m, n, k), 4, "HGMMA", bits, from_shared * k * bits // 8)
    m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "1684": (16, 8, 4)}[
        shape
    ]
    return Tensor((m, n, k), 1, opcode, bits)
