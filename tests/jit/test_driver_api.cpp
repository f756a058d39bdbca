// The driver table, its errors, device facts, and the fake driver that other tests build on.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <thread>

#include "jit/driver/cuda_api.h"
#include "jit/driver/device.h"
#include "jit/driver/dynamic_library.h"
#include "jit/error.h"
#include "tests/jit/support/fake_cubin.h"
#include "tests/jit/support/fake_driver.h"

namespace torchkiln::jit {
namespace {

using testing::FakeCubin;
using testing::FakeDriver;

template <class F>
std::string error_of(torchkiln_error_kind kind, F&& f) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind);
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(CudaApi, MissingDriverIsOneSentence) {
  EXPECT_EQ(
      error_of(TORCHKILN_ERROR_DRIVER, [] { load_cuda_api_from("libcuda-absent.so.1"); }),
      "libcuda-absent.so.1 could not be loaded (no such file). GPU operators are unavailable; "
      "the CPU versions work. Install the NVIDIA driver.");
}

TEST(CudaApi, OldDriverIsNamed) {
  EXPECT_EQ(error_of(TORCHKILN_ERROR_DRIVER, [] { load_cuda_api_from("libm.so.6"); }),
            "libm.so.6: the driver must support CUDA 12.0 or newer; got one without "
            "cuGetProcAddress_v2. Update the NVIDIA driver.");
}

int dummy_function = 0;

TEST(CudaApi, MissingRequiredFunctionIsNamed) {
  const auto without_launch = [](const char* name, int) -> void* {
    return std::string(name) == "cuLaunchKernelEx" ? nullptr : &dummy_function;
  };
  EXPECT_EQ(
      error_of(TORCHKILN_ERROR_DRIVER, [&] { fill_cuda_api("libcuda.so.1", without_launch); }),
      "libcuda.so.1: the driver must have cuLaunchKernelEx of CUDA 11.6; got a driver without "
      "it. Update the NVIDIA driver.");
}

TEST(CudaApi, OptionalFunctionMayBeMissing) {
  const CudaApi cuda = fill_cuda_api("libcuda.so.1", [](const char* name, int) -> void* {
    return std::string(name) == "cuFuncLoad" ? nullptr : &dummy_function;
  });
  EXPECT_EQ(cuda.cuFuncLoad, nullptr);
  EXPECT_NE(cuda.cuInit, nullptr);
}

TEST(CudaApi, AsksForTheFormsThatWereRenamed) {
  std::map<std::string, int> asked;
  fill_cuda_api("libcuda.so.1", [&](const char* name, int version) -> void* {
    asked[name] = version;
    return &dummy_function;
  });
  // The first form of each has other parameters.
  EXPECT_EQ(asked["cuMemAlloc"], 3020);
  EXPECT_EQ(asked["cuMemcpyDtoHAsync"], 3020);
  EXPECT_EQ(asked["cuMemHostGetDevicePointer"], 3020);
  EXPECT_EQ(asked["cuEventDestroy"], 4000);
  EXPECT_EQ(asked["cuStreamBeginCapture"], 10010);
  for (const auto& [name, version] : asked) {
    EXPECT_EQ(version % 10, 0) << name;
    EXPECT_EQ(name.find("_v2"), std::string::npos) << name;
  }
}

TEST(CudaApi, FailedCallTellsCallCodeAndContext) {
  const FakeDriver driver;  // has the sentence
  const CudaApi cuda = FakeDriver::api();
  EXPECT_NO_THROW(check(cuda, kCudaSuccess, "cuLaunchKernel", "x"));
  try {
    check(cuda, kCudaIllegalAddress, "cuLaunchKernel", "box_iou.forward<float> with grid 4x1x1");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "box_iou.forward<float> with grid 4x1x1: cuLaunchKernel must succeed; got "
                 "CUDA_ERROR_ILLEGAL_ADDRESS (700), the fake driver was told to fail. The process "
                 "must be restarted: its CUDA context is unusable now.");
    EXPECT_EQ(error.details().at("code"), 700);
    EXPECT_EQ(error.details().at("call"), "cuLaunchKernel");
  }
}

TEST(CudaApi, UnknownCodeStillHasItsNumber) {
  const CudaApi silent;  // a driver that knows no name
  EXPECT_EQ(describe(silent, 12345), "CUDA error (12345)");
}

