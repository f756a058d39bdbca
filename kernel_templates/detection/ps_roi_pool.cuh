// ps_roi_align and ps_roi_pool on the GPU. All regions take the same bin out of a map, and outputs share the geometry of
// a bin.
//
//   staged    NCHW, maps that fit into shared memory: a block keeps those of kMaps outputs of one bin and walks all
//             regions; one thread, one region, its geometry included
//   staged_backward  NCHW: a block owns rows of the gradient of one bin's maps, as many outputs as a warp has lanes, with
//             the output innermost in shared memory. Outputs share the geometry of a bin: a warp owns a row, or a part of
//             it, and adds the regions that touch it one by one, lanes on outputs. No atomics, no zero fill, the same
//             bits every time
//
// The others go by the tables of roi_align, what a bin takes of rows and of columns:
//
//   tables    one thread per bin of an axis of a region: merged samples, or whole cells
//   forward   a block stays on the maps of a row of bins (channels that are neighbours) and walks all regions of their
//             image, so that these maps are fetched from L2 once and then hit L1; one thread, one bin
//
// Maps in channels_last are copied for the staged ones: those of one bin lie far apart there.
// spills: up to 24 bytes in staged_backward, outside of the loop over pixels.
// compile time: staged_backward takes above 250 ms; it lists regions, lays out their bins and adds them in one kernel
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/ps_roi_pool.h"
#include "detection/roi_align.cuh"
#include "detection/roi_align_backward.cuh"

namespace torchkiln::ps_roi_pool {

using roi_align::AxisBin;
using roi_align::Span;
using roi_align::Table;

template <class Scalar, int kPooling, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) tables(const Args args) {
  using T = Acc<Scalar>;
  const AxisBin at = roi_align::own_bin<kBlockSize>(args.regions, blockIdx.x);
  if (at.region >= args.regions.k) return;
  const i32 image = roi_align::image_of<T>(args.regions, at.region);
  const auto write = [&](auto axis) {
    if (image < 0) clear(axis);
    roi_align::write_taps<T>(args, args.regions, at, axis, image);
  };
  if constexpr (kPooling == kSamples) {
    write(roi_align::axis_at<T>(args.regions, at.region, at.columns));
  } else {
    write(cells_at<T>(args, at.region, at.columns));
  }
}

// ---- forward: maps in shared memory -----------------------------------------------------------------------------------------

// The maps of a block: `count` outputs from `output` on of one bin of an image.
struct OwnMaps {
  i32 image, bin, row_bin, column_bin, output, count, bins;

  // Of the map number m.
  __device__ __forceinline__ i32 channel(i32 m) const { return (output + m) * bins + bin; }
};

// Neighbouring blocks have neighbouring bins. `block` becomes the number among the blocks on the same maps.
template <int kMaps>
__device__ __forceinline__ OwnMaps own_maps(const Regions& r, u32& block) {
  OwnMaps own;
  own.bins = i32(r.pooled_h * r.pooled_w);
  const i32 outputs = divided(i32(r.c), own.bins);
  const u32 groups = u32(outputs + kMaps - 1) / kMaps;
  own.bin = i32(block % u32(own.bins));
  block /= u32(own.bins);
  own.output = i32(block % groups) * kMaps;
  block /= groups;
  own.image = i32(block % u32(r.n));
  block /= u32(r.n);
  own.row_bin = divided(own.bin, i32(r.pooled_w));
  own.column_bin = own.bin - own.row_bin * i32(r.pooled_w);
  own.count = min_of(outputs - own.output, kMaps);
  return own;
}

// The averages of a bin's samples, or cells, on kMaps maps that lie `pitch` apart.
template <class Scalar, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ void average_samples(const Args& args, i64 region, const OwnMaps& own,
                                                const Scalar* cells, i32 pitch, T* sums) {
  const Regions& r = args.regions;
  const i32 width = i32(r.w);
  const roi_align::Axis<T> y = roi_align::axis_at<T>(r, region, false);
  const roi_align::Axis<T> x = roi_align::axis_at<T>(r, region, true);
  if (is_empty(y) || is_empty(x)) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) sums[m] = T(args.of_none);
    return;
  }
  const T share_y = count_quotient(T(1), T(y.count));
  const T share_x = count_quotient(T(1), T(x.count));
  i32 y_first, y_last, x_first, x_last;
  sample_range(y, own.row_bin, r.h, y_first, y_last);
  sample_range(x, own.column_bin, r.w, x_first, x_last);
