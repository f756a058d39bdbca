// Where a CUDA operator launches: the device of its tensors, torch's current stream there, torch's allocator.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstddef>

#include "bindings/support/tensor.h"
#include "torchkiln/torchkiln.hpp"

namespace torchkiln::bindings {

// Makes the tensor's device current for its lifetime.
class CudaPlace {
 public:
  explicit CudaPlace(const Tensor& tensor);
  operator const Place&() const { return place_; }  // NOLINT: that is what it is for
  std::int32_t device() const { return place_.device; }
  void* stream() const { return place_.stream; }
  const Device& facts() const;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Place place_;
};

// Buffers of a launch, named by the offset of their pointer in Args; parts of a tensor by their bytes.
inline Buffer reads(std::size_t offset, std::int64_t bytes) {
  return {static_cast<std::uint32_t>(offset), TORCHKILN_READ, static_cast<std::uint64_t>(bytes)};
}
inline Buffer writes(std::size_t offset, std::int64_t bytes) {
  return {static_cast<std::uint32_t>(offset), TORCHKILN_WRITE, static_cast<std::uint64_t>(bytes)};
}
inline Buffer reads(std::size_t offset, const Tensor& tensor) {
  return {static_cast<std::uint32_t>(offset), TORCHKILN_READ, bytes_of(tensor)};
}
inline Buffer writes(std::size_t offset, const Tensor& tensor) {
  return {static_cast<std::uint32_t>(offset), TORCHKILN_WRITE, bytes_of(tensor)};
}
inline Buffer updates(std::size_t offset, const Tensor& tensor) {
  return {static_cast<std::uint32_t>(offset), TORCHKILN_READ_WRITE, bytes_of(tensor)};
}

}  // namespace torchkiln::bindings
