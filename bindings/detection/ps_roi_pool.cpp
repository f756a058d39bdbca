// ps_roi_align and ps_roi_pool: schemas, checks and shapes, launches. (The CPU version is ps_roi_pool_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/ps_roi_pool.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <tuple>

#include "bindings/detection/roi_taps.h"

namespace torchkiln::bindings {
namespace {

using ps_roi_pool::Args;

// ---- kernels ----

struct TableStatics {
  std::int64_t scalar, pooling;
};
struct MapStatics {
  std::int64_t scalar, index, channels_last;
};
struct Sizes {
  std::int64_t n, c, h, w, k, pooled_h, pooled_w;
};
struct BlockTunables {
  std::int64_t block_size;
};
struct TileTunables {
  std::int64_t tile_h, tile_w, lane_channels, block_size;
};

const std::vector<const char*> kOperators = {"ps_roi_align", "ps_roi_pool"};
const std::vector<std::int64_t> kIndexTypes = {TORCHKILN_I32, TORCHKILN_I64};
const std::vector<torchkiln_size> kSizes = {
    {"n", TORCHKILN_BUCKET_NONE},        {"c", TORCHKILN_BUCKET_POW2},
    {"h", TORCHKILN_BUCKET_NONE},        {"w", TORCHKILN_BUCKET_NONE},
    {"k", TORCHKILN_BUCKET_POW2},        {"pooled_h", TORCHKILN_BUCKET_NONE},
    {"pooled_w", TORCHKILN_BUCKET_NONE},
};

using Tables = Kernel<Args, TableStatics, Sizes, BlockTunables>;
using Forward = Kernel<Args, MapStatics, Sizes, BlockTunables>;
using Backward = Kernel<Args, MapStatics, Sizes, TileTunables>;

const Tables tables_kernel({
    .path = "detection/ps_roi_pool.cuh",
    .entry = "tables",
    .operators = kOperators,
    .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE}), ints("pooling", {0, 1})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{64}},
    .geometry =
        [](const Tables::Problem& p, const BlockTunables& t) {
          const std::int64_t bins = p.sizes.k * (p.sizes.pooled_h + p.sizes.pooled_w);
          return linear(ceil_div(bins, t.block_size), t.block_size);
        },
});

const Forward forward_kernel({
    .path = "detection/ps_roi_pool.cuh",
    .entry = "forward",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), bools("channels_last")},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .geometry =
        [](const Forward::Problem& p, const BlockTunables& t) {
          const std::int64_t rows_of_bins = p.sizes.n * p.sizes.c / p.sizes.pooled_w;
          Geometry g = linear(rows_of_bins, t.block_size);
          // Regions are divided among several blocks until the GPU is full.
          const std::int64_t at_once = std::max<std::int64_t>(1, t.block_size / p.sizes.pooled_w);
          const std::int64_t wanted =
              ceil_div(16 * p.device.multiprocessors, std::max<std::int64_t>(1, rows_of_bins));
          g.grid[1] = static_cast<std::uint32_t>(
              std::clamp<std::int64_t>(wanted, 1, ceil_div(p.sizes.k, at_once)));
          return g;
        },
});

std::int64_t tile_blocks(const Sizes& s, const TileTunables& t) {
  return s.n * ceil_div(s.h, t.tile_h) * ceil_div(s.w, t.tile_w) *
         ceil_div(s.c, 32 * t.lane_channels);
}

// A bin has few rows, which warps would share: a block is one warp or few.
const Backward backward_kernel({
    .path = "detection/ps_roi_pool.cuh",
    .entry = "backward",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), bools("channels_last")},
    .sizes = kSizes,
    .tunables = {ints("tile_h", {4, 8, 16}), ints("tile_w", {8, 16}), ints("lane_channels", {1, 2}),
                 ints("block_size", {32, 64, 128})},
    .defaults = {{8, 8, 1, 32}},
    .legal =
        [](const Backward::Problem& p, const TileTunables& t) {
          const std::int64_t bytes = p.statics.scalar == TORCHKILN_DOUBLE ? 8 : 4;
          return t.tile_h * t.tile_w * (32 * t.lane_channels + 1) * bytes <= 40 * 1024;
        },
    .geometry = [](const Backward::Problem& p,
                   const TileTunables& t) { return linear(tile_blocks(p.sizes, t), t.block_size); },
});

// ---- launches ----

Sizes sizes_of(const PsRoiPoolPlan& p) {
  const roi_align::Regions& r = p.args.regions;
  return {r.n, r.c, r.h, r.w, r.k, r.pooled_h, r.pooled_w};
}

