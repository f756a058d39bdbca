// Pooling of regions on the CPU by tables of taps: what each bin takes of the rows and of the columns. Forward: the taps
// of a region are made once for all channels. Backward: threads over maps (channels_last: over groups of channels), each
// adds all regions of its image in order into a buffer of its own: no atomics, the same result for any number of
// threads. What differs between operators is where the taps lie.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"
#include "detection/roi_align.h"

namespace torchkiln::bindings {

using roi_align::Regions;
using roi_align::Tap;

// sums[i] += weight * values[i]
[[maybe_unused]] TORCHKILN_VECTORISED static void add_scaled(float* __restrict__ sums,
                                                             const float* __restrict__ values,
                                                             float weight, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * values[i];
}
[[maybe_unused]] TORCHKILN_VECTORISED static void add_scaled(double* __restrict__ sums,
                                                             const double* __restrict__ values,
                                                             double weight, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * values[i];
}
template <class Half>
void add_scaled(float* __restrict__ sums, const Half* __restrict__ values, float weight,
                std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * load(values[i]);
}

// The taps of one axis of one region.
template <class T>
struct AxisTaps {
  std::vector<Tap<T>> taps;
  std::vector<i32> begins;
  i32 n = 0;

  // AnyAxis: roi_align::Axis, or what has the same functions.
  template <class AnyAxis>
  void make(const AnyAxis& axis, std::int64_t pooled, std::int64_t size) {
    taps.resize(static_cast<std::size_t>(size + 3 * pooled));
    begins.resize(static_cast<std::size_t>(pooled + 1));
    n = 0;
    for (std::int64_t bin = 0; bin < pooled; ++bin) {
      begins[static_cast<std::size_t>(bin)] = n;
      n += make_taps(axis, bin, size, taps.data() + n);
    }
    begins.back() = n;
  }
  std::span<const Tap<T>> of_bin(std::int64_t bin) const {
    const auto at = static_cast<std::size_t>(bin);
    const auto begin = static_cast<std::size_t>(begins[at]);
    return {taps.data() + begin, static_cast<std::size_t>(begins[at + 1]) - begin};
  }
  // From the first pixel to the last one.
  std::int64_t reach() const {
    return n > 0 ? taps[static_cast<std::size_t>(n - 1)].pixel - taps[0].pixel + 1 : 0;
  }
};

template <class T>
struct RegionTaps {
  std::int64_t image = -1;
  AxisTaps<T> rows, columns;

