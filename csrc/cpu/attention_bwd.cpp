// Attention, backward, without the matrix of scores.
//
//   p_ij = exp(s_ij - lse_i),   delta_i = dout_i . out_i - dlse_i,   ds_ij = p_ij (dout_i . v_j - delta_i)
//   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dout_i     over the pairs that see each other
//
// FlashAttention-2, Dao, arXiv 2307.08691, section 3.1.2: for each tile of keys, over the blocks of queries, five matrix products.
// dk and dv of the tile are complete after it; dq grows from tile to tile. Where items are fewer than threads their tiles are
// split, each split has a dq of its own, and they are added in order: the result depends on the number of threads only.
//
// B batch, H query heads, K key heads, G = H / K, Tq queries, Tk keys, D and Dv head sizes
#include "cpu/attention.h"
#include "cpu/attention_bwd_amx.h"
#include "cpu/parallel.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// A split's sum for dq.
struct QueryGradient {
    float* sum;

    void place(Layout& layout, const Problem& p) { sum = layout.take<float>(p.blocks() * block_rows * leading(p.D)); }
};

// One thread's tile. Weights p and ds lie as rows of keys, for the sums over queries; ds_pairs, for the sum over keys, holds the
// same ds with the words' elements along the keys. For floats all are one with the scores p and dp are computed from.
template <class M>
struct BwdTile {
    using Word = typename M::Word;
    float *scores, *dp, *dk, *dv;
    Word *p, *ds, *ds_pairs;

    void place(Layout& layout, const Problem& problem) {
        constexpr int size = block_keys * block_rows;
        scores = layout.take<float>(size);
        dp = layout.take<float>(size);
        dk = layout.take<float>(block_keys * leading(problem.D));
        dv = layout.take<float>(block_keys * leading(problem.Dv));
        const bool floats = M::per_word == 1;
        p = floats ? (Word*)scores : layout.take<Word>(size / 2);
        ds = floats ? (Word*)dp : layout.take<Word>(size / 2);
        ds_pairs = floats ? (Word*)dp : layout.take<Word>(size / 2);
    }
};

template <int N>
LLMCORE_INLINE void store_weights(const BwdTile<Floats>& w, int key, int column, const vf (&p)[2 * N], const vf (&ds)[2 * N]) {
    for (int i = 0; i < 2 * N; ++i) {
        const int at = (key + i / N) * block_rows + column + i % N * VL;
        store(w.p + at, p[i]);
        store(w.ds + at, ds[i]);
    }
}

template <int N>
LLMCORE_INLINE void store_weights(const BwdTile<Bf16Pairs>& w, int key, int column, const vf (&p)[2 * N], const vf (&ds)[2 * N]) {
    vh rounded[2 * N];
    for (int i = 0; i < 2 * N; ++i) {
        const int at = (key + i / N) * block_rows / 2 + (column + i % N * VL) / 2;
        rounded[i] = round_to_bf16(ds[i]);
        store_bits(w.p + at, round_to_bf16(p[i]));
        store_bits(w.ds + at, rounded[i]);
    }
    for (int v = 0; v < N; ++v) {
        store_bits(w.ds_pairs + key / 2 * block_rows + column + v * VL, bf16_pairs(rounded[v], rounded[N + v]));
    }
}

// p and ds of N vectors of queries, from `column` on, and the tile's keys [begin, end), both multiples of tile_rows, from the
// products in scores and dp; those of the tile's other keys become 0.
template <class M, int N>
__attribute__((noinline)) void gradient_panel(const BwdTile<M>& w, const BlockRange& range, const float* lse,
                                              const float* delta, int column, int first, int keys, int begin, int end) {
    float *s = w.scores + column, *dp = w.dp + column;
    mask_scores<N>(range, column, first, begin, end, s);
    for (int j = begin; j < end; j += 2) {
        vf p[2 * N], ds[2 * N];
        for (int i = 0; i < 2 * N; ++i) {
            p[i] = (load(s + (j + i / N) * block_rows + i % N * VL) - load(lse + column + i % N * VL)) * log2_e;
        }
        exp2_fast(p);
        for (int i = 0; i < 2 * N; ++i) {
            ds[i] = p[i] * (load(dp + (j + i / N) * block_rows + i % N * VL) - load(delta + column + i % N * VL));
        }
        store_weights<N>(w, j, column, p, ds);
    }
    const auto clear = [&](int from, int to) {
        for (int j = from; j < to; j += 2) {
            const vf zeros[2 * N] = {};
            store_weights<N>(w, j, column, zeros, zeros);
        }
    };
    clear(0, begin);
    clear(begin > end ? begin : end, keys);
}

