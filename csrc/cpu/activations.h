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

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
