// Multi-scale deformable attention on the GPU: the samples of each cell, in order.
//
//   count     how many samples a cell has, and which of them each is, in any order; where they are few, `backward` counts
//   place     where the samples of each cell end, out of their counts
//   fill      puts samples there
//   order     sorts those of each cell
//
// Floor: a list takes 28 bytes of each sample. Atomics take longer than these: `count` asks for the places of a patch's
// samples in a cell at once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bins.cuh"
#include "deformable/multi_scale_deformable_attention_samples.cuh"

namespace torchkiln::multi_scale_deformable_attention_cells {

using namespace torchkiln::multi_scale_deformable_attention;

// Of a patch of queries whose samples `count` counts together.
constexpr int kRowsOfCount = 16;

// Those of an image and head.
__device__ __forceinline__ i32 samples_of(const Args& args) {
  return i32(args.q * args.l * args.p);
}

__device__ __forceinline__ bool share_pixels(Level a, Level b) {
  const i64 end_of_a = i64(a.start) + i64(a.h) * a.w, end_of_b = i64(b.start) + i64(b.h) * b.w;
  return a.start < end_of_b && b.start < end_of_a && a.h > 0 && b.h > 0;
}

template <int kBlockSize>
__device__ __forceinline__ void mark_sharing(const Args& args) {
#pragma unroll 1
  for (i64 pair = threadIdx.x; pair < args.l * args.l; pair += kBlockSize) {
    const i64 a = pair / args.l, b = pair - a * args.l;
    if (a < b && share_pixels(level_of(args.shapes, args.starts, args.s, a),
                              level_of(args.shapes, args.starts, args.s, b))) {
      args.ends[args.b * args.m * cells_of(args)] = 1;
    }
  }
}

// A block for each image and head: counts become where the samples of a cell end. One more finds out whether levels share
// pixels.
template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) place(const Args args) {
  constexpr int kPacks = 8;  // of a thread, under way at once: 32768 cells in one turn
  constexpr i32 kStep = 4 * kWarpSize, kOfWarp = kPacks * kStep;
  __shared__ int partial[kBlockSize / kWarpSize];
  if (blockIdx.x == args.b * args.m) {
    mark_sharing<kBlockSize>(args);
    return;
  }
  const i64 cells = cells_of(args);
  const i32 lane = i32(threadIdx.x) % kWarpSize;
  i32 before = 0;
#pragma unroll 1
  for (i64 base = 0; base < cells; base += kPacks * 4 * kBlockSize) {
    const i64 first = base + i32(threadIdx.x) / kWarpSize * kOfWarp + 4 * lane;
    const i32 left = i32(min_of(cells - first, i64(kOfWarp)));
    uint4* packs = reinterpret_cast<uint4*>(args.ends + blockIdx.x * cells + first);
    uint4 own[kPacks];
    i32 places[kPacks];
    i32 of_warp = 0;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      own[i] = i * kStep < left ? packs[i * kWarpSize] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const i32 sum = i32(own[i].x + own[i].y + own[i].z + own[i].w);
      const i32 inclusive = warp_inclusive_sum(sum);
      places[i] = of_warp + inclusive - sum;
      of_warp += __shfl_sync(0xffffffffu, inclusive, kWarpSize - 1);
    }
    // What the last lane alone has comes before the lanes of later warps only.
    const i32 given = lane == kWarpSize - 1 ? of_warp : 0;
    int total;
    const i32 start = before + block_exclusive_sum<kBlockSize>(given, partial, total);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 x = u32(start + places[i]) + own[i].x, y = x + own[i].y, z = y + own[i].z;
      const u32 w = z + own[i].w;
      if (i * kStep < left) packs[i * kWarpSize] = make_uint4(x, y, z, w);
    }
    before += total;
  }
}

// What a block of one image and head works on, where each has so many blocks.
struct Turn {
  i64 of_head;
  u32 block, blocks;

  __device__ __forceinline__ Turn(i64 items, int block_size)
      : blocks(u32((items + block_size - 1) / block_size)) {
    of_head = blockIdx.x / blocks;
    block = blockIdx.x - u32(of_head) * blocks;
  }
};

