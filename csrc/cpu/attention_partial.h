// A block of queries over some of its keys, and how such parts are shared among threads and joined.
//
// For each row: m the largest score, l = sum_j exp(s_j - m), o = sum_j exp(s_j - m) v_j. Two parts join to
//   m = max(m1, m2),   l = exp(m1 - m) l1 + exp(m2 - m) l2,   o likewise;     out = o / l,   lse = m + log l
// (as the blocks of "Online normalizer calculation for softmax", Milakov and Gimelshein, arXiv 1805.02867). Parts are joined in
// order: the result does not depend on which thread computed them.
#pragma once

#include <cfloat>
#include <cmath>

#include "cpu/attention_pack.h"
#include "cpu/parallel.h"

namespace llmcore::LLMCORE_ISA {
namespace {

struct Partial {
    float *o, *m, *l;

    void place(Layout& layout, const Problem& p) {
        o = layout.take<float>(block_rows * leading(p.Dv));
        m = layout.take<float>(block_rows);
        l = layout.take<float>(block_rows);
    }
    void clear(const Problem& p, int rows) const {
        fill_zero(o, round_up(rows, tile_rows) * leading(p.Dv));
        for (int i = 0; i < block_rows; ++i) {
            m[i] = -FLT_MAX;  // finite: a difference of two is never a NaN
            l[i] = 0.0f;
        }
    }
    void join(const Problem& p, int rows, const Partial& x) const {
        for (int i = 0; i < rows; ++i) {
            const float larger = m[i] > x.m[i] ? m[i] : x.m[i];
            const vf mine = exp2_fast(broadcast((m[i] - larger) * log2_e));
            const vf other = exp2_fast(broadcast((x.m[i] - larger) * log2_e));
            m[i] = larger;
            l[i] = l[i] * mine[0] + x.l[i] * other[0];
            for (int64_t d = i * leading(p.Dv); d < i * leading(p.Dv) + p.Dv; d += VL) {
                store(o + d, load(o + d) * mine + load(x.o + d) * other);
            }
        }
    }
    template <class T>
    void write(const Problem& p, int64_t item, int64_t block, T* out, float* lse) const {
        Row row = p.row(item, block * block_rows);
        for (int i = 0; i < p.rows_of(block); ++i, row.next()) {
            const bool empty = l[i] == 0.0f;
            write_scaled(o + i * leading(p.Dv), empty ? 0.0f : 1.0f / l[i], p.Dv, out + p.output_row(row) * p.Dv);
            lse[p.lse_index(row)] = empty ? -infinity : m[i] + std::log(l[i]);
        }
    }
};

// attend(item, block, begin, end, partial, thread) adds the keys [begin, end) to a cleared partial, for all blocks of all items,
// those that see most keys first. Where blocks are too few for the threads their keys are split; begin is a multiple of M::key_step.
template <class M, class T, class F>
void attend_blocks(const Problem& p, int threads, T* out, float* lse, const F& attend) {
    const int64_t blocks = p.blocks(), units = p.items() * blocks, pieces = (p.Tk + M::tile_keys - 1) / M::tile_keys;
    int64_t splits = 1;
    while (!is_balanced(units * splits, threads) && 2 * splits < pieces && splits < 2 * threads) ++splits;
    const Parts<Partial> partials(p, splits == 1 ? threads : units * splits);
    parallel_dynamic(threads > 1, units * splits, [&](int64_t i, int thread) {
        const int64_t split = i % splits, block = blocks - 1 - i / splits % blocks, item = i / splits / blocks;
        const Partial partial = partials.at(splits == 1 ? thread : i);
        partial.clear(p, p.rows_of(block));
        const int first = p.block_lo(block) & -M::key_step, last = p.block_hi(block);
        const int64_t tiles = (last - first + M::tile_keys - 1) / M::tile_keys;
        const int begin = first + int(tiles * split / splits) * M::tile_keys;
        const int end = split + 1 == splits ? last : first + int(tiles * (split + 1) / splits) * M::tile_keys;
        attend(item, block, begin, end, partial, thread);
        if (splits == 1) partial.write(p, item, block, out, lse);
    });
    if (splits == 1) return;
    parallel_dynamic(threads > 1, units, [&](int64_t i, int) {
        const int64_t block = blocks - 1 - i % blocks;
        const Partial total = partials.at(i * splits);
        for (int64_t s = 1; s < splits; ++s) total.join(p, p.rows_of(block), partials.at(i * splits + s));
        total.write(p, i / blocks, block, out, lse);
    });
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
