// ssd, backward. A thread takes a share of the heads of one group of one document, as many of them at a time as there is room for
// their states: forwards through the chunks, keeping the state before each, then backwards, the gradient of the state going along.
//
// What B and C get from a chunk's pairs of steps has the same factors for both, L_ts (dy_t x_s) dt_s, which are first added up over
// the heads; what they get from the states is added up transposed, so that states are multiplied as they lie.
#include "cpu/kernels.h"
#include "cpu/reduce_lanes.h"
#include "cpu/ssd_chunk.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Floats of states that a thread keeps, unless one head of the longest document has more: 32 MB. In 32768 steps a head with 64 x
// 128 states has 16 MB.
constexpr int64_t kKept = int64_t(8) << 20;

struct BwdProblem : Problem {
    View dy, dfinal, dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial;
    int64_t shares, parts, kept_states;

    int64_t of_share() const { return (per_group() + shares - 1) / shares; }
    int64_t heads_at_once() const { return of_share() < kept_states ? of_share() : kept_states; }
    const float* skip(int64_t head) const { return D ? static_cast<const float*>(D.data) + head * head_dim : nullptr; }
};

// One thread's matrices, of a chunk but for the states, and its sums.
struct BwdWork {
    float *B, *C, *BT, *CT, *products, *spread, *dBT, *dCT, *turn;                                    // of a group
    float *x, *dy, *dout, *z, *input, *sent, *v, *y, *inputT, *gainedT, *sentT, *crossed, *weights, *through;  // of a head
    float *kept, *dh;
    double *dA, *dbias, *dD;
    Decays* decays;

    void place(Layout& layout, const BwdProblem& p) {
        const int64_t n_rows = p.n_vectors() * VL, p_rows = p.p_vectors() * VL;
        const auto take = [&](int64_t count, auto&... to) { ((to = layout.take<float>(count)), ...); };
        take(kChunk * p.n_stride(), B, C);
        take(n_rows * s_stride, BT, CT, dBT, dCT, through);
        take(kChunk * s_stride, products, spread, crossed, weights);
        take(kChunk * p.p_stride(), x, dy, dout, z, input, sent, v, y);
        take(p_rows * s_stride, inputT, gainedT, sentT);
        turn = layout.take<float>((p_rows > kChunk ? p_rows : kChunk) * p.n_stride());
        kept = layout.take<float>(p.kept_states * p.state_size());
        dh = layout.take<float>(p.heads_at_once() * p.state_size());
        dA = layout.take<double>(p.heads);
        dbias = layout.take<double>(p.heads);
        dD = layout.take<double>(p.heads * p.head_dim);
        decays = layout.take<Decays>(1);
    }
};

// to[t] = the sum over columns of a_t b_t
LLMCORE_INLINE void row_dots(Matrix a, Matrix b, const Place& at, int columns, float* to) {
    for (int t = 0; t < at.filled(); t += VL) {
        vf sums[VL];
        for (int i = 0; i < VL; i++) {
            const float *const p = a.data + (t + i) * a.stride, *const q = b.data + (t + i) * b.stride;
            sums[i] = zero();
            for (int v = 0; v < columns; v++) sums[i] = fmadd(load(p + v * VL), load(q + v * VL), sums[i]);
        }
        store(to + t, reduce_each(sums));
    }
}

// weights_ts = L_ts (C_t B_s), spread_ts += L_ts crossed_ts, zeros where s > t, and across_j the sum over s < j <= t of both with
// one L_ts; crossed_ts = (dy_t x_s) dt_s. meanwhile(t) for every step.
template <class F>
LLMCORE_INLINE void weigh(const Decays& d, const BwdWork& w, const Place& at, float* across, const F& meanwhile) {
    alignas(64) float below[kChunk] = {}, parts[kChunk * VL];  // below: the sums over t >= j
    fill_zero(parts, kChunk * VL);
    for (int t = at.rows() - 1; t >= 0; t--) {
        if (t < at.steps) meanwhile(t);
        vf sum = zero();
        for (int s = 0; s < at.filled(); s += VL) {
            vf weight = zero();
            if (s <= t && t < at.steps) {
                const int64_t here = t * s_stride + s;
                const vf decay = select(lanes_up_to(t - s), d.between(t, s), zero()), crossed = load(w.crossed + here);
                weight = decay * load(w.products + here);
                store(w.spread + here, fmadd(decay, crossed, load(w.spread + here)));
                const vf column = fmadd(weight, crossed, load(below + s));
                store(below + s, column);
                sum += select(lanes_up_to(t - 1 - s), column, zero());
            }
            store(w.weights + t * s_stride + s, weight);
        }
        store(parts + t * VL, sum);
    }
    for (int t = 0; t < at.filled(); t += VL) {
        vf sums[VL];
        for (int i = 0; i < VL; i++) sums[i] = load(parts + (t + i) * VL);
        store(across + t, reduce_each(sums));
    }
}

