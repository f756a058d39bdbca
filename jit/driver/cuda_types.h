// The part of the CUDA driver interface that we use, in our own declarations: handles, enumerations
// and structures whose layout is fixed by the driver's ABI.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace torchkiln::jit {

using CudaDevice = int;
using CudaPointer = std::uint64_t;  // of device memory
using CudaContext = struct CudaContextHandle*;
using CudaLibrary = struct CudaLibraryHandle*;
using CudaKernel = struct CudaKernelHandle*;
using CudaFunction = struct CudaFunctionHandle*;
using CudaStream = struct CudaStreamHandle*;
using CudaEvent = struct CudaEventHandle*;
using CudaGraph = struct CudaGraphHandle*;
using CudaGraphExec = struct CudaGraphExecHandle*;

// Plain integers, here and below: a driver may be newer than these lists.
using CudaResult = int;
inline constexpr CudaResult kCudaSuccess = 0;
inline constexpr CudaResult kCudaInvalidValue = 1;
inline constexpr CudaResult kCudaOutOfMemory = 2;
inline constexpr CudaResult kCudaNotInitialized = 3;
inline constexpr CudaResult kCudaDeinitialized = 4;
inline constexpr CudaResult kCudaNoDevice = 100;
inline constexpr CudaResult kCudaInvalidDevice = 101;
inline constexpr CudaResult kCudaInvalidImage = 200;
inline constexpr CudaResult kCudaInvalidContext = 201;
inline constexpr CudaResult kCudaNoBinaryForGpu = 209;
inline constexpr CudaResult kCudaInvalidPtx = 218;
inline constexpr CudaResult kCudaUnsupportedPtxVersion = 222;
inline constexpr CudaResult kCudaInvalidHandle = 400;
inline constexpr CudaResult kCudaNotFound = 500;
inline constexpr CudaResult kCudaNotReady = 600;
inline constexpr CudaResult kCudaIllegalAddress = 700;
inline constexpr CudaResult kCudaLaunchOutOfResources = 701;
inline constexpr CudaResult kCudaCaptureUnsupported = 900;
inline constexpr CudaResult kCudaCaptureInvalidated = 901;

using CudaDeviceAttribute = int;
inline constexpr CudaDeviceAttribute kDeviceMaxThreadsPerBlock = 1;
inline constexpr CudaDeviceAttribute kDeviceSharedBytesPerBlock = 8;
inline constexpr CudaDeviceAttribute kDeviceMultiprocessors = 16;
inline constexpr CudaDeviceAttribute kDeviceIntegrated = 18;
inline constexpr CudaDeviceAttribute kDeviceComputeMode = 20;
inline constexpr CudaDeviceAttribute kDeviceEcc = 32;
inline constexpr CudaDeviceAttribute kDeviceMemoryKilohertz = 36;
inline constexpr CudaDeviceAttribute kDeviceMemoryBusBits = 37;
inline constexpr CudaDeviceAttribute kDeviceL2Bytes = 38;
inline constexpr CudaDeviceAttribute kDeviceMajor = 75;
inline constexpr CudaDeviceAttribute kDeviceMinor = 76;
inline constexpr CudaDeviceAttribute kDeviceSharedBytesPerMultiprocessor = 81;
inline constexpr CudaDeviceAttribute kDeviceSharedBytesPerBlockOptIn = 97;

using CudaFunctionAttribute = int;
inline constexpr CudaFunctionAttribute kFunctionMaxThreadsPerBlock = 0;
inline constexpr CudaFunctionAttribute kFunctionSharedBytes = 1;  // static
inline constexpr CudaFunctionAttribute kFunctionMaxDynamicSharedBytes = 8;

using CudaPointerAttribute = int;
inline constexpr CudaPointerAttribute kPointerMemoryType = 2;
inline constexpr unsigned kMemoryOfDevice = 2;
// Names in the last argument of a launch.
inline void* const kLaunchParamEnd = nullptr;
inline void* const kLaunchParamBuffer = reinterpret_cast<void*>(std::uintptr_t{1});
inline void* const kLaunchParamBufferSize = reinterpret_cast<void*>(std::uintptr_t{2});

using CudaCaptureStatus = int;
inline constexpr CudaCaptureStatus kCaptureNone = 0;
inline constexpr CudaCaptureStatus kCaptureActive = 1;
inline constexpr CudaCaptureStatus kCaptureInvalidated = 2;

using CudaCaptureMode = int;
inline constexpr CudaCaptureMode kCaptureGlobal = 0;
inline constexpr CudaCaptureMode kCaptureThreadLocal = 1;
inline constexpr CudaCaptureMode kCaptureRelaxed = 2;

inline constexpr unsigned kCudaStreamNonBlocking = 1;
inline constexpr unsigned kCudaEventDefault = 0;
inline constexpr unsigned kCudaEventDisableTiming = 2;
inline constexpr unsigned kCudaHostAllocPortable = 1;
inline constexpr unsigned kCudaHostAllocMapped = 2;

struct CudaLaunchAttribute {
  std::uint32_t id;
  std::uint32_t padding;
  std::array<std::uint64_t, 8> value;
};
static_assert(sizeof(CudaLaunchAttribute) == 72);

struct CudaLaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned dynamic_shared_bytes;
  CudaStream stream;
  CudaLaunchAttribute* attributes;
  unsigned n_attributes;
};
static_assert(offsetof(CudaLaunchConfig, stream) == 32 && sizeof(CudaLaunchConfig) == 56);

}  // namespace torchkiln::jit
