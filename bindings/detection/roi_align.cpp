// roi_align: schema, checks and shapes, launches. (The CPU version is roi_align_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/roi_align.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <tuple>

#include "bindings/detection/roi_staged.h"
#include "bindings/detection/roi_taps.h"
#include "bindings/support/any_float.h"
#include "bindings/support/cuda.h"

namespace torchkiln::bindings {
namespace {

using roi_align::Args;
using roi_align::StagedArgs;

constexpr const char* kOp = "roi_align";
// Bins are numbered with 32 bits.
constexpr std::int64_t kMostPooled = 4096;
// Up to here one thread per output, which knows all geometry itself, beats a second launch.
constexpr std::int64_t kFewOutputs = 65'536;

// ---- kernels ----

struct TableStatics {
  std::int64_t scalar;
};
struct PlaneStatics {
  std::int64_t scalar, index;
};
struct StagedStatics {
  std::int64_t scalar, index, maps;
};
struct LastStatics {
  std::int64_t scalar, index, vector;
};
struct DirectStatics {
  std::int64_t scalar, index, pooling, channels_last;
};
struct GatherStatics {
  std::int64_t scalar, index, channels_last;
};
struct Sizes {
  std::int64_t outputs, n, c, h, w, k, pooled_h;
  std::int64_t axis_bins;  // of all regions
};
// Of the kernel that keeps bands of maps in shared memory.
struct StagedSizes {
  std::int64_t groups, k, images, bands, band_bytes, axis_bins;  // groups of maps
};
struct BlockTunables {
  std::int64_t block_size;
};
struct PlaneTunables {
  std::int64_t planes, block_size;
};

const std::vector<const char*> kForward = {"roi_align"};
const std::vector<const char*> kByTable = {"roi_align", "prroi_pool"};
const std::vector<std::int64_t> kIndexTypes = {TORCHKILN_I32, TORCHKILN_I64};
const std::vector<torchkiln_size> kSizes = {
    {"outputs", TORCHKILN_BUCKET_POW2},  {"n", TORCHKILN_BUCKET_NONE},
    {"c", TORCHKILN_BUCKET_POW2},        {"h", TORCHKILN_BUCKET_NONE},
    {"w", TORCHKILN_BUCKET_NONE},        {"k", TORCHKILN_BUCKET_POW2},
    {"pooled_h", TORCHKILN_BUCKET_NONE}, {"axis_bins", TORCHKILN_BUCKET_NONE}};
const std::vector<torchkiln_size> kStagedSizes = {
    {"groups", TORCHKILN_BUCKET_POW2},     {"k", TORCHKILN_BUCKET_POW2},
    {"images", TORCHKILN_BUCKET_NONE},     {"bands", TORCHKILN_BUCKET_NONE},
    {"band_bytes", TORCHKILN_BUCKET_NONE}, {"axis_bins", TORCHKILN_BUCKET_NONE}};

using Tables = Kernel<Args, TableStatics, Sizes, BlockTunables>;
using Planes = Kernel<Args, PlaneStatics, Sizes, PlaneTunables>;
using Last = Kernel<Args, LastStatics, Sizes, BlockTunables>;
using Direct = Kernel<Args, DirectStatics, Sizes, BlockTunables>;
using Gather = Kernel<Args, GatherStatics, Sizes, TileTunables>;
using Quads = Kernel<StagedArgs, TableStatics, StagedSizes, BlockTunables>;
using Staged = Kernel<StagedArgs, StagedStatics, StagedSizes, BlockTunables>;

const Tables tables_kernel({
    .path = "detection/roi_align.cuh",
    .entry = "tables",
    .operators = {"roi_align"},
    .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{64}},
    .geometry =
        [](const Tables::Problem& p, const BlockTunables& t) {
          return linear(ceil_div(p.sizes.axis_bins, t.block_size), t.block_size);
        },
});

// Few maps: their regions are divided among several blocks, until the GPU is full.
std::int64_t region_groups(const Device& device, const Sizes& s, const PlaneTunables& t) {
  const std::int64_t blocks = s.n * ceil_div(s.c, t.planes);
  const std::int64_t wanted =
      ceil_div(4 * device.multiprocessors, std::max<std::int64_t>(1, blocks));
  return std::clamp<std::int64_t>(wanted, 1, ceil_div(s.k, t.block_size / 32));
}

const Planes planes_kernel({
    .path = "detection/roi_align.cuh",
    .entry = "planes",
    .operators = kByTable,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes)},
    .sizes = kSizes,
    .tunables = {ints("planes", {1, 2, 4}), ints("block_size", {256, 512, 1024})},
    .defaults = {{2, 512}},
    .geometry =
        [](const Planes::Problem& p, const PlaneTunables& t) {
          Geometry g = linear(p.sizes.n * ceil_div(p.sizes.c, t.planes), t.block_size);
          g.grid[1] = static_cast<std::uint32_t>(region_groups(p.device, p.sizes, t));
          return g;
        },
});