// dCT += through, and into_t the sum over the states of C and it
void add_through(const BwdWork& w, const Place& at, int64_t states, float* into) {
    for (int t = 0; t < at.filled(); t += VL) {
        vf sums[2] = {};
        for (int64_t n = 0; n < states; n++) {
            const int64_t here = n * s_stride + t;
            const vf through = load(w.through + here);
            store(w.dCT + here, load(w.dCT + here) + through);
            sums[n % 2] = fmadd(load(w.CT + here), through, sums[n % 2]);
        }
        store(into + t, sums[0] + sums[1]);
    }
}

// dy = dout silu(z)
void load_gradient(const BwdProblem& p, const BwdWork& w, const Place& at, int64_t head) {
    load_rows(p.dy, at, head, p.head_dim, {p.z ? w.dout : w.dy, p.p_stride()});
    if (!p.z) return;
    load_rows(p.z, at, head, p.head_dim, {w.z, p.p_stride()});
    for (int t = 0; t < at.filled(); t++) {
        for (int v = 0; v < p.p_vectors(); v++) {
            const int64_t here = t * p.p_stride() + v * VL;
            const vf gate = load(w.z + here);
            store(w.dy + here, load(w.dout + here) * gate * sigmoid(gate));
        }
    }
}

// dz from y, which is without the skip
void store_gate(const BwdProblem& p, const BwdWork& w, const Place& at, int64_t head) {
    for_vectors(p.head_dim, [&](int64_t i, auto lanes) {
        const vf skip = p.D ? load(p.skip(head) + i, lanes) : zero();
        for (int t = 0; t < at.steps; t++) {
            const int64_t here = t * p.p_stride() + i;
            const vf gate = load(w.z + here), s = sigmoid(gate), y = fmadd(skip, load(w.x + here), load(w.y + here));
            store(w.y + here, load(w.dout + here) * y * s * (1.0f + gate * (1.0f - s)));
        }
    });
    store_rows({w.y, p.p_stride()}, p.dz, at, head, p.head_dim);
}

// dx = dt v + D dy and, of the chunk, dD
void store_input_gradient(const BwdProblem& p, const BwdWork& w, const Place& at, int64_t head) {
    for_vectors(p.head_dim, [&](int64_t i, auto lanes) {
        const vf skip = p.D ? load(p.skip(head) + i, lanes) : zero();
        vf sum = zero();
        for (int t = 0; t < at.steps; t++) {
            const int64_t here = t * p.p_stride() + i;
            const vf dy = load(w.dy + here);
            sum = fmadd(dy, load(w.x + here), sum);
            store(w.y + here, fmadd(load(w.v + here), broadcast(w.decays->dt[t]), skip * dy));
        }
        if (!p.D) return;
        alignas(64) float sums[VL];
        store(sums, sum);
        for (int64_t j = 0; j < VL && i + j < p.head_dim; j++) w.dD[head * p.head_dim + i + j] += double(sums[j]);
    });
    store_rows({w.y, p.p_stride()}, p.dx, at, head, p.head_dim);
}

