// roi_pool on the GPU.
//
//   forward                 one warp, one region of one channel. Its lanes walk down the columns of a few rows of
//                           bins, which makes loads coalesced; then each lane joins the columns of one bin.
//   forward_channels_last   one thread, one bin of kVector channels; neighbouring threads take neighbouring channels.
//   backward                one block owns one tile of one image and 32 channels a warp; a lane owns its channel. It
//                           goes through the regions that touch the tile, adds what falls into it in shared memory
//                           and writes every cell once: no atomics, no zero fill, and the same bits every time.
// spills: up to 32 bytes for wide types and indices, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/scan.cuh"
#include "detection/roi_pool.h"

namespace torchkiln::roi_pool {

// Where bin (ph, pw) of a channel lies in the output, argmax and grad_output.
template <bool kChannelsLast>
__device__ __forceinline__ i64 output_offset(const Shape& s, i64 roi, i64 channel, i32 bin) {
  const i64 bins = s.pooled_height * s.pooled_width;
  return kChannelsLast ? (roi * bins + bin) * s.channels + channel
                       : (roi * s.channels + channel) * bins + bin;
}

template <class Index, bool kChannelsLast>
__device__ __forceinline__ Index input_offset(const Shape& s, i32 image, i64 channel, i32 y,
                                              i32 x) {
  const Index height = Index(s.height), width = Index(s.width), channels = Index(s.channels);
  return kChannelsLast ? ((Index(image) * height + y) * width + x) * channels + Index(channel)
                       : ((Index(image) * channels + Index(channel)) * height + y) * width + x;
}

template <int kVector, int kCodeBytes, class Scalar, class T>
__device__ __forceinline__ void put(const Args& args, i64 offset, const Best<T>* best,
                                    bool is_empty) {
  Pack<Scalar, kVector> values;
  Pack<Code<kCodeBytes>, kVector> codes;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    store(values.at[i], is_empty ? T(0) : best[i].value);
    codes.at[i] = is_empty ? kNoCell<kCodeBytes> : encode<kCodeBytes>(best[i].y, best[i].x);
  }
  store_pack(static_cast<Scalar*>(args.output) + offset, values);
  if (args.argmax) store_pack(static_cast<Code<kCodeBytes>*>(args.argmax) + offset, codes);
}

// The greatest of a bin, for kVector channels from `channel` on.
template <class Scalar, class Index, bool kChannelsLast, int kVector>
__device__ __forceinline__ void search(const Args& args, i32 image, i64 channel, Range rows,
                                       Range columns, Best<Acc<Scalar>>* best) {
  using T = Acc<Scalar>;
  const Scalar* input = static_cast<const Scalar*>(args.input);
  const Index step = kChannelsLast ? Index(args.shape.channels) : Index(1);
#pragma unroll
  for (int i = 0; i < kVector; ++i) best[i] = worst<T>(rows.begin, columns.begin);
#pragma unroll 1
  for (i32 y = rows.begin; y < rows.end; ++y) {
    const Scalar* at =
        input + input_offset<Index, kChannelsLast>(args.shape, image, channel, y, columns.begin);
#pragma unroll 4
    for (i32 x = columns.begin; x < columns.end; ++x) {
      const auto values = load_pack<kVector>(at);
#pragma unroll
      for (int i = 0; i < kVector; ++i) best[i].take(load(values.at[i]), y, x);
      at += step;
    }
  }
}

// What a block works on: one region, and a group of channels. Regions go over x and groups over y: blocks that run at
// the same time read the same channels of all regions, which the L2 cache holds.