#pragma unroll 1
  for (i32 i = y_first; i < y_last; ++i) {
    const Taps<T> row = sample_taps(y, own.row_bin, i, r.h);
    if (!row.inside) continue;
    const Scalar* low = cells + row.low * width;
    const Scalar* high = cells + row.high * width;
    const T of_low = row.weight_low * share_y, of_high = row.weight_high * share_y;
#pragma unroll 1
    for (i32 j = x_first; j < x_last; ++j) {
      const Taps<T> column = sample_taps(x, own.column_bin, j, width);
      if (!column.inside) continue;
      const T left = column.weight_low * share_x, right = column.weight_high * share_x;
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
        const i32 at = m * pitch;
        sums[m] +=
            of_low * (left * load(low[at + column.low]) + right * load(low[at + column.high]));
        sums[m] +=
            of_high * (left * load(high[at + column.low]) + right * load(high[at + column.high]));
      }
    }
  }
}
template <class Scalar, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ void average_cells(const Args& args, i64 region, const OwnMaps& own,
                                              const Scalar* cells, i32 pitch, T* sums) {
  const i32 width = i32(args.regions.w);
  const Range rows = cells_at<T>(args, region, false).bins.bin_of(own.row_bin);
  const Range columns = cells_at<T>(args, region, true).bins.bin_of(own.column_bin);
  if (rows.is_empty() || columns.is_empty()) return;
  const T share_y = count_quotient(T(1), T(rows.end - rows.begin));
  const T share_x = count_quotient(T(1), T(columns.end - columns.begin));
#pragma unroll 1
  for (i32 y = rows.begin; y < rows.end; ++y) {
    T of_row[kMaps] = {};
#pragma unroll 1
    for (i32 x = columns.begin; x < columns.end; ++x) {
#pragma unroll
      for (int m = 0; m < kMaps; ++m) of_row[m] += share_x * load(cells[m * pitch + y * width + x]);
    }
#pragma unroll
    for (int m = 0; m < kMaps; ++m) sums[m] += share_y * of_row[m];
  }
}

// Copies maps that lie `step` apart to shared memory, kWidth elements at once, those of all maps in flight together. In the
// place of those that are not there stands the last one: they are read all the same.
template <int kWidth, int kMaps, int kBlockSize, class Scalar, class Index>
__device__ __forceinline__ void copy_maps(const Scalar* from, Index step, i32 count, i32 size,
                                          Scalar* to, i32 pitch) {
  struct Cells {
    Pack<Scalar, kWidth> of_map[kMaps];
  };
  const auto load_cells = [&](i32 i) {
    Cells cells;
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      cells.of_map[m] = load_pack<kWidth>(from + min_of(m, count - 1) * step + i * kWidth);
    }
    return cells;
  };
  const auto store_cells = [&](i32 i, const Cells& cells) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      store_pack<kWidth>(to + m * pitch + i * kWidth, cells.of_map[m]);
    }
  };
  at_once<4, kBlockSize>(size / kWidth, load_cells, store_cells);
}

