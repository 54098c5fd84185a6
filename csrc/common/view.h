// A tensor of any layout as a kernel takes it: strides are in elements, a null pointer means absent.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmcore {

struct View {
    void* data;
    DType dtype;
    std::int64_t stride[4];

    explicit operator bool() const { return data != nullptr; }
};

}  // namespace llmcore
