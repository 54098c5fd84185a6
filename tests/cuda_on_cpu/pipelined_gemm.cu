// c = a b with bf16 inputs and float sums, the way a kernel for a card does it: a ring of tiles in shared memory that
// cp.async fills ahead, ldmatrix and mma.sync on those that have come. c (rows, cols) = a (rows, depth) b (depth, cols),
// row-major, cols and depth multiples of 8, addresses of 16.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "reported.h"

namespace {

using namespace llmcore;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;

constexpr int kRows = 32, kCols = 32, kDepth = 16;  // of a block's tiles; a warp has 16 x 16 of c
constexpr int kThreads = 128, kStages = 3;
constexpr int kPad = 8;  // keeps eight rows that ldmatrix reads at once in different banks

struct alignas(16) Stage {
    uint16_t a[kRows][kDepth + kPad], b[kDepth][kCols + kPad];
};

// Begins this thread's copy into a stage: 8 elements of a or of b, zero beyond the last row or column. None beyond the depth.
__device__ void begin_stage(Stage& stage, const uint16_t* a, const uint16_t* b, int rows, int cols, int depth,
                            int first) {
    if (first >= depth) return;
    const int i = int(threadIdx.x) % 64;
    if (threadIdx.x < 64) {
        const int row = i / 2, col = i % 2 * 8, from_row = int(blockIdx.y) * kRows + row, from_col = first + col;
        const bool there = from_row < rows && from_col < depth;
        ptx::cp_async_cg_16(&stage.a[row][col], there ? a + int64_t(from_row) * depth + from_col : a, there ? 16 : 0);
    } else {
        const int row = i / 4, col = i % 4 * 8, from_row = first + row, from_col = int(blockIdx.x) * kCols + col;
        const bool there = from_row < depth && from_col < cols;
        ptx::cp_async_cg_16(&stage.b[row][col], there ? b + int64_t(from_row) * cols + from_col : b, there ? 16 : 0);
    }
}

__global__ void __launch_bounds__(kThreads)
    gemm(const uint16_t* a, const uint16_t* b, float* c, int rows, int cols, int depth) {
    LLMCORE_SHARED(Stage, stages, [kStages]);
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, row = warp / 2 * 16, col = warp % 2 * 16;
    float sums[2][4] = {};
    for (int step = 0; step < kStages - 1; step++) {
        begin_stage(stages[step], a, b, rows, cols, depth, step * kDepth);
        ptx::cp_async_commit_group();
    }
    for (int step = 0; step * kDepth < depth; step++) {
        ptx::cp_async_wait_group<kStages - 2>();
        // the step's tiles are there for all threads, and all have finished with those that are overwritten next
        __syncthreads();
        const int ahead = step + kStages - 1;
        begin_stage(stages[ahead % kStages], a, b, rows, cols, depth, ahead * kDepth);
        ptx::cp_async_commit_group();
        const Stage& stage = stages[step % kStages];
        uint32_t x[4], y[4];
        ptx::ldmatrix(x, &stage.a[row + lane % 16][lane / 16 * 8]);
        ptx::ldmatrix_trans(y, &stage.b[lane % 16][col + lane / 16 * 8]);
        for (int half = 0; half < 2; half++) {
            const uint32_t columns[2] = {y[2 * half], y[2 * half + 1]};
            ptx::mma_m16n8k16_bf16(sums[half], x, columns);
        }
    }
    for (int i = 0; i < 8; i++) {
        const int to_row = int(blockIdx.y) * kRows + row + lane / 4 + i / 2 % 2 * 8;
        const int to_col = int(blockIdx.x) * kCols + col + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (to_row < rows && to_col < cols) c[int64_t(to_row) * cols + to_col] = sums[i / 4][i % 4];
    }
}

}  // namespace

extern "C" const char* run_pipelined_gemm(const uint16_t* a, const uint16_t* b, float* c, int rows, int cols, int depth) {
    const dim3 grid((cols + kCols - 1) / kCols, (rows + kRows - 1) / kRows);
    return reported([&] { LLMCORE_LAUNCH(gemm, grid, kThreads, 0, nullptr, a, b, c, rows, cols, depth); });
}
