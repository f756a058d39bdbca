// Multi-scale deformable attention on the GPU: the value gradient, the same bits every time, of many samples.
//
//   add       kLanes lanes go through a run of samples, cell by cell, and add up what they give to the four pixels around
//             them. What the right pixels get goes on to the next cell, whose left ones they are
//   join      kLanes lanes own a pixel and add what was left of it: in its own row and in the one above, and, where the
//             samples that it gets are not all of one run, at the ends of those
//
// Each sample's row of the gradient of the output is read once, not for each of four pixels, and runs are of equal length,
// however many samples a cell has. For that, two rows of sums are written and read for each pixel.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "deformable/multi_scale_deformable_attention_cells.cuh"

namespace torchkiln::multi_scale_deformable_attention_runs {

using namespace torchkiln::multi_scale_deformable_attention;
using namespace torchkiln::multi_scale_deformable_attention_cells;

// What `add` leaves: of each cell in `sums`, where its first samples are added, and of each run in `seams`. A part of these
// is what the row of a pixel gets, and then what the row below gets. The head of a run: the left pixels of a cell that an
// earlier one began. Its tail: the right pixels of its last cell.
enum Seam { kHead, kTail };

// Where the channels of a lane stand.
template <class T>
struct Left {
  T* sums;  // of the image and head
  T* seams;
  i64 channels;

  __device__ __forceinline__ Left(const Args& args, i64 of_head, i32 channel)
      : sums(static_cast<T*>(args.sums) + of_head * cells_of(args) * 2 * args.d + channel),
        seams(static_cast<T*>(args.seams) + of_head * runs_of(args) * 4 * args.d + channel),
        channels(args.d) {}
  __device__ __forceinline__ T* of_cell(i32 cell) const { return sums + cell * i64(2) * channels; }
  __device__ __forceinline__ T* of_run(i32 run, Seam seam) const {
    return seams + (run * i64(2) + seam) * 2 * channels;
  }
};

// ---- runs of samples -----------------------------------------------------------------------------------------------

template <class T, int kVector>
struct Run {
  Left<T> left;
  i32 number;
  bool active;     // whether there are channels for this lane
  bool continued;  // whether an earlier run began the cell
  i32 cell = -1;
  T sums[2][2][kVector] = {};  // of left and right pixels, of both rows

  __device__ __forceinline__ void write(T* to, const T (&rows)[2][kVector]) const {
    if (!active) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      Pack<T, kVector> pack;
#pragma unroll
      for (int i = 0; i < kVector; ++i) pack.at[i] = rows[row][i];
      store_whole<kVector>(to + row * left.channels, pack);
    }
  }
  __device__ __forceinline__ void write_cell() const {
    write(continued ? left.of_run(number, kHead) : left.of_cell(cell), sums[0]);
  }

  // Leaves a cell for one further on.
  __device__ __forceinline__ void go_to(i32 next) {
    if (cell >= 0) {
      const bool beside = next == cell + 1;
      write_cell();
      if (!beside) write(left.of_cell(cell + 1), sums[1]);
      continued = false;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[0][row][i] = beside ? sums[1][row][i] : T(0);
          sums[1][row][i] = T(0);
        }
      }
    }
    cell = next;
  }
  __device__ __forceinline__ void finish() const {
    if (cell < 0) return;
    write_cell();
    write(left.of_run(number, kTail), sums[1]);
  }
};

// What a sample gives to the four pixels around it; 0 to one that the level does not have, also of a weight that is no finite
// number.
template <class T>
struct Given {
  i32 cell, query;  // -1: no sample
  Weights<T> weights;
};
template <class T>
__device__ __forceinline__ Given<T> given_by(const Placed<T>& at, i32 sample, u32 of_query) {
  if (sample < 0) return {-1, -1, {}};
  const bool below = at.y >= T(0), beside = at.x >= T(0);
  const T upper = T(1) - abs_of(at.y), left = T(1) - abs_of(at.x);
  return {
      at.cell,
      i32(u32(sample) / of_query),
      {{upper * left * at.weight, beside ? upper * at.x * at.weight : T(0),
        below ? at.y * left * at.weight : T(0), below && beside ? at.y * at.x * at.weight : T(0)}}};
}

template <class T>
__device__ __forceinline__ T of_lane(T value, i32 lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Adds what the samples of the kLanes lanes of a group give, `gradients` times their weights. Every lane of the warp must
// call.
template <int kLanes, class Scalar, int kVector, class T>
__device__ __forceinline__ void add_given(Run<T, kVector>& run, const Given<T>& own,
                                          const Scalar* gradients, i32 stride) {
  constexpr int kAtOnce = 4;  // rows under way
  const i32 group = i32(threadIdx.x) % kWarpSize / kLanes * kLanes;
#pragma unroll 1
  for (i32 first = 0; first < kLanes; first += kAtOnce) {
    Pack<Scalar, kVector> rows[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const i32 query = of_lane(own.query, group + first + i);
      rows[i] = query >= 0 && run.active ? load_pack<kVector>(apart(gradients, query, stride))
                                         : zero_pack<kVector, Scalar>();
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const i32 cell = of_lane(own.cell, group + first + i);
      T weights[4];
#pragma unroll
      for (int pixel = 0; pixel < 4; ++pixel) {
        weights[pixel] = of_lane(own.weights.at[pixel], group + first + i);
      }
      if (cell >= 0 && cell != run.cell) run.go_to(cell);
#pragma unroll
      for (int pixel = 0; pixel < 4; ++pixel) {
        if (weights[pixel] == T(0)) continue;
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          run.sums[pixel % 2][pixel / 2][c] += weights[pixel] * load(rows[i].at[c]);
        }
      }
    }
  }
}

