// The selective scan, backward. A thread takes a share of the channels of one group of one sequence through the chunks, the
// last one first: the states inside a chunk are computed again from the saved one before it, then the gradients go back
// through its steps. What is summed over channels is added up by the chunk, what is summed over time by the block.
#include "cpu/kernels.h"
#include "cpu/reduce_lanes.h"
#include "cpu/selective_scan_block.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr int64_t kBlock = kChunk * VL, kSlabBlock = kChunk * kSlab * VL;

// What a thread keeps of one chunk of a block, [step][lane], and of a slab of its states, [step][state][lane].
struct Steps {
    float dt[kBlock], raw[kBlock], u[kBlock], x[kBlock], dy[kBlock], z[kBlock], y[kBlock];
    float gain[kBlock], ddt[kBlock];  // sums over the states of dh B, and of dh A exp(dt A) h_t-1
    float decay[kSlabBlock], before[kSlabBlock];
    float dA[kSlab * VL];
};

// h through steps [begin, end); each step's decay and the state before it are kept
template <int kQuads, bool kOutput>
LLMCORE_INLINE void recompute(const float* A_block, const float* B, const float* C, int64_t padded, int begin, int end, float* h,
                              Steps& s) {
    vf state[kQuads][4];
    for (int q = 0; q < kQuads; q++) {
        for (int i = 0; i < 4; i++) state[q][i] = load(h + (4 * q + i) * VL);
    }
    for (int t = begin; t < end; t++) {
        const vf step = load(s.dt + t * VL), input = load(s.x + t * VL);
        const float *const b = B + t * padded, *const c = C + t * padded;
        vf sum[4] = {};
        for (int q = 0; q < kQuads; q++) {
            vf decay[4];
            decays(step, A_block + 4 * q * VL, decay);
            for (int i = 0; i < 4; i++) {
                const int64_t at = (t * kSlab + 4 * q + i) * VL;
                store(s.decay + at, decay[i]);
                store(s.before + at, state[q][i]);
                state[q][i] = fmadd(decay[i], state[q][i], input * b[4 * q + i]);
                if (kOutput) sum[i] = fmadd(state[q][i], broadcast(c[4 * q + i]), sum[i]);
            }
        }
        if (kOutput) store(s.y + t * VL, load(s.y + t * VL) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
    for (int q = 0; q < kQuads; q++) {
        for (int i = 0; i < 4; i++) store(h + (4 * q + i) * VL, state[q][i]);
    }
}

// dh, the gradient of the states after step end - 1, back to that of the states before step begin
template <int kQuads>
LLMCORE_INLINE void go_back(const float* A_block, const float* B, const float* C, int64_t padded, int begin, int end, float* dh,
                            float* dB, float* dC, Steps& s) {
    for (int t = end - 1; t >= begin; t--) {
        const vf step = load(s.dt + t * VL), input = load(s.x + t * VL), dy = load(s.dy + t * VL);
        const float *const b = B + t * padded, *const c = C + t * padded;
        vf of_b[kSlab], of_c[kSlab], gain[2] = {}, slope[2] = {};
        for (int n = 0; n < 4 * kQuads; n++) {
            const int64_t at = (t * kSlab + n) * VL;
            const vf decay = load(s.decay + at), before = load(s.before + at);
            const vf gradient = fmadd(dy, broadcast(c[n]), load(dh + n * VL)), carried = gradient * decay;
            const vf through = carried * before;
            store(dh + n * VL, carried);
            store(s.dA + n * VL, fmadd(through, step, load(s.dA + n * VL)));
            slope[n % 2] = fmadd(through, load(A_block + n * VL), slope[n % 2]);
            gain[n % 2] = fmadd(gradient, broadcast(b[n]), gain[n % 2]);
            of_b[n] = gradient * input;
            of_c[n] = fmadd(decay, before, input * b[n]) * dy;
        }
        for (int n = 4 * kQuads; n < kSlab; n++) of_b[n] = of_c[n] = zero();
        for (int n = 0; n < kSlab; n += VL) {
            float *const to_b = dB + t * padded + n, *const to_c = dC + t * padded + n;
            store(to_b, load(to_b) + reduce_each(reinterpret_cast<vf(&)[VL]>(of_b[n])));
            store(to_c, load(to_c) + reduce_each(reinterpret_cast<vf(&)[VL]>(of_c[n])));
        }
        store(s.gain + t * VL, load(s.gain + t * VL) + (gain[0] + gain[1]));
        store(s.ddt + t * VL, load(s.ddt + t * VL) + (slope[0] + slope[1]));
    }
}

struct Bwd {
    View dy, u, delta, A, B, C, D, z, delta_bias, initial, saved, du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial;
    Documents rows;
    int64_t channels, length, states, padded, groups, chunks;
    bool softplus_;

    // What is carried from chunk to chunk for one block: dh; the sums dA, dD and dbias; what rounding took from them.
    int64_t sums() const { return (padded + 2) * VL; }
    int64_t carried() const { return padded * VL + 2 * sums(); }

    float* row_states(const View& x, int64_t row) const { return static_cast<float*>(x.data) + row * channels * states; }

    void run_block(const Place& at, const float* b, const float* c, float* carry, float* A_block, float* h, float* db, float* dc,
                   Steps& s) const {
        float *const dh = carry, *const dA_block = carry + padded * VL, *const lost = dA_block + sums();
        const vf skip = load_channels(D, at.channel, at.lanes), bias = load_channels(delta_bias, at.channel, at.lanes);
        load_channel_states(static_cast<const float*>(A.data), at.channel, at.lanes, states, A_block);
        const float* const from = static_cast<const float*>(saved.data) +
                                  (at.batch * chunks + at.step / kChunk) * states * channels + at.channel;
        for (int64_t n = 0; n < padded; n++) store(h + n * VL, n < states ? load(from + n * channels, at.lanes) : zero());

        at.load(delta, s.dt);
        at.load(u, s.u);
        at.load(dy, s.dy);
        for (int t = 0; t < at.steps; t++) store(s.raw + t * VL, load(s.dt + t * VL) + bias);
        step_sizes(at, bias, softplus_, s.dt);
        for (int t = 0; t < at.steps; t++) {
            const vf input = load(s.u + t * VL);
            store(s.x + t * VL, load(s.dt + t * VL) * input);
            store(s.y + t * VL, skip * input);
            store(s.gain + t * VL, zero());
            store(s.ddt + t * VL, zero());
        }
        if (z) {
            at.load(z, s.z);
            for (int t = 0; t < at.steps; t++) {
                const vf gate = load(s.z + t * VL);
                store(s.dy + t * VL, load(s.dy + t * VL) * gate * sigmoid(gate));
            }
        }

        // A document may begin inside the chunk, so that each slab goes through the runs forwards and then backwards.
        for (int64_t n = 0; n < states; n += kSlab) {
            __builtin_memset(s.dA, 0, sizeof s.dA);
            with_quads(states - n, [&](auto quads) {
                for (int t = 0; t < at.steps;) {
                    const Run run = rows.run_of(at.step + t, at.step, at.steps, at.batch);
                    if (run.first) load_slab(initial, run.row, at, n, h + n * VL);
                    if (z) {
                        recompute<quads(), true>(A_block + n * VL, b + n, c + n, padded, run.begin, run.end, h + n * VL, s);
                    } else {
                        recompute<quads(), false>(A_block + n * VL, b + n, c + n, padded, run.begin, run.end, h + n * VL, s);
                    }
                    t = run.end;
                }
                for (int t = at.steps; t > 0;) {
                    const Run run = rows.run_of(at.step + t - 1, at.step, at.steps, at.batch);
                    if (run.last) load_slab(dinitial, run.row, at, n, dh + n * VL);
                    go_back<quads()>(A_block + n * VL, b + n, c + n, padded, run.begin, run.end, dh + n * VL, db + n, dc + n,
                                     s);
                    if (run.first) store_slab(dh + n * VL, run.row, at, n);
                    t = run.begin;
                }
            });
            for (int64_t i = 0; i < kSlab; i++) add_exactly(dA_block + (n + i) * VL, lost + (n + i) * VL, load(s.dA + i * VL));
        }

        if (z) {
            alignas(64) float dout[kBlock];
            at.load(dy, dout);
            for (int t = 0; t < at.steps; t++) {
                const vf gate = load(s.z + t * VL), p = sigmoid(gate);
                store(s.z + t * VL, load(dout + t * VL) * load(s.y + t * VL) * p * (1.0f + gate * (1.0f - p)));
            }
            at.store(s.z, dz);
        }
        vf dskip{}, dshift{};
        for (int t = 0; t < at.steps; t++) {
            const vf gain = load(s.gain + t * VL), input = load(s.u + t * VL), g = load(s.dy + t * VL);
            vf slope = fmadd(gain, input, load(s.ddt + t * VL));
            if (softplus_) slope *= sigmoid(load(s.raw + t * VL));
            store(s.u + t * VL, fmadd(gain, load(s.dt + t * VL), skip * g));
            store(s.ddt + t * VL, slope);
            dskip = fmadd(g, input, dskip);
            dshift += slope;
        }
        add_exactly(dA_block + padded * VL, lost + padded * VL, dskip);
        add_exactly(dA_block + (padded + 1) * VL, lost + (padded + 1) * VL, dshift);
        at.store(s.u, du);
        at.store(s.ddt, ddelta);
    }

    void load_slab(const View& x, int64_t row, const Place& at, int64_t first, float* to) const {
        __builtin_memset(to, 0, kSlab * VL * sizeof(float));
        if (!x) return;
        const float* const from = row_states(x, row) + at.channel * states + first;
        const int count = at_most(states - first, kSlab);
        for (int i = 0; i < at.lanes; i++) {
            for (int n = 0; n < count; n++) to[n * VL + i] = from[i * states + n];
        }
    }

    void store_slab(const float* from, int64_t row, const Place& at, int64_t first) const {
        float* const to = row_states(dinitial, row) + at.channel * states + first;
        const int count = at_most(states - first, kSlab);
        for (int i = 0; i < at.lanes; i++) {
            for (int n = 0; n < count; n++) to[i * states + n] = from[n * VL + i];
        }
    }

    // blocks [begin, end) of a group
    void run(int64_t batch, int64_t group, int64_t share, int64_t begin, int64_t end) const {
        const int64_t per_group = channels / groups, count = end - begin, chunk_states = kChunk * padded;
        const Scratch scratch(count * carried() + 2 * padded * VL + 4 * chunk_states + int64_t(sizeof(Steps) / sizeof(float)));
        float *const carry = scratch.data(), *const A_block = carry + count * carried(), *const h = A_block + padded * VL;
        float *const b = h + padded * VL, *const c = b + chunk_states, *const db = c + chunk_states, *const dc = db + chunk_states;
        Steps& steps = *reinterpret_cast<Steps*>(dc + chunk_states);
        __builtin_memset(carry, 0, std::size_t(count * carried()) * sizeof(float));
        Place at = {batch, 0, 0, 0, 0};
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            at.step = chunk * kChunk;
            at.steps = at_most(length - at.step, kChunk);
            load_states(B, batch, group, at.step, at.steps, states, padded, b);
            load_states(C, batch, group, at.step, at.steps, states, padded, c);
            __builtin_memset(db, 0, std::size_t(2 * chunk_states) * sizeof(float));
            for (int64_t block = begin; block < end; block++) {
                at.channel = group * per_group + block * VL;
                at.lanes = at_most(per_group - block * VL, VL);
                run_block(at, b, c, carry + (block - begin) * carried(), A_block, h, db, dc, steps);
            }
            store_states(db, dB, batch, group, share, at);
            store_states(dc, dC, batch, group, share, at);
        }
        for (int64_t block = begin; block < end; block++) {
            at.channel = group * per_group + block * VL;
            at.lanes = at_most(per_group - block * VL, VL);
            float *const of_block = carry + (block - begin) * carried() + padded * VL, *const last = of_block + padded * VL;
            for (int64_t i = 0; i < sums(); i += VL) store(of_block + i, load(of_block + i) + load(of_block + sums() + i));
            store_channel_states(of_block, at.lanes, states, row_states(dA, batch), at.channel);
            if (dD) store(static_cast<float*>(dD.data) + batch * channels + at.channel, load(last), at.lanes);
            if (dbias) store(static_cast<float*>(dbias.data) + batch * channels + at.channel, load(last + VL), at.lanes);
        }
    }

    // to[share, batch, group, n, step + t] = from[t * padded + n]
    void store_states(const float* from, const View& to, int64_t batch, int64_t group, int64_t share, const Place& at) const {
        float* const p = static_cast<float*>(to.data) + share * to.stride[0] + batch * to.stride[1] + group * to.stride[2];
        for (int64_t n = 0; n < states; n++) {
            for (int t = 0; t < at.steps; t++) p[n * to.stride[3] + at.step + t] = from[t * padded + n];
        }
    }
};

}  // namespace

void selective_scan_bwd(View dy, View u, View delta, View A, View B, View C, View D, View z, View delta_bias, View initial,
                        View cu_seqlens, View saved, View du, View ddelta, View dA, View dB, View dC, View dD, View dz,
                        View dbias, View dinitial, int64_t batch, int64_t channels, int64_t length, int64_t states,
                        int64_t groups, int64_t documents, int64_t shares, bool softplus_) {
    const Bwd bwd = {dy,       u,       delta,  A,      B,       C,  D,
                     z,        delta_bias, initial, saved, du, ddelta, dA,
                     dB,       dC,      dD,     dz,     dbias,   dinitial, Documents(cu_seqlens, documents, length),
                     channels, length,  states, padded_states(states), groups, ceil_div(length, kChunk), softplus_};
    const int64_t blocks = ceil_div(channels / groups, VL), items = batch * groups * shares;
    parallel_for(items, kGrain / (ceil_div(blocks, shares) * VL * length * states), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t share = item % shares, group = item / shares % groups;
            bwd.run(item / shares / groups, group, share, blocks * share / shares, blocks * (share + 1) / shares);
        }
    });
}

}  // namespace llmcore::LLMCORE_ISA
