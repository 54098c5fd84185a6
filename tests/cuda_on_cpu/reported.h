// What the runtime or the stand-in for CUDA reports of a launch, as text for the tests; null where it is content.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

template <class F>
const char* reported(const F& f) {
    static std::string message;
    try {
        f();
        const cudaError_t error = cudaGetLastError();
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    } catch (const std::runtime_error& error) {
        message = error.what();
        return message.c_str();
    }
}
