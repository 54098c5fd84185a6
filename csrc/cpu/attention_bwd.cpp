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
#include "cpu/attention_pack.h"

namespace llmcore::LLMCORE_ISA {
namespace {

struct Operands {
    Operand q, k, v, dout, out;
    const float *lse, *dlse;
    void *dq, *dk, *dv;
};

// An item's operands. "columns": transposed, the vector side of scores; "rows": the vector side of sums over queries (or over
// keys, for k); "words": the broadcast side.
template <class M>
struct PackedItem {
    using Word = typename M::Word;
    Word *q_columns, *q_rows, *dout_columns, *dout_rows, *k_words, *k_rows, *v_words;
    float *lse, *delta;
    BlockRange* range;

    void place(Layout& layout, const Problem& p) {
        const int64_t blocks = p.blocks(), rows = blocks * block_rows;
        q_columns = layout.take<Word>(rows * p.D / M::per_word);
        q_rows = layout.take<Word>(rows / M::per_word * leading(p.D));
        dout_columns = layout.take<Word>(rows * p.Dv / M::per_word);
        dout_rows = layout.take<Word>(rows / M::per_word * leading(p.Dv));
        k_words = layout.take<Word>((p.Tk + tile_rows) * leading(p.D / M::per_word));
        k_rows = M::per_word == 1 ? k_words : layout.take<Word>((p.Tk + 1) / 2 * leading(p.D));
        v_words = layout.take<Word>((p.Tk + tile_rows) * leading(p.Dv / M::per_word));
        lse = layout.take<float>(rows);
        delta = layout.take<float>(rows);
        range = layout.take<BlockRange>(blocks);
    }
};

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
    Word *p, *ds, *ds_pairs, *rows, *out_columns, *out_rows;

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
        out_columns = layout.take<Word>(block_rows * problem.Dv / M::per_word);
        out_rows = layout.take<Word>(block_rows / M::per_word * leading(problem.Dv));
        rows = floats ? nullptr : layout.take<Word>(block_rows * leading(most(problem.D, problem.Dv) / 2));
    }
};

// One block of q or dout: `rows` of n elements, then zeros up to the end of their last vector.
template <class T>
void pack_queries(Floats m, const Operand& x, Row row, int rows, int64_t n, float*, float* columns, float* to) {
    const int64_t stride = leading(n);
    for (int i = 0; i < rows; ++i, row.next()) pack_row(m, x.at<T>(row.b, row.t, row.h()), n, to + i * stride);
    const int padded = vectors(rows) * VL;
    fill_zero(to + rows * stride, (padded - rows) * stride);
    pack_transposed(to, stride, padded, n, columns);
}

template <class T>
void pack_queries(Bf16Pairs m, const Operand& x, Row row, int rows, int64_t n, uint32_t* words, uint32_t* columns,
                  uint32_t* to) {
    const int64_t words_stride = leading(n / 2);
    const T* even = nullptr;
    for (int i = 0; i < rows; ++i, row.next()) {
        const T* from = x.at<T>(row.b, row.t, row.h());
        pack_row(m, from, n, words + i * words_stride);
        if (i % 2 == 0) even = from;
        if (i % 2 == 1 || i + 1 == rows) pack_row_pair(even, i % 2 == 1 ? from : nullptr, n, to + i / 2 * leading(n));
    }
    const int padded = vectors(rows) * VL;
    fill_zero(words + rows * words_stride, (padded - rows) * words_stride);
    pack_transposed(words, words_stride, padded, n / 2, columns);
}

// dout_i . out_i, summed in the same order as the products dout_i . v_j: for a row that sees one key, whose out is v_j, they are
// then equal and ds is exactly 0.
template <class M>
void set_delta(const typename M::Word* dout_columns, const typename M::Word* out_columns, int64_t words, int rows, float* delta) {
    using Words = typename M::Words;
    for (int i = 0; i < rows; i += VL) {
        vf sum = zero();
        for (int64_t from = 0; from < words; from += sum_part(words)) {
            vf part = zero();
            for (int64_t k = from; k < least(from + sum_part(words), words); ++k) {
                const int64_t at = k * block_rows + i;
                part = multiply_add(load_bits<Words>(out_columns + at), load_bits<Words>(dout_columns + at), part);
            }
            sum += part;
        }
        store(delta + i, sum);
    }
}

