// ps_roi_align and ps_roi_pool: schemas, checks and shapes, launches. (The CPU version is ps_roi_pool_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/ps_roi_pool.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <tuple>

#include "bindings/detection/layout_copy.h"
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
struct StagedStatics {
  std::int64_t scalar, index, pooling;
};
struct Sizes {
  std::int64_t n, c, h, w, k, pooled_h, pooled_w;

  std::int64_t outputs() const { return c / (pooled_h * pooled_w); }
};
struct BlockTunables {
  std::int64_t block_size;
};
struct StagedTunables {
  std::int64_t maps, block_size;
};
struct GatherStatics {
  std::int64_t scalar, pooling, channels_last, outputs;
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
using Staged = Kernel<Args, StagedStatics, Sizes, StagedTunables>;
using Gather = Kernel<Args, GatherStatics, Sizes, BlockTunables>;

std::int64_t sum_bytes(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 8 : 4; }
std::int64_t element_bytes(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 8 : (scalar == TORCHKILN_FLOAT ? 4 : 2);
}

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

std::int64_t map_groups(const Sizes& s, std::int64_t maps) {
  return s.n * s.pooled_h * s.pooled_w * ceil_div(s.outputs(), maps);
}

// Threads for one region each, or for a part of them; three maps share a bin's geometry, two where that leaves less to the
// multiprocessor with the most, and one is what fits always.
const std::vector<std::int64_t> kStagedMaps = {1, 2, 3, 4}, kStagedBlocks = {128, 256, 320, 512};
const std::vector<StagedTunables> kStagedDefaults = {{3, 128}, {3, 320}, {3, 512}, {1, 128},
                                                     {1, 320}, {1, 512}, {2, 512}};

std::uint32_t choose_staged(const Sizes& s, bool several, std::int64_t multiprocessors) {
  const std::uint32_t block = s.k <= 128 ? 0 : (s.k <= 320 ? 1 : 2);
  if (!several || s.outputs() < 3) return block + 3;
  // The geometry takes about as long as two maps.
  const auto longest = [&](std::int64_t maps) {
    return ceil_div(map_groups(s, maps), multiprocessors) * (maps + 2);
  };
  return block == 2 && longest(2) < longest(3) ? 6 : block;
}

std::int64_t staged_bytes(const Sizes& s, std::int64_t scalar, std::int64_t maps) {
  const std::int64_t cells = s.h * s.w;
  return maps * ceil_div(cells, 16) * 16 * element_bytes(scalar);
}

// Two blocks fit into a multiprocessor.
bool is_stageable(const Device& device, const Sizes& s, std::int64_t scalar, std::int64_t maps) {
  constexpr std::int64_t kMostSide = 65536, kReserved = 1024;
  return s.h < kMostSide && s.w < kMostSide &&
         staged_bytes(s, scalar, maps) <= device.shared_bytes_per_block / 2 - kReserved;
}

const Staged staged_kernel({
    .path = "detection/ps_roi_pool.cuh",
    .entry = "staged",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), ints("pooling", {0, 1})},
    .sizes = kSizes,
    .tunables = {ints("maps", kStagedMaps), ints("block_size", kStagedBlocks)},
    .defaults = kStagedDefaults,
    .legal =
        [](const Staged::Problem& p, const StagedTunables& t) {
          return is_stageable(p.device, p.sizes, p.statics.scalar, t.maps);
        },
    .choose =
        [](const Staged::Problem& p) {
          return choose_staged(p.sizes, is_stageable(p.device, p.sizes, p.statics.scalar, 3),
                               std::max<std::int64_t>(1, p.device.multiprocessors));
        },
    .geometry =
        [](const Staged::Problem& p, const StagedTunables& t) {
          const std::int64_t blocks = map_groups(p.sizes, t.maps);
          Geometry g =
              linear(blocks, t.block_size,
                     static_cast<std::uint32_t>(staged_bytes(p.sizes, p.statics.scalar, t.maps)));
          const std::int64_t wanted =
              ceil_div(p.device.multiprocessors, std::max<std::int64_t>(1, blocks));
          g.grid[1] = static_cast<std::uint32_t>(
              std::clamp<std::int64_t>(wanted, 1, ceil_div(p.sizes.k, t.block_size)));
          return g;
        },
});

// A part has as many bytes of shared memory at most, unless so few entries have more, and as many pixels: the threads of
// the default.
constexpr i32 kMostBytes = 48 * 1024, kFewestEntries = 32, kMostPixels = 512;

// At least one, also of sizes that are not known.
i32 even_part(std::int64_t size, std::int64_t most) {
  const std::int64_t some = std::max<std::int64_t>(1, size);
  return static_cast<i32>(ceil_div(some, ceil_div(some, most)));
}

// Of a batch: gradients, weights, and which entries take any of a line.
i32 batch_bytes(const ps_roi_pool::Cut& cut, const GatherStatics& t) {
  const std::int64_t numbers = cut.bins * t.outputs + cut.weights(static_cast<int>(t.pooling));
  return static_cast<i32>(cut.entries * numbers * sum_bytes(t.scalar)) +
         cut.entries / 8 * cut.lines();
}

