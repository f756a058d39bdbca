// ps_roi_align and ps_roi_pool on the GPU. All regions take the same bin out of a map, and outputs share the geometry of
// a bin.
//
//   staged    NCHW, maps that fit into shared memory: a block keeps those of kMaps outputs of one bin and walks all
//             regions; one thread, one region, its geometry included
//   staged_backward  NCHW: the same for the gradient of these maps, or of a tile of them. A thread owns pixels, and finds
//             the regions of each by two words of bits, those on its row and those on its column: proposals crowd on
//             objects, so that many share a pixel. No atomics, no zero fill, the same bits every time
//
// The others go by the tables of roi_align, what a bin takes of rows and of columns, as staged_backward does too:
//
//   tables    one thread per bin of an axis of a region: merged samples, or whole cells
//   forward   a block stays on the maps of a row of bins (channels that are neighbours) and walks all regions of their
//             image, so that these maps are fetched from L2 once and then hit L1; one thread, one bin
//   backward  channels_last: roi_align's tiles of the gradient, lanes on channels. A lane's bin is that of its channel, so
//             it adds its own taps; gradients of bins lie as channels do, and are read as one piece
// spills: up to 28 bytes in staged_backward, by ptxas' own choice: no kernel asks for a number of blocks.
// compile time: staged takes above 250 ms for samples of three maps, which are unrolled
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/ps_roi_pool.h"
#include "detection/roi_align.cuh"
#include "detection/roi_align_backward.cuh"

