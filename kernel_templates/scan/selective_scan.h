// Arguments of selective_scan, shared by CPU and GPU. Positions are counted along the scan: position k lies at k in
// memory, or at length - 1 - k of a reversed one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/discretization.h"

namespace torchkiln::selective_scan {

// Positions of a tile. A state is kept for the backward before each but the first one, which begins with the initial state.
// torchkiln/ops/scan/selective_scan.py has the same number.
constexpr int kCheckpoint = 32;
constexpr int kMaxStates = 256;
constexpr i64 kMaxLength = i64(1) << 30;

// Elements from one batch or channel to the next; positions are neighbours.
struct Rows {
  const void* data;
  i64 batch, channel;
};

// Weights, states and what is kept are in the accumulator type; complex ones are pairs of real numbers.
struct Problem {
  Rows u, delta, z;        // z: or null
  const void* A;           // (dim, states)
  const void* B;           // (batch, groups, states, length), or (dim, states)
  const void* C;           // as B
  const void* D;           // (dim,) or null
  const void* delta_bias;  // (dim,) or null
  i64 batch, dim, groups, states, length;
  i64 tiles;                   // a row has: length / kCheckpoint, rounded up
  i32 constant_B, constant_C;  // whether they have the form of A
  i32 softplus, reverse;
  i32 aligned;  // whether packs of 16 bytes may be read and written along positions
};

struct Args {
  Problem problem;
  const void* initial_state;  // (batch, dim, states) or null
  void* out;                  // (batch, dim, length)
  void* last_state;           // (batch, dim, states)
  void* checkpoints;          // (batch, dim, tiles - 1, states) or null
  void* summaries;  // (splits, batch, dim, states) pairs: what a split makes of the state before it
  i32 splits;       // of the positions, among blocks; each is whole tiles
};

struct BackwardArgs {
  Problem problem;
  Rows grad_out;
  const void* grad_last_state;  // (batch, dim, states) or null
  const void* initial_state;    // the same
  const void* checkpoints;      // as the forward's
  void* grad_u;                 // (batch, dim, length), as the next two
  void* grad_delta;
  void* grad_z;              // or null
  void* grad_initial_state;  // (batch, dim, states) or null
  // In the accumulator type; of each split and batch, to be summed: (batch, dim, states) or (batch, dim). That of A is
  // one, (dim, states), where it is added to atomically.
  void* grad_A;
  void* grad_D;           // or null
  void* grad_delta_bias;  // or null
  // (parts, batch, groups, states, length) of variable matrices, (batch, dim, states) of constant ones.
  void* grad_B;
  void* grad_C;
  i64 grad_stride;  // of grad_out: from one position to the next
  // What splits make of the adjoint state behind them. The last one knows it: (batch, dim, states). Those between it and the
  // first have maps x -> product * x + sum: sums are (splits - 2, batch, dim, states), and so are products, except where
  // alphas are exponentials of real numbers: there they are those of one long step, (splits - 2, batch, dim).
  void *behind_last, *sums, *products;
  i32 splits;  // of the positions, among blocks; each is whole tiles, and none is empty
  i32 adds;    // whether blocks add to one part of variable gradients; otherwise each has its own
  i32 adds_A;  // whether they add to the gradient of A, too
};

// Sums of parts: element i of segment s is the sum of from[i + part * count].
constexpr int kSegments = 5;
struct Segment {
  const void* from;
  void* to;
  i64 count, parts;
  i32 narrow;  // whether it is written in the inputs' type; in the accumulator type otherwise
};
struct SumArgs {
  Segment segments[kSegments];
};

// Derivative of z * sigmoid(z).
template <class T>
TORCHKILN_HD T silu_slope(T z, T sigmoid) {
  return sigmoid * (T(1) + z * (T(1) - sigmoid));
}

}  // namespace torchkiln::selective_scan
