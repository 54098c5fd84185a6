// The instructions of csrc/cuda/ptx.cuh on the CPU, strict where that finds mistakes: an asynchronous copy comes as late as
// the kernel's waits allow and its destination holds NaN until then; the address of every row is checked; a warp that does
// not come whole to a matrix instruction is reported. Fragments are laid out as the PTX ISA says.
#include "cuda/ptx.cuh"

#include <cmath>
#include <vector>

#include "common/dtype.h"
#include "threads.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes) 0
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes) 0
#endif

namespace llmcore::ptx {
namespace {

using std::uint16_t;
using std::uint32_t;

bool aligned(const void* p, int bytes) { return reinterpret_cast<std::uintptr_t>(p) % unsigned(bytes) == 0; }

// The source may be read when the copy begins or when it is waited for: it must not change in between.
struct Copy {
    char* to;
    const void* from;
    int bytes, source_bytes;
    bool read_late;
    char read[16];
};

struct Copies {
    std::vector<Copy> without_group;
    std::vector<std::vector<Copy>> groups;
};

Copies& copies() {
    std::shared_ptr<void>& kept = shim::of_this_thread();
    if (kept == nullptr) kept = std::make_shared<Copies>();
    return *static_cast<Copies*>(kept.get());
}

void begin(void* shared, const void* global, int bytes, int source_bytes) {
    const auto wrong = [&](const std::string& how) {
        const std::string lane = std::to_string(shim::lane());
        shim::mistake("cp.async of " + std::to_string(bytes) + " bytes by lane " + lane + " " + how);
    };
    if (!aligned(shared, bytes) || !aligned(global, bytes)) wrong("with a misaligned address");
    if (source_bytes < 0 || source_bytes > bytes) wrong("of which " + std::to_string(source_bytes) + " are read");
    if (!shim::in_shared_memory(shared, std::size_t(bytes))) wrong("to outside shared memory");
    if (shim::in_shared_memory(global, 1)) wrong("from shared memory");
    Copy copy{static_cast<char*>(shared), global, bytes, source_bytes, shim::random_number() % 2 == 0, {}};
    memcpy(copy.read, global, std::size_t(source_bytes));
    shim::poison(shared, std::size_t(bytes));
    (void)ASAN_POISON_MEMORY_REGION(shared, bytes);
    copies().without_group.push_back(copy);
}

void finish(Copy& copy) {
    if (copy.read_late) memcpy(copy.read, copy.from, std::size_t(copy.source_bytes));
    (void)ASAN_UNPOISON_MEMORY_REGION(copy.to, copy.bytes);
    memcpy(copy.to, copy.read, std::size_t(copy.bytes));
}

void wait(std::size_t pending) {
    std::vector<std::vector<Copy>>& groups = copies().groups;
    for (; groups.size() > pending; groups.erase(groups.begin())) {
        for (Copy& copy : groups.front()) finish(copy);
    }
}

struct LoadMatrix {
    uint32_t* r;
    const void* row;
};

template <int count, bool trans>
void load_matrices(void* const* operands) {
    const auto lane = [&](int i) { return static_cast<LoadMatrix*>(operands[i]); };
    for (int i = 0; i < count; ++i) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) {
            const void* const address = lane(8 * i + row)->row;
            const auto wrong = [&](const char* how) {
                shim::mistake("ldmatrix: the row address of lane " + std::to_string(8 * i + row) + " is " + how);
            };
            if (!aligned(address, 16)) wrong("not a multiple of 16");
            if (!shim::in_shared_memory(address, 16)) wrong("outside shared memory");
            memcpy(matrix[row], address, 16);
        }
        for (int l = 0; l < 32; ++l) {
            const int g = l / 4, t = l % 4;
            const uint32_t first = trans ? matrix[2 * t][g] : matrix[g][2 * t];
            const uint32_t second = trans ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            lane(l)->r[i] = first | second << 16;
        }
    }
}

struct MultiplyAdd {
    float* c;
    const uint32_t *a, *b;
};

