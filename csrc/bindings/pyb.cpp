// mmfast._pyb: what has no tensors. How the module was built, and what the processor offers.
//
// pybind11 has no limited API, so this module belongs to one Python, is optional at run time and
// is not part of the py3-none wheel. The operators are in _C.so, which knows no Python.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#ifndef MMFAST_VERSION
#error "MMFAST_VERSION is passed by tools/native_build.py"
#endif

namespace {

namespace py = pybind11;

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// Which register files the operating system saves: XCR0, or 0 without xgetbv.
std::uint64_t saved_state() {
  if (!(cpuid(1, 0).ecx & (1u << 27))) return 0;
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Whether the kernel can grant AMX tile data (ARCH_GET_XCOMP_SUPP, bit 18). Asks, requests nothing.
bool tile_data_supported() {
  std::uint64_t features = 0;
  constexpr int kArchGetXcompSupp = 0x1021;
  return syscall(SYS_arch_prctl, kArchGetXcompSupp, &features) == 0 && (features & (1u << 18));
}

py::dict processor_features() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const std::uint64_t state = saved_state();
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = (state & 0xe6) == 0xe6;
  const bool tile = (state & 0x60000) == 0x60000 && tile_data_supported();
  const auto bit = [](unsigned word, int index) { return ((word >> index) & 1u) != 0; };
  py::dict found;
  found["sse4_2"] = bit(one.ecx, 20);
  found["fma"] = ymm && bit(one.ecx, 12);
  found["f16c"] = ymm && bit(one.ecx, 29);
  found["avx2"] = ymm && bit(seven.ebx, 5);
  found["avx512f"] = zmm && bit(seven.ebx, 16);
  found["avx512dq"] = zmm && bit(seven.ebx, 17);
  found["avx512bw"] = zmm && bit(seven.ebx, 30);
  found["avx512vl"] = zmm && bit(seven.ebx, 31);
  found["avx512_bf16"] = zmm && bit(seven_one.eax, 5);
  found["amx_tile"] = tile && bit(seven.edx, 24);
  found["amx_bf16"] = tile && bit(seven.edx, 22);
  return found;
}

#elif defined(__aarch64__)

py::dict processor_features() {
  // Bit numbers of Linux's asm/hwcap.h, which older headers lack.
  const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
  const auto bit = [](unsigned long word, int index) { return ((word >> index) & 1ul) != 0; };
  py::dict found;
  found["asimd"] = bit(one, 1);
  found["asimdhp"] = bit(one, 10);
  found["sve"] = bit(one, 22);
  found["sve2"] = bit(two, 1);
  found["i8mm"] = bit(two, 13);
  found["bf16"] = bit(two, 14);
  return found;
}

#else

py::dict processor_features() { return py::dict(); }

#endif

py::dict build_info() {
  py::dict info;
  info["version"] = MMFAST_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["python"] = PY_VERSION;
  info["pybind11"] =
      std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_pyb, module) {
  module.doc() = "Build information and processor features of mmfast; no tensors.";
  module.def("build_info", &build_info, "version, compiler, python and pybind11 of this module");
  module.def("processor_features", &processor_features,
             "feature name -> whether the processor has it and the system lets programs use it");
}
