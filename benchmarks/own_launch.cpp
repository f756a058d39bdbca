// What a launch costs a C program: the same kernel through the bare driver, in a loop. benchmarks/own_launch.py loads it.
// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cstdint>

#include "jit/driver/cuda_api.h"
#include "jit/launch/submit.h"

namespace {

using torchkiln::jit::CudaApi;
using torchkiln::jit::CudaFunction;
using torchkiln::jit::CudaStream;

struct Parameters {
  const void* x;
  const void* bias;
  const void* mask;
  void* out;
  std::int64_t n;
  float scale;
};
constexpr std::size_t kPackedBytes = offsetof(Parameters, scale) + sizeof(float);

const CudaApi& cuda() {
  static const CudaApi api = torchkiln::jit::load_cuda_api();
  return api;
}

CudaFunction function = nullptr;

// Microseconds for each call of f; -1 when one fails.
template <class F>
double microseconds(int launches, const F& f) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < launches; ++i) {
    if (f() != torchkiln::jit::kCudaSuccess) return -1;
  }
  const std::chrono::duration<double, std::micro> elapsed =
      std::chrono::steady_clock::now() - start;
  return elapsed.count() / launches;
}

}  // namespace

// Loads `kernel` of a cubin into the current context; the driver's code.
extern "C" __attribute__((visibility("default"))) int own_launch_load(const void* cubin,
                                                                      const char* kernel) {
  torchkiln::jit::CudaLibrary library = nullptr;
  torchkiln::jit::CudaKernel loaded = nullptr;
  int code = cuda().cuLibraryLoadData(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (code == 0) code = cuda().cuLibraryGetKernel(&loaded, library, kernel);
  return code == 0 ? cuda().cuKernelGetFunction(&function, loaded) : code;
}

// Through cuLaunchKernelEx, with pointers to the parameters.
extern "C" __attribute__((visibility("default"))) double own_launch_ex(Parameters p, void* stream,
                                                                       unsigned block,
                                                                       int launches) {
  return microseconds(launches, [&] {
    void* pointers[] = {&p.x, &p.bias, &p.mask, &p.out, &p.n, &p.scale};
    const torchkiln::jit::CudaLaunchConfig config = {
        {1, 1, 1}, {block, 1, 1}, 0, static_cast<CudaStream>(stream), nullptr, 0};
    return cuda().cuLaunchKernelEx(&config, function, pointers, nullptr);
  });
}

// As the engine does it: cuLaunchKernel, with the parameters in one piece.
extern "C" __attribute__((visibility("default"))) double own_launch_packed(Parameters p,
                                                                           void* stream,
                                                                           unsigned block,
                                                                           int launches) {
  const torchkiln_geometry geometry = {{1, 1, 1}, {block, 1, 1}, 0};
  return microseconds(launches, [&] {
    return torchkiln::jit::submit_kernel(cuda(), function, geometry, stream, &p, kPackedBytes);
  });
}
