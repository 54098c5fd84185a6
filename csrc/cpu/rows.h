// What the row kernels share: walking a row vector by vector, streamed stores, scratch memory.
//
// A loop body is written once, for `lanes` being Whole (a full vector) or an int (the first lanes of the row's last,
// partial vector). Internal linkage, for the reason given in simd.h.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

// Fewer elements than this are not worth another thread.
constexpr int64_t kGrain = 32768;

struct Whole {};

template <class T>
LLMCORE_INLINE vf load(const T* p, Whole) {
    return load(p);
}

template <class T>
LLMCORE_INLINE void store(T* p, vf x, Whole) {
    store(p, x);
}

LLMCORE_INLINE vi lane_numbers() {
    vi x;
    for (int i = 0; i < VL; ++i) x[i] = i;
    return x;
}

// beyond the first lanes zeros, or `rest`, whatever stands there
LLMCORE_INLINE vf first(vf x, Whole, vf = zero()) { return x; }
LLMCORE_INLINE vf first(vf x, int n, vf rest = zero()) {
    return select(lane_numbers() < broadcast_int(n), x, rest);
}

LLMCORE_INLINE void store_halves(void* p, vh x, Whole) { store_bits(p, x); }

// Outputs of this size are out of the caches before anyone reads them. Stores that bypass the caches spare the reading
// of what is overwritten: measured on Zen 3, 1.05 to 1.4 times faster from here on, slower for the next reader below. A vector of
// 16-bit elements is half a cache line with AVX-512; past the caches such halves took 1.7 times as long as ordinary stores
// on Sapphire Rapids.
constexpr int64_t kStreamBytes = int64_t(32) << 20;

// Whether to stream an output of `count` elements that is written in contiguous pieces of `piece`.
template <class T>
LLMCORE_INLINE bool worth_streaming(const T* p, int64_t count, int64_t piece) {
#if defined(LLMCORE_AVX512)
    if (sizeof(T) < sizeof(float)) return false;
#endif
    return count * int64_t(sizeof(T)) >= kStreamBytes && piece % VL == 0 &&
           reinterpret_cast<std::uintptr_t>(p) % (VL * sizeof(T)) == 0;
}

// store at an address aligned to VL elements, past the caches where the processor can
LLMCORE_INLINE void stream(float* p, vf x) {
#if defined(LLMCORE_AVX512)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(LLMCORE_AVX2)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(LLMCORE_SSE2)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}

LLMCORE_INLINE void stream_halves(void* p, vh x) {
#if defined(LLMCORE_AVX512)
    _mm256_stream_si256((__m256i*)p, (__m256i)x);
#elif defined(LLMCORE_AVX2)
    _mm_stream_si128((__m128i*)p, (__m128i)x);
#else
    store_bits(p, x);
#endif
}
LLMCORE_INLINE void stream(bf16_t* p, vf x) { stream_halves(p, narrow_bf16(x)); }
LLMCORE_INLINE void stream(fp16_t* p, vf x) { stream_halves(p, narrow_fp16(x)); }

// store, streamed if the kernel was told so
template <bool kStream, class T, class Lanes>
LLMCORE_INLINE void store_output(T* p, vf x, Lanes lanes) {
    if constexpr (kStream && std::is_same_v<Lanes, Whole>) {
        stream(p, x);
    } else {
        store(p, x, lanes);
    }
}

template <bool kStream, int kVectors, class T>
LLMCORE_INLINE void store_outputs(T* p, const vf (&x)[kVectors]) {
    if constexpr (!kStream && kVectors % 2 == 0) {
        for (int v = 0; v < kVectors; v += 2) store_two(p + v * VL, x[v], x[v + 1]);
    } else {
        for (int v = 0; v < kVectors; v++) store_output<kStream>(p + v * VL, x[v], Whole{});
    }
}

// How many rows ahead of the one at hand to ask for: none where rows are long, which the processor foresees itself.
template <class T>
LLMCORE_INLINE int64_t rows_ahead(int64_t cols) {
    constexpr int64_t kAhead = 2048 / sizeof(T);
    return cols <= kAhead ? kAhead / cols : 0;
}

// f(std::bool_constant<streaming>{})
template <class F>
LLMCORE_INLINE void with_streaming(bool streaming, const F& f) {
    if (streaming) return f(std::true_type{});
    f(std::false_type{});
}

// parallel_for, in which each thread's streamed stores come before whatever follows
template <bool kStream, class F>
LLMCORE_INLINE void parallel_stream(int64_t n, int64_t grain, const F& f) {
    parallel_for(n, grain, [&](int64_t begin, int64_t end) {
        f(begin, end);
#if defined(__x86_64__)
        if constexpr (kStream) _mm_sfence();
#endif
    });
}

// f(i, lanes) for the vectors of [0, n)
template <class F>
LLMCORE_INLINE void for_vectors(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) f(i, Whole{});
    if (i < n) f(i, int(n - i));
}

// the sum of all lanes of f(i, lanes) over the vectors of [0, n). Four chains, since one would wait for its additions;
// they are short and their sums are added up, so that the error stays small in long rows.
template <class F>
LLMCORE_INLINE float sum_vectors(int64_t n, const F& f) {
    constexpr int64_t kChain = 32 * 4 * VL;
    vf total{};
    int64_t i = 0;
    while (i + 4 * VL <= n) {
        const int64_t stop = n < i + kChain ? n : i + kChain;
        vf a{}, b{}, c{}, d{};
        for (; i + 4 * VL <= stop; i += 4 * VL) {
            a += f(i, Whole{});
            b += f(i + VL, Whole{});
            c += f(i + 2 * VL, Whole{});
            d += f(i + 3 * VL, Whole{});
        }
        total += (a + b) + (c + d);
    }
    for (; i + VL <= n; i += VL) total += f(i, Whole{});
    if (i < n) total += f(i, int(n - i));
    return reduce_sum(total);
}

// sums += x, and in `lost` what rounding took from the sums: thousands of parts are added up
LLMCORE_INLINE void add_exactly(float* sums, float* lost, vf x) {
    const vf before = load(sums), after = before + x, added = after - before;
    store(sums, after);
    store(lost, load(lost) + ((before - (after - added)) + (x - added)));
}

// Uninitialised floats at a cache line's boundary.
class Scratch {
  public:
    explicit Scratch(int64_t count) {
        const std::size_t bytes = (std::size_t(count) * sizeof(float) + 63) / 64 * 64;
        data_ = bytes == 0 ? nullptr : static_cast<float*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr && bytes != 0) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* data() const { return data_; }

  private:
    float* data_;
};

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