// Grid: x over groups of kMaps maps, y over groups of regions. Dynamic shared memory: the maps.
template <class Scalar, class Index, int kPooling, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged(const Args args) {
  using T = Acc<Scalar>;
  extern __shared__ uint4 memory[];
  Scalar* cells = reinterpret_cast<Scalar*>(memory);
  const Regions& r = args.regions;
  u32 block = blockIdx.x;
  const OwnMaps own = own_maps<kMaps>(r, block);
  const i32 size = i32(r.h * r.w), pitch = roi_align::band_pitch(i32(r.h), i32(r.w));
  const Scalar* maps = static_cast<const Scalar*>(args.maps) + Index(own.image) * Index(r.c) * size;
  const Index step = Index(own.bins) * size;
  const Scalar* first = maps + Index(own.channel(0)) * size;
  if (size % 2 == 0 && reinterpret_cast<u64>(first) % (2 * sizeof(Scalar)) == 0) {
    copy_maps<2, kMaps, kBlockSize>(first, step, own.count, size, cells, pitch);
  } else {
    copy_maps<1, kMaps, kBlockSize>(first, step, own.count, size, cells, pitch);
  }
  __syncthreads();
#pragma unroll 1
  for (i64 region = i64(blockIdx.y) * kBlockSize + threadIdx.x; region < r.k;
       region += i64(gridDim.y) * kBlockSize) {
    const i32 home = roi_align::image_of<T>(r, region);
    // The bins of a region of no image are zeros; the blocks of the first one write them.
    if (home != own.image && !(home < 0 && own.image == 0)) continue;
    T sums[kMaps] = {};
    if (home < 0) {
    } else if constexpr (kPooling == kSamples) {
      average_samples<Scalar, kMaps>(args, region, own, cells, pitch, sums);
    } else {
      average_cells<Scalar, kMaps>(args, region, own, cells, pitch, sums);
    }
    const Index first = Index(region) * Index(r.c);
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      if (m >= own.count) break;
      const i32 channel = own.channel(m);
      store(static_cast<Scalar*>(args.bins)[first + channel], sums[m]);
      if (args.channels) args.channels[first + channel] = channel;
    }
  }
}

// ---- backward: rows of gradients in shared memory ------------------------------------------------------------------

constexpr int kEntries = 64;  // regions of a batch

// The tile of a block.
struct OwnTile {
  i32 y, x, height, width;
};
__device__ __forceinline__ OwnTile own_tile(const Regions& r, i64 most_rows, u32 block) {
  const TileSize size = tile_size(r.h, r.w, most_rows);
  const i32 across = divided(i32(r.w) + size.width - 1, size.width);
  const i32 row = divided(i32(block), across), y = row * size.height;
  const i32 x = (i32(block) - row * across) * size.width;
  return {y, x, min_of(size.height, i32(r.h) - y), min_of(size.width, i32(r.w) - x)};
}

// One region's bin in a tile; pixels count from the tile's first one. Cells need no weights.
template <class T, int kRows>
struct Entry {
  i32 size;  // of a bin of cells
  Range rows, columns;
  T row_weights[kRows], column_weights[kMostTileWidth];
};

__device__ __forceinline__ bool overlap(const Range& a, i32 begin, i32 end) {
  return a.begin < end && a.end > begin;
}

// Those that a bin takes, or a few more.
template <int kPooling, class T>
__device__ __forceinline__ Range pixels_around(const Args& args, i64 region, bool columns,
                                               i32 bin) {
  if constexpr (kPooling == kCells) {
    return cells_at<T>(args, region, columns).bins.bin_of(bin);
  } else {
    const Regions& r = args.regions;
    const roi_align::Axis<T> axis = roi_align::axis_at<T>(r, region, columns);
    if (is_empty(axis)) return {0, 0};
    const auto pixels = roi_align_backward::pixels_of(axis, bin, i32(columns ? r.w : r.h));
    return {pixels.low, pixels.high + 1};
  }
}
template <int kPooling, class T>
__device__ __forceinline__ bool touches(const Args& args, const OwnMaps& own, const OwnTile& tile,
                                        i64 region) {
  if (region >= args.regions.k || roi_align::image_of<T>(args.regions, region) != own.image) {
    return false;
  }
  const Range rows = pixels_around<kPooling, T>(args, region, false, own.row_bin);
  const Range columns = pixels_around<kPooling, T>(args, region, true, own.column_bin);
  return overlap(rows, tile.y, tile.y + tile.height) && !rows.is_empty() &&
         overlap(columns, tile.x, tile.x + tile.width) && !columns.is_empty();
}

