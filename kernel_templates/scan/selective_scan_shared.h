// Shared memory of selective_scan's kernels, counted by both sides, in numbers of the type of states.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/discretization.h"

namespace torchkiln::selective_scan {

// Numbers of a row of `tile` positions: 16 bytes behind them keep the rows of neighbouring lanes in different banks, and
// the first of those is the position behind the tile.
TORCHKILN_HD constexpr int pitch_of(int tile, int number_bytes) { return tile + 16 / number_bytes; }

// Rows that each channel has: steps, inputs, and ratios of steps.
TORCHKILN_HD constexpr int step_arrays(int method) { return neighbour_of(method) != 0 ? 3 : 2; }

// Tiles that B and C each have: one is written while the other one is still read. So many states need all the room.
TORCHKILN_HD constexpr int matrix_tiles(int padded_states) { return padded_states > 64 ? 1 : 2; }

// Numbers that B or C has: tiles, or a four for each thread and its states where it is constant.
TORCHKILN_HD constexpr int matrix_numbers(int threads, int lanes, int states, int tile,
                                          int number_bytes) {
  const int padded = lanes * states;
  const int variable = matrix_tiles(padded) * padded * pitch_of(tile, number_bytes);
  const int constant = threads * states * pitch_of(4, number_bytes);
  return variable > constant ? variable : constant;
}

// Bytes behind the last row that are read and not used.
constexpr int kRowsSlack = 32;

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
