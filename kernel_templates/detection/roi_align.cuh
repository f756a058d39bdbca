// RoIAlign on the GPU, forward. The average of a bin is separable: (weights of rows) x (weights of columns), the border
// included.
//
//   tables    one thread per bin of an axis of a region merges its samples into taps (pixel, weight), once for all
//             channels; the kernels below but `direct`, and the backward, read them
//   staged    NCHW, at most 2 samples per bin and axis: a block keeps a band of one map in shared memory and goes through
//             the bins that begin in it; quads is its table
//   planes    NCHW otherwise: a block stays on kPlanes maps and walks all regions of their image, so that the maps' pixels are
//             fetched from L2 once and then hit L1; 4 lanes share a bin, neighbouring bins are neighbouring lanes
//   last      channels_last: one thread computes a row of bins for 16 bytes of channels, neighbouring threads
//             neighbouring channels; the taps that rows of bins share hit L1
//   direct    one thread per output, geometry included: the maximum, and averages too small to deserve two launches
// spills: up to 80 bytes for wide types and indices where blocks are large; no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bands.cuh"
#include "common/pack.cuh"
#include "detection/roi_align_tables.cuh"

namespace torchkiln::roi_align {

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) tables(const Args args) {
  using T = Acc<Scalar>;
  const AxisBin at = own_bin<kBlockSize>(args.regions, blockIdx.x);
  if (at.region >= args.regions.k) return;
  const i32 image = image_of<T>(args.regions, at.region);
  Axis<T> axis = axis_at<T>(args.regions, at.region, at.columns);
  if (image < 0) clear(axis);
  write_taps<T>(args, args.regions, at, axis, image);
}

constexpr int kLanesPerBin = 4;  // ratio 2: a bin takes at most 4 columns

// Block number `block` of those that work on the maps of r, whose first image has the number `first_image`.
template <class Scalar, class Index, int kPlanes, int kBlockSize, class AnyArgs>
__device__ __forceinline__ void average_planes(const AnyArgs& args, const Regions& r,
                                               const void* maps, u32 block, i32 first_image) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize;
  constexpr int kBinsPerWarp = kWarpSize / kLanesPerBin;
  const i32 pooled_h = i32(r.pooled_h), pooled_w = i32(r.pooled_w), width = i32(r.w);
  const i32 groups = i32((r.c + kPlanes - 1) / kPlanes);
  const i32 of_level = i32(block / groups), channel = i32(block % groups) * kPlanes;
  const i32 image = first_image + of_level;
  const Index plane_size = Index(r.h) * Index(r.w);
  const Scalar* plane =
      static_cast<const Scalar*>(maps) + (Index(of_level) * Index(r.c) + channel) * plane_size;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int sub = lane % kLanesPerBin;
#pragma unroll 1
  for (i64 region = i64(blockIdx.y) * kWarps + warp; region < r.k;
       region += i64(gridDim.y) * kWarps) {
    const i32 home = static_cast<const Span*>(args.spans)[region].image;
    // A region of no image has no taps; the blocks of the first image write its zeros.
    if (home != image && !(home < 0 && image == 0)) continue;
    const Table<T> table = table_of<T>(args, region);
    Scalar* out = static_cast<Scalar*>(args.bins) +
                  (Index(region) * Index(r.c) + channel) * Index(pooled_h * pooled_w);
#pragma unroll 1
    for (i32 first = 0; first < pooled_w; first += kBinsPerWarp) {
      const i32 bin = first + lane / kLanesPerBin;
      const bool has_bin = bin < pooled_w;
      const Range columns = has_bin ? table.column_bins[bin] : Range{0, 0};
      const i32 begin = columns.begin, end = columns.end;
      // The first column of each lane stays in registers; wide bins come back for the others.
      const bool has_column = begin + sub < end;
      const Tap<T> column = has_column ? table.columns[begin + sub] : Tap<T>{T(0), 0, 0};
#pragma unroll 1
      for (i32 row_bin = 0; row_bin < pooled_h; ++row_bin) {
        const Range rows = table.row_bins[row_bin];
        T sum[kPlanes] = {};
        Tap<T> at = column;
#pragma unroll 1
        for (i32 c = begin + sub; c < end; c += kLanesPerBin) {
          if (c != begin + sub) at = table.columns[c];
          T of_column[kPlanes] = {};
#pragma unroll 4
          for (i32 y = rows.begin; y < rows.end; ++y) {
            const Tap<T> row = table.rows[y];
            const Index offset = Index(row.pixel) * width + at.pixel;
#pragma unroll
            for (int p = 0; p < kPlanes; ++p) {
              if (kPlanes > 1 && channel + p >= r.c) break;
              of_column[p] += row.weight * load(plane[p * plane_size + offset]);
            }
          }
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) sum[p] += at.weight * of_column[p];
        }
        __syncwarp();
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
          for (int offset = kLanesPerBin / 2; offset > 0; offset /= 2) {
            sum[p] += __shfl_xor_sync(0xffffffffu, sum[p], offset);
          }
          if (sub == 0 && has_bin && channel + p < r.c) {
            store(out[Index(p) * (pooled_h * pooled_w) + row_bin * pooled_w + bin], sum[p]);
          }
        }
      }
    }
  }
}

