// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), rows of `cols` elements; the arithmetic is in common/rms_norm.h.
//
// A row is read twice, the second time from the cache. Each thread adds up dweight over its rows, and the threads' sums
// are added in their order: the result depends on the number of threads only.
#include "common/rms_norm.h"

#include <stdexcept>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// to = n elements of `from` as floats, + bias
void widen_row(const void* from, DType dtype, int64_t first, int64_t n, float bias, float* to) {
    with_element(dtype, [&](auto element) {
        const auto* const row = static_cast<const decltype(element)*>(from) + first;
        for_vectors(n, [&](int64_t i, auto lanes) { store(to + i, load(row + i, lanes) + bias, lanes); });
    });
}

void narrow_row(const float* from, int64_t n, void* to, DType dtype, int64_t first) {
    with_element(dtype, [&](auto element) {
        auto* const row = static_cast<decltype(element)*>(to) + first;
        for_vectors(n, [&](int64_t i, auto lanes) { store(row + i, load(from + i, lanes), lanes); });
    });
}

// weight + offset as floats; ones without a weight
struct Weight {
    Scratch scratch;
    const float* data;

    Weight(const void* weight, DType dtype, float offset, int64_t cols)
        : scratch(weight != nullptr && dtype == DType::f32 && offset == 0.0f ? 0 : cols), data(scratch.data()) {
        if (data == nullptr) {
            data = static_cast<const float*>(weight);
        } else if (weight != nullptr) {
            widen_row(weight, dtype, 0, cols, offset, scratch.data());
        } else {
            for (int64_t i = 0; i < cols; i++) scratch.data()[i] = 1.0f;
        }
    }
};

// store, and what a later load gives
template <class Lanes>
LLMCORE_INLINE vf store_rounded(float* p, vf x, Lanes lanes) {
    store(p, x, lanes);
    return x;
}
template <class Lanes>
LLMCORE_INLINE vf store_rounded(bf16_t* p, vf x, Lanes lanes) {
    const vh rounded = narrow_bf16(x);
    store_halves(p, rounded, lanes);
    return widen_bf16(rounded);
}
template <class Lanes>
LLMCORE_INLINE vf store_rounded(fp16_t* p, vf x, Lanes lanes) {
    const vh rounded = narrow_fp16(x);
    store_halves(p, rounded, lanes);
    return widen_fp16(rounded);
}

// y = row * rstd * w
template <bool kStream, class X, class S>
LLMCORE_INLINE void scale_row(const S* row, const float* w, X* y, float rstd, int64_t cols) {
    const vf r = broadcast(rstd);
    for_vectors(cols, [&](int64_t i, auto lanes) {
        store_output<kStream>(y + i, rms_norm_y(load(row + i, lanes), r, load(w + i, lanes)), lanes);
    });
}

template <bool kStream, class X>
void fwd(const X* x, const float* w, X* y, float* rstd, int64_t rows, int64_t cols, int64_t x_row_stride, float eps) {
    parallel_stream<kStream>(rows, kGrain / cols, [&](int64_t begin, int64_t end) {
        const int64_t ahead = rows_ahead<X>(cols);
        for (int64_t row = begin; row < end; row++) {
            const X* const x_row = x + row * x_row_stride;
            if (ahead > 0 && row + ahead < end) prefetch_row(x_row + ahead * x_row_stride, cols);
            const float sum = sum_vectors(cols, [&](int64_t i, auto lanes) {
                const vf value = load(x_row + i, lanes);
                return value * value;
            });
            rstd[row] = rms_norm_rstd(sum, cols, eps);
            scale_row<kStream>(x_row, w, y + row * cols, rstd[row], cols);
        }
    });
}

