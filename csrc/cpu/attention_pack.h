// The attention problem as the kernels see it, and its operands packed for the register tiles.
//
// An item is one key head of one batch element. The G = H / K query heads that share it are stacked: its rows are r = t * G + g,
// so that neighbouring rows see nearly the same keys. Row r sees the keys [lo, hi); both ends grow with r.
#pragma once

#include <cfloat>
#include <cmath>
#include <new>

#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr float log2_e = 1.44269504f;
constexpr float lowest = -FLT_MAX;
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

// A row of an item: its batch element, time, first query head and number g of the head among the G.
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
    int64_t rows() const { return Tq * G(); }
    int64_t items() const { return B * K; }
    int64_t blocks() const { return (rows() + block_rows - 1) / block_rows; }

    Row row(int64_t item, int64_t r) const { return {item / K, r / G(), item % K * G(), r % G(), G()}; }
    template <class T>
    const T* keys(const Operand& x, int64_t item) const {  // the item's first row of k or v
        return x.at<T>(item / K, 0, item % K);
    }
    int64_t output_row(const Row& r) const { return (r.b * Tq + r.t) * H + r.h(); }  // of (B, Tq, H)
    int64_t lse_index(const Row& r) const { return (r.b * H + r.h()) * Tq + r.t; }   // of (B, H, Tq)

    int lo(int64_t t) const {
        const int64_t here = t + Tk - Tq;
        return window_left < 0 || window_left > here ? 0 : int(here - window_left);
    }
    int hi(int64_t t) const {
        const int64_t here = t + Tk - Tq;
        return window_right < 0 || window_right >= Tk - here ? int(Tk) : int(most(here + window_right + 1, 0));
    }
    // whether a row of the block sees one of the keys [first, first + keys)
    bool meets(int64_t block, int first, int keys) const {
        const int64_t last = least((block + 1) * block_rows, rows()) - 1;
        return lo(block * block_rows / G()) < first + keys && hi(last / G()) > first;
    }
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

// ---- memory -----------------------------------------------------------------------------------------------------------------

// Hands out parts of a block, each at a multiple of 64 bytes. One pass without a block (base 0) measures, a second one places.
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

struct Block {
    explicit Block(std::size_t bytes) : data(::operator new(bytes + 64, std::align_val_t(64))) {}
    ~Block() { ::operator delete(data, std::align_val_t(64)); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    void* data;
};

// Distance of rows of n words: whole vectors, and not a multiple of 512 bytes, where a column of rows would fall into few sets of
// the cache.
LLMCORE_INLINE int64_t leading(int64_t n) {
    const int64_t padded = (n + VL - 1) / VL * VL;
    return padded % 128 == 0 ? padded + 16 : padded;
}

LLMCORE_INLINE int vectors(int64_t n) { return int((n + VL - 1) / VL); }

// The i-th of the parts of equal size that begin at base.
template <class Part>
Part part_at(std::uintptr_t base, int64_t i, const Problem& p) {
    Layout measure{0};
    Part part;
    part.place(measure, p);
    Layout layout{base + std::size_t(i) * measure.used};
    part.place(layout, p);
    return part;
}

template <class Part>
std::size_t part_size(const Problem& p) {
    Layout measure{0};
    Part part;
    part.place(measure, p);
    return measure.used;
}

// ---- sharing the work -------------------------------------------------------------------------------------------------------

// below this many multiplications, starting the threads takes longer than they save
LLMCORE_INLINE bool worth_threads(const Problem& p) {
    return double(p.items()) * double(p.rows()) * double(p.Tk) * double(p.D + p.Dv) > 2e5;
}

// whether n equal parts, each on one thread, keep the threads at least nine tenths busy
LLMCORE_INLINE bool is_balanced(int64_t n, int64_t threads) { return 10 * n >= 9 * ((n + threads - 1) / threads * threads); }

// The products to use for an element type.
template <class T>
struct Products {
    using type = Floats;
};
#if defined(LLMCORE_BF16_PAIRS)
template <>
struct Products<bf16_t> {
    using type = Bf16Pairs;
};
#endif

// ---- packing ----------------------------------------------------------------------------------------------------------------

template <class W>
LLMCORE_INLINE void fill_zero(W* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = W{};
}

// One row of n elements as words; zeros to the end of its last vector.
template <class T>
LLMCORE_INLINE void pack_row(Floats, const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, int(n - i)));
}

LLMCORE_INLINE void pack_row(Bf16Pairs, const bf16_t* from, int64_t n, uint32_t* to) {
    __builtin_memcpy(to, from, std::size_t(n) * 2);
    for (int64_t i = n / 2; i < vectors(n / 2) * VL; ++i) to[i] = 0;
}

// Rows 2j and 2j + 1 (null: zeros) as one row of n words.
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

// The result of a row: o is the sum of its values with weights exp(score - m), l the sum of the weights.
template <class T>
LLMCORE_INLINE void write_row(const Problem& p, const Row& row, const float* o, float m, float l, T* out, float* lse) {
    const bool empty = l == 0.0f;
    write_scaled(o, empty ? 0.0f : 1.0f / l, p.Dv, out + p.output_row(row) * p.Dv);
    lse[p.lse_index(row)] = empty ? -infinity : m + std::log(l);
}

// Rows lie far apart: the processor does not foresee them.
template <class T>
LLMCORE_INLINE void prefetch_row(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(p + i);
}

// The words of `rows` rows (a multiple of 4, as is `words`), transposed: to[word][row], block_rows apart.
template <class W>
LLMCORE_INLINE void pack_transposed(const W* from, int64_t stride, int64_t rows, int64_t words, W* to) {
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t w = 0; w < words; w += 4) transpose_4x4(from + r * stride + w, stride, to + w * block_rows + r, block_rows);
}

constexpr int64_t prefetch_rows = 16;

// The Tk rows of n elements of k, or v, as the broadcast side of a product over their elements: words of each row, and tile_rows
// rows of zeros after the last.
template <class M, class T>
void pack_broadcast_keys(M m, const T* from, int64_t from_stride, int64_t Tk, int64_t n, typename M::Word* to) {
    const int64_t stride = leading(n / M::per_word);
    for (int64_t j = 0; j < Tk; ++j) {
        if (j + prefetch_rows < Tk) prefetch_row(from + (j + prefetch_rows) * from_stride, n);
        pack_row(m, from + j * from_stride, n, to + j * stride);
    }
    fill_zero(to + Tk * stride, tile_rows * stride);
}

// The same as the vector side of a product over keys.
template <class T>
void pack_vector_keys(Floats m, const T* from, int64_t from_stride, int64_t Tk, int64_t n, float* to) {
    for (int64_t j = 0; j < Tk; ++j) {
        if (j + prefetch_rows < Tk) prefetch_row(from + (j + prefetch_rows) * from_stride, n);
        pack_row(m, from + j * from_stride, n, to + j * leading(n));
    }
}

template <class T>
void pack_vector_keys(Bf16Pairs, const T* from, int64_t from_stride, int64_t Tk, int64_t n, uint32_t* to) {
    for (int64_t j = 0; j < Tk; ++j) {
        if (j + prefetch_rows < Tk) prefetch_row(from + (j + prefetch_rows) * from_stride, n);
        const T* even = from + j * from_stride;
        if (j % 2 == 0) pack_row_pair(even, j + 1 < Tk ? even + from_stride : nullptr, n, to + j / 2 * leading(n));
    }
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
