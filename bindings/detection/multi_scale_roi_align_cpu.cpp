// multi_scale_roi_align on the CPU: each region is pooled on its level, by roi_taps_cpu.h.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/multi_scale_roi_align.h"
#include "bindings/detection/roi_taps_cpu.h"

namespace torchkiln::bindings {
namespace {

using multi_scale_roi_align::Level;
using multi_scale_roi_align::level_of;

template <class Scalar>
void pool_regions(const MultiScalePlan& p, std::int64_t begin, std::int64_t end) {
  using T = Acc<Scalar>;
  const auto& args = p.args;
  PoolScratch<T> scratch;
  for (std::int64_t region = begin; region < end; ++region) {
    const Level& level = args.pyramid.levels[level_of<T>(args.regions, args.pyramid, region)];
    const Regions r = on_level(args.regions, level);
    make_taps_of(r, region, scratch.taps);
    average_region(r, static_cast<const Scalar*>(level.maps), static_cast<Scalar*>(args.bins),
                   p.channels_last, region, scratch);
  }
}

bool has_no_pixel(const MultiScalePlan& p) {
  return std::any_of(p.maps.begin(), p.maps.end(),
                     [](const Tensor& maps) { return maps.numel() == 0; });
}

Tensor forward_cpu(std::vector<Tensor> inputs, const Tensor& boxes, std::int64_t pooled_height,
                   std::int64_t pooled_width, std::vector<double> spatial_scales,
                   std::vector<double> level_sides, std::int64_t sampling_ratio, bool aligned) {
  const RoiAlignOptions o{pooled_height, pooled_width, 1.0, sampling_ratio, aligned};
  MultiScalePlan p = plan_multi_scale(inputs, boxes, o, {spatial_scales, level_sides});
  with_float(p.bins.scalar_type(), [&]<class Scalar>() {
    const Regions& r = p.args.regions;
    check_batches<Acc<Scalar>>("multi_scale_roi_align", r);
    if (p.bins.numel() == 0) return;
    if (has_no_pixel(p)) {
      torch::stable::zero_(p.bins);
      return;
    }
    parallel_for(
        r.k, 20 * r.c * r.pooled_h * r.pooled_w,
        [&](std::int64_t begin, std::int64_t end) { pool_regions<Scalar>(p, begin, end); });
  });
  return p.bins;
}

template <class Scalar>
void gradient_of_level(const MultiScalePlan& p, i32 index) {
  using T = Acc<Scalar>;
  const auto& args = p.args;
  const Level& level = args.pyramid.levels[index];
  const Regions r = on_level(args.regions, level);
  const BinStrides strides = bin_strides(r, p.channels_last);
  const auto make = [&](std::int64_t region, RegionTaps<T>& taps) {
    if (level_of<T>(args.regions, args.pyramid, region) == index) make_taps_of(r, region, taps);
  };
  const auto add = [&](std::int64_t region, const RegionTaps<T>& taps, GradientTask<T>& task) {
    add_average(r, static_cast<const Scalar*>(args.bins), strides, region, taps, task);
  };
  sum_gradients(r, static_cast<Scalar*>(level.maps), p.channels_last, make, add);
}

std::vector<Tensor> backward_cpu(const Tensor& grad_output, const Tensor& boxes, std::int64_t n,
                                 std::int64_t c, std::vector<std::int64_t> sizes,
                                 std::vector<double> spatial_scales,
                                 std::vector<double> level_sides, std::int64_t sampling_ratio,
                                 bool aligned, bool channels_last) {
  const bool four = grad_output.dim() == 4;
  const RoiAlignOptions o{four ? grad_output.size(2) : 1, four ? grad_output.size(3) : 1, 1.0,
                          sampling_ratio, aligned};
  MultiScalePlan p = plan_multi_scale_backward(grad_output, boxes, n, c, sizes, o,
                                               {spatial_scales, level_sides}, channels_last);
  if (has_no_pixel(p)) {
    for (Tensor& maps : p.maps) torch::stable::zero_(maps);
    return gradients_of(p, sizes);
  }
  p.bins = as_layout(p.bins, channels_last);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  with_float(p.bins.scalar_type(), [&]<class Scalar>() {
    check_batches<Acc<Scalar>>("multi_scale_roi_align", p.args.regions);
    for (i32 level = 0; level < p.args.pyramid.count; ++level) gradient_of_level<Scalar>(p, level);
  });
  return gradients_of(p, sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("multi_scale_roi_align", TORCH_BOX(&forward_cpu));
  m.impl("_multi_scale_roi_align_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace torchkiln::bindings
