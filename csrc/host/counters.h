// What a kernel did, summed over its launches. A "conflict" is a cycle that shared memory takes
// beyond what the access would take without conflicts.
#pragma once
#include <stdint.h>

#include <string>

namespace mmfast::host {

struct Counters {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t threads = 0;  // per block
  int64_t barriers = 0;
  int64_t shuffles = 0;
  int64_t mma = 0;
  int64_t ldmatrix = 0;
  int64_t shared_launched = 0;  // bytes per block: what the launch gave
  int64_t shared_asked = 0;     // and what the kernel took
  // Per warp, and only while counting:
  int64_t ldmatrix_conflicts = 0;
  int64_t shared_loads = 0;
  int64_t shared_load_conflicts = 0;
  int64_t shared_stores = 0;
  int64_t shared_store_conflicts = 0;
  int64_t copies = 0;  // cp_async16
  int64_t copy_conflicts = 0;
  int64_t global_accesses = 0;
  int64_t global_sectors = 0;        // of 32 bytes
  int64_t global_sectors_least = 0;  // if the same bytes lay side by side
};

struct CounterName {
  const char* name;
  int64_t Counters::* member;
};

constexpr CounterName kCounterNames[] = {
    {"launches", &Counters::launches},
    {"blocks", &Counters::blocks},
    {"threads", &Counters::threads},
    {"barriers", &Counters::barriers},
    {"shuffles", &Counters::shuffles},
    {"mma", &Counters::mma},
    {"ldmatrix", &Counters::ldmatrix},
    {"shared_launched", &Counters::shared_launched},
    {"shared_asked", &Counters::shared_asked},
    {"ldmatrix_conflicts", &Counters::ldmatrix_conflicts},
    {"shared_loads", &Counters::shared_loads},
    {"shared_load_conflicts", &Counters::shared_load_conflicts},
    {"shared_stores", &Counters::shared_stores},
    {"shared_store_conflicts", &Counters::shared_store_conflicts},
    {"copies", &Counters::copies},
    {"copy_conflicts", &Counters::copy_conflicts},
    {"global_accesses", &Counters::global_accesses},
    {"global_sectors", &Counters::global_sectors},
    {"global_sectors_least", &Counters::global_sectors_least},
};

// {kernel: {counter: value}}, and the launches in their order:
// [{"kernel": name, "grid": [x, y, z], "threads": n, "shared": bytes}]. Clearing forgets both.
void clear_counters();
std::string counters_json();
std::string launches_json();

}  // namespace mmfast::host