  template <class AnyAxis>
  void make(const Regions& r, std::int64_t of_image, const AnyAxis& y, const AnyAxis& x) {
    image = of_image;
    rows.make(y, r.pooled_h, r.h);
    columns.make(x, r.pooled_w, r.w);
  }
};

// The taps of roi_align.
template <class T>
void make_taps_of(const Regions& r, std::int64_t region, RegionTaps<T>& taps) {
  const auto window = roi_align::window_of<T>(r, region);
  taps.make(r, window.batch, window.y, window.x);
}

// A region without a box that is a number has no batch index to be wrong.
template <class T>
void check_batches(const char* op, const Regions& r) {
  for (std::int64_t region = 0; region < r.k; ++region) {
    const T batch = roi_align::coordinate<T>(r, region, 0);
    if (batch > T(-1) && batch < static_cast<T>(r.n)) continue;
    fail(TORCHKILN_ERROR_INDEX, op, "boxes",
         "have batch indices from 0 to " + std::to_string(r.n - 1),
         std::to_string(static_cast<double>(batch)) + " in row " + std::to_string(region));
  }
}

// What a forward task needs besides its output.
template <class T>
struct PoolScratch {
  RegionTaps<T> taps;
  std::vector<T> sums;
};

// One channel of one bin; `stride` apart are neighbouring pixels of a row.
template <class Scalar, class T>
T average_bin(const Scalar* map, std::span<const Tap<T>> rows, std::span<const Tap<T>> columns,
              std::int64_t width, std::int64_t stride) {
  T sum = T(0);
  for (const Tap<T>& row : rows) {
    T of_row = T(0);
    for (const Tap<T>& column : columns)
      of_row += column.weight * load(map[(row.pixel * width + column.pixel) * stride]);
    sum += row.weight * of_row;
  }
  return sum;
}

// NCHW: a row of bins takes a weighted sum of rows first, over the columns that the region touches.
template <class Scalar, class T>
void average_planes(const Regions& r, const Scalar* map, Scalar* out, PoolScratch<T>& s) {
  const auto& columns = s.taps.columns;
  const std::int64_t first = columns.n > 0 ? columns.taps[0].pixel : 0, width = columns.reach();
  s.sums.resize(static_cast<std::size_t>(width));
  map += first;
  for (std::int64_t c = 0; c < r.c; ++c, map += r.h * r.w) {
    for (std::int64_t row_bin = 0; row_bin < r.pooled_h; ++row_bin) {
      std::fill(s.sums.begin(), s.sums.end(), T(0));
      for (const Tap<T>& row : s.taps.rows.of_bin(row_bin))
        add_scaled(s.sums.data(), map + row.pixel * r.w, row.weight, width);
      for (std::int64_t bin = 0; bin < r.pooled_w; ++bin) {
        T sum = T(0);
        for (const Tap<T>& column : columns.of_bin(bin))
          sum += column.weight * s.sums[static_cast<std::size_t>(column.pixel - first)];
        store(*out++, sum);
      }
    }
  }
}

// Wide regions with few samples: only the pixels that count, without the columns in between.
template <class Scalar, class T>
void average_sparse(const Regions& r, const Scalar* map, Scalar* out, const RegionTaps<T>& taps) {
  for (std::int64_t c = 0; c < r.c; ++c, map += r.h * r.w) {
    for (std::int64_t row_bin = 0; row_bin < r.pooled_h; ++row_bin) {
      const auto rows = taps.rows.of_bin(row_bin);
      for (std::int64_t bin = 0; bin < r.pooled_w; ++bin)
        store(*out++, average_bin(map, rows, taps.columns.of_bin(bin), r.w, 1));
    }
  }
}

// channels_last: all channels of a pixel at once.
template <class Scalar, class T>
void average_last(const Regions& r, const Scalar* map, Scalar* out, PoolScratch<T>& s) {
  s.sums.resize(static_cast<std::size_t>(r.c));
  for (std::int64_t row_bin = 0; row_bin < r.pooled_h; ++row_bin) {
    for (std::int64_t bin = 0; bin < r.pooled_w; ++bin, out += r.c) {
      std::fill(s.sums.begin(), s.sums.end(), T(0));
      for (const Tap<T>& row : s.taps.rows.of_bin(row_bin)) {
        for (const Tap<T>& column : s.taps.columns.of_bin(bin)) {
          const std::int64_t pixel = row.pixel * r.w + column.pixel;
          add_scaled(s.sums.data(), map + pixel * r.c, row.weight * column.weight, r.c);
        }
      }
      for (std::int64_t c = 0; c < r.c; ++c) store(out[c], s.sums[static_cast<std::size_t>(c)]);
    }
  }
}

// All bins of a region out of the maps of all images, with the taps in the scratch.
template <class Scalar, class T>
void average_region(const Regions& r, const Scalar* maps, Scalar* bins, bool channels_last,
                    std::int64_t region, PoolScratch<T>& s) {
  const Scalar* map = maps + std::max<std::int64_t>(s.taps.image, 0) * r.c * r.h * r.w;
  Scalar* out = bins + region * r.c * r.pooled_h * r.pooled_w;
  if (channels_last) return average_last(r, map, out, s);
  // Vectors of columns pay off until three of four are in vain.
  if (s.taps.columns.reach() <= 4 * s.taps.columns.n + 1) return average_planes(r, map, out, s);
  average_sparse(r, map, out, s.taps);
}

// Where the elements of a channel lie, in maps and in bins.
struct BinStrides {
  std::int64_t map_pixel, map_channel, bin, bin_channel;
};
inline BinStrides bin_strides(const Regions& r, bool channels_last) {
  if (channels_last) return {r.c, 1, r.c, 1};
  return {1, r.h * r.w, 1, r.pooled_h * r.pooled_w};
}

// The channels that one task sums, `step` apart, and its buffer: (h, w, lanes); lanes beyond the channels count for
// nothing.
template <class T>
struct GradientTask {
  std::int64_t image, channel, step, channels, lanes;
  std::vector<T> sums;

