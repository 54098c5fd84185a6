// Attention, forward, without the matrix of scores.
//
//   s_ij = scale q_i . k_j,   lse_i = log sum_j exp s_ij,   out_i = sum_j exp(s_ij - lse_i) v_j     over the keys j that i sees
//
// Block by block of keys, with a running maximum m, sum l and weighted sum o that are rescaled when m grows: "Online normalizer
// calculation for softmax", Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, Dao et al., arXiv 2205.14135.
//
// B batch, H query heads, K key heads, G = H / K, Tq queries, Tk keys, D and Dv head sizes
#include "cpu/attention.h"

#include "cpu/attention_few.h"
#include "cpu/attention_pack.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// An item's keys and values.
template <class M>
struct PackedKeys {
    typename M::Word *k, *v;

    void place(Layout& layout, const Problem& p) {
        k = layout.take<typename M::Word>((p.Tk + tile_rows) * leading(p.D / M::per_word));
        v = layout.take<typename M::Word>((p.Tk + 1) / M::per_word * leading(p.Dv));
    }
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

// One thread's block of queries.
template <class M>
struct FwdBlock {
    typename M::Word *q_rows, *q, *weights;
    float *scores, *o, *m, *l, *rescale;
    BlockRange* range;

    void place(Layout& layout, const Problem& p) {
        q_rows = layout.take<typename M::Word>(block_rows * leading(p.D / M::per_word));
        q = layout.take<typename M::Word>(p.D / M::per_word * block_rows);
        scores = layout.take<float>(block_keys * block_rows);
        weights = M::per_word == 1 ? (typename M::Word*)scores : layout.take<typename M::Word>(block_keys / 2 * block_rows);
        o = layout.take<float>(block_rows * leading(p.Dv));
        m = layout.take<float>(block_rows);
        l = layout.take<float>(block_rows);
        rescale = layout.take<float>(block_rows);
        range = layout.take<BlockRange>(1);
    }
};

// Softmax of the scores of N vectors of queries, from `column` on, and the tile's keys [begin, end), both
// multiples of tile_rows. Weights of the tile's other keys become 0.
template <class M, int N>
__attribute__((noinline)) void softmax_panel(const FwdBlock<M>& w, int column, int first, int keys, int begin, int end) {
    float* s = w.scores + column;
    typename M::Word* weights = w.weights + column;
    vf largest[N], sum[2][N];
    for (int v = 0; v < N; ++v) largest[v] = load(w.m + column + v * VL);
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
        const int i = column + v * VL;
        const vf rescale = exp2_fast((load(w.m + i) - largest[v]) * log2_e);
        store(w.rescale + i, rescale);
        store(w.m + i, largest[v]);
        store(w.l + i, fmadd(load(w.l + i), rescale, sum[0][v] + sum[1][v]));
    }
    const auto clear = [&](int from, int to) {
        for (int j = from; j < to; ++j) fill_zero(weights + j * block_rows, N * VL);
    };
    clear(0, begin / M::per_word);
    clear(int(most(begin, end)) / M::per_word, keys / M::per_word);
}

// Scores and softmax of one tile of keys, then o = diag(rescale) o + weights v.
template <class M>
void attend_tile(const Problem& p, const PackedKeys<M>& packed, const FwdBlock<M>& w, int rows, int first, int keys) {
    const int64_t k_stride = leading(p.D / M::per_word), v_stride = leading(p.Dv);
    by_twos(vectors(rows), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const int column = vector * VL;
        const int begin = w.range->begin(column, first, keys) / tile_rows * tile_rows;
        const int end = round_up(w.range->end(column, N * VL, first, keys), tile_rows);
        for (int j = begin; j < end; j += tile_rows) {
            score_tile<M, N>(p.D / M::per_word, packed.k + (first + j) * k_stride, k_stride, w.q + column,
                             w.scores + j * block_rows + column, p.scale);
        }
        softmax_panel<M, N>(w, column, first, round_up(keys, tile_rows), begin, end);
    });
    int64_t begin[block_rows / tile_rows], words[block_rows / tile_rows];
    const int tiles = round_up(rows, tile_rows) / tile_rows;
    for (int i = 0; i < tiles; ++i) {
        begin[i] = w.range->begin(i * tile_rows, first, keys) / M::per_word;
        words[i] = round_up(w.range->end(i * tile_rows, tile_rows, first, keys), M::per_word) / M::per_word - begin[i];
    }
    by_twos(vectors(p.Dv), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const typename M::Word* v = packed.v + first / M::per_word * v_stride + vector * VL;
        for (int i = 0; i < tiles; ++i) {
            if (words[i] <= 0) continue;
            weighted_sum_tile<M, N>(words[i], w.weights + begin[i] * block_rows + i * tile_rows, v + begin[i] * v_stride, v_stride,
                                    w.o + i * tile_rows * v_stride + vector * VL, v_stride, w.rescale + i * tile_rows);
        }
    });
}

