// The CPU kernels' signatures, and the table of one instruction-set level's kernels. Every csrc/cpu/<op>.cpp is
// compiled once per level with LLMCORE_ISA naming it, and defines its functions in the namespace of that name;
// bindings.cpp picks a table.
//
// Strides are in elements, the last dimension is contiguous, outputs are contiguous; a null pointer means absent.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/attention.h"
#include "cpu/causal_conv1d.h"
#include "cpu/moe.h"
#include "cpu/selective_scan.h"
#include "cpu/ssd.h"

namespace llmcore {

using std::int64_t;

using RmsNormFwd = void(const void* x, const void* residual, const void* weight, void* y, void* s, float* rstd,
                        int64_t rows, int64_t cols, int64_t x_row_stride, int64_t residual_row_stride, float eps,
                        float weight_offset, DType x_dtype, DType residual_dtype, DType weight_dtype);

using RmsNormBwd = void(const void* dy, const void* ds, const void* s, const void* weight, const float* rstd, void* dx,
                        void* dresidual, void* dweight, int64_t rows, int64_t cols, int64_t dy_row_stride,
                        int64_t ds_row_stride, int64_t s_row_stride, float weight_offset, DType x_dtype, DType s_dtype,
                        DType residual_dtype, DType weight_dtype);

// B batch, T time, H query heads, K key heads, D head size, R <= D rotated elements
using ApplyRotary = void(const void* q, const void* k, void* q_out, void* k_out, const float* cos, const float* sin,
                         const int64_t* positions, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, int64_t R,
                         int64_t q_stride_b, int64_t q_stride_t, int64_t q_stride_h, int64_t k_stride_b,
                         int64_t k_stride_t, int64_t k_stride_h, int64_t pos_stride_b, int64_t pos_stride_t,
                         bool interleaved, bool inverse, DType dtype);

using SwigluFwd = void(const void* gate, const void* up, void* y, int64_t rows, int64_t cols, int64_t gate_row_stride,
                       int64_t up_row_stride, DType dtype);

using SwigluBwd = void(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows,
                       int64_t cols, int64_t dy_row_stride, int64_t gate_row_stride, int64_t up_row_stride,
                       DType dtype);

struct Kernels {
    RmsNormFwd* rms_norm_fwd;
    RmsNormBwd* rms_norm_bwd;
    ApplyRotary* apply_rotary;
    SwigluFwd* swiglu_fwd;
    SwigluBwd* swiglu_bwd;
    AttentionFwd* attention_fwd;
    AttentionBwd* attention_bwd;
    SelectiveScanFwd* selective_scan_fwd;
    SelectiveScanBwd* selective_scan_bwd;
    SelectiveStateUpdate* selective_state_update;
    CausalConv1dFwd* causal_conv1d_fwd;
    CausalConv1dBwd* causal_conv1d_bwd;
    CausalConv1dUpdate* causal_conv1d_update;
    SsdFwd* ssd_fwd;
    SsdBwd* ssd_bwd;
    MoeRouteFwd* moe_route_fwd;
    MoeRouteBwd* moe_route_bwd;
    MoePlan* moe_plan;
    MoeGather* moe_gather;
    MoeCombine* moe_combine;
    MoeSwigluBwd* moe_swiglu_bwd;
};

#if defined(LLMCORE_ISA)
namespace LLMCORE_ISA {
RmsNormFwd rms_norm_fwd;
RmsNormBwd rms_norm_bwd;
ApplyRotary apply_rotary;
SwigluFwd swiglu_fwd;
SwigluBwd swiglu_bwd;
}  // namespace LLMCORE_ISA
#endif

}  // namespace llmcore
