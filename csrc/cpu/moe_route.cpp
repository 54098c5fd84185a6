// Routing: the experts of each token and their weights, and the gradient of its logits. See llmcore/ops/moe_route.py.
//
// The best are found by their place in an order of integers, in which NaN comes first, as in a sort of PyTorch's: an expert's score
// is looked at once for each choice, vector by vector, and of equal ones the first is taken.
#include <climits>
#include <limits>

#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr int32_t kShut = INT_MIN;  // below every number's key

// Rises with x; +0 and -0 have one key.
LLMCORE_INLINE vi key_of(vf x) {
    const vi bits = (vi)(x + 0.0f);
    return select(x != x, broadcast_int(INT_MAX), bits ^ ((bits >> 31) & INT_MAX));
}

LLMCORE_INLINE int32_t key_of(float x) { return key_of(broadcast(x))[0]; }

LLMCORE_INLINE vi first_keys(vi keys, Whole) { return keys; }
LLMCORE_INLINE vi first_keys(vi keys, int n) { return select(lane_numbers() < broadcast_int(n), keys, broadcast_int(kShut)); }

// Tokens that are worth a thread: a choice costs about as much as the score of 16 experts.
int64_t grain(int64_t experts, int64_t top_k) { return kGrain / 8 / (VL + experts + 16 * top_k); }

// A thread's arrays, of whole vectors: a store of a part of one would hold up the load of the whole.
struct Token {
    int64_t experts, padded;
    Scratch memory;
    float *scores, *gradient;
    int32_t* keys;

    explicit Token(int64_t E)
        : experts(E), padded((E + VL - 1) / VL * VL), memory(3 * padded), scores(memory.data()), gradient(scores + padded),
          keys((int32_t*)(gradient + padded)) {}
};

// Leaves in t.scores numbers in the scores' order and returns what makes scores of them.
template <class T>
LLMCORE_INLINE float score(const T* logits, bool is_sigmoid, Token& t) {
    if (is_sigmoid) {
        for_vectors(t.experts, [&](int64_t e, auto lanes) { store(t.scores + e, sigmoid(load(logits + e, lanes))); });
        return 1.0f;
    }
    vf top = broadcast(-std::numeric_limits<float>::infinity());
    for_vectors(t.experts, [&](int64_t e, auto lanes) { top = max(top, first(load(logits + e, lanes), lanes, top)); });
    const vf most = broadcast(reduce_max(top));
    return 1.0f / sum_vectors(t.experts, [&](int64_t e, auto lanes) {
        const vf x = first(exp(first(load(logits + e, lanes) - most, lanes)), lanes);
        store(t.scores + e, x);
        return x;
    });
}

struct Choice {
    int32_t key, place;
};

// Of the keys that come after `last`, by size and then by place, the first. Nothing is written down: a store whose place is
// known late would hold up the loads of the next token.
LLMCORE_INLINE Choice next_largest(const int32_t* keys, int64_t padded, Choice last) {
    vi best = broadcast_int(kShut), place = broadcast_int(INT_MAX);
    for (int64_t e = 0; e < padded; e += VL) {
        const vi key = load_bits<vi>(keys + e), here = lane_numbers() + int32_t(e);
        const vi better = (key > best) & ((key < last.key) | ((key == last.key) & (here > last.place)));
        best = select(better, key, best);
        place = select(better, here, place);
    }
    const int32_t most = reduce_max(best);
    return {most, -reduce_max(select(best == most, -place, broadcast_int(INT_MIN)))};
}

constexpr Choice kNone = {INT_MAX, -1};

// Sum of a group's two largest, or its only one; a NaN counts as the largest.
LLMCORE_INLINE float two_best(const float* ranked, int64_t count) {
    float most = ranked[0], next = -std::numeric_limits<float>::infinity();
    for (int64_t i = 1; i < count; i++) {
        const float x = ranked[i];
        if (x > most || x != x) {
            next = most;
            most = x;
        } else if (x > next) {
            next = x;
        }
    }
    return count == 1 ? most : most + next;
}

// Shuts the experts whose group is not among the best ones.
void shut_groups(Token& t, const float* ranked, int32_t* groups, int64_t num_groups, int64_t top_groups) {
    const int64_t size = t.experts / num_groups, padded = (num_groups + VL - 1) / VL * VL;
    for (int64_t g = 0; g < padded; g++) groups[g] = g < num_groups ? key_of(two_best(ranked + g * size, size)) : kShut;
    Choice last = kNone;
    for (int64_t n = 0; n < top_groups; n++) last = next_largest(groups, padded, last);
    for (int64_t g = 0; g < num_groups; g++)
        if (groups[g] < last.key || (groups[g] == last.key && g > last.place))
            for (int64_t e = g * size; e < (g + 1) * size; e++) t.keys[e] = kShut;
}

}  // namespace