template <class M, class T>
void pack_block(const Problem& p, const Operands& x, int64_t item, int64_t block, const BwdTile<M>& w, const PackedItem<M>& to) {
    const int64_t first = block * block_rows, dv_words = p.Dv / M::per_word;
    const int rows = int(least(p.rows() - first, block_rows));
    Row row = p.row(item, first);
    to.range[block].set(p, row, rows);
    pack_queries<T>(M{}, x.q, row, rows, p.D, w.rows, to.q_columns + first * p.D / M::per_word,
                    to.q_rows + first / M::per_word * leading(p.D));
    pack_queries<T>(M{}, x.dout, row, rows, p.Dv, w.rows, to.dout_columns + first * dv_words,
                    to.dout_rows + first / M::per_word * leading(p.Dv));
    pack_queries<T>(M{}, x.out, row, rows, p.Dv, w.rows, w.out_columns, w.out_rows);
    float *lse = to.lse + first, *delta = to.delta + first;
    set_delta<M>(to.dout_columns + first * dv_words, w.out_columns, dv_words, rows, delta);
    for (int i = 0; i < rows; ++i, row.next()) {
        const int64_t at = p.lse_index(row);
        const bool seeing = x.lse[at] != -infinity;
        lse[i] = seeing ? x.lse[at] : infinity;  // a row that sees nothing gets weights 0
        delta[i] = seeing ? delta[i] - (x.dlse == nullptr ? 0.0f : x.dlse[at]) : 0.0f;
    }
    for (int i = rows; i < block_rows; ++i) {
        lse[i] = infinity;
        delta[i] = 0.0f;
    }
}

template <class M, class T>
void pack_keys(const Problem& p, const Operands& x, int64_t item, const PackedItem<M>& to) {
    const T *k = p.keys<T>(x.k, item), *v = p.keys<T>(x.v, item);
    pack_broadcast_keys(M{}, k, x.k.stride_t, p.Tk, p.D, to.k_words);
    pack_broadcast_keys(M{}, v, x.v.stride_t, p.Tk, p.Dv, to.v_words);
    if constexpr (M::per_word == 2) pack_vector_keys(M{}, k, x.k.stride_t, p.Tk, p.D, to.k_rows);
}

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
    const int rows = int(least(p.rows() - first_row, block_rows)), padded_keys = round_up(keys, tile_rows);
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
    const int keys = int(least(p.Tk - first, block_keys));
    const int64_t d_stride = leading(p.D), dv_stride = leading(p.Dv);
    fill_zero(w.dk, round_up(keys, tile_rows) * d_stride);
    fill_zero(w.dv, round_up(keys, tile_rows) * dv_stride);
    for (int64_t block = 0; block < p.blocks(); ++block) {
        if (p.meets(block, first, keys)) add_block(p, x, w, block, first, keys, dq);
    }
    for (int j = 0; j < keys; ++j) {
        const int64_t row = (item / p.K * p.Tk + first + j) * p.K + item % p.K;
        write_scaled(w.dk + j * d_stride, p.scale, p.D, (T*)o.dk + row * p.D);
        write_scaled(w.dv + j * dv_stride, 1.0f, p.Dv, (T*)o.dv + row * p.Dv);
    }
}

// The splits' sums of a block, added in order and written.
template <class T>
void write_dq(const Problem& p, int64_t item, int64_t block, std::uintptr_t sums, int64_t first_sum, int64_t splits, T* dq) {
    const int64_t first = block * block_rows, stride = leading(p.D), rows = least(p.rows() - first, block_rows);
    float* total = part_at<QueryGradient>(sums, first_sum, p).sum + first * stride;
    for (int64_t s = 1; s < splits; ++s) {
        const float* more = part_at<QueryGradient>(sums, first_sum + s, p).sum + first * stride;
        for (int64_t i = 0; i < rows * stride; i += VL) store(total + i, load(total + i) + load(more + i));
    }
    Row row = p.row(item, first);
    for (int64_t i = 0; i < rows; ++i, row.next()) {
        write_scaled(total + i * stride, p.scale, p.D, dq + p.output_row(row) * p.D);
    }
}

