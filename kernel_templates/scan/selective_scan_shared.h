// Shared memory of selective_scan's kernels, counted by both sides, in numbers of the type of states.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/selective_scan.h"

namespace torchkiln::selective_scan {

// Numbers of a row of `tile` positions: 16 bytes behind them keep the rows of neighbouring lanes in different banks, and
// the first of those is the position behind the tile.
TORCHKILN_HD constexpr int pitch_of(int tile, int number_bytes) { return tile + 16 / number_bytes; }

// Numbers behind the last row that are read and not used: the four behind a tile, and the position behind that.
constexpr int kBehind = 8;

// Rows that each channel has: steps, inputs, and two that say how long a step's neighbour is.
TORCHKILN_HD constexpr int step_arrays(int method) { return neighbour_of(method) != 0 ? 4 : 2; }

// Whether the lanes of a channel leave their parts of its outputs in rows of their own, to be summed on the way out: of the
// quadratic rules, whose arithmetic takes the time that shuffles would need. Otherwise sums take the places of inputs.
TORCHKILN_HD constexpr bool keeps_parts(int method, int lanes) {
  return taps_of(method) > 2 && lanes <= 8;
}

// Tiles that B and C each have: one is written while the other one is still read. So many states need all the room.
TORCHKILN_HD constexpr int matrix_tiles(int padded_states) { return padded_states > 64 ? 1 : 2; }

// Numbers that B or C has: tiles, or a four for each thread and its states where it is constant.
TORCHKILN_HD constexpr int matrix_numbers(int threads, int lanes, int states, int tile,
                                          int number_bytes) {
  const int padded = lanes * states, slab = lanes * pitch_of(tile, number_bytes);
  const int threads_of_slab = slab / pitch_of(4, number_bytes);
  const int constant = (threads + threads_of_slab - 1) / threads_of_slab * states * slab;
  const int variable = matrix_tiles(padded) * (states * slab + kBehind);
  return variable > constant ? variable : constant;
}

// ---- backward ----

// Numbers of a row: the positions between two kept states, and beside them those that rules with several samples take in.
constexpr int kTilePitch = kCheckpoint + 4;

// Numbers of a four in a warp's memory: the states before it, and once these have been used up the gradients of B and C
// of the four before. The last ones keep neighbouring fours in different banks.
TORCHKILN_HD constexpr int four_pitch(int lanes, int lane_states) {
  return (lanes > 4 ? 8 * lanes : 32) * lane_states + 4;
}
TORCHKILN_HD constexpr int four_numbers(int lanes, int lane_states) {
  return (kCheckpoint / 4 + 1) * four_pitch(lanes, lane_states);
}

// Whether the gradients of B and C are summed over the channels of a warp by way of shared memory, which takes half as many
// instructions as shuffles. Beside 16 warps there is no room for it, nor beside 12 where a warp has more states; of fewer
// states half of the lanes would sum none.
TORCHKILN_HD constexpr bool sums_in_memory(int method, int lanes, int lane_states,
                                           int state_bytes) {
  return method != kMamba && state_bytes == 4 && lanes <= 4 && lanes * lane_states >= 16;
}
// Numbers from four positions of a gradient, of all lanes, to the next ones: lanes that sum different ones read different banks.
TORCHKILN_HD constexpr int sums_pitch(int lanes) { return (32 + lanes % 8) * 4; }
// Numbers of all of them in a warp's memory.
TORCHKILN_HD constexpr int sums_numbers(int method, int lanes, int lane_states, int state_bytes) {
  return sums_in_memory(method, lanes, lane_states, state_bytes)
             ? 2 * lane_states * sums_pitch(lanes)
             : 0;
}

// Warps that a multiprocessor holds, which says how many registers each has.
TORCHKILN_HD constexpr int resident_warps(int method, int state_bytes) {
  if (state_bytes > 4) return 8;
  return method == kMamba ? 16 : 12;
}

// Rows that each channel has: inputs as the forward's, three of gradients and slopes, and results where these cannot take the
// places of inputs: the gradients of steps, inputs and ratios of steps, and the output.
TORCHKILN_HD constexpr int result_arrays(int method) { return neighbour_of(method) != 0 ? 4 : 3; }
TORCHKILN_HD constexpr int backward_arrays(int method, int panels) {
  return step_arrays(method) + 3 + (panels > 1 ? result_arrays(method) : 0);
}

}  // namespace torchkiln::selective_scan
