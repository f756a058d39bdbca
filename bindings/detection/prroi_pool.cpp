// prroi_pool: schema, launches. Checks and shapes are roi_align's, and so are its kernels but the tables and the
// gradient of boxes. (The CPU version is prroi_pool_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "detection/prroi_pool.h"

#include <cstddef>

#include "bindings/detection/prroi_pool.h"
#include "bindings/detection/roi_taps.h"

namespace torchkiln::bindings {
namespace {

using prroi_pool::BoxArgs;
using roi_align::Args;

// ---- kernels ----

struct TableStatics {
  std::int64_t scalar;
};
struct BoxStatics {
  std::int64_t scalar, index, channels_last;
};
struct Sizes {
  std::int64_t k, c, axis_bins;
};
struct BlockTunables {
  std::int64_t block_size;
};

const std::vector<torchkiln_size> kSizes = {{"k", TORCHKILN_BUCKET_POW2},
                                            {"c", TORCHKILN_BUCKET_POW2},
                                            {"axis_bins", TORCHKILN_BUCKET_NONE}};

using Tables = Kernel<Args, TableStatics, Sizes, BlockTunables>;
using Boxes = Kernel<BoxArgs, BoxStatics, Sizes, BlockTunables>;

const Tables tables_kernel({
    .path = "detection/prroi_pool.cuh",
    .entry = "tables",
    .operators = {"prroi_pool"},
    .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{64}},
    .geometry =
        [](const Tables::Problem& p, const BlockTunables& t) {
          return linear(ceil_div(p.sizes.axis_bins, t.block_size), t.block_size);
        },
});

const Boxes boxes_kernel({
    .path = "detection/prroi_pool.cuh",
    .entry = "boxes",
    .operators = {"prroi_pool"},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                bools("channels_last")},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}},
    .geometry = [](const Boxes::Problem& p,
                   const BlockTunables& t) { return linear(p.sizes.k, t.block_size); },
});

// ---- launches ----

TapTable<Args> make_table(const CudaPlace& place, const Tensor& like, const Tensor& boxes,
                          Args& args) {
  const roi_align::Regions& r = args.regions;
  args.row_capacity = tap_capacity(r.h, r.pooled_h, 0);
  args.column_capacity = tap_capacity(r.w, r.pooled_w, 0);
  TapTable<Args> table = allocate_table(like, args);
  const auto [taps, ranges, spans] = table.written();
  const bool wide = like.scalar_type() == ScalarType::Double;
  tables_kernel.run(
      place, {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT},
      {r.k, r.c, r.k * (r.pooled_h + r.pooled_w)}, args,
      {reads(offsetof(Args, regions), boxes), taps, ranges, spans, unused(offsetof(Args, maps)),
       unused(offsetof(Args, bins)), unused(offsetof(Args, argmax))});
  return table;
}

Tensor forward_cuda(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                    std::int64_t pooled_width, double spatial_scale) {
  RoiAlignPlan p = plan_prroi_pool(input, boxes, pooled_height, pooled_width, spatial_scale);
  if (p.bins.numel() == 0) return p.bins;
  if (p.maps.numel() == 0) {
    torch::stable::zero_(p.bins);
    return p.bins;
  }
  const CudaPlace place(p.maps);
  average_by_table(place, p, make_table(place, p.maps, p.boxes, p.args));
  return p.bins;
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& boxes, std::int64_t n, std::int64_t c,
                     std::int64_t h, std::int64_t w, double spatial_scale, bool channels_last) {
  RoiAlignPlan p =
      plan_prroi_pool_backward(grad_output, boxes, {n, c, h, w}, spatial_scale, channels_last);
  if (p.maps.numel() == 0) return p.maps;
  if (p.bins.numel() == 0) {
    torch::stable::zero_(p.maps);
    return p.maps;
  }
  const CudaPlace place(p.maps);
  p.bins = as_layout(place, p.bins, true);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  gather_by_table(place, p, make_table(place, p.maps, p.boxes, p.args));
  return p.maps;
}

