// One step of the selective scan for every channel of a batch: states are in the lanes, as they are in memory.
#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {
namespace {

float element(const View& x, int64_t offset) {
    float value = 0.0f;
    with_element(x.dtype, [&](auto kind) { value = to_float(static_cast<const decltype(kind)*>(x.data)[offset]); });
    return value;
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

}  // namespace

// state (batch, heads, channels, states), x, dt, z, y (batch, heads, channels), A (heads, channels, states), B, C (batch,
// groups, states), D, dt_bias (heads, channels); the states are contiguous, or those of A all the same (stride 0)
void selective_state_update(View state, View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View y,
                            int64_t batch, int64_t heads, int64_t channels, int64_t states, int64_t groups, bool softplus_) {
    parallel_for(batch * heads * channels, kGrain / states, [&](int64_t begin, int64_t end) {
        alignas(64) float a_wide[256], b_wide[256], c_wide[256];
        const bool one_decay = A.stride[2] == 0;
        for (int64_t row = begin; row < end; row++) {
            const int64_t p = row % channels, h = row / channels % heads, b = row / channels / heads;
            const auto at = [&](const View& t) { return b * t.stride[0] + h * t.stride[1] + p * t.stride[2]; };
            const auto of_channel = [&](const View& t) { return h * t.stride[0] + p * t.stride[1]; };
            float step = element(dt, at(dt)) + (dt_bias ? element(dt_bias, of_channel(dt_bias)) : 0.0f);
            if (softplus_) step = softplus(broadcast(step))[0];
            const float input = element(x, at(x)), gain = step * input;
            const int64_t group = h * groups / heads;
            const float* const a = one_decay ? nullptr : widened(A, of_channel(A), states, a_wide);
            const vf shared = one_decay ? exp(broadcast(step * element(A, of_channel(A)))) : zero();
            const float* const in = widened(B, b * B.stride[0] + group * B.stride[1], states, b_wide);
            const float* const out = widened(C, b * C.stride[0] + group * C.stride[1], states, c_wide);
            float sum = 0.0f;
            with_element(state.dtype, [&](auto kind) {
                auto* const s = static_cast<decltype(kind)*>(state.data) + at(state);
                sum = sum_vectors(states, [&](int64_t n, auto lanes) {
                    const vf decay = one_decay ? shared : exp(step * load(a + n, lanes));
                    const vf next = fmadd(decay, load(s + n, lanes), gain * load(in + n, lanes));
                    store(s + n, next, lanes);
                    return first(next * load(out + n, lanes), lanes);
                });
            });
            if (D) sum += element(D, of_channel(D)) * input;
            if (z) {
                const float gate = element(z, at(z));
                sum *= gate * sigmoid(broadcast(gate))[0];
            }
            with_element(y.dtype, [&](auto kind) { store_one(static_cast<decltype(kind)*>(y.data) + at(y), sum); });
        }
    });
}

}  // namespace llmcore::LLMCORE_ISA
