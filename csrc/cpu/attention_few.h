// Attention, forward, of few queries against many keys, as in generation with a cache: every key and value is read once, where it
// lies, and the time is that of reading them. Scores are dot products along a key's row, the lanes of the softmax are keys.
#pragma once

#include "cpu/attention_partial.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr int few_rows = 8;   // at most
constexpr int few_keys = 64;  // of a block

// One thread's working space.
struct FewBlock {
    float *q, *weights, *rescale;

    void place(Layout& layout, const Problem& p) {
        q = layout.take<float>(few_rows * leading(p.D));
        weights = layout.take<float>(few_rows * few_keys);
        rescale = layout.take<float>(few_rows);
    }
};

// scores[r][j] = scale q_r . k_j of R rows and J keys, each in two sums: shorter chains are faster and more accurate
template <int R, int J, class T>
LLMCORE_INLINE void few_scores(const float* q, int64_t q_stride, const T* k, int64_t k_stride, int64_t D, float scale,
                               float* scores) {
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
        for (int j = 0; j < J; ++j) scores[r * few_keys + j] = reduce_sum(acc[0][r][j] + acc[1][r][j]) * scale;
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
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; ++i) {
            float* to = o + r * o_stride + i * VL;
            store(to, fmadd(load(to), broadcast(rescale[r]), acc[r][i]));
        }
    }
}

// One row's scores of n keys become weights; keys outside [begin, end) are not seen.
LLMCORE_INLINE void few_softmax(float* s, int n, int begin, int end, float& m, float& l, float& rescale) {
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

// R rows from `row` on and n keys from `first` on.
template <int R, class T>
void few_block(const Problem& p, const FewBlock& w, const Partial& partial, int row, const T* k, int64_t k_stride, const T* v,
               int64_t v_stride, int first, int n) {
    const int64_t q_stride = leading(p.D), o_stride = leading(p.Dv);
    const float* q = w.q + row * q_stride;
    float *s = w.weights + row * few_keys, *o = partial.o + row * o_stride, *rescale = w.rescale + row;
    int j = 0;
    for (; j + 4 / R <= n; j += 4 / R) few_scores<R, 4 / R>(q, q_stride, k + j * k_stride, k_stride, p.D, p.scale, s + j);
    for (; j < n; ++j) few_scores<R, 1>(q, q_stride, k + j * k_stride, k_stride, p.D, p.scale, s + j);
    for (int r = 0; r < R; ++r) {
        const int64_t t = (row + r) / p.G();
        const int begin = BlockRange::clamp(p.lo(t) - first, n), end = BlockRange::clamp(p.hi(t) - first, n);
        few_softmax(s + r * few_keys, n, begin, end, partial.m[row + r], partial.l[row + r], rescale[r]);
    }
    int64_t d = 0;
    for (; d + 4 * VL <= p.Dv; d += 4 * VL) few_sums<R, 4>(s, v + d, v_stride, n, VL, rescale, o + d, o_stride);
    for (; d < p.Dv; d += VL) few_sums<R, 1>(s, v + d, v_stride, n, int(least(p.Dv - d, VL)), rescale, o + d, o_stride);
}

template <class T>
void attend_few(const Problem& p, const Operand& q, const Operand& k, const Operand& v, T* out, float* lse) {
    const int threads = worth_threads(p) ? max_threads() : 1, rows = int(p.rows());
    const Parts<FewBlock> work(p, threads);
    attend_blocks<Floats>(p, threads, out, lse, [&](int64_t item, int64_t, int begin, int end, const Partial& partial, int thread) {
        const FewBlock w = work.at(thread);
        Row row = p.row(item, 0);
        for (int r = 0; r < rows; ++r, row.next()) pack_row(Floats{}, p.query<T>(q, row), p.D, w.q + r * leading(p.D));
        for (int first = begin; first < end; first += few_keys) {
            const int n = int(least(end - first, few_keys));
            const T* keys = p.keys<T>(k, item) + first * k.stride_t;
            const T* values = p.keys<T>(v, item) + first * v.stride_t;
            int r = 0;
            for (; r + 2 <= rows; r += 2) few_block<2>(p, w, partial, r, keys, k.stride_t, values, v.stride_t, first, n);
            if (r < rows) few_block<1>(p, w, partial, r, keys, k.stride_t, values, v.stride_t, first, n);
        }
    });
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