// The rows of a block, [begin, end), that see one of the keys [key, key + tile_rows).
struct RowRange {
    int begin, end;
    RowRange(const BlockRange& range, int rows, int key) : begin(0), end(rows) {
        while (begin < end && range.hi[begin] <= key) ++begin;
        while (begin < end && range.lo[end - 1] >= key + tile_rows) --end;
    }
};

// What one tile of keys and one block of queries add to the tile's dk and dv and to the block's dq.
template <class M>
void add_block(const Problem& p, const PackedItem<M>& x, const BwdTile<M>& w, int64_t block, int first, int keys, float* dq) {
    constexpr int per_word = M::per_word;
    const int64_t k_stride = leading(p.D / per_word), v_stride = leading(p.Dv / per_word);
    const int64_t d_stride = leading(p.D), dv_stride = leading(p.Dv), first_row = block * block_rows;
    const int rows = p.rows_of(block), padded_rows = round_up(rows, tile_rows), padded_keys = round_up(keys, tile_rows);
    const BlockRange& range = x.range[block];
    by_twos(vectors(rows), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const int column = vector * VL;
        const int begin = range.begin(column, first, keys) / tile_rows * tile_rows;
        const int end = round_up(range.end(column, N * VL, first, keys), tile_rows);
        for (int j = begin; j < end; j += tile_rows) {
            score_tile<M, N>(p.D / per_word, x.k_words + (first + j) * k_stride, k_stride,
                             x.q_columns + first_row * p.D / per_word + column, w.scores + j * block_rows + column,
                             p.scale);
            score_tile<M, N>(p.Dv / per_word, x.v_words + (first + j) * v_stride, v_stride,
                             x.dout_columns + first_row * p.Dv / per_word + column, w.dp + j * block_rows + column,
                             1.0f);
        }
        gradient_panel<M, N>(w, range, x.lse + first_row, x.delta + first_row, column, first, padded_keys, begin, end);
    });

    for (int columns = vectors(rows) * VL, j = 0; columns < padded_rows && j < padded_keys / per_word; ++j) {
        fill_zero(w.ds_pairs + j * block_rows + columns, padded_rows - columns);
    }

    constexpr int most_tiles = block_keys / tile_rows > block_rows / tile_rows ? block_keys / tile_rows : block_rows / tile_rows;
    int64_t begin[most_tiles], words[most_tiles];
    for (int j = 0; j < padded_keys; j += tile_rows) {
        const RowRange seeing(range, rows, first + j);
        begin[j / tile_rows] = seeing.begin / per_word;
        words[j / tile_rows] = round_up(seeing.end, per_word) / per_word - begin[j / tile_rows];
    }
    const auto add = [&](const typename M::Word* weights, const typename M::Word* values, int64_t stride, int64_t n, float* sums) {
        by_twos(vectors(n), [&](auto count, int vector) {
            constexpr int N = decltype(count)::value;
            for (int j = 0; j < padded_keys; j += tile_rows) {
                const int64_t from = begin[j / tile_rows], size = words[j / tile_rows];
                if (size <= 0) continue;
                gradient_tile<M, N>(size, weights + j * block_rows / per_word + from,
                                    values + (first_row / per_word + from) * stride + vector * VL, stride,
                                    sums + j * stride + vector * VL, stride);
            }
        });
    };
    add(w.p, x.dout_rows, dv_stride, p.Dv, w.dv);
    add(w.ds, x.q_rows, d_stride, p.D, w.dk);

    for (int i = 0; i < rows; i += tile_rows) {
        begin[i / tile_rows] = range.begin(i, first, keys) / per_word;
        words[i / tile_rows] = round_up(range.end(i, tile_rows, first, keys), per_word) / per_word - begin[i / tile_rows];
    }
    by_twos(vectors(p.D), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        for (int i = 0; i < rows; i += tile_rows) {
            const int64_t from = begin[i / tile_rows], size = words[i / tile_rows];
            if (size <= 0) continue;
            weighted_sum_tile<M, N>(size, w.ds_pairs + from * block_rows + i,
                                    x.k_rows + (first / per_word + from) * d_stride + vector * VL, d_stride,
                                    dq + (first_row + i) * d_stride + vector * VL, d_stride, nullptr);
        }
    });
}

