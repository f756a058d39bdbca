// roi_align on the CPU: averages by roi_taps_cpu.h, and maxima.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/detection/roi_align.h"
#include "bindings/detection/roi_taps_cpu.h"

namespace torchkiln::bindings {
namespace {

using roi_align::Args;
using roi_align::Axis;
using roi_align::Window;

// Bilinear value of one channel; `stride` apart are neighbouring pixels of a row.
template <class Scalar, class T>
T value_at(const Scalar* map, const Taps<T>& y, const Taps<T>& x, std::int64_t width,
           std::int64_t stride) {
  if (!y.inside || !x.inside) return T(0);
  const auto at = [&](i32 row, i32 column) { return load(map[(row * width + column) * stride]); };
  return y.weight_low * (x.weight_low * at(y.low, x.low) + x.weight_high * at(y.low, x.high)) +
         y.weight_high * (x.weight_low * at(y.high, x.low) + x.weight_high * at(y.high, x.high));
}

template <class T>
std::vector<Taps<T>> samples_of(const Axis<T>& axis, std::int64_t pooled, std::int64_t size) {
  std::vector<Taps<T>> samples;
  for (std::int64_t bin = 0; bin < pooled; ++bin) {
    for (i32 i = 0; i < axis.count; ++i)
      samples.push_back(roi_align::sample_taps(axis, bin, i, size));
  }
  return samples;
}

template <class Scalar>
void maximum_region(const Args& args, bool channels_last, std::int64_t region) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const Window<T> window = roi_align::window_of<T>(r, region);
  const auto ys = samples_of(window.y, r.pooled_h, r.h), xs = samples_of(window.x, r.pooled_w, r.w);
  const BinStrides strides = bin_strides(r, channels_last);
  const std::int64_t n_bins = r.pooled_h * r.pooled_w;
  const auto* maps = static_cast<const Scalar*>(args.maps) + window.batch * r.c * r.h * r.w;
  for (std::int64_t c = 0; c < r.c; ++c) {
    for (std::int64_t bin = 0; bin < n_bins; ++bin) {
      const Taps<T>* y = ys.data() + bin / r.pooled_w * window.y.count;
      const Taps<T>* x = xs.data() + bin % r.pooled_w * window.x.count;
      i32 y_first, y_last, x_first, x_last;
      roi_align::sample_range(window.y, bin / r.pooled_w, r.h, y_first, y_last, 1);
      roi_align::sample_range(window.x, bin % r.pooled_w, r.w, x_first, x_last, 1);
      T best = T(0);
      i32 winner = -1;
      for (i32 iy = y_first; iy < y_last; ++iy) {
        for (i32 ix = x_first; ix < x_last; ++ix) {
          const T value =
              value_at(maps + c * strides.map_channel, y[iy], x[ix], r.w, strides.map_pixel);
          if (winner < 0 || value > best || (is_nan(value) && !is_nan(best))) {
            best = value;
            winner = iy * window.x.count + ix;
          }
        }
      }
      const std::int64_t at = region * r.c * n_bins + bin * strides.bin + c * strides.bin_channel;
      store(static_cast<Scalar*>(args.bins)[at], best);
      args.argmax[at] = winner;
    }
  }
}

RoiAlignPlan run_cpu(RoiAlignPlan p) {
  const Regions& r = p.args.regions;
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_batches<Acc<Scalar>>("roi_align", r);
    if (p.bins.numel() == 0) return;
    const std::int64_t cost = 20 * r.c * r.pooled_h * r.pooled_w;
    if (p.maps.numel() == 0) {  // no pixel, no sample
      torch::stable::zero_(p.bins);
      if (p.maximum) torch::stable::fill_(p.argmax, -1);
      return;
    }
    parallel_for(r.k, cost, [&](std::int64_t begin, std::int64_t end) {
      PoolScratch<Acc<Scalar>> scratch;
      for (std::int64_t region = begin; region < end; ++region) {
        if (p.maximum) {
          maximum_region<Scalar>(p.args, p.channels_last, region);
        } else {
          make_taps_of(r, region, scratch.taps);
          average_region(r, static_cast<const Scalar*>(p.args.maps),
                         static_cast<Scalar*>(p.args.bins), p.channels_last, region, scratch);
        }
      }
    });
  });
  return p;
}

// ---- backward ----

template <class Scalar, class T>
void add_maximum(const Args& args, const BinStrides& strides, std::int64_t region,
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
          roi_align::sample_taps(window.y, bin / r.pooled_w, winner / window.x.count, r.h);
      const auto x =
          roi_align::sample_taps(window.x, bin % r.pooled_w, winner % window.x.count, r.w);
      const T gradient = load(static_cast<const Scalar*>(args.bins)[at]);
      const auto add = [&](i32 row, i32 column, T weight) {
        task.pixel(r, row, column)[c] += weight * gradient;
      };
      add(y.low, x.low, y.weight_low * x.weight_low);
      add(y.low, x.high, y.weight_low * x.weight_high);
      add(y.high, x.low, y.weight_high * x.weight_low);
      add(y.high, x.high, y.weight_high * x.weight_high);
    }
  }
}

template <class Scalar>
void gradient_of_maps(const RoiAlignPlan& p) {
  using T = Acc<Scalar>;
  const Regions& r = p.args.regions;
  const BinStrides strides = bin_strides(r, p.channels_last);
  const auto make = [&](std::int64_t region, RegionTaps<T>& taps) {
    make_taps_of(r, region, taps);
  };
  const auto add = [&](std::int64_t region, const RegionTaps<T>& taps, GradientTask<T>& task) {
    if (p.maximum) return add_maximum<Scalar>(p.args, strides, region, task);
    add_average(r, static_cast<const Scalar*>(p.args.bins), strides, region, taps, task);
  };
  sum_gradients(r, static_cast<Scalar*>(p.args.maps), p.channels_last, make, add);
}

Tensor forward_cpu(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                   std::int64_t pooled_width, double spatial_scale, std::int64_t sampling_ratio,
                   bool aligned, std::int64_t pooling) {
  check_pooling(pooling);
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  return run_cpu(plan_roi_align("roi_align", input, boxes, o, pooling == roi_align::kMax)).bins;
}

std::tuple<Tensor, Tensor> max_cpu(const Tensor& input, const Tensor& boxes,
                                   std::int64_t pooled_height, std::int64_t pooled_width,
                                   double spatial_scale, std::int64_t sampling_ratio,
                                   bool aligned) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  const RoiAlignPlan p = run_cpu(plan_roi_align("roi_align", input, boxes, o, true));
  return {p.bins, p.argmax};
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& boxes,
                    const std::optional<Tensor>& argmax, std::int64_t n, std::int64_t c,
                    std::int64_t h, std::int64_t w, double spatial_scale,
                    std::int64_t sampling_ratio, bool aligned, bool channels_last) {
  const RoiAlignOptions o{grad_output.dim() == 4 ? grad_output.size(2) : 1,
                          grad_output.dim() == 4 ? grad_output.size(3) : 1, spatial_scale,
                          sampling_ratio, aligned};
  RoiAlignPlan p = plan_roi_align_backward("roi_align", grad_output, boxes, argmax, {n, c, h, w}, o,
                                           channels_last);
  if (p.maps.numel() == 0) return p.maps;
  p.bins = as_layout(p.bins, channels_last);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  if (p.maximum) {
    p.argmax = as_layout(p.argmax, channels_last);
    p.args.argmax = const_cast<i32*>(static_cast<const i32*>(p.argmax.const_data_ptr()));
  }
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_batches<Acc<Scalar>>("roi_align", p.args.regions);
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
