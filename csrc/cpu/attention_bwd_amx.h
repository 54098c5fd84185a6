// Attention's backward on AMX tiles: packing, and what one tile of keys and one block of queries add to the gradients.
#pragma once

#include "cpu/attention_amx.h"
#include "cpu/attention_bwd_pack.h"

#if defined(LLMCORE_TILES)
namespace llmcore::LLMCORE_ISA {
namespace {

template <class M>
struct BwdTile;

// One thread's tile. scores, dp and ds_pairs are one panel's; p and ds, the A sides of sums over queries, are the whole block's, as
// rows of keys.
template <>
struct BwdTile<Bf16Tiles> {
    float *scores, *dp, *dk, *dv;
    uint32_t *p, *ds, *ds_pairs;

    void place(Layout& layout, const Problem& problem) {
        constexpr int keys = Bf16Tiles::tile_keys;
        scores = layout.take<float>(keys * panel_rows);
        dp = layout.take<float>(keys * panel_rows);
        dk = layout.take<float>(keys * leading(problem.D));
        dv = layout.take<float>(keys * leading(problem.Dv));
        p = layout.take<uint32_t>(keys * block_rows / 2);
        ds = layout.take<uint32_t>(keys * block_rows / 2);
        ds_pairs = layout.take<uint32_t>(keys / 2 * panel_rows);
    }
};

// As for pairs, and zeros up to whole tiles.
template <class T>
void pack_queries(Bf16Tiles, const Problem& p, const Operand& x, Row row, int rows, int64_t n, uint32_t* words, uint32_t* columns,
                  uint32_t* to) {
    pack_queries<T>(Bf16Pairs{}, p, x, row, rows, n, words, columns, to);
    fill_zero(columns + n / 2 * block_rows, (Bf16Tiles::words(n) - n / 2) * block_rows);
    const int pairs = (rows + 1) / 2;
    fill_zero(to + pairs * leading(n), (round_up(rows, panel_rows) / 2 - pairs) * leading(n));
}

template <class T>
void set_delta(Bf16Tiles, const Problem& p, const Operand& out, Row row, int rows, const BwdPacking<Bf16Tiles>& w,
               const uint32_t* dout_columns, float* delta) {
    const int64_t stride = leading(p.Dv / 2);
    const TileRegisters registers;
    for (int i = 0; i < rows; ++i, row.next()) pack_row(Bf16Pairs{}, p.query<T>(out, row), p.Dv, w.words + i * stride);
    fill_zero(w.words + rows * stride, (round_up(rows, tile_size) - rows) * stride);
    for (int first = 0; first < rows; first += tile_size) {
        float products[tile_size][tile_size];
        multiply_tiles<1, 1>(Bf16Tiles::words(p.Dv) / tile_size, tile_rows_at(w.words, first, p.Dv), dout_columns + first, block_rows,
                             products[0], tile_size, false);
        for (int i = 0; i < tile_size; ++i) delta[first + i] = products[i][i];
    }
}

template <class T>
void pack_keys(const Problem& p, const Operands& x, int64_t item, int64_t begin, int64_t end, const PackedItem<Bf16Tiles>& to) {
    const T *k = p.keys<T>(x.k, item), *v = p.keys<T>(x.v, item);
    pack_tile_keys(k, x.k.stride_t, begin, end, p.D, to.k_words);
    pack_tile_keys(v, x.v.stride_t, begin, end, p.Dv, to.v_words);
    pack_transposed_keys(k, x.k.stride_t, begin, end, p.D, to.k_rows);
}

// A row of a panel; the panel's second vector, where it has none, is zeros.
LLMCORE_INLINE void store_row(uint32_t* to, const vf* x, bool two) {
    store_bits(to, round_to_bf16(x[0]));
    store_bits(to + VL / 2, two ? round_to_bf16(x[1]) : vh{});
}

// p and ds of a panel of N vectors of queries, from `column` on, and the tile's keys [begin, end), from the products in scores and dp;
// zeros up to `padded`.
template <int N>
__attribute__((noinline)) void gradient_panel(const Problem& problem, const BwdTile<Bf16Tiles>& w, const BlockRange& range,
                                              const float* lse, const float* delta, int column, int first, int begin, int end,
                                              int padded) {
    constexpr int stride = block_rows / 2;
    uint32_t *p_rows = w.p + column / 2, *ds_rows = w.ds + column / 2;
    vf shift[N], d[N];
    vi lo[N], hi[N];
    for (int v = 0; v < N; ++v) {
        shift[v] = load(lse + column + v * VL) * log2_e;
        d[v] = load(delta + column + v * VL);
        lo[v] = load_bits<vi>(range.lo + column + v * VL) - first;
        hi[v] = load_bits<vi>(range.hi + column + v * VL) - first;
    }
    const auto store_weights = [&](int j, const vf(&p)[2 * N], const vf(&ds)[2 * N]) LLMCORE_INLINED {
        for (int i = 0; i < 2; ++i) {
            store_row(p_rows + (j + i) * stride, p + i * N, N == 2);
            store_row(ds_rows + (j + i) * stride, ds + i * N, N == 2);
        }
        for (int v = 0; v < N; ++v) store_bits(w.ds_pairs + j / 2 * panel_rows + v * VL, round_to_pairs(ds[v], ds[N + v]));
    };
    for_key_pairs<N>(range, column, first, begin, end, [&](int j, auto edge) LLMCORE_INLINED {
        vf p[2 * N], ds[2 * N];
        for (int i = 0; i < 2 * N; ++i) {
            const int key = j + i / N, v = i % N;
            p[i] = load(w.scores + key * panel_rows + v * VL) * (problem.scale * log2_e) - shift[v];
            if constexpr (decltype(edge)::value) p[i] = select((lo[v] <= key) & (hi[v] > key), p[i], broadcast(-infinity));
        }
        exp2_fast(p);
        for (int i = 0; i < 2 * N; ++i) ds[i] = p[i] * (load(w.dp + (j + i / N) * panel_rows + i % N * VL) - d[i % N]);
        store_weights(j, p, ds);
    });
    const vf zeros[2 * N] = {};
    for (int j = end; j < padded; j += 2) store_weights(j, zeros, zeros);
}

// Panel by panel: scores, dp, the weights, dq. Then dv and dk over the block's panels.
inline void add_block(const Problem& p, const PackedItem<Bf16Tiles>& x, const BwdTile<Bf16Tiles>& w, int64_t block, int first, int keys,
                      float* dq) {
    const TileRegisters registers;
    const int64_t d_stride = leading(p.D), dv_stride = leading(p.Dv), first_row = block * block_rows;
    const int64_t words = Bf16Tiles::words(p.D), dv_words = Bf16Tiles::words(p.Dv);
    const int rows = p.rows_of(block), panels = (rows + panel_rows - 1) / panel_rows;
    const BlockRange& range = x.range[block];
    int from[block_rows / panel_rows], to[block_rows / panel_rows];  // the keys of a panel
    by_twos(vectors(rows), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const int column = vector * VL;
        const int begin = range.begin(column, first, keys) & -32;
        const int end = round_up(range.end(column, N * VL, first, keys), tile_size), padded = round_up(end, 32);
        from[column / panel_rows] = begin;
        to[column / panel_rows] = padded;
        if (begin >= end) return;
        multiply_column<N>((end - begin) / tile_size, words / tile_size, tile_rows_at(x.k_words, first + begin, p.D),
                           x.q_columns + first_row * words + column, block_rows, w.scores + begin * panel_rows, panel_rows, false);
        multiply_column<N>((end - begin) / tile_size, dv_words / tile_size, tile_rows_at(x.v_words, first + begin, p.Dv),
                           x.dout_columns + first_row * dv_words + column, block_rows, w.dp + begin * panel_rows, panel_rows, false);
        gradient_panel<N>(p, w, range, x.lse + first_row, x.delta + first_row, column, first, begin, end, padded);
        multiply_column<N>(tiles(p.D), (padded - begin) / 32, transposed_keys_at(x.k_rows, first + begin, p.D),
                           w.ds_pairs + begin / 2 * panel_rows, panel_rows, dq + first_row * d_stride + column, block_rows, true);
    });
    const auto add = [&](const uint32_t* weights, const uint32_t* values, int64_t stride, int64_t n, float* sums) {
        for (int j = 0; j < keys; j += 32) {
            int begin = 0, end = panels;
            while (begin < end && to[begin] <= j) ++begin;
            while (begin < end && from[end - 1] > j) --end;
            if (begin == end) continue;
            constexpr int row = block_rows / 2;
            const TileRows a{weights + j * row + begin * tile_size, row, tile_size * row, tile_size};
            const uint32_t* b = values + (first_row / 2 + begin * tile_size) * stride;
            by_twos(vectors(n), [&](auto count, int vector) {
                constexpr int N = decltype(count)::value;
                const int column = vector * VL;
                multiply_tiles<2, N>(end - begin, a, b + column, stride, sums + j * stride + column, stride, true);
            });
        }
    };
    add(w.p, x.dout_rows, dv_stride, p.Dv, w.dv);
    add(w.ds, x.q_rows, d_stride, p.D, w.dk);
}

// dq of a block from its sums, which are transposed.
template <class T>
void write_sums(Bf16Tiles, const Problem& p, const float* sums, Row row, int rows, T* dq) {
    for (int first = 0; first < rows; first += 4) {
        T* to[4];
        const int count = int(least(rows - first, 4));
        for (int i = 0; i < count; ++i, row.next()) to[i] = dq + p.output_row(row) * p.D;
        for (int64_t d = 0; d < p.D; d += VL) {
            float four[4][VL];
            transpose_to_vectors(sums + d * block_rows + first, block_rows, four[0], VL);
            for (int i = 0; i < count; ++i) write_scaled(four[i], p.scale, least(p.D - d, VL), to[i] + d);
        }
    }
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
#endif