Tensor box_backward_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& boxes,
                         double spatial_scale) {
  PrRoiPoolBoxPlan p = plan_prroi_pool_boxes(grad_output, input, boxes, spatial_scale);
  RoiAlignPlan& pooled = p.pooled;
  if (p.grad_boxes.numel() == 0) return p.grad_boxes;
  if (pooled.bins.numel() == 0 || pooled.maps.numel() == 0) {
    torch::stable::zero_(p.grad_boxes);
    return p.grad_boxes;
  }
  const CudaPlace place(pooled.maps);
  const TapTable<Args> table = make_table(place, pooled.maps, pooled.boxes, pooled.args);
  const Args& a = pooled.args;
  const BoxArgs args = {.regions = a.regions,
                        .maps = a.maps,
                        .gradients = a.bins,
                        .grad_boxes = p.grad_boxes.mutable_data_ptr(),
                        .taps = a.taps,
                        .ranges = a.ranges,
                        .spans = a.spans,
                        .row_capacity = a.row_capacity,
                        .column_capacity = a.column_capacity};
  boxes_kernel.run(
      place,
      {kernel_type(pooled.maps.scalar_type()), index_type(pooled.maps, pooled.bins),
       pooled.channels_last},
      {a.regions.k, a.regions.c, 0}, args,
      {reads(offsetof(BoxArgs, regions), pooled.boxes), reads(offsetof(BoxArgs, maps), pooled.maps),
       reads(offsetof(BoxArgs, gradients), pooled.bins),
       writes(offsetof(BoxArgs, grad_boxes), p.grad_boxes),
       reads(offsetof(BoxArgs, taps), table.tap_bytes),
       reads(offsetof(BoxArgs, ranges), table.range_bytes),
       reads(offsetof(BoxArgs, spans), table.span_bytes)});
  return p.grad_boxes;
}

}  // namespace

// ---- checks and shapes ----

RoiAlignPlan plan_prroi_pool(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                             std::int64_t pooled_width, double spatial_scale) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, -1, false};
  return plan_roi_align(kPrRoiPool, input, boxes, o, false);
}

RoiAlignPlan plan_prroi_pool_backward(const Tensor& grad_output, const Tensor& boxes,
                                      const RoiAlignShape& shape, double spatial_scale,
                                      bool channels_last) {
  const bool four = grad_output.dim() == 4;
  const RoiAlignOptions o{four ? grad_output.size(2) : 1, four ? grad_output.size(3) : 1,
                          spatial_scale, -1, false};
  return plan_roi_align_backward(kPrRoiPool, grad_output, boxes, std::nullopt, shape, o,
                                 channels_last);
}

PrRoiPoolBoxPlan plan_prroi_pool_boxes(const Tensor& grad_output, const Tensor& input,
                                       const Tensor& boxes, double spatial_scale) {
  check_floating(kPrRoiPool, "grad_output", grad_output);
  check_dim(kPrRoiPool, "grad_output", grad_output, 4, "(K, C, pooled_height, pooled_width)");
  check_same_dtype(kPrRoiPool, "grad_output", grad_output, "input", input);
  PrRoiPoolBoxPlan p{
      .pooled =
          plan_prroi_pool(input, boxes, grad_output.size(2), grad_output.size(3), spatial_scale),
      .grad_boxes = empty(boxes, boxes.scalar_type(), {boxes.size(0), boxes.size(1)})};
  check_same_device(kPrRoiPool, "grad_output", grad_output, "input", input);
  check_shape(kPrRoiPool, "grad_output", grad_output,
              {boxes.size(0), input.size(1), grad_output.size(2), grad_output.size(3)});
  p.pooled.bins = as_layout(grad_output, p.pooled.channels_last);
  p.pooled.args.bins = const_cast<void*>(p.pooled.bins.const_data_ptr());
  return p;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "prroi_pool(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1.0) -> Tensor");
  m.def(
      "_prroi_pool_backward(Tensor grad_output, Tensor boxes, int n, int c, int h, int w, "
      "float spatial_scale, bool channels_last) -> Tensor");
  m.def(
      "_prroi_pool_box_backward(Tensor grad_output, Tensor input, Tensor boxes, "
      "float spatial_scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("prroi_pool", TORCH_BOX(&torchkiln::bindings::forward_cuda));
  m.impl("_prroi_pool_backward", TORCH_BOX(&torchkiln::bindings::backward_cuda));
  m.impl("_prroi_pool_box_backward", TORCH_BOX(&torchkiln::bindings::box_backward_cuda));
}
