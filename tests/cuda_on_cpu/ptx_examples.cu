// Every instruction of cuda/ptx.cuh by itself, with the registers of each lane as input and output.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "reported.h"

namespace {

using namespace llmcore;
using std::uint16_t;
using std::uint32_t;

struct alignas(16) Row {
    uint16_t x[8];
};

// r (32, count) = `count` matrices of x (32, 8), the rows in the order of `order`, `by` elements beyond their start
template <int count, bool trans>
__global__ void load_matrices(const uint16_t* x, const int* order, uint32_t* r, int by) {
    LLMCORE_SHARED(Row, rows, [33]);
    for (int i = 0; i < 8; i++) rows[threadIdx.x].x[i] = x[threadIdx.x * 8 + i];
    __syncthreads();
    uint32_t mine[count];
    const void* const row = rows[order[threadIdx.x]].x + by;
    if constexpr (trans) {
        ptx::ldmatrix_trans(mine, row);
    } else {
        ptx::ldmatrix(mine, row);
    }
    for (int i = 0; i < count; i++) r[threadIdx.x * count + i] = mine[i];
}

// c (32, 4) += by a (32, 4), b (32, 2); the lanes from `lanes` on stay away
template <void mma(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void multiply_add(const uint32_t* a, const uint32_t* b, float* c, int lanes) {
    uint32_t x[4], y[2];
    float z[4];
    for (int i = 0; i < 4; i++) x[i] = a[threadIdx.x * 4 + i], z[i] = c[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; i++) y[i] = b[threadIdx.x * 2 + i];
    if (int(threadIdx.x) < lanes) mma(z, x, y);
    for (int i = 0; i < 4; i++) c[threadIdx.x * 4 + i] = z[i];
}

// half a warp multiplies bf16, the other half f16
__global__ void two_kinds(float* c) {
    const uint32_t a[4] = {}, b[2] = {};
    float sums[4] = {};
    if (threadIdx.x < 16) {
        ptx::mma_m16n8k16_bf16(sums, a, b);
    } else {
        ptx::mma_m16n8k16_f16(sums, a, b);
    }
    c[threadIdx.x] = sums[0];
}

// to = from by copies of `bytes`, of which source_bytes are read; `by` bytes beyond the start of from. A copy goes to the
// thread of the same number in another warp.
template <int bytes>
__device__ void begin_copy(char* to, const char* from, int source_bytes) {
    ptx::cp_async_ca<bytes>(to, from, source_bytes);
}
template <>
__device__ void begin_copy<0>(char* to, const char* from, int source_bytes) {
    ptx::cp_async_cg_16(to, from, source_bytes);
}

template <int bytes>
__global__ void copy(const char* from, char* to, int source_bytes, int by) {
    constexpr int size = bytes == 0 ? 16 : bytes;
    LLMCORE_SHARED(Row, shared, [64]);
    const int offset = int(threadIdx.x) * size, other = int(threadIdx.x ^ 32) * size;
    char* const array = reinterpret_cast<char*>(shared);
    begin_copy<bytes>(array + offset, from + offset + by, source_bytes);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    for (int i = 0; i < size; i++) to[other + i] = array[other + i];
}

__global__ void convert(const float* x, float* powers, uint32_t* tf32, uint32_t* bf16, uint32_t* f16) {
    const float mine = x[threadIdx.x];
    powers[threadIdx.x] = ptx::ex2_approx(mine);
    tf32[threadIdx.x] = ptx::float_to_tf32(mine);
    bf16[threadIdx.x] = ptx::pack_bf16(mine, -mine);
    f16[threadIdx.x] = ptx::pack_f16(mine, -mine);
}

}  // namespace

extern "C" {
const char* run_load_matrices(const uint16_t* x, const int* order, uint32_t* r, int count, bool trans, int by) {
    auto rows = count == 1 ? load_matrices<1, false> : count == 2 ? load_matrices<2, false> : load_matrices<4, false>;
    auto cols = count == 1 ? load_matrices<1, true> : count == 2 ? load_matrices<2, true> : load_matrices<4, true>;
    auto kernel = trans ? cols : rows;
    return reported([&] { LLMCORE_LAUNCH(kernel, 1, 32, 0, nullptr, x, order, r, by); });
}
const char* run_multiply_add(const uint32_t* a, const uint32_t* b, float* c, int which, int lanes) {
    auto kernel = which == 0   ? multiply_add<ptx::mma_m16n8k16_bf16>
                  : which == 1 ? multiply_add<ptx::mma_m16n8k16_f16>
                               : multiply_add<ptx::mma_m16n8k8_tf32>;
    return reported([&] { LLMCORE_LAUNCH(kernel, 1, 32, 0, nullptr, a, b, c, lanes); });
}
const char* run_two_kinds(float* c) {
    return reported([&] { LLMCORE_LAUNCH(two_kinds, 1, 32, 0, nullptr, c); });
}
const char* run_copy(const char* from, char* to, int bytes, int source_bytes, int by) {
    auto kernel = bytes == 4 ? copy<4> : bytes == 8 ? copy<8> : bytes == 16 ? copy<16> : copy<0>;
    return reported([&] { LLMCORE_LAUNCH(kernel, 1, 64, 0, nullptr, from, to, source_bytes, by); });
}
const char* run_convert(const float* x, float* powers, uint32_t* tf32, uint32_t* bf16, uint32_t* f16, int n) {
    return reported([&] { LLMCORE_LAUNCH(convert, 1, n, 0, nullptr, x, powers, tf32, bf16, f16); });
}
}