// c += a b, with a (16, depth) and b (depth, 8)
template <int depth>
void multiply_add(void* const* operands, const float (&a)[16][depth], const float (&b)[depth][8]) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
            float& sum = static_cast<MultiplyAdd*>(operands[lane])->c[i];
            for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][col];
        }
    }
}

template <float to_float(uint16_t)>
void multiply_add_16_bit(void* const* operands) {
    float a[16][16], b[16][8];
    const auto element = [](const uint32_t* r, int i) { return to_float(uint16_t(r[i / 2] >> i % 2 * 16)); };
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const MultiplyAdd& mine = *static_cast<MultiplyAdd*>(operands[lane]);
        for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = element(mine.a, i);
        for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = element(mine.b, i);
    }
    multiply_add(operands, a, b);
}

float tf32(uint32_t bits) {
    const float x = float_from_bits(bits);
    if (x == x && (bits & 0x1fffu) != 0) {
        shim::mistake("mma.m16n8k8 with an operand that is not tf32: it needs float_to_tf32");
    }
    return x;
}

void multiply_add_tf32(void* const* operands) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const MultiplyAdd& mine = *static_cast<MultiplyAdd*>(operands[lane]);
        for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = tf32(mine.a[i]);
        for (int i = 0; i < 2; ++i) b[t + i * 4][g] = tf32(mine.b[i]);
    }
    multiply_add(operands, a, b);
}

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }

}  // namespace

template <int bytes>
void cp_async_ca(void* shared, const void* global, int source_bytes) {
    begin(shared, global, bytes, source_bytes);
}
template void cp_async_ca<4>(void*, const void*, int);
template void cp_async_ca<8>(void*, const void*, int);
template void cp_async_ca<16>(void*, const void*, int);

void cp_async_cg_16(void* shared, const void* global, int source_bytes) { begin(shared, global, 16, source_bytes); }

void cp_async_commit_group() {
    Copies& mine = copies();
    mine.groups.push_back(std::move(mine.without_group));
    mine.without_group.clear();
}

template <int pending>
void cp_async_wait_group() {
    wait(pending);
}
// as many as any kernel is expected to leave under way
template void cp_async_wait_group<0>();
template void cp_async_wait_group<1>();
template void cp_async_wait_group<2>();
template void cp_async_wait_group<3>();
template void cp_async_wait_group<4>();
template void cp_async_wait_group<5>();
template void cp_async_wait_group<6>();
template void cp_async_wait_group<7>();

template <int count>
void ldmatrix(uint32_t (&r)[count], const void* row) {
    LoadMatrix mine{r, row};
    shim::together("ldmatrix", &mine, load_matrices<count, false>);
}
template void ldmatrix(uint32_t (&)[1], const void*);
template void ldmatrix(uint32_t (&)[2], const void*);
template void ldmatrix(uint32_t (&)[4], const void*);

template <int count>
void ldmatrix_trans(uint32_t (&r)[count], const void* row) {
    LoadMatrix mine{r, row};
    shim::together("ldmatrix.trans", &mine, load_matrices<count, true>);
}
template void ldmatrix_trans(uint32_t (&)[1], const void*);
template void ldmatrix_trans(uint32_t (&)[2], const void*);
template void ldmatrix_trans(uint32_t (&)[4], const void*);

void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MultiplyAdd mine{c, a, b};
    shim::together("mma.m16n8k16", &mine, multiply_add_16_bit<bf16_to_float>);
}

void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MultiplyAdd mine{c, a, b};
    shim::together("mma.m16n8k16", &mine, multiply_add_16_bit<f16_to_float>);
}

void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MultiplyAdd mine{c, a, b};
    shim::together("mma.m16n8k8", &mine, multiply_add_tf32);
}

uint32_t float_to_tf32(float x) {
    return x == x ? (float_bits(x) + 0x1000u) & ~0x1fffu : 0x7fffe000u;
}

uint32_t pack_bf16(float low, float high) { return float_to_bf16(low) | uint32_t(float_to_bf16(high)) << 16; }
uint32_t pack_f16(float low, float high) { return float_to_f16(low) | uint32_t(float_to_f16(high)) << 16; }

float ex2_approx(float x) { return flushed(std::exp2(flushed(x))); }

}  // namespace llmcore::ptx
