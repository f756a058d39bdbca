// roi_align on the CPU. Forward: threads over regions; the taps of a region are made once for all channels. Backward:
// threads over maps (channels_last: over groups of channels), each adds all regions of its image in order into a
// buffer of its own: no atomics, the same result for any number of threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "bindings/detection/roi_align.h"
#include "bindings/support/parallel.h"

namespace torchkiln::bindings {
namespace {

using roi_align::Args;
using roi_align::Axis;
using roi_align::Regions;
using roi_align::Tap;
using roi_align::Window;

constexpr std::int64_t kChannelGroup =
    16;  // channels of a channels_last gradient that one task sums

// sums[i] += weight * values[i]
TORCHKILN_VECTORISED void add_scaled(float* __restrict__ sums, const float* __restrict__ values,
                                     float weight, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * values[i];
}
TORCHKILN_VECTORISED void add_scaled(double* __restrict__ sums, const double* __restrict__ values,
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

  void make(const Axis<T>& axis, std::int64_t pooled, std::int64_t size) {
    const std::int64_t touched = size + 3 * pooled;
    const std::int64_t sampled = 2 * std::int64_t{axis.count} * pooled;
    taps.resize(static_cast<std::size_t>(std::min(touched, sampled)));
    begins.resize(static_cast<std::size_t>(pooled + 1));
    n = 0;
    for (std::int64_t bin = 0; bin < pooled; ++bin) {
      begins[static_cast<std::size_t>(bin)] = n;
      n += roi_align::make_taps(axis, bin, size, taps.data() + n);
    }
    begins.back() = n;
  }
  std::span<const Tap<T>> of_bin(std::int64_t bin) const {
    const auto at = static_cast<std::size_t>(bin);
    const auto begin = static_cast<std::size_t>(begins[at]);
    return {taps.data() + begin, static_cast<std::size_t>(begins[at + 1]) - begin};
  }
};

template <class T>
struct RegionTaps {
  std::int64_t batch = -1;
  AxisTaps<T> rows, columns;