ps_roi_pool::Cut cut_of(const Sizes& s, const GatherStatics& t) {
  const bool channels_last = t.channels_last != 0;
  ps_roi_pool::Cut cut{};
  cut.outputs = even_part(s.outputs(), t.outputs);
  cut.bins = channels_last ? even_part(s.pooled_w, 8) : 1;  // a row's lie side by side there
  cut.width = even_part(s.w, channels_last ? 16 : 32);
  cut.height = even_part(s.h, std::min(kMostPixels / (cut.bins * cut.width), 32));
  cut.entries = 128;
  while (cut.entries > kFewestEntries && batch_bytes(cut, t) > kMostBytes) cut.entries /= 2;
  cut.of_outputs = static_cast<i32>(ceil_div(s.outputs(), cut.outputs));
  cut.of_bins = static_cast<i32>(ceil_div(s.pooled_w, cut.bins));
  cut.down = static_cast<i32>(ceil_div(s.h, cut.height));
  cut.across = static_cast<i32>(ceil_div(s.w, cut.width));
  return cut;
}

const Gather gather_kernel({
    .path = "detection/ps_roi_pool_backward.cuh",
    .entry = "gather",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), ints("pooling", {0, 1}), bools("channels_last"),
                ints("outputs", {4, 12})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {256, 512, 768, 1024})},
    .defaults = {{512}},
    .legal =
        [](const Gather::Problem& p, const BlockTunables& t) {
          const ps_roi_pool::Cut cut = cut_of(p.sizes, p.statics);
          return cut.bins * cut.height * cut.width <= t.block_size;
        },
    .geometry =
        [](const Gather::Problem& p, const BlockTunables& t) {
          const ps_roi_pool::Cut cut = cut_of(p.sizes, p.statics);
          const std::int64_t maps = p.sizes.n * cut.of_outputs * p.sizes.pooled_h * cut.of_bins;
          return linear(maps * cut.down * cut.across, t.block_size,
                        static_cast<std::uint32_t>(batch_bytes(cut, p.statics)));
        },
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

// Few regions are not worth whole maps, nor their copy in another layout.
bool is_staged(const Device& device, const PsRoiPoolPlan& p) {
  constexpr std::int64_t kFewRegions = 2;
  const std::int64_t scalar = kernel_type(p.maps.scalar_type());
  return p.args.regions.k > kFewRegions * p.args.regions.n &&
         is_stageable(device, sizes_of(p), scalar, 1);
}

Buffer channel_buffer(const PsRoiPoolPlan& p) {
  constexpr std::size_t at = offsetof(Args, channels);
  return p.args.channels != nullptr ? writes(at, p.channels) : writes(at, 0);
}

void launch_staged(const CudaPlace& place, const PsRoiPoolPlan& p) {
  staged_kernel.run(
      place, {kernel_type(p.maps.scalar_type()), index_type(p.maps, p.bins), p.kind.pooling},
      sizes_of(p), p.args,
      {reads(offsetof(Args, regions), p.boxes), reads(offsetof(Args, maps), p.maps),
       writes(offsetof(Args, bins), p.bins), channel_buffer(p), unused(offsetof(Args, taps)),
       unused(offsetof(Args, ranges)), unused(offsetof(Args, spans))});
}

PsRoiPoolPlan run_cuda(PsRoiPoolPlan p) {
  if (p.bins.numel() == 0) return p;
  if (p.maps.numel() == 0) {  // no pixel, no tap
    torch::stable::zero_(p.bins);
    if (p.args.channels != nullptr) torch::stable::zero_(p.channels);
    return p;
  }
  const CudaPlace place(p.maps);
  if (is_staged(place.facts(), p)) {
    // A bin's maps lie far apart in channels_last: to copy takes less than to read them there.
    p.maps = as_layout(place, p.maps, false);
    p.args.maps = const_cast<void*>(p.maps.const_data_ptr());
    launch_staged(place, p);
    return p;
  }
  const TapTable<Args> table = make_table(place, p);
  const auto [taps, ranges, spans] = table.read();
  forward_kernel.run(place, statics_of(p), sizes_of(p), p.args,
                     {reads(offsetof(Args, maps), p.maps), writes(offsetof(Args, bins), p.bins),
                      channel_buffer(p), taps, ranges, spans, unused(offsetof(Args, regions))});
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
  if (!p.args.bins_last) {
    p.bins = as_contiguous(p.bins);
    p.args.bins = const_cast<void*>(p.bins.const_data_ptr());
  }
  const Sizes sizes = sizes_of(p);
  const GatherStatics statics{kernel_type(p.maps.scalar_type()), pooling, channels_last,
                              sizes.outputs() > 4 ? 12 : 4};
  p.args.cut = cut_of(sizes, statics);
  gather_kernel.run(place, statics, sizes, p.args,
                    {reads(offsetof(Args, regions), p.boxes), reads(offsetof(Args, bins), p.bins),
                     writes(offsetof(Args, maps), p.maps), unused(offsetof(Args, channels)),
                     unused(offsetof(Args, taps)), unused(offsetof(Args, ranges)),
                     unused(offsetof(Args, spans))});
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
  args.bins_last = is_channels_last(p.bins);
  args.outputs = shape.c / (options.pooled_height * options.pooled_width);
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
