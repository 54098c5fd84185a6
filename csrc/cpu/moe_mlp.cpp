// The parts of moe_mlp that are no matrix products: the counting sort of pairs by expert, rows gathered, rows summed, SwiGLU backward.
#include <vector>

#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {

int64_t moe_plan(const int64_t* indices, int32_t* order, int32_t* place, int32_t* offsets, int64_t pairs, int64_t experts) {
    const int64_t parts = pairs >= 2 * kGrain ? max_threads() : 1;
    std::vector<int32_t> next(std::size_t(parts * experts));
    std::vector<int64_t> wrong(std::size_t(parts), -1);
    const auto pairs_of = [&](int64_t part) { return pairs * part / parts; };
    parallel_for(parts, 1, [&](int64_t first_part, int64_t last_part) {
        for (int64_t part = first_part; part < last_part; part++) {
            int32_t* const counts = next.data() + part * experts;
            for (int64_t i = pairs_of(part); i < pairs_of(part + 1); i++) {
                const int64_t e = indices[i];
                if (e < 0 || e >= experts) {
                    wrong[std::size_t(part)] = i;
                    break;
                }
                counts[e]++;
            }
        }
    });
    for (const int64_t i : wrong)
        if (i >= 0) return i;
    int32_t sum = 0;
    for (int64_t e = 0; e < experts; e++) {
        offsets[e] = sum;
        for (int64_t part = 0; part < parts; part++) {
            int32_t& count = next[std::size_t(part * experts + e)];
            sum += count;
            count = sum - count;
        }
    }
    offsets[experts] = sum;
    parallel_for(parts, 1, [&](int64_t first_part, int64_t last_part) {
        for (int64_t part = first_part; part < last_part; part++) {
            int32_t* const at = next.data() + part * experts;
            for (int64_t i = pairs_of(part); i < pairs_of(part + 1); i++) {
                const int32_t to = at[indices[i]]++;
                order[to] = int32_t(i);
                place[i] = to;
            }
        }
    });
    return -1;
}

void moe_gather(const void* x, const int32_t* order, void* out, int64_t first, int64_t count, int64_t cols, int64_t top_k,
                int64_t x_row_stride, DType dtype) {
    const int64_t size = size_of(dtype), bytes = cols * size;
    parallel_for(count, kGrain / cols, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t token = order[first + i] / top_k;
            __builtin_memcpy((char*)out + i * bytes, (const char*)x + token * x_row_stride * size, std::size_t(bytes));
        }
    });
}

void moe_combine(const void* out, const int32_t* place, const float* weights, void* y, int64_t tokens, int64_t cols, int64_t top_k,
                 DType dtype) {
    parallel_for(tokens, kGrain / (cols * top_k), [&](int64_t begin, int64_t end) {
        with_element(dtype, [&](auto element) {
            using T = decltype(element);
            const T* const rows = static_cast<const T*>(out);
            for (int64_t t = begin; t < end; t++) {
                const int32_t* const at = place + t * top_k;
                const float* const w = weights == nullptr ? nullptr : weights + t * top_k;
                T* const sum = static_cast<T*>(y) + t * cols;
                for_vectors(cols, [&](int64_t c, auto lanes) {
                    vf total = zero();
                    for (int64_t j = 0; j < top_k; j++) {
                        const vf x = load(rows + at[j] * cols + c, lanes);
                        total = w == nullptr ? total + x : fmadd(broadcast(w[j]), x, total);
                    }
                    store(sum + c, total, lanes);
                });
            }
        });
    });
}

void moe_swiglu_bwd(const void* dact, const void* h, const int32_t* order, const float* weights, void* act_scaled, void* dh,
                    float* dweights, int64_t first_row, int64_t count, int64_t cols, DType dtype) {
    parallel_for(count, kGrain / (4 * cols), [&](int64_t begin, int64_t end) {
        with_element(dtype, [&](auto element) {
            using T = decltype(element);
            for (int64_t i = begin; i < end; i++) {
                const int32_t pair = order[first_row + i];
                const float w = weights[pair];
                const T* const d_row = static_cast<const T*>(dact) + i * cols;
                const T* const gate = static_cast<const T*>(h) + 2 * i * cols;
                T* const act_row = static_cast<T*>(act_scaled) + i * cols;
                T* const dgate = static_cast<T*>(dh) + 2 * i * cols;
                dweights[pair] = sum_vectors(cols, [&](int64_t c, auto lanes) {
                    const vf d = load(d_row + c, lanes), g = load(gate + c, lanes), u = load(gate + cols + c, lanes);
                    const Sigmoids p = sigmoids(g);
                    const vf silu = g * p.plus, act = silu * u, weighted = w * d;
                    store(act_row + c, w * act, lanes);
                    store(dgate + cols + c, weighted * silu, lanes);
                    store(dgate + c, weighted * (p.plus + silu * p.minus) * u, lanes);
                    return first(d * act, lanes);
                });
            }
        });
    });
}

}  // namespace llmcore::LLMCORE_ISA
