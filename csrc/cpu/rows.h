// What the row kernels share: walking a row vector by vector, the element types of a call, scratch memory.
//
// A loop body is written once, for `lanes` being Whole (a full vector) or an int (the first lanes of the row's last, partial
// vector). Internal linkage, for the reason given in simd.h.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Fewer elements than this are not worth another thread.
constexpr int64_t kGrain = 32768;

struct Whole {};

template <class T>
LLMCORE_INLINE vf load(const T* p, Whole) {
    return load(p);
}

template <class T>
LLMCORE_INLINE void store(T* p, vf x, Whole) {
    store(p, x);
}

// f(i, lanes) for the vectors of [0, n)
template <class F>
LLMCORE_INLINE void for_vectors(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) f(i, Whole{});
    if (i < n) f(i, int(n - i));
}

// the sum of all lanes of f(i, lanes) over the vectors of [0, n). Four chains, since one would wait for its additions; they
// are short and their sums are added up, so that the error stays small in long rows.
template <class F>
LLMCORE_INLINE float sum_vectors(int64_t n, const F& f) {
    constexpr int64_t kChain = 32 * 4 * VL;
    vf total{};
    int64_t i = 0;
    while (i + 4 * VL <= n) {
        const int64_t stop = n < i + kChain ? n : i + kChain;
        vf a{}, b{}, c{}, d{};
        for (; i + 4 * VL <= stop; i += 4 * VL) {
            a += f(i, Whole{});
            b += f(i + VL, Whole{});
            c += f(i + 2 * VL, Whole{});
            d += f(i + 3 * VL, Whole{});
        }
        total += (a + b) + (c + d);
    }
    for (; i + VL <= n; i += VL) total += f(i, Whole{});
    if (i < n) total += f(i, int(n - i));
    return reduce_sum(total);
}

// f(T{}) with T the element type of the dtype
template <class F>
LLMCORE_INLINE void visit(DType dtype, const F& f) {
    switch (dtype) {
        case DType::f32:
            return f(float{});
        case DType::bf16:
            return f(bf16_t{});
        case DType::f16:
            return f(fp16_t{});
    }
}

// Uninitialised floats at a cache line's boundary.
class Scratch {
  public:
    explicit Scratch(int64_t count) {
        const std::size_t bytes = (std::size_t(count) * sizeof(float) + 63) / 64 * 64;
        data_ = bytes == 0 ? nullptr : static_cast<float*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr && bytes != 0) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* data() const { return data_; }

  private:
    float* data_;
};

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