// One axis of a tile, for one of an entry.
template <class T>
struct Side {
  bool columns;
  i32 bin, low, count;
  Range* pixels;
  T* weights;
};
// The number of all pixels of a bin of cells.
template <int kPooling, class T>
__device__ __forceinline__ i32 fill_side(const Args& args, i64 region, const Side<T>& to) {
  if constexpr (kPooling == kCells) {
    const Range cells = pixels_around<kPooling, T>(args, region, to.columns, to.bin);
    *to.pixels = {max_of(cells.begin - to.low, 0), min_of(cells.end - to.low, to.count)};
    return cells.end - cells.begin;
  } else {
    const Regions& r = args.regions;
    const i64 size = to.columns ? r.w : r.h;
    const roi_align::Axis<T> axis = roi_align::axis_at<T>(r, region, to.columns);
    const T share = axis.count > 0 ? count_quotient(T(1), T(axis.count)) : T(0);
#pragma unroll 1
    for (i32 i = 0; i < to.count; ++i) to.weights[i] = T(0);
    Range pixels = {to.count, 0};
    const auto add = [&](i32 pixel, T weight) {
      const i32 i = pixel - to.low;
      if (i < 0 || i >= to.count) return;
      pixels = {min_of(pixels.begin, i), i + 1};
      to.weights[i] += weight;
    };
    i32 first, last;
    sample_range(axis, to.bin, size, first, last);
#pragma unroll 1
    for (i32 i = first; i < last; ++i) {
      const Taps<T> taps = sample_taps(axis, to.bin, i, size);
      if (!taps.inside) continue;
      add(taps.low, taps.weight_low * share);
      if (taps.high != taps.low) add(taps.high, taps.weight_high * share);
    }
    *to.pixels = pixels;
    return 0;
  }
}

// Two lanes an entry.
template <int kPooling, int kRows, int kBlockSize, class T>
__device__ __forceinline__ void fill_entries(const Args& args, const OwnMaps& own,
                                             const OwnTile& tile, i64 begin, const i32* regions,
                                             int count, Entry<T, kRows>* entries) {
  constexpr int kOfWarp = kWarpSize / 2;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool columns = lane % 2 != 0;
#pragma unroll 1
  for (int first = warp * kOfWarp; first < count; first += kBlockSize / 2) {
    const int i = first + lane / 2;
    i32 size = 0;
    if (i < count) {
      Entry<T, kRows>& entry = entries[i];
      const Side<T> side = {columns,
                            columns ? own.column_bin : own.row_bin,
                            columns ? tile.x : tile.y,
                            columns ? tile.width : tile.height,
                            columns ? &entry.columns : &entry.rows,
                            columns ? &entry.column_weights[0] : &entry.row_weights[0]};
      size = fill_side<kPooling>(args, begin + regions[i], side);
    }
    size *= __shfl_xor_sync(0xffffffffu, size, 1);
    if (i < count && columns) entries[i].size = size;
  }
}

// The gradients of a batch, output innermost, as many for each thread.
template <class Scalar, int kOutputs, int kBlockSize>
struct Gradients {
  static constexpr int kOfThread = (kEntries * kOutputs + kBlockSize - 1) / kBlockSize;
  Scalar at[kOfThread];
};
// Asks for all of them at once.
template <class Index, class Scalar, int kOutputs, int kBlockSize>
__device__ __forceinline__ void ask_gradients(const Args& args, const OwnMaps& own, i64 begin,
                                              const i32* regions, int count,
                                              Gradients<Scalar, kOutputs, kBlockSize>& asked) {
  const Scalar* all = static_cast<const Scalar*>(args.bins);
#pragma unroll
  for (int i = 0; i < asked.kOfThread; ++i) {
    const int item = i * kBlockSize + threadIdx.x, output = item % kOutputs;
    const bool exists = item / kOutputs < count && output < own.count;
    asked.at[i] = {};
    if (exists) {
      const i64 region = begin + regions[item / kOutputs];
      asked.at[i] = all[Index(region) * Index(args.regions.c) + own.channel(output)];
    }
  }
}
// Those of cells are divided by their number.
template <int kPooling, int kRows, class Scalar, int kOutputs, int kBlockSize,
          class T = Acc<Scalar>>
__device__ __forceinline__ void keep_gradients(const Gradients<Scalar, kOutputs, kBlockSize>& asked,
                                               const Entry<T, kRows>* entries, int count,
                                               T* gradients) {
#pragma unroll
  for (int i = 0; i < asked.kOfThread; ++i) {
    const int item = i * kBlockSize + threadIdx.x;
    if (item >= count * kOutputs) continue;
    const T gradient = load(asked.at[i]);
    gradients[item] = kPooling == kCells ? gradient / T(entries[item / kOutputs].size) : gradient;
  }
}

