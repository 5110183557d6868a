// Launching a kernel: `launch<foo_kernel<C>>(grid, threads, shared_bytes, stream, args)`. Under
// nvcc it goes to the GPU's stream; otherwise ../host runs the whole grid before launch returns.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "stream.h"

#ifdef __CUDACC__
#include <atomic>
#endif

namespace mmfast {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// Whether this build holds the instances of a head width; test builds name the few they want.
constexpr bool width_is_built([[maybe_unused]] int width) {
#ifdef MMFAST_ONLY_WIDTHS
  constexpr int widths[] = {MMFAST_ONLY_WIDTHS};
  for (int one : widths)
    if (one == width) return true;
  return false;
#else
  return true;
#endif
}

namespace launching {

// "[with auto Kernel = foo_kernel<...>]" and its kin, for messages: built only where one is needed.
inline std::string kernel_name(const char* pretty_function) {
  const std::string text = pretty_function;
  const size_t begin = text.find("Kernel = ");
  if (begin == std::string::npos) return text;
  const size_t from = begin + 9;
  size_t end = text.find("; ", from);
  if (end == std::string::npos) end = text.rfind(']');
  return text.substr(from, end - from);
}

[[noreturn]] inline void fail(const char* pretty_function, const std::string& what) {
  throw std::runtime_error("launch of " + kernel_name(pretty_function) + ": " + what);
}

// Returns false where there is nothing to run.
inline bool check(const char* pretty_function, const Grid& grid, int threads, int64_t shared_bytes,
                  const Stream& stream) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return false;
  if (grid.x < 0 || grid.x > 0x7fffffff || grid.y < 0 || grid.y > 65535 || grid.z < 0 ||
      grid.z > 65535) {
    fail(pretty_function, "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                              " x " + std::to_string(grid.z) +
                              " blocks; at most 2147483647 x 65535 x 65535 are possible");
  }
  if (threads <= 0 || threads > 1024 || threads % kWarp != 0) {
    fail(pretty_function, "blocks of " + std::to_string(threads) +
                              " threads; a multiple of 32 up to 1024 is possible");
  }
  if (shared_bytes > stream.shared_optin) {
    fail(pretty_function,
         "needs " + std::to_string(shared_bytes) + " bytes of shared memory per block; device " +
             std::to_string(stream.device) + " has " + std::to_string(stream.shared_optin));
  }
  return true;
}

}  // namespace launching

#ifdef __CUDACC__

template <auto Kernel, class... Args>
void launch(const Grid& grid, int threads, int64_t shared_bytes, const Stream& stream,
            const Args&... args) {
  const char* name = __PRETTY_FUNCTION__;
  if (!launching::check(name, grid, threads, shared_bytes, stream)) return;
  const void* function = reinterpret_cast<const void*>(Kernel);
  // More than 48 KiB has to be asked for, once per kernel and device; devices past the 64th ask
  // every time.
  static std::atomic<uint64_t> asked{0};
  const uint64_t bit = stream.device < 64 ? uint64_t(1) << stream.device : 0;
  if (shared_bytes > 48 * 1024 && !(asked.load(std::memory_order_relaxed) & bit)) {
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, stream.shared_optin);
    if (error != cudaSuccess) launching::fail(name, cudaGetErrorString(error));
    asked.fetch_or(bit, std::memory_order_relaxed);
  }
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  const cudaError_t error = cudaLaunchKernel(
      function, dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), dim3(unsigned(threads)),
      arguments, size_t(shared_bytes), static_cast<cudaStream_t>(stream.handle));
  if (error != cudaSuccess) launching::fail(name, cudaGetErrorString(error));
}

#else

template <auto Kernel, class... Args>
void launch(const Grid& grid, int threads, int64_t shared_bytes, const Stream& stream,
            const Args&... args) {
  const char* name = __PRETTY_FUNCTION__;
  if (!launching::check(name, grid, threads, shared_bytes, stream)) return;
  auto body = [&] { Kernel(args...); };
  using Body = decltype(body);
  host::run_grid({launching::kernel_name(name),
                  host::Index3{unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)}, threads,
                  shared_bytes, [](void* x) { (*static_cast<Body*>(x))(); }, &body});
}

#endif

}  // namespace mmfast
