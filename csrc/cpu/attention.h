// Signatures of the CPU attention kernels; in kernels.h's conventions.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmcore {

using std::int64_t;

// B batch, H query heads, K key heads (H % K == 0), Tq queries, Tk keys, D and Dv head sizes of q, k and of v
using AttentionFwd = void(const void* q, const void* k, const void* v, void* out, float* lse, int64_t B, int64_t H, int64_t K,
                          int64_t Tq, int64_t Tk, int64_t D, int64_t Dv, int64_t q_stride_b, int64_t q_stride_t,
                          int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t, int64_t k_stride_h, int64_t v_stride_b,
                          int64_t v_stride_t, int64_t v_stride_h, float softmax_scale, int64_t window_left,
                          int64_t window_right, DType dtype);

using AttentionBwd = void(const void* dout, const float* dlse, const void* q, const void* k, const void* v, const void* out,
                          const float* lse, void* dq, void* dk, void* dv, int64_t B, int64_t H, int64_t K, int64_t Tq,
                          int64_t Tk, int64_t D, int64_t Dv, int64_t do_stride_b, int64_t do_stride_t, int64_t do_stride_h,
                          int64_t q_stride_b, int64_t q_stride_t, int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t,
                          int64_t k_stride_h, int64_t v_stride_b, int64_t v_stride_t, int64_t v_stride_h, float softmax_scale,
                          int64_t window_left, int64_t window_right, DType dtype);

#if defined(LLMCORE_ISA)
namespace LLMCORE_ISA {
AttentionFwd attention_fwd;
AttentionBwd attention_bwd;
}  // namespace LLMCORE_ISA
#endif

}  // namespace llmcore