template <class Scalar, class Index, int kPlanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) planes(const Args args) {
  average_planes<Scalar, Index, kPlanes, kBlockSize>(args, args.regions, args.maps, blockIdx.x, 0);
}

// Where the bands of channels first begin for a region's rows of bins.
template <class T>
struct RowsOfBins {
  i32 image, size;
  Axis<T> axis;
  Bands cut;

  __device__ __forceinline__ Range bands(i32 row) const {
    const i32 band = axis.count > 0 ? band_of(cut, first_pixel(axis, row, size)) : 0;
    return {band, band + 1};
  }
};

// The taps of a bin, all in their places. `known`: the region has a map.
template <class T>
__device__ __forceinline__ void write_quad(const StagedTable& to, const Regions& r,
                                           const AxisBin& at, bool known) {
  const Axis<T> axis = axis_at<T>(r, at.region, at.columns);
  const T share = axis.count > 0 ? count_quotient(T(1), T(axis.count)) : T(0);
  QuadWeights<T> weights = {};
  u16 pixels[2 * kQuadSamples];
  u16 some = kNoPixel;  // what stands in for a pixel that is not there, with the weight 0
#pragma unroll
  for (int i = 0; i < kQuadSamples; ++i) {
    const Taps<T> t = sample_taps(axis, at.bin, i, at.columns ? r.w : r.h);
    const bool exists = t.inside && i < axis.count && known;
    weights.at[2 * i] = exists ? t.weight_low * share : T(0);
    weights.at[2 * i + 1] = exists ? t.weight_high * share : T(0);
    if (exists) some = u16(t.low);
    pixels[2 * i] = exists ? u16(t.low) : kNoPixel;
    pixels[2 * i + 1] = exists ? u16(t.high) : kNoPixel;
  }
  QuadPixels result;
#pragma unroll
  for (int i = 0; i < 2 * kQuadSamples; ++i) {
    result.at[i] = pixels[i] == kNoPixel ? some : pixels[i];
  }
  const i64 item = at.region * (r.pooled_h + r.pooled_w) + (at.columns ? r.pooled_h : 0) + at.bin;
  static_cast<QuadWeights<T>*>(to.weights)[item] = weights;
  to.pixels[item] = result;
}

// Grid: one block per band of each image, then one thread per bin of an axis of a region.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) quads(const StagedArgs args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const BandList& list = args.table.list;
  const i32 bands = list.bands.count, lists = bands * i32(r.n);
  if (i32(blockIdx.x) < lists) {
    const auto rows_of = [&](i64 region) {
      const i32 image = image_of<T>(r, region);
      // The bins of a region of no image are zeros; somebody has to write them.
      RowsOfBins<T> rows = {max_of(image, 0), i32(r.h), axis_at<T>(r, region, false), list.bands};
      if (image < 0) clear(rows.axis);
      return rows;
    };
    list_band<kBlockSize>(list, r.k, i32(r.pooled_h), blockIdx.x / bands, blockIdx.x % bands,
                          rows_of);
    return;
  }
  const AxisBin at = own_bin<kBlockSize>(r, blockIdx.x - lists);
  if (at.region >= r.k) return;
  write_quad<T>(args.table, r, at, image_of<T>(r, at.region) >= 0);
}

