// prroi_pool: schema, launches. Checks and shapes are roi_align's, and so are its kernels but the tables and the
// gradient of boxes. (The CPU version is prroi_pool_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "detection/prroi_pool.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "bindings/detection/prroi_pool.h"
#include "bindings/detection/roi_staged.h"
#include "bindings/detection/roi_taps.h"

namespace torchkiln::bindings {
namespace {

using prroi_pool::BoxArgs;
using prroi_pool::StagedArgs;
using roi_align::Args;

// ---- kernels ----

struct TableStatics {
  std::int64_t scalar;
};
struct StagedStatics {
  std::int64_t scalar, index, maps;
};
struct BoxStatics {
  std::int64_t scalar, index, channels_last;
};
struct Sizes {
  std::int64_t k, c, axis_bins;
};
// Of the kernel that keeps bands of maps in shared memory.
struct StagedSizes {
  std::int64_t groups, k, images, bands, band_bytes, axis_bins;  // groups of maps
};
struct BlockTunables {
  std::int64_t block_size;
};

const std::vector<torchkiln_size> kSizes = {{"k", TORCHKILN_BUCKET_POW2},
                                            {"c", TORCHKILN_BUCKET_POW2},
                                            {"axis_bins", TORCHKILN_BUCKET_NONE}};

const std::vector<torchkiln_size> kStagedSizes = {
    {"groups", TORCHKILN_BUCKET_POW2},     {"k", TORCHKILN_BUCKET_POW2},
    {"images", TORCHKILN_BUCKET_NONE},     {"bands", TORCHKILN_BUCKET_NONE},
    {"band_bytes", TORCHKILN_BUCKET_NONE}, {"axis_bins", TORCHKILN_BUCKET_NONE}};

using Tables = Kernel<Args, TableStatics, Sizes, BlockTunables>;
using Lists = Kernel<StagedArgs, TableStatics, StagedSizes, BlockTunables>;
using Staged = Kernel<StagedArgs, StagedStatics, StagedSizes, BlockTunables>;
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

const Lists lists_kernel({
    .path = "detection/prroi_pool.cuh",
    .entry = "lists",
    .operators = {"prroi_pool"},
    .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
    .sizes = kStagedSizes,
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{512}},
    .geometry =
        [](const Lists::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.images * p.sizes.bands + ceil_div(p.sizes.axis_bins, t.block_size),
                        t.block_size);
        },
});

const std::vector<BlockTunables> kStagedDefaults = {{1024}, {512}, {256}};