template <class M, class T>
void add_tile(const Problem& p, const Operands& o, const PackedItem<M>& x, const BwdTile<M>& w, int64_t item, int first, float* dq) {
    const int keys = int(least(p.Tk - first, M::tile_keys));
    const int64_t d_stride = leading(p.D), dv_stride = leading(p.Dv);
    fill_zero(w.dk, M::padded_keys(keys) * d_stride);
    fill_zero(w.dv, M::padded_keys(keys) * dv_stride);
    for (int64_t block = 0; block < p.blocks(); ++block) {
        if (p.meets(block, first, keys)) add_block(p, x, w, block, first, keys, dq);
    }
    for (int j = 0; j < keys; ++j) {
        const int64_t row = p.output_key(item, first + j);
        write_scaled(w.dk + j * d_stride, p.scale, p.D, (T*)o.dk + row * p.D);
        write_scaled(w.dv + j * dv_stride, 1.0f, p.Dv, (T*)o.dv + row * p.Dv);
    }
}

template <class M, class T>
void write_sums(M, const Problem& p, const float* sums, Row row, int rows, T* dq) {
    for (int i = 0; i < rows; ++i, row.next()) {
        write_scaled(sums + i * leading(p.D), p.scale, p.D, dq + p.output_row(row) * p.D);
    }
}

// The splits' sums of a block, added in order and written.
template <class M, class T>
void write_dq(const Problem& p, int64_t item, int64_t block, const Parts<QueryGradient>& sums, int64_t first_sum, int64_t splits,
              T* dq) {
    const int64_t size = block_rows * leading(p.D);
    float* total = sums.at(first_sum).sum + block * size;
    for (int64_t s = 1; s < splits; ++s) {
        const float* more = sums.at(first_sum + s).sum + block * size;
        for (int64_t i = 0; i < size; i += VL) store(total + i, load(total + i) + load(more + i));
    }
    write_sums(M{}, p, total, p.row(item, block * block_rows), p.rows_of(block), dq);
}

// The tiles [begin, end) of a split: shares of the (tile, block) pairs that meet as equal as whole tiles allow.
struct Share {
    int64_t begin = 0, end = 0;
    Share(const Problem& p, int64_t split, int64_t splits, int tile_keys) {
        const int64_t tiles = (p.Tk + tile_keys - 1) / tile_keys;
        const auto cost = [&](int64_t tile) {
            int64_t n = 1;
            for (int64_t block = 0; block < p.blocks(); ++block) n += p.meets(block, int(tile * tile_keys), tile_keys);
            return n;
        };
        int64_t total = 0, before = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) total += cost(tile);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            if (before * splits < total * split) begin = tile + 1;
            if (before * splits < total * (split + 1)) end = tile + 1;
            before += cost(tile);
        }
    }
};

