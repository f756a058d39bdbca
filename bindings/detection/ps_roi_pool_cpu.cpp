// ps_roi_align and ps_roi_pool on the CPU, by the taps of roi_taps_cpu.h.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <span>
#include <tuple>
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

// What one bin of every region takes of an axis: regions lie one behind the other, as a task reads them.
template <class T>
struct BinTaps {
  std::vector<Tap<T>> taps;
  std::vector<std::size_t> ends;  // of regions

  std::span<const Tap<T>> of_region(std::int64_t region) const {
    const auto at = static_cast<std::size_t>(region);
    const std::size_t begin = at > 0 ? ends[at - 1] : 0;
    return {taps.data() + begin, ends[at] - begin};
  }
};

template <class T>
struct BinTable {
  std::vector<std::int64_t> images;
  std::vector<BinTaps<T>> rows, columns;
};

template <class T>
BinTaps<T> make_bin_taps(const Args& args, ps_roi_pool::Pooling pooling, bool columns,
                         std::int64_t bin) {
  const Regions& r = args.regions;
  const std::int64_t size = columns ? r.w : r.h;
  std::vector<Tap<T>> of_region(static_cast<std::size_t>(size + 3));
  BinTaps<T> out;
  for (std::int64_t region = 0; region < r.k; ++region) {
    const auto make = [&](const auto& axis) {
      const i32 n = make_taps(axis, bin, size, of_region.data());
      out.taps.insert(out.taps.end(), of_region.data(), of_region.data() + n);
    };
    if (pooling == ps_roi_pool::kCells) {
      make(ps_roi_pool::cells_at<T>(args, region, columns));
    } else {
      const auto window = roi_align::window_of<T>(r, region);
      make(columns ? window.x : window.y);
    }
    out.ends.push_back(out.taps.size());
  }
  return out;
}

template <class T>
BinTable<T> make_table(const Args& args, ps_roi_pool::Pooling pooling) {
  const Regions& r = args.regions;
  BinTable<T> table;
  for (std::int64_t region = 0; region < r.k; ++region)
    table.images.push_back(roi_align::image_of<T>(r, region));
  table.rows.resize(static_cast<std::size_t>(r.pooled_h));
  table.columns.resize(static_cast<std::size_t>(r.pooled_w));
  parallel_for(r.pooled_h + r.pooled_w, 50 * r.k, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const bool columns = i >= r.pooled_h;
      const std::int64_t bin = columns ? i - r.pooled_h : i;
      (columns ? table.columns : table.rows)[static_cast<std::size_t>(bin)] =
          make_bin_taps<T>(args, pooling, columns, bin);
    }
  });
  return table;
}

// The sums of a pixel of a task whose channels belong to one bin: they share all but their gradients.
template <class T>
struct LanesOf {
  typedef T Type __attribute__((vector_size(16), may_alias));
};
template <class T>
using Lanes = typename LanesOf<T>::Type;

// One bin of all regions of an image; `stride` apart are the sums of neighbouring pixels, a number or lanes each.
// gradient(region) is of that type.
template <class T, class Sum, class Gradient>
void add_bin(const Regions& r, const BinTable<T>& table, std::int64_t bin, std::int64_t image,
             Sum* sums, std::int64_t stride, const Gradient& gradient) {
  const auto& rows = table.rows[static_cast<std::size_t>(bin / r.pooled_w)];
  const auto& columns = table.columns[static_cast<std::size_t>(bin % r.pooled_w)];
  for (std::int64_t region = 0; region < r.k; ++region) {
    if (table.images[static_cast<std::size_t>(region)] != image) continue;
    const Sum of_region = gradient(region);
    const auto of_columns = columns.of_region(region);
    for (const Tap<T>& row : rows.of_region(region)) {
      const Sum of_row = row.weight * of_region;
      Sum* at = sums + row.pixel * r.w * stride;
      for (const Tap<T>& column : of_columns) at[column.pixel * stride] += column.weight * of_row;
    }
  }
}

template <class Scalar>
void gradient_of_maps(const PsRoiPoolPlan& p) {
  using T = Acc<Scalar>;
  const Regions& r = p.args.regions;
  const std::int64_t n_bins = r.pooled_h * r.pooled_w;
  const auto* bins = static_cast<const Scalar*>(p.args.bins);
  const BinTable<T> table = make_table<T>(p.args, p.kind.pooling);
  const auto gradient_of = [&](std::int64_t region, std::int64_t channel) {
    return T(load(bins[region * r.c + channel]));
  };
  const auto add_neighbours = [&](GradientTask<T>& task) {
    for (std::int64_t c = 0; c < task.channels; ++c) {
      const std::int64_t channel = task.channel + c;
      add_bin(r, table, channel % n_bins, task.image, task.sums.data() + c, task.lanes,
              [&](std::int64_t region) { return gradient_of(region, channel); });
    }
  };
  const auto add_lanes = [&](GradientTask<T>& task) {
    std::int64_t channels[kVectorLanes<T>];  // those beyond the last one repeat it
    for (int c = 0; c < kVectorLanes<T>; ++c)
      channels[c] = task.channel + std::min<std::int64_t>(c, task.channels - 1) * n_bins;
    auto* sums = reinterpret_cast<Lanes<T>*>(task.sums.data());
    add_bin(r, table, task.channel % n_bins, task.image, sums, 1, [&](std::int64_t region) {
      Lanes<T> gradient;
      for (int c = 0; c < kVectorLanes<T>; ++c) gradient[c] = gradient_of(region, channels[c]);
      return gradient;
    });
  };
  auto* maps = static_cast<Scalar*>(p.args.maps);
  if (p.channels_last) {
    run_gradient_tasks(r, maps, true, neighbouring_channels(true), add_neighbours);
  } else {
    run_gradient_tasks(r, maps, false, ChannelGroups{kVectorLanes<T>, n_bins}, add_lanes);
  }
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
