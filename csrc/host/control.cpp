// What tests set and read through ctypes (tests/cuda_host.py).
#include "control.h"

#include "counters.h"
#include "schedule.h"

#define MMFAST_EXPORT extern "C" __attribute__((visibility("default")))

namespace mmfast::host {

Stream pretended_stream() {
  return {nullptr, 0, settings.sms, settings.capability, settings.shared_optin};
}

}  // namespace mmfast::host

using mmfast::host::settings;

MMFAST_EXPORT void mmfast_host_seed(uint64_t seed) { settings.seed = seed; }

// 0 random, 1 greedy, 2 round robin; returns what it was before.
MMFAST_EXPORT int mmfast_host_schedule(int schedule) {
  const int before = int(settings.schedule);
  settings.schedule = mmfast::host::Schedule(schedule);
  return before;
}

// Whether banks and sectors are counted (slow); returns what it was before.
MMFAST_EXPORT int mmfast_host_counting(int counting) {
  const bool before = settings.counting;
  settings.counting = counting != 0;
  return int(before);
}

// Whether launches are only written down; returns what it was before.
MMFAST_EXPORT int mmfast_host_dry_run(int dry) {
  const bool before = settings.dry;
  settings.dry = dry != 0;
  return int(before);
}

MMFAST_EXPORT void mmfast_host_device(int sms, int capability, int shared_optin) {
  settings.sms = sms;
  settings.capability = capability;
  settings.shared_optin = shared_optin;
}

MMFAST_EXPORT void mmfast_host_clear_counters() { mmfast::host::clear_counters(); }

// JSON: {kernel: {counter: value}}. Valid until the next call.
MMFAST_EXPORT const char* mmfast_host_counters() {
  static std::string text;
  text = mmfast::host::counters_json();
  return text.c_str();
}

// JSON: [{"kernel": name, "grid": [x, y, z], "threads": n, "shared": bytes}], in their order since
// the last clear. Valid until the next call.
MMFAST_EXPORT const char* mmfast_host_launches() {
  static std::string text;
  text = mmfast::host::launches_json();
  return text.c_str();
}
