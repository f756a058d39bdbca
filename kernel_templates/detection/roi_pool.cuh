// roi_pool on the GPU, forward:
//
//   list                    who works on what in the kernels of channels first: see common/bands.cuh
//   staged                  channels first: a block keeps a band of a few maps in shared memory and goes through the
//                           bins that begin in it. Of large maps it keeps the greatest of each 4 x 4 window instead,
//                           which takes a sixteenth of the steps; thin bins are then searched in global memory
//   direct                  channels first, one thread, one bin: float64, and maps too wide for shared memory
//   forward_channels_last   one thread, one bin of kVector channels; neighbouring threads take neighbouring channels
// spills: up to 110 bytes of staged where blocks are large; no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bands.cuh"
#include "common/pack.cuh"
#include "detection/roi_pool.h"

namespace torchkiln::roi_pool {

// The bands of a region's rows of bins. kReach: all bands that hold one of a bin's cells; otherwise the one in which
// it begins.
template <class T, bool kReach>
struct RowsOfBins {
  i32 image;
  bool is_known;
  Axis<T> axis;
  Bands cut;

  __device__ __forceinline__ Range bands(i32 row) const {
    const Range cells = is_known ? axis.bin_of(row) : Range{0, 0};
    const i32 first = band_of(cut, cells.begin);
    if (!kReach) return {first, first + 1};
    return {first, cells.is_empty() ? first : band_of(cut, cells.end - 1) + 1};
  }
};

// Grid: one block per band of each image, then one thread per bin of the axes of the regions.
template <class T, bool kReach, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) list(const ListArgs args) {
  const Shape& s = args.shape;
  const i32 bands = args.list.bands.count, rows = i32(s.pooled_height);
  const T* boxes = static_cast<const T*>(args.boxes);
  const i32 lists = bands * i32(s.images);
  if (i32(blockIdx.x) < lists) {
    const auto rows_of = [&](i64 roi) {
      const Region<T> region = load_region(boxes, roi, s);
      // The bins of a region of no image are empty; somebody has to write them.
      const i32 image = kReach ? region.image : max_of(region.image, 0);
      return RowsOfBins<T, kReach>{image, region.image >= 0, region.y, args.list.bands};
    };
    list_band<kBlockSize>(args.list, s.rois, rows, blockIdx.x / bands, blockIdx.x % bands, rows_of);
    return;
  }
  const i32 bins = rows + i32(s.pooled_width);
  const i64 item = i64(blockIdx.x - lists) * kBlockSize + threadIdx.x,
            roi = divided(item, i64(bins));
  if (roi >= s.rois) return;
  const i32 bin = i32(item - roi * bins);
  const Region<T> region = load_region(boxes, roi, s);
  const Range r = bin < rows ? region.y.bin_of(bin) : region.x.bin_of(bin - rows);
  args.edges[item] = region.image < 0 ? 0 : u32(r.begin) | u32(r.end) << 16;
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

// The greatest of a bin, for kVector channels from `channel` on; kUnrolled columns at a time.
template <class Scalar, class Index, bool kChannelsLast, int kVector, int kUnrolled = 4>
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
#pragma unroll kUnrolled
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

// One thread per bin: 32-bit divisions by sizes that do not change, and no shared memory.
template <class Scalar, class Index, int kCodeBytes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) direct(const Args args) {
  using T = Acc<Scalar>;
  const Shape& s = args.shape;
  const i32 pooled_width = i32(s.pooled_width), bins = i32(s.pooled_height) * pooled_width;
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (item >= s.rois * s.channels * bins) return;
  const i64 plane = divided(item, i64(bins)), roi = divided(plane, s.channels);
  const i32 bin = i32(item - plane * bins), row = quotient(bin, s.inverse_pooled_width);
  const Region<T> region = load_region(static_cast<const T*>(args.boxes), roi, s);
  const Range rows = region.y.bin_of(row), columns = region.x.bin_of(bin - row * pooled_width);
  const bool is_empty = region.image < 0 || rows.is_empty() || columns.is_empty();
  Best<T> best = worst<T>(0, 0);
  if (!is_empty) {
    search<Scalar, Index, false, 1>(args, region.image, plane - roi * s.channels, rows, columns,
                                    &best);
  }
  put<1, kCodeBytes, Scalar>(args, item, &best, is_empty);
}

// ---- staged --------------------------------------------------------------------------------------------------------

