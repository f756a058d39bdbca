// A parallel loop over torch's own thread pool. Bodies must not throw: nothing catches across torch's threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

// An attribute: one body per instruction set, chosen at load. Named levels, because g++ makes two bodies of "avx2,fma", and
// asks for a processor by name when it is given one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHKILN_CLONES target_clones("avx512f", "arch=x86-64-v3", "default")
#define TORCHKILN_VECTORISED __attribute__((optimize("O3"), TORCHKILN_CLONES))
#else
#define TORCHKILN_CLONES
#define TORCHKILN_VECTORISED
#endif

namespace torchkiln::bindings {

// Work worth handing to another thread, in units of about a nanosecond.
inline constexpr std::int64_t kGrainNanoseconds = 32'768;

// Not inlined: a body is compiled once, though it is called from two places.
template <class F>
[[gnu::noinline]] void run_piece(const F& f, std::int64_t begin, std::int64_t end) {
  f(begin, end);
}

// f(begin, end) over [0, n), in pieces of at least about 30 us when one item costs `item_nanoseconds`.
template <class F>
void parallel_for(std::int64_t n, std::int64_t item_nanoseconds, const F& f) {
  const std::int64_t grain =
      std::max<std::int64_t>(1, kGrainNanoseconds / std::max<std::int64_t>(1, item_nanoseconds));
  if (n <= grain) {
    if (n > 0) run_piece(f, std::int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(
      0, n, grain, [&f](std::int64_t begin, std::int64_t end) { run_piece(f, begin, end); });
}

}  // namespace torchkiln::bindings
