// The forward of cross_attention: which instance, which tiles, how many splits.
#include <algorithm>

#include "cross_attention_merge.cuh"
#include "cross_attention_outside.cuh"

namespace mmfast {
namespace {

constexpr int32_t kMostSplits = 32;
// Blocks that a multiprocessor has at once, at least.
constexpr int64_t kResident = 2;
// In tiles of keys: what a block takes to begin, and what merging costs.
constexpr int64_t kStart = 2, kMerge = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_plain(const AttentionArgs& a) {
  const AttentionRules& r = a.rules;
  return a.q.wide && a.k.wide && a.v.wide && r.scale > 0 && r.mask.data == nullptr &&
         r.bias.data == nullptr && r.kv_segments == nullptr && r.seed == nullptr;
}

int32_t padded_width(const AttentionArgs& a, bool full) {
  const int32_t width = std::max(a.D, a.Dv);
  const bool narrow = !full && a.dtype != DType::F32;
  for (const int32_t one : {32, 64, 96, 128})
    if (width <= one && (narrow || one == 64 || one == 128)) return one;
  return kWidestHead;
}

// How often to cut the keys: what the busiest multiprocessor has to do, in tiles of keys.
int32_t count_splits(int64_t blocks, int64_t key_tiles, int64_t slots) {
  const int64_t most = std::min<int64_t>(kMostSplits, key_tiles / 2);
  int32_t best = 1;
  int64_t least = ceil_div(blocks, slots) * (key_tiles + kStart);
  for (int32_t splits = 2; splits <= most; ++splits) {
    const int64_t cost =
        ceil_div(blocks * splits, slots) * (ceil_div(key_tiles, splits) + kStart) + kMerge;
    if (cost < least) best = splits, least = cost;
  }
  return best;
}

FwdArgs fwd_args(const AttentionArgs& a, const FwdPlan& plan) {
  FwdArgs args;
  args.a = a;
  args.tiles = plan.tiles;
  args.splits = plan.splits;
  args.chunk = plan.chunk;
  args.scale = a.rules.scale * 1.4426950408889634f;
  args.pitch = int32_t(ceil_div(a.Dv, 4) * 4);
  return args;
}

int64_t part_floats(const AttentionArgs& a, const FwdPlan& plan) {
  const int64_t rows = int64_t(a.rules.B) * a.rules.H * a.rules.N;
  return ceil_div(plan.splits * rows, 4) * 4;
}

}  // namespace

FwdPlan fwd_plan(const AttentionArgs& a, const Stream& stream) {
  const AttentionRules& r = a.rules;
  const int element = a.dtype == DType::F32 ? 4 : 2;
  const int64_t groups = int64_t(r.B) * r.G, slots = std::max(1, stream.sms) * kResident;
  FwdPlan plan;
  plan.full = !is_plain(a);
  plan.width = padded_width(a, plan.full);
  plan.rows = 64;
  plan.keys = fwd_keys(element, plan.width);
  plan.tiles = query_tiles(r.heads, r.N, plan.rows);
  if (!plan.full && element == 2 && plan.width >= 64 && plan.width <= 128) {
    // Twice the rows: where they still fill the device, and hardly more of them are padding.
    const QueryTiles tall = query_tiles(r.heads, r.N, 128);
    plan.tall =
        groups * tall.count >= slots && 16 * int64_t(tall.count) <= 9 * int64_t(plan.tiles.count);
    if (plan.tall) plan.rows = 128, plan.tiles = tall;
  }
  const int64_t key_tiles = ceil_div(r.M, plan.keys);
  const int64_t blocks = groups * plan.tiles.count;
  const int64_t each = ceil_div(key_tiles, count_splits(blocks, key_tiles, slots));
  plan.splits = key_tiles > 0 ? int32_t(ceil_div(key_tiles, each)) : 1;
  plan.chunk = int32_t(std::min<int64_t>(each * plan.keys, 0x7fffffff));
  plan.blocks = blocks * plan.splits;
  return plan;
}

int64_t cross_attention_fwd_workspace(const AttentionArgs& a, const Stream& stream) {
  const FwdPlan plan = fwd_plan(a, stream);
  if (plan.splits == 1) return 0;
  return part_floats(a, plan) * (fwd_args(a, plan).pitch + 1) * int64_t(sizeof(float));
}

void cross_attention_fwd(const AttentionArgs& a, void* workspace, const Stream& stream) {
  if (a.rules.B == 0 || a.rules.H == 0 || a.rules.N == 0) return;
  const FwdPlan plan = fwd_plan(a, stream);
  FwdArgs args = fwd_args(a, plan);
  OutsideArgs outside;
  outside.add(of_queries(a, a.out, a.Dv));
  clear_outside(outside, a.rules, stream);
  if (plan.splits > 1) {
    args.part_lse = static_cast<float*>(workspace);
    args.parts = args.part_lse + part_floats(a, plan);
  }
  const auto run = [&](auto plain, auto full) { (plan.full ? full : plain)(plan, args, stream); };
  switch (a.dtype) {
    case DType::BF16:
      run(cross_attention_fwd_plain<bf16>, cross_attention_fwd_full<bf16>);
      break;
    case DType::F16:
      run(cross_attention_fwd_plain<f16>, cross_attention_fwd_full<f16>);
      break;
    default:
      run(cross_attention_fwd_plain<float>, cross_attention_fwd_full<float>);
  }
  if (plan.splits == 1) return;
  const int64_t rows = int64_t(a.rules.B) * a.rules.H * a.rules.N;
  const Grid grid = {ceil_div(rows * (args.pitch / 4), kMergeThreads)};
  switch (a.dtype) {
    case DType::BF16:
      return launch<cross_attention_merge_kernel<bf16>>(grid, kMergeThreads, 0, stream, args);
    case DType::F16:
      return launch<cross_attention_merge_kernel<f16>>(grid, kMergeThreads, 0, stream, args);
    default:
      return launch<cross_attention_merge_kernel<float>>(grid, kMergeThreads, 0, stream, args);
  }
}

}  // namespace mmfast