void moe_route_fwd(const void* logits, const float* bias, float* weights, int64_t* indices, float* scores, int64_t tokens,
                   int64_t experts, int64_t top_k, int64_t logits_row_stride, bool is_sigmoid, bool normalize, int64_t num_groups,
                   int64_t top_groups, float scale, DType dtype) {
    parallel_for(tokens, grain(experts, top_k), [&](int64_t begin, int64_t end) {
        Token t(experts);
        Scratch for_groups((num_groups + VL - 1) / VL * VL);
        with_element(dtype, [&](auto element) {
            const auto* const rows = static_cast<const decltype(element)*>(logits);
            for (int64_t token = begin; token < end; token++) {
                const float factor = score(rows + token * logits_row_stride, is_sigmoid, t);
                float* const ranked = bias == nullptr ? t.scores : t.gradient;
                for_vectors(experts, [&](int64_t e, auto lanes) {
                    vf x = load(t.scores + e);
                    if (bias != nullptr) {
                        x = x * factor + load(bias + e, lanes);
                        store(ranked + e, x);
                    }
                    store_bits(t.keys + e, first_keys(key_of(x), lanes));
                });
                if (num_groups > 1) shut_groups(t, ranked, (int32_t*)for_groups.data(), num_groups, top_groups);
                float* const w = weights + token * top_k;
                int64_t* const chosen = indices + token * top_k;
                float sum = 0.0f;
                Choice last = kNone;
                for (int64_t j = 0; j < top_k; j++) {
                    last = next_largest(t.keys, t.padded, last);
                    chosen[j] = last.place;
                    w[j] = t.scores[chosen[j]] * factor;
                    sum += w[j];
                }
                for (int64_t j = 0; j < top_k; j++) w[j] = scale * (normalize ? w[j] / (sum + 1e-20f) : w[j]);
                if (scores != nullptr)
                    for_vectors(experts, [&](int64_t e, auto lanes) {
                        store(scores + token * experts + e, load(t.scores + e) * factor, lanes);
                    });
            }
        });
    });
}

void moe_route_bwd(const float* dweights, const float* dscores, const void* logits, const int64_t* indices, void* dlogits,
                   int64_t tokens, int64_t experts, int64_t top_k, int64_t logits_row_stride, bool is_sigmoid, bool normalize,
                   float scale, DType dtype) {
    parallel_for(tokens, grain(experts, top_k), [&](int64_t begin, int64_t end) {
        Token t(experts);
        with_element(dtype, [&](auto element) {
            using T = decltype(element);
            for (int64_t token = begin; token < end; token++) {
                const T* const row = static_cast<const T*>(logits) + token * logits_row_stride;
                const float factor = score(row, is_sigmoid, t);
                for_vectors(experts, [&](int64_t e, auto lanes) {
                    store(t.gradient + e, dscores == nullptr ? zero() : load(dscores + token * experts + e, lanes));
                });
                if (dweights != nullptr) {
                    const float* const dw = dweights + token * top_k;
                    const int64_t* const chosen = indices + token * top_k;
                    float sum = 1.0f, mean = 0.0f;
                    if (normalize) {
                        sum = 0.0f;
                        for (int64_t j = 0; j < top_k; j++) sum += t.scores[chosen[j]] * factor;
                        sum += 1e-20f;
                        for (int64_t j = 0; j < top_k; j++) mean += dw[j] * (t.scores[chosen[j]] * factor / sum);
                    }
                    for (int64_t j = 0; j < top_k; j++) t.gradient[chosen[j]] += scale * ((dw[j] - mean) / sum);
                }
                T* const out = static_cast<T*>(dlogits) + token * experts;
                if (is_sigmoid) {
                    for_vectors(experts, [&](int64_t e, auto lanes) {
                        const Sigmoids p = sigmoids(load(row + e, lanes));
                        store(out + e, load(t.gradient + e) * p.plus * p.minus, lanes);
                    });
                    continue;
                }
                const float dot = factor * sum_vectors(experts, [&](int64_t e, auto lanes) {
                    return first(load(t.gradient + e) * load(t.scores + e), lanes);
                });
                for_vectors(experts, [&](int64_t e, auto lanes) {
                    store(out + e, load(t.scores + e) * factor * (load(t.gradient + e) - dot), lanes);
                });
            }
        });
    });
}

}  // namespace llmcore::LLMCORE_ISA
