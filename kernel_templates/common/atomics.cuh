// Sums in memory that several threads add to; their order is free.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

// to[i] += weight * values[i]; four floats must be aligned to 16 bytes.
template <int kVector, class T>
__device__ __forceinline__ void add_atomically(T* to, T weight, const T* values) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kVector == 4 && sizeof(T) == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(weight * values[0]),
                 "f"(weight * values[1]), "f"(weight * values[2]), "f"(weight * values[3])
                 : "memory");
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < kVector; ++i) atomicAdd(to + i, weight * values[i]);
}

}  // namespace torchkiln