// Adds a batch, in order, to the row, or the part of it, that the warp owns.
template <int kPooling, int kRows, int kOutputs, int kBlockSize, class T>
__device__ __forceinline__ void add_batch(const OwnMaps& own, const OwnTile& tile,
                                          const Entry<T, kRows>* entries, int count,
                                          const T* gradients, T* sums, int pitch) {
  constexpr int kWarps = kBlockSize / kWarpSize, kParts = kWarps / kRows;
  constexpr int kAcross = kWarpSize / kOutputs, kAtOnce = 4;  // pixels: of a warp, and of a lane
  static_assert(kWarps % kRows == 0 && kWarpSize % kOutputs == 0);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int output = lane % kOutputs, first_pixel = lane / kOutputs;
  const i32 y = warp % kRows, part = (tile.width + kParts - 1) / kParts;
  const i32 begin = warp / kRows * part, end = min_of(begin + part, tile.width);
  T* row = sums + y * tile.width * pitch + output;
#pragma unroll 1
  for (int first = 0; first < count; first += kWarpSize) {
    const bool exists = first + lane < count;
    const Entry<T, kRows>& own_entry = entries[exists ? first + lane : 0];
    u32 hits = __ballot_sync(0xffffffffu, exists && overlap(own_entry.rows, y, y + 1) &&
                                              overlap(own_entry.columns, begin, end));
#pragma unroll 1
    for (; hits != 0; hits &= hits - 1) {
      __syncwarp();  // a pixel is another lane's than in the entry before
      const int i = first + __ffs(hits) - 1;
      const Entry<T, kRows>& entry = entries[i];
      T gradient = gradients[i * kOutputs + output];
      if constexpr (kPooling == kSamples) {
        const T weight = entry.row_weights[y];
        if (weight == T(0)) continue;  // between those that samples touch
        gradient *= weight;
      }
      const i32 last = output < own.count ? min_of(entry.columns.end, end) : 0;
#pragma unroll 1
      for (i32 x = max_of(entry.columns.begin, begin) + first_pixel; x < last;
           x += kAcross * kAtOnce) {
        T sum[kAtOnce];
        bool takes[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const i32 at = x + j * kAcross;
          takes[j] = at < last;
          T share = gradient;
          if constexpr (kPooling == kSamples) {
            const T weight = takes[j] ? entry.column_weights[at] : T(0);
            takes[j] = weight != T(0);
            share *= weight;
          }
          if (takes[j]) sum[j] = row[at * pitch] + share;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (takes[j]) row[(x + j * kAcross) * pitch] = sum[j];
        }
      }
    }
  }
}

// Grid: one-dimensional, groups of kOutputs maps for each tile. Dynamic shared memory: the sums of a tile.
template <class Scalar, class Index, int kPooling, int kRows, int kOutputs, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, sizeof(Acc<Scalar>) == 8 ? 1 : 1024 / kBlockSize)
    staged_backward(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize;
  extern __shared__ uint4 memory[];
  __shared__ Entry<T, kRows> entries[kEntries];
  __shared__ T gradients[kEntries * kOutputs];
  __shared__ i32 list[kBlockSize];
  __shared__ int partial[kWarps];
  const Regions& r = args.regions;
  u32 block = blockIdx.x;
  const OwnMaps own = own_maps<kOutputs>(r, block);
  const OwnTile tile = own_tile(r, kRows, block);
  const int pitch = sum_pitch(own.count);
  T* sums = reinterpret_cast<T*>(memory);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.height * tile.width * pitch; i += kBlockSize) sums[i] = T(0);
  __syncthreads();
