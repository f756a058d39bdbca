// The table of NVRTC functions, and what is known about the library that they come from.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace torchkiln::jit {

using NvrtcProgram = struct NvrtcProgramHandle*;

using NvrtcResult = int;
inline constexpr NvrtcResult kNvrtcSuccess = 0;
inline constexpr NvrtcResult kNvrtcInvalidOption = 5;
inline constexpr NvrtcResult kNvrtcCompilation = 6;
inline constexpr NvrtcResult kNvrtcBuiltins = 7;  // libnvrtc-builtins is missing or does not fit

// One row per function: name, result, parameters. All exist in every NVRTC from 12.0 on.
#define TORCHKILN_NVRTC_FUNCTIONS(X)                                                     \
  X(nvrtcVersion, NvrtcResult, (int* major, int* minor))                                 \
  X(nvrtcGetErrorString, const char*, (NvrtcResult result))                              \
  X(nvrtcGetNumSupportedArchs, NvrtcResult, (int* count))                                \
  X(nvrtcGetSupportedArchs, NvrtcResult, (int* architectures))                           \
  X(nvrtcCreateProgram, NvrtcResult,                                                     \
    (NvrtcProgram * program, const char* text, const char* name, int n_headers,          \
     const char* const* headers, const char* const* header_names))                       \
  X(nvrtcDestroyProgram, NvrtcResult, (NvrtcProgram * program))                          \
  X(nvrtcCompileProgram, NvrtcResult,                                                    \
    (NvrtcProgram program, int n_options, const char* const* options))                   \
  X(nvrtcAddNameExpression, NvrtcResult, (NvrtcProgram program, const char* expression)) \
  X(nvrtcGetLoweredName, NvrtcResult,                                                    \
    (NvrtcProgram program, const char* expression, const char** lowered))                \
  X(nvrtcGetCUBINSize, NvrtcResult, (NvrtcProgram program, std::size_t* bytes))          \
  X(nvrtcGetCUBIN, NvrtcResult, (NvrtcProgram program, char* cubin))                     \
  X(nvrtcGetPTXSize, NvrtcResult, (NvrtcProgram program, std::size_t* bytes))            \
  X(nvrtcGetPTX, NvrtcResult, (NvrtcProgram program, char* ptx))                         \
  X(nvrtcGetProgramLogSize, NvrtcResult, (NvrtcProgram program, std::size_t* bytes))     \
  X(nvrtcGetProgramLog, NvrtcResult, (NvrtcProgram program, char* log))

struct NvrtcApi {
#define TORCHKILN_MEMBER(name, result, parameters) result(*name) parameters = nullptr;
  TORCHKILN_NVRTC_FUNCTIONS(TORCHKILN_MEMBER)
#undef TORCHKILN_MEMBER

  std::string path;                // of the file, links resolved
  int version = 0;                 // 13050 for 13.5, as the driver counts
  std::vector<int> architectures;  // 75, 80, ...: real and virtual ones, in rising order
};

// Opens libnvrtc by path, or by soname when `path` has no slash, and its builtins first. Throws
// Error(COMPILER).
NvrtcApi load_nvrtc(const std::string& path);

std::string version_text(int version);  // "13.5"

}  // namespace torchkiln::jit
