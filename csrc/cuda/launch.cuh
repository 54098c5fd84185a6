// How a kernel is launched and how it asks for shared memory. Nothing else in csrc/cuda uses CUDA's own syntax for these,
// so that a stand-in for cuda_runtime.h can run the kernels on a CPU: it defines the three macros its own way.
#pragma once

#include <cuda_runtime.h>

#if !defined(LLMCORE_LAUNCH)

#define LLMCORE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// type name[a][b], uninitialised: LLMCORE_SHARED(type, name, [a][b]). Its address is as well aligned as its type says and
// no better: what takes addresses of 16 or 32 bytes (cp.async, ldmatrix, wmma) needs a type with alignas.
#define LLMCORE_SHARED(type, name, extent) __shared__ type name extent
#define LLMCORE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

#endif