TapTable<Args> make_table(const CudaPlace& place, PsRoiPoolPlan& p) {
  const roi_align::Regions& r = p.args.regions;
  const std::int64_t samples = p.kind.pooling == ps_roi_pool::kSamples ? r.sampling_ratio : 0;
  p.args.row_capacity = tap_capacity(r.h, r.pooled_h, samples);
  p.args.column_capacity = tap_capacity(r.w, r.pooled_w, samples);
  TapTable<Args> table = allocate_table(p.maps, p.args);
  const auto [taps, ranges, spans] = table.written();
  const bool wide = p.maps.scalar_type() == ScalarType::Double;
  tables_kernel.run(
      place, {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT, p.kind.pooling}, sizes_of(p), p.args,
      {reads(offsetof(Args, regions), p.boxes), taps, ranges, spans, unused(offsetof(Args, maps)),
       unused(offsetof(Args, bins)), unused(offsetof(Args, channels))});
  return table;
}

MapStatics statics_of(const PsRoiPoolPlan& p) {
  return {kernel_type(p.maps.scalar_type()), index_type(p.maps, p.bins), p.channels_last};
}

PsRoiPoolPlan run_cuda(PsRoiPoolPlan p) {
  if (p.bins.numel() == 0) return p;
  if (p.maps.numel() == 0) {  // no pixel, no tap
    torch::stable::zero_(p.bins);
    if (p.args.channels != nullptr) torch::stable::zero_(p.channels);
    return p;
  }
  const CudaPlace place(p.maps);
  const TapTable<Args> table = make_table(place, p);
  const auto [taps, ranges, spans] = table.read();
  const Buffer channels = p.args.channels != nullptr ? writes(offsetof(Args, channels), p.channels)
                                                     : writes(offsetof(Args, channels), 0);
  forward_kernel.run(place, statics_of(p), sizes_of(p), p.args,
                     {reads(offsetof(Args, maps), p.maps), writes(offsetof(Args, bins), p.bins),
                      channels, taps, ranges, spans, unused(offsetof(Args, regions))});
  return p;
}

Tensor align_cuda(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                  std::int64_t pooled_width, double spatial_scale, std::int64_t sampling_ratio) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, true};
  return run_cuda(plan_ps_roi_pool(input, boxes, o, {ps_roi_pool::kSamples}, false)).bins;
}

Tensor pool_cuda(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                 std::int64_t pooled_width, double spatial_scale) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, -1, true};
  return run_cuda(plan_ps_roi_pool(input, boxes, o, {ps_roi_pool::kCells}, false)).bins;
}

std::tuple<Tensor, Tensor> mapped_cuda(const Tensor& input, const Tensor& boxes,
                                       std::int64_t pooled_height, std::int64_t pooled_width,
                                       double spatial_scale, std::int64_t sampling_ratio,
                                       std::int64_t pooling, bool as_torchvision) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, true};
  const PsRoiPoolPlan p =
      run_cuda(plan_ps_roi_pool(input, boxes, o, ps_roi_pool_kind(pooling, as_torchvision), true));
  return {p.bins, p.channels};
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& boxes, std::int64_t n, std::int64_t c,
                     std::int64_t h, std::int64_t w, double spatial_scale,
                     std::int64_t sampling_ratio, std::int64_t pooling, bool channels_last) {
  const bool four = grad_output.dim() == 4;
  const RoiAlignOptions o{four ? grad_output.size(2) : 1, four ? grad_output.size(3) : 1,
                          spatial_scale, sampling_ratio, true};
  PsRoiPoolPlan p = plan_ps_roi_pool_backward(grad_output, boxes, {n, c, h, w}, o,
                                              ps_roi_pool_kind(pooling, false), channels_last);
  if (p.maps.numel() == 0) return p.maps;
  if (p.bins.numel() == 0) {
    torch::stable::zero_(p.maps);
    return p.maps;
  }
  const CudaPlace place(p.maps);
  p.bins = as_contiguous(p.bins);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  const TapTable<Args> table = make_table(place, p);
  const auto [taps, ranges, spans] = table.read();
  backward_kernel.run(place, statics_of(p), sizes_of(p), p.args,
                      {reads(offsetof(Args, bins), p.bins), taps, ranges, spans,
                       writes(offsetof(Args, maps), p.maps), unused(offsetof(Args, regions)),
                       unused(offsetof(Args, channels))});
  return p.maps;
}

// ---- checks and shapes ----

void check_all(const char* op, const Tensor& boxes, const RoiAlignShape& shape,
               const RoiAlignOptions& options, PsRoiPoolKind kind) {
  check_regions(op, boxes, options);
  check_shape_of_maps(op, shape);
  const std::int64_t pooled = std::max(options.pooled_height, options.pooled_width);
  if (kind.pooling == ps_roi_pool::kCells && pooled > roi_pool::kMaxPooled) {
    fail(TORCHKILN_ERROR_VALUE, op, "output_size", "be at most 1024", std::to_string(pooled));
  }
  const std::int64_t bins = options.pooled_height * options.pooled_width;
  if (shape.c % bins == 0) return;
  fail(TORCHKILN_ERROR_VALUE, op, "input",
       "have a multiple of " + std::to_string(bins) + " channels, one for each bin",
       std::to_string(shape.c));
}

