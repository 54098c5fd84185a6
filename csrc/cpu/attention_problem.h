// The attention problem as the kernels see it: items, rows, blocks, and which keys a row sees.
//
// An item is one key head of one batch element. The G = H / K query heads that share it are stacked: its rows are r = t * G + g,
// so that neighbouring rows see nearly the same keys, [lo, hi); both ends grow with r. A block is block_rows rows.
//
// B batch, H query heads, K key heads, Tq queries, Tk keys, D and Dv head sizes
#pragma once

#include "cpu/attention_tile.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr float log2_e = 1.44269504f;
constexpr float infinity = __builtin_inff();

LLMCORE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LLMCORE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// An operand of the problem: element (b, t, h, 0) is at data + b * stride_b + t * stride_t + h * stride_h.
struct Operand {
    const void* data;
    int64_t stride_b, stride_t, stride_h;

    template <class T>
    const T* at(int64_t b, int64_t t, int64_t h) const {
        return (const T*)data + b * stride_b + t * stride_t + h * stride_h;
    }
};

// A row of an item: its batch element, time, first query head, and the number g of its head among the G.
struct Row {
    int64_t b, t, head, g, G;

    int64_t h() const { return head + g; }
    void next() {
        if (++g == G) {
            g = 0;
            ++t;
        }
    }
};

struct Problem {
    int64_t B, H, K, Tq, Tk, D, Dv;
    float scale;
    int64_t window_left, window_right;  // negative: no limit

    int64_t G() const { return H / K; }
    int64_t items() const { return B * K; }
    int64_t rows() const { return Tq * G(); }
    int64_t blocks() const { return (rows() + block_rows - 1) / block_rows; }
    int rows_of(int64_t block) const { return int(least(rows() - block * block_rows, block_rows)); }

    Row row(int64_t item, int64_t r) const { return {item / K, r / G(), item % K * G(), r % G(), G()}; }
    template <class T>
    const T* query(const Operand& x, const Row& r) const {  // of q, dout, out
        return x.at<T>(r.b, r.t, r.h());
    }
    template <class T>
    const T* keys(const Operand& x, int64_t item) const {  // the item's first row of k or v
        return x.at<T>(item / K, 0, item % K);
    }
    int64_t output_row(const Row& r) const { return (r.b * Tq + r.t) * H + r.h(); }                 // of (B, Tq, H)
    int64_t output_key(int64_t item, int64_t j) const { return (item / K * Tk + j) * K + item % K; }  // of (B, Tk, K)
    int64_t lse_index(const Row& r) const { return (r.b * H + r.h()) * Tq + r.t; }                  // of (B, H, Tq)

    // the first and last + 1 key that query t sees
    int lo(int64_t t) const {
        const int64_t here = t + Tk - Tq;
        return window_left < 0 || window_left > here ? 0 : int(here - window_left);
    }
    int hi(int64_t t) const {
        const int64_t here = t + Tk - Tq;
        return window_right < 0 || window_right >= Tk - here ? int(Tk) : int(most(here + window_right + 1, 0));
    }
    // those that the rows of a block see, and whether they are among [first, first + keys)
    int block_lo(int64_t block) const { return lo(block * block_rows / G()); }
    int block_hi(int64_t block) const { return hi((block * block_rows + rows_of(block) - 1) / G()); }
    bool meets(int64_t block, int first, int keys) const { return block_lo(block) < first + keys && block_hi(block) > first; }
};

// What the rows of a block see. Rows past the last repeat it.
struct BlockRange {
    int32_t lo[block_rows], hi[block_rows];

    void set(const Problem& p, Row row, int count) {
        for (int i = 0; i < count; ++i, row.next()) {
            lo[i] = p.lo(row.t);
            hi[i] = p.hi(row.t);
        }
        for (int i = count; i < block_rows; ++i) {
            lo[i] = lo[count - 1];
            hi[i] = hi[count - 1];
        }
    }
    // the first and last + 1 key, of the tile's `keys` from `first` on and relative to it, that one of n rows sees
    int begin(int row, int first, int keys) const { return clamp(lo[row] - first, keys); }
    int end(int row, int n, int first, int keys) const { return clamp(hi[row + n - 1] - first, keys); }

    static int clamp(int x, int keys) { return x < 0 ? 0 : (x > keys ? keys : x); }
};

// Scores of N vectors of rows from `column` on and the keys [begin, end), relative to `first`, become -inf where the row does not
// see the key.
template <int N>
LLMCORE_INLINE void mask_scores(const BlockRange& range, int column, int first, int begin, int end, float* scores) {
    const int seen_begin = range.lo[column + N * VL - 1] - first, seen_end = range.hi[column] - first;  // by all rows
    const auto mask = [&](int from, int to) {
        for (int v = 0; v < N; ++v) {
            const vi lo = load_bits<vi>(range.lo + column + v * VL), hi = load_bits<vi>(range.hi + column + v * VL);
            for (int j = from; j < to; ++j) {
                float* x = scores + j * block_rows + v * VL;
                store(x, select((lo <= first + j) & (hi > first + j), load(x), broadcast(-infinity)));
            }
        }
    };
    mask(begin, seen_begin < end ? seen_begin : end);
    mask(seen_end > begin ? seen_end : begin, end);
}

// Below this many multiplications, starting the threads takes longer than they save.
LLMCORE_INLINE bool worth_threads(const Problem& p) {
    return double(p.items()) * double(p.rows()) * double(p.Tk) * double(p.D + p.Dv) > 4e5;
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