namespace torchkiln::ps_roi_pool {

using roi_align::AxisBin;
using roi_align::Span;
using roi_align::Table;
using roi_align_backward::Tile;
using roi_align_backward::TileAt;

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

// ---- maps in shared memory -----------------------------------------------------------------------------------------

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
  const T share_y = T(1) / T(y.count), share_x = T(1) / T(x.count);
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
  const T share_y = T(1) / T(rows.end - rows.begin),
          share_x = T(1) / T(columns.end - columns.begin);
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

constexpr int kEntrySide = 8;  // pixels of an axis whose weights an entry holds

// One region's bin on the maps of a block.
template <class T, int kMaps>
struct Entry {
  i32 region, y_first, y_last, x_first, x_last;
  T gradients[kMaps];
  T rows[kEntrySide], columns[kEntrySide];  // weights from the first pixel on
};

// The tile of a block.
struct OwnTile {
  i32 y, x, height, width;
};

// What a bin takes of a pixel, out of its taps, which ascend.
template <class T>
__device__ __noinline__ T find_weight(const Tap<T>* taps, const Range* range, i32 pixel) {
  i32 i = min_of(range->begin + pixel - taps[range->begin].pixel, range->end - 1);
  while (i > range->begin && taps[i].pixel > pixel) --i;
  return taps[i].pixel == pixel ? taps[i].weight : T(0);
}

// The first weights of a bin, with 0 where it has none.
template <class T>
__device__ __forceinline__ void copy_weights(const Tap<T>* taps, Range range, i32 first,
                                             T* weights) {
#pragma unroll
  for (int i = 0; i < kEntrySide; ++i) weights[i] = T(0);
#pragma unroll 1
  for (i32 i = range.begin; i < range.end; ++i) {
    const Tap<T> tap = taps[i];
    if (tap.pixel >= first + kEntrySide) break;
    weights[tap.pixel - first] = tap.weight;
  }
}

// Whether a region has pixels of the tile, and where.
template <class Scalar, class Index, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ bool find_pixels(const Args& args, const OwnMaps& own,
                                            const OwnTile& tile, i64 region,
                                            Entry<T, kMaps>& entry) {
  const Regions& r = args.regions;
  if (region >= r.k || static_cast<const Span*>(args.spans)[region].image != own.image)
    return false;
  const Table<T> table = roi_align::table_of<T>(args, region);
  const Range rows = table.row_bins[own.row_bin], columns = table.column_bins[own.column_bin];
  if (rows.is_empty() || columns.is_empty()) return false;
  entry.region = i32(region);
  entry.y_first = table.rows[rows.begin].pixel;
  entry.y_last = table.rows[rows.end - 1].pixel;
  entry.x_first = table.columns[columns.begin].pixel;
  entry.x_last = table.columns[columns.end - 1].pixel;
  return entry.y_first < tile.y + tile.height && entry.y_last >= tile.y &&
         entry.x_first < tile.x + tile.width && entry.x_last >= tile.x;
}
template <class Scalar, class Index, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ void fill_entry(const Args& args, const OwnMaps& own,
                                           const Entry<T, kMaps>& found, Entry<T, kMaps>& entry) {
  const Regions& r = args.regions;
  const Table<T> table = roi_align::table_of<T>(args, found.region);
  const Scalar* gradients =
      static_cast<const Scalar*>(args.bins) + Index(found.region) * Index(r.c);
  entry.region = found.region;
  entry.y_first = found.y_first;
  entry.y_last = found.y_last;
  entry.x_first = found.x_first;
  entry.x_last = found.x_last;
#pragma unroll
  for (int m = 0; m < kMaps; ++m) {
    entry.gradients[m] = m < own.count ? load(gradients[own.channel(m)]) : T(0);
  }
  copy_weights(table.rows, table.row_bins[own.row_bin], found.y_first, entry.rows);
  copy_weights(table.columns, table.column_bins[own.column_bin], found.x_first, entry.columns);
}

// One bit for each entry that covers a row, or a column, of the tile.
template <int kWords>
struct Cover {
  u32 rows[kMostTileHeight][kWords], columns[kMostTileWidth][kWords];
};
// Each warp does it for its 32 entries.
template <class T, int kMaps, int kWords>
__device__ __forceinline__ void mark(const Entry<T, kMaps>* entries, int total, const OwnTile& tile,
                                     Cover<kWords>& cover) {
  const int word = threadIdx.x / kWarpSize;
  const bool exists = int(threadIdx.x) < total;
  const Entry<T, kMaps>& entry = entries[exists ? threadIdx.x : 0];
  const i32 y_first = exists ? entry.y_first - tile.y : 0,
            y_last = exists ? entry.y_last - tile.y : -1;
  const i32 x_first = exists ? entry.x_first - tile.x : 0,
            x_last = exists ? entry.x_last - tile.x : -1;
#pragma unroll 1
  for (i32 y = 0; y < tile.height; ++y) {
    const u32 bits = __ballot_sync(0xffffffffu, y_first <= y && y <= y_last);
    if (threadIdx.x % kWarpSize == 0) cover.rows[y][word] = bits;
  }
#pragma unroll 1
  for (i32 x = 0; x < tile.width; ++x) {
    const u32 bits = __ballot_sync(0xffffffffu, x_first <= x && x <= x_last);
    if (threadIdx.x % kWarpSize == 0) cover.columns[x][word] = bits;
  }
}

// Adds to a pixel what it gives to the entries, in order.
template <int kWords, class T, int kMaps>
__device__ __forceinline__ void add_entries(const Args& args, const OwnMaps& own,
                                            const Entry<T, kMaps>* entries,
                                            const Cover<kWords>& cover, int words, i32 y, i32 x,
                                            const OwnTile& tile, T (&sums)[kMaps]) {
#pragma unroll 1
  for (int word = 0; word < words; ++word) {
#pragma unroll 1
    for (u32 bits = cover.rows[y][word] & cover.columns[x][word]; bits != 0; bits &= bits - 1) {
      const Entry<T, kMaps>& entry = entries[word * kWarpSize + __ffs(bits) - 1];
      const i32 row = tile.y + y - entry.y_first, column = tile.x + x - entry.x_first;
      T of_row, of_column;
      if (row < kEntrySide && column < kEntrySide) {
        of_row = entry.rows[row];
        of_column = entry.columns[column];
      } else {
        const Table<T> table = roi_align::table_of<T>(args, entry.region);
        of_row = find_weight(table.rows, table.row_bins + own.row_bin, tile.y + y);
        of_column = find_weight(table.columns, table.column_bins + own.column_bin, tile.x + x);
      }
      const T weight = of_row * of_column;
      if (weight == T(0)) continue;  // a pixel between those that samples touch
#pragma unroll
      for (int m = 0; m < kMaps; ++m) sums[m] += weight * entry.gradients[m];
    }
  }
}

__device__ __forceinline__ OwnTile own_tile(const Regions& r, u32 block) {
  const TileSize size = tile_size(r.h, r.w);
  const i32 across = divided(i32(r.w) + size.width - 1, size.width);
  const i32 row = divided(i32(block), across), y = row * size.height;
  const i32 x = (i32(block) - row * across) * size.width;
  return {y, x, min_of(size.height, i32(r.h) - y), min_of(size.width, i32(r.w) - x)};
}

// Grid: one-dimensional, groups of kMaps maps for each tile. Dynamic shared memory: the sums of a tile, where there are
// more regions than threads.
template <class Scalar, class Index, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged_backward(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize, kPatchW = 8, kPatchH = kWarpSize / kPatchW;
  extern __shared__ uint4 memory[];
  __shared__ Entry<T, kMaps> entries[kBlockSize];
  __shared__ Cover<kWarps> cover;
  __shared__ int partial[kWarps];
  const Regions& r = args.regions;
  u32 block = blockIdx.x;
  const OwnMaps own = own_maps<kMaps>(r, block);
  const OwnTile tile = own_tile(r, block);
  const i32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const i32 across = (tile.width + kPatchW - 1) / kPatchW;
  const i32 patches = across * ((tile.height + kPatchH - 1) / kPatchH);
  const Index size = Index(r.h) * Index(r.w), step = Index(own.bins) * size;
  Scalar* maps =
      static_cast<Scalar*>(args.maps) + (Index(own.image) * Index(r.c) + own.channel(0)) * size;
  T* kept = reinterpret_cast<T*>(memory);
#pragma unroll 1
  for (i64 begin = 0; begin < r.k; begin += kBlockSize) {
    Entry<T, kMaps> found;
    const bool listed =
        find_pixels<Scalar, Index, kMaps>(args, own, tile, begin + threadIdx.x, found);
    int total;
    const int slot = block_exclusive_count<kBlockSize>(listed, partial, total);
    if (listed) fill_entry<Scalar, Index, kMaps>(args, own, found, entries[slot]);
    __syncthreads();
    mark(entries, total, tile, cover);
    __syncthreads();
    const bool is_first = begin == 0, is_last = begin + kBlockSize >= r.k;
    const int words = (total + kWarpSize - 1) / kWarpSize;
    // Neighbouring patches, which are crowded together, go to different warps.
#pragma unroll 1
    for (i32 patch = warp; patch < patches; patch += kWarps) {
      const i32 row = divided(patch, across), y = row * kPatchH + lane / kPatchW;
      const i32 x = (patch - row * across) * kPatchW + lane % kPatchW;
      if (y >= tile.height || x >= tile.width) continue;
      T* sums_before = kept + (y * tile.width + x) * kMaps;
      T sums[kMaps];
#pragma unroll
      for (int m = 0; m < kMaps; ++m) sums[m] = is_first ? T(0) : sums_before[m];
      add_entries(args, own, entries, cover, words, y, x, tile, sums);
      Scalar* pixel = maps + Index(tile.y + y) * Index(r.w) + (tile.x + x);
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
        if (!is_last) {
          sums_before[m] = sums[m];
        } else if (m < own.count) {
          store(pixel[Index(m) * step], sums[m]);
        }
      }
    }
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

// Adds one region to the rows of the tile that this warp owns.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kWarps,
          class T = Acc<Scalar>>
__device__ __forceinline__ void add_region(const Args& args, i64 region, const TileAt& at,
                                           Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  const Regions& r = args.regions;
  const i32 pooled_h = i32(r.pooled_h), pooled_w = i32(r.pooled_w);
  const Table<T> table = roi_align::table_of<T>(args, region);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Scalar* bins = static_cast<const Scalar*>(args.bins) + Index(region) * Index(r.c);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const i64 channel = at.channel + lane + i * kWarpSize;
    if (channel >= r.c) continue;
    const i32 row_of_bins = i32(channel) / pooled_w, bin = i32(channel) - row_of_bins * pooled_w;
    const Range rows = table.row_bins[row_of_bins % pooled_h], columns = table.column_bins[bin];
    const T gradient = load(bins[channel]);
#pragma unroll 1
    for (i32 y = rows.begin; y < rows.end; ++y) {
      const Tap<T> row = table.rows[y];
      const i32 local_y = row.pixel - at.y;
      if (local_y < 0 || local_y >= kTileH || local_y % kWarps != warp) continue;
      const T of_row = row.weight * gradient;
      T* sums = tile.sums + local_y * kTileW * tile.kPitch + i * kWarpSize + lane;
#pragma unroll 1
      for (i32 x = columns.begin; x < columns.end; ++x) {
        const Tap<T> column = table.columns[x];
        const i32 local_x = column.pixel - at.x;
        if (local_x < 0 || local_x >= kTileW) continue;
        sums[local_x * tile.kPitch] += column.weight * of_row;
      }
    }
  }
}

// Maps of channels_last; the gradient of bins comes channels first all the same.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const Args args) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const auto add = [&](i64 region, const TileAt& at, auto& tile) {
    add_region<Scalar, Index, kTileH, kTileW, kLaneChannels, kWarps>(args, region, at, tile);
  };
  roi_align_backward::gather_tile<Scalar, Index, true, kTileH, kTileW, kLaneChannels, kBlockSize>(
      args.regions, args.spans, args.maps, blockIdx.x, add);
}

}  // namespace torchkiln::ps_roi_pool
