// What the forward and the backward scan share. A block is VL channels by up to kChunk steps: a vector of channels for each
// step, so that states, of which each channel has its own, are added up without a sum across lanes.
#pragma once

#include "cpu/activations.h"
#include "cpu/rows.h"
#include "cpu/selective_scan.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr int kChunk = 64;
constexpr int kSlab = 16;  // states that go through the steps of a chunk together, by fours

LLMCORE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LLMCORE_INLINE int64_t padded_states(int64_t states) { return ceil_div(states, kSlab) * kSlab; }
LLMCORE_INLINE int at_most(int64_t n, int most) { return n < most ? int(n) : most; }

// ---- blocks in memory -------------------------------------------------------------------------------------------------------

// to[t * to_stride + i] = from[i * stride_i + t * stride_t] for i < lanes, zeros up to VL
template <class T>
LLMCORE_INLINE void load_block(const T* from, int64_t stride_i, int64_t stride_t, int lanes, int steps, float* to,
                               int64_t to_stride) {
    if (stride_i == 1) {
        for (int t = 0; t < steps; t++) store(to + t * to_stride, load(from + t * stride_t, lanes));
        return;
    }
    alignas(64) float rows[VL * kChunk];
    for (int i = 0; i < VL; i++) {
        float* const row = rows + i * kChunk;
        if (i >= lanes) {
            __builtin_memset(row, 0, kChunk * sizeof(float));
        } else if (stride_t == 1) {
            for_vectors(steps, [&](int64_t t, auto count) { store(row + t, load(from + i * stride_i + t, count)); });
        } else {
            for (int t = 0; t < steps; t++) row[t] = to_float(from[i * stride_i + t * stride_t]);
            for (int t = steps; t % 4 != 0; t++) row[t] = 0.0f;
        }
    }
    alignas(64) float vectors[4 * VL];
    for (int t = 0; t < steps; t += 4) {
        transpose_to_vectors(rows + t, kChunk, vectors, VL);
        const int count = at_most(steps - t, 4);
        for (int j = 0; j < count; j++) store(to + (t + j) * to_stride, load(vectors + j * VL));
    }
}

// to[i * stride_i + t * stride_t] = from[t * VL + i] for i < lanes
template <class T>
LLMCORE_INLINE void store_block(const float* from, int lanes, int steps, T* to, int64_t stride_i, int64_t stride_t) {
    if (stride_i == 1) {
        for (int t = 0; t < steps; t++) store(to + t * stride_t, load(from + t * VL), lanes);
        return;
    }
    alignas(64) float rows[VL * kChunk];
    for (int t = 0; t < steps; t += 4) {
        for (int i = 0; i < VL; i += 4) transpose_4x4(from + t * VL + i, VL, rows + i * kChunk + t, kChunk);
    }
    for (int i = 0; i < lanes; i++) {
        const float* const row = rows + i * kChunk;
        if (stride_t == 1) {
            for_vectors(steps, [&](int64_t t, auto count) { store(to + i * stride_i + t, load(row + t), count); });
        } else {
            for (int t = 0; t < steps; t++) store_one(to + i * stride_i + t * stride_t, row[t]);
        }
    }
}

// Where VL channels of one sequence and the steps of one chunk are in a (batch, channels, length) tensor.
struct Place {
    int64_t batch, channel, step;
    int lanes, steps;

    void load(const View& x, float* to) const {
        with_element(x.dtype, [&](auto element) {
            const auto* const p = static_cast<const decltype(element)*>(x.data);
            load_block(p + offset(x), x.stride[1], x.stride[2], lanes, steps, to, VL);
        });
    }
    void store(const float* from, const View& x) const {
        with_element(x.dtype, [&](auto element) {
            auto* const p = static_cast<decltype(element)*>(x.data);
            store_block(from, lanes, steps, p + offset(x), x.stride[1], x.stride[2]);
        });
    }

  private:
    int64_t offset(const View& x) const { return batch * x.stride[0] + channel * x.stride[1] + step * x.stride[2]; }
};

