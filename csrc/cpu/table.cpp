// The table of one level's kernels.
#include "cpu/kernels.h"

namespace llmcore::LLMCORE_ISA {

extern const Kernels kernels;
const Kernels kernels = {rms_norm_fwd,       rms_norm_bwd,       apply_rotary,           swiglu_fwd,
                         swiglu_bwd,         attention_fwd,      attention_bwd,          selective_scan_fwd,
                         selective_scan_bwd, selective_state_update, causal_conv1d_fwd,  causal_conv1d_bwd,
                         causal_conv1d_update, ssd_fwd,         ssd_bwd,                moe_route_fwd,
                         moe_route_bwd,      moe_plan,           moe_gather,             moe_combine,
                         moe_swiglu_bwd};

}  // namespace llmcore::LLMCORE_ISA
