// One instruction of a warp, registers in and registers out: for the tests that hold the host run's
// fragments against independent statements of them (test_cuda_host_layouts.py).
#include <string>

#include "cuda/launch.cuh"
#include "host/control.h"

namespace mmfast {
namespace {

struct Registers {
  const uint32_t* a;  // [32, 4]
  const uint32_t* b;  // [32, 2]
  float* c;           // [32, 4]
  const Vec4* rows;   // [32]: 8 numbers of 16 bits each
  uint32_t* loaded;   // [32, 4]
};

enum class Product { BF16, F16, TF32 };

template <Product P>
MMFAST_KERNEL(32, 1)
product_kernel(MMFAST_PARAM(Registers) r) {
  const int lane = lane_id();
  uint32_t a[4];
  float c[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = load_global(r.a + 4 * lane + i);
    c[i] = load_global(r.c + 4 * lane + i);
  }
  const uint32_t b0 = load_global(r.b + 2 * lane), b1 = load_global(r.b + 2 * lane + 1);
  if constexpr (P == Product::BF16)
    mma_m16n8k16<bf16>(c, a, b0, b1);
  else if constexpr (P == Product::F16)
    mma_m16n8k16<f16>(c, a, b0, b1);
  else
    mma_m16n8k8_tf32(c, a, b0, b1);
  for (int i = 0; i < 4; ++i) store_global(r.c + 4 * lane + i, c[i]);
}

template <int MATRICES, bool TRANSPOSED>
MMFAST_KERNEL(32, 1)
matrices_kernel(MMFAST_PARAM(Registers) r) {
  SharedMemory shared;
  Vec4* rows = shared.take<Vec4>(32);
  const int lane = lane_id();
  store_shared(rows + lane, load_global(r.rows + lane));
  sync_warp();
  uint32_t loaded[MATRICES];
  if constexpr (MATRICES == 4 && TRANSPOSED) ldmatrix_x4_trans(loaded, rows + lane);
  if constexpr (MATRICES == 4 && !TRANSPOSED) ldmatrix_x4(loaded, rows + lane);
  if constexpr (MATRICES == 2 && TRANSPOSED) ldmatrix_x2_trans(loaded, rows + lane);
  if constexpr (MATRICES == 2 && !TRANSPOSED) ldmatrix_x2(loaded, rows + lane);
  for (int i = 0; i < MATRICES; ++i) store_global(r.loaded + 4 * lane + i, loaded[i]);
}

}  // namespace
}  // namespace mmfast

extern "C" __attribute__((visibility("default"))) int run_product(const char* type,
                                                                  const uint32_t* a,
                                                                  const uint32_t* b, float* c) {
  using namespace mmfast;
  const Registers r = {a, b, c, nullptr, nullptr};
  const Stream stream = host::pretended_stream();
  const std::string name = type;
  if (name == "bf16") return launch<product_kernel<Product::BF16>>(Grid{}, 32, 0, stream, r), 0;
  if (name == "f16") return launch<product_kernel<Product::F16>>(Grid{}, 32, 0, stream, r), 0;
  if (name == "tf32") return launch<product_kernel<Product::TF32>>(Grid{}, 32, 0, stream, r), 0;
  return 1;
}

extern "C" __attribute__((visibility("default"))) int run_matrices(int matrices, int transposed,
                                                                   const void* rows,
                                                                   uint32_t* loaded) {
  using namespace mmfast;
  const Registers r = {nullptr, nullptr, nullptr, static_cast<const Vec4*>(rows), loaded};
  const Stream stream = host::pretended_stream();
  const int64_t bytes = shared_bytes<Vec4>(32);
  if (matrices == 4 && transposed)
    launch<matrices_kernel<4, true>>(Grid{}, 32, bytes, stream, r);
  else if (matrices == 4)
    launch<matrices_kernel<4, false>>(Grid{}, 32, bytes, stream, r);
  else if (transposed)
    launch<matrices_kernel<2, true>>(Grid{}, 32, bytes, stream, r);
  else
    launch<matrices_kernel<2, false>>(Grid{}, 32, bytes, stream, r);
  return 0;
}
