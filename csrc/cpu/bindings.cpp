// The Python module llmcore._cpu: the kernels of the best instruction-set level that was compiled and that this
// processor runs. LLMCORE_CPU_ISA names another one. LLMCORE_LEVELS, from the build, is X(level) for each compiled
// level, as a rule worst first.
#include <cstdlib>
#include <utility>
#include <vector>

#include "common/bind.h"
#include "cpu/kernels.h"
#include "cpu/levels.h"

namespace llmcore {

#define X(level)                  \
    namespace level {             \
    extern const Kernels kernels; \
    }
LLMCORE_LEVELS
#undef X

namespace {

namespace py = pybind11;

struct Level {
    std::string name;
    const Kernels* kernels;
};

// Worst first.
std::vector<Level> runnable_levels(const Processor& processor) {
    std::vector<Level> levels;
#define X(level) \
    if (processor.runs(#level)) levels.push_back({#level, &level::kernels});
    LLMCORE_LEVELS
#undef X
    for (std::size_t i = 1; i < levels.size(); ++i) {
        if (processor.slow_bf16_dot && levels[i].name == "avx512_bf16") std::swap(levels[i - 1], levels[i]);
    }
    return levels;
}

Level choose(const std::vector<Level>& levels) {
    const char* forced = std::getenv("LLMCORE_CPU_ISA");
    if (forced == nullptr || *forced == '\0') return levels.back();
    std::string allowed;
    for (const Level& level : levels) {
        if (level.name == forced) return level;
        allowed += (allowed.empty() ? "" : ", ") + level.name;
    }
    throw py::import_error(std::string("LLMCORE_CPU_ISA is '") + forced + "'; this processor and this build allow " +
                           allowed + ".");
}

}  // namespace
}  // namespace llmcore

PYBIND11_MODULE(_cpu, m) {
    using namespace llmcore;
    const Processor processor = this_processor();
    const std::vector<Level> levels = runnable_levels(processor);
    const Level level = choose(levels);

    bind(m, "rms_norm_fwd", level.kernels->rms_norm_fwd);
    bind(m, "rms_norm_bwd", level.kernels->rms_norm_bwd);
    bind(m, "apply_rotary", level.kernels->apply_rotary);
    bind(m, "swiglu_fwd", level.kernels->swiglu_fwd);
    bind(m, "swiglu_bwd", level.kernels->swiglu_bwd);
    bind(m, "attention_fwd", level.kernels->attention_fwd);
    bind(m, "attention_bwd", level.kernels->attention_bwd);
    bind(m, "selective_scan_fwd", level.kernels->selective_scan_fwd);
    bind(m, "selective_scan_bwd", level.kernels->selective_scan_bwd);
    bind(m, "selective_state_update", level.kernels->selective_state_update);
    bind(m, "causal_conv1d_fwd", level.kernels->causal_conv1d_fwd);
    bind(m, "causal_conv1d_bwd", level.kernels->causal_conv1d_bwd);
    bind(m, "causal_conv1d_update", level.kernels->causal_conv1d_update);
    bind(m, "ssd_fwd", level.kernels->ssd_fwd);
    bind(m, "ssd_bwd", level.kernels->ssd_bwd);
    bind(m, "moe_route_fwd", level.kernels->moe_route_fwd);
    bind(m, "moe_route_bwd", level.kernels->moe_route_bwd);
    bind(m, "moe_plan", level.kernels->moe_plan);
    bind(m, "moe_gather", level.kernels->moe_gather);
    bind(m, "moe_combine", level.kernels->moe_combine);
    bind(m, "moe_swiglu_bwd", level.kernels->moe_swiglu_bwd);

    m.def("isa", [name = level.name] { return name; }, "The instruction-set level in use.");
    m.def(
        "isas",
        [levels] {
            py::list names;
            for (const Level& each : levels) names.append(each.name);
            return names;
        },
        "The levels that are compiled in and that this processor runs, worst first.");
    m.def(
        "bf16_matmul", [has = processor.bf16_matmul] { return has; },
        "Whether the processor multiplies bfloat16 matrices faster than float32 ones.");
}
