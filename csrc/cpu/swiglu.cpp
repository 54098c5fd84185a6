// SwiGLU's elementwise part (Shazeer 2020, arXiv:2002.05202): y = silu(g) u, silu(g) = g sigmoid(g), and its gradients
//
//   dup = dy silu(g),  dgate = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))
//
// The forward's sigmoid(g) = 1 / (1 + e^-g) is exactly 0 where e^-g overflows. No product is inf * 0 for any finite g.
#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Blocks of a row are the unit that threads divide, so that their parts begin at whole cache lines.
constexpr int64_t kBlock = 1024;

// f(row, first column, number of columns)
template <bool kStream, class F>
LLMCORE_INLINE void for_row_parts(int64_t rows, int64_t cols, const F& f) {
    if (cols == 0) return;
    const int64_t block = cols < kBlock ? cols : kBlock, per_row = (cols + block - 1) / block;
    parallel_stream<kStream>(rows * per_row, kGrain / block, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t row = begin / per_row, row_end = (row + 1) * per_row, stop = end < row_end ? end : row_end;
            const int64_t first = (begin - row * per_row) * block;
            const int64_t last = stop == row_end ? cols : (stop - row * per_row) * block;
            f(row, first, last - first);
            begin = stop;
        }
    });
}

template <bool kStream, class T>
void fwd(const T* gate, const T* up, T* y, int64_t rows, int64_t cols, int64_t gate_row_stride, int64_t up_row_stride) {
    for_row_parts<kStream>(rows, cols, [&](int64_t row, int64_t first, int64_t count) {
        const T* const g_row = gate + row * gate_row_stride + first;
        const T* const u_row = up + row * up_row_stride + first;
        T* const y_row = y + row * cols + first;
        for_vectors(count, [&](int64_t i, auto lanes) {
            const vf g = load(g_row + i, lanes), u = load(u_row + i, lanes);
            store_output<kStream>(y_row + i, g / (1.0f + exp_normal(min(broadcast(overflow), -g))) * u, lanes);
        });
    });
}

template <bool kStream, class T>
void bwd(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t rows, int64_t cols, int64_t dy_row_stride,
         int64_t gate_row_stride, int64_t up_row_stride) {
    for_row_parts<kStream>(rows, cols, [&](int64_t row, int64_t first, int64_t count) {
        const T* const d_row = dy + row * dy_row_stride + first;
        const T* const g_row = gate + row * gate_row_stride + first;
        const T* const u_row = up + row * up_row_stride + first;
        T* const dgate_row = dgate + row * cols + first;
        T* const dup_row = dup + row * cols + first;
        for_vectors(count, [&](int64_t i, auto lanes) {
            const vf d = load(d_row + i, lanes), g = load(g_row + i, lanes), u = load(u_row + i, lanes);
            const Sigmoids p = sigmoids(g);
            const vf silu = g * p.plus;
            store_output<kStream>(dup_row + i, d * silu, lanes);
            store_output<kStream>(dgate_row + i, d * (p.plus + silu * p.minus) * u, lanes);
        });
    });
}

}  // namespace

void swiglu_fwd(const void* gate, const void* up, void* y, int64_t rows, int64_t cols, int64_t gate_row_stride,
                int64_t up_row_stride, DType dtype) {
    if (gate_row_stride == cols && up_row_stride == cols) {
        cols *= rows;
        rows = rows != 0;
    }
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        T* const y_ = static_cast<T*>(y);
        with_streaming(worth_streaming(y_, rows * cols, cols), [&](auto streaming) {
            fwd<streaming()>(static_cast<const T*>(gate), static_cast<const T*>(up), y_, rows, cols, gate_row_stride,
                             up_row_stride);
        });
    });
}

void swiglu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows, int64_t cols,
                int64_t dy_row_stride, int64_t gate_row_stride, int64_t up_row_stride, DType dtype) {
    if (dy_row_stride == cols && gate_row_stride == cols && up_row_stride == cols) {
        cols *= rows;
        rows = rows != 0;
    }
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        T *const dgate_ = static_cast<T*>(dgate), *const dup_ = static_cast<T*>(dup);
        const bool worth = worth_streaming(dgate_, rows * cols, cols) && worth_streaming(dup_, rows * cols, cols);
        with_streaming(worth, [&](auto streaming) {
            bwd<streaming()>(static_cast<const T*>(dy), static_cast<const T*>(gate), static_cast<const T*>(up), dgate_,
                             dup_, rows, cols, dy_row_stride, gate_row_stride, up_row_stride);
        });
    });
}

}  // namespace llmcore::LLMCORE_ISA