// Copies `count` elements to shared memory, 16 bytes at a time where both sides allow it.
template <int kBlockSize, class Scalar>
__device__ __forceinline__ void stage(const Scalar* from, i32 count, Scalar* to) {
  constexpr i32 kVector = 16 / sizeof(Scalar);
  i32 done = 0;
  if (reinterpret_cast<u64>(from) % 16 == 0) {
    done = count / kVector * kVector;
    at_once<4, kBlockSize>(
        count / kVector, [&](i32 i) { return load_pack<kVector>(from + i * kVector); },
        [&](i32 i, const Pack<Scalar, kVector>& cells) { store_pack(to + i * kVector, cells); });
  }
  at_once<4, kBlockSize>(
      count - done, [&](i32 i) { return from[done + i]; },
      [&](i32 i, Scalar cell) { to[done + i] = cell; });
}

// A bin that ends below the band, which is rare: out of the whole map.
template <class Scalar, class Index, class T>
__device__ __noinline__ T average_of_map(const Scalar* map, Index width, const QuadWeights<T>* rows,
                                         const QuadPixels* row_pixels,
                                         const QuadWeights<T>* columns,
                                         const QuadPixels* column_pixels) {
  T sum = T(0);
#pragma unroll 1
  for (int i = 0; i < 2 * kQuadSamples; ++i) {
    const Scalar* row = map + row_pixels->at[i] * width;
    T of_row = T(0);
#pragma unroll 1
    for (int j = 0; j < 2 * kQuadSamples; ++j) {
      of_row += columns->at[j] * load(row[column_pixels->at[j]]);
    }
    sum += rows->at[i] * of_row;
  }
  return sum;
}

