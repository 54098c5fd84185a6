// A stand-in for CUDA's mma.h (CUDA C++ Programming Guide, "Warp Matrix Functions"), with the shapes and types of 16-bit
// and tf32 inputs. Which lane holds which element is unspecified there, so here it is random, another one for every type
// of fragment and every LLMCORE_SHIM_SEED. What the guide asks of the arguments is checked.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}  // namespace precision

inline float __float_to_tf32(float x) {
    return x == x ? llmcore::float_from_bits((llmcore::float_bits(x) + 0x1000u) & ~0x1fffu) : x;
}

namespace stand_in {

template <class T>
constexpr unsigned code = std::is_same_v<T, __half>          ? 1
                          : std::is_same_v<T, __nv_bfloat16> ? 2
                          : std::is_same_v<T, float>         ? 3
                                                             : 4;

constexpr bool allowed(int m, int n, int k, unsigned type) {
    if (type == code<precision::tf32>) return m == 16 && n == 16 && k == 8;
    if (type == code<float> && m == 16 && n == 16 && k == 8) return true;
    return k == 16 && ((m == 16 && n == 16) || (m == 32 && n == 8) || (m == 8 && n == 32));
}

inline float to_float(float x) { return x; }
inline float to_float(__half x) { return __half2float(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline void assign(float& to, float x) { to = x; }
inline void assign(__half& to, float x) { to = __float2half(x); }

}  // namespace stand_in

template <class Use, int m, int n, int k, class T, class Layout = void>
class fragment {
    static constexpr bool is_a = std::is_same_v<Use, matrix_a>, is_b = std::is_same_v<Use, matrix_b>;
    static_assert(stand_in::allowed(m, n, k, stand_in::code<T>));
    static_assert(is_a || is_b ? !std::is_same_v<T, float> && !std::is_void_v<Layout>
                               : (std::is_same_v<T, float> || std::is_same_v<T, __half>) && std::is_void_v<Layout>);

  public:
    using Element = std::conditional_t<std::is_same_v<T, precision::tf32>, float, T>;
    static constexpr int rows = is_b ? k : m, cols = is_a ? k : n;
    // as on a card, where more than one lane has a copy of an element of a small matrix of halves
    static constexpr int num_elements = std::is_same_v<T, __half> && (is_a || is_b) ? 16 : rows * cols / 32;

    Element x[num_elements];

    fragment() { shim::poison(x, sizeof x); }

    // The element, row * cols + column, of lane * num_elements + i.
    static const std::vector<unsigned>& elements() {
        static const std::vector<unsigned> random = shim::scrambled(
            {unsigned(m), unsigned(n), unsigned(k), stand_in::code<T>, is_a ? 1u : is_b ? 2u : 3u,
             std::is_same_v<Layout, col_major> ? 1u : 0u},
            32 * num_elements, rows * cols);
        return random;
    }
};

namespace stand_in {

// What a lane brings to a load or a store.
template <class Fragment, class Pointer>
struct Transfer {
    Fragment* fragment;
    Pointer p;
    unsigned ldm;
    bool row_major;
};

template <class Fragment, class Pointer, class Move>
void transfer(void* const* operands, const char* what, Move move) {
    using Mine = Transfer<Fragment, Pointer>;
    const Mine first = *static_cast<Mine*>(operands[0]);
    const std::string name = what;
    if (reinterpret_cast<std::uintptr_t>(first.p) % 32 != 0) {
        shim::mistake(name + " with an address that is not a multiple of 32");
    }
    if (first.ldm * sizeof *first.p % 16 != 0) {
        shim::mistake(name + " with rows that are not a multiple of 16 bytes apart");
    }
    for (int lane = 0; lane < 32; ++lane) {
        const Mine& mine = *static_cast<Mine*>(operands[lane]);
        if (mine.p != first.p || mine.ldm != first.ldm || mine.row_major != first.row_major) {
            shim::mistake(name + " with arguments that differ between lanes");
        }
        for (int i = 0; i < Fragment::num_elements; ++i) {
            const unsigned element = Fragment::elements()[lane * Fragment::num_elements + i];
            const unsigned row = element / Fragment::cols, col = element % Fragment::cols;
            const std::size_t line = mine.row_major ? row : col, place = mine.row_major ? col : row;
            move(mine.fragment->x[i], mine.p[line * mine.ldm + place]);
        }
    }
}

template <class Fragment>
void load(Fragment& fragment, const typename Fragment::Element* p, unsigned ldm, bool row_major) {
    using Pointer = const typename Fragment::Element*;
    Transfer<Fragment, Pointer> mine{&fragment, p, ldm, row_major};
    shim::together("load_matrix_sync", &mine, [](void* const* operands) {
        transfer<Fragment, Pointer>(operands, "load_matrix_sync", [](auto& x, const auto& memory) { x = memory; });
    });
}

// The matrix that the lanes' fragments are together; `pick` finds a lane's.
template <class Fragment, class Pick>
std::array<float, Fragment::rows * Fragment::cols> gather(void* const* operands, Pick pick) {
    std::array<float, Fragment::rows * Fragment::cols> matrix;
    const typename Fragment::Element* holder[Fragment::rows * Fragment::cols] = {};
    for (int lane = 0; lane < 32; ++lane) {
        const Fragment& mine = *pick(operands[lane]);
        for (int i = 0; i < Fragment::num_elements; ++i) {
            const unsigned element = Fragment::elements()[lane * Fragment::num_elements + i];
            if (holder[element] != nullptr && std::memcmp(holder[element], &mine.x[i], sizeof mine.x[i]) != 0) {
                shim::mistake("mma_sync with a fragment whose lanes hold different values of one element");
            }
            holder[element] = &mine.x[i];
            matrix[element] = to_float(mine.x[i]);
        }
    }
    return matrix;
}

template <std::size_t count>
void check_tf32(const std::array<float, count>& matrix) {
    for (const float x : matrix) {
        if (x == x && llmcore::float_bits(x) % 0x2000u != 0) {
            shim::mistake("mma_sync with an operand that is not tf32: it needs __float_to_tf32");
        }
    }
}

}  // namespace stand_in

template <class Use, int m, int n, int k, class T, class Layout>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& f, typename fragment<Use, m, n, k, T, Layout>::Element value) {
    for (auto& x : f.x) x = value;
}

template <class Use, int m, int n, int k, class T, class Layout>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& f, const typename fragment<Use, m, n, k, T, Layout>::Element* p,
                      unsigned ldm) {
    stand_in::load(f, p, ldm, std::is_same_v<Layout, row_major>);
}

