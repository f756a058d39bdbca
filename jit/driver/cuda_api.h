// The table of driver functions. It is plain data that is handed to whoever needs it, so a test can
// fill one with its own functions and run the engine without a GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "jit/driver/cuda_types.h"

namespace torchkiln::jit {

// One row per function: name, the CUDA version whose form of it we call (12040 for 12.4), whether
// the driver must have it, parameters.
//
// The version matters: the driver keeps every form it ever had, and the plain symbol of a renamed
// function is the oldest one (cuMemAlloc with 32-bit sizes, cuStreamBeginCapture without a mode).
#define TORCHKILN_CUDA_FUNCTIONS(X)                                                              \
  X(cuInit, 2000, kRequired, (unsigned flags))                                                   \
  X(cuDriverGetVersion, 2020, kRequired, (int* version))                                         \
  X(cuGetErrorName, 6000, kRequired, (CudaResult result, const char** name))                     \
  X(cuGetErrorString, 6000, kRequired, (CudaResult result, const char** text))                   \
  X(cuDeviceGet, 2000, kRequired, (CudaDevice * device, int ordinal))                            \
  X(cuDeviceGetCount, 2000, kRequired, (int* count))                                             \
  X(cuDeviceGetName, 2000, kRequired, (char* name, int size, CudaDevice device))                 \
  X(cuDeviceGetAttribute, 2000, kRequired,                                                       \
    (int* value, CudaDeviceAttribute attribute, CudaDevice device))                              \
  X(cuDevicePrimaryCtxRetain, 7000, kRequired, (CudaContext * context, CudaDevice device))       \
  X(cuCtxGetCurrent, 4000, kRequired, (CudaContext * context))                                   \
  X(cuCtxSetCurrent, 4000, kRequired, (CudaContext context))                                     \
  X(cuCtxGetDevice, 2000, kRequired, (CudaDevice * device))                                      \
  X(cuLibraryLoadData, 12000, kRequired,                                                         \
    (CudaLibrary * library, const void* code, int* jit_options, void** jit_values,               \
     unsigned n_jit_options, int* library_options, void** library_values,                        \
     unsigned n_library_options))                                                                \
  X(cuLibraryUnload, 12000, kRequired, (CudaLibrary library))                                    \
  X(cuLibraryGetKernel, 12000, kRequired,                                                        \
    (CudaKernel * kernel, CudaLibrary library, const char* name))                                \
  X(cuKernelGetFunction, 12000, kRequired, (CudaFunction * function, CudaKernel kernel))         \
  X(cuKernelSetAttribute, 12000, kRequired,                                                      \
    (CudaFunctionAttribute attribute, int value, CudaKernel kernel, CudaDevice device))          \
  X(cuFuncSetAttribute, 9000, kRequired,                                                         \
    (CudaFunction function, CudaFunctionAttribute attribute, int value))                         \
  X(cuFuncGetAttribute, 2020, kRequired,                                                         \
    (int* value, CudaFunctionAttribute attribute, CudaFunction function))                        \
  X(cuFuncLoad, 12040, kOptional, (CudaFunction function))                                       \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, 6050, kRequired,                                \
    (int* blocks, CudaFunction function, int block_size, std::size_t dynamic_shared_bytes))      \
  X(cuLaunchKernel, 4000, kRequired,                                                             \
    (CudaFunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, \
     unsigned block_y, unsigned block_z, unsigned dynamic_shared_bytes, CudaStream stream,       \
     void** parameters, void** extra))                                                           \
  X(cuLaunchKernelEx, 11060, kRequired,                                                          \
    (const CudaLaunchConfig* config, CudaFunction function, void** parameters, void** extra))    \
  X(cuStreamCreate, 2000, kRequired, (CudaStream * stream, unsigned flags))                      \
  X(cuStreamDestroy, 4000, kRequired, (CudaStream stream))                                       \
  X(cuStreamIsCapturing, 10000, kRequired, (CudaStream stream, CudaCaptureStatus * status))      \
  X(cuStreamSynchronize, 2000, kRequired, (CudaStream stream))                                   \
  X(cuStreamQuery, 2000, kRequired, (CudaStream stream))                                         \
  X(cuMemcpyDtoHAsync, 3020, kRequired,                                                          \
    (void* host, CudaPointer device, std::size_t bytes, CudaStream stream))                      \
  X(cuMemcpyHtoDAsync, 3020, kRequired,                                                          \
    (CudaPointer device, const void* host, std::size_t bytes, CudaStream stream))                \
  X(cuMemcpyDtoDAsync, 3020, kRequired,                                                          \
    (CudaPointer to, CudaPointer from, std::size_t bytes, CudaStream stream))                    \
  X(cuMemsetD8Async, 3020, kRequired,                                                            \
    (CudaPointer device, unsigned char value, std::size_t bytes, CudaStream stream))             \
  X(cuPointerGetAttribute, 4000, kRequired,                                                      \
    (void* value, CudaPointerAttribute attribute, CudaPointer pointer))                          \
  X(cuMemAlloc, 3020, kRequired, (CudaPointer * device, std::size_t bytes))                      \
  X(cuMemFree, 3020, kRequired, (CudaPointer device))                                            \
  X(cuMemHostAlloc, 2020, kRequired, (void** host, std::size_t bytes, unsigned flags))           \
  X(cuMemFreeHost, 2000, kRequired, (void* host))                                                \
  X(cuMemHostGetDevicePointer, 3020, kRequired,                                                  \
    (CudaPointer * device, void* host, unsigned flags))                                          \
  X(cuEventCreate, 2000, kRequired, (CudaEvent * event, unsigned flags))                         \
  X(cuEventDestroy, 4000, kRequired, (CudaEvent event))                                          \
  X(cuEventRecord, 2000, kRequired, (CudaEvent event, CudaStream stream))                        \
  X(cuEventSynchronize, 2000, kRequired, (CudaEvent event))                                      \
  X(cuEventElapsedTime, 2000, kRequired, (float* milliseconds, CudaEvent start, CudaEvent end))  \
  X(cuStreamBeginCapture, 10010, kRequired, (CudaStream stream, CudaCaptureMode mode))           \
  X(cuStreamEndCapture, 10000, kRequired, (CudaStream stream, CudaGraph * graph))                \
  X(cuGraphInstantiateWithFlags, 11040, kRequired,                                               \
    (CudaGraphExec * executable, CudaGraph graph, unsigned long long flags))                     \
  X(cuGraphLaunch, 10000, kRequired, (CudaGraphExec executable, CudaStream stream))              \
  X(cuGraphExecDestroy, 10000, kRequired, (CudaGraphExec executable))                            \
  X(cuGraphDestroy, 10000, kRequired, (CudaGraph graph))