// Grid: one block per band of kMaps maps, which share the geometry. Dynamic shared memory: their bands. One thread, one
// bin: its 16 reads meet those of the other lanes in four places of a bank on average, which is what holds float32.
// Four lanes a bin have a quarter of these conflicts, but 2.6 times the instructions, and are slower.
// Block number `block` of those that work on the maps of r; first_image as elsewhere.
template <class Scalar, class Index, int kMaps, int kBlockSize>
__device__ __forceinline__ void average_staged(const StagedTable& table_of_all, const Regions& r,
                                               const Bands& bands, const void* maps, void* all_bins,
                                               u32 block, i32 first_image) {
  using T = Acc<Scalar>;
  extern __shared__ uint4 memory[];
  Scalar* cells = reinterpret_cast<Scalar*>(memory);
  const BandList& list = table_of_all.list;
  const i32 group = divided(i32(block), bands.count), band = i32(block) - group * bands.count;
  const i32 plane = group * kMaps, of_level = divided(plane, i32(r.c));
  const i32 image = first_image + of_level, channel = plane - of_level * i32(r.c);
  const Range part = list.parts[image * list.bands.count + band];
  if (part.is_empty()) return;
  const i32 width = i32(r.w), top = band * bands.step;
  const i32 pitch = band_pitch(bands.height, width);
  const i32 height = min_of(bands.height, i32(r.h) - top);
  const Index map_size = Index(r.h) * width;
  const Scalar* map = static_cast<const Scalar*>(maps) + plane * map_size;
#pragma unroll 1
  for (int m = 0; m < kMaps; ++m) {
    stage<kBlockSize>(map + m * map_size + Index(top) * width, height * width, cells + m * pitch);
  }
  __syncthreads();

  const i32 pooled_w = i32(r.pooled_w), axes = i32(r.pooled_h) + pooled_w;
  const Index bins = Index(r.pooled_h) * pooled_w, region_size = Index(r.c) * bins;
  Scalar* out = static_cast<Scalar*>(all_bins) + channel * bins;
  const i32 across = min_of(pooled_w, kBlockSize);
  const i32 first = threadIdx.x / across, step = divided(kBlockSize, across);
  if (first >= step) return;
  const auto* all_weights = static_cast<const QuadWeights<T>*>(table_of_all.weights);
  const QuadPixels* all_pixels = table_of_all.pixels;
#pragma unroll 1
  for (i32 i = part.begin + first; i < part.end; i += step) {
    const BandEntry entry = list.entries[i];
    const Index table = Index(entry.region) * axes, row_at = table + entry.row;
    const QuadWeights<T> row_weights = all_weights[row_at];
    const QuadPixels rows = all_pixels[row_at];
    i32 row[2 * kQuadSamples], lowest = 0;
#pragma unroll
    for (int y = 0; y < 2 * kQuadSamples; ++y) {
      lowest = max_of(lowest, i32(rows.at[y]) - top);
      row[y] = (i32(rows.at[y]) - top) * width;
    }
    const bool has_rows = rows.at[0] != kNoPixel, in_band = lowest < height;
#pragma unroll 1
    for (i32 bin = threadIdx.x - first * across; bin < pooled_w; bin += across) {
      const Index column_at = table + i32(r.pooled_h) + bin;
      const QuadWeights<T> column_weights = all_weights[column_at];
      const QuadPixels columns = all_pixels[column_at];
      T sum[kMaps] = {};
      if (!has_rows || columns.at[0] == kNoPixel) {
        // No sample: 0.
      } else if (in_band) {
#pragma unroll
        for (int y = 0; y < 2 * kQuadSamples; ++y) {
          T of_row[kMaps] = {};
#pragma unroll
          for (int x = 0; x < 2 * kQuadSamples; ++x) {
            const Scalar* cell = cells + row[y] + i32(columns.at[x]);
#pragma unroll
            for (int m = 0; m < kMaps; ++m) {
              of_row[m] += column_weights.at[x] * load(cell[m * pitch]);
            }
          }
#pragma unroll
          for (int m = 0; m < kMaps; ++m) sum[m] += row_weights.at[y] * of_row[m];
        }
      } else {
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          sum[m] = average_of_map<Scalar, Index>(map + m * map_size, Index(width),
                                                 all_weights + row_at, all_pixels + row_at,
                                                 all_weights + column_at, all_pixels + column_at);
        }
      }
      Scalar* to = out + entry.region * region_size + entry.row * pooled_w + bin;
#pragma unroll
      for (int m = 0; m < kMaps; ++m) store(to[m * bins], sum[m]);
    }
  }
}

template <class Scalar, class Index, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged(const StagedArgs args) {
  average_staged<Scalar, Index, kMaps, kBlockSize>(args.table, args.regions, args.table.list.bands,
                                                   args.maps, args.bins, blockIdx.x, 0);
}

// One image of channels last.
template <class Scalar>
struct Picture {
  const Scalar* pixels;
  i64 width;
};
template <class Scalar, class Index>
__device__ __forceinline__ Picture<Scalar> picture_of(const Args& args, i32 image) {
  const Regions& r = args.regions;
  const Index size = Index(r.h) * Index(r.w) * Index(r.c);
  return {static_cast<const Scalar*>(args.maps) + Index(image) * size, r.w};
}

template <class Scalar, class Index, int kVector, int kBlockSize, class AnyArgs>
__device__ __forceinline__ void average_last(const AnyArgs& args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const u32 vectors = u32(r.c / kVector), pooled_h = u32(r.pooled_h), pooled_w = u32(r.pooled_w);
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (item >= r.k * pooled_h * vectors) return;
  const i64 row = divided(item, i64(vectors)), region = divided(row, i64(pooled_h));
  const Index channel = Index(item - row * vectors) * kVector;
  const u32 row_bin = u32(row - region * pooled_h);
  const Table<T> table = table_of<T>(args, region);
  const i32 image = static_cast<const Span*>(args.spans)[region].image;
  const Picture<Scalar> picture = picture_of<Scalar, Index>(args, max_of(image, 0));
  const Scalar* map = picture.pixels + channel;
  Scalar* out = static_cast<Scalar*>(args.bins) + channel +
                (Index(region) * pooled_h + row_bin) * pooled_w * Index(r.c);
  const Range rows = table.row_bins[row_bin];
#pragma unroll 1
  for (u32 bin = 0; bin < pooled_w; ++bin) {
    T sum[kVector] = {};
    const Range columns = table.column_bins[bin];
#pragma unroll 1
    for (i32 x = columns.begin; x < columns.end; ++x) {
      const Tap<T> column = table.columns[x];
#pragma unroll 4
      for (i32 y = rows.begin; y < rows.end; ++y) {
        const Tap<T> row = table.rows[y];
        const T weight = row.weight * column.weight;
        const Pack<Scalar, kVector> pixel = load_pack<kVector>(
            map + (Index(row.pixel) * Index(picture.width) + column.pixel) * Index(r.c));
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += weight * load(pixel.at[i]);
      }
    }
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(result.at[i], sum[i]);
    store_pack<kVector>(out + Index(bin) * Index(r.c), result);
  }
}

