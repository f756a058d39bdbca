// multi_scale_roi_align: schema, checks and shapes, launches. (The CPU version is multi_scale_roi_align_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/multi_scale_roi_align.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "bindings/detection/roi_staged.h"
#include "bindings/detection/roi_taps.h"

namespace torchkiln::bindings {
namespace {

using multi_scale_roi_align::Args;
using multi_scale_roi_align::kMostLevels;
using multi_scale_roi_align::Level;
using multi_scale_roi_align::Pyramid;
using multi_scale_roi_align::StagedArgs;

constexpr const char* kOp = "multi_scale_roi_align";

// ---- kernels ----

struct TableStatics {
  std::int64_t scalar;
};
struct PlaneStatics {
  std::int64_t scalar, index;
};
struct LastStatics {
  std::int64_t scalar, index, vector;
};
struct StagedStatics {
  std::int64_t scalar, index, maps;
};
struct BackwardStatics {
  std::int64_t scalar, index, channels_last;
};
struct Sizes {
  std::int64_t c, k, n, levels, pooled_h, axis_bins;
};
struct StagedSizes {
  std::int64_t bands_of_groups, k, lists, band_bytes, axis_bins;
};
struct BackwardSizes {
  std::int64_t c, k, n, levels;
  std::int64_t pixels, rows, columns;  // of one map of each level
};
struct BlockTunables {
  std::int64_t block_size;
};
struct PlaneTunables {
  std::int64_t planes, block_size;
};

const std::vector<const char*> kOperators = {kOp};
const std::vector<std::int64_t> kIndexTypes = {TORCHKILN_I32, TORCHKILN_I64};
const std::vector<std::int64_t> kTableTypes = {TORCHKILN_FLOAT, TORCHKILN_DOUBLE};
const std::vector<torchkiln_size> kSizes = {
    {"c", TORCHKILN_BUCKET_POW2},        {"k", TORCHKILN_BUCKET_POW2},
    {"n", TORCHKILN_BUCKET_NONE},        {"levels", TORCHKILN_BUCKET_NONE},
    {"pooled_h", TORCHKILN_BUCKET_NONE}, {"axis_bins", TORCHKILN_BUCKET_NONE}};
const std::vector<torchkiln_size> kStagedSizes = {{"bands_of_groups", TORCHKILN_BUCKET_POW2},
                                                  {"k", TORCHKILN_BUCKET_POW2},
                                                  {"lists", TORCHKILN_BUCKET_NONE},
                                                  {"band_bytes", TORCHKILN_BUCKET_NONE},
                                                  {"axis_bins", TORCHKILN_BUCKET_NONE}};
const std::vector<torchkiln_size> kBackwardSizes = {
    {"c", TORCHKILN_BUCKET_POW2},      {"k", TORCHKILN_BUCKET_POW2},
    {"n", TORCHKILN_BUCKET_NONE},      {"levels", TORCHKILN_BUCKET_NONE},
    {"pixels", TORCHKILN_BUCKET_NONE}, {"rows", TORCHKILN_BUCKET_NONE},
    {"columns", TORCHKILN_BUCKET_NONE}};

using Tables = Kernel<Args, TableStatics, Sizes, BlockTunables>;
using Planes = Kernel<Args, PlaneStatics, Sizes, PlaneTunables>;
using Last = Kernel<Args, LastStatics, Sizes, BlockTunables>;
using Quads = Kernel<StagedArgs, TableStatics, StagedSizes, BlockTunables>;
using Staged = Kernel<StagedArgs, StagedStatics, StagedSizes, BlockTunables>;
using Backward = Kernel<Args, BackwardStatics, BackwardSizes, TileTunables>;

const Tables tables_kernel({
    .path = "detection/multi_scale_roi_align.cuh",
    .entry = "tables",
    .operators = kOperators,
    .statics = {types("scalar", kTableTypes)},
    .sizes = kSizes,
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{64}},
    .geometry =
        [](const Tables::Problem& p, const BlockTunables& t) {
          return linear(ceil_div(p.sizes.axis_bins, t.block_size), t.block_size);
        },
});

const Planes planes_kernel({
    .path = "detection/multi_scale_roi_align.cuh",
    .entry = "planes",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes)},
    .sizes = kSizes,
    .tunables = {ints("planes", {1, 2, 4}), ints("block_size", {256, 512, 1024})},
    .defaults = {{2, 512}},
    .geometry =
        [](const Planes::Problem& p, const PlaneTunables& t) {
          const std::int64_t blocks = p.sizes.levels * p.sizes.n * ceil_div(p.sizes.c, t.planes);
          Geometry g = linear(blocks, t.block_size);
          // Few maps: their regions are divided among several blocks, until the GPU is full.
          const std::int64_t wanted =
              ceil_div(4 * p.device.multiprocessors, std::max<std::int64_t>(1, blocks));
          g.grid[1] = static_cast<std::uint32_t>(
              std::clamp<std::int64_t>(wanted, 1, ceil_div(p.sizes.k, t.block_size / 32)));
          return g;
        },
});

