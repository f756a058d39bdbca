// Memory of the emulated GPU: each buffer lies between pages that may not be touched, and bytes that are looked at.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace torchkiln::emulator {

// What fresh memory holds: NaN in every floating type, -1 in integers.
inline constexpr unsigned char kFresh = 0xff;

// Which end of a buffer an access must not cross without being caught at once; behind the other one lie bytes that
// unseen_writes() looks at.
enum class Guarded { kEnd, kBegin };

void guard(Guarded end);
// Filled with kFresh, aligned to 16 bytes (at the begin, when that is guarded, to a page).
void* allocate(std::size_t bytes, const char* what = "a buffer");
void release(void* memory);

// Where an address lies: "8 bytes behind the end of a buffer of 48 bytes".
std::string describe(const void* address);
// What was written beside a buffer without being caught.
std::optional<std::string> unseen_writes();

}  // namespace torchkiln::emulator
