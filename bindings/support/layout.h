// The two memory layouts of feature maps: channels first (contiguous) and channels last.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>

#include "bindings/support/tensor.h"

namespace torchkiln::bindings {

// Sizes of one do not count: their strides say nothing.
inline bool has_layout(const Tensor& tensor, bool channels_last) {
  if (!channels_last) return tensor.is_contiguous();
  std::int64_t stride = 1;
  for (const std::int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != stride) return false;
    stride *= tensor.size(dim);
  }
  return true;
}

// torch calls some tensors both; those count as channels first.
inline bool is_channels_last(const Tensor& tensor) {
  return !tensor.is_contiguous() && has_layout(tensor, true);
}

inline Tensor empty_layout(const Tensor& like, ScalarType dtype,
                           const std::array<std::int64_t, 4>& shape, bool channels_last) {
  if (!channels_last) return empty(like, dtype, Shape(shape));
  const auto [n, c, h, w] = shape;
  const std::array<std::int64_t, 4> strides = {h * w * c, 1, w * c, c};
  return empty_strided(like, dtype, Shape(shape), Shape(strides));
}

// The tensor itself when it has the layout already.
inline Tensor as_layout(const Tensor& tensor, bool channels_last) {
  if (has_layout(tensor, channels_last)) return tensor;
  Tensor copy =
      empty_layout(tensor, tensor.scalar_type(),
                   {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, channels_last);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// May it be read 16 bytes at a time? Null may.
inline bool aligned_to_16(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

}  // namespace torchkiln::bindings