// ddt, dA and dbias. of_inputs_s = x_s v_s; dl_j = whole + across_j + the sums of into from j on and of out before j.
void store_step_gradient(const BwdProblem& p, const BwdWork& w, const Place& at, int64_t head, double whole, const float* across,
                         const float* into, const float* out, const float* of_inputs) {
    const Decays& d = *w.decays;
    const double rate = double(static_cast<const float*>(p.A.data)[head]);
    double dl[kChunk], later = 0.0, earlier = 0.0, dA = 0.0, dbias = 0.0;
    for (int t = at.steps - 1; t >= 0; t--) {
        later += double(into[t]);
        dl[t] = whole + double(across[t]) + later;
    }
    with_element(p.ddt.dtype, [&](auto element) {
        auto* const to = static_cast<decltype(element)*>(p.ddt.data) + at.sequence * p.ddt.stride[0] + at.step * p.ddt.stride[1] +
                         head * p.ddt.stride[2];
        for (int t = 0; t < at.steps; t++) {
            dl[t] += earlier;
            earlier += double(out[t]);
            const double ddt = (double(of_inputs[t]) + rate * dl[t]) * double(d.slope[t]);
            dA += double(d.dt[t]) * dl[t];
            dbias += ddt;
            store_one(to + t * p.ddt.stride[1], float(ddt));
        }
    });
    w.dA[head] += dA;
    w.dbias[head] += dbias;
}

// One head back through a chunk: h is the state before it, dh the gradient of the one after it and becomes that of h.
void go_back(const BwdProblem& p, const BwdWork& w, const Place& at, int64_t head, float* h, float* dh) {
    Decays& d = *w.decays;
    d.set(p, at, head);
    const int columns = p.p_vectors(), steps = at.filled() / VL;
    const int64_t p_stride = p.p_stride();
    const Matrix state = {h, p_stride}, gradient = {dh, p_stride}, x = {w.x, p_stride}, dy = {w.dy, p_stride};
    const Matrix input = {w.input, p_stride}, sent = {w.sent, p_stride}, v = {w.v, p_stride}, y = {w.y, p_stride};
    alignas(64) float across[kChunk], into[kChunk], out[kChunk], of_inputs[kChunk];

    load_rows(p.x, at, head, p.head_dim, x);
    load_gradient(p, w, at, head);
    scale_rows(x, d.gain, at, columns, input);
    pack_transposed(w.input, p_stride, at.filled(), p.p_words(), w.gainedT, s_stride);
    scale_rows(x, d.dt, at, columns, input);
    pack_transposed(w.input, p_stride, at.filled(), p.p_words(), w.inputT, s_stride);
    scale_rows(dy, d.from_start, at, columns, sent);
    pack_transposed(w.sent, p_stride, at.filled(), p.p_words(), w.sentT, s_stride);

    product_to_lower(Rows{w.dy, p_stride}, {w.inputT, s_stride}, {w.crossed, s_stride}, at.rows(), p.p_words());
    const int64_t next = head + 1 < p.heads ? head + 1 : head;
    const FarRows next_x(p.x, at, next, p.head_dim), next_dy(p.dy, at, next, p.head_dim), next_z(p.z, at, next, p.head_dim);
    const FarRows dx_rows(p.dx, at, head, p.head_dim), dz_rows(p.dz, at, head, p.head_dim);
    weigh(d, w, at, across, [&](int t) {
        next_x.ask_for(t);
        next_dy.ask_for(t);
        dx_rows.ask_to_write(t);
        if (!p.z) return;
        next_z.ask_for(t);
        dz_rows.ask_to_write(t);
    });
    if (p.z) {
        product(Rows{w.C, p.n_stride()}, state, y, at.rows(), columns, p.n_words(), keep_nothing);
        product_of_lower(Rows{w.weights, s_stride}, input, y, at.rows(), columns, Keep{d.from_start, 1});
        store_gate(p, w, at, head);
    }

    product(Rows{w.B, p.n_stride()}, gradient, v, at.rows(), columns, p.n_words(), keep_nothing);
    row_dots(x, v, at, columns, out);
    for (int s = 0; s < at.filled(); s += VL) store(out + s, load(out + s) * load(d.gain + s));
    product_of_upper(Columns{w.weights, s_stride}, dy, v, at.rows(), columns, Keep{d.to_end, 1});
    row_dots(x, v, at, columns, of_inputs);

    product(Rows{dh, p_stride}, {w.gainedT, s_stride}, {w.dBT, s_stride}, p.n_words(), steps, p.p_words(), keep_all);
    product(Rows{h, p_stride}, {w.sentT, s_stride}, {w.through, s_stride}, p.n_words(), steps, p.p_words(), keep_nothing);
    add_through(w, at, p.states, into);
    const float kept = sum_vectors(p.state_size(), [&](int64_t i, auto lanes) { return load(h + i, lanes) * load(dh + i, lanes); });
    product(Columns{w.C, p.n_stride()}, sent, gradient, p.n_words(), columns, at.rows(), Keep{&d.whole, 0});

    store_input_gradient(p, w, at, head);
    store_step_gradient(p, w, at, head, double(kept) * double(d.whole), across, into, out, of_inputs);
}

