// Keeps what a failed compile needs to be repeated, and says where.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "jit/error.h"
#include "jit/settings.h"

namespace torchkiln::jit {

// Writes program, headers, log and options below <cache root>/v1/failures/ and returns the error with "source_path" in
// its details and the folder in its sentence; without a cache folder the details alone hold them.
Error keep_failure(const Error& failure, const Settings& settings);

}  // namespace torchkiln::jit
