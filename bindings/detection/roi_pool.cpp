// roi_pool: schema, checks and shapes, launches. (The CPU version is roi_pool_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/roi_pool.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <tuple>
#include <vector>

#include "bindings/support/bands.h"
#include "bindings/support/check.h"
#include "bindings/support/cuda.h"

namespace torchkiln::bindings {
namespace {

using roi_pool::Args;
using roi_pool::BackwardArgs;
using roi_pool::ListArgs;

constexpr const char* kOp = "roi_pool";
constexpr std::int64_t kMaxI32 = std::numeric_limits<std::int32_t>::max(), kMaxGridY = 65'535;
// Up to here one thread per bin, which needs no lists, beats two launches.
constexpr std::int64_t kFewOutputs = 65'536;

// ---- kernels ----

struct ListStatics {
  std::int64_t scalar, reach;
};
struct StagedStatics {
  std::int64_t scalar, index, code_bytes, window, maps;
};
struct DirectStatics {
  std::int64_t scalar, index, code_bytes;
};
struct ChannelsLastStatics {
  std::int64_t scalar, index, code_bytes, vector;
};
struct ScatterStatics {
  std::int64_t scalar, index, code_bytes, deterministic;
};
struct GatherStatics {
  std::int64_t scalar, index, code_bytes;
};
struct Sizes {
  std::int64_t rois, channels, images, height, width;
  std::int64_t items;              // of kernels with one thread for each
  std::int64_t bands, band_bytes;  // of the kernels that keep a band in shared memory
};
struct BlockTunables {
  std::int64_t block_size;
};
struct ChannelsLastTunables {
  std::int64_t block_size, lanes;
};
struct GatherTunables {
  std::int64_t block_size, tile_height, tile_width;
};

using List = Kernel<ListArgs, ListStatics, Sizes, BlockTunables>;
using Staged = Kernel<Args, StagedStatics, Sizes, BlockTunables>;
using Direct = Kernel<Args, DirectStatics, Sizes, BlockTunables>;
using ForwardChannelsLast = Kernel<Args, ChannelsLastStatics, Sizes, ChannelsLastTunables>;
using Scatter = Kernel<BackwardArgs, ScatterStatics, Sizes, BlockTunables>;
using Gather = Kernel<BackwardArgs, GatherStatics, Sizes, GatherTunables>;

const std::vector<const char*> kOperators = {"roi_pool"};
const std::vector<std::int64_t> kIndexTypes = {TORCHKILN_I32, TORCHKILN_I64};
const std::vector<std::int64_t> kKeyTypes = {TORCHKILN_FLOAT, TORCHKILN_HALF, TORCHKILN_BFLOAT16};
const std::vector<torchkiln_size> kSizes = {
    {"rois", TORCHKILN_BUCKET_POW2},   {"channels", TORCHKILN_BUCKET_POW2},
    {"images", TORCHKILN_BUCKET_NONE}, {"height", TORCHKILN_BUCKET_NONE},
    {"width", TORCHKILN_BUCKET_NONE},  {"items", TORCHKILN_BUCKET_NONE},
    {"bands", TORCHKILN_BUCKET_NONE},  {"band_bytes", TORCHKILN_BUCKET_NONE}};

const List list_kernel({
    .path = "detection/roi_pool.cuh",
    .entry = "list",
    .operators = kOperators,
    .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE}), bools("reach")},
    .sizes = kSizes,
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{1024}},
    .geometry =
        [](const List::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.images * p.sizes.bands + ceil_div(p.sizes.items, t.block_size),
                        t.block_size);
        },
});

// One block per band of each map.
Geometry over_bands(const Sizes& s, std::int64_t maps, const BlockTunables& t) {
  return linear(s.images * (s.channels / maps) * s.bands, t.block_size,
                static_cast<std::uint32_t>(s.band_bytes));
}

const std::vector<BlockTunables> kBandDefaults = {{1024}, {768}, {512}, {256}};

