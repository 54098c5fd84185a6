// Element types and their conversions to and from float, for host and device.
//
// bf16 is the upper half of a float, f16 is IEEE binary16; both are rounded to nearest, ties to even, and a NaN stays a
// NaN. Everything here has internal linkage: the same header is compiled for several instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define LLMCORE_HD static __host__ __device__ __forceinline__
#else
#define LLMCORE_HD static inline
#endif

namespace llmcore {

// The codes the Python side passes.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

LLMCORE_HD std::uint32_t float_bits(float x) {
    std::uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

LLMCORE_HD float float_from_bits(std::uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

LLMCORE_HD float bf16_to_float(std::uint16_t h) { return float_from_bits(std::uint32_t(h) << 16); }

LLMCORE_HD std::uint16_t float_to_bf16(float x) {
    const std::uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return std::uint16_t((bits >> 16) | 0x40u);
    return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

LLMCORE_HD float f16_to_float(std::uint16_t h) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(h));
#else
    const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // as a float's bits the value is 2^112 times too small; the multiplication also normalises subnormals
    return float_from_bits(sign | float_bits(float_from_bits(magnitude << 13) * 0x1p112f));
#endif
}

LLMCORE_HD std::uint16_t float_to_f16(float x) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(x));
#else
    const std::uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
    const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return std::uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);
    // below the smallest normal, adding 0.5 moves the last kept bit to the float's last bit, where the addition rounds
    // it
    if (magnitude < 0x38800000u)
        return std::uint16_t(sign | (float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u));
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return std::uint16_t(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

// x rounded to the type, as a float
LLMCORE_HD float round_to(float x, DType dtype) {
    if (dtype == DType::bf16) return bf16_to_float(float_to_bf16(x));
    if (dtype == DType::f16) return f16_to_float(float_to_f16(x));
    return x;
}

LLMCORE_HD int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace llmcore