template <class Scalar, class Index, int kCodeBytes, int kVector, int kBlockSize, int kLanes>
__global__ void __launch_bounds__(kBlockSize) forward_channels_last(const Args args) {
  using T = Acc<Scalar>;
  const Shape& s = args.shape;
  const i64 channel = (i64(blockIdx.y) * kLanes + threadIdx.x % kLanes) * kVector;
  if (channel >= s.channels) return;
  const Region<T> region = load_region(static_cast<const T*>(args.boxes), blockIdx.x, s);
  const i32 pooled_width = i32(s.pooled_width), bins = i32(s.pooled_height) * pooled_width;
#pragma unroll 1
  for (i32 bin = threadIdx.x / kLanes; bin < bins; bin += kBlockSize / kLanes) {
    const i32 row = quotient(bin, s.inverse_pooled_width);
    const Range rows = region.y.bin_of(row);
    const Range columns = region.x.bin_of(bin - row * pooled_width);
    const bool is_empty = region.image < 0 || rows.is_empty() || columns.is_empty();
    Best<T> best[kVector];
    if (!is_empty) {
      search<Scalar, Index, true, kVector>(args, region.image, channel, rows, columns, best);
    }
    put<kVector, kCodeBytes, Scalar>(args, output_offset<true>(s, blockIdx.x, channel, bin), best,
                                     is_empty);
  }
}

// The greatest of each column of a bin's rows, for the columns of the region that the image has.
template <class T>
struct Columns {
  static constexpr i32 kCapacity = 512;
  T value[kCapacity];
  i32 row[kCapacity];
};

// Fills row-of-bins `first` and the `count - 1` after it.
template <class Scalar, class Index, class T>
__device__ __forceinline__ void walk_columns(const Args& args, const Region<T>& region, i64 channel,
                                             i32 first, i32 count, Range window, Columns<T>& out) {
  const Scalar* plane = static_cast<const Scalar*>(args.input) +
                        input_offset<Index, false>(args.shape, region.image, channel, 0, 0);
  const i32 width = window.end - window.begin, stride = i32(args.shape.width);
  const float inverse_width = __fdividef(1.0f, static_cast<float>(width));
#pragma unroll 1
  for (i32 item = threadIdx.x % kWarpSize; item < count * width; item += kWarpSize) {
    const i32 row = quotient(item, inverse_width);
    const i32 x = window.begin + item - row * width;
    const Range rows = region.y.bin_of(first + row);
    const Scalar* at = plane + Index(rows.begin) * stride + x;
    Best<T> best = worst<T>(rows.begin, x);
#pragma unroll 4
    for (i32 y = rows.begin; y < rows.end; ++y) {
      best.take(load(*at), y, x);
      at += stride;
    }
    out.value[item] = best.value;
    out.row[item] = best.y;
  }
}

// One bin out of its columns.
template <class T>
__device__ __forceinline__ Best<T> join_columns(const Columns<T>& in, i32 offset, Range window,
                                                Range columns) {
  const i32 begin = offset - window.begin;
  Best<T> best = {in.value[begin + columns.begin], in.row[begin + columns.begin], columns.begin};
#pragma unroll 1
  for (i32 x = columns.begin + 1; x < columns.end; ++x) {
    best.take_any_order(in.value[begin + x], in.row[begin + x], x);
  }
  return best;
}

// kByColumns: see above; otherwise, and where a region is too wide, a lane searches one bin.
template <class Scalar, class Index, int kCodeBytes, int kBlockSize, int kChannels, bool kByColumns>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize;
  __shared__ Columns<T> shared[kByColumns ? kWarps : 1];
  Columns<T>& columns_of_warp = shared[kByColumns ? threadIdx.x / kWarpSize : 0];
  const Shape& s = args.shape;
  const Region<T> region = load_region(static_cast<const T*>(args.boxes), blockIdx.x, s);
  const i32 pooled_height = i32(s.pooled_height), pooled_width = i32(s.pooled_width);
  const Range window = {region.x.bin_of(0).begin, region.x.bin_of(pooled_width - 1).end};
  const i32 width = max_of(window.end - window.begin, 1);
  const bool by_columns = kByColumns && width <= Columns<T>::kCapacity && region.image >= 0;
  const i32 rows_at_once =
      by_columns ? min_of(Columns<T>::kCapacity / width, pooled_height) : pooled_height;
  const i64 end = min_of(s.channels, i64(blockIdx.y + 1) * kChannels);
