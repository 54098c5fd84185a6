// What this processor can run, asked of the processor itself: compilers differ in the names __builtin_cpu_supports
// knows. A feature counts only if the operating system saves its registers (XCR0: bit 2 ymm, bits 5..7 zmm, bits 17..18
// AMX tiles).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace llmcore {

// Linux gives a process the AMX tiles on request, for good and for all its threads.
inline bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return true;
#endif
}

struct Processor {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;  // with what the level's compiler flags include
    bool bf16_matmul = false;    // has instructions that multiply bf16 matrices or vectors
    bool slow_bf16_dot = false;  // multiplies more floats in a second than bf16 pairs

    bool runs(const char* level) const {
        if (!strcmp(level, "avx2")) return avx2;
        if (!strcmp(level, "avx512")) return avx512;
        if (!strcmp(level, "avx512_bf16")) return avx512_bf16;
        if (!strcmp(level, "amx")) return amx && tiles_granted();
        return true;  // "baseline" and "neon" are what any processor of the architecture has
    }
};

#if defined(__x86_64__)
inline Processor this_processor() {
    Processor p;
    unsigned eax, ebx, ecx, edx;
    const auto bit = [](unsigned word, int i) { return ((word >> i) & 1u) != 0; };
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !bit(ecx, 27)) return p;  // 27: the operating system uses xsave
    const bool fma = bit(ecx, 12), avx = bit(ecx, 28), f16c = bit(ecx, 29);
    unsigned xcr0, high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    const bool ymm = (xcr0 & 0x6u) == 0x6u, zmm = (xcr0 & 0xe6u) == 0xe6u, tiles = (xcr0 & 0x60000u) == 0x60000u;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return p;
    p.avx2 = ymm && avx && fma && f16c && bit(ebx, 5);
    p.avx512 = p.avx2 && zmm && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);  // f, dq, bw, vl
    const bool amx_bf16 = tiles && bit(edx, 22) && bit(edx, 24), avx512_fp16 = bit(edx, 23);
    if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) p.avx512_bf16 = p.avx512 && bit(eax, 5);
    p.amx = p.avx512_bf16 && amx_bf16;
    p.bf16_matmul = p.avx512_bf16 || amx_bf16;
    // Intel's cores from Sapphire Rapids on leave bf16 to AMX: measured, one vdpbf16ps in two cycles, and two vfmadd in one.
    p.slow_bf16_dot = avx512_fp16 && __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == 0x756e6547;  // "Genu"
    return p;
}
#elif defined(__aarch64__) && defined(__linux__)
inline Processor this_processor() {
    Processor p;
    p.bf16_matmul = (getauxval(AT_HWCAP2) >> 14) & 1u;  // HWCAP2_BF16
    return p;
}
#elif defined(__aarch64__) && defined(__APPLE__)
inline Processor this_processor() {
    Processor p;
    int value = 0;
    std::size_t size = sizeof value;
    p.bf16_matmul = sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value != 0;
    return p;
}
#else
inline Processor this_processor() { return {}; }
#endif

}  // namespace llmcore
