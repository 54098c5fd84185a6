// One step of the selective scan for every channel of a batch. States are in the lanes, as they are in memory; what each channel has
// one of is computed for as many channels at once as there are lanes.
#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/reduce_lanes.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// n elements of x from `offset` on, `stride` apart; zeros in the other lanes
vf spread(const View& x, int64_t offset, int64_t stride, int n) {
    vf values = zero();
    with_element(x.dtype, [&](auto kind) {
        const auto* const from = static_cast<const decltype(kind)*>(x.data) + offset;
        if (stride == 1) {
            values = n == VL ? load(from) : load(from, n);
            return;
        }
        for (int i = 0; i < n; i++) values[i] = to_float(from[i * stride]);
    });
    return values;
}

// `count` floats of x from `offset` on: in place, or widened into `to`
const float* widened(const View& x, int64_t offset, int64_t count, float* to) {
    if (x.dtype == DType::f32) return static_cast<const float*>(x.data) + offset;
    with_element(x.dtype, [&](auto kind) {
        const auto* const from = static_cast<const decltype(kind)*>(x.data) + offset;
        for_vectors(count, [&](int64_t n, auto lanes) { store(to + n, load(from + n, lanes), lanes); });
    });
    return to;
}

// The states of one channel: s = e^(step a) s + gain in; their sum, weighted with out, lane by lane
template <class T, class F>
LLMCORE_INLINE vf advance(T* s, float gain, const float* in, const float* out, int64_t states, const F& decay) {
    vf sum = zero();
    for_vectors(states, [&](int64_t n, auto lanes) {
        const vf next = fmadd(decay(n, lanes), load(s + n, lanes), gain * load(in + n, lanes));
        store(s + n, next, lanes);
        sum += first(next * load(out + n, lanes), lanes);
    });
    return sum;
}

}  // namespace

// state (batch, heads, channels, states), x, dt, z, y (batch, heads, channels), A (heads, channels, states), B, C (batch,
// groups, states), D, dt_bias (heads, channels); the states are contiguous, or those of A all the same (stride 0)
void selective_state_update(View state, View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View y,
                            int64_t batch, int64_t heads, int64_t channels, int64_t states, int64_t groups, bool softplus_) {
    const int64_t blocks = (channels + VL - 1) / VL;
    const bool one_decay = A.stride[2] == 0;
    parallel_for(batch * heads * blocks, kGrain / 4 / (states * VL), [&](int64_t begin, int64_t end) {
        alignas(64) float a_wide[256], b_wide[256], c_wide[256];
        for (int64_t block = begin; block < end; block++) {
            const int64_t p = block % blocks * VL, h = block / blocks % heads, b = block / blocks / heads;
            const int n = int(channels - p < VL ? channels - p : VL);
            const auto of_batch = [&](const View& t) {
                return spread(t, b * t.stride[0] + h * t.stride[1] + p * t.stride[2], t.stride[2], n);
            };
            const auto of_head = [&](const View& t) { return spread(t, h * t.stride[0] + p * t.stride[1], t.stride[1], n); };
            vf step = of_batch(dt);
            if (dt_bias) step += of_head(dt_bias);
            if (softplus_) step = softplus(step);
            const vf input = of_batch(x), gain = step * input;
            vf decays = zero();
            if (one_decay) decays = exp(step * of_head(A));
            const int64_t group = h * groups / heads;
            const float* const in = widened(B, b * B.stride[0] + group * B.stride[1], states, b_wide);
            const float* const out = widened(C, b * C.stride[0] + group * C.stride[1], states, c_wide);
            vf sums[VL] = {};
            with_element(state.dtype, [&](auto kind) {
                auto* const s = static_cast<decltype(kind)*>(state.data) + b * state.stride[0] + h * state.stride[1];
                for (int i = 0; i < n; i++) {
                    auto* const mine = s + (p + i) * state.stride[2];
                    if (one_decay) {
                        const vf decay = broadcast(decays[i]);
                        sums[i] = advance(mine, gain[i], in, out, states, [&](int64_t, auto) { return decay; });
                        continue;
                    }
                    const float* const a = widened(A, h * A.stride[0] + (p + i) * A.stride[1], states, a_wide);
                    const float mine_step = step[i];
                    sums[i] = advance(mine, gain[i], in, out, states,
                                      [&](int64_t at, auto lanes) { return exp(mine_step * load(a + at, lanes)); });
                }
            });
            vf result = reduce_each(sums);
            if (D) result = fmadd(of_head(D), input, result);
            if (z) {
                const vf gate = of_batch(z);
                result *= gate * sigmoid(gate);
            }
            with_element(y.dtype, [&](auto kind) {
                store(static_cast<decltype(kind)*>(y.data) + b * y.stride[0] + h * y.stride[1] + p, result, n);
            });
        }
    });
}

}  // namespace llmcore::LLMCORE_ISA
