// What is checked of a kernel that a user declares and launches, beyond what the library's own kernels are trusted with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>

#include "jit/launch/kernel.h"
#include "jit/launch/record.h"
#include "jit/spec/template_source.h"

namespace torchkiln::jit {

// Names that texts and programs can hold, an entry that is in the source, half types only with their header, and no
// other kernel of the same name. Throws Error(VALUE) with the argument that is wrong.
void check_user_kernel(const Kernel& kernel, const TemplateSources& sources,
                       std::span<Kernel* const> others);

// Throws Error(VALUE) when the driver would refuse this geometry.
void check_limits(const LaunchLimits& limits, const torchkiln_geometry& geometry,
                  const std::string& text);

}  // namespace torchkiln::jit
