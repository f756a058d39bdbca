// cuDeviceGetAttribute and friends.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/device.h"

#include <array>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

CudaDevice device_handle(const CudaApi& cuda, int ordinal) {
  const int count = device_count(cuda);
  if (ordinal < 0 || ordinal >= count) {
    throw Error(TORCHKILN_ERROR_VALUE,
                "device: the index must be below the number of visible GPUs, " +
                    std::to_string(count) + "; got " + std::to_string(ordinal) +
                    ". CUDA_VISIBLE_DEVICES decides which GPUs are visible.",
                {}, "device");
  }
  CudaDevice device = 0;
  check(cuda, cuda.cuDeviceGet(&device, ordinal), "cuDeviceGet",
        "device " + std::to_string(ordinal));
  return device;
}

int attribute(const CudaApi& cuda, CudaDevice device, CudaDeviceAttribute which) {
  int value = 0;
  check(cuda, cuda.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute",
        "device attribute " + std::to_string(which));
  return value;
}

}  // namespace

int device_count(const CudaApi& cuda) {
  int count = 0;
  check(cuda, cuda.cuDeviceGetCount(&count), "cuDeviceGetCount", "CUDA driver");
  return count;
}

torchkiln_device query_device(const CudaApi& cuda, int ordinal) {
  const CudaDevice device = device_handle(cuda, ordinal);
  torchkiln_device facts{};
  facts.major = attribute(cuda, device, kDeviceMajor);
  facts.minor = attribute(cuda, device, kDeviceMinor);
  facts.multiprocessors = attribute(cuda, device, kDeviceMultiprocessors);
  facts.shared_bytes_per_block = attribute(cuda, device, kDeviceSharedBytesPerBlockOptIn);
  facts.l2_bytes = attribute(cuda, device, kDeviceL2Bytes);
  return facts;
}

std::string device_name(const CudaApi& cuda, int ordinal) {
  std::array<char, 256> name{};
  // One byte is kept back: nothing promises that a cut name ends with a zero.
  check(cuda,
        cuda.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1,
                             device_handle(cuda, ordinal)),
        "cuDeviceGetName", "device " + std::to_string(ordinal));
  return name.data();
}

}  // namespace torchkiln::jit
