// Reads and writes of V consecutive elements of a dtype known at run time, as floats. A kernel that is bound by memory
// does not feel the branch on the dtype (it is the same for all threads), and one kernel serves all mixtures of types.
// V > 1 needs addresses aligned to min(16 bytes, V elements): `vector_aligned` tells.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmcore {

template <int V>
__device__ __forceinline__ void load(const void* base, DType dtype, std::int64_t index, float (&out)[V]) {
    if constexpr (V == 1) {
        if (dtype == DType::f32) {
            out[0] = static_cast<const float*>(base)[index];
        } else {
            const std::uint16_t h = static_cast<const std::uint16_t*>(base)[index];
            out[0] = dtype == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
        }
    } else if (dtype == DType::f32) {
        const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
#pragma unroll
        for (int i = 0; i < V / 4; i++) {
            const float4 q = p[i];
            out[4 * i] = q.x, out[4 * i + 1] = q.y, out[4 * i + 2] = q.z, out[4 * i + 3] = q.w;
        }
    } else {
        std::uint32_t words[V / 2];
        const std::uint16_t* p = static_cast<const std::uint16_t*>(base) + index;
        if constexpr (V == 8) {
            const uint4 q = *reinterpret_cast<const uint4*>(p);
            words[0] = q.x, words[1] = q.y, words[2] = q.z, words[3] = q.w;
        } else {
            const uint2 q = *reinterpret_cast<const uint2*>(p);
            words[0] = q.x, words[1] = q.y;
        }
#pragma unroll
        for (int i = 0; i < V / 2; i++) {
            const std::uint16_t low = std::uint16_t(words[i]), high = std::uint16_t(words[i] >> 16);
            out[2 * i] = dtype == DType::bf16 ? bf16_to_float(low) : f16_to_float(low);
            out[2 * i + 1] = dtype == DType::bf16 ? bf16_to_float(high) : f16_to_float(high);
        }
    }
}

template <int V>
__device__ __forceinline__ void store(void* base, DType dtype, std::int64_t index, const float (&value)[V]) {
    if constexpr (V == 1) {
        if (dtype == DType::f32) {
            static_cast<float*>(base)[index] = value[0];
        } else {
            static_cast<std::uint16_t*>(base)[index] =
                dtype == DType::bf16 ? float_to_bf16(value[0]) : float_to_f16(value[0]);
        }
    } else if (dtype == DType::f32) {
        float4* p = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
#pragma unroll
        for (int i = 0; i < V / 4; i++) p[i] = {value[4 * i], value[4 * i + 1], value[4 * i + 2], value[4 * i + 3]};
    } else {
        std::uint32_t words[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) {
            const float a = value[2 * i], b = value[2 * i + 1];
            const std::uint32_t low = dtype == DType::bf16 ? float_to_bf16(a) : float_to_f16(a);
            const std::uint32_t high = dtype == DType::bf16 ? float_to_bf16(b) : float_to_f16(b);
            words[i] = low | (high << 16);
        }
        std::uint16_t* p = static_cast<std::uint16_t*>(base) + index;
        if constexpr (V == 8) {
            *reinterpret_cast<uint4*>(p) = {words[0], words[1], words[2], words[3]};
        } else {
            *reinterpret_cast<uint2*>(p) = {words[0], words[1]};
        }
    }
}

// Whether rows of this tensor can be read V elements at a time (an absent tensor always can).
inline bool vector_aligned(const void* base, DType dtype, std::int64_t row_stride, int V) {
    const int bytes = V * size_of(dtype) < 16 ? V * size_of(dtype) : 16;
    return reinterpret_cast<std::uintptr_t>(base) % bytes == 0 && row_stride * size_of(dtype) % bytes == 0;
}

}  // namespace llmcore