const Quads quads_kernel({
    .path = "detection/roi_align.cuh",
    .entry = "quads",
    .operators = kForward,
    .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
    .sizes = kStagedSizes,
    .tunables = {ints("block_size", {256, 512, 1024})},
    .defaults = {{1024}},
    .geometry =
        [](const Quads::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.images * p.sizes.bands + ceil_div(p.sizes.axis_bins, t.block_size),
                        t.block_size);
        },
});

const std::vector<BlockTunables> kStagedDefaults = {{1024}, {512}, {256}};

const Staged staged_kernel({
    .path = "detection/roi_align.cuh",
    .entry = "staged",
    .operators = kForward,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), ints("maps", {1, 2})},
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

const Last last_kernel({
    .path = "detection/roi_align.cuh",
    .entry = "last",
    .operators = kByTable,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .valid =
        [](const LastStatics& s) { return s.vector == 1 || s.vector == vector_width(s.scalar); },
    .geometry =
        [](const Last::Problem& p, const BlockTunables& t) {
          const std::int64_t items = p.sizes.k * p.sizes.pooled_h * (p.sizes.c / p.statics.vector);
          return linear(ceil_div(items, t.block_size), t.block_size);
        },
});

const Direct direct_kernel({
    .path = "detection/roi_align.cuh",
    .entry = "direct",
    .operators = kForward,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), ints("pooling", {0, 1}),
                bools("channels_last")},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .geometry =
        [](const Direct::Problem& p, const BlockTunables& t) {
          return linear(ceil_div(p.sizes.outputs, t.block_size), t.block_size);
        },
});

std::int64_t tile_blocks(const Sizes& s, const TileTunables& t) {
  return s.n * ceil_div(s.h, t.tile_h) * ceil_div(s.w, t.tile_w) *
         ceil_div(s.c, 32 * t.lane_channels);
}

const Gather averages_kernel({
    .path = "detection/roi_align_backward.cuh",
    .entry = "averages",
    .operators = kByTable,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), bools("channels_last")},
    .sizes = kSizes,
    .tunables = kTileTunables,
    .defaults = {kManyChannels, kSomeChannels, kFewChannels, kShared},
    .legal = [](const Gather::Problem& p,
                const TileTunables& t) { return t.fits_averages(p.statics.scalar, p.sizes.c); },
    .choose = [](const Gather::Problem& p) -> std::uint32_t {
      return choose_average_tile(p.device, p.statics.scalar, p.sizes.c,
                                 tile_blocks(p.sizes, kManyChannels));
    },
    .geometry = [](const Gather::Problem& p,
                   const TileTunables& t) { return linear(tile_blocks(p.sizes, t), t.block_size); },
});

