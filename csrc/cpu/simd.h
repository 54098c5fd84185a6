// Vectors of floats for whatever instruction set this file is compiled for: one source, GCC's and Clang's vector extensions,
// intrinsics only where the generic form compiles badly.
//
//   vf, vi, vh       VL floats, 32-bit integers, 16-bit integers; + - * / and comparisons (lanes 0 or -1) are the operators'
//   bf16_t, fp16_t   elements in memory; arithmetic is always on floats
//   load, store      convert from and to float, bf16, fp16 (round to nearest even, a NaN stays a NaN); with a count n <= VL
//                    they touch the first n elements only, and load fills the rest with zeros
//   exp              e^x to about 1 ulp over the whole range, subnormal results included; exp2_fast for a softmax
//
// The translation units of several levels are linked together, so everything here has internal linkage and is inlined: a shared
// inline function could be emitted with AVX-512 instructions and then be the one that every level calls.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(LLMCORE_ISA)
#define LLMCORE_ISA baseline
#endif
#define LLMCORE_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

namespace llmcore::LLMCORE_ISA {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;

// A build may name a size of its own: code for wide vectors is then tested on a processor that has none.
#if !defined(LLMCORE_VECTOR_BYTES)
#if defined(__AVX512F__)
#define LLMCORE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LLMCORE_VECTOR_BYTES 32
#else
#define LLMCORE_VECTOR_BYTES 16
#endif
#endif

#if LLMCORE_VECTOR_BYTES == 64 && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LLMCORE_AVX512
#elif LLMCORE_VECTOR_BYTES == 32 && defined(__AVX2__)
#define LLMCORE_AVX2
#elif LLMCORE_VECTOR_BYTES == 16 && defined(__SSE2__)
#define LLMCORE_SSE2
#elif LLMCORE_VECTOR_BYTES == 16 && defined(__aarch64__)
#define LLMCORE_NEON
#endif

constexpr int VL = LLMCORE_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(LLMCORE_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(LLMCORE_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(LLMCORE_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(LLMCORE_VECTOR_BYTES / 2)));

struct bf16_t {
    uint16_t bits;
};
struct fp16_t {
    uint16_t bits;
};

// f(T{}) with the element type of the dtype
template <class F>
LLMCORE_INLINE void with_element(DType dtype, const F& f) {
    if (dtype == DType::f32) {
        f(float{});
    } else if (dtype == DType::bf16) {
        f(bf16_t{});
    } else {
        f(fp16_t{});
    }
}

// ---- one element ------------------------------------------------------------------------------------------------------------

LLMCORE_INLINE float to_float(float x) { return x; }
LLMCORE_INLINE float to_float(bf16_t x) { return bf16_to_float(x.bits); }
LLMCORE_INLINE float to_float(fp16_t x) { return f16_to_float(x.bits); }

LLMCORE_INLINE void store_one(float* p, float x) { *p = x; }
LLMCORE_INLINE void store_one(bf16_t* p, float x) { p->bits = float_to_bf16(x); }
LLMCORE_INLINE void store_one(fp16_t* p, float x) { p->bits = float_to_f16(x); }

// ---- whole vectors ----------------------------------------------------------------------------------------------------------

LLMCORE_INLINE vf broadcast(float x) { return x - vf{}; }
LLMCORE_INLINE vi broadcast_int(int32_t x) { return x - vi{}; }
LLMCORE_INLINE vf zero() { return vf{}; }

// lanes of a where the mask is -1, of b where it is 0
LLMCORE_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
LLMCORE_INLINE vi select(vi mask, vi a, vi b) { return mask ? a : b; }

// b where either is a NaN
LLMCORE_INLINE vf max(vf a, vf b) {
#if defined(LLMCORE_AVX512)
    return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(LLMCORE_AVX2)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(LLMCORE_SSE2)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

LLMCORE_INLINE vf min(vf a, vf b) {
#if defined(LLMCORE_AVX512)
    return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(LLMCORE_AVX2)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(LLMCORE_SSE2)
    return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
}

// fused where the processor can: the build says -ffp-contract=fast
LLMCORE_INLINE vf fmadd(vf a, vf b, vf c) { return a * b + c; }

#if defined(LLMCORE_AVX512)
// GCC 12 warns of an uninitialised operand inside AVX-512 intrinsics without a mask; with all lanes on, the code is the same
LLMCORE_INLINE __m256 low_half(vf x) { return _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 0); }
LLMCORE_INLINE __m256 high_half(vf x) { return _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1); }
#endif

LLMCORE_INLINE float reduce_sum(vf x) {
#if defined(LLMCORE_AVX512) || defined(LLMCORE_AVX2)
#if defined(LLMCORE_AVX512)
    const __m256 y = _mm256_add_ps(low_half(x), high_half(x));
#else
    const __m256 y = (__m256)x;
#endif
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
#else
    float sums[4] = {x[0], x[1], x[2], x[3]};
    for (int i = 4; i < VL; ++i) sums[i % 4] += x[i];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
#endif
}

LLMCORE_INLINE float reduce_max(vf x) {
#if defined(LLMCORE_AVX512) || defined(LLMCORE_AVX2)
#if defined(LLMCORE_AVX512)
    const __m256 y = _mm256_max_ps(low_half(x), high_half(x));
#else
    const __m256 y = (__m256)x;
#endif
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
#else
    float most = x[0];
    for (int i = 1; i < VL; ++i) most = most > x[i] ? most : x[i];
    return most;
#endif
}

LLMCORE_INLINE int32_t reduce_max(vi x) {
#if defined(LLMCORE_AVX512) || defined(LLMCORE_AVX2)
#if defined(LLMCORE_AVX512)
    const __m256i y = _mm256_max_epi32(_mm256_castps_si256(low_half((vf)x)), _mm256_castps_si256(high_half((vf)x)));
#else
    const __m256i y = (__m256i)x;
#endif
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
#else
    int32_t most = x[0];
    for (int i = 1; i < VL; ++i) most = most > x[i] ? most : x[i];
    return most;
#endif
}

// ---- between floats and 16-bit elements -------------------------------------------------------------------------------------

LLMCORE_INLINE vf widen_bf16(vh h) {
#if defined(LLMCORE_AVX512)
    return (vf)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h), 16);
