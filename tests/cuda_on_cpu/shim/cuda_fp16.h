// A stand-in for CUDA's header: the type, to pass it on, and the conversions by name. What CUDA has beyond them does not
// compile here.
#pragma once

#include "common/dtype.h"

struct __half {
    std::uint16_t bits;
};
using half = __half;

inline __half __float2half(float x) { return {llmcore::float_to_f16(x)}; }
inline float __half2float(__half x) { return llmcore::f16_to_float(x.bits); }
