// Attention, backward, without the matrix of scores.
//
//   P_ij = exp(scale q_i . k_j - lse_i)      delta_i = dout_i . out_i - dlse_i      dS_ij = P_ij (dout_i . v_j - delta_i)
//   dq_i = scale sum_j dS_ij k_j             dk_j = scale sum_i dS_ij q_i           dv_j = sum_i P_ij dout_i
//
// Five products on each pair of a block of queries and a tile of keys, in one pass: "FlashAttention-2", Dao, arXiv 2307.08691.
// A unit of work is the item's blocks b, b + parts, b + 2 parts, ... with sums of dk and dv of its own; the parts of an item are
// added in their order, so that the result depends on the number of threads only.
//
// B batch, H query heads, K key heads, G = H / K, Tq queries, Tk keys, D and Dv head sizes
#include "cpu/attention.h"

#include "cpu/attention_pack.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// An item's keys and values, and one unit's sums of their gradients. Rows past the last key are zeros.
struct KeySums {
    float *dk, *dv;

    void place(Layout& layout, const Problem& p) {
        dk = layout.take<float>((p.Tk + tile_rows) * leading(p.D));
        dv = layout.take<float>((p.Tk + tile_rows) * leading(p.Dv));
    }
};

// One thread's keys and values, and its block of queries.
struct BwdBlock {
    float *k, *v;
    float *q_rows, *do_rows, *q, *dout;  // as rows, and transposed
    float *weights, *d_scores, *dq;
    float *lse, *delta;
    BlockRange* range;

    void place(Layout& layout, const Problem& p) {
        k = layout.take<float>((p.Tk + tile_rows) * leading(p.D));
        v = layout.take<float>((p.Tk + tile_rows) * leading(p.Dv));
        q_rows = layout.take<float>(block_rows * leading(p.D));
        do_rows = layout.take<float>(block_rows * leading(p.Dv));
        q = layout.take<float>(p.D * block_rows);
        dout = layout.take<float>(p.Dv * block_rows);
        weights = layout.take<float>(block_keys * block_rows);
        d_scores = layout.take<float>(block_keys * block_rows);
        dq = layout.take<float>(block_rows * leading(p.D));
        lse = layout.take<float>(block_rows);
        delta = layout.take<float>(block_rows);
        range = layout.take<BlockRange>(1);
    }
};

template <class T>
struct Operands {
    Operand q, k, v, dout;
    const T* out;
    const float *lse, *dlse;
    T *dq, *dk, *dv;
};

template <class T>
LLMCORE_INLINE float dot(const float* a, const T* b, int64_t n) {
    vf sum = zero();
    int64_t i = 0;
    for (; i + VL <= n; i += VL) sum = fmadd(load(a + i), load(b + i), sum);
    if (i < n) sum = fmadd(load(a + i), load(b + i, int(n - i)), sum);
    return reduce_sum(sum);
}

template <class T>
void load_block(const Problem& p, const Operands<T>& x, const BwdBlock& w, int64_t item, int64_t first_row, int rows) {
    const int64_t q_stride = leading(p.D), do_stride = leading(p.Dv);
    Row row = p.row(item, first_row);
    w.range->set(p, row, rows);
    for (int i = 0; i < rows; ++i, row.next()) {
        pack_row(Floats{}, x.q.template at<T>(row.b, row.t, row.h()), p.D, p.q_factor, w.q_rows + i * q_stride);
        pack_row(Floats{}, x.dout.template at<T>(row.b, row.t, row.h()), p.Dv, 1.0f, w.do_rows + i * do_stride);
        const int64_t index = p.lse_index(row);
        w.lse[i] = x.lse[index];
        w.delta[i] = dot(w.do_rows + i * do_stride, x.out + p.output_row(row) * p.Dv, p.Dv) -
                     (x.dlse == nullptr ? 0.0f : x.dlse[index]);
    }
    // The other rows of the last block take part with weight 1 and gradient 0.
    fill_zero(w.q_rows + rows * q_stride, (block_rows - rows) * q_stride);
    fill_zero(w.do_rows + rows * do_stride, (block_rows - rows) * do_stride);
    for (int i = rows; i < block_rows; ++i) w.lse[i] = w.delta[i] = 0.0f;
    pack_transposed(w.q_rows, q_stride, block_rows, p.D, w.q);
    pack_transposed(w.do_rows, do_stride, block_rows, p.Dv, w.dout);
    fill_zero(w.dq, block_rows * q_stride);
}