const Gather maxima_kernel({
    .path = "detection/roi_align_backward.cuh",
    .entry = "maxima",
    .operators = kForward,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), bools("channels_last")},
    .sizes = kSizes,
    .tunables = kTileTunables,
    .defaults =
        {{16, 16, 1, 256}, {8, 16, 1, 256}, {8, 16, 2, 256}, {8, 8, 4, 256}, {8, 8, 2, 256}},
    .legal = [](const Gather::Problem& p,
                const TileTunables& t) { return t.fits(p.statics.scalar); },
    .choose = [](const Gather::Problem& p) -> std::uint32_t {
      if (p.statics.scalar == TORCHKILN_DOUBLE) return 1;
      if (p.sizes.c < 128) return p.sizes.c >= 64 ? 2 : 0;
      // Small maps have too few tiles to keep the GPU busy: fewer channels a block.
      return tile_blocks(p.sizes, {8, 8, 4, 256}) < 4 * p.device.multiprocessors ? 4 : 3;
    },
    .geometry = [](const Gather::Problem& p,
                   const TileTunables& t) { return linear(tile_blocks(p.sizes, t), t.block_size); },
});

// ---- launches ----

Sizes sizes_of(const RoiAlignPlan& p) {
  const roi_align::Regions& r = p.args.regions;
  return {p.bins.numel(), r.n, r.c, r.h, r.w, r.k, r.pooled_h, r.k * (r.pooled_h + r.pooled_w)};
}

TapTable<Args> make_table(const CudaPlace& place, RoiAlignPlan& p) {
  const roi_align::Regions& r = p.args.regions;
  p.args.row_capacity = tap_capacity(r.h, r.pooled_h, r.sampling_ratio);
  p.args.column_capacity = tap_capacity(r.w, r.pooled_w, r.sampling_ratio);
  TapTable<Args> table = allocate_table(p.maps, p.args);
  const auto [taps, ranges, spans] = table.written();
  const bool wide = p.maps.scalar_type() == ScalarType::Double;
  tables_kernel.run(
      place, {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT}, sizes_of(p), p.args,
      {reads(offsetof(Args, regions), p.boxes), taps, ranges, spans, unused(offsetof(Args, maps)),
       unused(offsetof(Args, bins)), unused(offsetof(Args, argmax))});
  return table;
}

void launch_direct(const CudaPlace& place, const RoiAlignPlan& p) {
  const Buffer argmax =
      p.maximum ? writes(offsetof(Args, argmax), p.argmax) : writes(offsetof(Args, argmax), 0);
  const std::int64_t pooling = p.maximum ? roi_align::kMax : roi_align::kAverage;
  direct_kernel.run(
      place,
      {kernel_type(p.maps.scalar_type()), index_type(p.maps, p.bins), pooling, p.channels_last},
      sizes_of(p), p.args,
      {reads(offsetof(Args, regions), p.boxes), reads(offsetof(Args, maps), p.maps),
       writes(offsetof(Args, bins), p.bins), argmax});
}

void launch_staged(const CudaPlace& place, const RoiAlignPlan& p, const Bands& bands,
                   std::int64_t maps_at_once) {
  const roi_align::Regions& r = p.args.regions;
  const StagedMemory memory = allocate_staged(p.maps, r, r.n, bands);
  const StagedArgs args = {.regions = r,
                           .maps = p.maps.const_data_ptr(),
                           .bins = p.bins.mutable_data_ptr(),
                           .table = memory.table};
  const std::int64_t band_bytes = maps_at_once *
                                  roi_align::band_pitch(bands.height, static_cast<i32>(r.w)) *
                                  static_cast<std::int64_t>(element_size(p.maps.scalar_type()));
  const StagedSizes sizes = {r.n * r.c / maps_at_once,       r.k, r.n, bands.count, band_bytes,
                             r.k * (r.pooled_h + r.pooled_w)};
  const bool wide = p.maps.scalar_type() == ScalarType::Double;
  constexpr std::size_t table_at = offsetof(StagedArgs, table);
  const auto made = memory.buffers(table_at, TORCHKILN_WRITE);
  quads_kernel.run(
      place, {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT}, sizes, args,
      {reads(offsetof(StagedArgs, regions), p.boxes), made[0], made[1], made[2], made[3],
       unused(offsetof(StagedArgs, maps)), unused(offsetof(StagedArgs, bins))});
  const auto read = memory.buffers(table_at, TORCHKILN_READ);
  staged_kernel.run(
      place, {kernel_type(p.maps.scalar_type()), index_type(p.maps, p.bins), maps_at_once}, sizes,
      args,
      {reads(offsetof(StagedArgs, maps), p.maps), writes(offsetof(StagedArgs, bins), p.bins),
       read[0], read[1], read[2], read[3], unused(offsetof(StagedArgs, regions))});
}

