// ssd, forward. A thread takes a share of the heads of one group of one document through the document's chunks: the heads share
// B, C and their products.
#include "cpu/kernels.h"
#include "cpu/ssd_chunk.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// One thread's matrices, of a chunk but for the states.
struct FwdWork {
    float *B, *C, *BT, *products;                 // of a group
    float *x, *gained, *y, *z, *weights, *turn;   // of a head
    float* states;                                // of each of its heads
    Decays* decays;

    void place(Layout& layout, const Problem& p) {
        B = layout.take<float>(kChunk * p.n_stride());
        C = layout.take<float>(kChunk * p.n_stride());
        BT = layout.take<float>(p.n_words() * s_stride);
        products = layout.take<float>(kChunk * s_stride);
        x = layout.take<float>(kChunk * p.p_stride());
        gained = layout.take<float>(kChunk * p.p_stride());
        y = layout.take<float>(kChunk * p.p_stride());
        z = layout.take<float>(kChunk * p.p_stride());
        weights = layout.take<float>(kChunk * s_stride);
        turn = layout.take<float>(p.p_vectors() * VL * p.n_stride());
        states = layout.take<float>(p.per_group() * p.state_size());
        decays = layout.take<Decays>(1);
    }
};

// weights_ts = L_ts (C_t B_s) dt_s, zeros where s > t
template <class F>
LLMCORE_INLINE void set_weights(const Decays& d, const float* products, const Place& at, float* weights, const F& meanwhile) {
    for (int t = 0; t < at.rows(); t++) {
        if (t < at.steps) meanwhile(t);
        for (int s = 0; s < at.filled(); s += VL) {
            vf weight = zero();
            if (s <= t && t < at.steps) {
                weight = select(lanes_up_to(t - s), d.between(t, s) * load(products + t * s_stride + s) * load(d.dt + s), zero());
            }
            store(weights + t * s_stride + s, weight);
        }
    }
}

// y becomes (y + D x) silu(z)
void finish(const Problem& p, const FwdWork& w, const Place& at, int64_t head) {
    const float* const skip = p.D ? static_cast<const float*>(p.D.data) + head * p.head_dim : nullptr;
    if (p.z) load_rows(p.z, at, head, p.head_dim, {w.z, p.p_stride()});
    if (!p.z && !skip) return;
    for_vectors(p.head_dim, [&](int64_t i, auto lanes) {
        const vf factor = skip ? load(skip + i, lanes) : zero();
        for (int64_t t = 0; t < at.steps; t++) {
            float* const to = w.y + t * p.p_stride() + i;
            vf y = load(to);
            if (skip) y = fmadd(factor, load(w.x + t * p.p_stride() + i), y);
            if (p.z) {
                const vf gate = load(w.z + t * p.p_stride() + i);
                y *= gate * sigmoid(gate);
            }
            store(to, y);
        }
    });
}

// One head through a chunk; h is the state before it and becomes the state after it. Whether a step is no number.
bool advance(const Problem& p, const FwdWork& w, const Place& at, int64_t head, const View& out, float* h) {
    Decays& d = *w.decays;
    const bool bad = d.set(p, at, head);
    const int64_t p_stride = p.p_stride(), n_stride = p.n_stride();
    const Matrix state = {h, p_stride}, x = {w.x, p_stride}, gained = {w.gained, p_stride}, y = {w.y, p_stride};
    load_rows(p.x, at, head, p.head_dim, x);
    scale_rows(x, d.gain, at, p.p_vectors(), gained);
    const int64_t next = head + 1 < p.heads ? head + 1 : head;
    const FarRows next_x(p.x, at, next, p.head_dim), z_rows(p.z, at, head, p.head_dim), y_rows(out, at, head, p.head_dim);
    set_weights(d, w.products, at, w.weights, [&](int t) {
        next_x.ask_for(t);
        if (p.z) z_rows.ask_for(t);
        y_rows.ask_to_write(t);
    });
    product(Rows{w.C, n_stride}, state, y, at.rows(), p.p_vectors(), p.n_words(), keep_nothing);
    product_of_lower(Rows{w.weights, s_stride}, x, y, at.rows(), p.p_vectors(), Keep{d.from_start, 1});
    product(Columns{w.B, n_stride}, gained, state, p.n_words(), p.p_vectors(), at.rows(), Keep{&d.whole, 0});
    finish(p, w, at, head);
    store_rows(y, out, at, head, p.head_dim);
    return bad;
}

// Heads [begin, end) of a group through a document. Whether a step is no number.
bool run(const Problem& p, const FwdWork& w, const Document& document, int64_t group, int64_t begin, int64_t end, const View& out,
         const View& final) {
    bool bad = false;
    for (int64_t head = begin; head < end; head++) {
        load_state(p, p.initial, document.initial, head, w.turn, w.states + (head - begin) * p.state_size());
    }
    for (int64_t step = document.first; step < document.end; step += kChunk) {
        const Place at = {document.sequence, step, int(document.end - step < kChunk ? document.end - step : kChunk)};
        load_rows(p.B, at, group, p.states, {w.B, p.n_stride()});
        load_rows(p.C, at, group, p.states, {w.C, p.n_stride()});
        pack_transposed(w.B, p.n_stride(), at.filled(), p.n_words(), w.BT, s_stride);
        product_to_lower(Rows{w.C, p.n_stride()}, {w.BT, s_stride}, {w.products, s_stride}, at.rows(), p.n_words());
        for (int64_t head = begin; head < end; head++) {
            bad |= advance(p, w, at, head, out, w.states + (head - begin) * p.state_size());
        }
    }
    if (document.final < 0) return bad;
    for (int64_t head = begin; head < end; head++) {
        store_state(p, w.states + (head - begin) * p.state_size(), final, document.final, head);
    }
    return bad;
}

}  // namespace

bool ssd_fwd(View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View initial, View documents, View y, View final,
             int64_t count, int64_t heads, int64_t head_dim, int64_t states, int64_t groups, bool softplus_, float dt_min,
             float dt_max) {
    const Problem p{x,     dt,       A,      B,      C,         D,      z,     dt_bias, initial, static_cast<const Document*>(documents.data),
                    count, heads, head_dim, states, groups, softplus_, dt_min, dt_max};
    const int threads = p.worth_threads() ? max_threads() : 1;
    int64_t shares = 1;
    while (!is_balanced(count * groups * shares, threads) && shares < p.per_group()) shares++;
    const PartsOf<FwdWork, Problem> work(p, threads);
    bool bad = false;
    parallel_dynamic(threads > 1, count * groups * shares, [&](int64_t item, int thread) {
        const int64_t share = item % shares, group = item / shares % groups, first = group * p.per_group();
        const Document& document = p.documents[item / shares / groups];
        if (document.first == document.end) return;
        const int64_t begin = first + p.per_group() * share / shares, end = first + p.per_group() * (share + 1) / shares;
        if (run(p, work.at(thread), document, group, begin, end, y, final)) __atomic_store_n(&bad, true, __ATOMIC_RELAXED);
    });
    return bad && !softplus_;
}

}  // namespace llmcore::LLMCORE_ISA
