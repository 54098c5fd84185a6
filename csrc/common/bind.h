// From C++ functions on pointers to Python functions on integers: an address is an int (0 = absent), a dtype is its
// code, a view is (address, dtype, four strides).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/view.h"

namespace llmcore {

template <class T>
struct FromPython {
    using type = T;
    static T convert(T value) { return value; }
};

template <class T>
struct FromPython<T*> {
    using type = std::uintptr_t;
    static T* convert(type address) { return reinterpret_cast<T*>(address); }
};

template <>
struct FromPython<DType> {
    using type = int;
    static DType convert(type code) {
        if (code < 0 || code > 2) {
            throw std::invalid_argument("dtype code is " + std::to_string(code) +
                                        "; allowed are 0 (float32), 1 (bfloat16) and 2 (float16).");
        }
        return DType(code);
    }
};

template <>
struct FromPython<View> {
    using type = std::array<std::int64_t, 6>;
    static View convert(const type& value) {
        return {reinterpret_cast<void*>(value[0]), FromPython<DType>::convert(int(value[1])),
                {value[2], value[3], value[4], value[5]}};
    }
};

// The last argument is a pointer to the function, so that it works for those chosen at load time too.
template <class R, class... Args>
void bind(pybind11::module_& module, const char* name, R (*function)(Args...)) {
    module.def(
        name,
        [function](typename FromPython<Args>::type... args) { return function(FromPython<Args>::convert(args)...); },
        pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace llmcore