const Staged staged_kernel({
    .path = "detection/roi_pool.cuh",
    .entry = "staged",
    .operators = kOperators,
    .statics = {types("scalar", kKeyTypes), types("index", kIndexTypes), ints("code_bytes", {2, 4}),
                ints("window", {1, 4}), ints("maps", {1, 2, 4})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {256, 512, 768, 1024})},
    .defaults = kBandDefaults,
    .valid = [](const StagedStatics& s) { return s.window == 1 || s.maps == 1; },
    .choose =
        [](const Staged::Problem& p) {
          const std::int64_t blocks = p.sizes.images * p.sizes.channels / p.statics.maps;
          return choose_block_size(p.device, blocks * p.sizes.bands, p.sizes.band_bytes, 1536,
                                   kBandDefaults);
        },
    .geometry = [](const Staged::Problem& p,
                   const BlockTunables& t) { return over_bands(p.sizes, p.statics.maps, t); },
});

const Direct direct_kernel({
    .path = "detection/roi_pool.cuh",
    .entry = "direct",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes),
                ints("code_bytes", {2, 4})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}},
    .geometry =
        [](const Direct::Problem& p, const BlockTunables& t) {
          return linear(ceil_div(p.sizes.items, t.block_size), t.block_size);
        },
});

// Channels a thread: no more than 16 bytes of values, nor of their cells' codes.
std::int64_t full_vector(std::int64_t scalar, std::int64_t code_bytes) {
  if (scalar == TORCHKILN_DOUBLE) return 2;
  return scalar == TORCHKILN_FLOAT || code_bytes == 4 ? 4 : 8;
}

const ForwardChannelsLast forward_channels_last_kernel({
    .path = "detection/roi_pool.cuh",
    .entry = "forward_channels_last",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes),
                ints("code_bytes", {2, 4}), ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512}), ints("lanes", {8, 16, 32})},
    .defaults = {{256, 8}},
    .valid =
        [](const ChannelsLastStatics& s) {
          return s.vector == 1 || s.vector == full_vector(s.scalar, s.code_bytes);
        },
    .geometry =
        [](const ForwardChannelsLast::Problem& p, const ChannelsLastTunables& t) {
          Geometry g = linear(p.sizes.rois, t.block_size);
          g.grid[1] =
              static_cast<std::uint32_t>(ceil_div(p.sizes.channels, t.lanes * p.statics.vector));
          return g;
        },
});

const Scatter scatter_kernel({
    .path = "detection/roi_pool_backward.cuh",
    .entry = "scatter",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes),
                ints("code_bytes", {2, 4}), bools("deterministic")},
    .sizes = kSizes,
    .tunables = {ints("block_size", {256, 512, 768, 1024})},
    .defaults = kBandDefaults,
    .choose = [](const Scatter::Problem& p) -> std::uint32_t {
      const std::int64_t blocks = p.sizes.images * p.sizes.channels * p.sizes.bands;
      if (p.statics.deterministic) return 2u;
      return choose_block_size(p.device, blocks, p.sizes.band_bytes, 2048, kBandDefaults);
    },
    .geometry =
        [](const Scatter::Problem& p, const BlockTunables& t) {
          Geometry g = over_bands(p.sizes, 1, t);
          g.grid[1] = static_cast<std::uint32_t>(ceil_div(p.sizes.width, roi_pool::kColumns));
          return g;
        },
});

std::int64_t gather_bytes(const GatherStatics& s, const GatherTunables& t) {
  return t.block_size * t.tile_height * t.tile_width * (s.scalar == TORCHKILN_DOUBLE ? 8 : 4);
}
bool gather_fits(const Gather::Problem& p, const GatherTunables& t) {
  constexpr std::int64_t kStatic = 8'192;  // the list and the sums of a scan, rounded up
  return gather_bytes(p.statics, t) + kStatic <= p.device.shared_bytes_per_block;
}

const std::vector<GatherTunables> kGatherDefaults = {{256, 4, 8}, {64, 8, 16}, {32, 8, 8}};

const Gather gather_kernel({
    .path = "detection/roi_pool_backward.cuh",
    .entry = "gather",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes),
                ints("code_bytes", {2, 4})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {32, 64, 128, 256}), ints("tile_height", {4, 8, 16}),
                 ints("tile_width", {8, 16, 32})},
    .defaults = kGatherDefaults,
    .legal = &gather_fits,
    .choose =
        [](const Gather::Problem& p) {
          std::uint32_t row = 0;
          while (row + 1 < kGatherDefaults.size() && !gather_fits(p, kGatherDefaults[row])) ++row;
          return row;
        },
    .geometry =
        [](const Gather::Problem& p, const GatherTunables& t) {
          const std::int64_t tiles =
              ceil_div(p.sizes.height, t.tile_height) * ceil_div(p.sizes.width, t.tile_width);
          Geometry g = linear(p.sizes.images * tiles, t.block_size,
                              static_cast<std::uint32_t>(gather_bytes(p.statics, t)));
          g.grid[1] = static_cast<std::uint32_t>(ceil_div(p.sizes.channels, t.block_size));
          return g;
        },
});

