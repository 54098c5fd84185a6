// Attention, forward, without the matrix of scores.
//
//   s_ij = scale q_i . k_j,   lse_i = log sum_j exp s_ij,   out_i = sum_j exp(s_ij - lse_i) v_j     over the keys j that i sees
//
// Tile by tile of keys, with a running softmax (attention_partial.h); FlashAttention, Dao et al., arXiv 2205.14135.
//
// B batch, H query heads, K key heads, G = H / K, Tq queries, Tk keys, D and Dv head sizes
#include "cpu/attention.h"

#include "cpu/attention_few.h"
#include "cpu/attention_fwd_amx.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Keys and values of an item, from key `first` on.
template <class M>
struct PackedKeys {
    typename M::Word *k, *v;
    int first = 0;

    void take(Layout& layout, const Problem& p, int64_t count) {
        k = layout.take<typename M::Word>((count + tile_rows) * leading(p.D / M::per_word));
        v = layout.take<typename M::Word>((count + 1) / M::per_word * leading(p.Dv));
    }
    // keys [begin, end), counted from `first`
    template <class T>
    void pack(const Problem& p, const Operand& keys, const Operand& values, int64_t item, int64_t begin, int64_t end,
              bool last) const {
        const T* from = p.keys<T>(keys, item) + first * keys.stride_t;
        pack_broadcast_keys(M{}, from, keys.stride_t, begin, end, last, p.D, k);
        pack_vector_keys(M{}, p.keys<T>(values, item) + first * values.stride_t, values.stride_t, begin, end, p.Dv, v);
    }
};

template <class M>
struct AllKeys : PackedKeys<M> {
    void place(Layout& layout, const Problem& p) { this->take(layout, p, p.Tk); }
};

template <class M>
struct TileKeys : PackedKeys<M> {
    void place(Layout& layout, const Problem& p) { this->take(layout, p, M::tile_keys); }
};

// One thread's block of queries.
template <class M>
struct FwdBlock {
    typename M::Word *q_rows, *q, *weights;
    float *scores, *rescale;
    BlockRange* range;

    void place(Layout& layout, const Problem& p) {
        q_rows = layout.take<typename M::Word>(block_rows * leading(p.D / M::per_word));
        q = layout.take<typename M::Word>(p.D / M::per_word * block_rows);
        scores = layout.take<float>(block_keys * block_rows);
        weights = M::per_word == 1 ? (typename M::Word*)scores : layout.take<typename M::Word>(block_keys / 2 * block_rows);
        rescale = layout.take<float>(block_rows);
        range = layout.take<BlockRange>(1);
    }
    void begin(const Problem&) const {
        for (int i = 0; i < block_rows; ++i) rescale[i] = 1.0f;
    }
    void end(const Problem&, const Partial&, int) const {}
};

template <int N>
LLMCORE_INLINE void store_weights(Floats, float* to, int key, const vf (&x)[2 * N]) {
    for (int i = 0; i < 2 * N; ++i) store(to + (key + i / N) * block_rows + i % N * VL, x[i]);
}

template <int N>
LLMCORE_INLINE void store_weights(Bf16Pairs, uint32_t* to, int key, const vf (&x)[2 * N]) {
    for (int v = 0; v < N; ++v) {
        store_bits(to + key / 2 * block_rows + v * VL, bf16_pairs(round_to_bf16(x[v]), round_to_bf16(x[N + v])));
    }
}