#elif defined(LLMCORE_AVX2)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

// bf16 in the low half of each lane; a NaN becomes 0xffff
LLMCORE_INLINE vi round_bf16(vf x) {
    const vu bits = (vu)x;
    return ((vi)(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) | (x != x);
}

LLMCORE_INLINE vh narrow_bf16(vf x) {
    const vi rounded = round_bf16(x);
#if defined(LLMCORE_AVX512)
    return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded);
#elif defined(LLMCORE_AVX2)
    return (vh)_mm_packs_epi32(_mm256_castsi256_si128((__m256i)rounded), _mm256_extracti128_si256((__m256i)rounded, 1));
#else
    return __builtin_convertvector((vu)rounded, vh);
#endif
}

LLMCORE_INLINE vf widen_fp16(vh h) {
#if defined(LLMCORE_AVX512)
    return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(LLMCORE_AVX2) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#elif defined(LLMCORE_NEON)
    return (vf)vcvt_f32_f16((float16x4_t)h);
#else
    const vu wide = __builtin_convertvector(h, vu), magnitude = wide & 0x7fffu;
    const vu finite = (vu)((vf)(magnitude << 13) * 0x1p112f), special = 0x7f800000u | (magnitude << 13);
    return (vf)(((wide & 0x8000u) << 16) | ((vi)magnitude >= 0x7c00 ? special : finite));
#endif
}

LLMCORE_INLINE vh narrow_fp16(vf x) {
#if defined(LLMCORE_AVX512)
    return (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(LLMCORE_AVX2) && defined(__F16C__)
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(LLMCORE_NEON)
    return (vh)vcvt_f16_f32((float32x4_t)x);
#else
    const vu bits = (vu)x, magnitude = bits & 0x7fffffffu;
    const vu normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // adding 0.5 moves the last kept bit of a subnormal to the float's last bit, where the addition rounds it
    const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
    vu half = (vi)magnitude < 0x38800000 ? subnormal : normal;
    half = (vi)magnitude >= 0x477ff000 ? 0x7c00u - vu{} : half;
    half = (vi)magnitude > 0x7f800000 ? 0x7e00u - vu{} : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), vh);
#endif
}

// ---- memory -----------------------------------------------------------------------------------------------------------------

