// Signatures of the CPU kernels of the causal convolution, in kernels.h's conventions; the maths is in
// llmcore/ops/causal_conv1d.py.
//
// x, y and their gradients (batch, channels, length), of one dtype; weight (channels, width), bias (channels); initial,
// final and their gradients (rows, channels, width - 1) with a row for each sequence of the batch, or for each of
// `documents` that the contiguous cu_seqlens packs into the one sequence; seq_idx (batch, length).
#pragma once

#include <cstdint>

#include "common/view.h"

namespace llmcore {

using std::int64_t;

using CausalConv1dFwd = void(View x, View weight, View bias, View initial, View cu_seqlens, View seq_idx, View y, View final,
                             int64_t batch, int64_t channels, int64_t length, int64_t width, int64_t documents, bool silu);

// dfilter (batch, width + 1, channels), contiguous floats: the gradients of the taps and of the bias, to be summed over
// the batch.
using CausalConv1dBwd = void(View dy, View dfinal, View x, View weight, View bias, View initial, View cu_seqlens, View seq_idx,
                             View dx, View dfilter, View dinitial, int64_t batch, int64_t channels, int64_t length,
                             int64_t width, int64_t documents, bool silu);

// x, y (batch, channels, steps), state (batch, channels, remembered)
using CausalConv1dUpdate = void(View x, View state, View weight, View bias, View y, int64_t batch, int64_t channels,
                                int64_t steps, int64_t remembered, int64_t width, bool silu);

#if defined(LLMCORE_ISA)
namespace LLMCORE_ISA {
CausalConv1dFwd causal_conv1d_fwd;
CausalConv1dBwd causal_conv1d_bwd;
CausalConv1dUpdate causal_conv1d_update;
}  // namespace LLMCORE_ISA
#endif

}  // namespace llmcore