// A value as an unsigned number that is greater for a greater value. NaN is greater than all, -0 is 0, and no value is
// 0, which stands for none.
__device__ __forceinline__ u32 ascending(float value) {
  const u32 bits = float_bits(value + 0.0f);
  return is_nan(value) ? 0xffffffffu : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}
template <class Half>
__device__ __forceinline__ u32 ascending(Half value) {
  const u32 bits = value.bits == 0x8000u ? 0 : value.bits;
  return is_nan(load(value)) ? 0xffffu : (bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u);
}
__device__ __forceinline__ void from_ascending(u32 number, float& value) {
  value = bits_float(number & 0x80000000u ? number ^ 0x80000000u : ~number);
}
template <class Half>
__device__ __forceinline__ void from_ascending(u32 number, Half& value) {
  value.bits = u16(number & 0x8000u ? number ^ 0x8000u : ~number);
}

// What a table keeps of a cell: its value and its place, so that the greater one of two is one comparison; of equals,
// the one that comes first.
template <class Scalar>
struct Placed {
  using Key = u32;  // upper half: value, lower half: cells from there to the end of the band
  static __device__ __forceinline__ Key key(Scalar value, i32 index, i32, i32) {
    return ascending(value) << 16 | (0xffffu - u32(index));
  }
  static __device__ __forceinline__ Best<float> best(Key key, i32 width, float inverse_width) {
    const i32 index = 0xffff - i32(key & 0xffffu), row = quotient(index, inverse_width);
    Scalar value;
    from_ascending(key >> 16, value);
    return {load(value), row, index - row * width};
  }
};
template <>
struct Placed<float> {
  using Key = u64;  // upper half: value, lower half: row and column, inverted
  static __device__ __forceinline__ Key key(float value, i32, i32 row, i32 column) {
    return Key(ascending(value)) << 32 | ~(u32(row) << 16 | u32(column));
  }
  static __device__ __forceinline__ Best<float> best(Key key, i32, float) {
    const u32 place = ~u32(key);
    float value;
    from_ascending(u32(key >> 32), value);
    return {value, i32(place >> 16), i32(place & 0xffffu)};
  }
};
// Values alone, for tables of cells: half the shared memory of a Placed<float>.
struct Unplaced {
  using Key = u32;
  static __device__ __forceinline__ Key key(float value, i32, i32, i32) { return ascending(value); }
};
template <class Scalar, int kWindow>
struct CellOf {
  using Type = Placed<Scalar>;
};
template <>
struct CellOf<float, 1> {
  using Type = Unplaced;
};
template <class Scalar, int kWindow>
using Cell = typename CellOf<Scalar, kWindow>::Type;

// The keys of kMaps maps side by side, so that one load brings them all.
template <class Key, int kMaps>
struct alignas(kMaps * sizeof(Key)) Keys {
  Key at[kMaps];

  __device__ __forceinline__ void take(const Keys& other) {
#pragma unroll
    for (int i = 0; i < kMaps; ++i) at[i] = max_of(at[i], other.at[i]);
  }
};