// In N vectors of queries from `column` on, for the keys [begin, end): scores become weights, dout . v becomes dS. A key that a
// query does not see gets zeros, whatever its scores.
template <int N>
__attribute__((noinline)) void weights_panel(const BwdBlock& w, float scale, int column, int first, int begin, int end,
                                             int all_begin, int all_end) {
    vf lse[N], delta[N];
    vi lo[N], hi[N];
    for (int v = 0; v < N; ++v) {
        const int i = column + v * VL;
        lse[v] = load(w.lse + i);
        delta[v] = load(w.delta + i);
        lo[v] = load_bits<vi>(w.range->lo + i);
        hi[v] = load_bits<vi>(w.range->hi + i);
    }
    for (int j = begin; j < end; ++j) {
        float* weights = w.weights + j * block_rows + column;
        float* d_scores = w.d_scores + j * block_rows + column;
        vf x[N];
        for (int v = 0; v < N; ++v) x[v] = fmadd(load(weights + v * VL), broadcast(scale), -lse[v]) * log2_e;
        exp2_fast(x);
        if (j < all_begin || j >= all_end) {
            for (int v = 0; v < N; ++v) x[v] = select((lo[v] <= first + j) & (hi[v] > first + j), x[v], zero());
        }
        for (int v = 0; v < N; ++v) {
            store(weights + v * VL, x[v]);
            store(d_scores + v * VL, x[v] * (load(d_scores + v * VL) - delta[v]));
        }
    }
}

// The five products for one block of queries and the keys [first, first + keys).
void differentiate_tile(const Problem& p, const BwdBlock& w, const KeySums& sums, int rows, int first, int keys) {
    const int64_t k_stride = leading(p.D), v_stride = leading(p.Dv);
    const int all_keys = round_up(keys, tile_rows);
    by_twos(vectors(rows), [&](auto count, int vector) {
        constexpr int N = decltype(count)::value;
        const int column = vector * VL, n = N * VL;
        const int begin = w.range->begin(column, first, keys) / tile_rows * tile_rows;
        const int end = round_up(w.range->end(column, n, first, keys), tile_rows);
        for (int j = begin; j < end; j += tile_rows) {
            const int64_t at = j * block_rows + column;
            score_tile<Floats, N>(p.D, w.k + (first + j) * k_stride, k_stride, w.q + column, w.weights + at);
            score_tile<Floats, N>(p.Dv, w.v + (first + j) * v_stride, v_stride, w.dout + column, w.d_scores + at);
        }
        weights_panel<N>(w, p.scale, column, first, begin, end, w.range->all_begin(column, n, first, keys),
                         w.range->all_end(column, first, keys));
        for (int j = 0; j < all_keys; ++j) {
            if (j >= begin && j < end) continue;
            fill_zero(w.weights + j * block_rows + column, n);
            fill_zero(w.d_scores + j * block_rows + column, n);
        }
    });

    // dk and dv: for each tile of keys, the rows that see one of them
    int row_begin = 0, row_end = 0;
    for (int j = 0; j < all_keys; j += tile_rows) {
        while (row_begin < rows && w.range->hi[row_begin] <= first + j) ++row_begin;
        while (row_end < rows && w.range->lo[row_end] < first + j + tile_rows) ++row_end;
        if (row_begin >= row_end) continue;
        const int words = row_end - row_begin;
        const int64_t from = j * block_rows + row_begin;
        by_twos(vectors(p.Dv), [&](auto count, int vector) {
            gradient_tile<Floats, decltype(count)::value>(words, w.weights + from, w.do_rows + row_begin * v_stride + vector * VL,
                                                          v_stride, sums.dv + (first + j) * v_stride + vector * VL, v_stride);
        });
        by_twos(vectors(p.D), [&](auto count, int vector) {
            gradient_tile<Floats, decltype(count)::value>(words, w.d_scores + from, w.q_rows + row_begin * k_stride + vector * VL,
                                                          k_stride, sums.dk + (first + j) * k_stride + vector * VL, k_stride);
        });
    }

    for (int i = 0; i < rows; i += tile_rows) {
        const int begin = w.range->begin(i, first, keys), words = w.range->end(i, tile_rows, first, keys) - begin;
        if (words <= 0) continue;
        by_twos(vectors(p.D), [&](auto count, int vector) {
            weighted_sum_tile<Floats, decltype(count)::value>(words, w.d_scores + begin * block_rows + i,
                                                              w.k + (first + begin) * k_stride + vector * VL, k_stride,
                                                              w.dq + i * k_stride + vector * VL, k_stride, nullptr);
        });
    }
}

// The blocks part, part + parts, ... of an item.
template <class T>
void differentiate_unit(const Problem& p, const Operands<T>& x, const BwdBlock& w, const KeySums& sums, int64_t item, int64_t part,
                        int64_t parts) {
    pack_broadcast_keys<Floats, T>(Floats{}, p.keys<T>(x.k, item), x.k.stride_t, p.Tk, p.D, w.k);
    pack_broadcast_keys<Floats, T>(Floats{}, p.keys<T>(x.v, item), x.v.stride_t, p.Tk, p.Dv, w.v);
    fill_zero(sums.dk, (p.Tk + tile_rows) * leading(p.D));
    fill_zero(sums.dv, (p.Tk + tile_rows) * leading(p.Dv));
    fill_zero(w.weights, block_keys * block_rows);
    fill_zero(w.d_scores, block_keys * block_rows);
    for (int64_t first_row = part * block_rows; first_row < p.rows(); first_row += parts * block_rows) {
        const int rows = int(least(p.rows() - first_row, block_rows));
        load_block(p, x, w, item, first_row, rows);
        const int seen = w.range->hi[rows - 1];
        for (int first = w.range->lo[0]; first < seen; first += block_keys) {
            differentiate_tile(p, w, sums, rows, first, int(least(seen - first, block_keys)));
        }
        Row row = p.row(item, first_row);
        for (int i = 0; i < rows; ++i, row.next()) {
            write_scaled(w.dq + i * leading(p.D), p.scale * p.q_factor, p.D, x.dq + p.output_row(row) * p.D);
        }
    }
}

