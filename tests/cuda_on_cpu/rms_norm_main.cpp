// Runs rms_norm.cu's launchers on memory that is really uninitialised, for valgrind: a result that depends on what was
// never written is an error of the kernel.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/dtype.h"
#include "cuda/rms_norm.h"

using namespace llmcore;

namespace {

struct Tensor {
    DType dtype;
    std::int64_t count;
    void* data;

    Tensor(DType dtype, std::int64_t count) : dtype(dtype), count(count), data(std::malloc(count * size_of(dtype))) {}
    Tensor(const Tensor&) = delete;
    ~Tensor() { std::free(data); }

    void fill(unsigned seed) {
        for (std::int64_t i = 0; i < count; ++i) {
            const float value = float((i * 37 + seed * 11) % 41) / 16.0f - 1.25f;
            if (dtype == DType::f32) {
                static_cast<float*>(data)[i] = value;
            } else {
                static_cast<std::uint16_t*>(data)[i] = dtype == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
            }
        }
    }
    // a decision on every element, so that valgrind looks at it
    bool finite() const {
        bool all = true;
        for (std::int64_t i = 0; i < count; ++i) {
            const std::uint16_t* const half = static_cast<const std::uint16_t*>(data);
            const float x = dtype == DType::f32 ? static_cast<const float*>(data)[i]
                            : dtype == DType::bf16 ? bf16_to_float(half[i]) : f16_to_float(half[i]);
            if (!(x - x == 0.0f)) all = false;
        }
        return all;
    }
};

bool run(std::int64_t rows, std::int64_t cols, DType dtype, DType residual_dtype, bool with_residual) {
    const DType s_dtype = with_residual && residual_dtype != dtype ? DType::f32 : dtype;
    Tensor x(dtype, rows * cols), residual(residual_dtype, rows * cols), weight(DType::f32, cols), y(dtype, rows * cols);
    Tensor s(s_dtype, rows * cols), rstd(DType::f32, rows), dx(dtype, rows * cols), dweight(DType::f32, cols);
    Tensor dresidual(residual_dtype, rows * cols);
    x.fill(1), residual.fill(2), weight.fill(3);
    void* const added = with_residual ? residual.data : nullptr;
    void* const sum = with_residual ? s.data : nullptr;
    const char* error = llmcore_cuda_rms_norm_fwd(x.data, added, weight.data, y.data, sum, static_cast<float*>(rstd.data),
                                                  rows, cols, cols, cols, 1e-6f, 0.0f, dtype, residual_dtype, DType::f32,
                                                  nullptr);
    void* const dr = with_residual && residual_dtype != dtype ? dresidual.data : nullptr;
    if (error == nullptr) {
        error = llmcore_cuda_rms_norm_bwd(y.data, sum, with_residual ? s.data : x.data, weight.data,
                                          static_cast<float*>(rstd.data), dx.data, dr, dweight.data, rows, cols, cols, cols,
                                          cols, 0.0f, dtype, s_dtype, residual_dtype, DType::f32, nullptr);
    }
    if (error != nullptr) std::fprintf(stderr, "%s\n", error);
    return error == nullptr && y.finite() && rstd.finite() && dx.finite() && dweight.finite() &&
           (!with_residual || s.finite()) && (dr == nullptr || dresidual.finite());
}

}  // namespace

int main() {
    bool ok = true;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        for (const std::int64_t cols : {1, 33, 96, 1032}) {
            ok &= run(5, cols, dtype, dtype, false);
            ok &= run(5, cols, dtype, dtype, true);
            ok &= run(5, cols, dtype, DType::f32, true);
        }
    }
    ok &= run(2, 13000, DType::bf16, DType::bf16, true);  // dweight's shares do not fit in shared memory
    return ok ? 0 : 1;
}