  void make(const Regions& r, std::int64_t region) {
    const Window<T> window = roi_align::window_of<T>(r, region);
    batch = window.batch;
    rows.make(window.y, r.pooled_h, r.h);
    columns.make(window.x, r.pooled_w, r.w);
  }
};

// What a forward task needs besides its output.
template <class T>
struct Scratch {
  RegionTaps<T> taps;
  std::vector<T> sums;
};

// NCHW: a row of bins takes a weighted sum of rows first, over the columns that the region touches.
template <class Scalar, class T>
void average_planes(const Args& args, std::int64_t region, Scratch<T>& s) {
  const Regions& r = args.regions;
  const auto& columns = s.taps.columns;
  auto* out = static_cast<Scalar*>(args.bins) + region * r.c * r.pooled_h * r.pooled_w;
  const std::int64_t first = columns.n > 0 ? columns.taps[0].pixel : 0;
  const std::int64_t width =
      columns.n > 0 ? columns.taps[static_cast<std::size_t>(columns.n - 1)].pixel - first + 1 : 0;
  s.sums.resize(static_cast<std::size_t>(width));
  const auto* map = static_cast<const Scalar*>(args.maps) + s.taps.batch * r.c * r.h * r.w + first;
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
void average_sparse(const Args& args, std::int64_t region, Scratch<T>& s) {
  const Regions& r = args.regions;
  auto* out = static_cast<Scalar*>(args.bins) + region * r.c * r.pooled_h * r.pooled_w;
  const auto* map = static_cast<const Scalar*>(args.maps) + s.taps.batch * r.c * r.h * r.w;
  for (std::int64_t c = 0; c < r.c; ++c, map += r.h * r.w) {
    for (std::int64_t row_bin = 0; row_bin < r.pooled_h; ++row_bin) {
      const auto rows = s.taps.rows.of_bin(row_bin);
      for (std::int64_t bin = 0; bin < r.pooled_w; ++bin) {
        T sum = T(0);
        for (const Tap<T>& row : rows) {
          const Scalar* line = map + row.pixel * r.w;
          T of_row = T(0);
          for (const Tap<T>& column : s.taps.columns.of_bin(bin))
            of_row += column.weight * load(line[column.pixel]);
          sum += row.weight * of_row;
        }
        store(*out++, sum);
      }
    }
  }
}

// channels_last: all channels of a pixel at once.
template <class Scalar, class T>
void average_last(const Args& args, std::int64_t region, Scratch<T>& s) {
  const Regions& r = args.regions;
  s.sums.resize(static_cast<std::size_t>(r.c));
  auto* out = static_cast<Scalar*>(args.bins) + region * r.c * r.pooled_h * r.pooled_w;
  const auto* map = static_cast<const Scalar*>(args.maps) + s.taps.batch * r.c * r.h * r.w;
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

// Bilinear value of one channel; `stride` apart are neighbouring pixels of a row.
template <class Scalar, class T>
T value_at(const Scalar* map, const Taps<T>& y, const Taps<T>& x, std::int64_t width,
           std::int64_t stride) {
  if (!y.inside || !x.inside) return T(0);
  const auto at = [&](i32 row, i32 column) { return load(map[(row * width + column) * stride]); };
  return y.weight_low * (x.weight_low * at(y.low, x.low) + x.weight_high * at(y.low, x.high)) +
         y.weight_high * (x.weight_low * at(y.high, x.low) + x.weight_high * at(y.high, x.high));
}

// Where the elements of a channel lie, in maps and in bins.
struct Strides {
  std::int64_t map_pixel, map_channel, bin, bin_channel;
};
Strides strides_of(const Regions& r, bool channels_last) {
  if (channels_last) return {r.c, 1, r.c, 1};
  return {1, r.h * r.w, 1, r.pooled_h * r.pooled_w};
}

template <class T>
std::vector<Taps<T>> samples_of(const Axis<T>& axis, std::int64_t pooled, std::int64_t size) {
  std::vector<Taps<T>> samples;
  for (std::int64_t bin = 0; bin < pooled; ++bin) {
    for (i32 i = 0; i < axis.count; ++i)
      samples.push_back(taps_at(roi_align::sample_position(axis, bin, i), static_cast<i32>(size)));
  }
  return samples;
}

template <class Scalar>
void maximum_region(const Args& args, bool channels_last, std::int64_t region) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const Window<T> window = roi_align::window_of<T>(r, region);
  const auto ys = samples_of(window.y, r.pooled_h, r.h), xs = samples_of(window.x, r.pooled_w, r.w);
  const Strides strides = strides_of(r, channels_last);
  const std::int64_t n_bins = r.pooled_h * r.pooled_w;
  const auto* maps = static_cast<const Scalar*>(args.maps) + window.batch * r.c * r.h * r.w;
  for (std::int64_t c = 0; c < r.c; ++c) {
    for (std::int64_t bin = 0; bin < n_bins; ++bin) {
      const Taps<T>* y = ys.data() + bin / r.pooled_w * window.y.count;
      const Taps<T>* x = xs.data() + bin % r.pooled_w * window.x.count;
      T best = T(0);
      i32 winner = -1;
      for (i32 i = 0; i < window.y.count * window.x.count; ++i) {
        const T value = value_at(maps + c * strides.map_channel, y[i / window.x.count],
                                 x[i % window.x.count], r.w, strides.map_pixel);
        if (winner < 0 || value > best || (is_nan(value) && !is_nan(best))) {
          best = value;
          winner = i;
        }
      }
      const std::int64_t at = region * r.c * n_bins + bin * strides.bin + c * strides.bin_channel;
      store(static_cast<Scalar*>(args.bins)[at], best);
      args.argmax[at] = winner;
    }
  }
}

// A region without a box that is a number has no batch index to be wrong.
template <class T>
void check_batches(const Regions& r) {
  for (std::int64_t region = 0; region < r.k; ++region) {
    const T batch = roi_align::coordinate<T>(r, region, 0);
    if (batch > T(-1) && batch < static_cast<T>(r.n)) continue;
    fail(TORCHKILN_ERROR_INDEX, "roi_align", "boxes",
         "have batch indices from 0 to " + std::to_string(r.n - 1),
         std::to_string(static_cast<double>(batch)) + " in row " + std::to_string(region));
  }
}

template <class Scalar>
void average_region(const Args& args, bool channels_last, std::int64_t region,
                    Scratch<Acc<Scalar>>& scratch) {
  using T = Acc<Scalar>;
  scratch.taps.make(args.regions, region);
  if (channels_last) return average_last<Scalar, T>(args, region, scratch);
  const auto& columns = scratch.taps.columns;
  const std::int64_t width =
      columns.n > 0
          ? columns.taps[static_cast<std::size_t>(columns.n - 1)].pixel - columns.taps[0].pixel
          : 0;
  // Vectors of columns pay off until three of four are in vain.
  if (width <= 4 * columns.n) return average_planes<Scalar, T>(args, region, scratch);
  average_sparse<Scalar, T>(args, region, scratch);
}

RoiAlignPlan run_cpu(RoiAlignPlan p) {
  const Regions& r = p.args.regions;
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_batches<Acc<Scalar>>(r);
    if (p.bins.numel() == 0) return;
    const std::int64_t cost = 20 * r.c * r.pooled_h * r.pooled_w;
    if (p.maps.numel() == 0) {  // no pixel, no sample
      torch::stable::zero_(p.bins);
      if (p.maximum) torch::stable::fill_(p.argmax, -1);
      return;
    }
    parallel_for(r.k, cost, [&](std::int64_t begin, std::int64_t end) {
      Scratch<Acc<Scalar>> scratch;
      for (std::int64_t region = begin; region < end; ++region) {
        if (p.maximum) {
          maximum_region<Scalar>(p.args, p.channels_last, region);
        } else {
          average_region<Scalar>(p.args, p.channels_last, region, scratch);
        }
      }
    });
  });
  return p;
}

// ---- backward ----

// The channels that one task sums, and its buffer: (h, w, channels).
template <class T>
struct GradientTask {
  std::int64_t batch, channel, channels;
  std::vector<T> sums;
};

template <class Scalar, class T>
void add_average(const Args& args, const Strides& strides, std::int64_t region,
                 const RegionTaps<T>& taps, GradientTask<T>& task) {
  const Regions& r = args.regions;
  const auto* bins = static_cast<const Scalar*>(args.bins) +
                     region * r.c * r.pooled_h * r.pooled_w + task.channel * strides.bin_channel;
  for (std::int64_t bin = 0; bin < r.pooled_h * r.pooled_w; ++bin, bins += strides.bin) {
    for (const Tap<T>& row : taps.rows.of_bin(bin / r.pooled_w)) {
      for (const Tap<T>& column : taps.columns.of_bin(bin % r.pooled_w)) {
        T* sums = task.sums.data() + (row.pixel * r.w + column.pixel) * task.channels;
        const T weight = row.weight * column.weight;
        for (std::int64_t c = 0; c < task.channels; ++c)
          sums[c] += weight * load(bins[c * strides.bin_channel]);
      }
    }
  }
}

template <class Scalar, class T>
void add_maximum(const Args& args, const Strides& strides, std::int64_t region,
                 GradientTask<T>& task) {
  const Regions& r = args.regions;
  const Window<T> window = roi_align::window_of<T>(r, region);
  const std::int64_t base = region * r.c * r.pooled_h * r.pooled_w;
  for (std::int64_t bin = 0; bin < r.pooled_h * r.pooled_w; ++bin) {
    for (std::int64_t c = 0; c < task.channels; ++c) {
      const std::int64_t at = base + bin * strides.bin + (task.channel + c) * strides.bin_channel;
      const i32 winner = args.argmax[at];
      if (winner < 0 || winner >= window.y.count * window.x.count) continue;
      const auto y =
          taps_at(roi_align::sample_position(window.y, bin / r.pooled_w, winner / window.x.count),
                  static_cast<i32>(r.h));
      const auto x =
          taps_at(roi_align::sample_position(window.x, bin % r.pooled_w, winner % window.x.count),
                  static_cast<i32>(r.w));
      const T gradient = load(static_cast<const Scalar*>(args.bins)[at]);
      const auto add = [&](i32 row, i32 column, T weight) {
        task.sums[static_cast<std::size_t>((row * r.w + column) * task.channels + c)] +=
            weight * gradient;
      };
      add(y.low, x.low, y.weight_low * x.weight_low);
      add(y.low, x.high, y.weight_low * x.weight_high);
      add(y.high, x.low, y.weight_high * x.weight_low);
      add(y.high, x.high, y.weight_high * x.weight_high);
    }
  }
}

template <class Scalar, class T>
void write_sums(const Args& args, const Strides& strides, const GradientTask<T>& task) {
  const Regions& r = args.regions;
  auto* maps = static_cast<Scalar*>(args.maps) + task.batch * r.c * r.h * r.w +
               task.channel * strides.map_channel;
  for (std::int64_t pixel = 0; pixel < r.h * r.w; ++pixel) {
    for (std::int64_t c = 0; c < task.channels; ++c) {
      store(maps[pixel * strides.map_pixel + c * strides.map_channel],
            task.sums[static_cast<std::size_t>(pixel * task.channels + c)]);
    }
  }
}

template <class Scalar>
void gradient_of_maps(const RoiAlignPlan& p) {
  using T = Acc<Scalar>;
  const Regions& r = p.args.regions;
  const Strides strides = strides_of(r, p.channels_last);
  const std::int64_t group = p.channels_last ? kChannelGroup : 1;
  const std::int64_t groups = (r.c + group - 1) / group;
  std::vector<RegionTaps<T>> taps(static_cast<std::size_t>(r.k));
  parallel_for(r.k, 1000, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) taps[static_cast<std::size_t>(k)].make(r, k);
  });
  const std::int64_t cost = group * (r.h * r.w + r.k / r.n * r.pooled_h * r.pooled_w * 20);
  parallel_for(r.n * groups, cost, [&](std::int64_t begin, std::int64_t end) {
    GradientTask<T> task;
    for (std::int64_t item = begin; item < end; ++item) {
      task.batch = item / groups;
      task.channel = item % groups * group;
      task.channels = std::min<std::int64_t>(group, r.c - task.channel);
      task.sums.assign(static_cast<std::size_t>(r.h * r.w * task.channels), T(0));
      for (std::int64_t region = 0; region < r.k; ++region) {
        const RegionTaps<T>& t = taps[static_cast<std::size_t>(region)];
        if (t.batch != task.batch) continue;
        if (p.maximum) {
          add_maximum<Scalar>(p.args, strides, region, task);
        } else {
          add_average<Scalar>(p.args, strides, region, t, task);
        }
      }
      write_sums<Scalar>(p.args, strides, task);
    }
  });
}

