// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys, (B, T, H, D) and (B, T, K, D):
//
//   x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin       pairs (i, i + R/2), or (2i, 2i + 1) where interleaved
//
// The inverse, sin -> -sin, is the backward. Elements from R on are copied. A token's angles serve all its heads.
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {
namespace {

typedef uint64_t vq __attribute__((vector_size(LLMCORE_VECTOR_BYTES)));

// lanes (0, 1, 2, 3, ...) -> (1, 0, 3, 2, ...)
LLMCORE_INLINE vf swap_pairs(vf x) { return (vf)(((vq)x << 32) | ((vq)x >> 32)); }

// The channels [i, i + kVectors * VL) of both halves, for all heads: their angles stay in registers. x1 and x2 begin at
// the offsets first and second: exchanging them turns the rotation round.
template <bool kStream, int kVectors, class T>
LLMCORE_INLINE void rotate_block(const T* x, T* out, const float* cos, const float* sin, int64_t i, int64_t heads,
                                 int64_t stride, int64_t D, int64_t first, int64_t second) {
    vf c[kVectors], s[kVectors];
    for (int v = 0; v < kVectors; v++) {
        c[v] = load(cos + i + v * VL);
        s[v] = load(sin + i + v * VL);
    }
    for (int64_t h = 0; h < heads; h++, x += stride, out += D) {
        vf y1[kVectors], y2[kVectors];
        for (int v = 0; v < kVectors; v++) {
            const vf x1 = load(x + first + i + v * VL), x2 = load(x + second + i + v * VL);
            y1[v] = x1 * c[v] - x2 * s[v];
            y2[v] = x2 * c[v] + x1 * s[v];
        }
        store_outputs<kStream>(out + first + i, y1);
        store_outputs<kStream>(out + second + i, y2);
    }
}

template <bool kStream, class T>
LLMCORE_INLINE void rotate_halves(const T* x, T* out, const float* cos, const float* sin, int64_t half, int64_t heads,
                                  int64_t stride, int64_t D, int64_t first, int64_t second) {
    int64_t i = 0;
    for (; i + 4 * VL <= half; i += 4 * VL) rotate_block<kStream, 4>(x, out, cos, sin, i, heads, stride, D, first, second);
    for (; i + 2 * VL <= half; i += 2 * VL) rotate_block<kStream, 2>(x, out, cos, sin, i, heads, stride, D, first, second);
    for (; i + VL <= half; i += VL) rotate_block<kStream, 1>(x, out, cos, sin, i, heads, stride, D, first, second);
    if (i == half) return;
    const int lanes = int(half - i);
    const vf c = load(cos + i, lanes), s = load(sin + i, lanes);
    for (int64_t h = 0; h < heads; h++, x += stride, out += D) {
        const vf x1 = load(x + first + i, lanes), x2 = load(x + second + i, lanes);
        store(out + first + i, x1 * c - x2 * s, lanes);
        store(out + second + i, x2 * c + x1 * s, lanes);
    }
}

// cos2 and sin2 hold every value twice, sin2 with the sign of the pair's first and second element
template <bool kStream, class T>
LLMCORE_INLINE void rotate_pairs(const T* x, T* out, const float* cos2, const float* sin2, int64_t R) {
    for_vectors(R, [&](int64_t i, auto lanes) {
        const vf value = load(x + i, lanes);
        store_output<kStream>(out + i, value * load(cos2 + i, lanes) + swap_pairs(value) * load(sin2 + i, lanes),
                              lanes);
    });
}

// q or k, and where it goes: (B, T, heads, D) with strides, and contiguous
template <class T>
struct Side {
    const T* x;
    T* out;
    int64_t heads, stride_b, stride_t, stride_h;
};

struct Angles {
    const float *cos, *sin;  // (T_max, R / 2)
    const int64_t* positions;
    int64_t T, R, pos_stride_b, pos_stride_t;
    bool interleaved, inverse;

    int64_t row(int64_t b, int64_t t) const {
        return (positions == nullptr ? t : positions[b * pos_stride_b + t * pos_stride_t]) * (R / 2);
    }
};

// tokens [begin, end) of q or k; doubled: 2 R floats where the pairs are interleaved
template <bool kStream, class T>
void rotate(const Side<T>& side, const Angles& angles, int64_t D, int64_t begin, int64_t end, float* doubled) {
    const int64_t R = angles.R, half = R / 2;
    const int64_t first = angles.inverse ? half : 0, second = half - first;
    float *const cos2 = doubled, *const sin2 = doubled + (angles.interleaved ? R : 0);
    for (int64_t token = begin; token < end; token++) {
        const int64_t b = token / angles.T, t = token - b * angles.T, row = angles.row(b, t);
        const float *const c = angles.cos + row, *const s = angles.sin + row;
        const T* const x = side.x + b * side.stride_b + t * side.stride_t;
        T* const out = side.out + token * side.heads * D;
        if (angles.interleaved) {
            for (int64_t i = 0; i < half; i++) {
                cos2[2 * i] = cos2[2 * i + 1] = c[i];
                sin2[2 * i] = angles.inverse ? s[i] : -s[i];
                sin2[2 * i + 1] = -sin2[2 * i];
            }
            for (int64_t h = 0; h < side.heads; h++) {
                rotate_pairs<kStream>(x + h * side.stride_h, out + h * D, cos2, sin2, R);
            }
        } else {
            rotate_halves<kStream>(x, out, c, s, half, side.heads, side.stride_h, D, first, second);
        }
        if (R == D) continue;
        for (int64_t h = 0; h < side.heads; h++) {
            __builtin_memcpy(out + h * D + R, x + h * side.stride_h + R, std::size_t(D - R) * sizeof(T));
        }
    }
}

}  // namespace

void apply_rotary(const void* q, const void* k, void* q_out, void* k_out, const float* cos, const float* sin,
                  const int64_t* positions, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, int64_t R,
                  int64_t q_stride_b, int64_t q_stride_t, int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t,
                  int64_t k_stride_h, int64_t pos_stride_b, int64_t pos_stride_t, bool interleaved, bool inverse,
                  DType dtype) {
    with_element(dtype, [&](auto element) {
        using E = decltype(element);
        E *const q_to = static_cast<E*>(q_out), *const k_to = static_cast<E*>(k_out);
        const int64_t count = B * T * (H + K) * D;
        if (count == 0) return;
        const bool worth = worth_streaming(q_to, count, R / 2) && worth_streaming(k_to, count, D);
        const Side<E> sides[2] = {{static_cast<const E*>(q), q_to, H, q_stride_b, q_stride_t, q_stride_h},
                                  {static_cast<const E*>(k), k_to, K, k_stride_b, k_stride_t, k_stride_h}};
        const Angles angles{cos, sin, positions, T, R, pos_stride_b, pos_stride_t, interleaved, inverse};
        with_streaming(worth, [&](auto streaming) {
            parallel_stream<streaming()>(B * T, kGrain / ((H + K) * D), [&](int64_t begin, int64_t end) {
                const Scratch doubled(interleaved ? 2 * R : 0);
                for (const auto& side : sides) rotate<streaming()>(side, angles, D, begin, end, doubled.data());
            });
        });
    });
}

}  // namespace llmcore::LLMCORE_ISA
