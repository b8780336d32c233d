#pragma once

#include <pybind11/pybind11.h>

namespace kdfast::io {

void bind(pybind11::module_& m);

}  // namespace kdfast::io