// ---- checks and shapes ----

ScalarType code_dtype(const roi_pool::Shape& s) {
  return roi_pool_code_bytes(s) == 2 ? ScalarType::Short : ScalarType::Int;
}

void check_boxes(const Tensor& input, const Tensor& boxes) {
  check_floating(kOp, "boxes", boxes);
  check_rows(kOp, "boxes", boxes, 5);
  check_same_device(kOp, "boxes", boxes, "input", input);
}

roi_pool::Shape plan_shape(const std::array<std::int64_t, 4>& input, std::int64_t rois,
                           std::int64_t pooled_height, std::int64_t pooled_width,
                           double spatial_scale, bool rounding) {
  for (const std::int64_t pooled : {pooled_height, pooled_width}) {
    if (pooled >= 1 && pooled <= roi_pool::kMaxPooled) continue;
    fail(TORCHKILN_ERROR_VALUE, kOp, "output_size",
         "be from 1 to " + std::to_string(roi_pool::kMaxPooled), std::to_string(pooled));
  }
  if (!(spatial_scale > 0)) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "spatial_scale", "be above 0", std::to_string(spatial_scale));
  }
  if (std::max(input[2], input[3]) > roi_pool::kMaxSide) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "input",
         "have sides of at most " + std::to_string(roi_pool::kMaxSide),
         std::to_string(std::max(input[2], input[3])));
  }
  if (input[1] > 8 * kMaxGridY) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "input",
         "have at most " + std::to_string(8 * kMaxGridY) + " channels", std::to_string(input[1]));
  }
  return {.images = input[0],
          .channels = input[1],
          .height = input[2],
          .width = input[3],
          .rois = rois,
          .pooled_height = pooled_height,
          .pooled_width = pooled_width,
          .spatial_scale = spatial_scale,
          .inverse_pooled_height = 1.0f / static_cast<float>(pooled_height),
          .inverse_pooled_width = 1.0f / static_cast<float>(pooled_width),
          .rounding = rounding};
}

// Coordinates are computed in float32, or float64 for float64 input, whatever dtype they come in.
Tensor boxes_for(const Tensor& boxes, const Tensor& input) {
  const ScalarType dtype =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (boxes.scalar_type() == dtype) return as_contiguous(boxes);
  Tensor copy = empty(boxes, dtype, shape_of(boxes));
  torch::stable::copy_(copy, boxes);
  return copy;
}

// ---- launches ----

std::int64_t index_of(const Tensor& map, const Tensor& bins) {
  return std::max(map.numel(), bins.numel()) <= kMaxI32 ? TORCHKILN_I32 : TORCHKILN_I64;
}

Sizes sizes_of(const roi_pool::Shape& s, std::int64_t items, std::int64_t bands = 0,
               std::int64_t band_bytes = 0) {
  return {s.rois, s.channels, s.images, s.height, s.width, items, bands, band_bytes};
}

// 16 bytes of channels, where every cell's begin allows it.
std::int64_t vector_of(const RoiPoolPlan& p) {
  const std::int64_t full =
      full_vector(kernel_type(p.input.scalar_type()), roi_pool_code_bytes(p.args.shape));
  const bool fits = p.args.shape.channels % full == 0 && aligned_to_16(p.args.input) &&
                    aligned_to_16(p.args.output) && aligned_to_16(p.args.argmax);
  return fits ? full : 1;
}

// Who works on what; the memory lives until the launch that reads it is queued.
struct Lists {
  Tensor memory;
  BandList list;
  u32* edges;
  std::int64_t entry_bytes, part_bytes, edge_bytes;

  template <class LaunchArgs>
  std::array<Buffer, 2> read() const {
    constexpr std::size_t list_at = offsetof(LaunchArgs, list);
    return {reads(list_at + offsetof(BandList, entries), entry_bytes),
            reads(list_at + offsetof(BandList, parts), part_bytes)};
  }
};