const Last last_kernel({
    .path = "detection/multi_scale_roi_align.cuh",
    .entry = "last",
    .operators = kOperators,
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

const Quads quads_kernel({
    .path = "detection/multi_scale_roi_align.cuh",
    .entry = "quads",
    .operators = kOperators,
    .statics = {types("scalar", kTableTypes)},
    .sizes = kStagedSizes,
    .tunables = {ints("block_size", {256, 512, 1024})},
    .defaults = {{1024}},
    .geometry =
        [](const Quads::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.lists + ceil_div(p.sizes.axis_bins, t.block_size), t.block_size);
        },
});

const std::vector<BlockTunables> kStagedDefaults = {{1024}, {512}, {256}};

const Staged staged_kernel({
    .path = "detection/multi_scale_roi_align.cuh",
    .entry = "staged",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), ints("maps", {1, 2})},
    .sizes = kStagedSizes,
    .tunables = {ints("block_size", {256, 512, 768, 1024})},
    .defaults = kStagedDefaults,
    .choose = [](const Staged::Problem& p) -> std::uint32_t {
      // 64 registers a thread: 1024 threads a multiprocessor.
      return choose_block_size(p.device, p.sizes.bands_of_groups, p.sizes.band_bytes, 1024,
                               kStagedDefaults);
    },
    .geometry =
        [](const Staged::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.bands_of_groups, t.block_size,
                        static_cast<std::uint32_t>(p.sizes.band_bytes));
        },
});

// At least as many as there are tiles, and few more: blocks that find none have nothing to do.
std::int64_t tile_blocks(const BackwardSizes& s, const TileTunables& t) {
  const std::int64_t h = t.tile_h - 1, w = t.tile_w - 1;
  const std::int64_t tiles =
      ceil_div(s.pixels + w * s.rows + h * s.columns + s.levels * h * w, t.tile_h * t.tile_w);
  return s.n * tiles * ceil_div(s.c, 32 * t.lane_channels);
}

const Backward backward_kernel({
    .path = "detection/multi_scale_roi_align.cuh",
    .entry = "backward",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), bools("channels_last")},
    .sizes = kBackwardSizes,
    .tunables = kTileTunables,
    .defaults = {kManyChannels, kSomeChannels, kFewChannels, kShared},
    .legal = [](const Backward::Problem& p,
                const TileTunables& t) { return t.fits_averages(p.statics.scalar, p.sizes.c); },
    .choose = [](const Backward::Problem& p) -> std::uint32_t {
      return choose_average_tile(p.device, p.statics.scalar, p.sizes.c,
                                 tile_blocks(p.sizes, kManyChannels));
    },
    .geometry = [](const Backward::Problem& p,
                   const TileTunables& t) { return linear(tile_blocks(p.sizes, t), t.block_size); },
});

// ---- launches ----

// One entry for each pointer to a level's maps; those of no level are null.
std::array<Buffer, kMostLevels> of_levels(std::size_t pyramid_at, const std::vector<Tensor>& maps,
                                          torchkiln_access access) {
  std::array<Buffer, kMostLevels> buffers;
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const std::size_t at =
        pyramid_at + offsetof(Pyramid, levels) + i * sizeof(Level) + offsetof(Level, maps);
    buffers[i] = i < maps.size() ? buffer(at, access, maps[i]) : buffer(at, access, 0);
  }
  return buffers;
}
std::array<Buffer, kMostLevels> unused_levels(std::size_t pyramid_at) {
  return of_levels(pyramid_at, {}, TORCHKILN_READ);
}

