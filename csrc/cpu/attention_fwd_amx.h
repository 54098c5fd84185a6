// Attention's forward on AMX tiles: what a block of queries and a tile of keys are, and how the one attends to the other.
#pragma once

#include "cpu/attention_amx.h"
#include "cpu/attention_partial.h"

#if defined(LLMCORE_TILES)
namespace llmcore::LLMCORE_ISA {
namespace {

template <class M>
struct PackedKeys;
template <class M>
struct FwdBlock;

template <>
struct PackedKeys<Bf16Tiles> {
    uint32_t *k, *v;
    int first = 0;

    void take(Layout& layout, const Problem& p, int64_t count) {
        const int64_t padded = (count + 31) / 32 * 32;
        k = layout.take<uint32_t>(padded * leading(p.D / 2));
        v = layout.take<uint32_t>(padded / 32 * transposed_words(p.Dv));
    }
    template <class T>
    void pack(const Problem& p, const Operand& keys, const Operand& values, int64_t item, int64_t begin, int64_t end, bool) const {
        pack_tile_keys(p.keys<T>(keys, item) + first * keys.stride_t, keys.stride_t, begin, end, p.D, k);
        pack_transposed_keys(p.keys<T>(values, item) + first * values.stride_t, values.stride_t, begin, end, p.Dv, v);
    }
};

template <>
struct FwdBlock<Bf16Tiles> {
    uint32_t *q_rows, *q, *weights;  // weights: one panel's, pairs of keys
    float *scores, *sums;            // scores: one panel's; sums: o, transposed
    BlockRange* range;

    void place(Layout& layout, const Problem& p) {
        q_rows = layout.take<uint32_t>(block_rows * leading(p.D / 2));
        q = layout.take<uint32_t>(Bf16Tiles::words(p.D) * block_rows);
        weights = layout.take<uint32_t>(Bf16Tiles::tile_keys / 2 * panel_rows);
        scores = layout.take<float>(Bf16Tiles::tile_keys * panel_rows);
        sums = layout.take<float>(tiles(p.Dv) * tile_size * block_rows);
        range = layout.take<BlockRange>(1);
    }
    void begin(const Problem& p) const { fill_zero(sums, tiles(p.Dv) * tile_size * block_rows); }
    void end(const Problem& p, const Partial& partial, int rows) const {
        const int64_t stride = leading(p.Dv);
        for (int i = 0; i < rows; i += 4)
            for (int64_t d = 0; d < p.Dv; d += VL) {
                transpose_to_vectors(sums + d * block_rows + i, block_rows, partial.o + i * stride + d, stride);
            }
    }
};

// Weights of a panel of N vectors of queries, from `column` on, and the tile's keys [begin, end), from the products in scores;
// l and the sums are rescaled to the new maximum.
template <int N>
__attribute__((noinline)) void softmax_panel(const Problem& p, const FwdBlock<Bf16Tiles>& w, const Partial& partial, int column,
                                             int first, int begin, int end) {
    vf old[N], largest[N], shift[N], sum[2][N];
    vi lo[N], hi[N];
    for (int v = 0; v < N; ++v) {
        old[v] = largest[v] = load(partial.m + column + v * VL);
        lo[v] = load_bits<vi>(w.range->lo + column + v * VL) - first;
        hi[v] = load_bits<vi>(w.range->hi + column + v * VL) - first;
        sum[0][v] = sum[1][v] = zero();
    }
    const auto hide = [&](int j, int v, auto edge, vf x) LLMCORE_INLINED {
        if constexpr (decltype(edge)::value) return select((lo[v] <= j) & (hi[v] > j), x, broadcast(-infinity));
        return x;
    };
    for_key_pairs<N>(*w.range, column, first, begin, end, [&](int j, auto edge) LLMCORE_INLINED {
        for (int i = 0; i < 2 * N; ++i) {
            const int key = j + i / N, v = i % N;
            largest[v] = max(hide(key, v, edge, load(w.scores + key * panel_rows + v * VL) * p.scale), largest[v]);
        }
    });
    for (int v = 0; v < N; ++v) shift[v] = largest[v] * log2_e;
    for_key_pairs<N>(*w.range, column, first, begin, end, [&](int j, auto edge) LLMCORE_INLINED {
        vf x[2 * N];
        for (int i = 0; i < 2 * N; ++i) {
            const int key = j + i / N, v = i % N;
            const vf s = load(w.scores + key * panel_rows + v * VL);
            x[i] = hide(key, v, edge, s * (p.scale * log2_e) - shift[v]);
        }
        exp2_fast(x);
        for (int i = 0; i < 2 * N; ++i) sum[i / N][i % N] += x[i];
        for (int v = 0; v < N; ++v) store_bits(w.weights + j / 2 * panel_rows + v * VL, round_to_pairs(x[v], x[N + v]));
    });
    for (int v = 0; v < N; ++v) {
        float *m = partial.m + column + v * VL, *l = partial.l + column + v * VL, *o = w.sums + column + v * VL;
        const vf rescale = exp2_fast((old[v] - largest[v]) * log2_e);
        store(m, largest[v]);
        store(l, fmadd(load(l), rescale, sum[0][v] + sum[1][v]));
        if (reduce_max(largest[v] - old[v]) <= 0.0f) continue;
        for (int64_t d = 0; d < p.Dv; ++d) store(o + d * block_rows, load(o + d * block_rows) * rescale);
    }
}

// Panel by panel: scores, softmax, sums.
inline void attend_tile(const Problem& p, const PackedKeys<Bf16Tiles>& packed, const FwdBlock<Bf16Tiles>& w, const Partial& partial,
                        int rows, int first, int keys) {
    const TileRegisters registers;
    const int64_t packed_first = first - packed.first;
    by_twos(vectors(rows), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const int column = vector * VL;
        const int begin = w.range->begin(column, first, keys) & -32;
        const int end = round_up(w.range->end(column, N * VL, first, keys), tile_size), padded = round_up(end, 32);
        if (begin >= end) return;
        multiply_column<N>((end - begin) / tile_size, Bf16Tiles::words(p.D) / tile_size,
                           tile_rows_at(packed.k, packed_first + begin, p.D), w.q + column, block_rows,
                           w.scores + begin * panel_rows, panel_rows, false);
        softmax_panel<N>(p, w, partial, column, first, begin, end);
        fill_zero(w.weights + end / 2 * panel_rows, (padded - end) / 2 * panel_rows);
        multiply_column<N>(tiles(p.Dv), (padded - begin) / 32, transposed_keys_at(packed.v, packed_first + begin, p.Dv),
                           w.weights + begin / 2 * panel_rows, panel_rows, w.sums + column, block_rows, true);
    });
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
#endif
