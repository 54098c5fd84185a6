// The selective scan, forward. A thread takes VL channels of one sequence through all its steps.
#include "cpu/kernels.h"
#include "cpu/selective_scan_block.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Steps [begin, end) of 4 * kQuads states h: y_t += sum of C_t h_t, with x = dt u
template <int kQuads>
LLMCORE_INLINE void advance(const float* A_block, const float* dt, const float* x, const float* B, const float* C,
                            int64_t padded, int begin, int end, float* h, float* y) {
    vf state[kQuads][4];
    for (int q = 0; q < kQuads; q++) {
        for (int i = 0; i < 4; i++) state[q][i] = load(h + (4 * q + i) * VL);
    }
    for (int t = begin; t < end; t++) {
        const vf step = load(dt + t * VL), input = load(x + t * VL);
        const float *const b = B + t * padded, *const c = C + t * padded;
        vf sum[4] = {};
        for (int q = 0; q < kQuads; q++) {
            vf decay[4];
            decays(step, A_block + 4 * q * VL, decay);
            for (int i = 0; i < 4; i++) {
                state[q][i] = fmadd(decay[i], state[q][i], input * b[4 * q + i]);
                sum[i] = fmadd(state[q][i], broadcast(c[4 * q + i]), sum[i]);
            }
        }
        store(y + t * VL, load(y + t * VL) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
    for (int q = 0; q < kQuads; q++) {
        for (int i = 0; i < 4; i++) store(h + (4 * q + i) * VL, state[q][i]);
    }
}

}  // namespace

bool selective_scan_fwd(View u, View delta, View A, View B, View C, View D, View z, View delta_bias, View initial,
                        View cu_seqlens, View y, View last, View saved, int64_t batch, int64_t channels, int64_t length,
                        int64_t states, int64_t groups, int64_t documents, bool softplus_) {
    const int64_t padded = padded_states(states), per_group = channels / groups, blocks = ceil_div(per_group, VL);
    const int64_t chunks = ceil_div(length, kChunk), cost = VL * length * states;
    const Documents rows(cu_seqlens, documents, length);
    const float* const initial_states = static_cast<const float*>(initial.data);
    bool bad = false;
    parallel_for(batch * groups * blocks, kGrain / cost, [&](int64_t begin, int64_t end) {
        const Scratch scratch(padded * (2 * VL + 2 * kChunk));
        float *const A_block = scratch.data(), *const h = A_block + padded * VL;
        float *const b = h + padded * VL, *const c = b + padded * kChunk;
        alignas(64) float dt[kChunk * VL], x[kChunk * VL], out[kChunk * VL];
        for (int64_t item = begin; item < end; item++) {
            const int64_t block = item % blocks, group = item / blocks % groups;
            Place at = {item / blocks / groups, group * per_group + block * VL, 0,
                        at_most(per_group - block * VL, VL), 0};
            load_channel_states(static_cast<const float*>(A.data), at.channel, at.lanes, states, A_block);
            const vf skip = load_channels(D, at.channel, at.lanes), bias = load_channels(delta_bias, at.channel, at.lanes);
            __builtin_memset(h, 0, std::size_t(padded) * VL * sizeof(float));
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                at.step = chunk * kChunk;
                at.steps = at_most(length - at.step, kChunk);
                if (saved) {
                    float* const to = static_cast<float*>(saved.data) +
                                      (at.batch * chunks + chunk) * states * channels + at.channel;
                    for (int64_t n = 0; n < states; n++) store(to + n * channels, load(h + n * VL), at.lanes);
                }
                at.load(delta, dt);
                at.load(u, x);
                load_states(B, at.batch, group, at.step, at.steps, states, padded, b);
                load_states(C, at.batch, group, at.step, at.steps, states, padded, c);
                if (step_sizes(at, bias, softplus_, dt)) __atomic_store_n(&bad, true, __ATOMIC_RELAXED);
                for (int t = 0; t < at.steps; t++) {
                    const vf input = load(x + t * VL);
                    store(out + t * VL, skip * input);
                    store(x + t * VL, load(dt + t * VL) * input);
                }
                for (int t = 0; t < at.steps;) {
                    const Run run = rows.run_of(at.step + t, at.step, at.steps, at.batch);
                    if (run.first) {
                        if (initial) {
                            load_channel_states(initial_states + run.row * channels * states, at.channel, at.lanes, states, h);
                        } else {
                            __builtin_memset(h, 0, std::size_t(padded) * VL * sizeof(float));
                        }
                    }
                    for (int64_t n = 0; n < states; n += kSlab) {
                        with_quads(states - n, [&](auto quads) {
                            advance<quads()>(A_block + n * VL, dt, x, b + n, c + n, padded, run.begin, run.end, h + n * VL, out);
                        });
                    }
                    if (run.last) {
                        store_channel_states(h, at.lanes, states,
                                             static_cast<float*>(last.data) + run.row * channels * states, at.channel);
                    }
                    t = run.end;
                }
                if (z) {
                    at.load(z, x);
                    for (int t = 0; t < at.steps; t++) {
                        const vf gate = load(x + t * VL);
                        store(out + t * VL, load(out + t * VL) * gate * sigmoid(gate));
                    }
                }
                at.store(out, y);
            }
        }
    });
    return bad;
}

}  // namespace llmcore::LLMCORE_ISA