// to[t * padded + n] = x[batch, group, n, step + t], zeros from `states` to `padded`
LLMCORE_INLINE void load_states(const View& x, int64_t batch, int64_t group, int64_t step, int steps, int64_t states,
                                int64_t padded, float* to) {
    with_element(x.dtype, [&](auto element) {
        const auto* const p = static_cast<const decltype(element)*>(x.data) + batch * x.stride[0] + group * x.stride[1] +
                              step * x.stride[3];
        for (int64_t n = 0; n < padded; n += VL) {
            const int lanes = n >= states ? 0 : at_most(states - n, VL);
            load_block(p + n * x.stride[2], x.stride[2], x.stride[3], lanes, steps, to + n, padded);
        }
    });
}

// to[n * VL + i] = from[(first + i) * states + n], zeros beyond states and lanes
LLMCORE_INLINE void load_channel_states(const float* from, int64_t first, int lanes, int64_t states, float* to) {
    __builtin_memset(to, 0, std::size_t(padded_states(states)) * VL * sizeof(float));
    for (int i = 0; i < lanes; i++) {
        for (int64_t n = 0; n < states; n++) to[n * VL + i] = from[(first + i) * states + n];
    }
}

LLMCORE_INLINE void store_channel_states(const float* from, int lanes, int64_t states, float* to, int64_t first) {
    for (int i = 0; i < lanes; i++) {
        for (int64_t n = 0; n < states; n++) to[(first + i) * states + n] = from[n * VL + i];
    }
}

// ---- steps ------------------------------------------------------------------------------------------------------------------

LLMCORE_INLINE vf load_channels(const View& x, int64_t first, int lanes) {
    return x ? load(static_cast<const float*>(x.data) + first, lanes) : zero();
}

// delta becomes the step dt; whether one of the channels' steps is negative or no number
LLMCORE_INLINE bool step_sizes(const Place& at, vf bias, bool softplus_, float* delta) {
    vi bad{};
    for (int t = 0; t < at.steps; t++) {
        vf dt = load(delta + t * VL) + bias;
        if (softplus_) {
            dt = softplus(dt);
        } else {
            bad |= ~(dt >= 0.0f);
        }
        store(delta + t * VL, dt);
    }
    for (int i = 0; i < at.lanes; i++) {
        if (bad[i] != 0) return true;
    }
    return false;
}

// exp(dt A) for four states at once. Not 2^(dt A log2(e)): the rounding of A log2(e) would be the same in every step.
LLMCORE_INLINE void decays(vf dt, const float* A, vf (&decay)[4]) {
    for (int i = 0; i < 4; i++) decay[i] = exp(dt * load(A + i * VL));
}

// f(std::integral_constant<int, quads>{}) with the number of fours that hold the states from n on
template <class F>
LLMCORE_INLINE void with_quads(int64_t states, const F& f) {
    if (states > 12) return f(std::integral_constant<int, 4>{});
    if (states > 8) return f(std::integral_constant<int, 3>{});
    if (states > 4) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 1>{});
}

// ---- documents --------------------------------------------------------------------------------------------------------------

// Steps [begin, end) of a chunk that belong to one row of states; whether the row begins and ends with them.
struct Run {
    int begin, end;
    int64_t row;
    bool first, last;
};

struct Documents {
    const std::int32_t* offsets;  // null where sequences are not packed
    int64_t count, length;

    Documents(const View& cu_seqlens, int64_t count_, int64_t length_)
        : offsets(static_cast<const std::int32_t*>(cu_seqlens.data)), count(count_), length(length_) {}

    Run run_of(int64_t step, int64_t chunk, int steps, int64_t batch) const {
        int64_t low = 0, high = offsets == nullptr ? 1 : count;  // offsets[low] <= step < offsets[high]
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (offsets[middle] <= step ? low : high) = middle;
        }
        const int64_t start = offsets == nullptr ? 0 : offsets[low], end = offsets == nullptr ? length : offsets[low + 1];
        const int begin = start <= chunk ? 0 : int(start - chunk), stop = at_most(end - chunk, steps);
        return {begin, stop, batch + low, start >= chunk, end <= chunk + steps};
    }
};

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