std::int64_t index_type_of(const MultiScalePlan& p) {
  const bool wide = std::any_of(p.maps.begin(), p.maps.end(), [&](const Tensor& maps) {
    return index_type(maps, p.bins) == TORCHKILN_I64;
  });
  return wide ? TORCHKILN_I64 : TORCHKILN_I32;
}

std::int64_t kernel_type_of(const MultiScalePlan& p) { return kernel_type(p.bins.scalar_type()); }
std::int64_t table_type_of(const MultiScalePlan& p) {
  return p.bins.scalar_type() == ScalarType::Double ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT;
}

Sizes sizes_of(const MultiScalePlan& p) {
  const roi_align::Regions& r = p.args.regions;
  return {r.c, r.k, r.n, p.args.pyramid.count, r.pooled_h, r.k * (r.pooled_h + r.pooled_w)};
}

TapTable<Args> make_table(const CudaPlace& place, MultiScalePlan& p) {
  const roi_align::Regions& r = p.args.regions;
  i32 height = 0, width = 0;
  for (const Level& level : p.args.pyramid.levels) {
    height = std::max(height, level.h);
    width = std::max(width, level.w);
  }
  p.args.row_capacity = tap_capacity(height, r.pooled_h, r.sampling_ratio);
  p.args.column_capacity = tap_capacity(width, r.pooled_w, r.sampling_ratio);
  TapTable<Args> table = allocate_table(p.bins, p.args);
  const auto [taps, ranges, spans] = table.written();
  const auto maps = unused_levels(offsetof(Args, pyramid));
  tables_kernel.run(
      place, {table_type_of(p)}, sizes_of(p), p.args,
      {reads(offsetof(Args, regions), p.boxes), taps, ranges, spans, unused(offsetof(Args, bins)),
       maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], maps[6], maps[7]});
  return table;
}

// How `staged` works on all levels; `most` is 0 where it cannot serve.
struct StagedCut {
  std::int64_t maps, most, bands_of_groups, band_bytes;
};

StagedCut cut_levels(const CudaPlace& place, MultiScalePlan& p) {
  const roi_align::Regions& r = p.args.regions;
  StagedCut cut{.maps = r.c % 2 == 0 ? 2 : 1, .most = 0, .bands_of_groups = 0, .band_bytes = 0};
  const auto element = static_cast<std::int64_t>(element_size(p.bins.scalar_type()));
  for (std::int64_t i = 0; i < p.args.pyramid.count; ++i) {
    Level& level = p.args.pyramid.levels[i];
    level.bands = cut_regions(place.facts(), on_level(r, level), element, cut.maps);
    if (level.bands.count == 0) return {};
    cut.most = std::max<std::int64_t>(cut.most, level.bands.count);
    cut.bands_of_groups += r.n * r.c / cut.maps * level.bands.count;
    cut.band_bytes = std::max(
        cut.band_bytes, cut.maps * roi_align::band_pitch(level.bands.height, level.w) * element);
  }
  return cut;
}

void launch_staged(const CudaPlace& place, const MultiScalePlan& p, const StagedCut& cut) {
  const roi_align::Regions& r = p.args.regions;
  const Bands most{static_cast<i32>(cut.most), 0, 0};
  const std::int64_t images = r.n * p.args.pyramid.count;
  const StagedMemory memory = allocate_staged(p.bins, r, images, most);
  const StagedArgs args = {.regions = r,
                           .pyramid = p.args.pyramid,
                           .bins = p.bins.mutable_data_ptr(),
                           .table = memory.table};
  const StagedSizes sizes = {cut.bands_of_groups, r.k, images * cut.most, cut.band_bytes,
                             r.k * (r.pooled_h + r.pooled_w)};
  const auto no_maps = unused_levels(offsetof(StagedArgs, pyramid));
  const auto made = memory.buffers(offsetof(StagedArgs, table), TORCHKILN_WRITE);
  quads_kernel.run(place, {table_type_of(p)}, sizes, args,
                   {reads(offsetof(StagedArgs, regions), p.boxes), made[0], made[1], made[2],
                    made[3], unused(offsetof(StagedArgs, bins)), no_maps[0], no_maps[1], no_maps[2],
                    no_maps[3], no_maps[4], no_maps[5], no_maps[6], no_maps[7]});
  const auto maps = of_levels(offsetof(StagedArgs, pyramid), p.maps, TORCHKILN_READ);
  const auto read = memory.buffers(offsetof(StagedArgs, table), TORCHKILN_READ);
  staged_kernel.run(place, {kernel_type_of(p), index_type_of(p), cut.maps}, sizes, args,
                    {writes(offsetof(StagedArgs, bins), p.bins), read[0], read[1], read[2], read[3],
                     unused(offsetof(StagedArgs, regions)), maps[0], maps[1], maps[2], maps[3],
                     maps[4], maps[5], maps[6], maps[7]});
}

