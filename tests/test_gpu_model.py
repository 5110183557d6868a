"""What reads machine code and makes cycles of it: tools/{machine_code,sass,amdgcn,gpu_model}.py.

The model is held against what FlashAttention-2 published, with its inner loop counted by hand.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

import amdgcn
import gpu_model
import sass
from gpu_model import CHIPS, Budget, Work
from machine_code import Instruction, Program, Tensor

# A wait that is out of line (.L_x_3), a mask that few trips need (.L_x_2), a loop of two products.
SASS = """
.text.kernel:
        /*0000*/                   UMOV UR29, 0x8210490 ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_4) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R13], desc[UR32][R4.64], !P0 ;
        /*0040*/                   LDSM.16.M88.4 R8, [R6] ;
        /*0050*/                   LDSM.16.MT88.4 R8, [R6] ;
        /*0060*/                   HMMA.16816.F32.BF16 R64, R76, R12, RZ ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24 ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
.L_x_5:
        /*0090*/                   UTCHMMA gdesc[UR16], gdesc[UR20], tmem[UR14], idesc[UR29], !UPT ;
        /*00a0*/               @P2 BRA `(.L_x_2) ;
        /*00b0*/                   FSEL R5, R5, -INF , !P0 ;
        /*00c0*/                   STL [R1+0x4], R5 ;
        /*00d0*/                   LDL.LU.64 R6, [R1+0x8] ;
.L_x_2:
        /*00e0*/                   MUFU.EX2 R34, R34 ;
        /*00f0*/                   FADD2 R120, R120.F32x2.HI_LO, R122.F32x2.HI_LO ;
        /*0100*/                   F2FP.BF16.F32.PACK_AB R68, R121, R120 ;
        /*0110*/                   HMMA.1688.F32.TF32 R64, R76, R12, RZ ;
        /*0120*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_4:
        /*0130*/                   STG.E.128 [R2.64], R4 ;
        /*0140*/                   EXIT ;
.L_x_3:
        /*0150*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR42], R5 ;
        /*0160*/              @!P1 BRA `(.L_x_3) ;
        /*0170*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0180*/                   BRA `(.L_x_6);
"""


def test_a_loop_of_sass() -> None:
    program = sass.parse(SASS)
    (loop,) = program.tensor_loops
    units = {one.unit: one for one in loop.tensors}
    assert units["HGMMA"] == Tensor((64, 128, 16), 4, "HGMMA", 16, 128 * 16 * 2)
    assert units["tcgen05"] == Tensor((128, 128, 16), 0, "tcgen05", 16, 256 * 16 * 2)
    assert {one.shape: one.bits for one in loop.tensors if one.unit == "HMMA"} == {
        (16, 8, 16): 16, (16, 8, 8): 32,
    }  # fmt: skip
    # The wait is a loop of its own and the mask is jumped over: neither is on the hot path.
    assert len(program.loops) == 2
    assert loop.kinds == {
        "cp.async.128": 1, "ldsm.128": 2, "tensor": 4, "branch": 3, "mufu": 1, "fma": 1,
        "convert": 1,
    }  # fmt: skip
    assert loop.anywhere("spill.load", "spill.store") == 2
    assert [one.bits for one in loop.every if one.kind.startswith("spill")] == [32, 64]


def test_of_two_loops_the_shorter_is_the_hot_one() -> None:
    masked = SASS.replace("FSEL R5, R5, -INF , !P0 ;", "BRA `(.L_x_2) ;")
    body = SASS[SASS.index(".L_x_1:") : SASS.index(".L_x_4:")]
    again = body.replace("L_x_", "L_x_1").replace("MUFU.EX2 R34, R34 ;", "MUFU.EX2 R3, R3 ;\n" * 1)
    # A second loop with one more instruction on its path.
    again = again.replace("@P2 BRA", "FMUL R1, R1, R1 ;\n        /*0001*/               @P2 BRA")
    again = again.replace("@P1 BRA `(.L_x_13) ;", "NOP ;")
    both = masked.replace(".L_x_4:", again + ".L_x_4:")
    loops = sass.parse(both).tensor_loops
    assert [len(loop.hot) for loop in loops] == sorted(len(loop.hot) for loop in loops)
    assert len(loops) == 2
    assert loops[1].count("fma") == loops[0].count("fma") + 1