#pragma unroll 1
  for (i64 c = i64(blockIdx.y) * kChannels + threadIdx.x / kWarpSize; c < end; c += kWarps) {
#pragma unroll 1
    for (i32 first = 0; first < pooled_height; first += rows_at_once) {
      const i32 count = min_of(rows_at_once, pooled_height - first);
      if (by_columns) {
        __syncwarp();  // the lanes may still be reading the rows before
        walk_columns<Scalar, Index>(args, region, c, first, count, window, columns_of_warp);
        __syncwarp();
      }
#pragma unroll 1
      for (i32 item = threadIdx.x % kWarpSize; item < count * pooled_width; item += kWarpSize) {
        const i32 row = quotient(item, s.inverse_pooled_width);
        const Range rows = region.y.bin_of(first + row);
        const Range columns = region.x.bin_of(item - row * pooled_width);
        const bool is_empty = region.image < 0 || rows.is_empty() || columns.is_empty();
        Best<T> best = worst<T>(0, 0);
        if (!is_empty && by_columns) {
          best = join_columns(columns_of_warp, row * width, window, columns);
        } else if (!is_empty) {
          search<Scalar, Index, false, 1>(args, region.image, c, rows, columns, &best);
        }
        put<1, kCodeBytes, Scalar>(
            args, output_offset<false>(s, blockIdx.x, c, first * pooled_width + item), &best,
            is_empty);
      }
    }
  }
}

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
  const int place = block_exclusive_sum<kBlockSize>(touches, shared, total);
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
__device__ __forceinline__ void add_region_channels_last(const BackwardArgs& args, const Tile& tile,
                                                         const Touching& item, i64 channel,
                                                         T* sums) {
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

// Channels first: what 32 channels have of kStaged bins goes through shared memory, to turn it round.
constexpr int kStaged = 16;
template <class T>
struct Stage {
  T gradient[kWarpSize][kStaged + 1];
  u32 code[kWarpSize][kStaged + 1];
};

template <class Scalar, int kCodeBytes, int kTileHeight, int kTileWidth, class T>
__device__ __forceinline__ void add_region(const BackwardArgs& args, const Tile& tile,
                                           const Touching& item, i64 first_channel, Stage<T>& stage,
                                           T* sums) {
  const Shape& s = args.shape;
  const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output);
  const auto* argmax = static_cast<const Code<kCodeBytes>*>(args.argmax);
  const i32 lane = threadIdx.x % kWarpSize, pooled_width = i32(s.pooled_width);
  const i32 columns = item.columns.end - item.columns.begin;
  const i32 bins = columns * (item.rows.end - item.rows.begin);
  const float inverse_columns = __fdividef(1.0f, static_cast<float>(columns));
  const i64 first_offset = output_offset<false>(s, item.roi, first_channel, 0);
  const i64 channel_stride = s.pooled_height * s.pooled_width;
#pragma unroll 1
  for (i32 first = 0; first < bins; first += kStaged) {
    const i32 count = min_of(bins - first, kStaged);
    const i32 mine = lane % kStaged, index = first + mine;
    const i32 bin =
        (item.rows.begin + index / columns) * pooled_width + item.columns.begin + index % columns;
    __syncwarp();  // the lanes may still be reading the bins before
#pragma unroll 4
    for (int c = lane / kStaged; c < kWarpSize; c += kWarpSize / kStaged) {
      const bool exists = mine < count && first_channel + c < s.channels;
      const i64 at = first_offset + c * channel_stride + bin;
      stage.code[c][mine] = exists ? u32(argmax[at]) : u32(kNoCell<kCodeBytes>);
      stage.gradient[c][mine] = exists ? load(grad_output[at]) : T(0);
    }
    __syncwarp();
#pragma unroll 1
    for (i32 i = 0; i < count; ++i) {
      add<kCodeBytes, kTileHeight, kTileWidth>(tile, Code<kCodeBytes>(stage.code[lane][i]),
                                               stage.gradient[lane][i], sums);
    }
  }
}