void launch_forward(const CudaPlace& place, MultiScalePlan& p) {
  const StagedCut cut = p.channels_last ? StagedCut{} : cut_levels(place, p);
  if (cut.most > 0) return launch_staged(place, p, cut);
  const TapTable<Args> table = make_table(place, p);
  const auto [taps, ranges, spans] = table.read();
  const auto maps = of_levels(offsetof(Args, pyramid), p.maps, TORCHKILN_READ);
  const Buffer bins = writes(offsetof(Args, bins), p.bins);
  const Buffer boxes = unused(offsetof(Args, regions));
  const std::int64_t scalar = kernel_type_of(p);
  if (!p.channels_last) {
    planes_kernel.run(place, {scalar, index_type_of(p)}, sizes_of(p), p.args,
                      {bins, boxes, taps, ranges, spans, maps[0], maps[1], maps[2], maps[3],
                       maps[4], maps[5], maps[6], maps[7]});
    return;
  }
  const std::int64_t wide = vector_width(scalar);
  const bool aligned = std::all_of(p.maps.begin(), p.maps.end(), [](const Tensor& maps_of) {
    return aligned_to_16(maps_of.const_data_ptr());
  });
  const bool vectorised = p.args.regions.c % wide == 0 && aligned && aligned_to_16(p.args.bins);
  last_kernel.run(place, {scalar, index_type_of(p), vectorised ? wide : 1}, sizes_of(p), p.args,
                  {bins, boxes, taps, ranges, spans, maps[0], maps[1], maps[2], maps[3], maps[4],
                   maps[5], maps[6], maps[7]});
}

bool has_no_pixel(const MultiScalePlan& p) {
  return std::any_of(p.maps.begin(), p.maps.end(),
                     [](const Tensor& maps) { return maps.numel() == 0; });
}

Tensor forward_cuda(std::vector<Tensor> inputs, const Tensor& boxes, std::int64_t pooled_height,
                    std::int64_t pooled_width, std::vector<double> spatial_scales,
                    std::vector<double> level_sides, std::int64_t sampling_ratio, bool aligned) {
  const RoiAlignOptions o{pooled_height, pooled_width, 1.0, sampling_ratio, aligned};
  MultiScalePlan p = plan_multi_scale(inputs, boxes, o, {spatial_scales, level_sides});
  if (p.bins.numel() == 0) return p.bins;
  if (has_no_pixel(p)) {
    torch::stable::zero_(p.bins);
    return p.bins;
  }
  const CudaPlace place(p.bins);
  launch_forward(place, p);
  return p.bins;
}

void launch_backward(const CudaPlace& place, MultiScalePlan& p) {
  p.bins = as_layout(place, p.bins, true);
  p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  const TapTable<Args> table = make_table(place, p);
  const auto [taps, ranges, spans] = table.read();
  const auto maps = of_levels(offsetof(Args, pyramid), p.maps, TORCHKILN_WRITE);
  const roi_align::Regions& r = p.args.regions;
  BackwardSizes sizes{r.c, r.k, r.n, p.args.pyramid.count, 0, 0, 0};
  for (const Level& level : p.args.pyramid.levels) {
    sizes.pixels += std::int64_t{level.h} * level.w;
    sizes.rows += level.h;
    sizes.columns += level.w;
  }
  backward_kernel.run(
      place, {kernel_type_of(p), index_type_of(p), p.channels_last}, sizes, p.args,
      {reads(offsetof(Args, bins), p.bins), unused(offsetof(Args, regions)), taps, ranges, spans,
       maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], maps[6], maps[7]});
}

