// Non-maximum suppression of boxes given by two corners; see nms_panels.cuh.
// spills: up to 32 bytes for wide types and indices, by ptxas' own choice: no kernel asks for a number of blocks.
// compile time: suppress with classes takes above 250 ms; its stages are one kernel, so that none waits for a launch
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/nms_panels.cuh"

namespace torchkiln::nms {

template <class Scalar, bool kClasses, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) sort(const Args args) {
  sort_boxes<Boxes<Scalar>, kClasses, kBlockSize>(args);
}

template <class Scalar, bool kClasses, int kLanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) merge(const Args args) {
  merge_boxes<Boxes<Scalar>, kClasses, kLanes, kBlockSize>(args);
}

template <class Scalar, bool kClasses, int kPanel, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) suppress(const Args args) {
  suppress_boxes<Boxes<Scalar>, kClasses, kPanel, kBlockSize>(args);
}

// One block walks the flags in score order, 16 to a thread.
template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) compact(const Args args) {
  constexpr int kFlags = 16;
  __shared__ int partial[kBlockSize / kWarpSize];
  i64 before = 0;
#pragma unroll 1
  for (i64 begin = 0; begin < args.n; begin += i64(kBlockSize) * kFlags) {
    const i64 at = begin + i64(threadIdx.x) * kFlags;
    u32 packed[kFlags / 4] = {};
    if (at < args.n) {
      const uint4 flags = *reinterpret_cast<const uint4*>(args.kept + at);
      packed[0] = flags.x, packed[1] = flags.y, packed[2] = flags.z, packed[3] = flags.w;
    }
    int kept = 0, total = 0;
#pragma unroll
    for (const u32 four : packed) kept += __popc(four);  // a flag is 0 or 1
    i64 slot = before + block_exclusive_sum<kBlockSize>(kept, partial, total);
#pragma unroll
    for (int i = 0; i < kFlags; ++i) {
      if ((packed[i / 4] >> (8 * (i % 4)) & 1) == 0) continue;
      if (slot < args.max_output) args.indices[slot] = args.score_rows[at + i];
      ++slot;
    }
    before += total;
  }
  if (threadIdx.x == 0) *args.count = min_of(before, args.max_output);
}

}  // namespace torchkiln::nms