void launch_average(const CudaPlace& place, RoiAlignPlan& p) {
  if (!p.channels_last) {
    const std::int64_t maps_at_once = p.args.regions.c % 2 == 0 ? 2 : 1;
    const auto element = static_cast<std::int64_t>(element_size(p.maps.scalar_type()));
    const Bands bands = cut_regions(place.facts(), p.args.regions, element, maps_at_once);
    if (bands.count > 0) return launch_staged(place, p, bands, maps_at_once);
  }
  average_by_table(place, p, make_table(place, p));
}

RoiAlignPlan run_cuda(RoiAlignPlan p) {
  if (p.bins.numel() == 0) return p;
  if (p.maps.numel() == 0) {  // no pixel, no sample
    torch::stable::zero_(p.bins);
    if (p.maximum) torch::stable::fill_(p.argmax, -1);
    return p;
  }
  const CudaPlace place(p.maps);
  if (p.maximum || p.bins.numel() <= kFewOutputs) {
    launch_direct(place, p);
  } else {
    launch_average(place, p);
  }
  return p;
}

Tensor forward_cuda(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                    std::int64_t pooled_width, double spatial_scale, std::int64_t sampling_ratio,
                    bool aligned, std::int64_t pooling) {
  check_pooling(pooling);
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  return run_cuda(plan_roi_align(kOp, input, boxes, o, pooling == roi_align::kMax)).bins;
}

std::tuple<Tensor, Tensor> max_cuda(const Tensor& input, const Tensor& boxes,
                                    std::int64_t pooled_height, std::int64_t pooled_width,
                                    double spatial_scale, std::int64_t sampling_ratio,
                                    bool aligned) {
  const RoiAlignOptions o{pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  const RoiAlignPlan p = run_cuda(plan_roi_align(kOp, input, boxes, o, true));
  return {p.bins, p.argmax};
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& boxes,
                     const std::optional<Tensor>& argmax, std::int64_t n, std::int64_t c,
                     std::int64_t h, std::int64_t w, double spatial_scale,
                     std::int64_t sampling_ratio, bool aligned, bool channels_last) {
  const RoiAlignOptions o{grad_output.dim() == 4 ? grad_output.size(2) : 1,
                          grad_output.dim() == 4 ? grad_output.size(3) : 1, spatial_scale,
                          sampling_ratio, aligned};
  RoiAlignPlan p =
      plan_roi_align_backward(kOp, grad_output, boxes, argmax, {n, c, h, w}, o, channels_last);
  if (p.maps.numel() == 0) return p.maps;
  if (p.bins.numel() == 0) {
    torch::stable::zero_(p.maps);
    return p.maps;
  }
  // The kernel has channels in its lanes: gradients of bins are read by channel, whatever the layout of the maps.
  const CudaPlace place(p.maps);
  p.bins = as_layout(place, p.bins, true);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  if (p.maximum) {
    p.argmax = as_layout(p.argmax, true);
    p.args.argmax = const_cast<i32*>(static_cast<const i32*>(p.argmax.const_data_ptr()));
  }
  gather_by_table(place, p, make_table(place, p));
  return p.maps;
}

}  // namespace