template <class V, class T>
LLMCORE_INLINE V load_bits(const T* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

template <class V, class T>
LLMCORE_INLINE void store_bits(T* p, V x) {
    __builtin_memcpy(p, &x, sizeof x);
}

#if defined(LLMCORE_AVX2)
constexpr int32_t first_lanes_table[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
LLMCORE_INLINE __m256i first_lanes(int n) { return _mm256_loadu_si256((const __m256i*)(first_lanes_table + 8 - n)); }
#endif

LLMCORE_INLINE vh load_halves(const void* p, int n) {
#if defined(LLMCORE_AVX512)
    return (vh)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p);
#else
    uint16_t buffer[VL] = {};
    for (int i = 0; i < n; ++i) buffer[i] = ((const uint16_t*)p)[i];
    return load_bits<vh>(buffer);
#endif
}

LLMCORE_INLINE void store_halves(void* p, vh x, int n) {
#if defined(LLMCORE_AVX512)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1u), (__m256i)x);
#else
    uint16_t buffer[VL];
    store_bits(buffer, x);
    for (int i = 0; i < n; ++i) ((uint16_t*)p)[i] = buffer[i];
#endif
}

LLMCORE_INLINE vf load(const float* p) { return load_bits<vf>(p); }
LLMCORE_INLINE vf load(const bf16_t* p) { return widen_bf16(load_bits<vh>(p)); }
LLMCORE_INLINE vf load(const fp16_t* p) { return widen_fp16(load_bits<vh>(p)); }

LLMCORE_INLINE void store(float* p, vf x) { store_bits(p, x); }
LLMCORE_INLINE void store(bf16_t* p, vf x) { store_bits(p, narrow_bf16(x)); }
LLMCORE_INLINE void store(fp16_t* p, vf x) { store_bits(p, narrow_fp16(x)); }

// a and b one after the other
template <class T>
LLMCORE_INLINE void store_two(T* p, vf a, vf b) {
    store(p, a);
    store(p + VL, b);
}
#if defined(LLMCORE_AVX512)
LLMCORE_INLINE void store_two(bf16_t* p, vf a, vf b) {
    const __m512i interleaved = _mm512_maskz_packs_epi32(~__mmask32(0), (__m512i)round_bf16(a), (__m512i)round_bf16(b));
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    store_bits(p, _mm512_maskz_permutexvar_epi64(0xff, in_order, interleaved));
}
#elif defined(LLMCORE_AVX2)
LLMCORE_INLINE void store_two(bf16_t* p, vf a, vf b) {
    const __m256i interleaved = _mm256_packs_epi32((__m256i)round_bf16(a), (__m256i)round_bf16(b));
    store_bits(p, _mm256_permute4x64_epi64(interleaved, 0xd8));
}
#endif

LLMCORE_INLINE vf load(const float* p, int n) {
#if defined(LLMCORE_AVX512)
    return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p);
#elif defined(LLMCORE_AVX2)
    return (vf)_mm256_maskload_ps(p, first_lanes(n));
#else
    float buffer[VL] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load_bits<vf>(buffer);
#endif
}
LLMCORE_INLINE vf load(const bf16_t* p, int n) { return widen_bf16(load_halves(p, n)); }
LLMCORE_INLINE vf load(const fp16_t* p, int n) { return widen_fp16(load_halves(p, n)); }

LLMCORE_INLINE void store(float* p, vf x, int n) {
#if defined(LLMCORE_AVX512)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), (__m512)x);
#elif defined(LLMCORE_AVX2)
    _mm256_maskstore_ps(p, first_lanes(n), (__m256)x);
#else
    for (int i = 0; i < n; ++i) p[i] = x[i];
#endif
}
LLMCORE_INLINE void store(bf16_t* p, vf x, int n) { store_halves(p, narrow_bf16(x), n); }
LLMCORE_INLINE void store(fp16_t* p, vf x, int n) { store_halves(p, narrow_fp16(x), n); }

// Asks for n elements that will be needed soon.
template <class T>
LLMCORE_INLINE void prefetch_row(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(p + i);
}

// ---- exponentials -----------------------------------------------------------------------------------------------------------

// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits of the sum
constexpr float round_magic = 0x1.8p23f;
constexpr int32_t round_magic_bits = 0x4b400000;

// p * 2^n for whole n in [-150, 128], with one rounding
LLMCORE_INLINE vf scale_by_power(vf p, vf n) {
#if defined(LLMCORE_AVX512)
    return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    const vi whole = (vi)(n + round_magic) - round_magic_bits, half = whole >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
#endif
}

// Cody-Waite: x = n ln2 + r with ln2 in two parts, |r| <= ln2/2; e^r = 1 + r + r^2 q(r), q minimax, relative error 3e-9
LLMCORE_INLINE vf exp(vf x) {
    x = min(broadcast(89.0f), max(broadcast(-104.0f), x));  // beyond them the result is inf and 0 all the same; keeps a NaN
    const vf n = (x * 1.44269504f + round_magic) - round_magic;
    vf r = fmadd(n, broadcast(-0.693359375f), x);
    r = fmadd(n, broadcast(2.12194440e-4f), r);
    vf q = broadcast(1.38143207e-3f);
    q = fmadd(q, r, broadcast(8.36885107e-3f));
    q = fmadd(q, r, broadcast(4.16684011e-2f));
    q = fmadd(q, r, broadcast(1.66665195e-1f));
    q = fmadd(q, r, broadcast(4.99999934e-1f));
    return scale_by_power(fmadd(r * r, q, r) + 1.0f, n);
}

