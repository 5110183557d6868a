// The schemas of the torch ops: one text for every backend that defines them.
//
// cross_attention: without `v` the keys are the values, and `dv` is then `[0]`. With `q_starts`
// (`kv_starts`), int32 `[B + 1]`, the rows of all items lie one after the other in `[1, H, Tq, D]`
// (`[1, G, T, D]`), item b's from starts[b] on; `q_lens` (`kv_lens`) are then given too, and
// `max_q`
// (`max_kv`) is the N (M) of everything that is padded. Both are 0 otherwise.
#pragma once

namespace mmfast::schemas {

#define MMFAST_CONDITIONS                                                                    \
  "Tensor? kv_lens, Tensor? q_lens, Tensor? q_segments, Tensor? kv_segments, Tensor? mask, " \
  "Tensor? bias, Tensor? q_starts, Tensor? kv_starts, "
#define MMFAST_VALUES "Tensor? gate, Tensor? seed, float scale, float dropout_p, "
#define MMFAST_RULES "bool is_causal, int segment_rule, int max_q, int max_kv"

inline constexpr char kCrossAttentionFwd[] =
    "cross_attention_fwd(Tensor q, Tensor k, Tensor? v, " MMFAST_CONDITIONS
        MMFAST_VALUES MMFAST_RULES ") -> (Tensor, Tensor)";
inline constexpr char kCrossAttentionBwd[] =
    "cross_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor? v, Tensor out, "
    "Tensor lse, " MMFAST_CONDITIONS MMFAST_VALUES MMFAST_RULES
    ", bool need_dbias, bool need_dk) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
inline constexpr char kCrossAttentionProbs[] =
    "cross_attention_probs(Tensor q, Tensor k, Tensor lse, " MMFAST_CONDITIONS
    "float scale, " MMFAST_RULES ", bool importance, int weights) -> (Tensor, Tensor)";
inline constexpr char kCrossAttentionProbsBwd[] =
    "cross_attention_probs_bwd(Tensor? dimportance, Tensor? dweights, Tensor q, Tensor k, "
    "Tensor lse, " MMFAST_CONDITIONS "float scale, " MMFAST_RULES
    ", bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)";

#undef MMFAST_CONDITIONS
#undef MMFAST_VALUES
#undef MMFAST_RULES

inline constexpr char kGatedResidualFwd[] =
    "gated_residual_fwd(Tensor x, Tensor y, Tensor gate, Tensor? row_mask, int activation) -> "
    "Tensor";
inline constexpr char kGatedResidualBwd[] =
    "gated_residual_bwd(Tensor dout, Tensor y, Tensor gate, Tensor? row_mask, int activation, "
    "bool need_dy, bool need_dgate) -> (Tensor, Tensor)";

inline constexpr char kGluFwd[] = "glu_fwd(Tensor a, Tensor b, int activation) -> Tensor";
inline constexpr char kGluBwd[] =
    "glu_bwd(Tensor dout, Tensor a, Tensor b, int activation) -> (Tensor, Tensor)";
inline constexpr char kGluPackedFwd[] = "glu_packed_fwd(Tensor ab, int activation) -> Tensor";
inline constexpr char kGluPackedBwd[] =
    "glu_packed_bwd(Tensor dout, Tensor ab, int activation) -> Tensor";

inline constexpr char kFuseFwd[] =
    "fuse_fwd(Tensor[] features, Tensor logits, Tensor? present, int mode) -> Tensor";
inline constexpr char kFuseBwd[] =
    "fuse_bwd(Tensor dout, Tensor[] features, Tensor logits, Tensor? present, int mode, "
    "bool need_dfeatures, bool need_dlogits) -> (Tensor[], Tensor)";

inline constexpr char kModulateFwd[] =
    "modulate_fwd(Tensor x, Tensor? residual, Tensor? gate, Tensor? scale, Tensor? shift, "
    "Tensor? weight, Tensor? bias, int norm, float eps) -> (Tensor, Tensor)";
inline constexpr char kModulateBwd[] =
    "modulate_bwd(Tensor? dout, Tensor? dh, Tensor x, Tensor? h, Tensor? gate, Tensor? scale, "
    "Tensor? weight, Tensor? bias, int norm, float eps, Tensor? shift, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";

inline constexpr char kAdaptationGateFwd[] =
    "adaptation_gate_fwd(Tensor z, Tensor h, Tensor? weight, Tensor? bias, Tensor? row_mask, "
    "float beta, float eps) -> Tensor";
inline constexpr char kAdaptationGateBwd[] =
    "adaptation_gate_bwd(Tensor dout, Tensor z, Tensor h, Tensor? weight, Tensor? bias, "
    "Tensor? row_mask, float beta, float eps, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)";

}  // namespace mmfast::schemas