// S, the type of s: that of x and residual where they agree, else float
template <bool kStream, class X, class S>
void fwd_residual(const X* x, const void* residual, DType residual_dtype, const float* w, X* y, S* s, float* rstd,
                  int64_t rows, int64_t cols, int64_t x_row_stride, int64_t residual_row_stride, float eps) {
    const bool widen = std::is_same_v<S, float> && residual_dtype != DType::f32;
    parallel_stream<kStream>(rows, kGrain / cols, [&](int64_t begin, int64_t end) {
        const Scratch widened(widen ? cols : 0);
        const int64_t ahead = widen ? 0 : rows_ahead<X>(cols);
        for (int64_t row = begin; row < end; row++) {
            const X* const x_row = x + row * x_row_stride;
            S* const s_row = s + row * cols;
            const S* residual_row = static_cast<const S*>(residual) + row * residual_row_stride;
            if (ahead > 0 && row + ahead < end) {
                prefetch_row(x_row + ahead * x_row_stride, cols);
                prefetch_row(residual_row + ahead * residual_row_stride, cols);
            }
            if (widen) {
                widen_row(residual, residual_dtype, row * residual_row_stride, cols, 0.0f, widened.data());
                residual_row = reinterpret_cast<const S*>(widened.data());
            }
            const float sum = sum_vectors(cols, [&](int64_t i, auto lanes) {
                const vf value =
                    store_rounded(s_row + i, load(x_row + i, lanes) + load(residual_row + i, lanes), lanes);
                return value * value;
            });
            rstd[row] = rms_norm_rstd(sum, cols, eps);
            scale_row<kStream>(s_row, w, y + row * cols, rstd[row], cols);
        }
    });
}

// A sum over many rows by levels, so that its error grows like the logarithm of their number: 16 rows are added up in
// level 0, 16 sums of level 0 in level 1, and so on.
class CascadeSum {
  public:
    static constexpr int64_t kLevels = 4, kStep = 16;

    // floats: kLevels * cols of them
    CascadeSum(float* floats, int64_t cols) : floats_(floats), cols_(cols) {
        __builtin_memset(floats, 0, std::size_t(kLevels * cols) * sizeof(float));
    }

    // where the next row is to be added
    float* row() const { return floats_; }

    // to be called after each row
    void next() {
        ++rows_;
        for (int64_t level = 0, step = kStep; level + 1 < kLevels && rows_ % step == 0; level++, step *= kStep) {
            add(level);
            __builtin_memset(floats_ + level * cols_, 0, std::size_t(cols_) * sizeof(float));
        }
    }

    // the sum, in the last cols floats
    void finish() {
        for (int64_t level = 0; level + 1 < kLevels; level++) add(level);
    }

  private:
    // level into the next one
    void add(int64_t level) {
        const float* const from = floats_ + level * cols_;
        float* const to = floats_ + (level + 1) * cols_;
        for_vectors(cols_,
                    [&](int64_t i, auto lanes) { store(to + i, load(to + i, lanes) + load(from + i, lanes), lanes); });
    }

    float* floats_;
    int64_t cols_, rows_ = 0;
};

template <class X, class S>
struct Bwd {
    const X* dy;
    const S *ds, *s;
    const float *w, *rstd;
    X* dx;
    void *dresidual, *dweight;
    int64_t rows, cols, dy_row_stride, ds_row_stride, s_row_stride;
    DType residual_dtype, weight_dtype;

    // rows [begin, end); sum: this thread's dweight, or null
    void run_rows(int64_t begin, int64_t end, CascadeSum* sum_of_rows) const {
        const bool narrow = dresidual != nullptr && residual_dtype != DType::f32;
        const Scratch to_narrow(narrow ? cols : 0);
        for (int64_t row = begin; row < end; row++) {
            const X* const dy_row = dy + row * dy_row_stride;
            const S* const s_row = s + row * s_row_stride;
            const S* const ds_row = ds == nullptr ? nullptr : ds + row * ds_row_stride;
            X* const dx_row = dx + row * cols;
            float* const dweight_row = sum_of_rows == nullptr ? nullptr : sum_of_rows->row();
            float* dresidual_row = to_narrow.data();
            if (dresidual != nullptr && !narrow) dresidual_row = static_cast<float*>(dresidual) + row * cols;

            const vf r = broadcast(rstd[row]);
            const float sum = sum_vectors(cols, [&](int64_t i, auto lanes) {
                return load(dy_row + i, lanes) * load(w + i, lanes) * load(s_row + i, lanes);
            });
            const vf mean = broadcast(sum * rstd[row] / float(cols));
            for_vectors(cols, [&](int64_t i, auto lanes) {
                const vf d = load(dy_row + i, lanes), xh = load(s_row + i, lanes) * r;
                vf t = rms_norm_dx(d * load(w + i, lanes), xh, r, mean);
                if (ds_row != nullptr) t += load(ds_row + i, lanes);
                store(dx_row + i, t, lanes);
                if (dresidual_row != nullptr) store(dresidual_row + i, t, lanes);
                if (dweight_row != nullptr) store(dweight_row + i, load(dweight_row + i, lanes) + d * xh, lanes);
            });
            if (narrow) narrow_row(dresidual_row, cols, dresidual, residual_dtype, row * cols);
            if (sum_of_rows != nullptr) sum_of_rows->next();
        }
    }

