// Where a kernel runs: what a launcher has to know of the device and of the caller's stream.
#pragma once

namespace mmfast {

struct Stream {
  void* handle =
      nullptr;  // cudaStream_t; null is the default stream, and the host run has no other
  int device = 0;
  int sms = 0;           // streaming multiprocessors
  int capability = 0;    // 10 * major + minor
  int shared_optin = 0;  // bytes of shared memory that one block may ask for
};

}  // namespace mmfast