// Whether `join` cannot tell what it is that was left: levels that share pixels are left to `gather`.
__device__ __forceinline__ bool levels_share(const Args& args) {
  return args.ends[args.b * args.m * cells_of(args)] != 0;
}

// Grid: chunks of channels, then runs of a head, heads, images.
template <class Scalar, int kVector, int kLanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) add(const Args args) {
  using T = Acc<Scalar>;
  if (levels_share(args)) return;
  const u32 chunks = u32((args.d + kLanes * kVector - 1) / (kLanes * kVector));
  constexpr u32 kRuns = kBlockSize / kLanes;
  const u32 blocks = (u32(runs_of(args)) + kRuns - 1) / kRuns;
  const u32 chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  const u32 of_head = rest / blocks, image = of_head / u32(args.m);
  const i64 head = of_head - image * u32(args.m), samples = args.q * args.l * args.p;
  const i32 lane = i32(threadIdx.x) % kLanes;
  const i32 channel = (i32(chunk) * kLanes + lane) * kVector;
  const i32 number = i32((rest - of_head * blocks) * kRuns + threadIdx.x / kLanes);
  const i32 listed = args.ends[(of_head + 1) * cells_of(args) - 1];
  const i64 begin = i64(number) * kRun;
  const i32 count = i32(max_of(min_of(listed - begin, i64(kRun)), i64(0)));
  const Placed<T>* placed = static_cast<const Placed<T>*>(args.placed) + of_head * samples;
  const i32* list = args.samples + of_head * samples + begin;
  const i32 stride = i32(args.m * args.d * i64(sizeof(Scalar)));
  const Scalar* gradients =
      static_cast<const Scalar*>(args.output) + (image * args.q * args.m + head) * args.d + channel;
  Run<T, kVector> run = {Left<T>(args, of_head, channel), number, channel < args.d, false};
  if (begin > 0 && count > 0) run.continued = placed[list[-1]].cell == placed[list[0]].cell;
  // Of the runs of a warp, the first is the longest.
  const i32 most = of_lane(count, 0);
#pragma unroll 1
  for (i32 first = 0; first < most; first += kLanes) {
    const i32 sample = first + lane < count ? list[first + lane] : -1;
    const Placed<T> at = sample >= 0 ? placed[sample] : Placed<T>{};
    add_given<kLanes>(run, given_by(at, sample, u32(args.l * args.p)), gradients, stride);
  }
  run.finish();
}

// ---- pixels --------------------------------------------------------------------------------------------------------

// Adds what `add` left of the row of a cell's pixel, or of the one below, to `sums`. has_left: whether there is a cell beside
// it on the left. All cells between the two ends are in the list without a gap.
template <int kVector, class T>
__device__ __forceinline__ void add_left(T* sums, const Left<T>& left, const i32* ends, i32 listed,
                                         i32 cell, bool has_left, int row) {
  const i32 begin = end_of(ends, cell - 1), end = ends[cell];
  const i32 begin_of_left = has_left ? end_of(ends, cell - 2) : begin;
  if (begin_of_left == end) return;
  const auto add = [&](const T* from) {
    const auto pack = load_pack<kVector>(from + row * left.channels);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] += pack.at[i];
  };
  // The last cell of a run leaves its right pixels at the end of that; any other one goes on to this cell.
  const bool at_seam = begin % kRun == 0 || begin == listed;
  const i32 tails = (begin + (at_seam ? kRun - 1 : 0)) / kRun;
#pragma unroll 1
  for (i32 run = begin_of_left / kRun; run < tails && begin_of_left < begin; ++run) {
    add(left.of_run(run, kTail));
  }
  if (begin < end || !at_seam) add(left.of_cell(cell));
#pragma unroll 1
  for (i32 run = begin / kRun + 1; run * i64(kRun) < end; ++run) add(left.of_run(run, kHead));
}

// Grid: chunks of channels, then pixels of a head, heads, images.
template <class Scalar, int kVector, int kLanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) join(const Args args) {
  using T = Acc<Scalar>;
  if (levels_share(args)) return;
  __shared__ Levels levels;
  levels.fill(args);
  __syncthreads();
  const u32 chunks = u32((args.d + kLanes * kVector - 1) / (kLanes * kVector));
  constexpr u32 kPixels = kBlockSize / kLanes;
  const u32 blocks = (u32(args.s) + kPixels - 1) / kPixels;
  const u32 chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  const u32 of_head = rest / blocks, image = of_head / u32(args.m);
  const i64 head = of_head - image * u32(args.m);
  const i32 channel = (i32(chunk) * kLanes + i32(threadIdx.x) % kLanes) * kVector;
  const u32 pixel = (rest - of_head * blocks) * kPixels + threadIdx.x / kLanes;
  if (pixel >= args.s || channel >= args.d) return;
  T sums[kVector] = {};
  const Level size = level_around(args, levels, i32(pixel));
  const bool masked = args.mask != nullptr && args.mask[image * args.s + pixel] != 0;
  if (size.h > 0 && !masked) {
    const i32* ends = args.ends + of_head * cells_of(args);
    const i32 listed = ends[cells_of(args) - 1], own = i32(pixel) - size.start;
    const bool has_left = u32(own) % u32(size.w) != 0;
    const Left<T> left(args, of_head, channel);
    add_left<kVector>(sums, left, ends, listed, i32(pixel), has_left, 0);
    if (own >= size.w) {
      add_left<kVector>(sums, left, ends, listed, i32(pixel) - size.w, has_left, 1);
    }
  }
  Pack<Scalar, kVector> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) store(result.at[i], sums[i]);
  const i64 row = (image * args.s + pixel) * args.m + head;
  store_pack<kVector>(static_cast<Scalar*>(args.grad_value) + row * args.d + channel, result);
}

}  // namespace torchkiln::multi_scale_deformable_attention_runs