// Softmax of the scores of N vectors of queries, from `column` on, and the tile's keys [begin, end), both multiples of tile_rows.
// Weights of the tile's other keys become 0.
template <class M, int N>
__attribute__((noinline)) void softmax_panel(const FwdBlock<M>& w, const Partial& partial, int column, int first, int keys,
                                             int begin, int end) {
    float* s = w.scores + column;
    typename M::Word* weights = w.weights + column;
    vf largest[N], sum[2][N];
    for (int v = 0; v < N; ++v) largest[v] = load(partial.m + column + v * VL);
    mask_scores<N>(*w.range, column, first, begin, end, s);
    for (int j = begin; j < end; ++j)
        for (int v = 0; v < N; ++v) largest[v] = max(load(s + j * block_rows + v * VL), largest[v]);
    for (int i = 0; i < 2 * N; ++i) sum[i / N][i % N] = zero();
    for (int j = begin; j < end; j += 2) {
        vf x[2 * N];
        for (int i = 0; i < 2 * N; ++i) x[i] = (load(s + (j + i / N) * block_rows + i % N * VL) - largest[i % N]) * log2_e;
        exp2_fast(x);
        for (int i = 0; i < 2 * N; ++i) sum[i / N][i % N] += x[i];
        store_weights<N>(M{}, weights, j, x);
    }
    for (int v = 0; v < N; ++v) {
        float *m = partial.m + column + v * VL, *l = partial.l + column + v * VL;
        const vf rescale = exp2_fast((load(m) - largest[v]) * log2_e);
        store(w.rescale + column + v * VL, rescale);
        store(m, largest[v]);
        store(l, fmadd(load(l), rescale, sum[0][v] + sum[1][v]));
    }
    const auto clear = [&](int from, int to) {
        for (int j = from; j < to; ++j) fill_zero(weights + j * block_rows, N * VL);
    };
    clear(0, begin / M::per_word);
    clear(int(most(begin, end)) / M::per_word, keys / M::per_word);
}

// Scores and softmax of one tile of keys, then o = diag(rescale) o + weights v.
template <class M>
void attend_tile(const Problem& p, const PackedKeys<M>& packed, const FwdBlock<M>& w, const Partial& partial, int rows, int first,
                 int keys) {
    const int64_t k_stride = leading(p.D / M::per_word), v_stride = leading(p.Dv);
    const typename M::Word* k = packed.k + (first - packed.first) * k_stride;
    const int padded_rows = round_up(rows, tile_rows), padded_keys = round_up(keys, tile_rows);
    by_twos(vectors(rows), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const int column = vector * VL;
        const int begin = w.range->begin(column, first, keys) / tile_rows * tile_rows;
        const int end = round_up(w.range->end(column, N * VL, first, keys), tile_rows);
        for (int j = begin; j < end; j += tile_rows) {
            score_tile<M, N>(p.D / M::per_word, k + j * k_stride, k_stride, w.q + column, w.scores + j * block_rows + column,
                             p.scale);
        }
        softmax_panel<M, N>(w, partial, column, first, padded_keys, begin, end);
    });
    for (int columns = vectors(rows) * VL, j = 0; columns < padded_rows && j < padded_keys / M::per_word; ++j) {
        fill_zero(w.weights + j * block_rows + columns, padded_rows - columns);
    }

    int64_t begin[block_rows / tile_rows], words[block_rows / tile_rows];
    for (int i = 0; i < rows; i += tile_rows) {
        begin[i / tile_rows] = w.range->begin(i, first, keys) / M::per_word;
        words[i / tile_rows] = round_up(w.range->end(i, tile_rows, first, keys), M::per_word) / M::per_word - begin[i / tile_rows];
    }
    by_twos(vectors(p.Dv), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const typename M::Word* v = packed.v + (first - packed.first) / M::per_word * v_stride + vector * VL;
        for (int i = 0; i < rows; i += tile_rows) {
            const int64_t from = begin[i / tile_rows], size = words[i / tile_rows];
            if (size <= 0) continue;
            weighted_sum_tile<M, N>(size, w.weights + from * block_rows + i, v + from * v_stride, v_stride,
                                    partial.o + i * v_stride + vector * VL, v_stride, w.rescale + i);
        }
    });
}

// The keys [begin, end) for one block of queries; tile(first, keys) gives packed keys that have these.
template <class M, class T, class F>
void attend_block(const Problem& p, const Operand& q, const FwdBlock<M>& w, int64_t item, int64_t block, int begin, int end,
                  const Partial& partial, T* out, const F& tile) {
    const int64_t q_stride = leading(p.D / M::per_word);
    const int rows = p.rows_of(block), columns = vectors(rows) * VL;
    Row row = p.row(item, block * block_rows);
    w.range->set(p, row, rows);
    for (int i = 0; i < rows; ++i, row.next()) {
        pack_row(M{}, p.query<T>(q, row), p.D, w.q_rows + i * q_stride);
        prefetch_row_to_write(out + p.output_row(row) * p.Dv, p.Dv);
    }
    if (block + 1 < p.blocks()) {
        for (int i = 0; i < p.rows_of(block + 1); ++i, row.next()) prefetch_row(p.query<T>(q, row), p.D);
    }
    fill_zero(w.q_rows + rows * q_stride, (columns - rows) * q_stride);
    pack_transposed(w.q_rows, q_stride, columns, M::words(p.D), w.q, block_rows);
    w.begin(p);
    for (int first = begin; first < end; first += M::tile_keys) {
        const int keys = int(least(end - first, M::tile_keys));
        attend_tile(p, tile(first, keys), w, partial, rows, first, keys);
    }
    w.end(p, partial, rows);
}

