// Mixture of experts: signatures of the CPU kernels. T tokens, E experts, k chosen by each token, P = T k pairs of a token and an
// expert; pair t * k + j is token t's j-th choice.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmcore {

using std::int64_t;

// logits (T, E), bias (E,), weights, indices (T, k), scores (T, E) or absent
using MoeRouteFwd = void(const void* logits, const float* bias, float* weights, int64_t* indices, float* scores, int64_t tokens,
                         int64_t experts, int64_t top_k, int64_t logits_row_stride, bool sigmoid, bool normalize,
                         int64_t num_groups, int64_t top_groups, float scale, DType dtype);

// dweights (T, k) and dscores (T, E), one of them may be absent; dlogits (T, E)
using MoeRouteBwd = void(const float* dweights, const float* dscores, const void* logits, const int64_t* indices, void* dlogits,
                         int64_t tokens, int64_t experts, int64_t top_k, int64_t logits_row_stride, bool sigmoid, bool normalize,
                         float scale, DType dtype);

// Counting sort of the pairs by their expert, stable: order[place] = pair, place[pair] = place, offsets (E + 1,). Returns the
// first pair whose index is no expert, or -1.
using MoePlan = int64_t(const int64_t* indices, int32_t* order, int32_t* place, int32_t* offsets, int64_t pairs, int64_t experts);

// out[i] = x[order[i] / top_k] for i in [first, first + count)
using MoeGather = void(const void* x, const int32_t* order, void* out, int64_t first, int64_t count, int64_t cols, int64_t top_k,
                       int64_t x_row_stride, DType dtype);

// y[t] = sum over j of weights[t * k + j] out[place[t * k + j]], or of out alone where weights is absent
using MoeCombine = void(const void* out, const int32_t* place, const float* weights, void* y, int64_t tokens, int64_t cols,
                        int64_t top_k, DType dtype);

// SwiGLU between an expert's two products, backward. With h = (gate, up) of a row, act = silu(gate) up, w = weights[order[i]] and
// dact the gradient of w act divided by w:
//   act_scaled = w act     dh = the gradient of h     dweights[order[i]] = sum of dact act
// act_scaled may be dact itself and dh may be h itself.
using MoeSwigluBwd = void(const void* dact, const void* h, const int32_t* order, const float* weights, void* act_scaled, void* dh,
                          float* dweights, int64_t first, int64_t count, int64_t cols, DType dtype);

#if defined(LLMCORE_ISA)
namespace LLMCORE_ISA {
MoeRouteFwd moe_route_fwd;
MoeRouteBwd moe_route_bwd;
MoePlan moe_plan;
MoeGather moe_gather;
MoeCombine moe_combine;
MoeSwigluBwd moe_swiglu_bwd;
}  // namespace LLMCORE_ISA
#endif

}  // namespace llmcore
