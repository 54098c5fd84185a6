// RMSNorm forward and backward on CUDA (the arithmetic is in common/rms_norm.h; Zhang and Sennrich 2019,
// arXiv:1910.07467).
//
// A row belongs to a warp (up to 1024 columns) or to a block; it is read from memory once, its second reading comes
// from L1/L2. Backward: a fixed number of programs stride over the rows. Each adds up its share of dweight in shared
// memory (in its slice of the workspace where a row of floats does not fit), and a second kernel adds the shares in a
// fixed order: the result is deterministic on a given device.
#include "cuda/rms_norm.h"

#include "common/rms_norm.h"
#include "cuda/launch.cuh"
#include "cuda/vector_io.cuh"

namespace llmcore {
namespace {

using std::int64_t;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kRowsPerBlock = 4;
constexpr int64_t kColsPerWarp = 1024;

// The sum over the threads of a row, the same in all of them. blockDim.x > 32: the row is the block's, and this is a
// barrier.
__device__ float row_sum(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (blockDim.x == kWarp) return value;
    LLMCORE_SHARED(float, parts, [kMaxThreads / kWarp]);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0.0f;
    for (int i = 0; i < int(blockDim.x / kWarp); i++) value += parts[i];
    return value;
}

template <int V>
__device__ __forceinline__ void load_weight(const void* weight, DType dtype, float offset, int64_t col, float (&w)[V]) {
    if (weight == nullptr) {
#pragma unroll
        for (int i = 0; i < V; i++) w[i] = 1.0f;
        return;
    }
    load<V>(weight, dtype, col, w);
#pragma unroll
    for (int i = 0; i < V; i++) w[i] += offset;
}

template <int V>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_fwd_kernel(const void* x, const void* residual, const void* weight, void* y, void* s, float* rstd,
                        int64_t rows, int64_t cols, int64_t x_row_stride, int64_t residual_row_stride, float eps,
                        float weight_offset, DType x_dtype, DType residual_dtype, DType s_dtype, DType weight_dtype) {
    const int64_t step = int64_t(blockDim.x) * V, first = int64_t(threadIdx.x) * V;
    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows;
         row += int64_t(gridDim.x) * blockDim.y) {
        float sum = 0.0f, a[V], b[V];
        for (int64_t col = first; col < cols; col += step) {
            load<V>(x, x_dtype, row * x_row_stride + col, a);
            if (residual != nullptr) {
                load<V>(residual, residual_dtype, row * residual_row_stride + col, b);
#pragma unroll
                for (int i = 0; i < V; i++) a[i] = round_to(a[i] + b[i], s_dtype);
                store<V>(s, s_dtype, row * cols + col, a);
            }
#pragma unroll
            for (int i = 0; i < V; i++) sum += a[i] * a[i];
        }
        const float r = rms_norm_rstd(row_sum(sum), cols, eps);
        if (threadIdx.x == 0) rstd[row] = r;
        for (int64_t col = first; col < cols; col += step) {
            if (residual != nullptr) {
                load<V>(s, s_dtype, row * cols + col, a);
            } else {
                load<V>(x, x_dtype, row * x_row_stride + col, a);
            }
            load_weight<V>(weight, weight_dtype, weight_offset, col, b);
#pragma unroll
            for (int i = 0; i < V; i++) a[i] = rms_norm_y(a[i], r, b[i]);
            store<V>(y, x_dtype, row * cols + col, a);
        }
    }
}

// workspace: (programs, cols) floats, or null when dweight is not wanted. A program is a warp or a block, as a row is.
template <int V>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_bwd_kernel(const void* dy, const void* ds, const void* s, const void* weight, const float* rstd, void* dx,
                        void* dresidual, float* workspace, int64_t rows, int64_t cols, int64_t dy_row_stride,
                        int64_t ds_row_stride, int64_t s_row_stride, float weight_offset, DType x_dtype, DType s_dtype,
                        DType residual_dtype, DType weight_dtype, bool share_in_shared_memory) {
    LLMCORE_DYNAMIC_SHARED(float4, shared);
    const int64_t step = int64_t(blockDim.x) * V, first = int64_t(threadIdx.x) * V;
    const int64_t program = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, programs = int64_t(gridDim.x) * blockDim.y;
    float* const slice = workspace == nullptr ? nullptr : workspace + program * cols;
    float* const share = share_in_shared_memory ? reinterpret_cast<float*>(shared) + threadIdx.y * cols : slice;
    // each thread reads and writes only its own columns of the share, so that it needs no barrier
    if (workspace != nullptr) {
        const float zero[V] = {};
        for (int64_t col = first; col < cols; col += step) store<V>(share, DType::f32, col, zero);
    }
    for (int64_t row = program; row < rows; row += programs) {
        const float r = rstd[row];
        float sum = 0.0f, g[V], xh[V], w[V];
        for (int64_t col = first; col < cols; col += step) {
            load<V>(dy, x_dtype, row * dy_row_stride + col, g);
            load<V>(s, s_dtype, row * s_row_stride + col, xh);
            load_weight<V>(weight, weight_dtype, weight_offset, col, w);
#pragma unroll
            for (int i = 0; i < V; i++) {
                xh[i] *= r;
                sum += g[i] * w[i] * xh[i];
            }
            if (workspace != nullptr) {
                load<V>(share, DType::f32, col, w);
#pragma unroll
                for (int i = 0; i < V; i++) w[i] += g[i] * xh[i];
                store<V>(share, DType::f32, col, w);
            }
        }
        const float mean = row_sum(sum) / float(cols);
        for (int64_t col = first; col < cols; col += step) {
            load<V>(dy, x_dtype, row * dy_row_stride + col, g);
            load<V>(s, s_dtype, row * s_row_stride + col, xh);
            load_weight<V>(weight, weight_dtype, weight_offset, col, w);
#pragma unroll
            for (int i = 0; i < V; i++) g[i] = rms_norm_dx(g[i] * w[i], xh[i] * r, r, mean);
            if (ds != nullptr) {
                load<V>(ds, s_dtype, row * ds_row_stride + col, w);
#pragma unroll
                for (int i = 0; i < V; i++) g[i] += w[i];
            }
            store<V>(dx, x_dtype, row * cols + col, g);
            if (dresidual != nullptr) store<V>(dresidual, residual_dtype, row * cols + col, g);
        }
    }
    if (workspace != nullptr && share_in_shared_memory) {
        for (int64_t col = first; col < cols; col += step) {
            float sum[V];
            load<V>(share, DType::f32, col, sum);
            store<V>(slice, DType::f32, col, sum);
        }
    }
}

// dweight = the sum of the programs' shares: a block takes 32 columns, its warps stride over the programs.
__global__ void dweight_kernel(const float* workspace, void* dweight, DType dtype, int64_t programs, int64_t cols) {
    LLMCORE_SHARED(float, parts, [8][kWarp]);
    const int64_t col = int64_t(blockIdx.x) * kWarp + threadIdx.x;
    float sum = 0.0f;
    if (col < cols) {
        for (int64_t program = threadIdx.y; program < programs; program += blockDim.y)
            sum += workspace[program * cols + col];
    }
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && col < cols) {
        float total[1] = {0.0f};
        for (unsigned i = 0; i < blockDim.y; i++) total[0] += parts[i][threadIdx.x];
        store<1>(dweight, dtype, col, total);
    }
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

dim3 block_shape(int64_t cols, int V) {
    if (cols <= kColsPerWarp) return dim3(kWarp, kRowsPerBlock);
    unsigned threads = kWarp;
    while (threads < unsigned(kMaxThreads) && int64_t(threads) * V < cols) threads *= 2;
    return dim3(threads, 1);
}

int vector_width(DType x_dtype, int64_t cols, bool aligned_4, bool aligned_8) {
    if (x_dtype != DType::f32 && aligned_8 && cols % 8 == 0) return 8;
    return aligned_4 && cols % 4 == 0 ? 4 : 1;
}

}  // namespace
}  // namespace llmcore

