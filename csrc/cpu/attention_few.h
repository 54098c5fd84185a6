// Attention, forward, of few queries against many keys, as in generation with a cache: every key and value is read once, where it
// lies, and the time is that of reading them.
//
// Scores are dot products along a key's row here, the lanes of the softmax are keys. The keys of an item are split over threads
// where there are fewer items; the parts are joined in order: lse weights each part's output, arXiv 2307.08691, section 3.3.
#pragma once

#include "cpu/attention_pack.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr int few_rows = 8;
constexpr int few_keys = 64;  // of a block

// What one split of an item's keys gives, and its working space.
struct FewPart {
    float *q, *weights, *o, *m, *l, *rescale;

    void place(Layout& layout, const Problem& p) {
        q = layout.take<float>(p.rows() * leading(p.D));
        weights = layout.take<float>(p.rows() * few_keys);
        o = layout.take<float>(p.rows() * leading(p.Dv));
        m = layout.take<float>(few_rows);
        l = layout.take<float>(few_rows);
        rescale = layout.take<float>(few_rows);
    }
};

// scores[r][j] = q_r . k_j of R rows and J keys, each in two sums: shorter chains are faster and more accurate
template <int R, int J, class T>
LLMCORE_INLINE void few_scores(const float* q, int64_t q_stride, const T* k, int64_t k_stride, int64_t D, float* scores) {
    vf acc[2][R][J];
    for (int i = 0; i < 2 * R * J; ++i) acc[i / (R * J)][i / J % R][i % J] = zero();
    const auto add = [&](vf(&sums)[R][J], int64_t d, int n) {
        for (int j = 0; j < J; ++j) {
            const vf x = n == VL ? load(k + j * k_stride + d) : load(k + j * k_stride + d, n);
            for (int r = 0; r < R; ++r) sums[r][j] = fmadd(load(q + r * q_stride + d), x, sums[r][j]);
        }
    };
    int64_t d = 0;
    for (; d + 2 * VL <= D; d += 2 * VL) {
        add(acc[0], d, VL);
        add(acc[1], d + VL, VL);
    }
    for (; d < D; d += VL) add(acc[0], d, int(least(D - d, VL)));
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < J; ++j) scores[r * few_keys + j] = reduce_sum(acc[0][r][j] + acc[1][r][j]);
}

