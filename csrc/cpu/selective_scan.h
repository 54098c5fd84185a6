// Signatures of the CPU kernels of the selective scan, in kernels.h's conventions; the maths is in
// llmcore/ops/selective_scan.py.
//
// u, delta, z and their gradients (batch, channels, length); A (channels, states); B, C (batch, groups, states, length);
// D, delta_bias (channels); initial and last (rows, channels, states) with a row for each sequence of the batch, or for
// each of `documents` that cu_seqlens packs into the one sequence; saved (batch, chunks, states, channels), the states
// before every chunk. A, D, delta_bias, initial, last and saved are contiguous floats.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace llmcore {

using std::int64_t;

// Whether a step is negative or no number, though no softplus is taken; the results are then of no use.
using SelectiveScanFwd = bool(View u, View delta, View A, View B, View C, View D, View z, View delta_bias, View initial,
                              View cu_seqlens, View y, View last, View saved, int64_t batch, int64_t channels,
                              int64_t length, int64_t states, int64_t groups, int64_t documents, bool softplus);

// dA (batch, channels, states), dD, dbias (batch, channels), dB, dC (shares, batch, groups, states, length) are contiguous
// floats, to be summed over their first dimension. dinitial holds the gradient of the last states and gets that of the
// initial ones.
using SelectiveScanBwd = void(View dy, View u, View delta, View A, View B, View C, View D, View z, View delta_bias,
                              View initial, View cu_seqlens, View saved, View du, View ddelta, View dA, View dB, View dC,
                              View dD, View dz, View dbias, View dinitial, int64_t batch, int64_t channels,
                              int64_t length, int64_t states, int64_t groups, int64_t documents, int64_t shares,
                              bool softplus);

using SelectiveStateUpdate = void(View state, View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View y,
                                  int64_t batch, int64_t heads, int64_t channels, int64_t states, int64_t groups,
                                  bool softplus);

#if defined(LLMCORE_ISA)
namespace LLMCORE_ISA {
SelectiveScanFwd selective_scan_fwd;
SelectiveScanBwd selective_scan_bwd;
SelectiveStateUpdate selective_state_update;
}  // namespace LLMCORE_ISA
#endif

}  // namespace llmcore
