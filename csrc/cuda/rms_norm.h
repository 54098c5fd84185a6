// Launchers of rms_norm.cu. Device pointers (null = absent), strides in elements, last dimension contiguous.
// Each returns null, or what the CUDA runtime reported.
#pragma once

#include <cstdint>

#include "common/dtype.h"

extern "C" {
const char* llmcore_cuda_rms_norm_fwd(const void* x, const void* residual, const void* weight, void* y, void* s,
                                      float* rstd, std::int64_t rows, std::int64_t cols, std::int64_t x_row_stride,
                                      std::int64_t residual_row_stride, float eps, float weight_offset,
                                      llmcore::DType x_dtype, llmcore::DType residual_dtype,
                                      llmcore::DType weight_dtype, void* stream);

const char* llmcore_cuda_rms_norm_bwd(const void* dy, const void* ds, const void* s, const void* weight,
                                      const float* rstd, void* dx, void* dresidual, void* dweight, std::int64_t rows,
                                      std::int64_t cols, std::int64_t dy_row_stride, std::int64_t ds_row_stride,
                                      std::int64_t s_row_stride, float weight_offset, llmcore::DType x_dtype,
                                      llmcore::DType s_dtype, llmcore::DType residual_dtype,
                                      llmcore::DType weight_dtype, void* stream);
}