    void run() const {
        const int64_t most = rows * cols / kGrain;
        // the floats of two threads never meet in a cache line
        const int64_t thread_floats = (CascadeSum::kLevels * cols + 15) / 16 * 16;
        const Scratch floats(dweight == nullptr ? 0 : thread_floats * (most > 1 ? max_threads() : 1));
        int64_t parts = 1;
        parallel(most > 1, [&](int thread, int threads) {
            const int64_t count = most < 1 ? 1 : most < threads ? most : threads;
            if (thread == 0) parts = count;
            if (thread >= count) return;
            const int64_t begin = rows * thread / count, end = rows * (thread + 1) / count;
            if (dweight == nullptr) return run_rows(begin, end, nullptr);
            CascadeSum sum(floats.data() + thread * thread_floats, cols);
            run_rows(begin, end, &sum);
            sum.finish();
        });
        if (dweight == nullptr) return;
        float* const sums = floats.data() + (CascadeSum::kLevels - 1) * cols;
        for (int64_t part = 1; part < parts; part++) {
            const float* const other = sums + part * thread_floats;
            for (int64_t i = 0; i < cols; i++) sums[i] += other[i];
        }
        narrow_row(sums, cols, dweight, weight_dtype, 0);
    }
};

}  // namespace

void rms_norm_fwd(const void* x, const void* residual, const void* weight, void* y, void* s, float* rstd, int64_t rows,
                  int64_t cols, int64_t x_row_stride, int64_t residual_row_stride, float eps, float weight_offset,
                  DType x_dtype, DType residual_dtype, DType weight_dtype) {
    if (rows == 0 || cols == 0) return;
    const Weight w(weight, weight_dtype, weight_offset, cols);
    with_element(x_dtype, [&](auto x_element) {
        using X = decltype(x_element);
        const X* const x_rows = static_cast<const X*>(x);
        X* const y_rows = static_cast<X*>(y);
        const bool worth = x_dtype == DType::f32 && worth_streaming(y_rows, rows * cols, cols);
        with_streaming(worth, [&](auto streaming) {
            constexpr bool kStream = streaming() && std::is_same_v<X, float>;
            if (residual == nullptr) {
                return fwd<kStream>(x_rows, w.data, y_rows, rstd, rows, cols, x_row_stride, eps);
            }
            const auto run = [&](auto s_element) {
                fwd_residual<kStream>(x_rows, residual, residual_dtype, w.data, y_rows,
                                      static_cast<decltype(s_element)*>(s), rstd, rows, cols, x_row_stride,
                                      residual_row_stride, eps);
            };
            if (residual_dtype == x_dtype) return run(X{});
            run(float{});
        });
    });
}

void rms_norm_bwd(const void* dy, const void* ds, const void* s, const void* weight, const float* rstd, void* dx,
                  void* dresidual, void* dweight, int64_t rows, int64_t cols, int64_t dy_row_stride,
                  int64_t ds_row_stride, int64_t s_row_stride, float weight_offset, DType x_dtype, DType s_dtype,
                  DType residual_dtype, DType weight_dtype) {
    if (cols == 0) return;
    if (s_dtype != x_dtype && s_dtype != DType::f32) throw std::invalid_argument("s_dtype must be x_dtype or float32.");
    const Weight w(weight, weight_dtype, weight_offset, cols);
    with_element(x_dtype, [&](auto x_element) {
        using X = decltype(x_element);
        const auto run = [&](auto s_element) {
            using S = decltype(s_element);
            const Bwd<X, S> bwd = {static_cast<const X*>(dy),
                                   static_cast<const S*>(ds),
                                   static_cast<const S*>(s),
                                   w.data,
                                   rstd,
                                   static_cast<X*>(dx),
                                   dresidual,
                                   dweight,
                                   rows,
                                   cols,
                                   dy_row_stride,
                                   ds_row_stride,
                                   s_row_stride,
                                   residual_dtype,
                                   weight_dtype};
            bwd.run();
        };
        if (s_dtype == x_dtype) return run(X{});
        run(float{});
    });
}

}  // namespace llmcore::LLMCORE_ISA
