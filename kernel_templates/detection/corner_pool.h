// Arguments and element maths of corner_pool, shared by CPU and GPU: running maxima, and their gradient.
// Source: Law and Deng, "CornerNet", 2018, equations 6 and 7.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln::corner_pool {

enum Mode { kTop = 0, kBottom = 1, kLeft = 2, kRight = 3 };

// Tensors seen as (outer, length, inner), contiguous; the maximum runs along `length`.
struct Args {
  const void* input;
  const void* pooled;       // of the gradient on the GPU: the forward's output
  const void* grad_output;  // of the gradient
  void* out;                // the running maximum, or the gradient of the input
  i64 outer, length, inner;
};

// A pass is a scan with one running value: `step` takes the next item and returns what belongs there. What a run of
// items does to the running value is its `Carry`; the carries of two neighbouring runs combine to that of both.
template <class T>
struct Forward {
  using Carry = T;
  struct Item {
    T x;
  };

  TORCHKILN_HD static T start() { return bits_float(0xff800000u); }  // minus infinity
  TORCHKILN_HD static Item no_item() { return {start()}; }
  template <class Scalar>
  TORCHKILN_HD static Item item(const Args& args, i64 at) {
    return {load(static_cast<const Scalar*>(args.input)[at])};
  }
  // Of equal values the later one, and NaN for good: torch.cummax's rules.
  TORCHKILN_HD static bool takes(T running, T x) { return x >= running || is_nan(x); }
  TORCHKILN_HD static T step(T& running, const Item& item) {
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
    // One instruction instead of four, of which a column has dozens. Of two zeros it takes the positive one.
    if constexpr (sizeof(T) == sizeof(float)) {
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(running) : "f"(item.x));
      return running;
    }
#endif
    running = takes(running, item.x) ? item.x : running;
    return running;
  }

  TORCHKILN_HD static Carry none() { return start(); }
  TORCHKILN_HD static void fold(Carry& carry, const Item& item) { step(carry, item); }
  TORCHKILN_HD static Carry combine(Carry earlier, Carry later) {
    fold(earlier, {later});
    return earlier;
  }
  TORCHKILN_HD static T running(Carry carry) { return carry; }
};

// Of a run: what came after its last maximum, and whether there was one.
template <class T>
struct Pending {
  T sum;
  bool found;
};

// Runs against the direction of the forward: a maximum gets the gradients of all items that took its value.
template <class T>
struct Backward {
  using Carry = Pending<T>;
  struct Item {
    T gradient;
    bool is_maximum;
  };

  TORCHKILN_HD static T start() { return T(0); }
  TORCHKILN_HD static Item no_item() { return {T(0), false}; }
  // Where the running maximum took its value from here.
  TORCHKILN_HD static bool is_maximum(T x, T pooled) { return x == pooled || is_nan(x); }
  template <class Scalar>
  TORCHKILN_HD static Item item(const Args& args, i64 at) {
    const T x = load(static_cast<const Scalar*>(args.input)[at]);
    const T pooled = load(static_cast<const Scalar*>(args.pooled)[at]);
    return {load(static_cast<const Scalar*>(args.grad_output)[at]), is_maximum(x, pooled)};
  }
  TORCHKILN_HD static T step(T& running, const Item& item) {
    const T sum = running + item.gradient;
    running = item.is_maximum ? T(0) : sum;
    return item.is_maximum ? sum : T(0);
  }

  TORCHKILN_HD static Carry none() { return {T(0), false}; }
  TORCHKILN_HD static void fold(Carry& carry, const Item& item) {
    step(carry.sum, item);
    carry.found = carry.found || item.is_maximum;
  }
  TORCHKILN_HD static Carry combine(const Carry& earlier, const Carry& later) {
    return later.found ? later : Carry{earlier.sum + later.sum, earlier.found};
  }
  TORCHKILN_HD static T running(const Carry& carry) { return carry.sum; }
};

}  // namespace torchkiln::corner_pool