TEST(Device, FactsComeFromTheDriver) {
  FakeDriver driver;
  driver.devices = {{"First GPU", {8, 6, 84, 101376, 6 << 20}}, {}};
  const CudaApi cuda = driver.api();
  const torchkiln_device facts = query_device(cuda, 0);
  EXPECT_EQ(facts.major, 8);
  EXPECT_EQ(facts.minor, 6);
  EXPECT_EQ(facts.multiprocessors, 84);
  EXPECT_EQ(facts.shared_bytes_per_block, 101376);
  EXPECT_EQ(facts.l2_bytes, 6 << 20);
  EXPECT_EQ(device_name(cuda, 0), "First GPU");
  EXPECT_EQ(device_count(cuda), 2);
  EXPECT_EQ(error_of(TORCHKILN_ERROR_VALUE, [&] { query_device(cuda, 2); }),
            "device: the index must be below the number of visible GPUs, 2; got 2. "
            "CUDA_VISIBLE_DEVICES decides which GPUs are visible.");
}

TEST(DynamicLibrary, KnowsItsPathAndWhatIsMapped) {
  std::string why;
  const auto library = DynamicLibrary::open("libm.so.6", why);
  ASSERT_TRUE(library) << why;
  EXPECT_NE(library->symbol("cos"), nullptr);
  EXPECT_EQ(library->symbol("no_such_symbol"), nullptr);
  EXPECT_NE(library->path().find("libm"), std::string::npos);
  EXPECT_FALSE(DynamicLibrary::open("libabsent.so.0", why));
  EXPECT_NE(why.find("libabsent.so.0"), std::string::npos);
  bool mapped = false;
  for (const std::string& path : mapped_libraries()) mapped |= path.find("libm.so") != path.npos;
  EXPECT_TRUE(mapped);
}

TEST(FakeDriver, FillsTheWholeTable) {
  const CudaApi cuda = FakeDriver::api();
#define TORCHKILN_EXPECT(name, version, need, parameters) EXPECT_NE(cuda.name, nullptr) << #name;
  TORCHKILN_CUDA_FUNCTIONS(TORCHKILN_EXPECT)
#undef TORCHKILN_EXPECT
}

CudaFunction load(const CudaApi& cuda, const std::string& image, const std::string& kernel) {
  CudaLibrary library{};
  CudaKernel handle{};
  CudaFunction function{};
  EXPECT_EQ(
      cuda.cuLibraryLoadData(&library, image.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0), 0);
  EXPECT_EQ(cuda.cuLibraryGetKernel(&handle, library, kernel.c_str()), 0);
  EXPECT_EQ(cuda.cuKernelGetFunction(&function, handle), 0);
  return function;
}

TEST(FakeDriver, LoadsAndLaunches) {
  FakeDriver driver;
  driver.args_bytes = 4;
  const CudaApi cuda = driver.api();
  const FakeCubin cubin;
  const CudaFunction function = load(cuda, cubin.bytes(), cubin.kernel);
  int argument = 7;
  void* arguments[] = {&argument};
  EXPECT_EQ(cuda.cuLaunchKernel(function, 4, 1, 1, 256, 1, 1, 64, nullptr, arguments, nullptr), 0);
  ASSERT_EQ(driver.launches().size(), 1U);
  EXPECT_EQ(driver.launches()[0].kernel, cubin.kernel);
  EXPECT_EQ(driver.launches()[0].grid[0], 4U);
  EXPECT_EQ(driver.launches()[0].args, std::string("\x07\0\0\0", 4));
  EXPECT_EQ(driver.images().at(0), cubin.bytes());
}

TEST(FakeDriver, RefusesImagesAsTheDriverDoes) {
  FakeDriver driver;
  const CudaApi cuda = driver.api();
  CudaLibrary library{};
  const auto result = [&](const std::string& image) {
    return cuda.cuLibraryLoadData(&library, image.c_str(), nullptr, nullptr, 0, nullptr, nullptr,
                                  0);
  };
  CudaKernel kernel{};
  const FakeCubin ampere{.architecture = 80};
  EXPECT_EQ(result(ampere.bytes()), kCudaSuccess) << "the driver looks later";
  EXPECT_EQ(cuda.cuLibraryGetKernel(&kernel, library, ampere.kernel.c_str()), kCudaNoBinaryForGpu);
  EXPECT_EQ(result("garbage"), kCudaInvalidImage);
  EXPECT_EQ(result(".version 8.0\n.target sm_80\n"), kCudaSuccess);
  EXPECT_EQ(result(FakeCubin{}.bytes()), kCudaSuccess);
  EXPECT_EQ(cuda.cuLibraryGetKernel(&kernel, library, "absent"), kCudaNotFound);
}

TEST(FakeDriver, FailsOnRequest) {
  FakeDriver driver;
  const CudaApi cuda = driver.api();
  driver.fail("cuInit", kCudaNoDevice);
  EXPECT_THROW(initialize(cuda), Error);
  EXPECT_NO_THROW(initialize(cuda));
  driver.fail("cuInit", kCudaNoDevice, -1);
  EXPECT_THROW(initialize(cuda), Error);
  EXPECT_THROW(initialize(cuda), Error);
  EXPECT_EQ(driver.count("cuInit"), 4);
}

