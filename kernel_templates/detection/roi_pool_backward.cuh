// roi_pool on the GPU, backward:
//
//   scatter   channels first: a block sums a band of one map in shared memory
//   gather    channels last: one block owns one tile of one image and 32 channels a warp; a lane owns its channel. It
//             goes through the regions that touch the tile
// Both write every cell once: no atomics on global memory, no zero fill, float32 sums for half types.
// spills: up to 32 bytes for wide types and indices, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bands.cuh"
#include "common/pack.cuh"
#include "common/scan.cuh"
#include "detection/roi_pool.h"

namespace torchkiln::roi_pool_backward {

using namespace torchkiln::roi_pool;

// ---- channels first: backward --------------------------------------------------------------------------------------

// Adds what the threads of a block hold: kCount gradients each, for a cell or, below 0, for none. kDeterministic:
// gradients of the same cell take turns, in the order of their numbers; `owners` has kNobody for every cell, before and
// after.
constexpr u32 kNobody = ~u32(0);
template <bool kDeterministic, int kCount, class T>
__device__ __forceinline__ void add_to_cells(T* sums, u32* owners, i32* cell, const T* gradient) {
  if constexpr (!kDeterministic) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (cell[i] >= 0) atomicAdd(sums + cell[i], gradient[i]);
    }
  } else {
    const auto number = [](int i) { return threadIdx.x * kCount + i; };
    bool has_any = true;
#pragma unroll 1
    while (__syncthreads_or(has_any)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (cell[i] >= 0) atomicMin(owners + cell[i], number(i));
      }
      __syncthreads();
      u32 turns = 0;
      has_any = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (cell[i] < 0) continue;
        if (owners[cell[i]] == number(i)) {
          turns |= 1u << i;
        } else {
          has_any = true;
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if ((turns >> i & 1) == 0) continue;
        sums[cell[i]] += gradient[i];
        owners[cell[i]] = kNobody;
        cell[i] = -1;
      }
    }
  }
}

// Grid: x over the bands of all maps, y over groups of kColumns columns. Dynamic shared memory: the sums of a band,
// then the owners of its cells if kDeterministic. A band has no rows but its own.
template <class Scalar, class Index, int kCodeBytes, bool kDeterministic, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) scatter(const BackwardArgs args) {
  using T = Acc<Scalar>;
  constexpr u32 kMask = (u32(1) << (4 * kCodeBytes)) - 1;
  constexpr int kAtOnce = kDeterministic ? 1 : 4;  // fewer in one batch meet in the same cell
  extern __shared__ uint4 memory[];
  const Shape& s = args.shape;
  const Bands& bands = args.list.bands;
  const i32 plane = divided(i32(blockIdx.x), bands.count), channels = i32(s.channels);
  const i32 band = i32(blockIdx.x) - plane * bands.count;
  const i32 image = divided(plane, channels), channel = plane - image * channels;
  const i32 top = band * bands.step, left = i32(blockIdx.y) * kColumns;
  const i32 height = min_of(bands.height, i32(s.height) - top);
  const i32 width = min_of(kColumns, i32(s.width) - left);
  T* sums = reinterpret_cast<T*>(memory);
  u32* owners = reinterpret_cast<u32*>(sums + bands.height * min_of(kColumns, i32(s.width)));
#pragma unroll 1
  for (i32 i = threadIdx.x; i < height * width; i += kBlockSize) {
    sums[i] = T(0);
    if (kDeterministic) owners[i] = kNobody;
  }
  __syncthreads();

  const Range part = args.list.parts[image * bands.count + band];
  const i32 pooled_width = i32(s.pooled_width), across = min_of(pooled_width, kBlockSize);
  const float inverse = count_quotient(1.0f, static_cast<float>(across));
  const i32 first = quotient(i32(threadIdx.x), inverse), step = quotient(kBlockSize, inverse);
  const Index bins = Index(s.pooled_height) * pooled_width, region_size = Index(s.channels) * bins;
  const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output) + channel * bins;
  const auto* argmax = static_cast<const Code<kCodeBytes>*>(args.argmax) + channel * bins;
  // All warps go on together: deterministic ones wait for each other.
