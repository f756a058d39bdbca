// The buffers of a launch whose Args have many pointers, most of which a kernel does not follow.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "bindings/support/cuda.h"

namespace torchkiln::bindings {

// What a kernel does with each of the kPointers pointers that Args begins with: nothing, unless it is set. kSizesOf makes
// the sizes of a launch out of its Args.
template <std::size_t kPointers, auto& kSizesOf>
class BuffersOf {
 public:
  BuffersOf() {
    for (std::size_t i = 0; i < kPointers; ++i) all_[i] = unused(i * sizeof(void*));
  }

  // One of `reads`, `writes`, `updates`, `scratch`.
  BuffersOf& set(const Buffer& buffer) {
    all_[buffer.offset / sizeof(void*)] = buffer;
    return *this;
  }
  // Of a tensor, if there is one.
  BuffersOf& read(std::size_t offset, const Tensor& tensor) {
    return tensor.defined() ? set(reads(offset, tensor)) : *this;
  }

  template <class AnyKernel, class Statics, class Args>
  void run(const AnyKernel& kernel, const Place& place, const Statics& statics,
           const Args& args) const {
    [&]<std::size_t... i>(std::index_sequence<i...>) {
      kernel.run(place, statics, kSizesOf(args), args, {all_[i]...});
    }(std::make_index_sequence<kPointers>{});
  }

 private:
  std::array<Buffer, kPointers> all_;
};

}  // namespace torchkiln::bindings