// With enough items each thread takes whole ones. Otherwise all are packed first and the threads share their tiles.
template <class M, class T>
void backward(const Problem& p, const Operands& o) {
    const int64_t items = p.items(), blocks = p.blocks(), tiles = (p.Tk + M::tile_keys - 1) / M::tile_keys;
    const int threads = worth_threads(p) ? max_threads() : 1;
    int64_t splits = 1;
    while (!is_balanced(items * splits, threads) && splits < least(tiles, 2 * threads)) ++splits;
    const bool whole = splits == 1;
    const Parts<BwdTile<M>> work(p, threads);
    const Parts<BwdPacking<M>> packing(p, threads);
    const Parts<PackedItem<M>> packs(p, whole ? threads : items);
    const Parts<QueryGradient> sums(p, whole ? threads : items * splits);

    const auto add_tiles = [&](int64_t item, const Share& share, const PackedItem<M>& x, const BwdTile<M>& w, float* dq) {
        fill_zero(dq, blocks * block_rows * leading(p.D));
        for (int64_t tile = share.begin; tile < share.end; ++tile) add_tile<M, T>(p, o, x, w, item, int(tile * M::tile_keys), dq);
    };
    if (whole) {
        const Share all(p, 0, 1, M::tile_keys);
        parallel_dynamic(threads > 1, items, [&](int64_t item, int thread) {
            const PackedItem<M> x = packs.at(thread);
            pack_keys<T>(p, o, item, 0, p.Tk, x);
            for (int64_t block = 0; block < blocks; ++block) pack_block<M, T>(p, o, item, block, packing.at(thread), x);
            add_tiles(item, all, x, work.at(thread), sums.at(thread).sum);
            for (int64_t block = 0; block < blocks; ++block) write_dq<M>(p, item, block, sums, thread, 1, (T*)o.dq);
        });
        return;
    }
    const int64_t shares = pack_shares(p.Tk), parts = blocks + shares;
    parallel_dynamic(true, items * parts, [&](int64_t i, int thread) {
        const int64_t item = i / parts, part = i % parts, begin = (part - blocks) * pack_share;
        if (part < blocks) {
            pack_block<M, T>(p, o, item, part, packing.at(thread), packs.at(item));
        } else {
            pack_keys<T>(p, o, item, begin, least(begin + pack_share, p.Tk), packs.at(item));
        }
    });
    parallel_dynamic(true, items * splits, [&](int64_t i, int thread) {
        add_tiles(i / splits, Share(p, i % splits, splits, M::tile_keys), packs.at(i / splits), work.at(thread), sums.at(i).sum);
    });
    parallel_dynamic(true, items * blocks, [&](int64_t i, int) {
        write_dq<M>(p, i / blocks, i % blocks, sums, i / blocks * splits, splits, (T*)o.dq);
    });
}

}  // namespace

void attention_bwd(const void* dout, const float* dlse, const void* q, const void* k, const void* v, const void* out,
                   const float* lse, void* dq, void* dk, void* dv, int64_t B, int64_t H, int64_t K, int64_t Tq, int64_t Tk,
                   int64_t D, int64_t Dv, int64_t do_stride_b, int64_t do_stride_t, int64_t do_stride_h, int64_t q_stride_b,
                   int64_t q_stride_t, int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t, int64_t k_stride_h,
                   int64_t v_stride_b, int64_t v_stride_t, int64_t v_stride_h, float softmax_scale, int64_t window_left,
                   int64_t window_right, DType dtype) {
    if (B == 0 || H == 0) return;
    const Problem p{B, H, K, Tq, Tk, D, Dv, softmax_scale, window_left, window_right};
    const Operands o{{q, q_stride_b, q_stride_t, q_stride_h},
                     {k, k_stride_b, k_stride_t, k_stride_h},
                     {v, v_stride_b, v_stride_t, v_stride_h},
                     {dout, do_stride_b, do_stride_t, do_stride_h},
                     {out, Tq * H * Dv, H * Dv, Dv},
                     lse,
                     dlse,
                     dq,
                     dk,
                     dv};
    with_element(dtype, [&](auto element) { backward<typename Products<decltype(element)>::type, decltype(element)>(p, o); });
}

}  // namespace llmcore::LLMCORE_ISA
