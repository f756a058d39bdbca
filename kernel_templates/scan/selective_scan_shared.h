// Shared memory of selective_scan's kernels, counted by both sides, in numbers of the type of states.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln::selective_scan {

// What a warp of the forward keeps from chunk to chunk for each state: the state, and the product of all alphas for a
// summary.
constexpr int kForwardCarry = 2;

// What a warp of the backward keeps for each state.
enum BackwardCarry {
  kAdjoint = 0,  // conj(alpha) lambda of the first position behind
  kPushed = 1,   // what the positions behind have for the samples one and two before them
  kSumA = 3,     // gradients, summed over positions
  kSumB = 4,
  kSumC = 5,
  kStart = 6,  // the state before the chunk
  kBackwardCarry = 7,
};

// States of a tile of B or C: as many as leave room for several blocks.
TORCHKILN_HD constexpr int tile_states(bool is_complex) { return is_complex ? 4 : 8; }

// Numbers of a tile's state: the positions of a chunk, and what lies beside them.
TORCHKILN_HD constexpr int tile_slots(int chunk) { return chunk + 4; }

}  // namespace torchkiln::selective_scan