LLMCORE_INLINE float exp(float x) { return exp(broadcast(x))[0]; }

// 2^x for x < 128, as in a softmax whose maximum is subtracted; 0 where the result would be subnormal. A NaN stays a NaN.
// Several vectors go through each step together: one alone would wait for its own results.
template <int N>
LLMCORE_INLINE void exp2_fast(vf (&x)[N]) {
    constexpr float coefficients[] = {1.34066439e-3f, 9.61769297e-3f, 5.55031055e-2f, 2.40226528e-1f, 6.93147215e-1f, 1.0f};
    vf power[N], p[N];
    for (int i = 0; i < N; ++i) x[i] = max(broadcast(-127.0f), x[i]);
    for (int i = 0; i < N; ++i) power[i] = x[i] + (round_magic + 127.0f);  // its low bits are the result's exponent field
    for (int i = 0; i < N; ++i) x[i] -= power[i] - (round_magic + 127.0f);
    for (int i = 0; i < N; ++i) p[i] = broadcast(1.55946782e-4f);
    for (float c : coefficients)
        for (int i = 0; i < N; ++i) p[i] = fmadd(p[i], x[i], broadcast(c));
    for (int i = 0; i < N; ++i) x[i] = p[i] * (vf)((vi)power[i] << 23);
}

LLMCORE_INLINE vf exp2_fast(vf x) {
    vf xs[1] = {x};
    exp2_fast(xs);
    return xs[0];
}

// ---- shuffles ---------------------------------------------------------------------------------------------------------------

typedef int32_t v4i __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define LLMCORE_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define LLMCORE_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, v4i{i, j, k, l})
#endif

// 4 rows of 4 words at `from`, transposed, to 4 rows at `to`; the strides are in words
LLMCORE_INLINE void transpose_4x4(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    const int32_t* p = (const int32_t*)from;
    int32_t* q = (int32_t*)to;
    const v4i a = load_bits<v4i>(p), b = load_bits<v4i>(p + from_stride);
    const v4i c = load_bits<v4i>(p + 2 * from_stride), d = load_bits<v4i>(p + 3 * from_stride);
    const v4i ab = LLMCORE_SHUFFLE(a, b, 0, 4, 1, 5), cd = LLMCORE_SHUFFLE(c, d, 0, 4, 1, 5);
    const v4i ab_high = LLMCORE_SHUFFLE(a, b, 2, 6, 3, 7), cd_high = LLMCORE_SHUFFLE(c, d, 2, 6, 3, 7);
    store_bits(q, LLMCORE_SHUFFLE(ab, cd, 0, 1, 4, 5));
    store_bits(q + to_stride, LLMCORE_SHUFFLE(ab, cd, 2, 3, 6, 7));
    store_bits(q + 2 * to_stride, LLMCORE_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
    store_bits(q + 3 * to_stride, LLMCORE_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
}

// VL rows of 4 words at `from`, transposed, to 4 vectors at `to`
LLMCORE_INLINE void transpose_to_vectors(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    const int32_t* p = (const int32_t*)from;
    int32_t* q = (int32_t*)to;
#if defined(LLMCORE_AVX512)
    const auto rows = [&](int i) {  // i, i + 4, i + 8, i + 12
        const auto row = [&](int j) { return _mm_loadu_si128((const __m128i*)(p + (i + 4 * j) * from_stride)); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
        return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
    };
    const __m512i a = rows(0), b = rows(1), c = rows(2), d = rows(3);
    const __m512i ab = _mm512_maskz_unpacklo_epi32(0xffff, a, b), cd = _mm512_maskz_unpacklo_epi32(0xffff, c, d);
    const __m512i ab_high = _mm512_maskz_unpackhi_epi32(0xffff, a, b), cd_high = _mm512_maskz_unpackhi_epi32(0xffff, c, d);
    store_bits(q, _mm512_maskz_unpacklo_epi64(0xff, ab, cd));
    store_bits(q + to_stride, _mm512_maskz_unpackhi_epi64(0xff, ab, cd));
    store_bits(q + 2 * to_stride, _mm512_maskz_unpacklo_epi64(0xff, ab_high, cd_high));
    store_bits(q + 3 * to_stride, _mm512_maskz_unpackhi_epi64(0xff, ab_high, cd_high));
#else
    for (int i = 0; i < VL; i += 4) transpose_4x4(p + i * from_stride, from_stride, q + i, to_stride);
#endif
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
