// The arithmetic of one RMSNorm element, on floats (device, scalar tails) or on vectors of floats (CPU).
//
//   s = x + residual,  rstd = 1 / sqrt(mean(s^2) + eps),  y = s * rstd * w                 (w includes weight_offset)
//   xh = s * rstd,  g = dy * w:  ds_total = rstd * (g - xh * mean(g * xh)) + ds,  dw = sum over rows of dy * xh
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace llmcore {

LLMCORE_HD float rms_norm_rstd(float sum_of_squares, std::int64_t cols, float eps) {
    return 1.0f / sqrtf(sum_of_squares / float(cols) + eps);
}

template <class V>
LLMCORE_HD V rms_norm_y(V s, V rstd, V w) {
    return s * rstd * w;
}

template <class V>
LLMCORE_HD V rms_norm_dx(V g, V xh, V rstd, V mean) {
    return rstd * (g - xh * mean);
}

// The dtype of s: that of the inputs where they agree, else float32.
LLMCORE_HD DType rms_norm_s_dtype(DType x, DType residual) { return x == residual ? x : DType::f32; }

}  // namespace llmcore