Tensor forward_cpu(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                   std::int64_t pooled_width, double spatial_scale, std::int64_t sampling_ratio,
                   bool aligned, std::int64_t pooling) {
  check_pooling(pooling);
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  return run_cpu(plan_roi_align(input, boxes, o, pooling == roi_align::kMax)).bins;
}

std::tuple<Tensor, Tensor> max_cpu(const Tensor& input, const Tensor& boxes,
                                   std::int64_t pooled_height, std::int64_t pooled_width,
                                   double spatial_scale, std::int64_t sampling_ratio,
                                   bool aligned) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  const RoiAlignPlan p = run_cpu(plan_roi_align(input, boxes, o, true));
  return {p.bins, p.argmax};
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& boxes,
                    const std::optional<Tensor>& argmax, std::int64_t n, std::int64_t c,
                    std::int64_t h, std::int64_t w, double spatial_scale,
                    std::int64_t sampling_ratio, bool aligned, bool channels_last) {
  const RoiAlignOptions o{grad_output.dim() == 4 ? grad_output.size(2) : 1,
                          grad_output.dim() == 4 ? grad_output.size(3) : 1, spatial_scale,
                          sampling_ratio, aligned};
  RoiAlignPlan p =
      plan_roi_align_backward(grad_output, boxes, argmax, {n, c, h, w}, o, channels_last);
  if (p.maps.numel() == 0) return p.maps;
  p.bins = as_layout(p.bins, channels_last);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  if (p.maximum) {
    p.argmax = as_layout(p.argmax, channels_last);
    p.args.argmax = const_cast<i32*>(static_cast<const i32*>(p.argmax.const_data_ptr()));
  }
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_batches<Acc<Scalar>>(p.args.regions);
    gradient_of_maps<Scalar>(p);
  });
  return p.maps;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&forward_cpu));
  m.impl("_roi_align_max", TORCH_BOX(&max_cpu));
  m.impl("_roi_align_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace torchkiln::bindings