// dk and dv of an item's keys [begin, end): the sums of its parts, added into the first.
template <class T>
void write_keys(const Problem& p, const Operands<T>& x, std::uintptr_t sums_base, int64_t first_part, int64_t parts, int64_t item,
                int64_t begin, int64_t end) {
    const KeySums total = part_at<KeySums>(sums_base, first_part, p);
    const auto add = [](const float* from, float* to, int64_t n) {
        for (int64_t i = 0; i < n; i += VL) store(to + i, load(to + i) + load(from + i));
    };
    for (int64_t j = begin; j < end; ++j) {
        float *dk = total.dk + j * leading(p.D), *dv = total.dv + j * leading(p.Dv);
        for (int64_t part = 1; part < parts; ++part) {
            const KeySums other = part_at<KeySums>(sums_base, first_part + part, p);
            add(other.dk + j * leading(p.D), dk, p.D);
            add(other.dv + j * leading(p.Dv), dv, p.Dv);
        }
        const int64_t out = (item / p.K * p.Tk + j) * p.K + item % p.K;
        write_scaled(dk, p.scale, p.D, x.dk + out * p.D);
        write_scaled(dv, 1.0f, p.Dv, x.dv + out * p.Dv);
    }
}

// With enough items each thread takes whole ones; otherwise items are cut into parts.
template <class T>
void differentiate(const Problem& p, const Operands<T>& x) {
    const int64_t items = p.items(), blocks = (p.rows() + block_rows - 1) / block_rows;
    const int threads = worth_threads(p) ? max_threads() : 1;
    const bool whole = is_balanced(items, threads);
    const int64_t parts = whole ? 1 : most(1, least(blocks, (2 * threads + items - 1) / items));
    const std::size_t work_bytes = part_size<BwdBlock>(p) * std::size_t(threads);
    const Block memory(work_bytes + part_size<KeySums>(p) * std::size_t(whole ? threads : items * parts));
    const std::uintptr_t work_base = (std::uintptr_t)memory.data, sums_base = work_base + work_bytes;

    parallel_dynamic(threads > 1, items * parts, [&](int64_t unit, int thread) {
        const int64_t item = unit / parts, place = whole ? thread : unit;
        const BwdBlock work = part_at<BwdBlock>(work_base, thread, p);
        differentiate_unit(p, x, work, part_at<KeySums>(sums_base, place, p), item, unit % parts, parts);
        if (whole) write_keys(p, x, sums_base, place, 1, item, 0, p.Tk);
    });
    if (whole) return;
    constexpr int64_t chunk = 64;
    const int64_t chunks = (p.Tk + chunk - 1) / chunk;
    parallel_dynamic(threads > 1, items * chunks, [&](int64_t i, int) {
        const int64_t item = i / chunks, begin = i % chunks * chunk;
        write_keys(p, x, sums_base, item * parts, parts, item, begin, least(begin + chunk, p.Tk));
    });
}

}  // namespace

void attention_bwd(const void* dout, const float* dlse, const void* q, const void* k, const void* v, const void* out,
                   const float* lse, void* dq, void* dk, void* dv, int64_t B, int64_t H, int64_t K, int64_t Tq, int64_t Tk,
                   int64_t D, int64_t Dv, int64_t do_stride_b, int64_t do_stride_t, int64_t do_stride_h, int64_t q_stride_b,
                   int64_t q_stride_t, int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t, int64_t k_stride_h,
                   int64_t v_stride_b, int64_t v_stride_t, int64_t v_stride_h, float softmax_scale, int64_t window_left,
                   int64_t window_right, DType dtype) {
    if (B == 0 || H == 0 || (Tq == 0 && Tk == 0)) return;
    const Problem p = problem(B, H, K, Tq, Tk, D, Dv, softmax_scale, window_left, window_right);
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        const Operands<T> x{{q, q_stride_b, q_stride_t, q_stride_h},
                            {k, k_stride_b, k_stride_t, k_stride_h},
                            {v, v_stride_b, v_stride_t, v_stride_h},
                            {dout, do_stride_b, do_stride_t, do_stride_h},
                            (const T*)out,
                            lse,
                            dlse,
                            (T*)dq,
                            (T*)dk,
                            (T*)dv};
        differentiate(p, x);
    });
}

}  // namespace llmcore::LLMCORE_ISA
