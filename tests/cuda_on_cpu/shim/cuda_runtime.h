// A stand-in for CUDA's header: with it a .cu file is an ordinary C++ file whose kernels run on the CPU, one fiber a
// thread. Test-only. It is stricter than a card where that finds mistakes: fibers run in a random order and change only
// where CUDA lets threads wait, all memory that a kernel gets holds NaN, each shared array is an allocation of its own and
// often no better aligned than its type asks for.
//
// Blocks run one after the other, in a random order. LLMCORE_SHIM_SEED is the order's seed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "threads.h"

using std::memcpy;  // as in device code
using std::sqrt;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

// ---- vectors ----------------------------------------------------------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// of the fiber that runs
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- launches and shared memory ---------------------------------------------------------------------------------------------

namespace shim {

// Runs body on every thread of every block. Throws std::runtime_error where the threads wait for each other for ever.
void launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);
// The running block's array that `tag` names.
void* shared_array(const void* tag, std::size_t bytes, std::size_t alignment);
void* dynamic_shared(std::size_t alignment);
void syncthreads();

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, void*,
                   Arguments&&... arguments) {
    const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { std::apply(kernel, values); });
}

template <class T>
std::uint64_t to_bits(T value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    std::uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

// the value of a lane; of one that did not come, all bits set: for a float a NaN
template <class T>
T value_of(const Met& met, unsigned source) {
    const std::uint64_t bits = met.lanes >> source & 1 ? met.values[source] : ~std::uint64_t(0);
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace shim

#define LLMCORE_LAUNCH(kernel, grid, block, shared_bytes, ...) \
    shim::launch_kernel(kernel, grid, block, shared_bytes, __VA_ARGS__)
#define LLMCORE_SHARED(type, name, extent) \
    typedef type name##_array extent;      \
    static char name##_tag;                \
    name##_array& name =                   \
        *static_cast<name##_array*>(shim::shared_array(&name##_tag, sizeof(name##_array), alignof(name##_array)))
#define LLMCORE_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(shim::dynamic_shared(alignof(type)))

// ---- what threads do together -----------------------------------------------------------------------------------------------

inline void __syncthreads() { shim::syncthreads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::meet("__syncwarp", mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    const shim::Met met = shim::meet("__shfl_sync", mask, shim::to_bits(value));
    const unsigned first = shim::lane() / width * width;
    return shim::value_of<T>(met, first + unsigned(source) % width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
    const shim::Met met = shim::meet("__shfl_xor_sync", mask, shim::to_bits(value));
    const unsigned source = shim::lane() ^ unsigned(lane_mask);
    return source / width > shim::lane() / width ? value : shim::value_of<T>(met, source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    const shim::Met met = shim::meet("__shfl_down_sync", mask, shim::to_bits(value));
    return shim::lane() % width + delta >= unsigned(width) ? value : shim::value_of<T>(met, shim::lane() + delta);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    const shim::Met met = shim::meet("__shfl_up_sync", mask, shim::to_bits(value));
    return shim::lane() % width < delta ? value : shim::value_of<T>(met, shim::lane() - delta);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const shim::Met met = shim::meet("a vote", mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < unsigned(warpSize); ++lane) {
        if (met.lanes >> lane & 1 && met.values[lane] != 0) votes |= 1u << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }

// One fiber runs at a time and none is interrupted here.
template <class T>
T atomicAdd(T* p, std::common_type_t<T> value) {
    const T before = *p;
    *p = T(before + value);
    return before;
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> value) {
    const T before = *p;
    *p = before < value ? value : before;
    return before;
}
template <class T>
T atomicMin(T* p, std::common_type_t<T> value) {
    const T before = *p;
    *p = value < before ? value : before;
    return before;
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> value) {
    const T before = *p;
    *p = value;
    return before;
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
    const T before = *p;
    if (before == expected) *p = value;
    return before;
}

// ---- arithmetic -------------------------------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T __ldg(const T* p) {
    return *p;
}

// ---- the runtime ------------------------------------------------------------------------------------------------------------

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMallocAsync(void** p, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, int kind, cudaStream_t stream);
namespace shim {
cudaError_t set_shared_limit(const void* kernel, int bytes);
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
    return shim::set_shared_limit(reinterpret_cast<const void*>(kernel), bytes);
}
