// A libcuda.so.1 without a GPU: the fake driver behind the one function that the engine asks for. It lets whole programs go
// through the launch path. Kernels of the emulated NVRTC (tests/emulated) run on the CPU; real ones compute nothing.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/emulated/emulator/cubin.h"
#include "tests/emulated/emulator/faults.h"
#include "tests/emulated/emulator/grid.h"
#include "tests/emulated/emulator/memory.h"
#include "tests/jit/support/fake_driver.h"

using torchkiln::jit::CudaApi;
using torchkiln::jit::CudaResult;
using torchkiln::jit::testing::FakeDriver;

namespace {

namespace emulator = torchkiln::emulator;

// Under the driver's lock.
void run(const FakeDriver::Launch& launch) {
  static auto& objects = *new std::map<std::string, std::shared_ptr<emulator::Object>>;
  std::shared_ptr<emulator::Object>& object = objects[launch.kernel];
  if (object == nullptr) {
    const std::string_view file = emulator::host_library_in(*launch.image);
    if (file.empty()) return;
    object = emulator::load(file);
  }
  emulator::run(*object, {launch.grid, launch.block, launch.dynamic_shared_bytes}, launch.args);
}

// FAKE_GPU=86: a device of sm_86. FAKE_GPUS=2: two of them.
FakeDriver& driver() {
  static FakeDriver& instance = *[] {
    auto* made = new FakeDriver;
    constexpr std::size_t kAllOfThem = 4096;
    made->args_bytes = kAllOfThem;
    made->effect = run;
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

// The emulated GPU: its memory, and in which order blocks, warps and lanes run (see grid.h). An odd schedule also guards
// the other end of buffers.
extern "C" __attribute__((visibility("default"))) void* fake_cuda_allocate(std::size_t bytes) {
  return emulator::allocate(bytes);
}
extern "C" __attribute__((visibility("default"))) void fake_cuda_release(void* memory) {
  emulator::release(memory);
}
extern "C" __attribute__((visibility("default"))) void fake_cuda_schedule(unsigned seed) {
  emulator::set_schedule(seed);
  emulator::guard(seed % 2 == 0 ? emulator::Guarded::kEnd : emulator::Guarded::kBegin);
}
extern "C" __attribute__((visibility("default"))) void fake_cuda_patience(long milliseconds) {
  emulator::set_patience(milliseconds);
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