  T* pixel(const Regions& r, i32 row, i32 column) {
    return sums.data() + (row * r.w + column) * lanes;
  }
};

template <class Scalar, class T>
void add_average(const Regions& r, const Scalar* all_bins, const BinStrides& strides,
                 std::int64_t region, const RegionTaps<T>& taps, GradientTask<T>& task) {
  const Scalar* bins =
      all_bins + region * r.c * r.pooled_h * r.pooled_w + task.channel * strides.bin_channel;
  for (std::int64_t bin = 0; bin < r.pooled_h * r.pooled_w; ++bin, bins += strides.bin) {
    for (const Tap<T>& row : taps.rows.of_bin(bin / r.pooled_w)) {
      for (const Tap<T>& column : taps.columns.of_bin(bin % r.pooled_w)) {
        T* sums = task.pixel(r, row.pixel, column.pixel);
        const T weight = row.weight * column.weight;
        for (std::int64_t c = 0; c < task.channels; ++c)
          sums[c] += weight * load(bins[c * strides.bin_channel]);
      }
    }
  }
}

// Lanes that are one vector for the compiler.
template <class T>
constexpr int kVectorLanes = 16 / sizeof(T);

// NCHW: maps lie `stride` apart. Lanes are turned into maps a block of pixels at a time.
template <class Scalar, class T>
void write_planes(const GradientTask<T>& task, std::int64_t pixels, Scalar* maps,
                  std::int64_t stride) {
  constexpr int kLanes = kVectorLanes<T>, kBlock = 64;
  T planes[kLanes][kBlock];
  for (std::int64_t first = 0; first < pixels; first += kBlock) {
    const std::int64_t n = std::min<std::int64_t>(kBlock, pixels - first);
    const T* sums = task.sums.data() + first * kLanes;
    for (std::int64_t i = 0; i < n; ++i) {
      for (int c = 0; c < kLanes; ++c) planes[c][i] = sums[i * kLanes + c];
    }
    for (std::int64_t c = 0; c < task.channels; ++c) {
      for (std::int64_t i = 0; i < n; ++i) store(maps[c * stride + first + i], planes[c][i]);
    }
  }
}

template <class Scalar, class T>
void write_sums(const Regions& r, Scalar* maps, const BinStrides& strides,
                const GradientTask<T>& task) {
  maps += task.image * r.c * r.h * r.w + task.channel * strides.map_channel;
  if (strides.map_pixel == 1 && task.lanes == kVectorLanes<T>) {
    return write_planes(task, r.h * r.w, maps, task.step * strides.map_channel);
  }
  if (strides.map_pixel == 1 && task.lanes == 1) {  // one map: a vector at a time
    for (std::size_t pixel = 0; pixel < task.sums.size(); ++pixel)
      store(maps[pixel], task.sums[pixel]);
    return;
  }
  for (std::int64_t pixel = 0; pixel < r.h * r.w; ++pixel) {
    for (std::int64_t c = 0; c < task.channels; ++c) {
      store(maps[pixel * strides.map_pixel + c * strides.map_channel],
            task.sums[static_cast<std::size_t>(pixel * task.lanes + c)]);
    }
  }
}

// Which channels a task sums: up to `lanes` of those that are `step` apart. NCHW: one, or a vector.
struct ChannelGroups {
  std::int64_t lanes, step = 1;
};
inline ChannelGroups neighbouring_channels(bool channels_last) { return {channels_last ? 16 : 1}; }

// The gradient of all maps; add(task) adds all regions of a task's image to its sums.
template <class Scalar, class Add>
void run_gradient_tasks(const Regions& r, Scalar* maps, bool channels_last, ChannelGroups groups,
                        const Add& add) {
  const BinStrides strides = bin_strides(r, channels_last);
  const std::int64_t per_step = r.c / groups.step;
  const std::int64_t tasks = (per_step + groups.lanes - 1) / groups.lanes * groups.step;
  const std::int64_t cost = groups.lanes * (r.h * r.w + r.k / r.n * r.pooled_h * r.pooled_w * 20);
  parallel_for(r.n * tasks, cost, [&](std::int64_t begin, std::int64_t end) {
    GradientTask<Acc<Scalar>> task;
    task.step = groups.step;
    task.lanes = groups.lanes;
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t group = item % tasks, first = group / groups.step * groups.lanes;
      task.image = item / tasks;
      task.channel = first * groups.step + group % groups.step;
      task.channels = std::min(groups.lanes, per_step - first);
      task.sums.assign(static_cast<std::size_t>(r.h * r.w * task.lanes), 0);
      add(task);
      write_sums(r, maps, strides, task);
    }
  });
}

// The same with tables of taps. make(region, taps) makes a region's taps, with the image -1 where it has none here;
// add(region, taps, task) adds a region to the sums of a task of its image.
template <class Scalar, class Make, class Add>
void sum_gradients(const Regions& r, Scalar* maps, bool channels_last, const Make& make,
                   const Add& add) {
  using T = Acc<Scalar>;
  std::vector<RegionTaps<T>> taps(static_cast<std::size_t>(r.k));
  parallel_for(r.k, 1000, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) make(k, taps[static_cast<std::size_t>(k)]);
  });
  run_gradient_tasks(r, maps, channels_last, neighbouring_channels(channels_last),
                     [&](GradientTask<T>& task) {
                       for (std::int64_t region = 0; region < r.k; ++region) {
                         const RegionTaps<T>& of_region = taps[static_cast<std::size_t>(region)];
                         if (of_region.image == task.image) add(region, of_region, task);
                       }
                     });
}

}  // namespace torchkiln::bindings