// reach: a row of bins is listed in every band that holds one of its cells, not only where it begins.
Lists make_lists(const CudaPlace& place, const Tensor& boxes, const roi_pool::Shape& s,
                 const Bands& bands, bool reach) {
  Lists l{.memory = Tensor(),
          .list = {.bands = bands, .entries = nullptr, .parts = nullptr},
          .edges = nullptr,
          .entry_bytes = s.rois * s.pooled_height * (reach ? bands.count : 1) *
                         std::int64_t{sizeof(BandEntry)},
          .part_bytes = s.images * bands.count * std::int64_t{sizeof(Range)},
          .edge_bytes = reach ? 0 : s.rois * (s.pooled_height + s.pooled_width) * 4};
  l.memory = empty(boxes, ScalarType::Byte, {l.entry_bytes + l.part_bytes + l.edge_bytes});
  auto* memory = mutable_data<std::uint8_t>(l.memory);
  l.list.entries = reinterpret_cast<BandEntry*>(memory);
  l.list.parts = reinterpret_cast<Range*>(memory + l.entry_bytes);
  if (!reach) l.edges = reinterpret_cast<u32*>(memory + l.entry_bytes + l.part_bytes);
  const ListArgs args = {
      .boxes = boxes.const_data_ptr(), .shape = s, .list = l.list, .edges = l.edges};
  constexpr std::size_t list_at = offsetof(ListArgs, list);
  const bool wide = boxes.scalar_type() == ScalarType::Double;
  list_kernel.run(place, {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT, reach},
                  sizes_of(s, l.edge_bytes / 4, bands.count), args,
                  {reads(offsetof(ListArgs, boxes), boxes),
                   writes(list_at + offsetof(BandList, entries), l.entry_bytes),
                   writes(list_at + offsetof(BandList, parts), l.part_bytes),
                   writes(offsetof(ListArgs, edges), l.edge_bytes)});
  return l;
}

// Entries are numbered with 32 bits.
bool can_list(const roi_pool::Shape& s, const Bands& bands) {
  return bands.count > 0 && s.rois * s.pooled_height * bands.count <= kMaxI32 &&
         s.images * s.channels * bands.count <= kMaxI32;
}

// How the forward of channels first works; no bands where bins must be searched in global memory.
struct ForwardCut {
  Bands bands;
  std::int64_t window, maps, cell_bytes;
};

ForwardCut cut_forward(const Device& device, const roi_pool::Shape& s, ScalarType dtype) {
  const bool has_pixels = s.images > 0 && s.height > 0 && s.width > 0;
  if (dtype == ScalarType::Double || !has_pixels) return {};
  const bool narrow = dtype != ScalarType::Float;
  // Bins of a few cells are read cell by cell; of small maps several at once, which share the geometry.
  const std::int64_t window = s.height > 10 * s.pooled_height ? roi_pool::kWindowSize : 1;
  std::int64_t maps = window == 1 ? 4 : 1;
  while (s.channels % maps != 0 || (maps > 1 && s.height * s.width * maps * 4 > 72 * 1024))
    maps /= 2;
  const std::int64_t key_bytes = window == 1 || narrow ? 4 : 8;
  return {.bands = cut_into_bands(
              device, {.maps = s.images * s.channels / maps,
                       .height = s.height,
                       .row_bytes = s.width * key_bytes * maps,
                       // Most bins are lower than 0.6 times those of a region as high as the map.
                       .reach = 2 + s.height * 3 / (5 * s.pooled_height),
                       .budget = (key_bytes == 4 ? 112 : 224) * 1024,
                       .most_rows = narrow ? 65'536 / s.width : 65'536}),
          .window = window,
          .maps = maps,
          .cell_bytes = key_bytes * maps};
}

void launch_staged(const CudaPlace& place, RoiPoolPlan& p, const ForwardCut& cut) {
  const roi_pool::Shape& s = p.args.shape;
  const Lists lists = make_lists(place, p.boxes, s, cut.bands, false);
  p.args.list = lists.list;
  p.args.edges = lists.edges;
  const auto [entries, parts] = lists.read<Args>();
  staged_kernel.run(
      place,
      {kernel_type(p.input.scalar_type()), index_of(p.input, p.output), roi_pool_code_bytes(s),
       cut.window, cut.maps},
      sizes_of(s, 0, cut.bands.count, cut.bands.height * s.width * cut.cell_bytes), p.args,
      {reads(offsetof(Args, input), p.input), writes(offsetof(Args, output), p.output),
       writes(offsetof(Args, argmax), p.argmax), entries, parts,
       reads(offsetof(Args, edges), lists.edge_bytes), unused(offsetof(Args, boxes))});
}

