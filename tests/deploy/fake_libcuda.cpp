// A libcuda.so.1 that runs nothing: the fake driver behind the one function that the engine asks for. It lets whole
// programs go through the launch path on a machine without a GPU.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/jit/support/fake_driver.h"

using torchkiln::jit::CudaApi;
using torchkiln::jit::CudaResult;
using torchkiln::jit::testing::FakeDriver;

namespace {

// FAKE_GPU=86: a device of sm_86. FAKE_GPUS=2: two of them.
FakeDriver& driver() {
  static FakeDriver& instance = *[] {
    auto* made = new FakeDriver;
    constexpr std::size_t kAllOfThem = 4096;
    made->args_bytes = kAllOfThem;
    if (const char* number = std::getenv("FAKE_GPU")) {
      made->devices[0].facts.major = std::atoi(number) / 10;
      made->devices[0].facts.minor = std::atoi(number) % 10;
    }
    if (const char* count = std::getenv("FAKE_GPUS"))
      made->devices.resize(static_cast<std::size_t>(std::atoi(count)), made->devices[0]);
    // FAKE_BEST_BLOCK=128: blocks of that size take half the time of others.
    if (const char* number = std::getenv("FAKE_BEST_BLOCK")) {
      made->cost = [best = std::strtoul(number, nullptr, 10)](const FakeDriver::Launch& launch) {
        return launch.block[0] == best ? 0.005 : 0.01;
      };
    }
    return made;
  }();
  return instance;
}

std::string hex(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) {
    text += "0123456789abcdef"[static_cast<unsigned char>(byte) >> 4];
    text += "0123456789abcdef"[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

}  // namespace

// For tests in Python: every launch so far, as JSON.
extern "C" __attribute__((visibility("default"))) const char* fake_cuda_launches() {
  static std::string text;
  nlohmann::json list = nlohmann::json::array();
  for (const FakeDriver::Launch& l : driver().launches()) {
    list.push_back({{"kernel", l.kernel},
                    {"grid", l.grid},
                    {"block", l.block},
                    {"shared", l.dynamic_shared_bytes},
                    {"stream", reinterpret_cast<std::uintptr_t>(l.stream)},
                    {"args", hex(l.args)}});
  }
  text = list.dump();
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) CudaResult cuGetProcAddress_v2(const char* name,
                                                                                 void** function,
                                                                                 int, std::uint64_t,
                                                                                 int*) {
  driver();
  static const CudaApi api = FakeDriver::api();
#define TORCHKILN_FIND(row, version, need, parameters) \
  if (std::strcmp(name, #row) == 0) *function = reinterpret_cast<void*>(api.row);
  TORCHKILN_CUDA_FUNCTIONS(TORCHKILN_FIND)
#undef TORCHKILN_FIND
  return torchkiln::jit::kCudaSuccess;
}
