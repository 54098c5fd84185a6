// AMX: the processor's eight tile registers, each 16 rows of 64 bytes, and its product of bf16 pairs,
//
//   C[i][j] += sum_k A[i][2k] B[k][2j] + A[i][2k+1] B[k][2j+1]     A: 16 x 32, B: 16 x 16 pairs, C: 16 x 16 floats
//
// With LLMCORE_EMULATE_AMX the registers are ordinary memory: the code above them is then tested on any processor.
#pragma once

#include "cpu/simd.h"

#if defined(__AMX_BF16__) || defined(LLMCORE_EMULATE_AMX)
#define LLMCORE_TILES

namespace llmcore::LLMCORE_ISA {
namespace {

#if !defined(LLMCORE_EMULATE_AMX)

// The compiler knows nothing of what a tile instruction reads or writes but what "memory" tells it.
template <int C>
LLMCORE_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(C));
}
template <int C>
LLMCORE_INLINE void tile_load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(C), "r"(p), "r"(stride) : "memory");
}
template <int C>
LLMCORE_INLINE void tile_store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(C), "r"(p), "r"(stride) : "memory");
}
template <int C, int A, int B>
LLMCORE_INLINE void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

LLMCORE_INLINE void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const all_whole;
    __asm__ volatile("ldtilecfg %0" ::"m"(all_whole));
}
LLMCORE_INLINE void release_tiles() { __asm__ volatile("tilerelease"); }

#else

thread_local uint32_t emulated_tiles[8][16][16];

template <int C>
LLMCORE_INLINE void tile_zero() {
    __builtin_memset(emulated_tiles[C], 0, sizeof emulated_tiles[C]);
}
template <int C>
LLMCORE_INLINE void tile_load(const void* p, int64_t stride) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(emulated_tiles[C][i], (const char*)p + i * stride, 64);
}
template <int C>
LLMCORE_INLINE void tile_store(void* p, int64_t stride) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy((char*)p + i * stride, emulated_tiles[C][i], 64);
}
template <int C, int A, int B>
LLMCORE_INLINE void tile_dot() {
    for (int i = 0; i < 16; ++i) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < 16; ++k) {
            const uint32_t a = emulated_tiles[A][i][k];
            for (int j = 0; j < 16; ++j) {
                const uint32_t b = emulated_tiles[B][k][j];
                even[j] += bf16_to_float(uint16_t(a)) * bf16_to_float(uint16_t(b));
                odd[j] += bf16_to_float(uint16_t(a >> 16)) * bf16_to_float(uint16_t(b >> 16));
            }
        }
        float c[16];
        __builtin_memcpy(c, emulated_tiles[C][i], 64);
        for (int j = 0; j < 16; ++j) c[j] += even[j] + odd[j];
        __builtin_memcpy(emulated_tiles[C][i], c, 64);
    }
}

LLMCORE_INLINE void configure_tiles() {}
LLMCORE_INLINE void release_tiles() { __builtin_memset(emulated_tiles, 0xff, sizeof emulated_tiles); }

#endif

// The tile registers, while it lives. Others (PyTorch's oneDNN) use these registers on the same threads and shape them themselves.
struct TileRegisters {
    TileRegisters() { configure_tiles(); }
    ~TileRegisters() { release_tiles(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

}  // namespace
}  // namespace llmcore::LLMCORE_ISA

#endif
