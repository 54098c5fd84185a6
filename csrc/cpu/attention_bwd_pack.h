// The operands of attention's backward, packed for the register tiles.
#pragma once

#include "cpu/attention_pack.h"

namespace llmcore::LLMCORE_ISA {
namespace {

struct Operands {
    Operand q, k, v, dout, out;
    const float *lse, *dlse;
    void *dq, *dk, *dv;
};

constexpr int most_padding = 32;  // rows that end the last tile of keys

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
        q_columns = layout.take<Word>(rows * M::words(p.D));
        q_rows = layout.take<Word>(rows / M::per_word * leading(p.D));
        dout_columns = layout.take<Word>(rows * M::words(p.Dv));
        dout_rows = layout.take<Word>(rows / M::per_word * leading(p.Dv));
        k_words = layout.take<Word>((p.Tk + most_padding) * leading(p.D / M::per_word));
        k_rows = M::per_word == 1 ? k_words : layout.take<Word>((p.Tk + most_padding) / 2 * leading(p.D));
        v_words = layout.take<Word>((p.Tk + most_padding) * leading(p.Dv / M::per_word));
        lse = layout.take<float>(rows);
        delta = layout.take<float>(rows);
        range = layout.take<BlockRange>(blocks);
    }
};

// One thread's working space to pack a block.
template <class M>
struct BwdPacking {
    typename M::Word *words, *out_columns, *out_rows;

    void place(Layout& layout, const Problem& p) {
        words = M::per_word == 1 ? nullptr : layout.take<typename M::Word>(block_rows * leading(most(p.D, p.Dv) / 2));
        out_columns = layout.take<typename M::Word>(block_rows * p.Dv / M::per_word);
        out_rows = layout.take<typename M::Word>(block_rows / M::per_word * leading(p.Dv));
    }
};

// One block of q, dout or out: `rows` of n elements, then zeros up to the end of their last vector.
template <class T>
void pack_queries(Floats m, const Problem& p, const Operand& x, Row row, int rows, int64_t n, float*, float* columns, float* to) {
    const int64_t stride = leading(n);
    Row ahead = row;
    for (int i = 0; i < prefetch_rows; ++i) ahead.next();
    for (int i = 0; i < rows; ++i, row.next(), ahead.next()) {
        if (i + prefetch_rows < rows) prefetch_row(p.query<T>(x, ahead), n);
        pack_row(m, p.query<T>(x, row), n, to + i * stride);
    }
    const int padded = vectors(rows) * VL;
    fill_zero(to + rows * stride, (padded - rows) * stride);
    pack_transposed(to, stride, padded, n, columns, block_rows);
}

template <class T>
void pack_queries(Bf16Pairs m, const Problem& p, const Operand& x, Row row, int rows, int64_t n, uint32_t* words, uint32_t* columns,
                  uint32_t* to) {
    const int64_t words_stride = leading(n / 2);
    const T* even = nullptr;
    Row ahead = row;
    for (int i = 0; i < prefetch_rows; ++i) ahead.next();
    for (int i = 0; i < rows; ++i, row.next(), ahead.next()) {
        if (i + prefetch_rows < rows) prefetch_row(p.query<T>(x, ahead), n);
        const T* from = p.query<T>(x, row);
        pack_row(m, from, n, words + i * words_stride);
        if (i % 2 == 0) even = from;
        if (i % 2 == 1 || i + 1 == rows) pack_row_pair(even, i % 2 == 1 ? from : nullptr, n, to + i / 2 * leading(n));
    }
    const int padded = vectors(rows) * VL;
    fill_zero(words + rows * words_stride, (padded - rows) * words_stride);
    pack_transposed(words, words_stride, padded, n / 2, columns, block_rows);
}

// dout_i . out_i, summed in the same order as the products dout_i . v_j: for a row that sees one key, whose out is v_j, they are
// then equal and ds is exactly 0.
template <class T, class M>
void set_delta(M m, const Problem& p, const Operand& out, Row row, int rows, const BwdPacking<M>& w,
               const typename M::Word* dout_columns, float* delta) {
    using Words = typename M::Words;
    const int64_t words = p.Dv / M::per_word;
    pack_queries<T>(m, p, out, row, rows, p.Dv, w.words, w.out_columns, w.out_rows);
    for (int i = 0; i < rows; i += VL) {
        vf sum = zero();
        for (int64_t from = 0; from < words; from += sum_part(words)) {
            vf part = zero();
            for (int64_t k = from; k < least(from + sum_part(words), words); ++k) {
                const int64_t at = k * block_rows + i;
                part = multiply_add(load_bits<Words>(w.out_columns + at), load_bits<Words>(dout_columns + at), part);
            }
            sum += part;
        }
        store(delta + i, sum);
    }
}

template <class M, class T>
void pack_block(const Problem& p, const Operands& x, int64_t item, int64_t block, const BwdPacking<M>& w, const PackedItem<M>& to) {
    const int64_t first = block * block_rows;
    typename M::Word* dout_columns = to.dout_columns + first * M::words(p.Dv);
    const int rows = p.rows_of(block);
    Row row = p.row(item, first);
    to.range[block].set(p, row, rows);
    pack_queries<T>(M{}, p, x.q, row, rows, p.D, w.words, to.q_columns + first * M::words(p.D),
                    to.q_rows + first / M::per_word * leading(p.D));
    pack_queries<T>(M{}, p, x.dout, row, rows, p.Dv, w.words, dout_columns,
                    to.dout_rows + first / M::per_word * leading(p.Dv));
    float *lse = to.lse + first, *delta = to.delta + first;
    set_delta<T>(M{}, p, x.out, row, rows, w, dout_columns, delta);
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

// Keys [begin, end) of an item; begin is even.
template <class T, class M>
void pack_keys(const Problem& p, const Operands& x, int64_t item, int64_t begin, int64_t end, const PackedItem<M>& to) {
    const T *k = p.keys<T>(x.k, item), *v = p.keys<T>(x.v, item);
    pack_broadcast_keys(M{}, k, x.k.stride_t, begin, end, end == p.Tk, p.D, to.k_words);
    pack_broadcast_keys(M{}, v, x.v.stride_t, begin, end, end == p.Tk, p.Dv, to.v_words);
    if constexpr (M::per_word == 2) pack_vector_keys(M{}, k, x.k.stride_t, begin, end, p.D, to.k_rows);
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
