// The PTX instructions that CUDA C++ has no function for, sm_80 and newer: the only file here with inline assembly.
//
// Source: PTX ISA, chapters "Data Movement and Conversion Instructions: Asynchronous copy", "Warp-level matrix load
// instruction: ldmatrix" and "Matrix multiply-accumulate operation using mma instruction", whose fragment layouts are
// repeated below with g = lane / 4 and t = lane % 4. Registers of 32 bits hold two 16-bit elements, the first in the
// lower half.
//
// Without nvcc the functions are only declared: who runs the kernels on a CPU links definitions of their own.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace llmcore::ptx {

// Begins to copy `bytes` (4, 8 or 16, both addresses being multiples of it) from global to shared memory: source_bytes
// of them, the rest becomes zero. _ca keeps the line in L1 and L2, _cg in L2 alone. The destination must not be touched
// until this thread has waited for the copy, by other threads not until a barrier after that.
template <int bytes>
__device__ void cp_async_ca(void* shared, const void* global, int source_bytes = bytes);
__device__ void cp_async_cg_16(void* shared, const void* global, int source_bytes = 16);
// Makes a group of the copies that this thread has begun since its last group; it may be empty.
__device__ void cp_async_commit_group();
// Waits until at most the latest `pending` groups of this thread are under way.
template <int pending>
__device__ void cp_async_wait_group();

// Loads `count` (1, 2 or 4) matrices of 8 x 8 16-bit elements from shared memory. Lane 8 i + j gives the address of row
// j of matrix i, a multiple of 16; the addresses of lanes from 8 count on are not used. r[i] is elements 2 t and 2 t + 1
// of row g of matrix i; with _trans, of column g.
template <int count>
__device__ void ldmatrix(std::uint32_t (&r)[count], const void* row);
template <int count>
__device__ void ldmatrix_trans(std::uint32_t (&r)[count], const void* row);

// c (16 x 8) += a (16 x 16) b (16 x 8), by a whole warp.
//   a[0], a[1]: rows g and g + 8, columns 2 t and 2 t + 1;  a[2], a[3]: the same rows, columns 2 t + 8 and 2 t + 9
//   b[0]: rows 2 t and 2 t + 1 of column g;  b[1]: rows 2 t + 8 and 2 t + 9
//   c[0], c[1]: row g, columns 2 t and 2 t + 1;  c[2], c[3]: row g + 8
__device__ void mma_m16n8k16_bf16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
__device__ void mma_m16n8k16_f16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

// c (16 x 8) += a (16 x 8) b (8 x 8) of what float_to_tf32 gives; c as above.
//   a[0], a[1]: rows g and g + 8 of column t;  a[2], a[3]: of column t + 4;  b[0], b[1]: rows t and t + 4 of column g
__device__ void mma_m16n8k8_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

// x with 10 bits after the point, ties away from zero
__device__ std::uint32_t float_to_tf32(float x);

// Two floats rounded to nearest even: the register that mma takes.
__device__ std::uint32_t pack_bf16(float low, float high);
__device__ std::uint32_t pack_f16(float low, float high);

// 2^x with a relative error of about 2^-22; subnormal x and results are zero
__device__ float ex2_approx(float x);

#if defined(__CUDACC__)

__device__ inline std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

template <int bytes>
__device__ void cp_async_ca(void* shared, const void* global, int source_bytes) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "n"(bytes), "r"(source_bytes)
                 : "memory");
}

__device__ inline void cp_async_cg_16(void* shared, const void* global, int source_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
                 : "memory");
}

__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

template <int count>
__device__ void ldmatrix(std::uint32_t (&r)[count], const void* row) {
    static_assert(count == 1 || count == 2 || count == 4);
    if constexpr (count == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(shared_address(row))
                     : "memory");
    } else if constexpr (count == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

template <int count>
__device__ void ldmatrix_trans(std::uint32_t (&r)[count], const void* row) {
    static_assert(count == 1 || count == 2 || count == 4);
    if constexpr (count == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(shared_address(row))
                     : "memory");
    } else if constexpr (count == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

__device__ inline void mma_m16n8k16_bf16(float (&c)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16_f16(float (&c)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k8_tf32(float (&c)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline std::uint32_t float_to_tf32(float x) {
    std::uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
}

__device__ inline std::uint32_t pack_bf16(float low, float high) {
    std::uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ inline std::uint32_t pack_f16(float low, float high) {
    std::uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ inline float ex2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

#endif

}  // namespace llmcore::ptx
