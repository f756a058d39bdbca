// The CUDA driver as the engine uses it: opened on first need, facts of each device read once, torch's primary context
// attached to threads that have none.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "jit/driver/cuda_api.h"
#include "jit/driver/device.h"
#include "jit/error.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

// Thread-safe; after the first call everything is read without a lock.
class Driver {
 public:
  explicit Driver(std::function<CudaApi()> open) : open_(std::move(open)) {}

  const CudaApi& api();  // throws Error(DRIVER), with the same sentence every time
  const torchkiln_device& device(int ordinal);
  int version();
  // Makes the device's primary context (torch's) current when this thread has no context.
  void attach(int ordinal);
  // Makes the device's primary context current, whatever is; returns what was, or null when nothing has changed.
  CudaContext enter(int ordinal);
  void leave(CudaContext before);
  bool is_capturing(void* stream);

 private:
  static constexpr std::size_t kMaxDevices = 64;

  std::function<CudaApi()> open_;
  std::mutex mutex_;
  std::unique_ptr<const CudaApi> owned_;
  std::atomic<const CudaApi*> api_{nullptr};
  std::optional<Error> failure_;
  CudaContext primary(int ordinal);

  std::array<std::atomic<const torchkiln_device*>, kMaxDevices> devices_{};
  std::array<std::atomic<CudaContext>, kMaxDevices> primaries_{};
};

}  // namespace torchkiln::jit
