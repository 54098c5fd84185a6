// Small kernels that try the stand-in for CUDA out: what it must compute, and the mistakes it must find.
#include "cuda/launch.cuh"
#include "reported.h"

namespace {

constexpr int warps = 4, threads = 32 * warps;

// out[block] = the sum of the block's part of x
__global__ void sum_blocks(const float* x, float* out, bool forget_barrier) {
    LLMCORE_SHARED(float, parts, [warps]);
    float value = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, unsigned(offset));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    if (!forget_barrier) __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (int i = 0; i < warps; ++i) total += parts[i];
        out[blockIdx.x] = total;
    }
}

// six results for each thread
__global__ void warp_instructions(const int* x, int* out) {
    const int value = x[threadIdx.x];
    int* const mine = out + threadIdx.x * 6;
    mine[0] = __shfl_sync(0xffffffffu, value, 5);
    mine[1] = __shfl_xor_sync(0xffffffffu, value, 3);
    mine[2] = __shfl_up_sync(0xffffffffu, value, 2);
    mine[3] = __shfl_down_sync(0xffffffffu, value, 2, 8);
    mine[4] = int(__ballot_sync(0xffffffffu, value % 3 == 0));
    // halves of a warp may meet apart
    const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    mine[5] = __any_sync(half, value == 7) + 2 * __all_sync(half, value >= 0);
}

__global__ void count(int* counter, int* highest) {
    atomicAdd(counter, 1);
    atomicMax(highest, int(blockIdx.x * blockDim.x + threadIdx.x));
}

// reverses a block's part of x through dynamic shared memory, `by` elements beyond where it should look
__global__ void reverse(const float* x, float* out, int by) {
    LLMCORE_DYNAMIC_SHARED(float, shared);
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[int(blockDim.x) - 1 - int(threadIdx.x) + by];
}

// one lane waits for its warp, the others for the block
__global__ void waits_for_ever() {
    if (threadIdx.x == 1) __shfl_sync(0xffffffffu, 0, 0);
    __syncthreads();
}

__global__ void two_instructions() {
    if (threadIdx.x % 2 == 0) {
        __shfl_sync(0xffffffffu, 0, 0);
    } else {
        __ballot_sync(0xffffffffu, 1);
    }
}

__global__ void outside_its_mask() { __shfl_sync(0x1u, 0, 0); }

__global__ void reads_shared_memory_too_early(float* out) {
    LLMCORE_SHARED(float, value, [1]);
    out[threadIdx.x] = value[0];
}

// how far the block's array is from a multiple of 64 bytes
__global__ void measure_alignment(int* distances) {
    LLMCORE_SHARED(float4, array, [1]);
    if (threadIdx.x == 0) distances[blockIdx.x] = int(reinterpret_cast<std::uintptr_t>(array) % 64);
}

}  // namespace

extern "C" {
const char* run_sum_blocks(const float* x, float* out, int blocks, bool forget_barrier) {
    return reported([&] { LLMCORE_LAUNCH(sum_blocks, blocks, threads, 0, nullptr, x, out, forget_barrier); });
}
const char* run_warp_instructions(const int* x, int* out) {
    return reported([&] { LLMCORE_LAUNCH(warp_instructions, 1, 64, 0, nullptr, x, out); });
}
const char* run_count(int* counter, int* highest) {
    return reported([&] { LLMCORE_LAUNCH(count, dim3(3, 2), dim3(5, 7), 0, nullptr, counter, highest); });
}
const char* run_reverse(const float* x, float* out, int n, int by, int shared_bytes) {
    return reported([&] { LLMCORE_LAUNCH(reverse, 1, n, shared_bytes, nullptr, x, out, by); });
}
const char* run_waits_for_ever() {
    return reported([&] { LLMCORE_LAUNCH(waits_for_ever, 1, 64, 0, nullptr); });
}
const char* run_two_instructions() {
    return reported([&] { LLMCORE_LAUNCH(two_instructions, 1, 32, 0, nullptr); });
}
const char* run_outside_its_mask() {
    return reported([&] { LLMCORE_LAUNCH(outside_its_mask, 1, 32, 0, nullptr); });
}
const char* run_reads_shared_memory_too_early(float* out) {
    return reported([&] { LLMCORE_LAUNCH(reads_shared_memory_too_early, 1, 32, 0, nullptr, out); });
}
const char* run_measure_alignment(int* distances, int blocks) {
    return reported([&] { LLMCORE_LAUNCH(measure_alignment, blocks, 32, 0, nullptr, distances); });
}
}
