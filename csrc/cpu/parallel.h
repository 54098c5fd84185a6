// Work over the threads of OpenMP: the runtime that PyTorch has loaded, so that torch.set_num_threads counts here too. Without
// OpenMP everything runs on the calling thread. Internal linkage, for the reason given in simd.h.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/simd.h"

namespace llmcore::LLMCORE_ISA {
namespace {

LLMCORE_INLINE int max_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

LLMCORE_INLINE int thread_id() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

LLMCORE_INLINE int num_threads() {
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Whether n equal parts, each on one thread, keep the threads at least nine tenths busy.
LLMCORE_INLINE bool is_balanced(int64_t n, int64_t threads) { return 10 * n >= 9 * ((n + threads - 1) / threads * threads); }

// f(thread, threads) on every thread, or f(0, 1) where `concurrent` is false. At most max_threads() threads.
template <class F>
LLMCORE_INLINE void parallel(bool concurrent, const F& f) {
    if (!concurrent || max_threads() == 1) {  // not OpenMP's if clause: that still enters the runtime
        f(0, 1);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel
    f(thread_id(), num_threads());
#endif
}

// f(begin, end) over contiguous parts of [0, n), one part a thread, each of at least `grain` items: the parts depend on n, grain
// and the number of threads only. f(begin, end, thread) where it takes three.
template <class F>
LLMCORE_INLINE void parallel_for(int64_t n, int64_t grain, const F& f) {
    if (n <= 0) return;
    if (grain < 1) grain = 1;
    parallel(n >= 2 * grain, [&](int thread, int threads) {
        const int64_t most = n / grain, parts = most < 1 ? 1 : (most < threads ? most : threads);
        if (thread >= parts) return;
        const int64_t begin = n * thread / parts, end = n * (thread + 1) / parts;
        if (begin < end) f(begin, end);
    });
}

// f(item, thread) for items 0, 1, ..., n - 1 handed out in this order to whichever thread is free: for items of unequal cost,
// the dearest first. Which thread gets an item varies from run to run.
template <class F>
LLMCORE_INLINE void parallel_dynamic(bool concurrent, int64_t n, const F& f) {
    int64_t next = 0;
    parallel(concurrent && n > 1, [&](int thread, int) {
        for (;;) {
            const int64_t item = __atomic_fetch_add(&next, int64_t(1), __ATOMIC_RELAXED);
            if (item >= n) break;
            f(item, thread);
        }
    });
}

}  // namespace
}  // namespace llmcore::LLMCORE_ISA
