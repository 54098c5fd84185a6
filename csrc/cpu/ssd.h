// Signatures of the CPU kernels of ssd, in kernels.h's conventions; the maths is in llmcore/ops/ssd.py.
//
// x, y, z and their gradients (batch, length, heads, head_dim); dt (batch, length, heads); B, C (batch, length, groups, states);
// A, dt_bias (heads); D (heads, head_dim); initial and final (rows, heads, head_dim, states). documents (count, 5) int64:
// sequence, first step, end, the rows of the states it starts from and ends in, -1 for none. A, D, dt_bias, the states and
// documents are contiguous, the last dimension of x, z, B, C and dy too, and all that is written.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace llmcore {

using std::int64_t;

// Whether a step is no number, though no softplus is taken; the results are then of no use.
using SsdFwd = bool(View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View initial, View documents, View y,
                    View final, int64_t count, int64_t heads, int64_t head_dim, int64_t states, int64_t groups, bool softplus,
                    float dt_min, float dt_max);

// dB, dC (shares, batch, length, groups, states), dA and dbias (parts, heads) and dD (parts, heads, head_dim) are floats, to be
// summed over their first dimension. dfinal is that of the states' gradients that a document begins with, dinitial the one it
// leaves its own in.
using SsdBwd = void(View dy, View dfinal, View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View initial,
                    View documents, View dx, View ddt, View dA, View dB, View dC, View dD, View dz, View dbias, View dinitial,
                    int64_t count, int64_t heads, int64_t head_dim, int64_t states, int64_t groups, int64_t shares, int64_t parts,
                    bool softplus, float dt_min, float dt_max);

#if defined(LLMCORE_ISA)
namespace LLMCORE_ISA {
SsdFwd ssd_fwd;
SsdBwd ssd_bwd;
}  // namespace LLMCORE_ISA
#endif

}  // namespace llmcore
