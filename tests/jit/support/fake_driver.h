// A CUDA driver for tests: it runs nothing, remembers everything, and fails on request.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "jit/driver/cuda_api.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit::testing {

// At most one lives at a time, because the table holds plain functions. Thread-safe; the public
// members are set before the table is used.
//
//   FakeDriver driver;                                    // one H200-like device
//   driver.devices[0].facts.major = 8;                    // or another
//   Engine engine({..., .open_driver = [&] { return driver.api(); }});
//   driver.fail("cuLaunchKernel", kCudaIllegalAddress);   // the next one; times = -1: every one
//   ... run ...
//   EXPECT_EQ(driver.launches().at(0).grid[0], 4u);
//   EXPECT_EQ(driver.count("cuLibraryLoadData"), 1);
//
// Contexts: with `needs_context` a thread gets 201 from launches on the default stream, memory,
// events and cuKernelGetFunction until it has called cuCtxSetCurrent. A launch on a stream of its
// own works without, as on the real driver.
//
// Images: cuLibraryLoadData takes a cubin or PTX text, anything else is 200. Like the real driver
// it loads lazily: cuLibraryGetKernel is what gives 209 for a cubin that no device of the list can
// run, and 500 for a kernel that the cubin does not have.
//
// Memory is host memory, so copies and fills work. Launches compute nothing but `effect(launch)`; what that throws is 700
// with its sentence.
//
// Capture: between cuStreamBeginCapture and cuStreamEndCapture, or while set_capturing(stream) is
// on, launches on that stream are recorded as captured; cuMemAlloc, cuMemFree, cuLibraryUnload,
// cuEventSynchronize and cuStreamSynchronize return 900 and invalidate the capture, as the real
// driver does in global mode. cuGraphLaunch repeats the captured launches.
//
// Time: a launch moves the clock by `cost(launch)` milliseconds; cuEventElapsedTime reads that
// clock.
class FakeDriver {
 public:
  struct Device {
    std::string name = "Fake GPU";
    torchkiln_device facts{9, 0, 132, 232448, std::int64_t{50} << 20};
  };
  struct Launch {
    std::string kernel;  // lowered name
    std::array<unsigned, 3> grid{};
    std::array<unsigned, 3> block{};
    unsigned dynamic_shared_bytes = 0;
    CudaStream stream = nullptr;
    std::string args;       // the first `args_bytes` bytes of the arguments
    bool captured = false;  // recorded, not run
    bool from_graph = false;
    const std::string* image = nullptr;  // of the kernel, while its library is loaded
  };

  FakeDriver();
  ~FakeDriver();
  FakeDriver(const FakeDriver&) = delete;
  FakeDriver& operator=(const FakeDriver&) = delete;

  static CudaApi api();  // every function is set; a test may put null into its copy

  std::vector<Device> devices{1};
  int version = 13000;
  bool needs_context = false;
  std::size_t args_bytes = 0;
  std::function<void(const Launch&)> effect;  // what a launch computes; by default nothing
  std::function<double(const Launch&)> cost = [](const Launch&) { return 0.01; };

  // What cuFuncGetAttribute tells of a kernel, before cuFuncSetAttribute.
  std::map<CudaFunctionAttribute, int> kernel_attributes = {{kFunctionMaxThreadsPerBlock, 1024}};

  // The next `times` calls of this name give `code`; -1: all of them, 0: none any more.
  void fail(const std::string& call, CudaResult code, int times = 1);
  void set_capturing(CudaStream stream, bool on);

  std::vector<std::string> calls() const;
  int count(const std::string& call) const;
  std::vector<Launch> launches() const;
  std::vector<std::string> images() const;  // given to cuLibraryLoadData
  bool capture_invalidated() const;
  std::size_t live_allocations() const;  // of cuMemAlloc and cuMemHostAlloc

 private:
  friend struct FakeCalls;

  struct Library {
    std::string image;
  };
  struct Function {
    const Library* library = nullptr;
    std::string name;
  };
  struct Graph {
    std::vector<Launch> launches;
  };
  struct Failure {
    CudaResult code = kCudaSuccess;
    int times = 0;
  };

  CudaResult enter(const char* call, bool uses_context);
  CudaResult refuse_in_capture();
  CudaResult launch(Launch launch);

  mutable std::mutex mutex_;
  std::vector<std::string> calls_;
  std::map<std::string, Failure> failures_;
  std::map<std::thread::id, CudaContext> contexts_;
  std::vector<Launch> launches_;
  std::vector<std::string> images_;
  std::map<CudaLibrary, std::unique_ptr<Library>> libraries_;
  std::vector<std::unique_ptr<Function>> functions_;
  std::map<CudaGraph, std::unique_ptr<Graph>> graphs_;
  std::map<CudaGraphExec, Graph> executables_;
  std::map<CudaStream, Graph> capturing_;
  bool invalidated_ = false;
  std::map<void*, std::unique_ptr<char[]>> memory_;
  std::map<CudaEvent, double> events_;
  std::map<std::pair<CudaFunction, CudaFunctionAttribute>, int> attributes_;
  std::string sentence_ = "the fake driver was told to fail";
  double clock_ms_ = 0;
  std::uintptr_t next_handle_ = 0x1000;
};

}  // namespace torchkiln::jit::testing