#pragma unroll 1
  for (i64 begin = 0; begin < r.k; begin += kBlockSize) {
    const bool listed = touches<kPooling, T>(args, own, tile, begin + threadIdx.x);
    int total;
    const int slot = block_exclusive_count<kBlockSize>(listed, partial, total);
    if (listed) list[slot] = i32(threadIdx.x);
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < total; first += kEntries) {
      const int count = min_of(total - first, kEntries);
      Gradients<Scalar, kOutputs, kBlockSize> asked;
      ask_gradients<Index>(args, own, begin, list + first, count, asked);
      fill_entries<kPooling, kRows, kBlockSize>(args, own, tile, begin, list + first, count,
                                                entries);
      __syncthreads();
      keep_gradients<kPooling>(asked, entries, count, gradients);
      __syncthreads();
      add_batch<kPooling, kRows, kOutputs, kBlockSize>(own, tile, entries, count, gradients, sums,
                                                       pitch);
      __syncthreads();
    }
  }
  const Index size = Index(r.h) * Index(r.w), step = Index(own.bins) * size;
  Scalar* maps =
      static_cast<Scalar*>(args.maps) + (Index(own.image) * Index(r.c) + own.channel(0)) * size;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (int item = warp; item < own.count * tile.height; item += kWarps) {
    const int m = item / tile.height, y = item - m * tile.height;
    Scalar* to = maps + Index(m) * step + Index(tile.y + y) * Index(r.w) + tile.x;
    const T* from = sums + y * tile.width * pitch + m;
#pragma unroll 1
    for (int x = lane; x < tile.width; x += kWarpSize) store(to[x], from[x * pitch]);
  }
}

// ---- by tables -----------------------------------------------------------------------------------------------------

// Grid: x over the rows of bins of the outputs of all images, y over groups of regions.
template <class Scalar, class Index, bool kLast, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const i32 pooled_h = i32(r.pooled_h), pooled_w = i32(r.pooled_w);
  const i32 rows_of_bins = divided(i32(r.c), pooled_w), outputs = divided(rows_of_bins, pooled_h);
  const i32 image = divided(i32(blockIdx.x), rows_of_bins);
  const i32 row_of_bins = i32(blockIdx.x) - image * rows_of_bins;
  const i32 output = divided(row_of_bins, pooled_h), row_bin = row_of_bins - output * pooled_h;
  const Index map_size = Index(r.h) * Index(r.w), stride = kLast ? Index(r.c) : 1;
  const Scalar* maps = static_cast<const Scalar*>(args.maps) + Index(image) * Index(r.c) * map_size;
  const i32 across = min_of(pooled_w, kBlockSize), step = divided(kBlockSize, across);
  const i32 first = threadIdx.x / across, first_bin = threadIdx.x % across;
  if (first >= step) return;
#pragma unroll 1
  for (i64 region = i64(blockIdx.y) * step + first; region < r.k; region += i64(gridDim.y) * step) {
    const Span span = static_cast<const Span*>(args.spans)[region];
    const i32 home = span.image;
    // A region of no image has no taps; the blocks of the first image write its zeros.
    if (home != image && !(home < 0 && image == 0)) continue;
    const Table<T> table = roi_align::table_of<T>(args, region);
    const Range rows = table.row_bins[row_bin];
    const bool none = home >= 0 && (span.y_last < span.y_first || span.x_last < span.x_first);
#pragma unroll 1
    for (i32 bin = first_bin; bin < pooled_w; bin += across) {
      const i32 channel = row_of_bins * pooled_w + bin;
      const Scalar* map = maps + (kLast ? Index(channel) : Index(channel) * map_size);
      const Range columns = table.column_bins[bin];
      T sum = none ? T(args.of_none) : T(0);
#pragma unroll 1
      for (i32 x = none ? columns.end : columns.begin; x < columns.end; ++x) {
        const Tap<T> column = table.columns[x];
        T of_column = T(0);
#pragma unroll 4
        for (i32 y = rows.begin; y < rows.end; ++y) {
          const Tap<T> row = table.rows[y];
          of_column +=
              row.weight * load(map[(Index(row.pixel) * Index(r.w) + column.pixel) * stride]);
        }
        sum += column.weight * of_column;
      }
      const Index at = kLast ? (Index(region) * (pooled_h * pooled_w) + row_bin * pooled_w + bin) *
                                       Index(outputs) +
                                   output
                             : Index(region) * Index(r.c) + channel;
      store(static_cast<Scalar*>(args.bins)[at], sum);
      if (args.channels) args.channels[at] = channel;
    }
  }
}

}  // namespace torchkiln::ps_roi_pool
