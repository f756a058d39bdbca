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

// How two results of a tensor compare, for the tuner.
inline std::int16_t content_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  const std::int64_t bytes = TORCHKILN_BYTES;
  return static_cast<std::int16_t>(is_floating(dtype) ? kernel_type(dtype) : bytes);
}

// Buffers of a launch, named by the offset of their pointer in Args.
inline Buffer buffer(std::size_t offset, torchkiln_access access, std::int64_t bytes,
                     std::int16_t type = TORCHKILN_BYTES) {
  return {static_cast<std::uint32_t>(offset), static_cast<std::int16_t>(access), type,
          static_cast<std::uint64_t>(bytes)};
}
inline Buffer buffer(std::size_t offset, torchkiln_access access, const Tensor& tensor) {
  return {static_cast<std::uint32_t>(offset), static_cast<std::int16_t>(access), content_of(tensor),
          extent_of(tensor)};
}
// Whole tensors, and parts of one by their bytes.
inline Buffer reads(std::size_t offset, const auto& what) {
  return buffer(offset, TORCHKILN_READ, what);
}
inline Buffer writes(std::size_t offset, const auto& what) {
  return buffer(offset, TORCHKILN_WRITE, what);
}
// A pointer in Args that this kernel does not follow.
inline Buffer unused(std::size_t offset) { return buffer(offset, TORCHKILN_READ, 0); }
// Written, with what depends on the tunables: another kernel makes the same result of it.
inline Buffer scratch(std::size_t offset, const Tensor& tensor) {
  return buffer(offset, TORCHKILN_WRITE, static_cast<std::int64_t>(bytes_of(tensor)),
                TORCHKILN_SCRATCH);
}
inline Buffer updates(std::size_t offset, const auto& what) {
  return buffer(offset, TORCHKILN_READ_WRITE, what);
}

}  // namespace torchkiln::bindings