// What the chunk's pairs give to rows of B or C, and `sums`, transposed, what the states give, to the gradient.
template <class F>
void store_group_gradient(const BwdProblem& p, const BwdWork& w, const Place& at, const float* sums, const View& to, int64_t share,
                          int64_t group, bool more, const F& add_pairs) {
    const Matrix rows = {w.turn, p.n_stride()};
    pack_transposed(sums, s_stride, p.n_vectors() * VL, at.rows(), w.turn, p.n_stride());
    add_pairs(rows);
    float* out = static_cast<float*>(to.data) + share * to.stride[0] + at.sequence * to.stride[1] + at.step * to.stride[2] +
                 group * to.stride[3];
    for (int t = 0; t < at.steps; t++, out += to.stride[2]) {
        for_vectors(p.states, [&](int64_t n, auto lanes) {
            const vf sum = load(rows.data + t * rows.stride + n);
            store(out + n, more ? load(out + n, lanes) + sum : sum, lanes);
        });
    }
}

struct Heads {
    int64_t share, group, begin, end;
    bool more;  // other heads have been in the same share of dB and dC
    int64_t count() const { return end - begin; }
};

// The states before every chunk of a document: [chunk][head].
void keep_states(const BwdProblem& p, const BwdWork& w, const Document& document, const Heads& heads) {
    const int64_t size = p.state_size();
    const Matrix gained = {w.input, p.p_stride()};
    Decays& d = *w.decays;
    for (int64_t i = 0; i < heads.count(); i++) {
        load_state(p, p.initial, document.initial, heads.begin + i, w.turn, w.kept + i * size);
    }
    for (int64_t chunk = 1; chunk < document.chunks(); chunk++) {
        const Place at = {document.sequence, document.first + (chunk - 1) * kChunk, kChunk};
        load_rows(p.B, at, heads.group, p.states, {w.B, p.n_stride()});
        for (int64_t i = 0; i < heads.count(); i++) {
            float* const h = w.kept + (chunk * heads.count() + i) * size;
            __builtin_memcpy(h, h - heads.count() * size, std::size_t(size) * sizeof(float));
            d.set(p, at, heads.begin + i);
            load_rows(p.x, at, heads.begin + i, p.head_dim, gained);
            const FarRows next_x(p.x, at, heads.begin + (i + 1 < heads.count() ? i + 1 : i), p.head_dim);
            scale_rows(gained, d.gain, at, p.p_vectors(), gained, [&](int t) { next_x.ask_for(t); });
            product(Columns{w.B, p.n_stride()}, gained, {h, p.p_stride()}, p.n_words(), p.p_vectors(), kChunk, Keep{&d.whole, 0});
        }
    }
}

