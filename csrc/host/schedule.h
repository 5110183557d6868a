// What tests can set of a run on the CPU.
#pragma once
#include <stdint.h>

namespace mmfast::host {

enum class Schedule : int { kRandom = 0, kGreedy = 1, kRoundRobin = 2 };

struct Settings {
  uint64_t seed = 0;
  Schedule schedule = Schedule::kRandom;
  bool counting = false;  // the banks and sectors of every access
  bool dry = false;       // launches are written down and nothing runs
  // The device that launchers plan for: an A100.
  int sms = 108;
  int capability = 80;
  int shared_optin = 163 * 1024;
};
extern Settings settings;

}  // namespace mmfast::host