ps_roi_pool::Args args_of(const PsRoiPoolPlan& p, const RoiAlignShape& shape,
                          const RoiAlignOptions& options) {
  ps_roi_pool::Args args{};
  args.regions = regions_of(p.boxes, shape, options);
  args.maps = const_cast<void*>(p.maps.const_data_ptr());
  args.bins = const_cast<void*>(p.bins.const_data_ptr());
  const bool samples = p.kind.pooling == ps_roi_pool::kSamples;
  args.margin = p.kind.as_torchvision && !samples ? 1 : 0;
  const bool nan_for_none = p.kind.as_torchvision && samples && options.sampling_ratio <= 0;
  args.of_none = nan_for_none ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  return args;
}

}  // namespace

PsRoiPoolKind ps_roi_pool_kind(std::int64_t pooling, bool as_torchvision) {
  if (pooling != ps_roi_pool::kSamples && pooling != ps_roi_pool::kCells) {
    fail(TORCHKILN_ERROR_VALUE, "ps_roi_pool", "pooling", "be 0 (samples) or 1 (cells)",
         std::to_string(pooling));
  }
  return {static_cast<ps_roi_pool::Pooling>(pooling), as_torchvision};
}

PsRoiPoolPlan plan_ps_roi_pool(const Tensor& input, const Tensor& boxes,
                               const RoiAlignOptions& options, PsRoiPoolKind kind,
                               bool with_channels) {
  const char* op = kind.op();
  check_floating(op, "input", input);
  check_dim(op, "input", input, 4, "(N, C, H, W)");
  const RoiAlignShape shape{input.size(0), input.size(1), input.size(2), input.size(3)};
  check_all(op, boxes, shape, options, kind);
  check_same_device(op, "boxes", boxes, "input", input);
  const bool channels_last = is_channels_last(input);
  const std::array<std::int64_t, 4> out = {boxes.size(0),
                                           shape.c / (options.pooled_height * options.pooled_width),
                                           options.pooled_height, options.pooled_width};
  PsRoiPoolPlan p{.kind = kind,
                  .channels_last = channels_last,
                  .maps = channels_last ? input : as_contiguous(input),
                  .boxes = as_contiguous(boxes),
                  .bins = empty_layout(input, input.scalar_type(), out, channels_last),
                  .channels = with_channels
                                  ? empty_layout(input, ScalarType::Int, out, channels_last)
                                  : Tensor(),
                  .args = {}};
  p.args = args_of(p, shape, options);
  if (with_channels) p.args.channels = mutable_data<i32>(p.channels);
  return p;
}

PsRoiPoolPlan plan_ps_roi_pool_backward(const Tensor& grad_output, const Tensor& boxes,
                                        const RoiAlignShape& shape, const RoiAlignOptions& options,
                                        PsRoiPoolKind kind, bool channels_last) {
  const char* op = kind.op();
  check_floating(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4, "(K, C, pooled_height, pooled_width)");
  check_all(op, boxes, shape, options, kind);
  check_same_device(op, "boxes", boxes, "grad_output", grad_output);
  check_shape(op, "grad_output", grad_output,
              {boxes.size(0), shape.c / (options.pooled_height * options.pooled_width),
               options.pooled_height, options.pooled_width});
  PsRoiPoolPlan p{.kind = kind,
                  .channels_last = channels_last,
                  .maps = empty_layout(grad_output, grad_output.scalar_type(),
                                       {shape.n, shape.c, shape.h, shape.w}, channels_last),
                  .boxes = as_contiguous(boxes),
                  .bins = grad_output,
                  .channels = Tensor(),
                  .args = {}};
  p.args = args_of(p, shape, options);
  return p;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "ps_roi_align(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1.0, int sampling_ratio=-1) -> Tensor");
  m.def(
      "ps_roi_pool(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1.0) -> Tensor");
  m.def(
      "_ps_roi_pool_mapped(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale, int sampling_ratio, int pooling, bool as_torchvision) -> (Tensor, "
      "Tensor)");
  m.def(
      "_ps_roi_pool_backward(Tensor grad_output, Tensor boxes, int n, int c, int h, int w, "
      "float spatial_scale, int sampling_ratio, int pooling, bool channels_last) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("ps_roi_align", TORCH_BOX(&torchkiln::bindings::align_cuda));
  m.impl("ps_roi_pool", TORCH_BOX(&torchkiln::bindings::pool_cuda));
  m.impl("_ps_roi_pool_mapped", TORCH_BOX(&torchkiln::bindings::mapped_cuda));
  m.impl("_ps_roi_pool_backward", TORCH_BOX(&torchkiln::bindings::backward_cuda));
}