// Fills table[row * width + column] with the keys of the band's cells.
template <class Scalar, int kMaps, int kBlockSize, class Table>
__device__ __forceinline__ void build_cells(const Scalar* const* bands, i32 height, i32 width,
                                            Table* table) {
  constexpr int kAtOnce = 2;  // loads on their way
  const i32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (i32 y = warp; y < height; y += kBlockSize / kWarpSize) {
#pragma unroll 1
    for (i32 first = lane; first < width; first += kAtOnce * kWarpSize) {
      Table keys[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const i32 x = min_of(first + k * kWarpSize, width - 1), at = y * width + x;
#pragma unroll
        for (int i = 0; i < kMaps; ++i) {
          keys[k].at[i] = Cell<Scalar, 1>::key(bands[i][at], at, y, x);
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const i32 x = first + k * kWarpSize;
        if (x < width) table[y * width + x] = keys[k];
      }
    }
  }
}

// Fills table[row * width + column] with the greatest of the 4 x 4 cells from there on that the band has. A warp walks
// down 29 columns of one part of the rows; three more lanes only bring their cells.
template <class Scalar, int kBlockSize, class Key>
__device__ __forceinline__ void build_windows(const Scalar* band, i32 height, i32 width,
                                              Key* table) {
  constexpr u32 kAll = 0xffffffffu;
  constexpr i32 kParts = 8, kOwned = kWarpSize - (kWindowSize - 1);
  constexpr i32 kRows = 4;  // in flight
  const i32 lane = threadIdx.x % kWarpSize, groups = (width + kOwned - 1) / kOwned;
#pragma unroll 1
  for (i32 unit = threadIdx.x / kWarpSize; unit < groups * kParts; unit += kBlockSize / kWarpSize) {
    const i32 part = unit % kParts, x_first = unit / kParts * kOwned;
    const i32 begin = height * part / kParts, end = height * (part + 1) / kParts;
    const i32 x = min_of(x_first + lane, width - 1);
    const bool owns = lane < kOwned && x_first + lane < width;
    const auto cell_row = [&](i32 y) { return min_of(y, height - 1); };
    // The greatest of four neighbours of a row.
    const auto across = [&](Scalar cell, i32 y) {
      Key key = Placed<Scalar>::key(cell, y * width + x, y, x);
      key = max_of(key, __shfl_down_sync(kAll, key, 1));
      return max_of(key, __shfl_down_sync(kAll, key, 2));
    };
    Key above = 0, pairs[2] = {0, 0};  // what comes before the first row is in no window
#pragma unroll 1
    for (i32 y = begin; y < end + kWindowSize - 1;) {  // the last rows may lie behind the part
      Scalar cells[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) cells[k] = band[cell_row(y + k) * width + x];
#pragma unroll 1
      for (int done = 0; done < kRows; done += 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k, ++y) {
          const Key below = across(cells[k], cell_row(y)), pair = max_of(above, below);
          const i32 row = y - (kWindowSize - 1);
          if (owns && row >= begin && row < end) table[row * width + x] = max_of(pairs[1], pair);
          pairs[1] = pairs[0];
          pairs[0] = pair;
          above = below;
        }
#pragma unroll
        for (int k = 2; k < kRows; ++k) cells[k - 2] = cells[k];  // registers have no index
      }
    }
  }
}

// The greatest of `count` neighbouring cells of kMaps maps.
template <class Table>
__device__ __forceinline__ Table greatest_of_row(const Table* row, i32 count) {
  Table best = row[0];
  best.take(row[count - 1]);
  if (count > 2) best.take(row[1]);
  if (count > 3) best.take(row[2]);
#pragma unroll 1
  for (i32 x = 3; x < count - 1; ++x) best.take(row[x]);
  return best;
}

// A bin of kMaps maps, out of a table of cells with their places.
template <int kMaps, class Scalar, class T>
__device__ __forceinline__ void search_cells(const Keys<u32, kMaps>* table, i32 width, Range rows,
                                             Range columns, Best<T>* best, Placed<Scalar>) {
  Keys<u32, kMaps> keys = {};
#pragma unroll 1
  for (i32 y = rows.begin; y < rows.end; ++y) {
    keys.take(greatest_of_row(table + y * width + columns.begin, columns.end - columns.begin));
  }
  const float inverse_width = count_quotient(1.0f, static_cast<float>(width));
#pragma unroll
  for (int i = 0; i < kMaps; ++i) {
    best[i] = Placed<Scalar>::best(keys.at[i], width, inverse_width);
  }
}

// The same out of a table of values: the first row that has the greatest one is remembered, and then looked through.
template <int kMaps, class T>
__device__ __forceinline__ void search_cells(const Keys<u32, kMaps>* table, i32 width, Range rows,
                                             Range columns, Best<T>* best, Unplaced) {
  Keys<u32, kMaps> keys = {};
#pragma unroll 1
  for (i32 y = rows.begin; y < rows.end; ++y) {
    const auto row =
        greatest_of_row(table + y * width + columns.begin, columns.end - columns.begin);
#pragma unroll
    for (int i = 0; i < kMaps; ++i) {
      if (row.at[i] > keys.at[i]) best[i].y = y;
    }
    keys.take(row);
  }
#pragma unroll
  for (int i = 0; i < kMaps; ++i) {
    const u32* row = table[best[i].y * width].at + i;
    i32 x = columns.begin;
    while (row[x * kMaps] != keys.at[i]) ++x;
    best[i].x = x;
    from_ascending(keys.at[i], best[i].value);
  }
}

// A bin that is no thinner than a window, out of a table of windows; the last ones may overlap those before.
template <class Key>
__device__ __forceinline__ Key search_windows(const Key* table, i32 width, Range rows,
                                              Range columns) {
  const i32 last = columns.end - columns.begin - kWindowSize;  // where the last window begins
  Key best = 0;
#pragma unroll 1
  for (i32 y = rows.begin; y < rows.end; y += kWindowSize) {
    const Key* row = table + min_of(y, rows.end - kWindowSize) * width + columns.begin;
    best = max_of(best, max_of(row[0], row[last]));
    if (last > kWindowSize) best = max_of(best, row[kWindowSize]);
    if (last > 2 * kWindowSize) best = max_of(best, row[2 * kWindowSize]);
#pragma unroll 1
    for (i32 x = 3 * kWindowSize; x < last; x += kWindowSize) best = max_of(best, row[x]);
  }
  return best;
}

