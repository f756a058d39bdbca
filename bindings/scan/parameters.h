// Checks of what the operators around a scan share, and their grid.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"

namespace torchkiln::bindings {

// Weights and the like may stay in float32 beside inputs of a half type.
inline void check_parameter(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& x) {
  const bool is_wider =
      tensor.scalar_type() == ScalarType::Float && element_size(x.scalar_type()) < 4;
  if (!is_wider && tensor.scalar_type() != x.scalar_type()) {
    fail(TORCHKILN_ERROR_TYPE, op, name,
         "have the dtype of x (" + text(x.scalar_type()) + "), or float32 beside a half type",
         text(tensor.scalar_type()));
  }
  check_same_device(op, name, tensor, "x", x);
}

// What is changed in place must have a place for each element.
inline void check_own_memory(const char* op, const char* name, const Tensor& state) {
  if (state.numel() == 0) return;
  for (std::int64_t dim = 0; dim < state.dim(); ++dim) {
    if (state.size(dim) <= 1 || state.stride(dim) != 0) continue;
    fail(TORCHKILN_ERROR_VALUE, op, name, "have memory for each element", "an expanded tensor",
         std::string("Make it with ") + name + ".contiguous()");
  }
}

// (count,) int32 on the device of x.
inline void check_numbers(const char* op, const char* name, const Tensor& numbers,
                          const Tensor& x) {
  if (numbers.scalar_type() != ScalarType::Int) {
    fail(TORCHKILN_ERROR_TYPE, op, name, "be int32", text(numbers.scalar_type()),
         std::string("Convert it with ") + name + ".int()");
  }
  check_same_device(op, name, numbers, "x", x);
  check_shape(op, name, numbers, {x.size(0)});
}

// Blocks for each sequence's channels in x, sequences in y and z: a block's sequence needs no division.
inline Geometry by_sequence(std::int64_t blocks, std::int64_t sequences, std::int64_t block_size) {
  constexpr std::int64_t kMostInY = 65'535;
  const std::int64_t in_y = std::min(sequences, kMostInY);
  return {{static_cast<std::uint32_t>(blocks), static_cast<std::uint32_t>(in_y),
           static_cast<std::uint32_t>(ceil_div(sequences, in_y))},
          {static_cast<std::uint32_t>(block_size), 1, 1},
          0};
}

}  // namespace torchkiln::bindings