#pragma unroll 1
  for (i32 base = part.begin; base < part.end; base += kAtOnce * step) {
#pragma unroll 1
    for (i32 shift = 0; shift < pooled_width; shift += across) {
      const i32 column = threadIdx.x - first * across + shift;
      const i32 end = first < step && column < pooled_width ? part.end : part.begin;
      i32 cell[kAtOnce];
      T gradient[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const i32 i = base + first + j * step;
        cell[j] = -1;
        gradient[j] = T(0);
        if (i >= end) continue;
        const BandEntry entry = args.list.entries[i];
        const Index at = entry.region * region_size + entry.row * pooled_width + column;
        const u32 code = argmax[at];
        gradient[j] = load(grad_output[at]);
        // kNoCell lies below every map.
        const u32 y = (code >> (4 * kCodeBytes)) - top, x = (code & kMask) - left;
        if (y < u32(height) && x < u32(width)) cell[j] = y * width + x;
      }
      add_to_cells<kDeterministic, kAtOnce>(sums, owners, cell, gradient);
    }
  }
  __syncthreads();

  Scalar* grad_input = static_cast<Scalar*>(args.grad_input) +
                       input_offset<Index, false>(s, image, channel, top, left);
  // The band is one piece where it has all columns.
  const bool whole = width == i32(s.width);
  const i32 pieces = whole ? 1 : height, length = whole ? height * width : width;
#pragma unroll 1
  for (i32 piece = 0; piece < pieces; ++piece) {
    at_once<4, kBlockSize>(
        length, [&](i32 i) { return sums[i]; }, [&](i32 i, T sum) { store(grad_input[i], sum); });
    sums += width;
    grad_input += Index(s.width);
  }
}

// ---- channels last: backward ---------------------------------------------------------------------------------------

// A region that touches the tile, and which of its bins may.
struct Touching {
  i32 roi;
  Range rows, columns;
};

