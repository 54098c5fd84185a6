// Matrix products by CUDA's warp matrix functions, and what is wrong with them when they are misused.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include <type_traits>

#include "cuda/launch.cuh"
#include "reported.h"

namespace {

namespace wmma = nvcuda::wmma;
using wmma::col_major;
using wmma::row_major;
using wmma::precision::tf32;

template <class T>
using Stored = std::conditional_t<std::is_same_v<T, tf32>, float, T>;

__device__ float to_float(float x) { return x; }
__device__ float to_float(half x) { return __half2float(x); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(half& to, float x) { to = __float2half(x); }

// c = a b + beta c, row-major, a or b transposed in memory where its layout is col_major. A block is a warp, which has one
// tile of c. All sizes are multiples of the tile's.
template <int m, int n, int k, class T, class LayoutA, class LayoutB, class Sum>
__global__ void gemm(const void* a_, const void* b_, void* c_, int rows, int cols, int depth, float beta) {
    const Stored<T>* const a = static_cast<const Stored<T>*>(a_);
    const Stored<T>* const b = static_cast<const Stored<T>*>(b_);
    constexpr bool a_rows = std::is_same_v<LayoutA, row_major>, b_rows = std::is_same_v<LayoutB, row_major>;
    const int row = int(blockIdx.y) * m, col = int(blockIdx.x) * n;
    Sum* const c = static_cast<Sum*>(c_) + row * cols + col;
    wmma::fragment<wmma::matrix_a, m, n, k, T, LayoutA> x;
    wmma::fragment<wmma::matrix_b, m, n, k, T, LayoutB> y;
    wmma::fragment<wmma::accumulator, m, n, k, Sum> sum, before;
    Sum zero;
    assign(zero, 0.0f);
    wmma::fill_fragment(sum, zero);
    for (int i = 0; i < depth; i += k) {
        wmma::load_matrix_sync(x, a_rows ? a + row * depth + i : a + i * rows + row, a_rows ? depth : rows);
        wmma::load_matrix_sync(y, b_rows ? b + i * cols + col : b + col * depth + i, b_rows ? cols : depth);
        if constexpr (std::is_same_v<T, tf32>) {
            for (int e = 0; e < x.num_elements; e++) x.x[e] = wmma::__float_to_tf32(x.x[e]);
            for (int e = 0; e < y.num_elements; e++) y.x[e] = wmma::__float_to_tf32(y.x[e]);
        }
        wmma::mma_sync(sum, x, y, sum);
    }
    wmma::load_matrix_sync(before, c, cols, wmma::mem_row_major);
    for (int e = 0; e < sum.num_elements; e++) assign(sum.x[e], to_float(sum.x[e]) + beta * to_float(before.x[e]));
    wmma::store_matrix_sync(c, sum, cols, wmma::mem_row_major);
}

template <int m, int n, int k, class T, class LayoutA, class LayoutB, class Sum>
void launch_gemm(const void* a, const void* b, void* c, int rows, int cols, int depth, float beta) {
    auto kernel = gemm<m, n, k, T, LayoutA, LayoutB, Sum>;
    LLMCORE_LAUNCH(kernel, dim3(cols / n, rows / m), 32, 0, nullptr, a, b, c, rows, cols, depth, beta);
}

// The order is that of test_wmma.py.
constexpr void (*gemms[])(const void*, const void*, void*, int, int, int, float) = {
    launch_gemm<16, 16, 16, __nv_bfloat16, row_major, row_major, float>,
    launch_gemm<32, 8, 16, __nv_bfloat16, col_major, col_major, float>,
    launch_gemm<8, 32, 16, __nv_bfloat16, row_major, row_major, float>,
    launch_gemm<16, 16, 16, half, col_major, row_major, float>,
    launch_gemm<32, 8, 16, half, row_major, col_major, float>,
    launch_gemm<8, 32, 16, half, row_major, col_major, float>,
    launch_gemm<16, 16, 16, half, row_major, col_major, half>,
    launch_gemm<16, 16, 8, tf32, col_major, col_major, float>,
};

// The order is that of test_wmma.py.
enum Defect {
    kNone,
    kMisalignedAddress,
    kLeadingDimension,
    kLanesDisagree,
    kLaneMissing,
    kNotFilled,
    kLaneInsteadOfElement,
    kKnowsTheMapping,
};

struct alignas(32) Tile {
    half x[16][24];
};

// c = a a with a (16, 16)
__global__ void square(const half* a, float* c, Defect defect) {
    LLMCORE_SHARED(Tile, tile, [1]);
    const int lane = int(threadIdx.x);
    for (int i = lane; i < 256; i += 32) tile[0].x[i / 16][i % 16] = a[i];
    __syncwarp();
    wmma::fragment<wmma::matrix_a, 16, 16, 16, half, row_major> x;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, half, row_major> y;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    const half* const start = tile[0].x[0];
    wmma::load_matrix_sync(x, start + (defect == kMisalignedAddress ? 8 : 0), defect == kLeadingDimension ? 20 : 24);
    wmma::load_matrix_sync(y, start + (defect == kLanesDisagree ? lane / 16 * 16 : 0), 24);
    if (defect != kNotFilled) wmma::fill_fragment(sum, 0.0f);
    if (defect == kLaneInsteadOfElement) {
        for (int e = 0; e < x.num_elements; e++) x.x[e] = __float2half(float(lane));
    }
    if (defect != kLaneMissing || lane != 31) wmma::mma_sync(sum, x, y, sum);
    if (defect == kKnowsTheMapping) {
        // right on today's cards, and promised nowhere
        for (int i = 0; i < 8; i++) c[(lane / 4 + i / 2 % 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum.x[i];
    } else {
        wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
    }
}

// elements[lane * 8 + i] = what lane's x[i] is of the matrix 0, 1, 2 ... 255
template <class Sum>
__global__ void list_elements(float* elements) {
    struct alignas(32) Matrix {
        Sum x[256];
    };
    LLMCORE_SHARED(Matrix, matrix, [1]);
    for (int i = int(threadIdx.x); i < 256; i += 32) assign(matrix[0].x[i], float(i));
    __syncwarp();
    wmma::fragment<wmma::accumulator, 16, 16, 16, Sum> fragment;
    wmma::load_matrix_sync(fragment, matrix[0].x, 16, wmma::mem_row_major);
    for (int i = 0; i < 8; i++) elements[threadIdx.x * 8 + i] = to_float(fragment.x[i]);
}

// c = the tf32 product of a (16, 8) and b (8, 16), whose values somebody should have converted
__global__ void unconverted(const float* a, const float* b, float* c) {
    wmma::fragment<wmma::matrix_a, 16, 16, 8, tf32, row_major> x;
    wmma::fragment<wmma::matrix_b, 16, 16, 8, tf32, row_major> y;
    wmma::fragment<wmma::accumulator, 16, 16, 8, float> sum;
    wmma::fill_fragment(sum, 0.0f);
    wmma::load_matrix_sync(x, a, 8);
    wmma::load_matrix_sync(y, b, 16);
    wmma::mma_sync(sum, x, y, sum);
    wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
}

}  // namespace

extern "C" {
const char* run_wmma_gemm(int which, const void* a, const void* b, void* c, int rows, int cols, int depth, float beta) {
    return reported([&] { gemms[which](a, b, c, rows, cols, depth, beta); });
}
const char* run_square(const half* a, float* c, int defect) {
    return reported([&] { LLMCORE_LAUNCH(square, 1, 32, 0, nullptr, a, c, Defect(defect)); });
}
const char* run_list_elements(float* of_floats, float* of_halves) {
    return reported([&] {
        LLMCORE_LAUNCH(list_elements<float>, 1, 32, 0, nullptr, of_floats);
        LLMCORE_LAUNCH(list_elements<half>, 1, 32, 0, nullptr, of_halves);
    });
}
const char* run_unconverted(const float* a, const float* b, float* c) {
    return reported([&] { LLMCORE_LAUNCH(unconverted, 1, 32, 0, nullptr, a, b, c); });
}
}
