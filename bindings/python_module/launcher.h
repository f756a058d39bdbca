// `_control.Launcher`: a kernel that Python declared, called with tensors and numbers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace torchkiln::python {

// Adds the type Launcher, the tuple DTYPES and the function set_allocator.
void add_launcher(pybind11::module_& module);

}  // namespace torchkiln::python