AMD = """
kernel:
	s_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v4, s[4:7], 0 offen lds
	global_load_dwordx4 v[0:3], v4, s[0:1]
	ds_read_b128 v[0:3], v4
	ds_read2_b64 v[0:3], v4 offset1:1
	ds_bpermute_b32 v0, v1, v2
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_exp_f32_e32 v0, v1
	v_pk_mul_f32 v[0:1], v[0:1], v[2:3]
	v_max3_f32 v0, v1, v2, v3
	v_cvt_pk_bf16_f32 v0, v1, v2
	scratch_load_dword v0, off, s32
	s_waitcnt vmcnt(0)
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_a_loop_of_amdgcn() -> None:
    (loop,) = amdgcn.parse(AMD).tensor_loops
    assert loop.kinds == {
        "cp.async.128": 1, "ldg.128": 1, "lds.128": 2, "shuffle": 1, "tensor": 1, "mufu": 1,
        "fma": 1, "alu": 1, "convert": 1, "spill.load.32": 1, "barrier": 1, "branch": 1,
    }  # fmt: skip
    assert list(loop.tensors) == [Tensor((32, 32, 8), 1, "MFMA", 16)]


def test_every_sass_instruction_has_one_kind() -> None:
    names = " ".join(sass.KINDS.values()).split()
    assert len(names) == len(set(names))


HMMA = Tensor((16, 8, 16), 1, "HMMA", 16)


def instructions(**counts: int) -> list[Instruction]:
    """So many of each kind; `cp_async` for cp.async, accesses of 128 bits."""
    made = [Instruction("HMMA", "tensor", tensor=HMMA)] * counts.pop("hmma", 0)
    for kind, count in counts.items():
        bits = 128 if kind in ("ldsm", "cp_async") else 0
        made += [Instruction(kind.upper(), kind.replace("_", "."), bits)] * count
    return made


def test_the_budget_of_a_trip() -> None:
    # Four warps, one to a partition: 8 cycles for HMMA.16816 and MUFU, 2 for the others on an A100.
    hot = instructions(hmma=10, mufu=4, fma=20, alu=5, ldsm=6, barrier=1)
    found = gpu_model.budget(hot, 4, CHIPS["sm_80"])
    assert found.pipes == {
        "tensor": 80, "issue": 46, "fma": 40, "alu": 10, "special": 32, "shared": 6 * 4 * 4,
        "tmem": 0,
    }  # fmt: skip
    assert found.products == 96  # fetching takes longer than multiplying
    assert found.cycles == 96 + 46
    assert found.limiter == "shared, then issue"
    # On an H100 float32 takes half the time, and eight warps are two to a partition.
    assert gpu_model.budget(hot, 8, CHIPS["sm_90"]).pipes["fma"] == 40


def test_products_that_fetch_for_themselves() -> None:
    # 64 x 64 x 16 with both sides in shared memory: 4 KiB at 128 bytes a cycle, 32 of tensor time.
    both = Tensor((64, 64, 16), 4, "HGMMA", 16, 4096)
    one = Instruction("HGMMA", "tensor", tensor=both)
    assert gpu_model.tensor_cycles(both, 4, CHIPS["sm_90"]) == 32
    assert gpu_model.budget([one], 4, CHIPS["sm_90"]).pipes["tensor"] == 32
    more = Instruction("HGMMA", "tensor", tensor=dataclasses.replace(both, operand_bytes=8192))
    assert gpu_model.budget([more], 4, CHIPS["sm_90"]).pipes["tensor"] == 64
    assert gpu_model.products([one], 8) == 2 * 64 * 64 * 16


def test_one_vector_pipe_on_amd() -> None:
    found = gpu_model.budget(instructions(mufu=1, fma=2, alu=3), 4, CHIPS["gfx942"])
    assert found.pipes["vector"] == 16 + 8 + 12
    assert found.limiter == "vector, then tensor"


@pytest.mark.parametrize(
    "target, unit, bits, peak",
    [
        ("sm_80", "HMMA", 16, 312), ("sm_80", "HMMA", 32, 156), ("sm_86", "HMMA", 16, 154.8),
        ("sm_89", "HMMA", 16, 362), ("sm_90", "HGMMA", 16, 989), ("sm_100", "tcgen05", 16, 2250),
        ("sm_120", "HMMA", 16, 209.5), ("gfx942", "MFMA", 16, 1307), ("gfx950", "MFMA", 16, 2517),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_data_sheets(target: str, unit: str, bits: int, peak: float) -> None:
    assert CHIPS[target].peak(unit, bits) == pytest.approx(peak, rel=0.045)


def test_programs_at_once() -> None:
    chip = CHIPS["sm_80"]
    assert gpu_model.resident(255, 64 * 1024, 4, chip) == 2  # by registers and by shared memory
    assert gpu_model.resident(128, 64 * 1024, 4, chip) == 2
    assert gpu_model.resident(128, 16 * 1024, 4, chip) == 4
    assert gpu_model.resident(32, 0, 8, chip) == 8  # 64 warps
    assert gpu_model.resident(255, 96 * 1024, 8, chip) == 1
    assert gpu_model.resident(256, 64 * 1024, 4, CHIPS["gfx942"]) == 1
    assert gpu_model.resident(128, 16 * 1024, 4, CHIPS["gfx942"]) == 4


def test_waves_and_bytes() -> None:
    chip, hot = CHIPS["sm_80"], instructions(hmma=100)
    trip = gpu_model.budget(hot, 4, chip).cycles
    work = Work(programs=109, trips=1000, flop=1e12, bytes=1, l2_bytes=1)
    found = gpu_model.estimate(hot, 0, 4, 1, work, chip)
    # 109 programs on 108 multiprocessors: one has two.
    assert found.seconds == pytest.approx(2 * (1000 * trip + gpu_model.LATENCY) / 1.41e9)
    assert found.limiter == "tensor, then issue"
    slow = gpu_model.estimate(hot, 0, 4, 1, dataclasses.replace(work, bytes=2.039e12), chip)
    assert (slow.seconds, slow.limiter) == (pytest.approx(1.0), "memory")
    assert slow.tflops == pytest.approx(1.0)
    slow = gpu_model.estimate(hot, 0, 4, 1, dataclasses.replace(work, l2_bytes=7.2e12), chip)
    assert slow.limiter == "L2"
    short = gpu_model.estimate(hot, 0, 4, 1, dataclasses.replace(work, trips=1), chip)
    assert short.limiter == "start"


def flash_attention_2(width: int, keys: int) -> list[Instruction]:
    """A trip of FlashAttention-2's forward loop: 128 queries, 4 warps, float16, no mask.

    A warp has 32 queries: a thread holds `keys` scores and `width` sums of 4 rows. Addresses, the
    loop and barriers are 40 instructions. https://github.com/Dao-AILab/flash-attention, csrc.
    """
    return instructions(
        hmma=2 * 32 * keys * width // (16 * 8 * 16),
        ldsm=(2 * keys + 32) * width * 2 // 512,  # K, V, and Q anew
        cp_async=2 * keys * width * 2 // (128 * 16),
        fma=2 * keys + width,  # scale and subtract, sum; rescale the sums
        alu=keys + 8,  # maximum
        mufu=keys + 4,
        convert=keys // 2,
        shuffle=8,
        barrier=4, imad=18, uniform=18,
    )  # fmt: skip


# FlashAttention-2 with 16k tokens, no mask, forward. A100: arXiv:2307.08691, figure 5 (200 to 225,
# by length). H100: FlashAttention-3, arXiv:2407.08608, figure 5, float16, the orange bars at 16k.
PUBLISHED = [("sm_80", 128, 64, 225), ("sm_90", 64, 128, 324), ("sm_90", 128, 64, 370)]


@pytest.mark.parametrize("target, width, keys, published", PUBLISHED)
def test_published_figures(target: str, width: int, keys: int, published: float) -> None:
    hot, chip, tokens = flash_attention_2(width, keys), CHIPS[target], 16384
    heads = 2048 // width
    work = Work(
        programs=heads * tokens // 128,
        trips=tokens / keys,
        flop=4 * heads * tokens**2 * width,
        bytes=heads * tokens * width * 8,
        l2_bytes=heads * tokens / 128 * tokens * width * 4,
    )
    found = gpu_model.estimate(hot, 600, 4, 1, work, chip)
    assert gpu_model.products(hot, 4) == 2 * 128 * keys * width
    assert found.tflops == pytest.approx(published, rel=0.15), found


def test_a_budget_without_work() -> None:
    assert Program([Instruction("EXIT", "branch", falls=False)], {}).tensor_loops == []
    assert gpu_model.budget([], 4, CHIPS["sm_80"]) == Budget(
        dict.fromkeys(("tensor", "issue", "fma", "alu", "special", "shared", "tmem"), 0.0)
    )