using namespace llmcore;

const char* llmcore_cuda_rms_norm_fwd(const void* x, const void* residual, const void* weight, void* y, void* s,
                                      float* rstd, int64_t rows, int64_t cols, int64_t x_row_stride,
                                      int64_t residual_row_stride, float eps, float weight_offset, DType x_dtype,
                                      DType residual_dtype, DType weight_dtype, void* stream) {
    if (rows == 0) return nullptr;
    const DType s_dtype = rms_norm_s_dtype(x_dtype, residual_dtype);
    auto aligned = [&](int V) {
        return vector_aligned(x, x_dtype, x_row_stride, V) &&
               vector_aligned(residual, residual_dtype, residual_row_stride, V) &&
               vector_aligned(weight, weight_dtype, 0, V) && vector_aligned(y, x_dtype, cols, V) &&
               vector_aligned(s, s_dtype, cols, V);
    };
    const int V = vector_width(x_dtype, cols, aligned(4), aligned(8));
    const dim3 block = block_shape(cols, V);
    const int64_t wanted = (rows + block.y - 1) / block.y;
    const unsigned grid = unsigned(wanted < 0x7fffffff ? wanted : 0x7fffffff);
    auto kernel = V == 8 ? rms_norm_fwd_kernel<8> : V == 4 ? rms_norm_fwd_kernel<4> : rms_norm_fwd_kernel<1>;
    LLMCORE_LAUNCH(kernel, grid, block, 0, static_cast<cudaStream_t>(stream), x, residual, weight, y, s, rstd, rows, cols,
                   x_row_stride, residual_row_stride, eps, weight_offset, x_dtype, residual_dtype, s_dtype, weight_dtype);
    return text(cudaGetLastError());
}

