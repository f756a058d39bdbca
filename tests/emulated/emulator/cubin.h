// The library of the host inside of what the emulated NVRTC gives as a cubin.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <elf.h>

#include <cstring>
#include <string_view>

namespace torchkiln::emulator {

// It lies right behind the first header; empty for a real cubin.
inline std::string_view host_library_in(std::string_view cubin) {
  if (cubin.size() < 2 * sizeof(Elf64_Ehdr)) return {};
  const std::string_view inner = cubin.substr(sizeof(Elf64_Ehdr));
  return inner.substr(0, SELFMAG) == std::string_view(ELFMAG, SELFMAG) ? inner : std::string_view();
}

}  // namespace torchkiln::emulator
