// Loads NVRTC.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/nvrtc_api.h"

#include <algorithm>

#include "jit/driver/dynamic_library.h"
#include "jit/driver/nvrtc_finder.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr int kOldestVersion = 12000;

[[noreturn]] void refuse(const std::string& path, const std::string& rule) {
  throw Error(TORCHKILN_ERROR_COMPILER, path + ": " + rule);
}

// libnvrtc opens its builtins by name during the first compile. The 13.0 package has no RUNPATH to
// find them; once they are loaded by path, the name is found in the process.
void preload_builtins(const std::string& path) {
  const std::string builtins = builtins_beside(path);
  std::string ignored;  // a compile will say it, with NVRTC's own words
  if (!builtins.empty()) DynamicLibrary::open(builtins, ignored);
}

void fill(NvrtcApi& nvrtc, const DynamicLibrary& library) {
#define TORCHKILN_LOAD(name, result, parameters)                                   \
  nvrtc.name = reinterpret_cast<decltype(nvrtc.name)>(library.symbol(#name));      \
  if (nvrtc.name == nullptr) {                                                     \
    refuse(nvrtc.path, "NVRTC must be of CUDA 12 or newer; got one without " #name \
                       ". Run pip install torchkiln[compiler].");                  \
  }
  TORCHKILN_NVRTC_FUNCTIONS(TORCHKILN_LOAD)
#undef TORCHKILN_LOAD
}

int version_of(const NvrtcApi& nvrtc) {
  int major = 0;
  int minor = 0;
  if (nvrtc.nvrtcVersion(&major, &minor) != kNvrtcSuccess) {
    refuse(nvrtc.path, "NVRTC must know its version; got an error. Reinstall it.");
  }
  const int version = major * 1000 + minor * 10;
  if (version < kOldestVersion) {
    refuse(nvrtc.path, "NVRTC must be of CUDA 12 or newer; got " + version_text(version) +
                           ". Run pip install torchkiln[compiler].");
  }
  return version;
}

std::vector<int> architectures_of(const NvrtcApi& nvrtc) {
  int count = 0;
  if (nvrtc.nvrtcGetNumSupportedArchs(&count) != kNvrtcSuccess || count < 0) return {};
  std::vector<int> list(static_cast<std::size_t>(count));
  if (nvrtc.nvrtcGetSupportedArchs(list.data()) != kNvrtcSuccess) return {};
  std::sort(list.begin(), list.end());
  return list;
}

}  // namespace

NvrtcApi load_nvrtc(const std::string& path) {
  if (path.find('/') != std::string::npos) preload_builtins(path);
  std::string why;
  const auto library = DynamicLibrary::open(path, why);
  if (!library) refuse(path, "the library could not be loaded (" + why + ")");
  NvrtcApi nvrtc;
  nvrtc.path = library->path();
  // Found by soname: only now its folder is known.
  preload_builtins(nvrtc.path);
  fill(nvrtc, *library);
  nvrtc.version = version_of(nvrtc);
  nvrtc.architectures = architectures_of(nvrtc);
  return nvrtc;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace torchkiln::jit
