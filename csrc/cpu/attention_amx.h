// Attention's products of bf16 on AMX tiles (tiles_amx.h): as Bf16Pairs, with these layouts.
//
// A panel is 2 tiles of queries. S^T = K Q^T puts keys in rows and queries in the lanes, where the softmax leaves P^T as pairs of
// keys; that is the B side of a product, so sums over keys are transposed as well: O^T = V^T P^T, dQ^T = K^T dS^T. The A sides V^T
// and K^T are packed in blocks of 32 keys, each of whose tiles lies in one piece.
#pragma once

#include "cpu/attention_pack.h"

#if defined(LLMCORE_TILES)
namespace llmcore::LLMCORE_ISA {
namespace {

static_assert(VL == 16, "a row of a tile is a vector");
static_assert(block_rows % 32 == 0 && pack_share % Bf16Tiles::key_step == 0, "blocks and shares are whole tiles");

constexpr int tile_size = 16;  // rows, and words of a row
constexpr int panel_rows = 2 * tile_size;

LLMCORE_INLINE int64_t tiles(int64_t n) { return (n + tile_size - 1) / tile_size; }

// A sides: tiles one below the other, `below` words apart, and one after the other along the summed dimension.
struct TileRows {
    const uint32_t* words;
    int64_t stride, below, after;

    TileRows from(int tile) const { return {words + tile * below, stride, below, after}; }
};

// C = A B, or C + A B: R x N tiles of C, `steps` tiles of A in a row and of B in a column.
template <int R, int N>
__attribute__((noinline)) void multiply_tiles(int64_t steps, const TileRows& a, const uint32_t* b, int64_t b_stride, float* c,
                                              int64_t c_stride, bool add) {
    const int64_t c_bytes = c_stride * 4;
    float* lower = c + tile_size * c_stride;
    if (add) {
        tile_load<0>(c, c_bytes);
        if constexpr (N == 2) tile_load<1>(c + tile_size, c_bytes);
        if constexpr (R == 2) tile_load<2>(lower, c_bytes);
        if constexpr (R == 2 && N == 2) tile_load<3>(lower + tile_size, c_bytes);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    const uint32_t* x = a.words;
    for (int64_t k = 0; k < steps; ++k, x += a.after, b += tile_size * b_stride) {
        tile_load<6>(b, b_stride * 4);
        tile_load<4>(x, a.stride * 4);
        tile_dot<0, 4, 6>();
        if constexpr (N == 2) {
            tile_load<7>(b + tile_size, b_stride * 4);
            tile_dot<1, 4, 7>();
        }
        if constexpr (R == 2) {
            tile_load<5>(x + a.below, a.stride * 4);
            tile_dot<2, 5, 6>();
        }
        if constexpr (R == 2 && N == 2) tile_dot<3, 5, 7>();
    }
    tile_store<0>(c, c_bytes);
    if constexpr (N == 2) tile_store<1>(c + tile_size, c_bytes);
    if constexpr (R == 2) tile_store<2>(lower, c_bytes);
    if constexpr (R == 2 && N == 2) tile_store<3>(lower + tile_size, c_bytes);
}

// The same for any number of tiles below each other.
template <int N>
LLMCORE_INLINE void multiply_column(int64_t row_tiles, int64_t steps, const TileRows& a, const uint32_t* b, int64_t b_stride,
                                    float* c, int64_t c_stride, bool add) {
    by_twos(int(row_tiles), [&](auto count, int i) {
        multiply_tiles<decltype(count)::value, N>(steps, a.from(i), b, b_stride, c + i * tile_size * c_stride, c_stride, add);
    });
}

// Packed rows of n elements, from `row` on.
LLMCORE_INLINE TileRows tile_rows_at(const uint32_t* words, int64_t row, int64_t n) {
    const int64_t stride = leading(n / 2);
    return {words + row * stride, stride, tile_size * stride, tile_size};
}

// Keys transposed, n elements each, from `key` on, a multiple of 32.
LLMCORE_INLINE int64_t transposed_words(int64_t n) { return tiles(n) * tile_size * tile_size; }  // of 32 keys
LLMCORE_INLINE TileRows transposed_keys_at(const uint32_t* words, int64_t key, int64_t n) {
    return {words + key / 32 * transposed_words(n), tile_size, tile_size * tile_size, transposed_words(n)};
}

// Rows [begin, end) of k or v; begin is a multiple of 32. Zeros follow up to a multiple of 32.
template <class T>
void pack_transposed_keys(const T* from, int64_t from_stride, int64_t begin, int64_t end, int64_t n, uint32_t* to) {
    for (int64_t j = begin; j < end; j += 32) {
        for (int64_t ahead = j + 32; ahead < least(j + 64, end); ++ahead) prefetch_row(from + ahead * from_stride, n);
        for (int64_t d = 0; d < n; d += tile_size) {
            uint32_t pairs[tile_size][tile_size];
            uint32_t* tile = to + j / 32 * transposed_words(n) + d * tile_size;
            const int count = int(least(n - d, tile_size));
            for (int i = 0; i < tile_size; ++i) {
                const T* even = from + (j + 2 * i) * from_stride + d;
                const vh low = j + 2 * i < end ? load_halves(even, count) : vh{};
                const vh high = j + 2 * i + 1 < end ? load_halves(even + from_stride, count) : vh{};
                store_bits(pairs[i], bf16_pairs(low, high));
            }
            for (int w = 0; w < tile_size; w += 4) transpose_to_vectors(&pairs[0][w], tile_size, tile + w * tile_size, tile_size);
        }
    }
}

template <class T>
void pack_tile_keys(const T* from, int64_t from_stride, int64_t begin, int64_t end, int64_t n, uint32_t* to) {
    pack_broadcast_keys(Bf16Pairs{}, from, from_stride, begin, end, false, n, to);
    fill_zero(to + end * leading(n / 2), (round_up(int(end), 32) - end) * leading(n / 2));
}

// A lambda that is not inlined keeps what it captures in memory.
#define LLMCORE_INLINED __attribute__((always_inline))

// Calls f(key, edge) for the keys [begin, end), two by two, of a panel of N vectors of rows from `column` on, relative to `first`;
// `edge` is false where all rows see both keys.
template <int N, class F>
LLMCORE_INLINE void for_key_pairs(const BlockRange& range, int column, int first, int begin, int end, const F& f) {
    const int seen_begin = (range.lo[column + N * VL - 1] - first + 1) & ~1, seen_end = (range.hi[column] - first) & ~1;
    for (int j = begin; j < end;) {
        if (j < seen_begin || j >= seen_end) {
            f(j, std::true_type{});
            j += 2;
        } else {
            for (; j < end && j < seen_end; j += 2) f(j, std::false_type{});
        }
    }
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
#endif
