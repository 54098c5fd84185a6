// A stand-in for CUDA's header: the type, to pass it on, and the conversions by name. What CUDA has beyond them does not
// compile here.
#pragma once

#include "common/dtype.h"

struct __nv_bfloat16 {
    std::uint16_t bits;
};

inline __nv_bfloat16 __float2bfloat16(float x) { return {llmcore::float_to_bf16(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return llmcore::bf16_to_float(x.bits); }