// How many of the samples of a block lie in a cell. A table of cells, of which at most four slots in five are taken.
template <i32 kItems>
struct CountsOfBlock {
  static constexpr i32 kSlots = kItems + kItems / 4;
  i32 cells[kSlots];   // kOutside: the slot is free
  i32 counts[kSlots];  // then which is the first of them among all samples of the cell

  __device__ __forceinline__ i32 slot_of(i32 cell) {
    i32 slot = i32(u64(u32(cell) * 2654435769u) * kSlots >> 32);
#pragma unroll 1
    while (true) {
      const i32 found = atomicCAS(&cells[slot], kOutside, cell);
      if (found == kOutside || found == cell) return slot;
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
  }
};

// A block has the samples of neighbouring queries, which meet on cells: these get one atomic sum each.
template <class T, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) count(const Args args) {
  constexpr int kOwn = kCountedByThread;
  constexpr i32 kItems = kOwn * kBlockSize;
  using Counts = CountsOfBlock<kItems>;
  __shared__ Counts table;
  __shared__ Levels levels;
  levels.fill(args);
#pragma unroll 1
  for (i32 slot = threadIdx.x; slot < Counts::kSlots; slot += kBlockSize) {
    table.cells[slot] = kOutside;
    table.counts[slot] = 0;
  }
  __syncthreads();
  const u32 of_query = u32(args.l * args.p), samples = u32(samples_of(args));
  const Turn turn(samples, kItems);
  const i64 first = turn.of_head * samples;
  i32 own[kOwn], cells[kOwn], slots[kOwn], ranks[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const u32 number = turn.block * kItems + i * kBlockSize + threadIdx.x;
    const u32 place = number / of_query;
    const bool exists = number < samples;
    const i32 query = exists ? in_patches<kRowsOfCount>(args, levels, args.q, i32(place)) : 0;
    own[i] = i32(u32(query) * of_query + number - place * of_query);
    cells[i] = exists ? static_cast<const Placed<T>*>(args.placed)[first + own[i]].cell : kOutside;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (cells[i] == kOutside) continue;
    slots[i] = table.slot_of(cells[i]);
    ranks[i] = atomicAdd(&table.counts[slots[i]], 1);
  }
  __syncthreads();
  i32* ends = args.ends + turn.of_head * cells_of(args);
#pragma unroll 4
  for (i32 slot = threadIdx.x; slot < Counts::kSlots; slot += kBlockSize) {
    const i32 counted = table.counts[slot];
    if (counted > 0) table.counts[slot] = atomicAdd(ends + table.cells[slot], counted);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (cells[i] != kOutside) args.ranks[first + own[i]] = table.counts[slots[i]] + ranks[i];
  }
}

// Where the samples of a cell end, or begin those of the next one.
__device__ __forceinline__ i32 end_of(const i32* ends, i32 cell) {
  return cell < 0 ? 0 : ends[cell];
}

template <class T, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) fill(const Args args) {
  const i32 samples = samples_of(args);
  const Turn turn(samples, kBlockSize);
  const u32 own = turn.block * kBlockSize + threadIdx.x;
  if (own >= u32(samples)) return;
  const i64 first = turn.of_head * samples;
  const i32 cell = static_cast<const Placed<T>*>(args.placed)[first + own].cell;
  if (cell == kOutside) return;
  const i32* ends = args.ends + turn.of_head * cells_of(args);
  args.samples[first + end_of(ends, cell - 1) + args.ranks[first + own]] = i32(own);
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) order(const Args args) {
  const Turn turn(args.s, kBlockSize);
  const i64 cell = spread_bin<kBlockSize>(turn.block, turn.blocks);
  const i32* ends = args.ends + turn.of_head * cells_of(args);
  const i32 begin = cell < args.s ? end_of(ends, i32(cell) - 1) : 0;
  const i32 count = cell < args.s ? ends[cell] - begin : 0;
  order_bins<kBlockSize>(args.samples + turn.of_head * samples_of(args), begin, count);
}

}  // namespace torchkiln::multi_scale_deformable_attention_cells
