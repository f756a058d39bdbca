// ps_roi_align and ps_roi_pool on the CPU, by the taps of roi_taps_cpu.h.
// SPDX-License-Identifier: Apache-2.0
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/detection/ps_roi_pool.h"
#include "bindings/detection/roi_taps_cpu.h"

namespace torchkiln::bindings {
namespace {

using ps_roi_pool::Args;

template <class T>
void make_taps_of(const Args& args, ps_roi_pool::Pooling pooling, std::int64_t region,
                  RegionTaps<T>& taps) {
  const Regions& r = args.regions;
  if (pooling == ps_roi_pool::kSamples) return make_taps_of(r, region, taps);
  const auto image = roi_align::image_of<T>(r, region);
  taps.make(r, image, ps_roi_pool::cells_at<T>(args, region, false),
            ps_roi_pool::cells_at<T>(args, region, true));
}

template <class Scalar, class T>
void average_channels(const Args& args, bool channels_last, std::int64_t region,
                      const RegionTaps<T>& taps) {
  const Regions& r = args.regions;
  const BinStrides strides = bin_strides(r, channels_last);
  const std::int64_t n_bins = r.pooled_h * r.pooled_w, outputs = r.c / n_bins;
  const auto* map = static_cast<const Scalar*>(args.maps) + taps.image * r.c * r.h * r.w;
  const bool none = is_nan(args.of_none) && is_empty(roi_align::window_of<T>(r, region).y);
  for (std::int64_t c = 0; c < r.c; ++c, map += strides.map_channel) {
    const std::int64_t bin = c % n_bins;
    const T sum = none ? static_cast<T>(args.of_none)
                       : average_bin(map, taps.rows.of_bin(bin / r.pooled_w),
                                     taps.columns.of_bin(bin % r.pooled_w), r.w, strides.map_pixel);
    const std::int64_t at = region * r.c + (channels_last ? bin * outputs + c / n_bins : c);
    store(static_cast<Scalar*>(args.bins)[at], sum);
    if (args.channels != nullptr) args.channels[at] = static_cast<i32>(c);
  }
}

PsRoiPoolPlan run_cpu(PsRoiPoolPlan p) {
  const Regions& r = p.args.regions;
  if (p.maps.numel() == 0) {  // no pixel, no tap
    torch::stable::zero_(p.bins);
    if (p.args.channels != nullptr) torch::stable::zero_(p.channels);
  }
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    using T = Acc<Scalar>;
    check_batches<T>(p.kind.op(), r);
    if (p.bins.numel() == 0 || p.maps.numel() == 0) return;
    parallel_for(r.k, 20 * r.c, [&](std::int64_t begin, std::int64_t end) {
      RegionTaps<T> taps;
      for (std::int64_t region = begin; region < end; ++region) {
        make_taps_of(p.args, p.kind.pooling, region, taps);
        average_channels<Scalar>(p.args, p.channels_last, region, taps);
      }
    });
  });
  return p;
}

// ---- backward ----

template <class Scalar>
void gradient_of_maps(const PsRoiPoolPlan& p) {
  using T = Acc<Scalar>;
  const Regions& r = p.args.regions;
  const std::int64_t n_bins = r.pooled_h * r.pooled_w;
  // Channels of all regions side by side, as tasks read them.
  const Tensor by_channel =
      as_contiguous(torch::stable::transpose(torch::stable::view(p.bins, {r.k, r.c}), 0, 1));
  const auto* bins = static_cast<const Scalar*>(by_channel.const_data_ptr());
  const auto make = [&](std::int64_t region, RegionTaps<T>& taps) {
    make_taps_of(p.args, p.kind.pooling, region, taps);
  };
  // Of each channel: to divide takes as long as to add a bin.
  std::vector<std::pair<std::int64_t, std::int64_t>> row_and_column;
  for (std::int64_t c = 0; c < r.c; ++c)
    row_and_column.emplace_back(c % n_bins / r.pooled_w, c % n_bins % r.pooled_w);
  const auto add = [&](std::int64_t region, const RegionTaps<T>& taps, GradientTask<T>& task) {
    for (std::int64_t c = 0; c < task.channels; ++c) {
      const std::int64_t channel = task.channel + c;
      const auto [row_bin, column_bin] = row_and_column[static_cast<std::size_t>(channel)];
      const auto columns = taps.columns.of_bin(column_bin);
      const T gradient = load(bins[channel * r.k + region]);
      for (const Tap<T>& row : taps.rows.of_bin(row_bin)) {
        T* sums = task.pixel(r, row.pixel, 0) + c;
        const T of_row = row.weight * gradient;
        for (const Tap<T>& column : columns)
          sums[column.pixel * task.channels] += column.weight * of_row;
      }
    }
  };
  sum_gradients(r, static_cast<Scalar*>(p.args.maps), p.channels_last, make, add);
}

Tensor align_cpu(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                 std::int64_t pooled_width, double spatial_scale, std::int64_t sampling_ratio) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, true};
  return run_cpu(plan_ps_roi_pool(input, boxes, o, {ps_roi_pool::kSamples}, false)).bins;
}

Tensor pool_cpu(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                std::int64_t pooled_width, double spatial_scale) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, -1, true};
  return run_cpu(plan_ps_roi_pool(input, boxes, o, {ps_roi_pool::kCells}, false)).bins;
}

std::tuple<Tensor, Tensor> mapped_cpu(const Tensor& input, const Tensor& boxes,
                                      std::int64_t pooled_height, std::int64_t pooled_width,
                                      double spatial_scale, std::int64_t sampling_ratio,
                                      std::int64_t pooling, bool as_torchvision) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, true};
  const PsRoiPoolPlan p =
      run_cpu(plan_ps_roi_pool(input, boxes, o, ps_roi_pool_kind(pooling, as_torchvision), true));
  return {p.bins, p.channels};
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& boxes, std::int64_t n, std::int64_t c,
                    std::int64_t h, std::int64_t w, double spatial_scale,
                    std::int64_t sampling_ratio, std::int64_t pooling, bool channels_last) {
  const bool four = grad_output.dim() == 4;
  const RoiAlignOptions o{four ? grad_output.size(2) : 1, four ? grad_output.size(3) : 1,
                          spatial_scale, sampling_ratio, true};
  PsRoiPoolPlan p = plan_ps_roi_pool_backward(grad_output, boxes, {n, c, h, w}, o,
                                              ps_roi_pool_kind(pooling, false), channels_last);
  if (p.maps.numel() == 0) return p.maps;
  p.bins = as_contiguous(p.bins);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_batches<Acc<Scalar>>(p.kind.op(), p.args.regions);
    gradient_of_maps<Scalar>(p);
  });
  return p.maps;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("ps_roi_align", TORCH_BOX(&align_cpu));
  m.impl("ps_roi_pool", TORCH_BOX(&pool_cpu));
  m.impl("_ps_roi_pool_mapped", TORCH_BOX(&mapped_cpu));
  m.impl("_ps_roi_pool_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace torchkiln::bindings
