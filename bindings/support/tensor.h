// What operators need of torch tensors, through the LibTorch stable ABI only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "common/types.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::span<const std::int64_t>;

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.data(), sizes.size()};
}

std::string text(const Tensor& tensor);  // its shape: (2, 5)
std::string text(ScalarType dtype);      // float32
std::string device_text(const Tensor& tensor);

// Throws what torch said when a shim call failed. Torch's own macro has another name in each version, and loses the text
// when the library is built for an older torch than it runs on.
void check_torch(AOTITorchError code, const char* call);

// An uninitialised tensor on `like`'s device. Strides are those of a contiguous tensor unless given.
Tensor empty(const Tensor& like, ScalarType dtype, Shape shape);
Tensor empty_strided(const Tensor& like, ScalarType dtype, Shape shape, Shape strides);
Tensor zeros(const Tensor& like, ScalarType dtype, Shape shape);

inline Tensor empty(const Tensor& like, ScalarType dtype,
                    std::initializer_list<std::int64_t> shape) {
  return empty(like, dtype, Shape(shape.begin(), shape.size()));
}
inline Tensor zeros(const Tensor& like, ScalarType dtype,
                    std::initializer_list<std::int64_t> shape) {
  return zeros(like, dtype, Shape(shape.begin(), shape.size()));
}

// The tensor itself when it is contiguous already.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

// The kernels' name of a floating dtype; callers have checked is_floating.
inline std::int64_t kernel_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return TORCHKILN_HALF;
    case ScalarType::BFloat16:
      return TORCHKILN_BFLOAT16;
    case ScalarType::Double:
      return TORCHKILN_DOUBLE;
    default:
      return TORCHKILN_FLOAT;
  }
}

inline std::uint64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short:
      return 2;
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    default:
      return 4;
  }
}

inline std::uint64_t bytes_of(const Tensor& tensor) {
  return static_cast<std::uint64_t>(tensor.numel()) * element_size(tensor.scalar_type());
}
// From the first element to the end of the last one: more than its own bytes where it is a view with gaps.
std::uint64_t extent_of(const Tensor& tensor);

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls f.operator()<Scalar>() with the storage type of a floating dtype.
template <class F>
decltype(auto) with_float(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Half:
      return f.template operator()<half>();
    case ScalarType::BFloat16:
      return f.template operator()<bfloat16>();
    case ScalarType::Double:
      return f.template operator()<double>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace torchkiln::bindings