// Writes the warp's sums; neighbouring lanes write neighbouring elements.
template <class Scalar, class Index, bool kChannelsLast, int kTileHeight, int kTileWidth, class T>
__device__ __forceinline__ void write_tile(const BackwardArgs& args, const Tile& tile,
                                           i64 first_channel, Stage<T>* stage, const T* sums) {
  const Shape& s = args.shape;
  Scalar* grad_input = static_cast<Scalar*>(args.grad_input);
  const i32 lane = threadIdx.x % kWarpSize;
  const i32 rows = min_of(i32(kTileHeight), i32(s.height) - tile.y);
  const i32 columns = min_of(i32(kTileWidth), i32(s.width) - tile.x);
  const i32 channels = i32(min_of(i64(kWarpSize), s.channels - first_channel));
  if (kChannelsLast) {
    if (lane >= channels) return;
#pragma unroll 1
    for (i32 cell = 0; cell < rows * kTileWidth; ++cell) {
      const i32 y = cell / kTileWidth, x = cell % kTileWidth;
      if (x >= columns) continue;
      store(grad_input[input_offset<Index, true>(s, tile.image, first_channel + lane, tile.y + y,
                                                 tile.x + x)],
            sums[cell * kWarpSize + lane]);
    }
    return;
  }
  // 16 cells of all channels at a time, turned round in the stage.
#pragma unroll 1
  for (i32 first = 0; first < rows * kTileWidth; first += kStaged) {
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < kStaged; ++i) {
      stage->gradient[lane][i] = sums[(first + i) * kWarpSize + lane];
    }
    __syncwarp();
    const i32 cell = first + lane % kStaged;
    const i32 y = cell / kTileWidth, x = cell % kTileWidth;
    if (y < rows && x < columns) {
#pragma unroll 1
      for (i32 c = lane / kStaged; c < channels; c += kWarpSize / kStaged) {
        store(grad_input[input_offset<Index, false>(s, tile.image, first_channel + c, tile.y + y,
                                                    tile.x + x)],
              stage->gradient[c][lane % kStaged]);
      }
    }
  }
}

// Grid: x over the tiles of all images, y over groups of kBlockSize channels. Dynamic shared memory: a stage per warp
// (channels first), then the sums.
template <class Scalar, class Index, bool kChannelsLast, int kCodeBytes, int kBlockSize,
          int kTileHeight, int kTileWidth>
__global__ void __launch_bounds__(kBlockSize) backward(const BackwardArgs args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize, kCells = kTileHeight * kTileWidth;
  extern __shared__ double memory[];
  __shared__ Touching list[kBlockSize];
  __shared__ int shared[kWarps];
  const Shape& s = args.shape;
  const i32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  Stage<T>* stages = reinterpret_cast<Stage<T>*>(memory);
  T* sums = reinterpret_cast<T*>(stages + (kChannelsLast ? 0 : kWarps)) + warp * kCells * kWarpSize;
#pragma unroll 4
  for (int i = 0; i < kCells; ++i) sums[i * kWarpSize + lane] = T(0);

  const i32 across = i32((s.width + kTileWidth - 1) / kTileWidth);
  const i32 down = i32((s.height + kTileHeight - 1) / kTileHeight);
  const i32 row_of_tiles = i32(blockIdx.x) / across;
  const Tile tile = {row_of_tiles / down, row_of_tiles % down * kTileHeight,
                     i32(blockIdx.x) % across * kTileWidth};
  const i64 first_channel = i64(blockIdx.y) * kBlockSize + warp * kWarpSize;
#pragma unroll 1
  for (i64 first = 0; first < s.rois; first += kBlockSize) {
    const int count =
        collect<T, kBlockSize, kTileHeight, kTileWidth>(args, tile, first, list, shared);
#pragma unroll 1
    for (int i = 0; i < count && first_channel < s.channels; ++i) {
      if (kChannelsLast) {
        add_region_channels_last<Scalar, kCodeBytes, kTileHeight, kTileWidth>(
            args, tile, list[i], first_channel + lane, sums + lane);
      } else {
        add_region<Scalar, kCodeBytes, kTileHeight, kTileWidth>(args, tile, list[i], first_channel,
                                                                stages[warp], sums + lane);
      }
    }
    __syncthreads();  // the list is filled anew
  }
  if (first_channel < s.channels) {
    write_tile<Scalar, Index, kChannelsLast, kTileHeight, kTileWidth>(
        args, tile, first_channel, kChannelsLast ? nullptr : stages + warp, sums);
  }
}

}  // namespace torchkiln::roi_pool