template <class M, class T>
void attend_block(const Problem& p, const Operand& q, const PackedKeys<M>& packed, const FwdBlock<M>& w, int64_t item, int64_t block,
                  T* out, float* lse) {
    const int64_t first_row = block * block_rows, q_stride = leading(p.D / M::per_word), v_stride = leading(p.Dv);
    const int rows = int(least(p.rows() - first_row, block_rows)), columns = vectors(rows) * VL;
    Row row = p.row(item, first_row);
    w.range->set(p, row, rows);
    for (int i = 0; i < rows; ++i, row.next()) {
        pack_row(M{}, q.at<T>(row.b, row.t, row.h()), p.D, w.q_rows + i * q_stride);
        __builtin_prefetch(&lse[p.lse_index(row)], 1);
        for (int64_t d = 0; d < p.Dv; d += int64_t(64 / sizeof(T))) __builtin_prefetch(out + p.output_row(row) * p.Dv + d, 1);
    }
    for (int64_t i = least(p.rows() - first_row - rows, block_rows); i > 0; --i, row.next()) {
        prefetch_row(q.at<T>(row.b, row.t, row.h()), p.D);
    }
    fill_zero(w.q_rows + rows * q_stride, (columns - rows) * q_stride);
    pack_transposed(w.q_rows, q_stride, columns, p.D / M::per_word, w.q);
    for (int i = 0; i < block_rows; ++i) {
        w.m[i] = lowest;
        w.l[i] = 0.0f;
        w.rescale[i] = 1.0f;
    }
    fill_zero(w.o, round_up(rows, tile_rows) * v_stride);

    const int seen = w.range->hi[rows - 1];
    for (int first = w.range->lo[0] & ~1; first < seen; first += block_keys) {
        attend_tile(p, packed, w, rows, first, int(least(seen - first, block_keys)));
    }
    row = p.row(item, first_row);
    for (int i = 0; i < rows; ++i, row.next()) write_row(p, row, w.o + i * v_stride, w.m[i], w.l[i], out, lse);
}

// With enough items each thread takes whole ones; otherwise all are packed first and the threads share their blocks, the blocks
// that see most keys first.
template <class M, class T>
void attend(const Problem& p, const Operand& q, const Operand& k, const Operand& v, T* out, float* lse) {
    const int64_t items = p.items(), blocks = p.blocks();
    const int threads = worth_threads(p) ? max_threads() : 1;
    const bool whole = is_balanced(items, threads);
    const std::size_t packed_bytes = part_size<PackedKeys<M>>(p) * std::size_t(whole ? threads : items);
    const Block memory(packed_bytes + part_size<FwdBlock<M>>(p) * std::size_t(threads));
    const std::uintptr_t packed_base = (std::uintptr_t)memory.data, work_base = packed_base + packed_bytes;

    const auto pack = [&](int64_t item, const PackedKeys<M>& packed) {
        pack_broadcast_keys(M{}, p.keys<T>(k, item), k.stride_t, p.Tk, p.D, packed.k);
        pack_vector_keys(M{}, p.keys<T>(v, item), v.stride_t, p.Tk, p.Dv, packed.v);
    };
    if (whole) {
        parallel_dynamic(threads > 1, items, [&](int64_t item, int thread) {
            const auto packed = part_at<PackedKeys<M>>(packed_base, thread, p);
            const auto work = part_at<FwdBlock<M>>(work_base, thread, p);
            pack(item, packed);
            for (int64_t block = 0; block < blocks; ++block) attend_block(p, q, packed, work, item, block, out, lse);
        });
        return;
    }
    parallel_dynamic(true, items, [&](int64_t item, int) { pack(item, part_at<PackedKeys<M>>(packed_base, item, p)); });
    parallel_dynamic(true, items * blocks, [&](int64_t i, int thread) {
        const int64_t item = i % items, block = blocks - 1 - i / items;
        const auto work = part_at<FwdBlock<M>>(work_base, thread, p);
        attend_block(p, q, part_at<PackedKeys<M>>(packed_base, item, p), work, item, block, out, lse);
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
