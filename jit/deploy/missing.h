// The error for a kernel that nothing can serve where compiling is forbidden: what is missing, what comes closest, and
// the command that adds it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "jit/error.h"
#include "jit/launch/kernel.h"
#include "jit/objects.h"

namespace torchkiln::jit {

// Looks through everything that bundles and cache hold; `details` has specialization, target, nearest, differences and
// command.
Error missing_kernel(Objects& objects, const Kernel& kernel, const Specialization& wanted,
                     const torchkiln_device& device);

}  // namespace torchkiln::jit
