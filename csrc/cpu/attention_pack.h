// The operands of attention packed for the register tiles.
#pragma once

#include <type_traits>

#include "cpu/attention_problem.h"
#include "cpu/pack.h"

namespace llmcore::LLMCORE_ISA {
namespace {

template <class Part>
using Parts = PartsOf<Part, Problem>;

// The products to use for an element type.
template <class T>
struct Products {
    using type = Floats;
};
#if defined(LLMCORE_TILES)
template <>
struct Products<bf16_t> {
    using type = Bf16Tiles;
};
#elif defined(LLMCORE_BF16_PAIRS)
template <>
struct Products<bf16_t> {
    using type = Bf16Pairs;
};
#endif

// One row of n elements as words; zeros to the end of its last vector.
template <class T>
LLMCORE_INLINE void pack_row(Floats, const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, int(n - i)));
}

LLMCORE_INLINE void pack_row(Bf16Pairs, const bf16_t* from, int64_t n, uint32_t* to) {
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) store_bits(to + i / 2, load_bits<vu>(from + i));
    if (i == n) return;
    __builtin_memcpy(to + i / 2, from + i, std::size_t(n - i) * 2);
    fill_zero(to + n / 2, vectors(n / 2) * VL - n / 2);
}

// Two rows of n elements (the second null: zeros) as one row of n words.
LLMCORE_INLINE void pack_row_pair(const bf16_t* even, const bf16_t* odd, int64_t n, uint32_t* to) {
    for (int64_t i = 0; i < n; i += VL) {
        const int count = int(least(n - i, VL));
        const vh high = odd == nullptr ? vh{} : load_halves(odd + i, count);
        store_bits(to + i, bf16_pairs(load_halves(even + i, count), high));
    }
}

template <class T>
LLMCORE_INLINE void write_scaled(const float* from, float factor, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to + i, load(from + i) * factor);
    if (i < n) store(to + i, load(from + i) * factor, int(n - i));
}

// Rows lie far apart: the processor does not foresee them.
template <class T>
LLMCORE_INLINE void prefetch_row_to_write(T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(p + i, 1);
}

constexpr int prefetch_rows = 16;

// Rows [begin, end) of k or v, n elements each, as the broadcast side of a product over their elements. `last`: tile_rows rows of
// zeros follow.
template <class M, class T>
void pack_broadcast_keys(M m, const T* from, int64_t from_stride, int64_t begin, int64_t end, bool last, int64_t n,
                         typename M::Word* to) {
    const int64_t stride = leading(n / M::per_word);
    for (int64_t j = begin; j < end; ++j) {
        if (j + prefetch_rows < end) prefetch_row(from + (j + prefetch_rows) * from_stride, n);
        pack_row(m, from + j * from_stride, n, to + j * stride);
    }
    if (last) fill_zero(to + end * stride, tile_rows * stride);
}

// The same as the vector side of a product over keys; begin is even.
template <class T>
void pack_vector_keys(Floats m, const T* from, int64_t from_stride, int64_t begin, int64_t end, int64_t n, float* to) {
    for (int64_t j = begin; j < end; ++j) {
        if (j + prefetch_rows < end) prefetch_row(from + (j + prefetch_rows) * from_stride, n);
        pack_row(m, from + j * from_stride, n, to + j * leading(n));
    }
}

template <class T>
void pack_vector_keys(Bf16Pairs, const T* from, int64_t from_stride, int64_t begin, int64_t end, int64_t n, uint32_t* to) {
    for (int64_t j = begin; j < end; j += 2) {
        for (int64_t ahead = j + prefetch_rows; ahead < least(j + prefetch_rows + 2, end); ++ahead) {
            prefetch_row(from + ahead * from_stride, n);
        }
        const T* even = from + j * from_stride;
        pack_row_pair(even, j + 1 < end ? even + from_stride : nullptr, n, to + j / 2 * leading(n));
    }
}

// Keys that one thread packs where several pack an item's; even.
constexpr int64_t pack_share = 4 * block_keys;
LLMCORE_INLINE int64_t pack_shares(int64_t Tk) { return (Tk + pack_share - 1) / pack_share; }

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