// o_r = rescale_r o_r + sum over n keys of weights[r][j] v_j, for N vectors of R rows; the last vector has `last` elements
template <int R, int N, class T>
LLMCORE_INLINE void few_sums(const float* weights, const T* v, int64_t v_stride, int n, int last, const float* rescale, float* o,
                             int64_t o_stride) {
    vf acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i) acc[r][i] = zero();
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < N; ++i) {
            const T* from = v + j * v_stride + i * VL;
            const vf x = i + 1 < N || last == VL ? load(from) : load(from, last);
            for (int r = 0; r < R; ++r) acc[r][i] = fmadd(broadcast(weights[r * few_keys + j]), x, acc[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i) {
            float* to = o + r * o_stride + i * VL;
            store(to, fmadd(load(to), broadcast(rescale[r]), acc[r][i]));
        }
}

// One row's scores of n keys become weights; those outside [begin, end) are not seen.
LLMCORE_INLINE void few_softmax(float scale, float* s, int n, int begin, int end, float& m, float& l, float& rescale) {
    for (int j = 0; j < n; j += VL) store(s + j, load(s + j) * scale);
    for (int j = 0; j < begin; ++j) s[j] = -infinity;
    for (int j = end; j < vectors(n) * VL; ++j) s[j] = -infinity;
    vf largest = broadcast(m), sum = zero();
    for (int j = 0; j < n; j += VL) largest = max(load(s + j), largest);
    const float top = reduce_max(largest);
    for (int j = 0; j < n; j += VL) {
        const vf x = exp2_fast((load(s + j) - top) * log2_e);
        sum += x;
        store(s + j, x);
    }
    rescale = exp2_fast(broadcast((m - top) * log2_e))[0];
    m = top;
    l = l * rescale + reduce_sum(sum);
}

template <int R, class T>
void few_block(const Problem& p, const FewPart& w, int row, const T* k, int64_t k_stride, const T* v, int64_t v_stride, int first,
               int n) {
    const int64_t q_stride = leading(p.D), o_stride = leading(p.Dv);
    const float* q = w.q + row * q_stride;
    float *s = w.weights + row * few_keys, *o = w.o + row * o_stride;
    int j = 0;
    for (; j + 4 / R <= n; j += 4 / R) few_scores<R, 4 / R>(q, q_stride, k + j * k_stride, k_stride, p.D, s + j);
    for (; j < n; ++j) few_scores<R, 1>(q, q_stride, k + j * k_stride, k_stride, p.D, s + j);
    for (int r = 0; r < R; ++r) {
        const int begin = BlockRange::clamp(p.lo((row + r) / p.G()) - first, n);
        const int end = BlockRange::clamp(p.hi((row + r) / p.G()) - first, n);
        few_softmax(p.scale, s + r * few_keys, n, begin, end, w.m[row + r], w.l[row + r],
                    w.rescale[row + r]);
    }
    int64_t d = 0;
    const float* rescale = w.rescale + row;
    for (; d + 4 * VL <= p.Dv; d += 4 * VL) few_sums<R, 4>(s, v + d, v_stride, n, VL, rescale, o + d, o_stride);
    for (; d < p.Dv; d += VL) few_sums<R, 1>(s, v + d, v_stride, n, int(least(p.Dv - d, VL)), rescale, o + d, o_stride);
}

// All rows of an item and the keys [begin, end).
template <class T>
void few_part(const Problem& p, const Operand& q, const Operand& k, const Operand& v, int64_t item, int begin, int end,
              const FewPart& w) {
    const int rows = int(p.rows());
    Row row = p.row(item, 0);
    for (int r = 0; r < rows; ++r, row.next()) {
        pack_row(Floats{}, q.at<T>(row.b, row.t, row.h()), p.D, w.q + r * leading(p.D));
        w.m[r] = lowest;
        w.l[r] = 0.0f;
    }
    fill_zero(w.o, rows * leading(p.Dv));
    for (int first = begin; first < end; first += few_keys) {
        const int n = int(least(end - first, few_keys));
        const T *k_first = p.keys<T>(k, item) + first * k.stride_t, *v_first = p.keys<T>(v, item) + first * v.stride_t;
        int r = 0;
        for (; r + 2 <= rows; r += 2) few_block<2>(p, w, r, k_first, k.stride_t, v_first, v.stride_t, first, n);
        if (r < rows) few_block<1>(p, w, r, k_first, k.stride_t, v_first, v.stride_t, first, n);
    }
}

// b's keys join a's.
LLMCORE_INLINE void few_join(const Problem& p, const FewPart& a, const FewPart& b) {
    for (int r = 0; r < p.rows(); ++r) {
        const float m = a.m[r] > b.m[r] ? a.m[r] : b.m[r];
        const vf of_a = exp2_fast(broadcast((a.m[r] - m) * log2_e)), of_b = exp2_fast(broadcast((b.m[r] - m) * log2_e));
        a.l[r] = a.l[r] * of_a[0] + b.l[r] * of_b[0];
        a.m[r] = m;
        for (int64_t d = r * leading(p.Dv); d < r * leading(p.Dv) + p.Dv; d += VL) {
            store(a.o + d, load(a.o + d) * of_a + load(b.o + d) * of_b);
        }
    }
}

template <class T>
void attend_few(const Problem& p, const Operand& q, const Operand& k, const Operand& v, T* out, float* lse) {
    const int64_t items = p.items();
    const int threads = worth_threads(p) ? max_threads() : 1;
    const int begin = p.lo(0), end = p.hi(p.Tq - 1);
    const int64_t by_keys = (end - begin + 127) / 128;  // shorter parts are not worth it
    const int64_t splits = is_balanced(items, threads) ? 1 : most(least(threads, by_keys), 1);
    const bool concurrent = threads > 1;
    const Block memory(part_size<FewPart>(p) * std::size_t(splits == 1 ? threads : items * splits));
    const std::uintptr_t base = (std::uintptr_t)memory.data;

    const auto finish = [&](int64_t item, const FewPart& w) {
        Row row = p.row(item, 0);
        for (int r = 0; r < p.rows(); ++r, row.next()) {
            write_row(p, row, w.o + r * leading(p.Dv), w.m[r], w.l[r], out, lse);
        }
    };
    parallel_dynamic(concurrent, items * splits, [&](int64_t i, int thread) {
        const int64_t item = i / splits, split = i % splits, n = end - begin;
        const auto w = part_at<FewPart>(base, splits == 1 ? thread : i, p);
        few_part<T>(p, q, k, v, item, int(begin + n * split / splits), int(begin + n * (split + 1) / splits), w);
        if (splits == 1) finish(item, w);
    });
    if (splits == 1) return;
    for (int64_t item = 0; item < items; ++item) {
        const auto w = part_at<FewPart>(base, item * splits, p);
        for (int64_t s = 1; s < splits; ++s) few_join(p, w, part_at<FewPart>(base, item * splits + s, p));
        finish(item, w);
    }
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