std::vector<Tensor> backward_cuda(const Tensor& grad_output, const Tensor& boxes, std::int64_t n,
                                  std::int64_t c, std::vector<std::int64_t> sizes,
                                  std::vector<double> spatial_scales,
                                  std::vector<double> level_sides, std::int64_t sampling_ratio,
                                  bool aligned, bool channels_last) {
  const bool four = grad_output.dim() == 4;
  const RoiAlignOptions o{four ? grad_output.size(2) : 1, four ? grad_output.size(3) : 1, 1.0,
                          sampling_ratio, aligned};
  MultiScalePlan p = plan_multi_scale_backward(grad_output, boxes, n, c, sizes, o,
                                               {spatial_scales, level_sides}, channels_last);
  if (p.bins.numel() == 0 || has_no_pixel(p)) {
    for (const Tensor& maps : p.maps) torch::stable::zero_(const_cast<Tensor&>(maps));
    return gradients_of(p, sizes);
  }
  const CudaPlace place(p.bins);
  launch_backward(place, p);
  return gradients_of(p, sizes);
}

// ---- checks and shapes ----

void check_levels(std::size_t count, const MultiScaleLevels& levels) {
  const auto refuse = [](const char* argument, const std::string& rule, std::size_t got) {
    fail(TORCHKILN_ERROR_VALUE, kOp, argument, rule, std::to_string(got));
  };
  if (count < 1 || count > kMostLevels) refuse("inputs", "have 1 to 8 levels", count);
  if (levels.spatial_scales.size() != count)
    refuse("spatial_scales", "have one number for each of the " + std::to_string(count) + " levels",
           levels.spatial_scales.size());
  if (levels.level_sides.size() + 1 != count)
    refuse("level_sides",
           "have " + std::to_string(count - 1) + " numbers, one between each two levels",
           levels.level_sides.size());
  for (const double scale : levels.spatial_scales) {
    if (scale > 0 && std::isfinite(scale)) continue;
    fail(TORCHKILN_ERROR_VALUE, kOp, "spatial_scales", "be finite numbers above 0",
         std::to_string(scale));
  }
  double last = 0;
  for (const double side : levels.level_sides) {
    if (!(side > 0 && side >= last)) {
      fail(TORCHKILN_ERROR_VALUE, kOp, "level_sides", "be ascending numbers above 0",
           std::to_string(side));
    }
    last = side;
  }
}

Args args_of(const MultiScalePlan& p, const RoiAlignShape& shape, const RoiAlignOptions& options,
             const MultiScaleLevels& levels) {
  Args args{};
  args.regions = regions_of(p.boxes, shape, options);
  args.bins = const_cast<void*>(p.bins.const_data_ptr());
  args.pyramid.count = static_cast<i64>(p.maps.size());
  for (std::size_t i = 0; i < p.maps.size(); ++i) {
    Level& level = args.pyramid.levels[i];
    level.maps = const_cast<void*>(p.maps[i].const_data_ptr());
    level.spatial_scale = levels.spatial_scales[i];
    level.h = static_cast<i32>(p.maps[i].size(2));
    level.w = static_cast<i32>(p.maps[i].size(3));
    if (i > 0) args.pyramid.areas[i - 1] = levels.level_sides[i - 1] * levels.level_sides[i - 1];
  }
  return args;
}

// Stands for a level without pixels, so that no kernel meets one: regions take 0 of it.
Tensor pixel_of_zeros(const Tensor& input, bool channels_last) {
  Tensor pixel =
      empty_layout(input, input.scalar_type(), {input.size(0), input.size(1), 1, 1}, channels_last);
  torch::stable::zero_(pixel);
  return pixel;
}

}  // namespace