// The bins that have a cell in [begin, end); their number is at most a few more than that.
template <class T>
__device__ __forceinline__ Range touching_bins(const Axis<T>& axis, i32 begin, i32 end) {
  if (axis.is_empty) return {0, 0};
  // Bins are in order, so both bounds can be found by halving.
  i32 low = 0, high = axis.pooled;
#pragma unroll 1
  while (low < high) {
    const i32 middle = (low + high) / 2;
    if (axis.end(middle) > begin) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const i32 first = low;
  high = axis.pooled;
#pragma unroll 1
  while (low < high) {
    const i32 middle = (low + high) / 2;
    if (axis.begin(middle) >= end) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {first, low};
}

struct Tile {
  i32 image, y, x;  // of its first cell
};

// Collects, in order, those of kBlockSize regions that touch the tile.
template <class T, int kBlockSize, int kTileHeight, int kTileWidth>
__device__ __forceinline__ int collect(const BackwardArgs& args, const Tile& tile, i64 first,
                                       Touching* list, int* shared) {
  Touching found = {0, {0, 0}, {0, 0}};
  const i64 roi = first + threadIdx.x;
  if (roi < args.shape.rois) {
    const Region<T> region = load_region(static_cast<const T*>(args.boxes), roi, args.shape);
    if (region.image == tile.image) {
      found = {i32(roi), touching_bins(region.y, tile.y, tile.y + kTileHeight),
               touching_bins(region.x, tile.x, tile.x + kTileWidth)};
    }
  }
  const bool touches = !found.rows.is_empty() && !found.columns.is_empty();
  int total;
  const int place = block_exclusive_count<kBlockSize>(touches, shared, total);
  if (touches) list[place] = found;
  __syncthreads();
  return total;
}

// Adds one gradient to the cell that won it, if that is in the tile; `sums` is the lane's column.
template <int kCodeBytes, int kTileHeight, int kTileWidth, class T>
__device__ __forceinline__ void add(const Tile& tile, Code<kCodeBytes> code, T gradient, T* sums) {
  constexpr u32 kMask = (u32(1) << (4 * kCodeBytes)) - 1;
  const u32 y = (code >> (4 * kCodeBytes)) - u32(tile.y), x = (code & kMask) - u32(tile.x);
  if (y < u32(kTileHeight) && x < u32(kTileWidth)) {
    sums[(y * kTileWidth + x) * kWarpSize] += gradient;
  }
}

// Lanes are channels, so kAtOnce bins are kAtOnce coalesced loads.
template <class Scalar, int kCodeBytes, int kTileHeight, int kTileWidth, class T>
__device__ __forceinline__ void add_region(const BackwardArgs& args, const Tile& tile,
                                           const Touching& item, i64 channel, T* sums) {
  constexpr int kAtOnce = 4;
  const Shape& s = args.shape;
  const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output);
  const auto* argmax = static_cast<const Code<kCodeBytes>*>(args.argmax);
  const bool has_channel = channel < s.channels;
#pragma unroll 1
  for (i32 ph = item.rows.begin; ph < item.rows.end; ++ph) {
#pragma unroll 1
    for (i32 pw = item.columns.begin; pw < item.columns.end; pw += kAtOnce) {
      Code<kCodeBytes> code[kAtOnce];
      T gradient[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool exists = has_channel && pw + i < item.columns.end;
        const i64 at = output_offset<true>(s, item.roi, channel, ph * i32(s.pooled_width) + pw + i);
        code[i] = exists ? argmax[at] : kNoCell<kCodeBytes>;
        gradient[i] = exists ? load(grad_output[at]) : T(0);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        add<kCodeBytes, kTileHeight, kTileWidth>(tile, code[i], gradient[i], sums);
      }
    }
  }
}

template <class Scalar, class Index, int kTileHeight, int kTileWidth, class T>
__device__ __forceinline__ void write_tile(const BackwardArgs& args, const Tile& tile, i64 channel,
                                           const T* sums) {
  const Shape& s = args.shape;
  if (channel >= s.channels) return;
  Scalar* grad_input = static_cast<Scalar*>(args.grad_input);
  const i32 rows = min_of(i32(kTileHeight), i32(s.height) - tile.y);
  const i32 columns = min_of(i32(kTileWidth), i32(s.width) - tile.x);
#pragma unroll 1
  for (i32 cell = 0; cell < rows * kTileWidth; ++cell) {
    const i32 y = cell / kTileWidth, x = cell % kTileWidth;
    if (x >= columns) continue;
    store(grad_input[input_offset<Index, true>(s, tile.image, channel, tile.y + y, tile.x + x)],
          sums[cell * kWarpSize]);
  }
}

// Grid: x over the tiles of all images, y over groups of kBlockSize channels. Dynamic shared memory: the sums.
template <class Scalar, class Index, int kCodeBytes, int kBlockSize, int kTileHeight,
          int kTileWidth>
__global__ void __launch_bounds__(kBlockSize) gather(const BackwardArgs args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize, kCells = kTileHeight * kTileWidth;
  extern __shared__ double memory[];
  __shared__ Touching list[kBlockSize];
  __shared__ int shared[kWarps];
  const Shape& s = args.shape;
  const i32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T* sums = reinterpret_cast<T*>(memory) + warp * kCells * kWarpSize + lane;
#pragma unroll 4
  for (int i = 0; i < kCells; ++i) sums[i * kWarpSize] = T(0);

  const i32 across = i32((s.width + kTileWidth - 1) / kTileWidth);
  const i32 down = i32((s.height + kTileHeight - 1) / kTileHeight);
  const i32 row_of_tiles = divided(i32(blockIdx.x), across), image = divided(row_of_tiles, down);
  const Tile tile = {image, (row_of_tiles - image * down) * kTileHeight,
                     (i32(blockIdx.x) - row_of_tiles * across) * kTileWidth};
  const i64 channel = i64(blockIdx.y) * kBlockSize + warp * kWarpSize + lane;
#pragma unroll 1
  for (i64 first = 0; first < s.rois; first += kBlockSize) {
    const int count =
        collect<T, kBlockSize, kTileHeight, kTileWidth>(args, tile, first, list, shared);
#pragma unroll 1
    for (int i = 0; i < count && channel - lane < s.channels; ++i) {
      add_region<Scalar, kCodeBytes, kTileHeight, kTileWidth>(args, tile, list[i], channel, sums);
    }
    __syncthreads();  // the list is filled anew
  }
  write_tile<Scalar, Index, kTileHeight, kTileWidth>(args, tile, channel, sums);
}

}  // namespace torchkiln::roi_pool_backward
