// Whether the person at the keyboard wants the program to end: asked between measurements.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace torchkiln::jit {

using Interrupted = std::int32_t (*)(void* context);
void set_interrupt(Interrupted interrupted, void* context);
bool interrupted();

}  // namespace torchkiln::jit
