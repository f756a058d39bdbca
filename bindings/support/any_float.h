// Tensors whose dtype a kernel learns at run time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/support/tensor.h"
#include "common/any_float.h"

namespace torchkiln::bindings {

// The kernels' name of a floating dtype that is known at run time only.
inline i64 number_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return kHalfNumbers;
    case ScalarType::BFloat16:
      return kBfloat16Numbers;
    case ScalarType::Double:
      return kDoubleNumbers;
    default:
      return kFloatNumbers;
  }
}

}  // namespace torchkiln::bindings