TEST(FakeDriver, ThreadWithoutContextGets201) {
  FakeDriver driver;
  driver.needs_context = true;
  const CudaApi cuda = driver.api();
  CudaContext context{};
  ASSERT_EQ(cuda.cuDevicePrimaryCtxRetain(&context, 0), 0);
  ASSERT_EQ(cuda.cuCtxSetCurrent(context), 0);
  EXPECT_EQ(cuda.cuStreamSynchronize(nullptr), kCudaSuccess);
  std::thread([&] {
    EXPECT_EQ(cuda.cuStreamSynchronize(nullptr), kCudaInvalidContext);
    EXPECT_EQ(cuda.cuCtxSetCurrent(context), 0);
    EXPECT_EQ(cuda.cuStreamSynchronize(nullptr), kCudaSuccess);
  }).join();
}

TEST(FakeDriver, CaptureDiesAsOnTheRealDriver) {
  FakeDriver driver;
  const CudaApi cuda = driver.api();
  CudaStream stream{};
  ASSERT_EQ(cuda.cuStreamCreate(&stream, 0), 0);
  driver.set_capturing(stream, true);
  CudaCaptureStatus status = kCaptureNone;
  EXPECT_EQ(cuda.cuStreamIsCapturing(stream, &status), 0);
  EXPECT_EQ(status, kCaptureActive);
  CudaPointer memory = 0;
  EXPECT_EQ(cuda.cuMemAlloc(&memory, 16), kCudaCaptureUnsupported);
  EXPECT_TRUE(driver.capture_invalidated());
  EXPECT_EQ(cuda.cuStreamIsCapturing(stream, &status), 0);
  EXPECT_EQ(status, kCaptureInvalidated);
}

TEST(FakeDriver, GraphsRepeatLaunchesOnAClock) {
  FakeDriver driver;
  driver.cost = [](const FakeDriver::Launch& launch) { return 0.5 * launch.grid[0]; };
  const CudaApi cuda = driver.api();
  const FakeCubin cubin;
  const CudaFunction function = load(cuda, cubin.bytes(), cubin.kernel);
  CudaStream stream{};
  ASSERT_EQ(cuda.cuStreamCreate(&stream, 0), 0);
  int argument = 0;
  void* arguments[] = {&argument};
  ASSERT_EQ(cuda.cuStreamBeginCapture(stream, kCaptureRelaxed), 0);
  ASSERT_EQ(cuda.cuLaunchKernel(function, 3, 1, 1, 1, 1, 1, 0, stream, arguments, nullptr), 0);
  CudaGraph graph{};
  CudaGraphExec executable{};
  ASSERT_EQ(cuda.cuStreamEndCapture(stream, &graph), 0);
  ASSERT_EQ(cuda.cuGraphInstantiateWithFlags(&executable, graph, 0), 0);
  CudaEvent start{}, end{};
  ASSERT_EQ(cuda.cuEventCreate(&start, 0), 0);
  ASSERT_EQ(cuda.cuEventCreate(&end, 0), 0);
  ASSERT_EQ(cuda.cuEventRecord(start, stream), 0);
  for (int i = 0; i < 4; ++i) ASSERT_EQ(cuda.cuGraphLaunch(executable, stream), 0);
  ASSERT_EQ(cuda.cuEventRecord(end, stream), 0);
  float milliseconds = 0;
  ASSERT_EQ(cuda.cuEventElapsedTime(&milliseconds, start, end), 0);
  EXPECT_FLOAT_EQ(milliseconds, 6.0F);
  EXPECT_EQ(driver.launches().size(), 5U);
  EXPECT_TRUE(driver.launches()[0].captured);
  EXPECT_TRUE(driver.launches()[4].from_graph);
}

TEST(FakeDriver, MemoryHoldsBytes) {
  FakeDriver driver;
  const CudaApi cuda = driver.api();
  CudaPointer a = 0, b = 0;
  ASSERT_EQ(cuda.cuMemAlloc(&a, 4), 0);
  ASSERT_EQ(cuda.cuMemAlloc(&b, 4), 0);
  ASSERT_EQ(cuda.cuMemsetD8Async(a, 0x2a, 4, nullptr), 0);
  ASSERT_EQ(cuda.cuMemcpyDtoDAsync(b, a, 4, nullptr), 0);
  std::uint32_t value = 0;
  ASSERT_EQ(cuda.cuMemcpyDtoHAsync(&value, b, 4, nullptr), 0);
  EXPECT_EQ(value, 0x2a2a2a2aU);
  EXPECT_EQ(driver.live_allocations(), 2U);
  EXPECT_EQ(cuda.cuMemFree(a), 0);
  EXPECT_EQ(cuda.cuMemFree(a), kCudaInvalidValue);
  EXPECT_EQ(driver.live_allocations(), 1U);
}

}  // namespace
}  // namespace torchkiln::jit
