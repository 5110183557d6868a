"""Reads AMD assembly: amdgcn text becomes a `Program` of classified instructions, as in sass.py.

Kinds that differ: `fma` holds every float32 multiply and add of the vector unit, `alu` what else it
does; `shuffle` is ds_bpermute, ds_swizzle and lane permutes; `cp.async` a load that goes to shared
memory (LDS) without passing through registers; `spill.*` scratch memory.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from machine_code import Instruction, Program, Tensor

WIDTHS = {"ubyte": 8, "sbyte": 8, "byte": 8, "u8": 8, "i8": 8, "b8": 8, "ushort": 16, "sshort": 16,
          "short": 16, "u16": 16, "i16": 16, "b16": 16, "b32": 32, "dword": 32, "b64": 64,
          "dwordx2": 64, "b96": 96, "dwordx3": 96, "b128": 128, "dwordx4": 128}  # fmt: skip
STARTS = ("v_", "s_", "ds_", "global_", "buffer_", "flat_", "scratch_")
SLOW = ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos")
FLOAT = re.compile(r"v_(pk_)?(fma|fmac|fmamk|fmaak|mul|mac|mad|add|sub|subrev)_(legacy_)?f(16|32)")

_LINE = re.compile(r"^\s+([a-z][a-z0-9_]+)\b[ \t]*(.*?)\s*(?:[;/].*)?$")
_LABEL = re.compile(r"^(\.LBB\w+):")
_MFMA = re.compile(r"v_s?mfmac?_f32_(\d+)x(\d+)x(\d+)_?(?:\d+b_)?(x?f32|f16|bf16|bf8|fp8|f8f6f4)")


class Usage(NamedTuple):
    """What a kernel takes: vector registers, how many of them accumulate, bytes of scratch."""

    registers: int
    accumulators: int
    stack: int


def read(text: str) -> tuple[Program, Usage]:
    """The program of an amdgcn text with one kernel, and what it takes."""
    names = "vgpr_count", "agpr_count", "private_segment_fixed_size"
    found = [re.search(rf"\.{name}:\s+(\d+)", text) for name in names]
    assert all(found), names
    return parse(text), Usage(*(int(one[1]) for one in found if one))


def parse(text: str) -> Program:
    """The program of an assembly text; what is no instruction is passed over."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := _LINE.match(line)) and found[1].startswith(STARTS):
            instructions.append(_instruction(found[1], found[2]))
    return Program(instructions, labels)


def _instruction(name: str, operands: str) -> Instruction:
    if name.startswith(("s_branch", "s_cbranch")):
        return Instruction(
            name, "branch", jump=operands.split()[-1], falls=name.startswith("s_cbranch")
        )
    if name == "s_endpgm":
        return Instruction(name, "branch", falls=False)
    if found := _MFMA.match(name):
        m, n, k = (int(size) for size in found.group(1, 2, 3))
        bits = {"f32": 32, "xf32": 32, "f16": 16, "bf16": 16}.get(found[4], 8)
        return Instruction(name, "tensor", tensor=Tensor((m, n, k), 1, "MFMA", bits))
    kind = _kind(name, operands)
    if kind in ("lds", "sts", "ldg", "stg", "cp.async", "spill.load", "spill.store"):
        return Instruction(name, kind, _bits(name))
    return Instruction(name, kind)


def _bits(name: str) -> int:
    bits = next((WIDTHS[part] for part in reversed(name.split("_")) if part in WIDTHS), 32)
    return 2 * bits if re.match(r"ds_(read|write|load|store)(2|_2)", name) else bits


def _kind(name: str, operands: str) -> str:
    if name.startswith("scratch_"):
        return "spill.load" if "_load" in name else "spill.store"
    if name.startswith(("global_", "buffer_", "flat_")):
        if "_load" not in name:
            return "stg" if "_store" in name else "other"
        return "cp.async" if "_lds_" in name or re.search(r"\blds\b", operands) else "ldg"
    if name.startswith("ds_"):
        if "permute" in name or "swizzle" in name:
            return "shuffle"
        return "lds" if "read" in name or "load" in name else "sts"
    if name.startswith("s_"):
        return "barrier" if name in ("s_barrier", "s_waitcnt") else "uniform"
    if "dpp" in name or name.startswith(("v_permlane", "v_readlane", "v_writelane")):
        return "shuffle" if name.startswith("v_perm") else "alu"
    if name.startswith(SLOW):
        return "mufu"
    if name.startswith("v_cvt"):
        return "convert"
    return "fma" if FLOAT.match(name) else "alu"
