// Arguments of the copy of feature maps from one memory layout to the other.
// Floor: the bytes that are read and written.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln::layout_copy {

// Side of the square that a block turns over.
constexpr i32 kSide = 64;

struct Args {
  const void* from;  // (matrices, rows, columns)
  void* to;          // (matrices, columns, rows)
  i64 matrices, rows, columns;
};

}  // namespace torchkiln::layout_copy