void average_by_table(const CudaPlace& place, const RoiAlignPlan& p,
                      const TapTable<roi_align::Args>& table) {
  const auto [taps, ranges, spans] = table.read();
  const Buffer maps = reads(offsetof(Args, maps), p.maps);
  const Buffer bins = writes(offsetof(Args, bins), p.bins);
  const std::int64_t scalar = kernel_type(p.maps.scalar_type());
  if (!p.channels_last) {
    planes_kernel.run(place, {scalar, index_type(p.maps, p.bins)}, sizes_of(p), p.args,
                      {maps, bins, taps, ranges, spans, unused(offsetof(Args, regions))});
    return;
  }
  const std::int64_t wide = vector_width(scalar);
  const bool vectorised =
      p.args.regions.c % wide == 0 && aligned_to_16(p.args.maps) && aligned_to_16(p.args.bins);
  last_kernel.run(place, {scalar, index_type(p.maps, p.bins), vectorised ? wide : 1}, sizes_of(p),
                  p.args, {maps, bins, taps, ranges, spans, unused(offsetof(Args, regions))});
}

void gather_by_table(const CudaPlace& place, const RoiAlignPlan& p,
                     const TapTable<roi_align::Args>& table) {
  const auto [taps, ranges, spans] = table.read();
  const Buffer winners =
      p.maximum ? reads(offsetof(Args, argmax), p.argmax) : reads(offsetof(Args, argmax), 0);
  const Gather& kernel = p.maximum ? maxima_kernel : averages_kernel;
  kernel.run(place,
             {kernel_type(p.maps.scalar_type()), index_type(p.maps, p.bins), p.channels_last},
             sizes_of(p), p.args,
             {reads(offsetof(Args, regions), p.boxes), reads(offsetof(Args, bins), p.bins), winners,
              taps, ranges, spans, writes(offsetof(Args, maps), p.maps)});
}

void check_regions(const char* op, const Tensor& boxes, const RoiAlignOptions& options) {
  check_rows(op, "boxes", boxes, 5);
  const auto check_pooled = [op](const char* argument, std::int64_t value) {
    check_positive(op, argument, value);
    if (value <= kMostPooled) return;
    fail(TORCHKILN_ERROR_VALUE, op, argument, "be at most 4096", std::to_string(value));
  };
  check_pooled("pooled_height", options.pooled_height);
  check_pooled("pooled_width", options.pooled_width);
  if (!(options.spatial_scale > 0 && std::isfinite(options.spatial_scale))) {
    fail(TORCHKILN_ERROR_VALUE, op, "spatial_scale", "be a finite number above 0",
         std::to_string(options.spatial_scale));
  }
  if (options.sampling_ratio > roi_align::kMostSamples) {
    fail(TORCHKILN_ERROR_VALUE, op, "sampling_ratio", "be at most 32768",
         std::to_string(options.sampling_ratio));
  }
}

void check_shape_of_maps(const char* op, const RoiAlignShape& s) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (s.h < kMost && s.w < kMost) return;
  fail(TORCHKILN_ERROR_VALUE, op, "input", "have fewer than 2^30 rows and columns",
       std::to_string(s.h) + " x " + std::to_string(s.w));
}

roi_align::Regions regions_of(const Tensor& boxes, const RoiAlignShape& s,
                              const RoiAlignOptions& o) {
  return {.boxes = boxes.const_data_ptr(),
          .box_type = number_type(boxes.scalar_type()),
          .n = s.n,
          .c = s.c,
          .h = s.h,
          .w = s.w,
          .k = boxes.size(0),
          .pooled_h = o.pooled_height,
          .pooled_w = o.pooled_width,
          .sampling_ratio = o.sampling_ratio,
          .aligned = o.aligned ? 1 : 0,
          .spatial_scale = o.spatial_scale};
}

void check_pooling(std::int64_t pooling) {
  if (pooling == roi_align::kAverage || pooling == roi_align::kMax) return;
  fail(TORCHKILN_ERROR_VALUE, kOp, "pooling", "be 0 (average) or 1 (max)", std::to_string(pooling));
}