// Grid: one block per band of kMaps maps. Dynamic shared memory: keys for each cell of a band. kWindow: 1, or
// kWindowSize for one map.
template <class Scalar, class Index, int kCodeBytes, int kWindow, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged(const Args args) {
  using T = Acc<Scalar>;
  using Key = typename Cell<Scalar, kWindow>::Key;
  using Table = Keys<Key, kMaps>;
  extern __shared__ uint4 memory[];
  Table* table = reinterpret_cast<Table*>(memory);
  const Shape& s = args.shape;
  const Bands& bands = args.list.bands;
  const i32 group = divided(i32(blockIdx.x), bands.count);
  const i32 band = i32(blockIdx.x) - group * bands.count, groups = i32(s.channels) / kMaps;
  const i32 image = divided(group, groups), channel = (group - image * groups) * kMaps;
  const i32 width = i32(s.width), top = band * bands.step;
  const i32 height = min_of(bands.height, i32(s.height) - top);
  const Range part = args.list.parts[image * bands.count + band];
  if (part.is_empty()) return;
  const Scalar* cells[kMaps];
#pragma unroll
  for (int i = 0; i < kMaps; ++i) {
    cells[i] = static_cast<const Scalar*>(args.input) +
               input_offset<Index, false>(s, image, channel + i, top, 0);
  }
  if constexpr (kWindow == 1) {
    build_cells<Scalar, kMaps, kBlockSize>(cells, height, width, table);
  } else {
    build_windows<Scalar, kBlockSize>(cells[0], height, width, &table->at[0]);
  }
  __syncthreads();

  const i32 pooled_width = i32(s.pooled_width), axes = i32(s.pooled_height) + pooled_width;
  const i64 bins = s.pooled_height * pooled_width;
  const i32 across = min_of(pooled_width, kBlockSize);
  const float inverse = count_quotient(1.0f, static_cast<float>(across));
  const i32 first = quotient(i32(threadIdx.x), inverse), step = quotient(kBlockSize, inverse);
  if (first >= step) return;
#pragma unroll 1
  for (i32 i = part.begin + first; i < part.end; i += step) {
    const BandEntry entry = args.list.entries[i];
    const u32* edges = args.edges + i64(entry.region) * axes;
    const u32 row_edges = edges[entry.row];
    const Range rows = {i32(row_edges & 0xffffu) - top, i32(row_edges >> 16) - top};
#pragma unroll 1
    for (i32 column = threadIdx.x - first * across; column < pooled_width; column += across) {
      const u32 column_edges = edges[s.pooled_height + column];
      const Range columns = {i32(column_edges & 0xffffu), i32(column_edges >> 16)};
      const i32 h = rows.end - rows.begin, w = columns.end - columns.begin;
      const bool is_empty = h <= 0 || w <= 0;
      const i64 at =
          (i64(entry.region) * s.channels + channel) * bins + entry.row * pooled_width + column;
      if (h >= kWindow && w >= kWindow && rows.end <= height) {
        Best<T> best[kMaps];
        if constexpr (kWindow == 1) {
          search_cells<kMaps>(table, width, rows, columns, best, Cell<Scalar, 1>());
        } else {
          best[0] = Placed<Scalar>::best(search_windows(&table->at[0], width, rows, columns), width,
                                         count_quotient(1.0f, static_cast<float>(width)));
        }
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          best[m].y += top;
          put<1, kCodeBytes, Scalar>(args, at + m * bins, best + m, false);
        }
        continue;
      }
      // Empty, too thin for a window, or it ends below the band.
#pragma unroll 1
      for (int m = 0; m < kMaps; ++m) {
        Best<T> best = worst<T>(0, 0);
        if (!is_empty) {
          // With a table of cells that is rare, and short code counts.
          search<Scalar, Index, false, 1, kWindow == 1 ? 1 : 4>(
              args, image, channel + m, {top + rows.begin, top + rows.end}, columns, &best);
        }
        put<1, kCodeBytes, Scalar>(args, at + m * bins, &best, is_empty);
      }
    }
  }
}

}  // namespace torchkiln::roi_pool
