// For GPUs only: the host run has csrc/host/control.h.
#include "limits.h"

#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace mmfast {
namespace {

constexpr int kDevices = 64;  // those beyond are asked at every call

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error == cudaSuccess) return value;
  cudaGetLastError();  // not for the next launch to find
  throw std::runtime_error("mmfast: CUDA does not know device " + std::to_string(device) + " (" +
                           cudaGetErrorString(error) +
                           "); nvidia-smi shows the driver and the devices it has");
}

// All three in one word, so that a thread sees all or nothing of what another one wrote.
uint64_t asked(int device) {
  const int capability = attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                         attribute(cudaDevAttrComputeCapabilityMinor, device);
  return uint64_t(attribute(cudaDevAttrMultiProcessorCount, device)) | uint64_t(capability) << 16 |
         uint64_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) << 32;
}

}  // namespace

void read_limits(Stream& stream) {
  static std::atomic<uint64_t> known[kDevices];
  const bool kept = stream.device >= 0 && stream.device < kDevices;
  uint64_t limits = kept ? known[stream.device].load(std::memory_order_relaxed) : 0;
  if (limits == 0) {
    limits = asked(stream.device);
    if (kept) known[stream.device].store(limits, std::memory_order_relaxed);
  }
  stream.sms = int(limits & 0xffff);
  stream.capability = int(limits >> 16 & 0xffff);
  stream.shared_optin = int(limits >> 32);
}

}  // namespace mmfast
