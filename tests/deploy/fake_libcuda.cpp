// A libcuda.so.1 that runs nothing: the fake driver behind the one function that the engine asks for. It lets whole
// programs go through the launch path on a machine without a GPU.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tests/jit/support/fake_driver.h"

using torchkiln::jit::CudaApi;
using torchkiln::jit::CudaResult;
using torchkiln::jit::testing::FakeDriver;

extern "C" __attribute__((visibility("default"))) CudaResult cuGetProcAddress_v2(const char* name,
                                                                                 void** function,
                                                                                 int, std::uint64_t,
                                                                                 int*) {
  // FAKE_GPU=86: a device of sm_86.
  static FakeDriver& driver = *[] {
    auto* made = new FakeDriver;
    if (const char* number = std::getenv("FAKE_GPU")) {
      made->devices[0].facts.major = std::atoi(number) / 10;
      made->devices[0].facts.minor = std::atoi(number) % 10;
    }
    // FAKE_BEST_BLOCK=128: blocks of that size take half the time of others.
    if (const char* number = std::getenv("FAKE_BEST_BLOCK")) {
      made->cost = [best = std::strtoul(number, nullptr, 10)](const FakeDriver::Launch& launch) {
        return launch.block[0] == best ? 0.005 : 0.01;
      };
    }
    return made;
  }();
  static_cast<void>(driver);
  static const CudaApi api = FakeDriver::api();
#define TORCHKILN_FIND(row, version, need, parameters) \
  if (std::strcmp(name, #row) == 0) *function = reinterpret_cast<void*>(api.row);
  TORCHKILN_CUDA_FUNCTIONS(TORCHKILN_FIND)
#undef TORCHKILN_FIND
  return torchkiln::jit::kCudaSuccess;
}
