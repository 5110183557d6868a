// Small kernels, each with a fault that can be planted in it, for tests of the host run itself
// (test_cuda_host.py). Compiled by the tests alone; no torch.
#include <stdio.h>
#include <string.h>

#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "host/control.h"

namespace mmfast {
namespace {

constexpr int kThreads = 128;
constexpr int kSteps = 4;

struct ToyArgs {
  const float* in;
  float* out;
};

// Every thread reads what another warp has written, several times over.
enum class Barrier { kBoth, kNoneBeforeReading, kNoneAfterReading };
template <Barrier kBarrier>
MMFAST_KERNEL(kThreads, 1)
exchange_kernel(MMFAST_PARAM(ToyArgs) args) {
  SharedMemory shared;
  float* x = shared.take<float>(kThreads);
  const int t = int(threadIdx.x);
  for (int step = 0; step < kSteps; ++step) {
    store_shared(x + t, load_global(args.in + step * kThreads + t));
    if (kBarrier != Barrier::kNoneBeforeReading) sync_threads();
    store_global(args.out + step * kThreads + t, load_shared(x + kThreads - 1 - t));
    if (kBarrier != Barrier::kNoneAfterReading) sync_threads();
  }
}

// The same between the lanes of a warp.
template <bool kSync>
MMFAST_KERNEL(kThreads, 1)
exchange_warp_kernel(MMFAST_PARAM(ToyArgs) args) {
  SharedMemory shared;
  float* x = shared.take<float>(kThreads);
  const int t = int(threadIdx.x);
  for (int step = 0; step < kSteps; ++step) {
    store_shared(x + t, load_global(args.in + step * kThreads + t));
    if (kSync) sync_warp();
    store_global(args.out + step * kThreads + t, load_shared(x + (t ^ 31)));
    if (kSync) sync_warp();
  }
}

// Two buffers, the next one filled while the other is read.
template <bool kLoose>
MMFAST_KERNEL(kThreads, 1)
stream_kernel(MMFAST_PARAM(ToyArgs) args) {
  SharedMemory shared;
  float* x = shared.take<float>(2 * 4 * kThreads);
  const int t = int(threadIdx.x);
  const auto fetch = [&](int step) {
    if (step < kSteps)
      cp_async16(x + (step % 2 * kThreads + t) * 4, args.in + (step * kThreads + t) * 4, true);
    cp_async_commit();
  };
  fetch(0);
  for (int step = 0; step < kSteps; ++step) {
    fetch(step + 1);
    cp_async_wait<kLoose ? 2 : 1>();
    sync_threads();
    const float* from = x + step % 2 * 4 * kThreads;
    for (int i = 0; i < 4; ++i)
      store_global(args.out + (step * 4 + i) * kThreads + t, load_shared(from + i * kThreads + t));
    sync_threads();
  }
}

// What goes past the end of an array, or lies askew.
enum class Place { kInside, kShared, kPlainShared, kGlobalRead, kGlobalWrite };
template <Place kPlace>
MMFAST_KERNEL(kThreads, 1)
places_kernel(MMFAST_PARAM(ToyArgs) args) {
  SharedMemory shared;
  float* x = shared.take<float>(kThreads);
  float* y = shared.take<float>(kThreads);
  const int t = int(threadIdx.x);
  const int past = t == 77 ? kThreads - t : 0;  // the element after the last
  if (kPlace == Place::kPlainShared) {
    x[t + past] = 1;
  } else {
    store_shared(x + t + (kPlace == Place::kShared ? past : 0), 1.0f);
  }
  store_shared(y + t, load_global(args.in + t + (kPlace == Place::kGlobalRead ? past : 0)));
  sync_threads();
  store_global(args.out + t + (kPlace == Place::kGlobalWrite ? past : 0),
               load_shared(y + kThreads - 1 - t));
}

enum class Align { kRight, kStoreGlobal, kStoreShared, kCopy };
template <Align kAlign>
MMFAST_KERNEL(kThreads, 1)
aligned_kernel(MMFAST_PARAM(ToyArgs) args) {
  SharedMemory shared;
  float* x = shared.take<float>(4 * kThreads + 4);
  const int t = int(threadIdx.x);
  const int by = t == 3 ? 1 : 0;
  const auto vec = [](auto* p) { return reinterpret_cast<Vec4*>(p); };
  cp_async16(x + 4 * t, args.in + 4 * t + (kAlign == Align::kCopy ? by : 0), true);
  cp_async_commit();
  cp_async_wait<0>();
  Vec4 v = load_shared(vec(x + 4 * t));
  sync_threads();
  store_shared(vec(x + 4 * t + (kAlign == Align::kStoreShared ? by : 0)), v);
  sync_threads();
  v = load_shared(vec(x + 4 * (kThreads - 1 - t)));
  store_global(vec(args.out + 4 * t + (kAlign == Align::kStoreGlobal ? by : 0)), v);
}

// Lanes, warps and threads that go ways of their own.
enum class Way { kTogether, kShuffle, kTwoShuffles, kBarrier, kLeave, kOtherBarrier, kTooMuch };
template <Way kWay>
MMFAST_KERNEL(kThreads, 1)
ways_kernel(MMFAST_PARAM(ToyArgs) args) {
  SharedMemory shared;
  float* x = shared.take<float>(kWay == Way::kTooMuch ? 2 * kThreads : kThreads);
  const int t = int(threadIdx.x);
  float v = load_global(args.in + t);
  if (kWay == Way::kShuffle) {
    if (lane_id() < 16) v = shuffle_xor(v, 1);
  } else if (kWay == Way::kTwoShuffles) {
    if (lane_id() < 16) {
      v = shuffle_xor(v, 1);
    } else {
      v = shuffle_xor(v, 1);
    }
  } else {
    v = shuffle_xor(v, 1);
  }
  if (kWay == Way::kLeave && warp_id() == 2) return;
  store_shared(x + t, v);
  if (kWay == Way::kOtherBarrier && warp_id() == 1) {
    sync_threads();
  } else if (kWay != Way::kBarrier || warp_id() != 1) {
    sync_threads();
  }
  store_global(args.out + t, load_shared(x + kThreads - 1 - t));
}

// Blocks that share an element of the result have no order.
template <bool kShare>
MMFAST_KERNEL(kThreads, 1)
blocks_kernel(MMFAST_PARAM(ToyArgs) args) {
  const int t = int(threadIdx.x), own = int(blockIdx.x) * kThreads;
  store_global(args.out + (kShare && t == 0 ? 0 : own + t), load_global(args.in + own + t));
}

// out [16, 8] = a [16, 16] b [16, 8] with b by columns, by one warp.
struct GemmArgs {
  const bf16 *a, *b;
  float* out;
};
enum class Rows { kPadded, kPacked };
template <bool kSwapped, Rows kRows>
MMFAST_KERNEL(32, 1)
gemm_kernel(MMFAST_PARAM(GemmArgs) args) {
  constexpr int kStride = kRows == Rows::kPadded ? 24 : 16;
  SharedMemory shared;
  bf16* a = shared.take<bf16>(16 * kStride);
  bf16* b = shared.take<bf16>(8 * kStride);
  const int lane = lane_id(), g = lane / 4, q = lane % 4;
  cp_async16(a + lane / 2 * kStride + lane % 2 * 8, args.a + lane * 8, true);
  if (lane < 16) cp_async16(b + lane / 2 * kStride + lane % 2 * 8, args.b + lane * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();
  uint32_t x[4], y[2];
  ldmatrix_x4(x, a + lane % 16 * kStride + lane / 16 * 8);
  ldmatrix_x2(y, b + lane % 8 * kStride + lane / 8 % 2 * 8);
  float c[4] = {};
  mma_m16n8k16<bf16>(c, x, y[kSwapped ? 1 : 0], y[kSwapped ? 0 : 1]);
  store_global(reinterpret_cast<Vec2*>(args.out + g * 8 + 2 * q),
               Vec2{{as_bits(c[0]), as_bits(c[1])}});
  store_global(reinterpret_cast<Vec2*>(args.out + (g + 8) * 8 + 2 * q),
               Vec2{{as_bits(c[2]), as_bits(c[3])}});
}

// One access of each lane to shared memory, `kStep` elements apart.
template <class T, int kStep>
MMFAST_KERNEL(32, 1)
banks_kernel(MMFAST_PARAM(ToyArgs) args) {
  SharedMemory shared;
  T* x = shared.take<T>(32 * kStep);
  store_shared(x + lane_id() * kStep, T{});
  sync_warp();
  store_global(args.out + lane_id() * kStep, 1.0f);
}

using Data = std::vector<float>;

Data numbers(size_t count) {
  Data x(count);
  for (size_t i = 0; i < count; ++i) x[i] = float(i + 1);
  return x;
}

// Runs a kernel on whole numbers; whether its result is `expected(i)` everywhere.
template <auto kKernel>
bool run(size_t count, int blocks, int64_t shared, const std::function<float(size_t)>& expected) {
  const Data in = numbers(count);
  Data out(count, -1.0f);
  launch<kKernel>(Grid{blocks}, kThreads, shared, host::pretended_stream(),
                  ToyArgs{in.data(), out.data()});
  for (size_t i = 0; i < count; ++i)
    if (!(out[i] == expected(i))) return false;
  return true;
}

constexpr int64_t kRow = shared_bytes<float>(kThreads);

template <Barrier kBarrier>
bool exchange() {
  return run<exchange_kernel<kBarrier>>(kThreads * kSteps, 1, kRow, [](size_t i) {
    return float(i / kThreads * kThreads + kThreads - i % kThreads);
  });
}
template <bool kSync>
bool exchange_warp() {
  return run<exchange_warp_kernel<kSync>>(kThreads * kSteps, 1, kRow,
                                          [](size_t i) { return float((i ^ 31) + 1); });
}
template <bool kLoose>
bool stream() {
  return run<stream_kernel<kLoose>>(4 * kThreads * kSteps, 1, shared_bytes<float>(8 * kThreads),
                                    [](size_t i) { return float(i + 1); });
}
template <Place kPlace>
bool places() {
  return run<places_kernel<kPlace>>(kThreads, 1, 2 * kRow,
                                    [](size_t i) { return float(kThreads - i); });
}
template <Align kAlign>
bool aligned() {
  return run<aligned_kernel<kAlign>>(
      4 * kThreads, 1, shared_bytes<float>(4 * kThreads + 4),
      [](size_t i) { return float((kThreads - 1 - i / 4) * 4 + i % 4 + 1); });
}
template <Way kWay>
bool ways() {
  return run<ways_kernel<kWay>>(kThreads, 1, kRow,
                                [](size_t i) { return float(((kThreads - 1 - i) ^ 1) + 1); });
}
template <bool kShare>
bool blocks() {
  return run<blocks_kernel<kShare>>(kThreads * 8, 8, 0, [](size_t i) {
    return kShare && i % kThreads == 0 ? i == 0 ? 1.0f : -1.0f : float(i + 1);
  });
}

template <bool kSwapped, Rows kRows>
bool gemm() {
  std::vector<bf16> a(16 * 16), b(8 * 16);
  std::vector<float> out(16 * 8, -1.0f);
  for (size_t i = 0; i < a.size(); ++i) a[i] = {float_to_bf16(float(int(i * 7 % 13) - 6))};
  for (size_t i = 0; i < b.size(); ++i) b[i] = {float_to_bf16(float(int(i * 5 % 11) - 5))};
  launch<gemm_kernel<kSwapped, kRows>>(Grid{}, 32, 4096, host::pretended_stream(),
                                       GemmArgs{a.data(), b.data(), out.data()});
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += bf16_to_float(a[i * 16 + k].bits) * bf16_to_float(b[j * 16 + k].bits);
      if (sum != out[i * 8 + j]) return false;
    }
  return true;
}

template <class T, int kStep>
bool banks() {
  alignas(128) static float out[32 * kStep];
  launch<banks_kernel<T, kStep>>(Grid{}, 32, shared_bytes<T>(32 * kStep), host::pretended_stream(),
                                 ToyArgs{nullptr, out});
  return true;
}

const std::map<std::string, std::function<bool()>> kToys = {
    {"exchange", exchange<Barrier::kBoth>},
    {"exchange: no barrier before reading", exchange<Barrier::kNoneBeforeReading>},
    {"exchange: no barrier after reading", exchange<Barrier::kNoneAfterReading>},
    {"exchange in a warp", exchange_warp<true>},
    {"exchange in a warp: no sync_warp", exchange_warp<false>},
    {"stream", stream<false>},
    {"stream: loose wait", stream<true>},
    {"places", places<Place::kInside>},
    {"places: shared overrun", places<Place::kShared>},
    {"places: shared overrun by a plain store", places<Place::kPlainShared>},
    {"places: global read out of bounds", places<Place::kGlobalRead>},
    {"places: global write out of bounds", places<Place::kGlobalWrite>},
    {"aligned", aligned<Align::kRight>},
    {"aligned: misaligned store", aligned<Align::kStoreGlobal>},
    {"aligned: misaligned shared store", aligned<Align::kStoreShared>},
    {"aligned: misaligned copy", aligned<Align::kCopy>},
    {"ways", ways<Way::kTogether>},
    {"ways: divergent shuffle", ways<Way::kShuffle>},
    {"ways: a shuffle on either side", ways<Way::kTwoShuffles>},
    {"ways: skipped barrier", ways<Way::kBarrier>},
    {"ways: left before a barrier", ways<Way::kLeave>},
    {"ways: two barriers", ways<Way::kOtherBarrier>},
    {"ways: more shared memory than launched", ways<Way::kTooMuch>},
    {"blocks", blocks<false>},
    {"blocks: one element shared", blocks<true>},
    {"gemm", gemm<false, Rows::kPadded>},
    {"gemm: swapped B registers", gemm<true, Rows::kPadded>},
    {"gemm: packed rows", gemm<false, Rows::kPacked>},
    {"banks: 4 bytes, 1 apart", banks<float, 1>},
    {"banks: 4 bytes, 2 apart", banks<float, 2>},
    {"banks: 4 bytes, 32 apart", banks<float, 32>},
    {"banks: 16 bytes, 1 apart", banks<Vec4, 1>},
    {"banks: 16 bytes, 8 apart", banks<Vec4, 8>},
};

}  // namespace
}  // namespace mmfast

// 0: right, 1: a wrong result, 2: an error, whose text is in `message`, 3: no such toy.
extern "C" __attribute__((visibility("default"))) int toy(const char* name, char* message,
                                                          int bytes) {
  const auto found = mmfast::kToys.find(name);
  if (found == mmfast::kToys.end()) return 3;
  try {
    return found->second() ? 0 : 1;
  } catch (const std::exception& error) {
    snprintf(message, size_t(bytes), "%s", error.what());
    return 2;
  }
}
