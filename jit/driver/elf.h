// What an ELF file says about itself, read without loading it: the identity of a library, and the
// architecture and kernel of a cubin. Every offset in the file is distrusted.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace torchkiln::jit {

// The linker's build-id in hexadecimal digits; nothing when the file has none.
std::optional<std::string> build_id(const std::string& path);

// The build-id; for a library without one (libnvrtc of CUDA 12.6 is) a digest of its size and its
// first bytes, which hold the symbol tables. Nothing when the file cannot be read.
std::optional<std::string> file_identity(const std::string& path);

struct CubinFacts {
  bool is_elf = false;         // a 64-bit little-endian ELF header
  int machine = 0;             // 190 for CUDA
  int architecture = 0;        // 90 for sm_90 and sm_90a; 0 when the ABI version is unknown
  bool has_symbol = false;     // the asked symbol is defined
  std::size_t text_bytes = 0;  // of the section with its code, 0 when there is none
};
inline constexpr int kCudaMachine = 190;

// Never fails and never reads outside `bytes`; facts that cannot be found keep their zero.
CubinFacts inspect_cubin(std::string_view bytes, std::string_view symbol = {});

}  // namespace torchkiln::jit