// With enough items each thread takes whole ones. Otherwise the threads share their blocks: one block an item packs its keys as it
// comes to them, for several they are packed first.
template <class M, class T>
void attend(const Problem& p, const Operand& q, const Operand& k, const Operand& v, T* out, float* lse) {
    const int threads = worth_threads(p) ? max_threads() : 1;
    const Parts<FwdBlock<M>> work(p, threads);
    if (p.blocks() == 1) {
        const Parts<TileKeys<M>> tiles(p, threads);
        attend_blocks<M>(p, threads, out, lse,
                      [&](int64_t item, int64_t block, int begin, int end, const Partial& partial, int thread) {
                          TileKeys<M> packed = tiles.at(thread);
                          attend_block(p, q, work.at(thread), item, block, begin, end, partial, out, [&](int first, int keys) {
                              packed.first = first;
                              packed.template pack<T>(p, k, v, item, 0, keys, true);
                              return packed;
                          });
                      });
        return;
    }
    const bool whole = is_balanced(p.items(), threads);
    const Parts<AllKeys<M>> packs(p, whole ? threads : p.items());
    if (whole) {
        const Parts<Partial> partials(p, threads);
        parallel_dynamic(threads > 1, p.items(), [&](int64_t item, int thread) {
            const AllKeys<M> packed = packs.at(thread);
            const FwdBlock<M> w = work.at(thread);
            const Partial partial = partials.at(thread);
            packed.template pack<T>(p, k, v, item, 0, p.Tk, true);
            for (int64_t block = 0; block < p.blocks(); ++block) {
                partial.clear(p, p.rows_of(block));
                attend_block(p, q, w, item, block, p.block_lo(block) & -M::key_step, p.block_hi(block), partial, out,
                             [&](int, int) { return packed; });
                partial.write(p, item, block, out, lse);
            }
        });
        return;
    }
    const int64_t shares = pack_shares(p.Tk);
    parallel_dynamic(true, p.items() * shares, [&](int64_t i, int) {
        const int64_t item = i / shares, begin = i % shares * pack_share, end = least(begin + pack_share, p.Tk);
        packs.at(item).template pack<T>(p, k, v, item, begin, end, end == p.Tk);
    });
    attend_blocks<M>(p, threads, out, lse,
                  [&](int64_t item, int64_t block, int begin, int end, const Partial& partial, int thread) {
                      const AllKeys<M> packed = packs.at(item);
                      attend_block(p, q, work.at(thread), item, block, begin, end, partial, out, [&](int, int) { return packed; });
                  });
}

}  // namespace

void attention_fwd(const void* q, const void* k, const void* v, void* out, float* lse, int64_t B, int64_t H, int64_t K,
                   int64_t Tq, int64_t Tk, int64_t D, int64_t Dv, int64_t q_stride_b, int64_t q_stride_t, int64_t q_stride_h,
                   int64_t k_stride_b, int64_t k_stride_t, int64_t k_stride_h, int64_t v_stride_b, int64_t v_stride_t,
                   int64_t v_stride_h, float softmax_scale, int64_t window_left, int64_t window_right, DType dtype) {
    if (B == 0 || H == 0 || Tq == 0) return;
    const Problem p{B, H, K, Tq, Tk, D, Dv, softmax_scale, window_left, window_right};
    const Operand queries{q, q_stride_b, q_stride_t, q_stride_h}, keys{k, k_stride_b, k_stride_t, k_stride_h};
    const Operand values{v, v_stride_b, v_stride_t, v_stride_h};
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        if (p.rows() <= few_rows && Tk > 2 * few_keys) {
            attend_few<T>(p, queries, keys, values, (T*)out, lse);
        } else {
            attend<typename Products<T>::type, T>(p, queries, keys, values, (T*)out, lse);
        }
    });
}

}  // namespace llmcore::LLMCORE_ISA