void run(const BwdProblem& p, const BwdWork& w, const Document& document, const Heads& heads) {
    const int64_t size = p.state_size(), n_stride = p.n_stride(), n_rows = p.n_vectors() * VL;
    keep_states(p, w, document, heads);
    for (int64_t i = 0; i < heads.count(); i++) {
        load_state(p, p.dfinal, document.final, heads.begin + i, w.turn, w.dh + i * size);
    }
    for (int64_t chunk = document.chunks() - 1; chunk >= 0; chunk--) {
        const int64_t step = document.first + chunk * kChunk;
        const Place at = {document.sequence, step, int(document.end - step < kChunk ? document.end - step : kChunk)};
        load_rows(p.B, at, heads.group, p.states, {w.B, n_stride});
        load_rows(p.C, at, heads.group, p.states, {w.C, n_stride});
        pack_transposed(w.B, n_stride, at.filled(), p.n_words(), w.BT, s_stride);
        pack_transposed(w.C, n_stride, at.filled(), p.n_words(), w.CT, s_stride);
        product_to_lower(Rows{w.C, n_stride}, {w.BT, s_stride}, {w.products, s_stride}, at.rows(), p.n_words());
        fill_zero(w.spread, kChunk * s_stride);
        fill_zero(w.dBT, n_rows * s_stride);
        fill_zero(w.dCT, n_rows * s_stride);
        for (int64_t i = 0; i < heads.count(); i++) {
            go_back(p, w, at, heads.begin + i, w.kept + (chunk * heads.count() + i) * size, w.dh + i * size);
        }
        store_group_gradient(p, w, at, w.dBT, p.dB, heads.share, heads.group, heads.more, [&](Matrix rows) {
            product_of_upper(Columns{w.spread, s_stride}, {w.C, n_stride}, rows, at.rows(), p.n_vectors(), keep_all);
        });
        store_group_gradient(p, w, at, w.dCT, p.dC, heads.share, heads.group, heads.more, [&](Matrix rows) {
            product_of_lower(Rows{w.spread, s_stride}, {w.B, n_stride}, rows, at.rows(), p.n_vectors(), keep_all);
        });
    }
    if (document.initial < 0) return;
    for (int64_t i = 0; i < heads.count(); i++) store_state(p, w.dh + i * size, p.dinitial, document.initial, heads.begin + i);
}

// The items of one part: (document, group, share), as many chunks in each part as whole items allow.
void run_part(const BwdProblem& p, const BwdWork& w, int64_t part) {
    fill_zero(w.dA, p.heads);
    fill_zero(w.dbias, p.heads);
    fill_zero(w.dD, p.heads * p.head_dim);
    const int64_t items = p.groups * p.shares;
    int64_t total = 0, before = 0;
    for (int64_t i = 0; i < p.count; i++) total += p.documents[i].chunks() * items;
    for (int64_t i = 0; i < p.count; i++) {
        const Document& document = p.documents[i];
        const int64_t chunks = document.chunks();
        if (chunks == 0) continue;
        for (int64_t item = 0; item < items; item++, before += chunks) {
            if (before * p.parts / total != part) continue;
            const int64_t share = item % p.shares, group = item / p.shares, first = group * p.per_group();
            const int64_t begin = first + p.per_group() * share / p.shares, end = first + p.per_group() * (share + 1) / p.shares;
            const int64_t room = p.kept_states / chunks;
            for (int64_t head = begin; head < end; head += room) {
                run(p, w, document, {share, group, head, end - head < room ? end : head + room, head > begin});
            }
        }
    }
    for (int64_t head = 0; head < p.heads; head++) {
        static_cast<float*>(p.dA.data)[part * p.heads + head] = float(w.dA[head]);
        if (p.dbias) static_cast<float*>(p.dbias.data)[part * p.heads + head] = float(w.dbias[head]);
    }
    if (!p.D) return;
    for (int64_t i = 0; i < p.heads * p.head_dim; i++) {
        static_cast<float*>(p.dD.data)[part * p.heads * p.head_dim + i] = float(w.dD[i]);
    }
}

}  // namespace

void ssd_bwd(View dy, View dfinal, View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View initial, View documents,
             View dx, View ddt, View dA, View dB, View dC, View dD, View dz, View dbias, View dinitial, int64_t count, int64_t heads,
             int64_t head_dim, int64_t states, int64_t groups, int64_t shares, int64_t parts, bool softplus_, float dt_min,
             float dt_max) {
    BwdProblem p{{x, dt, A, B, C, D, z, dt_bias, initial, static_cast<const Document*>(documents.data), count, heads, head_dim,
                  states, groups, softplus_, dt_min, dt_max},
                 dy, dfinal, dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial, shares, parts, 0};
    int64_t longest = 1;
    for (int64_t i = 0; i < count; i++) {
        if (p.documents[i].chunks() > longest) longest = p.documents[i].chunks();
    }
    const int64_t all = longest * p.of_share(), room = kKept / p.state_size();
    p.kept_states = all < room ? all : (room > longest ? room : longest);
    const PartsOf<BwdWork, BwdProblem> work(p, parts);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++) run_part(p, work.at(part), part);
    });
}

}  // namespace llmcore::LLMCORE_ISA
