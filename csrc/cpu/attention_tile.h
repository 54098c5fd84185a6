// Register tiles: the matrix products of attention on blocks that lie in the cache.
//
// Scores are kept transposed, S^T = K Q^T: the lanes of a vector are queries, so that the softmax needs no sums across lanes, and
// a key's row is read one word at a time, as it lies in memory.
//
//   block_rows    queries of a block, a multiple of tile_rows and of 2 vectors
//   block_keys    keys of a block, a multiple of tile_rows and even
#pragma once

#include "cpu/register_tile.h"
#include "cpu/tiles_amx.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr int block_rows = VL == 16 ? 96 : 48;
constexpr int block_keys = 72;

struct Floats {
    using Word = float;
    using Words = vf;
    static constexpr int per_word = 1;
    static constexpr int tile_keys = block_keys, key_step = 2;  // of a tile of keys; its first key is a multiple of key_step
    static constexpr int padded_keys(int n) { return round_up(n, tile_rows); }
    static constexpr int64_t words(int64_t n) { return n; }  // of n elements, where they are summed over
};

struct Bf16Pairs {
    using Word = uint32_t;  // the even element in the low half
    using Words = vu;
    static constexpr int per_word = 2;
    static constexpr int tile_keys = block_keys, key_step = 2;
    static constexpr int padded_keys(int n) { return round_up(n, tile_rows); }
    static constexpr int64_t words(int64_t n) { return n / 2; }
};

struct Bf16Tiles : Bf16Pairs {  // of AMX: attention_amx.h
    static constexpr int tile_keys = 256, key_step = 32;
    static constexpr int padded_keys(int n) { return round_up(n, 32); }
    static constexpr int64_t words(int64_t n) { return (n / 2 + 15) / 16 * 16; }
};

// bf16 is multiplied in pairs only where that is an instruction, or where a test asks for it
#if (defined(LLMCORE_AVX512) && defined(__AVX512BF16__)) || defined(LLMCORE_EMULATE_BF16_DOT)
#define LLMCORE_BF16_PAIRS
#endif

LLMCORE_INLINE vh round_to_bf16(vf x) {
#if defined(LLMCORE_AVX512) && defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    return narrow_bf16(x);
#endif
}

LLMCORE_INLINE vu bf16_pairs(vh even, vh odd) {
    return __builtin_convertvector(even, vu) | (__builtin_convertvector(odd, vu) << 16);
}

LLMCORE_INLINE vu round_to_pairs(vf even, vf odd) {
#if defined(LLMCORE_AVX512) && defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t alternate[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (vu)_mm512_permutexvar_epi16(load_bits<__m512i>(alternate), halves);
#else
    return bf16_pairs(round_to_bf16(even), round_to_bf16(odd));
#endif
}

// C = factor A B. A: tile_rows x words (a multiple of 4, not 0); B: words x N vectors, C: tile_rows x N vectors, rows block_rows
// apart.
template <class M, int N>
__attribute__((noinline)) void score_tile(int64_t words, const typename M::Word* a, int64_t a_stride, const typename M::Word* b,
                                          float* c, float factor) {
    const int64_t part = sum_part(words);
    for (int64_t from = 0; from < words; from += part) {
        const int64_t to = from + part < words ? from + part : words;
        Tile<N> acc;
        clear_tile(acc);
        int64_t k = from;
        do {
            for (int u = 0; u < 4; ++u) multiply_word(acc, a + k + u, a_stride, b + (k + u) * block_rows);
            k += 4;
        } while (k < to);
        for (int i = 0; i < tile_rows; ++i) {
            for (int v = 0; v < N; ++v) {
                float* x = c + i * block_rows + v * VL;
                store(x, from == 0 ? acc[i][v] * factor : fmadd(acc[i][v], broadcast(factor), load(x)));
            }
        }
    }
}

// C = diag(scale) C + A^T B, or C + A^T B without a scale. A: words x tile_rows, rows block_rows apart; B: words x N vectors; words > 0.
// The sum starts from 0 and C is added last, again for the error.
template <class M, int N>
__attribute__((noinline)) void weighted_sum_tile(int64_t words, const typename M::Word* a, const typename M::Word* b,
                                                 int64_t b_stride, float* c, int64_t c_stride, const float* scale) {
    Tile<N> acc;
    clear_tile(acc);
    if (words < 1) __builtin_unreachable();  // or the compiler keeps the sums in memory too, for an empty loop
#pragma GCC unroll 4
    for (int64_t k = 0; k < words; ++k) multiply_word(acc, a + k * block_rows, 1, b + k * b_stride);
    for (int i = 0; i < tile_rows; ++i) {
        const vf factor = broadcast(scale == nullptr ? 1.0f : scale[i]);
        for (int v = 0; v < N; ++v) {
            float* to = c + i * c_stride + v * VL;
            store(to, fmadd(load(to), factor, acc[i][v]));
        }
    }
}

// C += A B. A: tile_rows x words, rows block_rows elements apart; B: words x N vectors; words > 0.
template <class M, int N>
__attribute__((noinline)) void gradient_tile(int64_t words, const typename M::Word* a, const typename M::Word* b,
                                             int64_t b_stride, float* c, int64_t c_stride) {
    Tile<N> acc;
    clear_tile(acc);
    if (words < 1) __builtin_unreachable();  // or the compiler keeps the sums in memory too, for an empty loop
#pragma GCC unroll 4
    for (int64_t k = 0; k < words; ++k) multiply_word(acc, a + k, block_rows / M::per_word, b + k * b_stride);
    for (int i = 0; i < tile_rows; ++i) {
        for (int v = 0; v < N; ++v) {
            float* to = c + i * c_stride + v * VL;
            store(to, load(to) + acc[i][v]);
        }
    }
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