template <class Scalar, class Index, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) last(const Args args) {
  average_last<Scalar, Index, kVector, kBlockSize>(args);
}

// One sample of a map whose pixels lie `stride` apart; 0 outside.
template <class Scalar, class Index, class T = Acc<Scalar>>
__device__ __forceinline__ T sample(const Scalar* map, const Taps<T>& y, const Taps<T>& x,
                                    Index width, Index stride) {
  if (!y.inside || !x.inside) return T(0);
  const Scalar* low = map + y.low * width * stride;
  const Scalar* high = map + y.high * width * stride;
  const Index left = x.low * stride, right = x.high * stride;
  return y.weight_low * (x.weight_low * load(low[left]) + x.weight_high * load(low[right])) +
         y.weight_high * (x.weight_low * load(high[left]) + x.weight_high * load(high[right]));
}

template <class Scalar, class Index, int kPooling, bool kLast, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) direct(const Args args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const i64 pooled_h = r.pooled_h, pooled_w = r.pooled_w;
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (item >= r.k * r.c * pooled_h * pooled_w) return;
  Index rest = Index(item);
  const auto next = [&](i64 size) {
    const Index number = rest, of_size = Index(size);
    rest = divided(number, of_size);
    return number - rest * of_size;
  };
  const Index inner = kLast ? next(r.c) : 0;
  const Index column_bin = next(pooled_w), row_bin = next(pooled_h);
  const Index channel = kLast ? inner : next(r.c);
  const Window<T> window = window_of<T>(r, rest);
  const i32 rows = window.batch < 0 ? 0 : window.y.count;
  const Index plane_size = Index(r.h) * Index(r.w);
  const Index stride = kLast ? Index(r.c) : 1;
  const Scalar* map = static_cast<const Scalar*>(args.maps) +
                      (kLast ? channel : channel * plane_size) +
                      Index(window.batch < 0 ? 0 : window.batch) * Index(r.c) * plane_size;

  i32 y_first = 0, y_last = 0, x_first = 0, x_last = 0;
  if (rows > 0) {
    constexpr i32 kSpare = kPooling == kMax ? 1 : 0;
    sample_range(window.y, row_bin, r.h, y_first, y_last, kSpare);
    sample_range(window.x, column_bin, r.w, x_first, x_last, kSpare);
  }
  T result = T(0);
  i32 winner = -1;
#pragma unroll 1
  for (i32 iy = y_first; iy < y_last; ++iy) {
    const Taps<T> y = sample_taps(window.y, row_bin, iy, r.h);
#pragma unroll 1
    for (i32 ix = x_first; ix < x_last; ++ix) {
      const Taps<T> x = sample_taps(window.x, column_bin, ix, r.w);
      const T value = sample(map, y, x, Index(r.w), stride);
      if (kPooling == kAverage) {
        result += value;
      } else if (winner < 0 || value > result || (is_nan(value) && !is_nan(result))) {
        result = value;
        winner = iy * window.x.count + ix;
      }
    }
  }
  if (kPooling == kAverage && rows > 0) result /= T(rows) * T(window.x.count);
  store(static_cast<Scalar*>(args.bins)[item], result);
  if (kPooling == kMax) args.argmax[item] = winner;
}

}  // namespace torchkiln::roi_align
