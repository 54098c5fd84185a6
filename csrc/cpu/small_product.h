// Products of small matrices that lie in the cache, in register tiles of float32:
//
//   C = diag(keep) C + A B     A: rows x words, B: words x columns, C: rows x columns
//
// B and C have contiguous rows, A either contiguous rows or contiguous columns, so that nothing is transposed for a product's
// left side. Rows and words are multiples of 4 and columns whole vectors: what is beyond a matrix's end is zeros in A and B,
// and of no meaning in C.
#pragma once

#include "cpu/register_tile.h"

namespace llmcore::LLMCORE_ISA {
namespace {

struct Rows {  // element (i, k) at data[i * stride + k]
    const float* data;
    int64_t stride;
    const float* at(int64_t i, int64_t k) const { return data + i * stride + k; }
    int64_t step() const { return stride; }
};

struct Columns {  // element (i, k) at data[k * stride + i]
    const float* data;
    int64_t stride;
    const float* at(int64_t i, int64_t k) const { return data + k * stride + i; }
    int64_t step() const { return 1; }
};

struct Matrix {
    float* data;
    int64_t stride;
};

// What row i of C is multiplied by before the product is added: factors[i * step], or nothing is kept where factors is null.
struct Keep {
    const float* factors;
    int64_t step;
};
constexpr float one = 1.0f;
constexpr Keep keep_nothing = {nullptr, 0}, keep_all = {&one, 0};

// The words of the sum that are not zeros by construction.
struct Words {
    int begin, end;
};

template <int R, int N, class Left>
__attribute__((noinline)) void product_tile(Left a, const float* b, int64_t b_stride, int64_t words, float* c, int64_t c_stride,
                                            Keep keep) {
    const int64_t part = sum_part(words);
    for (int64_t from = 0; from < words; from += part) {
        const int64_t to = from + part < words ? from + part : words;
        Tile<N, R> acc;
        clear_tile(acc);
        int64_t k = from;
        do {
            for (int u = 0; u < 4; ++u) multiply_word(acc, a.at(0, k + u), a.step(), b + (k + u) * b_stride);
            k += 4;
        } while (k < to);
        for (int i = 0; i < R; ++i) {
            for (int v = 0; v < N; ++v) {
                float* const x = c + i * c_stride + v * VL;
                if (keep.factors == nullptr) {
                    store(x, acc[i][v]);
                } else {
                    store(x, fmadd(load(x), broadcast(keep.factors[i * keep.step]), acc[i][v]));
                }
            }
        }
        keep = keep_all;
    }
}

// N vectors of columns of C, rows [first, rows); words_of(first row, end row) are those to sum over for a few rows.
template <int N, class Left, class F>
LLMCORE_INLINE void product_panel(Left a, const float* b, int64_t b_stride, Matrix c, int first, int rows, Keep keep,
                                  const F& words_of) {
    const auto tile = [&](auto height, int i) {
        constexpr int R = decltype(height)::value;
        const Words words = words_of(i, i + R);
        const Keep from = {keep.factors == nullptr ? nullptr : keep.factors + i * keep.step, keep.step};
        product_tile<R, N>(Left{a.at(i, words.begin), a.stride}, b + words.begin * b_stride, b_stride, words.end - words.begin,
                           c.data + i * c.stride, c.stride, from);
    };
    int i = first;
    for (; i + tile_rows <= rows; i += tile_rows) tile(Count<tile_rows>{}, i);
    if (rows - i > tile_rows / 3) {
        tile(Count<tile_rows / 3 * 2>{}, i);
    } else if (i < rows) {
        tile(Count<tile_rows / 3>{}, i);
    }
}

template <class Left, class F>
LLMCORE_INLINE void product(Left a, Matrix b, Matrix c, int rows, int columns, Keep keep, const F& words_of) {
    by_twos(columns, [&](auto count, int v) {
        product_panel<decltype(count)::value>(a, b.data + v * VL, b.stride, Matrix{c.data + v * VL, c.stride}, 0, rows, keep, words_of);
    });
}

// Words [0, words) for all rows
template <class Left>
LLMCORE_INLINE void product(Left a, Matrix b, Matrix c, int rows, int columns, int words, Keep keep) {
    product(a, b, c, rows, columns, keep, [=](int, int) { return Words{0, words}; });
}

// A is lower triangular: row i has words up to i.
template <class Left>
LLMCORE_INLINE void product_of_lower(Left a, Matrix b, Matrix c, int rows, int columns, Keep keep) {
    product(a, b, c, rows, columns, keep, [=](int, int end) { return Words{0, round_up(end < rows ? end : rows, 4)}; });
}

// A is upper triangular: row i has words from i on.
template <class Left>
LLMCORE_INLINE void product_of_upper(Left a, Matrix b, Matrix c, int rows, int columns, Keep keep) {
    product(a, b, c, rows, columns, keep, [=](int begin, int) { return Words{begin / 4 * 4, rows}; });
}

// Of C the lower triangle alone is computed, and what lies in a tile with it.
template <class Left>
LLMCORE_INLINE void product_to_lower(Left a, Matrix b, Matrix c, int rows, int words) {
    by_twos((rows + VL - 1) / VL, [&](auto count, int v) {
        product_panel<decltype(count)::value>(a, b.data + v * VL, b.stride, Matrix{c.data + v * VL, c.stride}, v * VL, rows,
                                              keep_nothing, [=](int, int) { return Words{0, words}; });
    });
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
