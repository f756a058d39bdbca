// CPU loops that compute half types in float: numbers are converted where they enter and leave, so that loops are
// compiled for float and double only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>
#include <vector>

#include "bindings/support/tensor.h"

namespace torchkiln::bindings {

// Calls f.operator()<T>() with the type in which a floating dtype is computed.
template <class F>
decltype(auto) with_wide(ScalarType dtype, F&& f) {
  return dtype == ScalarType::Double ? f.template operator()<double>()
                                     : f.template operator()<float>();
}

// Elements begin, begin + stride, ... of a tensor's memory.
template <class T>
void widen(ScalarType dtype, const void* from, std::int64_t begin, std::int64_t stride,
           std::int64_t n, T* to) {
  with_float(dtype, [&]<class Scalar>() {
    if constexpr (std::is_same_v<Acc<Scalar>, T>) {
      const auto* values = static_cast<const Scalar*>(from) + begin;
      for (std::int64_t i = 0; i < n; ++i) to[i] = load(values[i * stride]);
    }
  });
}

// Elements begin to begin + n.
template <class T>
void narrow(ScalarType dtype, const T* from, std::int64_t n, void* to, std::int64_t begin) {
  with_float(dtype, [&]<class Scalar>() {
    if constexpr (std::is_same_v<Acc<Scalar>, T>) {
      auto* values = static_cast<Scalar*>(to) + begin;
      for (std::int64_t i = 0; i < n; ++i) store(values[i], from[i]);
    }
  });
}

// All elements of a contiguous tensor: its own, or a copy of half types.
template <class T>
class Wide {
 public:
  explicit Wide(const Tensor& tensor) : data_(data<T>(tensor)) {
    const ScalarType dtype = tensor.scalar_type();
    if (dtype == ScalarType::Float || dtype == ScalarType::Double) return;
    copy_.resize(static_cast<std::size_t>(tensor.numel()));
    widen(dtype, tensor.const_data_ptr(), 0, 1, tensor.numel(), copy_.data());
    data_ = copy_.data();
  }
  Wide(const Wide&) = delete;
  Wide& operator=(const Wide&) = delete;

  const T* get() const { return data_; }

 private:
  std::vector<T> copy_;
  const T* data_;
};

// Part of a result: the tensor's own memory, or a buffer that is rounded into it.
template <class T>
class Narrow {
 public:
  // The elements begin to begin + n; not of two parts at a time.
  T* part(ScalarType dtype, void* to, std::int64_t begin, std::int64_t n) {
    if (dtype == ScalarType::Float || dtype == ScalarType::Double)
      return static_cast<T*>(to) + begin;
    buffer_.resize(static_cast<std::size_t>(n));
    return buffer_.data();
  }
  // When the part is complete.
  void round(ScalarType dtype, void* to, std::int64_t begin, std::int64_t n) const {
    if (dtype == ScalarType::Float || dtype == ScalarType::Double) return;
    narrow(dtype, buffer_.data(), n, to, begin);
  }

 private:
  std::vector<T> buffer_;
};

}  // namespace torchkiln::bindings
