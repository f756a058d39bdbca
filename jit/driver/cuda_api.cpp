// Fills the table of driver functions and turns the driver's codes into sentences.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/cuda_api.h"

#include "jit/driver/dynamic_library.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

enum class Need { kRequired, kOptional };

// The form of CUDA 12.0; the driver fills the last parameter with the reason of a failure.
using GetProcAddress = CudaResult (*)(const char* name, void** function, int version,
                                      std::uint64_t flags, int* reason);
constexpr std::uint64_t kDefaultStreamSemantics = 0;

GetProcAddress resolver(const DynamicLibrary& driver, const std::string& library) {
  void* symbol = driver.symbol("cuGetProcAddress_v2");
  if (symbol == nullptr) {
    throw Error(TORCHKILN_ERROR_DRIVER,
                library +
                    ": the driver must support CUDA 12.0 or newer; got one without "
                    "cuGetProcAddress_v2. Update the NVIDIA driver.");
  }
  return reinterpret_cast<GetProcAddress>(symbol);
}

void require(const std::string& library, const char* name, int version, const void* function,
             Need need) {
  if (function != nullptr || need == Need::kOptional) return;
  throw Error(TORCHKILN_ERROR_DRIVER, library + ": the driver must have " + name + " of CUDA " +
                                          std::to_string(version / 1000) + "." +
                                          std::to_string(version % 1000 / 10) +
                                          "; got a driver without it. Update the NVIDIA driver.");
}

// What can be done about a code, where something can.
const char* way_out(CudaResult result) {
  switch (result) {
    case kCudaOutOfMemory:
      return " Free GPU memory or make the input smaller.";
    case kCudaNoDevice:
      return " Check nvidia-smi and CUDA_VISIBLE_DEVICES.";
    case kCudaInvalidContext:
      return " This thread has no CUDA context.";
    case kCudaNotInitialized:
      return " After a fork CUDA cannot be used in the child: start workers by spawn.";
    case kCudaUnsupportedPtxVersion:
      return " The PTX is newer than the driver: update the driver or use an older NVRTC.";
    case kCudaIllegalAddress:
      return " The process must be restarted: its CUDA context is unusable now.";
    default:
      return "";
  }
}

}  // namespace

CudaApi load_cuda_api() { return load_cuda_api_from("libcuda.so.1"); }

CudaApi load_cuda_api_from(const std::string& library) {
  std::string why;
  const auto driver = DynamicLibrary::open(library, why);
  if (!driver) {
    if (why.find("No such file") != std::string::npos) why = "no such file";
    throw Error(TORCHKILN_ERROR_DRIVER,
                library + " could not be loaded (" + why +
                    "). GPU operators are unavailable; the CPU versions work. Install the NVIDIA "
                    "driver.");
  }
  const GetProcAddress get = resolver(*driver, library);
  return fill_cuda_api(library, [get](const char* name, int version) -> void* {
    void* function = nullptr;
    int reason = 0;
    const CudaResult result = get(name, &function, version, kDefaultStreamSemantics, &reason);
    return result == kCudaSuccess ? function : nullptr;
  });
}

CudaApi fill_cuda_api(const std::string& library,
                      const std::function<void*(const char* name, int version)>& find) {
  CudaApi cuda;
#define TORCHKILN_LOAD(name, version, need, parameters)                    \
  cuda.name = reinterpret_cast<decltype(cuda.name)>(find(#name, version)); \
  require(library, #name, version, reinterpret_cast<const void*>(cuda.name), Need::need);
  TORCHKILN_CUDA_FUNCTIONS(TORCHKILN_LOAD)
#undef TORCHKILN_LOAD
  return cuda;
}

void initialize(const CudaApi& cuda) { check(cuda, cuda.cuInit(0), "cuInit"); }

int driver_version(const CudaApi& cuda) {
  int version = 0;
  check(cuda, cuda.cuDriverGetVersion(&version), "cuDriverGetVersion");
  return version;
}

std::string describe(const CudaApi& cuda, CudaResult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  // Both leave null behind for a code that is newer than the driver.
  if (cuda.cuGetErrorName != nullptr) cuda.cuGetErrorName(result, &name);
  if (cuda.cuGetErrorString != nullptr) cuda.cuGetErrorString(result, &text);
  std::string words = name == nullptr ? "CUDA error" : name;
  words += " (" + std::to_string(result) + ")";
  if (text != nullptr) words += std::string(", ") + text;
  return words;
}

void throw_driver_error(const CudaApi& cuda, CudaResult result, const char* call,
                        std::string_view context) {
  const std::string words = describe(cuda, result);
  throw Error(TORCHKILN_ERROR_DRIVER,
              std::string(context.empty() ? "CUDA driver" : context) + ": " + call +
                  " must succeed; got " + words + "." + way_out(result),
              {{"call", call}, {"code", result}, {"driver", words}});
}

}  // namespace torchkiln::jit
