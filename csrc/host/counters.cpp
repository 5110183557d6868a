// What the kernels did since the counters were last cleared, for each kernel by name. Banks and
// sectors are looked at only where `settings.counting` says so: every access is then written down
// until its warp next comes together, and put beside those of the other lanes at the same place.
#include "counters.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "block.h"
#include "schedule.h"

namespace mmfast::host {
namespace {

std::map<std::string, Counters> by_kernel;
Counters* now = nullptr;

struct Recorded {
  std::string kernel;
  Index3 grid;
  int threads;
  int64_t shared_bytes;
};
std::vector<Recorded> launches;

struct Accessed {
  Site site;
  int lane;
  int occurrence;  // of this place, by this lane
  Access access;
  uint32_t bytes;
  uintptr_t address;
};
std::vector<Accessed> accessed[kMaxWarps];

// Extra cycles of the lanes that go together: the most words that one of the 32 banks has to give,
// less one. A word that several lanes want counts once.
int64_t extra_cycles(std::vector<uintptr_t>& words) {
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  int64_t of_bank[32] = {};
  int64_t most = 0;
  for (const uintptr_t word : words) most = std::max(most, ++of_bank[word % 32]);
  return most > 1 ? most - 1 : 0;
}

// Lanes of 8 bytes go by halves of the warp, lanes of 16 bytes by quarters.
int64_t shared_conflicts(const Accessed* begin, const Accessed* end) {
  const int together = begin->bytes == 16 ? 8 : begin->bytes == 8 ? 16 : 32;
  int64_t extra = 0;
  std::vector<uintptr_t> words;
  for (int first = 0; first < kLanes; first += together) {
    words.clear();
    for (const Accessed* r = begin; r != end; ++r)
      if (r->lane >= first && r->lane < first + together)
        for (uintptr_t word = r->address / 4; word <= (r->address + r->bytes - 1) / 4; ++word)
          words.push_back(word);
    extra += extra_cycles(words);
  }
  return extra;
}

// Sectors of 32 bytes, and how few would do for as many different bytes.
void count_sectors(const Accessed* begin, const Accessed* end) {
  std::vector<uintptr_t> sectors, starts;
  for (const Accessed* r = begin; r != end; ++r) {
    sectors.push_back(r->address / 32);
    starts.push_back(r->address);
  }
  const auto distinct = [](std::vector<uintptr_t>& x) {
    std::sort(x.begin(), x.end());
    return int64_t(std::unique(x.begin(), x.end()) - x.begin());
  };
  now->global_accesses += 1;
  now->global_sectors += distinct(sectors);
  now->global_sectors_least += (distinct(starts) * begin->bytes + 31) / 32;
}

void count_together(const Accessed* begin, const Accessed* end) {
  switch (begin->access) {
    case Access::kLoadShared:
      now->shared_loads += 1;
      now->shared_load_conflicts += shared_conflicts(begin, end);
      break;
    case Access::kStoreShared:
      now->shared_stores += 1;
      now->shared_store_conflicts += shared_conflicts(begin, end);
      break;
    case Access::kCopyToShared:
      now->copies += 1;
      now->copy_conflicts += shared_conflicts(begin, end);
      break;
    case Access::kMatrixRow:
      break;
    case Access::kLoadGlobal:
    case Access::kStoreGlobal:
    case Access::kCopyFromGlobal:
      count_sectors(begin, end);
      break;
  }
}

int64_t ldmatrix_conflicts(const Warp& warp, int matrices) {
  int64_t extra = 0;
  std::vector<uintptr_t> words;
  for (int i = 0; i < matrices; ++i) {
    words.clear();
    for (int row = 0; row < 8; ++row)
      for (int word = 0; word < 4; ++word)
        words.push_back(reinterpret_cast<uintptr_t>(warp.address[8 * i + row]) / 4 + word);
    extra += extra_cycles(words);
  }
  return extra;
}

}  // namespace

void begin_counters(const Launch& launch) {
  now = &by_kernel[launch.kernel];
  now->launches += 1;
  now->blocks += int64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  now->threads = launch.threads;
  now->shared_launched = std::max(now->shared_launched, launch.shared_bytes);
  state.counting = settings.counting;
  for (auto& one : accessed) one.clear();
}

void count_shared_asked(int64_t bytes) { now->shared_asked = std::max(now->shared_asked, bytes); }
void count_barrier() { now->barriers += 1; }

void count_collective(const Warp& warp) {
  const bool x4 = warp.kind == Kind::kLdmatrixX4 || warp.kind == Kind::kLdmatrixX4Trans;
  switch (warp.kind) {
    case Kind::kMmaBf16:
    case Kind::kMmaF16:
    case Kind::kMmaTf32:
      now->mma += 1;
      break;
    case Kind::kLdmatrixX2:
    case Kind::kLdmatrixX2Trans:
    case Kind::kLdmatrixX4:
    case Kind::kLdmatrixX4Trans:
      now->ldmatrix += 1;
      if (state.counting) now->ldmatrix_conflicts += ldmatrix_conflicts(warp, x4 ? 4 : 2);
      break;
    case Kind::kShuffle:
      now->shuffles += 1;
      break;
    default:
      break;
  }
  if (state.counting) flush_accesses(int(&warp - block.warps));
}

void count_access(const void* p, uint32_t bytes, Access access, Site site) {
  if (access == Access::kMatrixRow) return;
  const Thread& self = current();
  accessed[self.warp].push_back(
      {site, self.lane, 0, access, bytes, reinterpret_cast<uintptr_t>(p)});
}

void flush_accesses(int warp) {
  std::vector<Accessed>& all = accessed[warp];
  if (all.empty()) return;
  const auto place = [](const Accessed& r) {
    return std::make_tuple(r.site.file, r.site.line, r.access, r.bytes);
  };
  std::stable_sort(all.begin(), all.end(), [&](const Accessed& x, const Accessed& y) {
    return std::make_tuple(place(x), x.lane) < std::make_tuple(place(y), y.lane);
  });
  for (size_t i = 1; i < all.size(); ++i)
    if (place(all[i]) == place(all[i - 1]) && all[i].lane == all[i - 1].lane)
      all[i].occurrence = all[i - 1].occurrence + 1;
  const auto key = [&](const Accessed& r) { return std::make_tuple(place(r), r.occurrence); };
  std::stable_sort(all.begin(), all.end(),
                   [&](const Accessed& x, const Accessed& y) { return key(x) < key(y); });
  for (size_t begin = 0, end = 0; begin < all.size(); begin = end) {
    while (end < all.size() && key(all[end]) == key(all[begin])) ++end;
    count_together(all.data() + begin, all.data() + end);
  }
  all.clear();
}

void flush_all_accesses() {
  if (state.counting)
    for (int i = 0; i < block.warp_count; ++i) flush_accesses(i);
}

void record_launch(const Launch& launch) {
  launches.push_back({launch.kernel, launch.grid, launch.threads, launch.shared_bytes});
}

void clear_counters() {
  by_kernel.clear();
  launches.clear();
}

namespace {
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}
}  // namespace

std::string launches_json() {
  std::string text = "[";
  for (const Recorded& one : launches) {
    if (text.size() > 1) text += ", ";
    text += "{\"kernel\": " + quoted(one.kernel) + ", \"grid\": [" + std::to_string(one.grid.x) +
            ", " + std::to_string(one.grid.y) + ", " + std::to_string(one.grid.z) +
            "], \"threads\": " + std::to_string(one.threads) +
            ", \"shared\": " + std::to_string(one.shared_bytes) + "}";
  }
  return text + "]";
}

std::string counters_json() {
  std::string text = "{";
  for (const auto& [kernel, counters] : by_kernel) {
    if (text.size() > 1) text += ", ";
    text += quoted(kernel) + ": {";
    const char* separator = "";
    for (const CounterName& one : kCounterNames) {
      text += separator + quoted(one.name) + ": " + std::to_string(counters.*(one.member));
      separator = ", ";
    }
    text += "}";
  }
  return text + "}";
}

}  // namespace mmfast::host
