// prroi_pool on the CPU, by the taps of roi_taps_cpu.h.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/prroi_pool.h"
#include "bindings/detection/roi_taps_cpu.h"

namespace torchkiln::bindings {
namespace {

using prroi_pool::Edges;
using prroi_pool::edges_at;

template <class T>
void make_precise_taps(const Regions& r, std::int64_t region, RegionTaps<T>& taps) {
  taps.make(r, roi_align::image_of<T>(r, region), edges_at<T>(r, region, false),
            edges_at<T>(r, region, true));
}

Tensor forward_cpu(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                   std::int64_t pooled_width, double spatial_scale) {
  const RoiAlignPlan p = plan_prroi_pool(input, boxes, pooled_height, pooled_width, spatial_scale);
  const Regions& r = p.args.regions;
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_batches<Acc<Scalar>>(kPrRoiPool, r);
    if (p.bins.numel() == 0) return;
    if (p.maps.numel() == 0) {
      torch::stable::zero_(const_cast<Tensor&>(p.bins));
      return;
    }
    parallel_for(
        r.k, 20 * r.c * r.pooled_h * r.pooled_w, [&](std::int64_t begin, std::int64_t end) {
          PoolScratch<Acc<Scalar>> scratch;
          for (std::int64_t region = begin; region < end; ++region) {
            make_precise_taps(r, region, scratch.taps);
            average_region(r, static_cast<const Scalar*>(p.args.maps),
                           static_cast<Scalar*>(p.args.bins), p.channels_last, region, scratch);
          }
        });
  });
  return p.bins;
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& boxes, std::int64_t n, std::int64_t c,
                    std::int64_t h, std::int64_t w, double spatial_scale, bool channels_last) {
  RoiAlignPlan p =
      plan_prroi_pool_backward(grad_output, boxes, {n, c, h, w}, spatial_scale, channels_last);
  if (p.maps.numel() == 0) return p.maps;
  p.bins = as_layout(p.bins, channels_last);
  const Regions& r = p.args.regions;
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    using T = Acc<Scalar>;
    check_batches<T>(kPrRoiPool, r);
    const auto* bins = static_cast<const Scalar*>(p.bins.const_data_ptr());
    const BinStrides strides = bin_strides(r, channels_last);
    const auto make = [&](std::int64_t region, RegionTaps<T>& taps) {
      make_precise_taps(r, region, taps);
    };
    const auto add = [&](std::int64_t region, const RegionTaps<T>& taps, GradientTask<T>& task) {
      add_average(r, bins, strides, region, taps, task);
    };
    sum_gradients(r, static_cast<Scalar*>(p.args.maps), channels_last, make, add);
  });
  return p.maps;
}

// Of x1, y1, x2, y2.
template <class T>
struct BoxGradient {
  T at[4] = {};
};

template <class Scalar, class T>
BoxGradient<T> gradient_of_box(const RoiAlignPlan& p, std::int64_t region,
                               const RegionTaps<T>& taps) {
  const Regions& r = p.args.regions;
  const BinStrides strides = bin_strides(r, p.channels_last);
  const Edges<T> y = edges_at<T>(r, region, false), x = edges_at<T>(r, region, true);
  BoxGradient<T> sums;
  if (is_empty(y) || is_empty(x)) return sums;
  const auto* maps = static_cast<const Scalar*>(p.args.maps) + taps.image * r.c * r.h * r.w;
  const auto* bins =
      static_cast<const Scalar*>(p.args.bins) + region * r.c * r.pooled_h * r.pooled_w;
  for (std::int64_t c = 0; c < r.c; ++c) {
    const Scalar* map = maps + c * strides.map_channel;
    const auto value = [&](i32 row, i32 column) {
      return T(load(map[(row * r.w + column) * strides.map_pixel]));
    };
    for (std::int64_t bin = 0; bin < r.pooled_h * r.pooled_w; ++bin) {
      const std::int64_t row_bin = bin / r.pooled_w, column_bin = bin % r.pooled_w;
      const auto rows = taps.rows.of_bin(row_bin), columns = taps.columns.of_bin(column_bin);
      const auto a = prroi_pool::average_of(y, x, row_bin, column_bin, rows.data(),
                                            static_cast<i32>(rows.size()), columns.data(),
                                            static_cast<i32>(columns.size()), value);
      const T scale = static_cast<T>(r.spatial_scale) *
                      T(load(bins[bin * strides.bin + c * strides.bin_channel]));
      const auto of_x =
          prroi_pool::corner_gradient(x, column_bin, r.pooled_w, a.whole, a.left, a.right, scale);
      const auto of_y =
          prroi_pool::corner_gradient(y, row_bin, r.pooled_h, a.whole, a.top, a.bottom, scale);
      sums.at[0] += of_x.low;
      sums.at[1] += of_y.low;
      sums.at[2] += of_x.high;
      sums.at[3] += of_y.high;
    }
  }
  return sums;
}

Tensor box_backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& boxes,
                        double spatial_scale) {
  PrRoiPoolBoxPlan p = plan_prroi_pool_boxes(grad_output, input, boxes, spatial_scale);
  torch::stable::zero_(p.grad_boxes);
  if (p.pooled.bins.numel() == 0 || p.pooled.maps.numel() == 0) return p.grad_boxes;
  const Regions& r = p.pooled.args.regions;
  with_float(input.scalar_type(), [&]<class Scalar>() {
    using T = Acc<Scalar>;
    check_batches<T>(kPrRoiPool, r);
    void* out = p.grad_boxes.mutable_data_ptr();
    const std::int64_t cost = 40 * r.c * r.pooled_h * r.pooled_w;
    parallel_for(r.k, cost, [&](std::int64_t begin, std::int64_t end) {
      RegionTaps<T> taps;
      for (std::int64_t region = begin; region < end; ++region) {
        make_precise_taps(r, region, taps);
        const BoxGradient<T> sums = gradient_of_box<Scalar>(p.pooled, region, taps);
        for (int i = 0; i < 4; ++i) store_as(out, r.box_type, region * 5 + 1 + i, sums.at[i]);
      }
    });
  });
  return p.grad_boxes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("prroi_pool", TORCH_BOX(&forward_cpu));
  m.impl("_prroi_pool_backward", TORCH_BOX(&backward_cpu));
  m.impl("_prroi_pool_box_backward", TORCH_BOX(&box_backward_cpu));
}

}  // namespace torchkiln::bindings