void launch_forward(RoiPoolPlan& p) {
  const roi_pool::Shape& s = p.args.shape;
  const CudaPlace place(p.input);
  const std::int64_t scalar = kernel_type(p.input.scalar_type()),
                     index = index_of(p.input, p.output);
  const std::int64_t code_bytes = roi_pool_code_bytes(s);
  const std::initializer_list<Buffer> buffers = {
      reads(offsetof(Args, input), p.input), reads(offsetof(Args, boxes), p.boxes),
      writes(offsetof(Args, output), p.output), writes(offsetof(Args, argmax), p.argmax)};
  if (p.channels_last) {
    forward_channels_last_kernel.run(place, {scalar, index, code_bytes, vector_of(p)},
                                     sizes_of(s, 0), p.args, buffers);
    return;
  }
  const ForwardCut cut = cut_forward(place.facts(), s, p.input.scalar_type());
  if (can_list(s, cut.bands) && p.output.numel() > kFewOutputs) {
    launch_staged(place, p, cut);
  } else {
    direct_kernel.run(place, {scalar, index, code_bytes}, sizes_of(s, p.output.numel()), p.args,
                      buffers);
  }
}

std::tuple<Tensor, Tensor> cuda(const Tensor& input, const Tensor& boxes,
                                std::int64_t pooled_height, std::int64_t pooled_width,
                                double spatial_scale, bool rounding, bool /*deterministic*/,
                                bool with_argmax) {
  RoiPoolPlan p = plan_roi_pool(input, boxes, pooled_height, pooled_width, spatial_scale, rounding,
                                with_argmax);
  if (p.output.numel() > 0) launch_forward(p);
  return {p.output, p.argmax};
}

void launch_scatter(const CudaPlace& place, RoiPoolBackwardPlan& p, bool deterministic) {
  const roi_pool::Shape& s = p.args.shape;
  const std::int64_t scalar = kernel_type(p.grad_input.scalar_type());
  const std::int64_t cell_bytes = (scalar == TORCHKILN_DOUBLE ? 8 : 4) + (deterministic ? 4 : 0);
  const std::int64_t row_bytes = std::min<std::int64_t>(s.width, roi_pool::kColumns) * cell_bytes;
  const Bands bands = cut_into_bands(place.facts(), {.maps = s.images * s.channels,
                                                     .height = s.height,
                                                     .row_bytes = row_bytes,
                                                     .reach = 0,
                                                     .budget = 112 * 1024,
                                                     .most_rows = s.height});
  if (!can_list(s, bands)) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "boxes", "have fewer rows for this map",
         std::to_string(s.rois), "Split the boxes into parts and add their gradients.");
  }
  const Lists lists = make_lists(place, p.boxes, s, bands, true);
  p.args.list = lists.list;
  const auto [entries, parts] = lists.read<BackwardArgs>();
  scatter_kernel.run(
      place, {scalar, index_of(p.grad_input, p.grad_output), roi_pool_code_bytes(s), deterministic},
      sizes_of(s, 0, bands.count, bands.height * row_bytes), p.args,
      {reads(offsetof(BackwardArgs, grad_output), p.grad_output),
       reads(offsetof(BackwardArgs, argmax), p.argmax),
       writes(offsetof(BackwardArgs, grad_input), p.grad_input), entries, parts,
       unused(offsetof(BackwardArgs, boxes))});
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes,
                     std::int64_t images, std::int64_t height, std::int64_t width,
                     double spatial_scale, bool rounding, bool deterministic) {
  RoiPoolBackwardPlan p = plan_roi_pool_backward(grad_output, argmax, boxes, images, height, width,
                                                 spatial_scale, rounding);
  if (p.grad_input.numel() == 0) return p.grad_input;
  const roi_pool::Shape& s = p.args.shape;
  const CudaPlace place(p.grad_input);
  if (!p.channels_last) {
    launch_scatter(place, p, deterministic);
    return p.grad_input;
  }
  gather_kernel.run(place,
                    {kernel_type(p.grad_input.scalar_type()), index_of(p.grad_input, p.grad_output),
                     roi_pool_code_bytes(s)},
                    sizes_of(s, 0), p.args,
                    {reads(offsetof(BackwardArgs, grad_output), p.grad_output),
                     reads(offsetof(BackwardArgs, argmax), p.argmax),
                     reads(offsetof(BackwardArgs, boxes), p.boxes),
                     writes(offsetof(BackwardArgs, grad_input), p.grad_input)});
  return p.grad_input;
}

}  // namespace

