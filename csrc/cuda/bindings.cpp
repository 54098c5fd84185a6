// The Python module llmcore._cuda: the launchers with addresses and a stream as integers. What CUDA reports becomes a
// RuntimeError. The caller has made the tensors' device current.
#include "common/bind.h"
#include "cuda/rms_norm.h"

namespace {

template <auto launcher>
struct Checked;

template <class... Args, const char* (*launcher)(Args...)>
struct Checked<launcher> {
    static void call(Args... args) {
        if (const char* error = launcher(args...)) throw std::runtime_error(std::string("CUDA: ") + error);
    }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    llmcore::bind(m, "rms_norm_fwd", Checked<llmcore_cuda_rms_norm_fwd>::call);
    llmcore::bind(m, "rms_norm_bwd", Checked<llmcore_cuda_rms_norm_bwd>::call);
}