template <int m, int n, int k, class T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& f, const T* p, unsigned ldm, layout_t layout) {
    stand_in::load(f, p, ldm, layout == mem_row_major);
}

template <int m, int n, int k, class T>
void store_matrix_sync(T* p, const fragment<accumulator, m, n, k, T>& f, unsigned ldm, layout_t layout) {
    using Fragment = const fragment<accumulator, m, n, k, T>;
    stand_in::Transfer<Fragment, T*> mine{&f, p, ldm, layout == mem_row_major};
    shim::together("store_matrix_sync", &mine, [](void* const* operands) {
        stand_in::transfer<Fragment, T*>(operands, "store_matrix_sync", [](const T& x, T& memory) { memory = x; });
    });
}

template <int m, int n, int k, class T, class LayoutA, class LayoutB, class D, class C>
void mma_sync(fragment<accumulator, m, n, k, D>& d, const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b, const fragment<accumulator, m, n, k, C>& c) {
    static_assert(std::is_same_v<T, __half> || (std::is_same_v<D, float> && std::is_same_v<C, float>));
    using FragmentA = fragment<matrix_a, m, n, k, T, LayoutA>;
    using FragmentB = fragment<matrix_b, m, n, k, T, LayoutB>;
    using FragmentC = fragment<accumulator, m, n, k, C>;
    using Result = fragment<accumulator, m, n, k, D>;
    struct Mine {
        Result* d;
        const FragmentA* a;
        const FragmentB* b;
        const FragmentC* c;
    };
    Mine mine{&d, &a, &b, &c};
    shim::together("mma_sync", &mine, [](void* const* operands) {
        const auto lane = [](void* p) { return static_cast<Mine*>(p); };
        const auto as = stand_in::gather<FragmentA>(operands, [&](void* p) { return lane(p)->a; });
        const auto bs = stand_in::gather<FragmentB>(operands, [&](void* p) { return lane(p)->b; });
        auto sums = stand_in::gather<FragmentC>(operands, [&](void* p) { return lane(p)->c; });
        if constexpr (std::is_same_v<T, precision::tf32>) {
            stand_in::check_tf32(as);
            stand_in::check_tf32(bs);
        }
        for (int row = 0; row < m; ++row) {
            for (int col = 0; col < n; ++col) {
                for (int i = 0; i < k; ++i) sums[row * n + col] += as[row * k + i] * bs[i * n + col];
            }
        }
        for (int l = 0; l < 32; ++l) {
            for (int i = 0; i < Result::num_elements; ++i) {
                stand_in::assign(lane(operands[l])->d->x[i], sums[Result::elements()[l * Result::num_elements + i]]);
            }
        }
    });
}

}  // namespace nvcuda::wmma