struct CudaApi {
#define TORCHKILN_MEMBER(name, version, need, parameters) CudaResult(*name) parameters = nullptr;
  TORCHKILN_CUDA_FUNCTIONS(TORCHKILN_MEMBER)
#undef TORCHKILN_MEMBER
};

// Opens the driver and fills the table; does not initialise CUDA. Throws Error(DRIVER).
CudaApi load_cuda_api();
CudaApi load_cuda_api_from(const std::string& library);

// The table from a function that finds `name` in the form of CUDA `version`, or returns null.
CudaApi fill_cuda_api(const std::string& library,
                      const std::function<void*(const char* name, int version)>& find);

// cuInit; throws Error(DRIVER) with a sentence about what is missing.
void initialize(const CudaApi& cuda);

// CUDA's version that the driver supports: 13000 for 13.0. Needs no initialisation.
int driver_version(const CudaApi& cuda);

// "CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal memory access was encountered".
std::string describe(const CudaApi& cuda, CudaResult result);

[[noreturn]] void throw_driver_error(const CudaApi& cuda, CudaResult result, const char* call,
                                     std::string_view context);

// `context` is what was being done, for people: a specialisation and its launch shape, or a device.
// Build it only after a failure where speed counts.
inline void check(const CudaApi& cuda, CudaResult result, const char* call,
                  std::string_view context = {}) {
  if (result != kCudaSuccess) [[unlikely]] {
    throw_driver_error(cuda, result, call, context);
  }
}

}  // namespace torchkiln::jit
