// Activations of vectors of floats, to a few ulp over the whole range.
#pragma once

#include "cpu/simd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

LLMCORE_INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

// log(1 + t) for t in [0, 1] as 2 atanh(t / (2 + t)), so that a small t keeps all its digits
LLMCORE_INLINE vf log1p_unit(vf t) {
    const vf s = t / (2.0f + t), w = s * s;
    vf p = broadcast(1.0f / 15.0f);
    for (int odd = 13; odd >= 3; odd -= 2) p = fmadd(p, w, broadcast(1.0f / float(odd)));
    return 2.0f * fmadd(s * w, p, s);
}

LLMCORE_INLINE vf softplus(vf x) { return max(zero(), x) + log1p_unit(exp(-absolute(x))); }

LLMCORE_INLINE vf sigmoid(vf x) {
    const vf e = exp(-absolute(x)), r = 1.0f / (1.0f + e);
    return select(x < 0.0f, e * r, r);
}

constexpr float ln2 = 0.693147182f;
constexpr float overflow = 128.0f * ln2;

// e^x for x <= overflow, to about 1 ulp, in fewer and less dependent steps than exp. At overflow it is infinity,
// because r is exactly 0; below -126 ln2 it is some number between 0 and 2^-125. ln2 is one float: r's error is n *
// 2e-9.
LLMCORE_INLINE vf exp_normal(vf x) {
    x = max(broadcast(-126.0f * ln2), x);
    const vf shifted = fmadd(x, broadcast(1.44269504f), broadcast(round_magic)), n = shifted - round_magic;
    const vf r = fmadd(n, broadcast(-ln2), x), r2 = r * r;
    const vf low = fmadd(r, broadcast(1.66665195e-1f), broadcast(4.99999934e-1f));
    const vf middle = fmadd(r, broadcast(8.36885107e-3f), broadcast(4.16684011e-2f));
    const vf high = fmadd(r2, broadcast(1.38143207e-3f), middle);
    const vf p = fmadd(r2, fmadd(r2, high, low), r + 1.0f);
    return (vf)((vi)p + ((vi)shifted << 23));
}

// sigmoid(x) and sigmoid(-x), both from e^-|x|, so that nothing cancels
struct Sigmoids {
    vf plus, minus;
};
LLMCORE_INLINE Sigmoids sigmoids(vf x) {
    const vi negative = x < 0.0f;
    const vf y = select(negative, x, -x), e = select(y < -126.0f * ln2, zero(), exp_normal(y));
    const vf large = 1.0f / (1.0f + e), small = e * large;
    return {select(negative, small, large), select(negative, large, small)};
}

LLMCORE_INLINE vf silu(vf x) { return x / (1.0f + exp_normal(min(broadcast(overflow), -x))); }

// The error is small beside 1, the largest value, and not beside the derivative where that is small.
LLMCORE_INLINE vf silu_derivative(vf x) {
    const vf p = 1.0f / (1.0f + exp_normal(min(broadcast(overflow), -x)));
    return p * fmadd(x, 1.0f - p, broadcast(1.0f));
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