MultiScalePlan plan_multi_scale(const std::vector<Tensor>& inputs, const Tensor& boxes,
                                const RoiAlignOptions& options, const MultiScaleLevels& levels) {
  check_levels(inputs.size(), levels);
  const Tensor& first = inputs.front();
  for (const Tensor& input : inputs) {
    check_floating(kOp, "inputs", input);
    check_dim(kOp, "inputs", input, 4, "(N, C, H, W)");
    check_same_device(kOp, "inputs", input, "the first", first);
    check_same_dtype(kOp, "inputs", input, "the first", first);
    if (input.size(0) != first.size(0) || input.size(1) != first.size(1)) {
      fail(TORCHKILN_ERROR_VALUE, kOp, "inputs",
           "have the same number of images and channels on all levels; the first has shape " +
               text(first),
           text(input));
    }
    check_shape_of_maps(kOp, {input.size(0), input.size(1), input.size(2), input.size(3)});
  }
  check_regions(kOp, boxes, options);
  check_same_device(kOp, "boxes", boxes, "inputs", first);
  const RoiAlignShape shape{first.size(0), first.size(1), 0, 0};
  const bool channels_last = is_channels_last(first);
  MultiScalePlan p{
      .channels_last = channels_last,
      .maps = {},
      .boxes = as_contiguous(boxes),
      .bins = empty_layout(first, first.scalar_type(),
                           {boxes.size(0), shape.c, options.pooled_height, options.pooled_width},
                           channels_last),
      .args = {}};
  for (const Tensor& input : inputs) {
    const bool has_pixels = input.size(2) * input.size(3) > 0;
    p.maps.push_back(has_pixels ? as_layout(input, channels_last)
                                : pixel_of_zeros(input, channels_last));
  }
  p.args = args_of(p, shape, options, levels);
  return p;
}

MultiScalePlan plan_multi_scale_backward(const Tensor& grad_output, const Tensor& boxes,
                                         std::int64_t n, std::int64_t c,
                                         const std::vector<std::int64_t>& sizes,
                                         const RoiAlignOptions& options,
                                         const MultiScaleLevels& levels, bool channels_last) {
  check_floating(kOp, "grad_output", grad_output);
  check_dim(kOp, "grad_output", grad_output, 4, "(K, C, pooled_height, pooled_width)");
  check_levels(sizes.size() / 2, levels);
  check_regions(kOp, boxes, options);
  check_same_device(kOp, "boxes", boxes, "grad_output", grad_output);
  check_shape(kOp, "grad_output", grad_output,
              {boxes.size(0), c, options.pooled_height, options.pooled_width});
  MultiScalePlan p{.channels_last = channels_last,
                   .maps = {},
                   .boxes = as_contiguous(boxes),
                   .bins = grad_output,
                   .args = {}};
  for (std::size_t i = 0; i + 1 < sizes.size(); i += 2) {
    const bool has_pixels = sizes[i] * sizes[i + 1] > 0;
    const std::int64_t h = has_pixels ? sizes[i] : 1, w = has_pixels ? sizes[i + 1] : 1;
    check_shape_of_maps(kOp, {n, c, h, w});
    p.maps.push_back(
        empty_layout(grad_output, grad_output.scalar_type(), {n, c, h, w}, channels_last));
  }
  p.args = args_of(p, {n, c, 0, 0}, options, levels);
  return p;
}

std::vector<Tensor> gradients_of(const MultiScalePlan& p, const std::vector<std::int64_t>& sizes) {
  std::vector<Tensor> gradients = p.maps;
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const std::int64_t h = sizes[2 * i], w = sizes[2 * i + 1];
    if (h * w > 0) continue;
    const Tensor& pixel = p.maps[i];
    gradients[i] = empty_layout(pixel, pixel.scalar_type(), {pixel.size(0), pixel.size(1), h, w},
                                p.channels_last);
  }
  return gradients;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "multi_scale_roi_align(Tensor[] inputs, Tensor boxes, int pooled_height, int pooled_width, "
      "float[] spatial_scales, float[] level_sides, int sampling_ratio, bool aligned) -> "
      "Tensor");
  m.def(
      "_multi_scale_roi_align_backward(Tensor grad_output, Tensor boxes, int n, int c, "
      "int[] sizes, float[] spatial_scales, float[] level_sides, int sampling_ratio, "
      "bool aligned, bool channels_last) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("multi_scale_roi_align", TORCH_BOX(&torchkiln::bindings::forward_cuda));
  m.impl("_multi_scale_roi_align_backward", TORCH_BOX(&torchkiln::bindings::backward_cuda));
}
