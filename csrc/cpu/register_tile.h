// Register tiles: sums of products of matrices, kept in the processor's registers. A word is a float, or two bf16 for the products
// that AVX512_BF16 has; such a pair runs along the dimension that the product sums over.
//
//   tile_rows     rows of C that one tile computes from broadcast words; times 2 vectors they fill the registers
#pragma once

#include "cpu/simd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

#if LLMCORE_VECTOR_BYTES == 64 || defined(LLMCORE_NEON)  // 32 registers, otherwise 16
constexpr int tile_rows = 12;
#else
constexpr int tile_rows = 6;
#endif

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

LLMCORE_INLINE vf multiply_add(vf a, vf b, vf c) { return fmadd(a, b, c); }

LLMCORE_INLINE vf multiply_add(vu a, vu b, vf c) {
#if defined(LLMCORE_AVX512) && defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    c = fmadd((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), c);
    return fmadd((vf)(a << 16), (vf)(b << 16), c);
#endif
}

template <int N, int R = tile_rows>
using Tile = vf[R][N];

template <int R, int N>
LLMCORE_INLINE void clear_tile(vf (&c)[R][N]) {
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < N; ++v) c[i][v] = zero();
}

LLMCORE_INLINE vf load_words(const float* p) { return load_bits<vf>(p); }
LLMCORE_INLINE vu load_words(const uint32_t* p) { return load_bits<vu>(p); }

// c += a b for one word of the summed dimension: R words of a, N vectors of b
template <class W, int R, int N>
LLMCORE_INLINE void multiply_word(vf (&c)[R][N], const W* a, int64_t a_stride, const W* b) {
    using Words = decltype(load_words(b));
    Words row[N];
    for (int v = 0; v < N; ++v) row[v] = load_words(b + v * VL);
    for (int i = 0; i < R; ++i) {
        const Words x = a[i * a_stride] - Words{};
        for (int v = 0; v < N; ++v) c[i][v] = multiply_add(x, row[v], c[i][v]);
    }
}

// Long sums are made of parts: the shorter a chain of additions, the smaller its error.
LLMCORE_INLINE int64_t sum_part(int64_t words) { return words > 128 ? 64 : words; }

template <int N>
struct Count {
    static constexpr int value = N;
};

// f(Count<N>, first vector) for vectors two by two, the last alone where their number is odd
template <class F>
LLMCORE_INLINE void by_twos(int vectors, const F& f) {
    int v = 0;
    for (; v + 2 <= vectors; v += 2) f(Count<2>{}, v);
    if (v < vectors) f(Count<1>{}, v);
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