// The tiles [begin, end) of a split: shares of the (tile, block) pairs that meet as equal as whole tiles allow.
struct Share {
    int64_t begin = 0, end = 0;
    Share(const Problem& p, int64_t split, int64_t splits) {
        const int64_t tiles = (p.Tk + block_keys - 1) / block_keys;
        const auto cost = [&](int64_t tile) {
            int64_t n = 1;
            for (int64_t block = 0; block < p.blocks(); ++block) n += p.meets(block, int(tile * block_keys), block_keys);
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

template <class M, class T>
void backward(const Problem& p, const Operands& o) {
    const int64_t items = p.items(), blocks = p.blocks(), tiles = (p.Tk + block_keys - 1) / block_keys;
    const int threads = worth_threads(p) ? max_threads() : 1;
    int64_t splits = 1;
    while (!is_balanced(items * splits, threads) && splits < least(tiles, 2 * threads)) ++splits;
    const bool whole = splits == 1;
    const int64_t packs = whole ? threads : items, sums = whole ? threads : items * splits;

    const std::size_t packed_bytes = part_size<PackedItem<M>>(p) * std::size_t(packs);
    const std::size_t sum_bytes = part_size<QueryGradient>(p) * std::size_t(sums);
    const Block memory(packed_bytes + sum_bytes + part_size<BwdTile<M>>(p) * std::size_t(threads));
    const std::uintptr_t packed_base = (std::uintptr_t)memory.data, sum_base = packed_base + packed_bytes;
    const std::uintptr_t work_base = sum_base + sum_bytes;

    const auto add_tiles = [&](int64_t item, const Share& share, const PackedItem<M>& x, const BwdTile<M>& w, float* dq) {
        fill_zero(dq, blocks * block_rows * leading(p.D));
        for (int64_t tile = share.begin; tile < share.end; ++tile) add_tile<M, T>(p, o, x, w, item, int(tile * block_keys), dq);
    };
    if (whole) {
        const Share all(p, 0, 1);
        parallel_dynamic(threads > 1, items, [&](int64_t item, int thread) {
            const auto x = part_at<PackedItem<M>>(packed_base, thread, p);
            const auto w = part_at<BwdTile<M>>(work_base, thread, p);
            pack_keys<M, T>(p, o, item, x);
            for (int64_t block = 0; block < blocks; ++block) pack_block<M, T>(p, o, item, block, w, x);
            add_tiles(item, all, x, w, part_at<QueryGradient>(sum_base, thread, p).sum);
            for (int64_t block = 0; block < blocks; ++block) write_dq(p, item, block, sum_base, thread, 1, (T*)o.dq);
        });
        return;
    }
    parallel_dynamic(true, items * (blocks + 1), [&](int64_t i, int thread) {
        const int64_t item = i / (blocks + 1), block = i % (blocks + 1);
        const auto x = part_at<PackedItem<M>>(packed_base, item, p);
        if (block == blocks) {
            pack_keys<M, T>(p, o, item, x);
        } else {
            pack_block<M, T>(p, o, item, block, part_at<BwdTile<M>>(work_base, thread, p), x);
        }
    });
    parallel_dynamic(true, items * splits, [&](int64_t i, int thread) {
        const auto w = part_at<BwdTile<M>>(work_base, thread, p);
        add_tiles(i / splits, Share(p, i % splits, splits), part_at<PackedItem<M>>(packed_base, i / splits, p), w,
                  part_at<QueryGradient>(sum_base, i, p).sum);
    });
    parallel_dynamic(true, items * blocks, [&](int64_t i, int) {
        write_dq(p, i / blocks, i % blocks, sum_base, i / blocks * splits, splits, (T*)o.dq);
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
