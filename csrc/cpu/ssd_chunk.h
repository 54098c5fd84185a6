// What ssd's forward and backward share: a chunk of a document as matrices of floats, for one group its B, C and their products,
// for one head its decays, weights and state. A state is kept as (states, head_dim), which makes each product of the forward
// one of matrices as they lie, but for C B^T.
//
// Steps t and s are rows and columns of a chunk's matrices; T is for transposed. Rows are zeros from a chunk's last step to a
// whole vector.
#pragma once

#include "cpu/activations.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/small_product.h"
#include "cpu/ssd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Steps of a chunk. A product with the states takes 2 states multiplications for each element of y, one inside the chunk kChunk on
// average of its half: at 64 these are few, and a head's matrices lie in the second cache.
constexpr int kChunk = 64;

struct Document {
    int64_t sequence, first, end, initial, final;
    int64_t chunks() const { return (end - first + kChunk - 1) / kChunk; }
};

struct Problem {
    View x, dt, A, B, C, D, z, dt_bias, initial;
    const Document* documents;
    int64_t count, heads, head_dim, states, groups;
    bool softplus;
    float dt_min, dt_max;

    int64_t per_group() const { return heads / groups; }
    int64_t p_stride() const { return leading(head_dim); }
    int64_t n_stride() const { return leading(states); }
    int p_vectors() const { return vectors(head_dim); }
    int n_vectors() const { return vectors(states); }
    int p_words() const { return round_up(int(head_dim), 4); }
    int n_words() const { return round_up(int(states), 4); }
    int64_t state_size() const { return n_words() * p_stride(); }

    // steps that the documents have in all
    int64_t steps() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; i++) sum += documents[i].end - documents[i].first;
        return sum;
    }
    bool worth_threads() const { return double(steps()) * double(heads) * double(head_dim) * double(states) > 2e5; }
};

constexpr int64_t s_stride = kChunk;

// Where a chunk is.
struct Place {
    int64_t sequence, step;
    int steps;

    int rows() const { return round_up(steps, 4); }
    int filled() const { return round_up(steps, VL); }  // rows and columns that are defined
};

// ---- matrices ---------------------------------------------------------------------------------------------------------------

// to = x[sequence, steps, of, :], its n elements as whole vectors
__attribute__((noinline)) void load_rows(const View& x, const Place& at, int64_t of, int64_t n, Matrix to) {
    with_element(x.dtype, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(x.data) + at.sequence * x.stride[0] + at.step * x.stride[1] +
                           of * x.stride[2];
        for (int t = 0; t < at.steps; t++, from += x.stride[1]) {
            for_vectors(n, [&](int64_t i, auto lanes) { store(to.data + t * to.stride + i, load(from + i, lanes)); });
        }
    });
    fill_zero(to.data + at.steps * to.stride, (at.filled() - at.steps) * to.stride);
}

__attribute__((noinline)) void store_rows(Matrix from, const View& x, const Place& at, int64_t of, int64_t n) {
    with_element(x.dtype, [&](auto element) {
        auto* to = static_cast<decltype(element)*>(x.data) + at.sequence * x.stride[0] + at.step * x.stride[1] + of * x.stride[2];
        for (int t = 0; t < at.steps; t++, to += x.stride[1]) {
            for_vectors(n, [&](int64_t i, auto lanes) { store(to + i, load(from.data + t * from.stride + i), lanes); });
        }
    });
}

// The rows of a head in x, to be asked for one by one while something else is computed: they lie far apart, which the processor
// does not foresee.
struct FarRows {
    const char* first;
    int64_t stride, bytes;

    FarRows(const View& x, const Place& at, int64_t of, int64_t n) {
        const int64_t size = x.dtype == DType::f32 ? 4 : 2;
        first = static_cast<const char*>(x.data) + (at.sequence * x.stride[0] + at.step * x.stride[1] + of * x.stride[2]) * size;
        stride = x.stride[1] * size;
        bytes = n * size;
    }
    void ask_for(int t) const {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + t * stride + i, 0, 2);
    }
    void ask_to_write(int t) const {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + t * stride + i, 1);
    }
};

// to = diag(factors) from; meanwhile(t) for every step
template <class F>
LLMCORE_INLINE void scale_rows(Matrix from, const float* factors, const Place& at, int columns, Matrix to, const F& meanwhile) {
    for (int t = 0; t < at.steps; t++) {
        meanwhile(t);
        for (int v = 0; v < columns; v++) {
            store(to.data + t * to.stride + v * VL, load(from.data + t * from.stride + v * VL) * factors[t]);
        }
    }
    fill_zero(to.data + at.steps * to.stride, (at.filled() - at.steps) * to.stride);
}

LLMCORE_INLINE void scale_rows(Matrix from, const float* factors, const Place& at, int columns, Matrix to) {
    scale_rows(from, factors, at, columns, to, [](int) {});
}

