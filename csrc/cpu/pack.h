// Working memory for matrices that the register tiles multiply.
#pragma once

#include <new>

#include "cpu/simd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Distance of rows of n words: whole vectors, and not a multiple of 512 bytes, where a column of rows would fall into few sets of
// the cache.
LLMCORE_INLINE int64_t leading(int64_t n) {
    const int64_t padded = (n + VL - 1) / VL * VL;
    return padded % 128 == 0 ? padded + 16 : padded;
}

LLMCORE_INLINE int vectors(int64_t n) { return int((n + VL - 1) / VL); }

// Hands out arrays from `base` on, each at a multiple of 64 bytes.
struct Layout {
    std::uintptr_t base;
    std::size_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* p = (T*)(base + used);
        used += (std::size_t(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

// n times the arrays of a Part, whose place() takes those of a problem from a layout; not initialised.
template <class Part, class Problem>
class PartsOf {
public:
    PartsOf(const Problem& p, int64_t n) : problem(p) {
        Layout measure{0};
        Part().place(measure, p);
        size = measure.used;
        memory = ::operator new(size * std::size_t(n), std::align_val_t(64));
    }
    ~PartsOf() { ::operator delete(memory, std::align_val_t(64)); }
    PartsOf(const PartsOf&) = delete;
    PartsOf& operator=(const PartsOf&) = delete;

    Part at(int64_t i) const {
        Layout layout{(std::uintptr_t)memory + std::size_t(i) * size};
        Part part;
        part.place(layout, problem);
        return part;
    }

private:
    const Problem& problem;
    std::size_t size;
    void* memory;
};

template <class W>
LLMCORE_INLINE void fill_zero(W* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = W{};
}

// The words of `rows` rows (a multiple of VL; `words` of 4), transposed: to[word * to_stride + row].
template <class W>
LLMCORE_INLINE void pack_transposed(const W* from, int64_t stride, int64_t rows, int64_t words, W* to, int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += VL)
        for (int64_t w = 0; w < words; w += 4) transpose_to_vectors(from + r * stride + w, stride, to + w * to_stride + r, to_stride);
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
