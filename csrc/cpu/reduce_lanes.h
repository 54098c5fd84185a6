// The sums over the lanes of VL vectors at once, as one vector: a tree in which each addition finishes half of what is left.
#pragma once

#include "cpu/simd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

#if defined(LLMCORE_AVX512)
// lanes of a and b by halves of each 128-bit quarter: {a0 a1 b0 b1} + {a2 a3 b2 b3} and so on
template <int kLow, int kHigh>
LLMCORE_INLINE vf add_words(vf a, vf b) {
    return (vf)_mm512_maskz_shuffle_ps(0xffff, (__m512)a, (__m512)b, kLow) +
           (vf)_mm512_maskz_shuffle_ps(0xffff, (__m512)a, (__m512)b, kHigh);
}
template <int kLow, int kHigh>
LLMCORE_INLINE vf add_quarters(vf a, vf b) {
    return (vf)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, kLow) +
           (vf)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, kHigh);
}
#elif defined(LLMCORE_AVX2)
template <int kLow, int kHigh>
LLMCORE_INLINE vf add_words(vf a, vf b) {
    return (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, kLow) + (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, kHigh);
}
#endif

// lane i is the sum of the lanes of x[i]
LLMCORE_INLINE vf reduce_each(vf (&x)[VL]) {
#if defined(LLMCORE_AVX512) || defined(LLMCORE_AVX2)
    for (int i = 0; i < VL; i += 2) x[i] = add_words<0x44, 0xee>(x[i], x[i + 1]);      // a a b b, each half a quarter's sum
    for (int i = 0; i < VL; i += 4) x[i] = add_words<0x88, 0xdd>(x[i], x[i + 2]);      // a b c d, a quarter's sums
#if defined(LLMCORE_AVX512)
    for (int i = 0; i < VL; i += 8) x[i] = add_quarters<0x88, 0xdd>(x[i], x[i + 4]);   // {a..d a..d e..h e..h}
    return add_quarters<0x88, 0xdd>(x[0], x[8]);
#else
    return (vf)_mm256_permute2f128_ps((__m256)x[0], (__m256)x[4], 0x20) +
           (vf)_mm256_permute2f128_ps((__m256)x[0], (__m256)x[4], 0x31);
#endif
#else
    vf sums;
    for (int i = 0; i < VL; i++) sums[i] = reduce_sum(x[i]);
    return sums;
#endif
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