const char* llmcore_cuda_rms_norm_bwd(const void* dy, const void* ds, const void* s, const void* weight,
                                      const float* rstd, void* dx, void* dresidual, void* dweight, int64_t rows,
                                      int64_t cols, int64_t dy_row_stride, int64_t ds_row_stride, int64_t s_row_stride,
                                      float weight_offset, DType x_dtype, DType s_dtype, DType residual_dtype,
                                      DType weight_dtype, void* stream_) {
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
    if (cols == 0 || (rows == 0 && dweight == nullptr)) return nullptr;
    if (rows == 0) return text(cudaMemsetAsync(dweight, 0, cols * size_of(weight_dtype), stream));

    int device = 0, multiprocessors = 0, shared_limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error != cudaSuccess) return text(error);

    auto aligned = [&](int V) {
        return vector_aligned(dy, x_dtype, dy_row_stride, V) && vector_aligned(ds, s_dtype, ds_row_stride, V) &&
               vector_aligned(s, s_dtype, s_row_stride, V) && vector_aligned(weight, weight_dtype, 0, V) &&
               vector_aligned(dx, x_dtype, cols, V) && vector_aligned(dresidual, residual_dtype, cols, V);
    };
    const int V = vector_width(x_dtype, cols, aligned(4), aligned(8));
    const dim3 block = block_shape(cols, V);
    // warps of 4 rows: enough blocks to fill a multiprocessor's threads; blocks of a row: two of them
    const int64_t most = int64_t(multiprocessors) * (block.y == 1 ? 2 : 8), wanted = (rows + block.y - 1) / block.y;
    const unsigned grid = unsigned(wanted < most ? wanted : most);
    const int64_t programs = int64_t(grid) * block.y;
    const int64_t share_bytes = int64_t(block.y) * cols * int64_t(sizeof(float));
    const bool in_shared = dweight != nullptr && share_bytes <= shared_limit / 2 - 1024;
    const std::size_t shared_bytes = in_shared ? std::size_t(share_bytes) : 0;

    auto kernel = V == 8 ? rms_norm_bwd_kernel<8> : V == 4 ? rms_norm_bwd_kernel<4> : rms_norm_bwd_kernel<1>;
    if (shared_bytes > 48 * 1024) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) return text(error);
    }
    void* workspace = nullptr;
    if (dweight != nullptr) {
        error = cudaMallocAsync(&workspace, programs * cols * sizeof(float), stream);
        if (error != cudaSuccess) return text(error);
    }
    LLMCORE_LAUNCH(kernel, grid, block, shared_bytes, stream, dy, ds, s, weight, rstd, dx, dresidual,
                   static_cast<float*>(workspace), rows, cols, dy_row_stride, ds_row_stride, s_row_stride, weight_offset,
                   x_dtype, s_dtype, residual_dtype, weight_dtype, in_shared);
    error = cudaGetLastError();
    if (dweight != nullptr) {
        if (error == cudaSuccess) {
            const unsigned blocks = unsigned((cols + kWarp - 1) / kWarp);
            LLMCORE_LAUNCH(dweight_kernel, blocks, dim3(kWarp, 8), 0, stream, static_cast<float*>(workspace), dweight,
                           weight_dtype, programs, cols);
            error = cudaGetLastError();
        }
        const cudaError_t freed = cudaFreeAsync(workspace, stream);
        if (error == cudaSuccess) error = freed;
    }
    return text(error);
}
