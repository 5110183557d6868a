// Where a launch goes, and what launchers choose an instance by. Plain C++17.
#pragma once

namespace mmfast {

struct Stream {
  void* handle = nullptr;  // cudaStream_t
  int device = 0;
  int sms = 0;           // multiprocessors
  int capability = 0;    // 80, 86, 90, ...
  int shared_optin = 0;  // bytes of shared memory that a block can have
};

// Fills in what is known of `stream.device`; asked of the driver once for each device.
void read_limits(Stream& stream);

}  // namespace mmfast