std::int64_t roi_pool_code_bytes(const roi_pool::Shape& s) {
  return std::max(s.height, s.width) <= roi_pool::kMaxNarrowSide ? 2 : 4;
}

RoiPoolPlan plan_roi_pool(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                          std::int64_t pooled_width, double spatial_scale, bool rounding,
                          bool with_argmax) {
  check_floating(kOp, "input", input);
  check_dim(kOp, "input", input, 4, "(N, C, H, W)");
  check_boxes(input, boxes);
  const roi_pool::Shape shape =
      plan_shape({input.size(0), input.size(1), input.size(2), input.size(3)}, boxes.size(0),
                 pooled_height, pooled_width, spatial_scale, rounding);
  const bool last = is_channels_last(input);
  const std::array<std::int64_t, 4> out = {shape.rois, shape.channels, pooled_height, pooled_width};
  RoiPoolPlan p{.input = as_layout(input, last),
                .boxes = boxes_for(boxes, input),
                .output = empty_layout(input, input.scalar_type(), out, last),
                .argmax = with_argmax ? empty_layout(input, code_dtype(shape), out, last)
                                      : empty(input, code_dtype(shape), {std::int64_t{0}}),
                .channels_last = last,
                .args = {}};
  p.args = {.input = p.input.const_data_ptr(),
            .boxes = p.boxes.const_data_ptr(),
            .output = p.output.mutable_data_ptr(),
            .argmax = with_argmax ? p.argmax.mutable_data_ptr() : nullptr,
            .shape = shape,
            .list = {},
            .edges = nullptr};
  return p;
}

RoiPoolBackwardPlan plan_roi_pool_backward(const Tensor& grad_output, const Tensor& argmax,
                                           const Tensor& boxes, std::int64_t images,
                                           std::int64_t height, std::int64_t width,
                                           double spatial_scale, bool rounding) {
  check_floating(kOp, "grad_output", grad_output);
  check_dim(kOp, "grad_output", grad_output, 4, "(K, C, pooled_height, pooled_width)");
  check_boxes(grad_output, boxes);
  check_same_device(kOp, "argmax", argmax, "grad_output", grad_output);
  const std::array<std::int64_t, 4> out = {grad_output.size(0), grad_output.size(1),
                                           grad_output.size(2), grad_output.size(3)};
  check_shape(kOp, "argmax", argmax, {out[0], out[1], out[2], out[3]});
  check_shape(kOp, "boxes", boxes, {out[0], 5});
  if (images < 0 || height < 0 || width < 0) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "height", "be at least 0", std::to_string(height));
  }
  const roi_pool::Shape shape =
      plan_shape({images, out[1], height, width}, out[0], out[2], out[3], spatial_scale, rounding);
  if (argmax.scalar_type() != code_dtype(shape)) {
    fail(TORCHKILN_ERROR_TYPE, kOp, "argmax", "be what roi_pool returned for this size",
         text(argmax.scalar_type()));
  }
  const bool last = is_channels_last(argmax);
  RoiPoolBackwardPlan p{.grad_output = as_layout(grad_output, last),
                        .argmax = as_layout(argmax, last),
                        .boxes = boxes_for(boxes, grad_output),
                        .grad_input = empty_layout(grad_output, grad_output.scalar_type(),
                                                   {images, out[1], height, width}, last),
                        .channels_last = last,
                        .args = {}};
  p.args = {.grad_output = p.grad_output.const_data_ptr(),
            .argmax = p.argmax.const_data_ptr(),
            .boxes = p.boxes.const_data_ptr(),
            .grad_input = p.grad_input.mutable_data_ptr(),
            .shape = shape,
            .list = {}};
  return p;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "roi_pool(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1., bool rounding=True, bool deterministic=False, "
      "bool with_argmax=True) -> (Tensor output, Tensor argmax)");
  m.def(
      "_roi_pool_backward(Tensor grad_output, Tensor argmax, Tensor boxes, SymInt images, "
      "SymInt height, SymInt width, float spatial_scale, bool rounding, bool deterministic) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("roi_pool", TORCH_BOX(&torchkiln::bindings::cuda));
  m.impl("_roi_pool_backward", TORCH_BOX(&torchkiln::bindings::backward_cuda));
}
