"""How nvcc is found, which architectures it compiles for, and the sentence where it cannot be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cuda_build
import gpu_sanitize
import native_build
import pytest
from cuda_build import Arch, SettingError

VARIABLES = (
    *("MMFAST_CUDA", "MMFAST_CUDA_ARCHS", "MMFAST_NVCC", "TORCH_CUDA_ARCH_LIST"),
    *("CUDA_HOME", "CXX"),
)
KERNEL = """
__global__ void scale_kernel(float* x, float by) { x[threadIdx.x] *= by; }
void scale(float* x, float by) { scale_kernel<<<1, 32>>>(x, by); }
"""

# A program that answers as nvcc does, as far as it is asked here.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  *--dryrun*compute_77*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_77'"; exit 1 ;;
  *--dryrun*) echo '#$ TOP={top}/bin/..'; echo '#$ LIBRARIES=  "-L{top}/lib"' ;;
  *-E*) {preprocess} ;;
esac
"""
TOO_NEW = (
    "echo 'host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than "
    "15 are not supported! Use the nvcc flag'; exit 1"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cpu_torch(tmp_path: Path) -> Path:
    return torch_of(tmp_path / "cpu_torch", "None")


def torch_of(folder: Path, cuda: str) -> Path:
    folder.mkdir()
    text = f"__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = {cuda}\nhip = None\n"
    (folder / "version.py").write_text(text, encoding="utf-8")
    return folder


def fake_nvcc(
    folder: Path, version: str = "13.0", preprocess: str = ":", runtime: bool = True
) -> Path:
    """A toolkit whose bin/nvcc only talks."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    if runtime:
        (folder / "lib" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    text = FAKE_NVCC.format(version=version, top=folder, preprocess=preprocess)
    nvcc.write_text(text, encoding="utf-8")
    nvcc.chmod(0o755)
    return nvcc


def test_architectures_are_read_in_every_spelling() -> None:
    want = (Arch(80, "", True), Arch(90, "a"), Arch(100, "f"))
    for text in ("80+PTX;90a;100f", "10.0f, 9.0a 8.0+PTX", " 8.0+ptx;90A;100F;90a "):
        assert cuda_build.parse_archs(text) == want
    assert [str(a) for a in want] == ["80", "90a", "100f"]


def test_the_default_reaches_every_gpu_from_the_a100_on() -> None:
    archs = cuda_build.wanted_archs()
    assert [str(arch) for arch in archs] == ["80", "86", "89", "90", "100f", "120f"]
    assert cuda_build.gencode(archs).replace("-gencode ", "").replace("'", "").split() == [
        "arch=compute_80,code=[sm_80,compute_80,sm_86,sm_89]",
        "arch=compute_90,code=[sm_90]",
        "arch=compute_100f,code=[sm_100f]",
        "arch=compute_120,code=[sm_120f,compute_120]",  # PTX of 120f would not run on 130
    ]


def test_torchs_list_serves_where_ours_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5 8.6 9.0+PTX")
    assert cuda_build.wanted_archs() == (Arch(86), Arch(90, "", True))
    monkeypatch.setenv("MMFAST_CUDA_ARCHS", "89")
    assert cuda_build.wanted_archs() == (Arch(89),)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MMFAST_CUDA_ARCHS", "80;banana", r"MMFAST_CUDA_ARCHS=80;banana: 'banana' is no GPU arch"),
        ("MMFAST_CUDA_ARCHS", "800x", "is no GPU architecture; write them as 80"),
        ("MMFAST_CUDA_ARCHS", "75;80", "need compute capability 8.0 or newer; leave out 75"),
        ("TORCH_CUDA_ARCH_LIST", "7.0;7.5", "TORCH_CUDA_ARCH_LIST=7.0;7.5: the CUDA kernels need"),
        ("TORCH_CUDA_ARCH_LIST", "Ampere", "TORCH_CUDA_ARCH_LIST=Ampere: 'Ampere' is no GPU arch"),
    ],
)
def test_architectures_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=message) as caught:
        cuda_build.wanted_archs()
    assert "\n" not in str(caught.value)


def test_auto_takes_cuda_only_with_a_cuda_torch(
    tmp_path: Path, cpu_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMFAST_NVCC", str(fake_nvcc(tmp_path / "toolkit")))
    assert cuda_build.find_cuda(cpu_torch, "c++") is None
    cuda_torch = torch_of(tmp_path / "cuda_torch", "'13.0'")
    found = cuda_build.find_cuda(cuda_torch, "ccache c++")
    assert found is not None
    assert (found.version, found.top, found.host_compiler) == ("13.0", tmp_path / "toolkit", "c++")
    assert found.library_dir == tmp_path / "toolkit" / "lib"
    monkeypatch.setenv("MMFAST_CUDA", "off")
    assert cuda_build.find_cuda(cuda_torch, "c++") is None
    monkeypatch.setenv("MMFAST_CUDA", "on")
    assert cuda_build.find_cuda(cpu_torch, "c++") is not None


# What is wrong -> the sentence under MMFAST_CUDA=on.
TROUBLE = {
    "no nvcc": "no nvcc found; install the CUDA toolkit 12.9 or newer, get it from PyPI by",
    "named nvcc": "MMFAST_NVCC=/no/nvcc names no program; install the CUDA toolkit",
    "no nvcc in CUDA_HOME": "CUDA_HOME=/no has no bin/nvcc; install the CUDA toolkit",
    "not nvcc": r"does not answer as nvcc does \(I am no compiler\)",
    "versions": "nvcc is of CUDA 12.9 but torch was built with CUDA 13.0; install the CUDA 13",
    "runtime": "has no libcudart_static.a; install its runtime for developers",
    "host compiler": r"c\+\+ is too new for nvcc of CUDA 13.0, which takes gcc up to 15; name an",
    "broken host compiler": r"nvcc of CUDA 13.0 cannot use c\+\+ \(collapsed\)",
}


def make_trouble(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = folder / "toolkit"
    if what == "no nvcc":
        monkeypatch.setattr(cuda_build.shutil, "which", lambda name: None)
    elif what == "named nvcc":
        monkeypatch.setenv("MMFAST_NVCC", "/no/nvcc")
    elif what == "no nvcc in CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", "/no")
    else:
        options = {
            "versions": {"version": "12.9"},
            "runtime": {"runtime": False},
            "host compiler": {"preprocess": TOO_NEW},
            "broken host compiler": {"preprocess": "echo collapsed; exit 1"},
        }
        nvcc = fake_nvcc(toolkit, **options.get(what, {}))  # type: ignore[arg-type]
        if what == "not nvcc":
            nvcc.write_text("#!/bin/sh\necho I am no compiler\n", encoding="utf-8")
        monkeypatch.setenv("CUDA_HOME", str(toolkit))


@pytest.mark.parametrize("what", TROUBLE)
def test_what_is_in_the_way_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    make_trouble(what, tmp_path, monkeypatch)
    torch = torch_of(tmp_path / "torch", "'13.0'")
    monkeypatch.setenv("MMFAST_CUDA", "on")
    with pytest.raises(SettingError, match=f"^MMFAST_CUDA=on, but .*{TROUBLE[what]}") as caught:
        cuda_build.find_cuda(torch, "c++")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("MMFAST_CUDA", "auto")
    assert cuda_build.find_cuda(torch, "c++") is None
    told = capsys.readouterr().err
    assert told.startswith("mmfast: building without CUDA kernels: ")
    assert told.count("\n") == 1


def test_an_unknown_mode_and_an_architecture_nvcc_does_not_know(
    tmp_path: Path, cpu_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMFAST_CUDA", "perhaps")
    with pytest.raises(SettingError, match="MMFAST_CUDA=perhaps is not known; use auto, on or off"):
        cuda_build.find_cuda(cpu_torch, "c++")
    monkeypatch.setenv("MMFAST_CUDA", "on")
    monkeypatch.setenv("MMFAST_NVCC", str(fake_nvcc(tmp_path / "toolkit")))
    monkeypatch.setattr(cuda_build, "OLDEST_ARCH", 75)
    monkeypatch.setenv("MMFAST_CUDA_ARCHS", "77")
    with pytest.raises(SettingError, match=r"CUDA 13\.0 does not know .* 77; name"):
        cuda_build.find_cuda(cpu_torch, "c++")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """csrc/ with one kernel, its launcher's binding, and a file for the processor."""
    root = tmp_path / "tree"
    for folder in ("cpu", "cuda", "bindings"):
        (root / "csrc" / folder).mkdir(parents=True)
    (root / "csrc" / "cuda" / "scale.cu").write_text(KERNEL, encoding="utf-8")
    for name in ("cpu/isa.cpp", "bindings/capi.cpp", "bindings/cuda_scale.cpp"):
        (root / "csrc" / name).touch()
    (root / "mmfast").mkdir()
    (root / "mmfast" / "_version.py").write_text('__version__ = "1.2.3"\n', encoding="utf-8")
    monkeypatch.setattr(native_build, "ROOT", root)
    return root


def planned(tmp_path: Path, cuda: cuda_build.Cuda | None) -> str:
    tools = native_build.Toolchain("c++", "ninja", tmp_path / "torch", cuda)
    return native_build.ninja_file(native_build.Options(), tools)


def test_without_cuda_nothing_of_it_is_compiled(tree: Path, tmp_path: Path) -> None:
    text = planned(tmp_path, None)
    assert "cuda" not in text.lower().replace(str(tmp_path).lower(), "")


def test_with_cuda_the_kernels_their_bindings_and_the_runtime(
    tree: Path, tmp_path: Path, cpu_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMFAST_CUDA", "on")
    monkeypatch.setenv("MMFAST_CUDA_ARCHS", "80+PTX;90a")
    monkeypatch.setenv("MMFAST_NVCC", str(fake_nvcc(tmp_path / "toolkit")))
    cuda = cuda_build.find_cuda(cpu_torch, "c++")
    assert cuda is not None
    steps = planned(tmp_path, cuda).split("\nbuild ")
    (kernel,) = [
        step for step in steps if "cuda-80ptx_90a/csrc/cuda/scale.o" in step.partition(":")[0]
    ]
    assert "compile_cuda" in kernel
    assert "-gencode 'arch=compute_90a,code=[sm_90a]'" in kernel
    assert "-Werror all-warnings" in kernel and "fvisibility=hidden" in kernel
    assert "fast" not in kernel.partition("flags")[2].partition("\n")[0]
    (binding,) = [step for step in steps if "csrc/bindings/cuda_scale.o" in step.partition(":")[0]]
    assert "-DMMFAST_CUDA " in binding and "gencode" not in binding
    (capi,) = [step for step in steps if "csrc/bindings/capi.o" in step.partition(":")[0]]
    assert r"-DMMFAST_CUDA_ARCHS=\"80,90a\" -DMMFAST_CUDA_PTX=\"80\"" in capi
    assert "cuda-80ptx_90a/csrc/bindings/capi.o" in capi
    (link,) = [step for step in steps if step.startswith("cuda-80ptx_90a/_C.so:")]
    assert "csrc/cuda/scale.o" in link and "-lcudart_static" in link
    assert "obj/csrc/cpu/isa.o" in link, "the processor's kernels are those of every build"


def test_a_setting_that_cannot_be_ends_the_build(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["native_build.py"])
    monkeypatch.setenv("MMFAST_CUDA", "on")
    monkeypatch.setenv("MMFAST_NVCC", "/no/nvcc")
    assert native_build.main() == 1
    assert capsys.readouterr().err.startswith("mmfast: MMFAST_CUDA=on, but MMFAST_NVCC=/no/nvcc")
    monkeypatch.setenv("MMFAST_CUDA", "off")
    monkeypatch.setenv("MMFAST_SYSROOT", "/no/sysroot")
    assert native_build.main() == 1
    assert "MMFAST_SYSROOT=/no/sysroot has no folder lib" in capsys.readouterr().err


def test_builds_with_other_options_take_turns_in_one_place(tmp_path: Path) -> None:
    """An older build is not taken for up to date because a newer one wrote the same file."""
    target = tmp_path / "out" / "_C.so"
    target.parent.mkdir()
    for name in ("first", "second"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    for name in ("first", "second", "first"):
        native_build.put(tmp_path / name, target)
        assert target.read_text(encoding="utf-8") == name
    before = target.stat().st_ino
    native_build.put(tmp_path / "first", target)
    assert target.stat().st_ino == before, "nothing was to be done"
    assert [path.name for path in target.parent.iterdir()] == ["_C.so"]


def real_toolkit() -> cuda_build.Cuda:
    try:
        nvcc = cuda_build.find_nvcc()
        top, version, library_dir = cuda_build.toolkit_of(nvcc)
        compiler = cuda_build.host_compiler_of(native_build.find_compiler())
        cuda_build.check_host_compiler(nvcc, version, compiler)
    except RuntimeError as missing:
        pytest.skip(f"nothing to compile CUDA with: {missing}")
    return cuda_build.Cuda(nvcc, top, version, library_dir, compiler, (Arch(80), Arch(90)))


def compile_kernel(cuda: cuda_build.Cuda, folder: Path, code: str) -> Path:
    folder.mkdir()
    (folder / "scale.cu").write_text(code, encoding="utf-8")
    command = cuda.compile_command().replace("$in", "scale.cu").replace("$out", "scale.o")
    words = command.replace("$flags", cuda.compile_flags("-fPIC -fvisibility=hidden"))
    done = subprocess.run(
        native_build.shlex.split(words), cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "scale.o"


def test_nvcc_compiles_with_the_flags_and_knows_no_path(tmp_path: Path) -> None:
    """The same code in two folders gives the same code: after `-s` even the same bytes."""
    cuda = real_toolkit()
    objects = [compile_kernel(cuda, tmp_path / name, KERNEL) for name in ("one", "other")]
    assert (tmp_path / "one" / "scale.o.d").read_text(encoding="utf-8").startswith("scale.o")
    for path in objects:
        subprocess.run(["strip", "--strip-debug", str(path)], check=True)
    assert objects[0].read_bytes() == objects[1].read_bytes()


def test_nvcc_takes_no_warnings(tmp_path: Path) -> None:
    cuda = real_toolkit()
    unused = KERNEL.replace("{ x[", "{ int unused; x[")
    with pytest.raises(AssertionError, match="never referenced"):
        compile_kernel(cuda, tmp_path / "warning", unused)


def test_an_unknown_architecture_in_real(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = real_toolkit()
    cuda_build.check_archs(
        cuda.nvcc, cuda.version, cuda.host_compiler, cuda_build.parse_archs("80;90a")
    )
    with pytest.raises(SettingError, match="does not know the GPU architecture 999"):
        cuda_build.check_archs(
            cuda.nvcc, cuda.version, cuda.host_compiler, cuda_build.parse_archs("999")
        )


def test_a_script_on_the_path_is_followed_to_its_toolkit(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "toolkit")
    script = tmp_path / "elsewhere" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    assert cuda_build.toolkit_of(str(script))[0] == tmp_path / "toolkit"
    assert shutil.which(str(script)) is not None


def test_gpu_sanitize_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_sanitize.main(["valgrind"]) == 1
    assert "there is no tool valgrind; use memcheck, racecheck, synccheck, initcheck" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(gpu_sanitize.torch.version, "cuda", None)
    assert gpu_sanitize.main([]) == 1
    assert "is not a CUDA build; install one that is" in capsys.readouterr().err
    monkeypatch.setattr(gpu_sanitize.torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu_sanitize.torch.cuda, "is_available", lambda: False)
    assert gpu_sanitize.main([]) == 1
    assert "there is no NVIDIA GPU here, or no driver for it" in capsys.readouterr().err
    monkeypatch.setattr(gpu_sanitize.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_sanitize, "find_sanitizer", lambda: None)
    assert gpu_sanitize.main([]) == 1
    told = capsys.readouterr().err
    assert "no compute-sanitizer found; install the CUDA toolkit, or pip install" in told
    assert told.count("\n") == 1


def test_gpu_sanitize_watches_our_kernels_and_passes_failures_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho $PYTORCH_NO_CUDA_MEMORY_CACHING '
        f'>> {tmp_path}/calls\ncase "$*" in *racecheck*) exit 86;; esac\n',
        encoding="utf-8",
    )
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu_sanitize, "why_not", lambda: None)
    monkeypatch.setattr(gpu_sanitize, "find_sanitizer", lambda: str(sanitizer))
    assert gpu_sanitize.main(["memcheck", "--", "-k", "glu"]) == 0
    assert gpu_sanitize.main(["memcheck", "racecheck"]) == 1
    assert "failed under racecheck; see above" in capsys.readouterr().err
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[1] == "1"
    for words in ("--kernel-name kernel_substring=mmfast", "--padding 256", "-m gpu", "-k glu"):
        assert words in calls[0]
    assert "--tool racecheck" in calls[4] and "padding" not in calls[4]
