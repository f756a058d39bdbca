// Where NVRTC is, and which one it is, without loading it: a warm start reads two ELF notes and
// never opens a compiler.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <vector>

#include "jit/driver/nvrtc_api.h"
#include "jit/settings.h"

namespace torchkiln::jit {

struct NvrtcCandidate {
  std::string path;  // of a file, or a bare soname that only the system's loader can resolve
  std::string why;   // "TORCHKILN_NVRTC_PATH", "already loaded", ...

  bool by_soname() const { return path.find('/') == std::string::npos; }
  // 13050 for 13.5; 0 when it cannot be told without loading. The minor is that of the builtins in
  // the same folder (libnvrtc-builtins.so.13.5): libnvrtc.so.13 itself only names its major. With
  // several builtins, the one that the real file name asks for (libnvrtc.so.12.6.85 takes 12.6),
  // else the newest.
  int version() const;
  // nvrtc-13.5-<16 digits of libnvrtc>-<8 digits of its builtins>; "" when the version is unknown.
  std::string compiler_id() const;
};

// Where to look. A test makes its own.
struct NvrtcSearch {
  std::string explicit_path;                  // a file or a folder; if given, nothing else counts
  std::vector<std::string> mapped;            // libraries of this process
  std::vector<std::string> site_directories;  // Python's site-packages
  std::string conda_prefix;
  std::vector<std::string> library_path;  // LD_LIBRARY_PATH
  bool ask_loader = true;                 // sonames, for the loader's cache
  std::vector<std::string> toolkits;      // CUDA_HOME, CUDA_PATH, /usr/local/cuda

  static NvrtcSearch of_process(const Settings& settings,
                                std::span<const std::string> site_directories);

  // Best first, each file once. Looks at file names only.
  std::vector<NvrtcCandidate> find() const;
  std::string places() const;  // for the sentence when nothing was found
};

std::vector<NvrtcCandidate> find_nvrtc(const Settings& settings,
                                       std::span<const std::string> site_directories);

// The first candidate that loads; Error(COMPILER) when none does. `places` is for its sentence; empty:
// where a process looks by default.
NvrtcApi load_first(std::span<const NvrtcCandidate> candidates, const std::string& places = "");
NvrtcApi open_nvrtc(const NvrtcSearch& search);  // the same, with its places

// The identity of a loaded NVRTC: what its candidate said before loading.
std::string compiler_id(const NvrtcApi& nvrtc);

// The builtins that belong to this libnvrtc, or "".
std::string builtins_beside(const std::string& nvrtc_path);

}  // namespace torchkiln::jit