// A head's state (head_dim, states) of a row to (states, head_dim), zeros beyond them, and back; `turn` has room for either.
__attribute__((noinline)) void load_state(const Problem& p, const View& x, int64_t row, int64_t head, float* turn, float* h) {
    fill_zero(h, p.state_size());
    if (!x || row < 0) return;
    const float* from = static_cast<const float*>(x.data) + (row * p.heads + head) * p.head_dim * p.states;
    fill_zero(turn, p.p_vectors() * VL * p.n_stride());
    for (int64_t i = 0; i < p.head_dim; i++) __builtin_memcpy(turn + i * p.n_stride(), from + i * p.states, std::size_t(p.states) * 4);
    pack_transposed(turn, p.n_stride(), p.p_vectors() * VL, p.n_words(), h, p.p_stride());
}

__attribute__((noinline)) void store_state(const Problem& p, const float* h, const View& x, int64_t row, int64_t head) {
    float* to = static_cast<float*>(x.data) + (row * p.heads + head) * p.head_dim * p.states;
    for (int64_t i = 0; i < p.head_dim; i++) {
        for (int64_t n = 0; n < p.states; n++) to[i * p.states + n] = h[n * p.p_stride() + i];
    }
}

// ---- decays -----------------------------------------------------------------------------------------------------------------

// lanes 0 to n: n may be any number
LLMCORE_INLINE vi lanes_up_to(int n) {
    return lane_numbers() <= n;
}

// exp(sum), but 0 below 1e-30: beside a float that any step adds it is nothing, and the processor takes a hundred times as long for
// the products of subnormal numbers, which a chunk whose states decay fast is else full of.
LLMCORE_INLINE vf decay_of(vf sum) { return select(sum < -69.0f, zero(), exp(sum)); }

// A head's steps and their decays; steps of no size follow the chunk's last.
struct Decays {
    alignas(64) float dt[kChunk], slope[kChunk];              // slope: the derivative of dt by what was given
    alignas(64) float high[kChunk], low[kChunk];              // the sum of the logarithms up to a step
    alignas(64) float from_start[kChunk], to_end[kChunk];     // L_tb, L_es
    alignas(64) float gain[kChunk];                           // L_es dt_s
    float whole;                                              // L_eb

    // L_ts for VL columns from s on, of any size where s > t. The sum is the difference of two, each in two floats, which cancels
    // nothing: a chunk's sums have 24 bits more than the float that they end up in.
    vf between(int t, int s) const {
        return decay_of((high[t] - load(high + s)) + (low[t] - load(low + s)));
    }

    // whether a step is no number
    bool set(const Problem& p, const Place& at, int64_t head) {
        with_element(p.dt.dtype, [&](auto element) {
            const auto* from = static_cast<const decltype(element)*>(p.dt.data) + at.sequence * p.dt.stride[0] +
                               at.step * p.dt.stride[1] + head * p.dt.stride[2];
            for (int t = 0; t < at.steps; t++) dt[t] = to_float(from[t * p.dt.stride[1]]);
        });
        for (int t = at.steps; t < kChunk; t++) dt[t] = 0.0f;
        const vf bias = broadcast(p.dt_bias ? static_cast<const float*>(p.dt_bias.data)[head] : 0.0f);
        const float rate = static_cast<const float*>(p.A.data)[head];
        bool bad = false;
        for (int t = 0; t < at.steps; t += VL) {
            const vf raw = load(dt + t) + bias, step = p.softplus ? llmcore::LLMCORE_ISA::softplus(raw) : raw;
            const vi outside = (step < p.dt_min) | (step > p.dt_max);
            store(slope + t, select(outside, zero(), p.softplus ? sigmoid(raw) : broadcast(1.0f)));
            store(dt + t, min(broadcast(p.dt_max), max(broadcast(p.dt_min), step)));
        }
        constexpr double most = 1e4;  // beyond it a decay is 0 or infinite all the same, and the others keep their digits
        double sum = 0.0;
        for (int t = 0; t < kChunk; t++) {
            if (t < at.steps) {
                bad |= dt[t] != dt[t];
                const double log = double(dt[t]) * double(rate);
                sum += log > most ? most : (log < -most ? -most : log);
            } else {
                dt[t] = slope[t] = 0.0f;
            }
            high[t] = float(sum);
            low[t] = float(sum - double(high[t]));
        }
        const int last = at.steps - 1;
        for (int t = 0; t < kChunk; t += VL) {
            const vf end = decay_of((high[last] - load(high + t)) + (low[last] - load(low + t)));
            store(from_start + t, decay_of(load(high + t)));
            store(to_end + t, end);
            store(gain + t, end * load(dt + t));
        }
        whole = from_start[last];
        return bad;
    }
};

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