RoiAlignPlan plan_roi_align(const char* op, const Tensor& input, const Tensor& boxes,
                            const RoiAlignOptions& options, bool maximum) {
  check_floating(op, "input", input);
  check_dim(op, "input", input, 4, "(N, C, H, W)");
  check_regions(op, boxes, options);
  check_same_device(op, "boxes", boxes, "input", input);
  const RoiAlignShape shape{input.size(0), input.size(1), input.size(2), input.size(3)};
  check_shape_of_maps(op, shape);
  const bool channels_last = is_channels_last(input);
  const std::array<std::int64_t, 4> out = {boxes.size(0), shape.c, options.pooled_height,
                                           options.pooled_width};
  RoiAlignPlan p{
      .channels_last = channels_last,
      .maximum = maximum,
      .maps = channels_last ? input : as_contiguous(input),
      .boxes = as_contiguous(boxes),
      .bins = empty_layout(input, input.scalar_type(), out, channels_last),
      .argmax = maximum ? empty_layout(input, ScalarType::Int, out, channels_last) : Tensor(),
      .args = {}};
  p.args.regions = regions_of(p.boxes, shape, options);
  p.args.maps = const_cast<void*>(p.maps.const_data_ptr());
  p.args.bins = p.bins.mutable_data_ptr();
  if (maximum) p.args.argmax = mutable_data<i32>(p.argmax);
  return p;
}

RoiAlignPlan plan_roi_align_backward(const char* op, const Tensor& grad_output, const Tensor& boxes,
                                     const std::optional<Tensor>& argmax,
                                     const RoiAlignShape& shape, const RoiAlignOptions& options,
                                     bool channels_last) {
  check_floating(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4, "(K, C, pooled_height, pooled_width)");
  check_regions(op, boxes, options);
  check_same_device(op, "boxes", boxes, "grad_output", grad_output);
  check_shape(op, "grad_output", grad_output,
              {boxes.size(0), shape.c, options.pooled_height, options.pooled_width});
  check_shape_of_maps(op, shape);
  if (argmax.has_value()) {
    check_same_device(op, "argmax", *argmax, "grad_output", grad_output);
    check_shape(op, "argmax", *argmax,
                {boxes.size(0), shape.c, options.pooled_height, options.pooled_width});
    if (argmax->scalar_type() != ScalarType::Int) {
      fail(TORCHKILN_ERROR_TYPE, op, "argmax", "be an int32 tensor", text(argmax->scalar_type()));
    }
  }
  RoiAlignPlan p{.channels_last = channels_last,
                 .maximum = argmax.has_value(),
                 .maps = empty_layout(grad_output, grad_output.scalar_type(),
                                      {shape.n, shape.c, shape.h, shape.w}, channels_last),
                 .boxes = as_contiguous(boxes),
                 .bins = grad_output,
                 .argmax = argmax.has_value() ? *argmax : Tensor(),
                 .args = {}};
  p.args.regions = regions_of(p.boxes, shape, options);
  p.args.maps = p.maps.mutable_data_ptr();
  return p;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "roi_align(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1.0, int sampling_ratio=-1, bool aligned=False, int pooling=0) -> "
      "Tensor");
  m.def(
      "_roi_align_max(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale, int sampling_ratio, bool aligned) -> (Tensor, Tensor)");
  m.def(
      "_roi_align_backward(Tensor grad_output, Tensor boxes, Tensor? argmax, int n, int c, int h, "
      "int w, float spatial_scale, int sampling_ratio, bool aligned, bool channels_last) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&torchkiln::bindings::forward_cuda));
  m.impl("_roi_align_max", TORCH_BOX(&torchkiln::bindings::max_cuda));
  m.impl("_roi_align_backward", TORCH_BOX(&torchkiln::bindings::backward_cuda));
}