const Staged staged_kernel({
    .path = "detection/prroi_pool.cuh",
    .entry = "staged",
    .operators = {"prroi_pool"},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                ints("maps", {1, 2})},
    .sizes = kStagedSizes,
    .tunables = {ints("block_size", {256, 512, 768, 1024})},
    .defaults = kStagedDefaults,
    .choose = [](const Staged::Problem& p) -> std::uint32_t {
      // 64 registers a thread: 1024 threads a multiprocessor.
      return choose_block_size(p.device, p.sizes.groups * p.sizes.bands, p.sizes.band_bytes, 1024,
                               kStagedDefaults);
    },
    .geometry =
        [](const Staged::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.groups * p.sizes.bands, t.block_size,
                        static_cast<std::uint32_t>(p.sizes.band_bytes));
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

// Bands of `maps` maps at a time; count is 0 where `staged` cannot serve. Few regions are not worth whole maps, unless
// these are read in no time.
Bands cut_maps(const Device& device, const RoiAlignPlan& p, std::int64_t maps) {
  constexpr std::int64_t kFewRegions = 4, kManyRegions = 24, kSmallBytes = 8 << 20;
  constexpr std::int64_t kStripeBytes = 34 * 1024;
  const roi_align::Regions& r = p.args.regions;
  const auto element = static_cast<std::int64_t>(element_size(p.maps.scalar_type()));
  const std::int64_t few = p.maps.numel() * element <= kSmallBytes ? kFewRegions : kManyRegions;
  const std::int64_t entries = std::max(r.k * std::max(r.pooled_h, r.n), r.n * r.c);
  if (p.channels_last || r.k <= few * r.n || entries > std::numeric_limits<std::int32_t>::max()) {
    return {0, 0, 0};
  }
  return cut_into_bands(device,
                        {.maps = r.n * r.c / maps,
                         .height = r.h,
                         .row_bytes = r.w * element * maps,
                         // Most bins are lower than 0.6 times those of a region as high as the map.
                         .reach = 2 + r.h * 6 / (10 * r.pooled_h),
                         .budget = device.shared_bytes_per_block - kStripeBytes,
                         .most_rows = r.h});
}

void launch_staged(const CudaPlace& place, const RoiAlignPlan& p, const Bands& bands,
                   std::int64_t maps) {
  const roi_align::Regions& r = p.args.regions;
  StagedArgs args = {.regions = r,
                     .maps = p.maps.const_data_ptr(),
                     .bins = p.bins.mutable_data_ptr(),
                     .taps = nullptr,
                     .ranges = nullptr,
                     .spans = nullptr,
                     .row_capacity = tap_capacity(r.h, r.pooled_h, 0),
                     .column_capacity = tap_capacity(r.w, r.pooled_w, 0),
                     .list = {bands, nullptr, nullptr}};
  const TapTable<StagedArgs> table = allocate_table(p.maps, args);
  const std::int64_t entry_bytes = r.k * r.pooled_h * std::int64_t{sizeof(BandEntry)};
  const std::int64_t part_bytes = r.n * bands.count * std::int64_t{sizeof(Range)};
  const Tensor lists = empty(p.maps, ScalarType::Byte, {entry_bytes + part_bytes});
  auto* const memory = mutable_data<std::uint8_t>(lists);
  args.list.entries = reinterpret_cast<BandEntry*>(memory);
  args.list.parts = reinterpret_cast<Range*>(memory + entry_bytes);
  const std::int64_t band_bytes = maps *
                                  roi_align::band_pitch(bands.height, static_cast<i32>(r.w)) *
                                  static_cast<std::int64_t>(element_size(p.maps.scalar_type()));
  const StagedSizes sizes = {r.n * r.c / maps, r.k,        r.n,
                             bands.count,      band_bytes, r.k * (r.pooled_h + r.pooled_w)};
  constexpr std::size_t list_at = offsetof(StagedArgs, list);
  constexpr std::size_t entries_at = list_at + offsetof(BandList, entries);
  constexpr std::size_t parts_at = list_at + offsetof(BandList, parts);
  const auto made = table.written();
  const bool wide = p.maps.scalar_type() == ScalarType::Double;
  lists_kernel.run(place, {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT}, sizes, args,
                   {reads(offsetof(StagedArgs, regions), p.boxes), made[0], made[1], made[2],
                    writes(entries_at, entry_bytes), writes(parts_at, part_bytes),
                    unused(offsetof(StagedArgs, maps)), unused(offsetof(StagedArgs, bins))});
  const auto read = table.read();
  staged_kernel.run(
      place, {kernel_type(p.maps.scalar_type()), index_type(p.maps, p.bins), maps}, sizes, args,
      {reads(offsetof(StagedArgs, maps), p.maps), writes(offsetof(StagedArgs, bins), p.bins),
       read[0], read[1], read[2], reads(entries_at, entry_bytes), reads(parts_at, part_bytes),
       unused(offsetof(StagedArgs, regions))});
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
  const std::int64_t maps_at_once = p.args.regions.c % 2 == 0 ? 2 : 1;
  const Bands bands = cut_maps(place.facts(), p, maps_at_once);
  if (bands.count > 0) {
    launch_staged(place, p, bands, maps_at_once);
    return p.bins;
  }
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
