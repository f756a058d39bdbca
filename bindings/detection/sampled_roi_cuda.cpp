// Launches of the operators that pool bilinear samples.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>

#include "bindings/detection/layout_copy.h"
#include "bindings/detection/sampled_roi.h"
#include "bindings/support/cuda.h"

namespace torchkiln::bindings {
namespace {

using sampled_roi::Args;

struct ForwardStatics {
  std::int64_t scalar, index, channels_last, vector;
};
struct ScatterStatics {
  std::int64_t scalar, index, vector;
};
struct GatherStatics {
  std::int64_t scalar, index, channels_last;
};
struct Sizes {
  std::int64_t groups, bins, channels;  // of the output
  std::int64_t hint;                    // samples a bin
  std::int64_t tiles, map_channels;     // of the maps
};
struct PartTunables {
  std::int64_t entries, channels, block_size;
};
struct GatherTunables {
  std::int64_t entries, block_size;
};

using Forward = Kernel<Args, ForwardStatics, Sizes, PartTunables>;
using Scatter = Kernel<Args, ScatterStatics, Sizes, PartTunables>;
using Gather = Kernel<Args, GatherStatics, Sizes, GatherTunables>;

const std::vector<std::int64_t> kIndexTypes = {TORCHKILN_I32, TORCHKILN_I64};
const std::vector<torchkiln_size> kSizes = {
    {"groups", TORCHKILN_BUCKET_POW2},   {"bins", TORCHKILN_BUCKET_POW2},
    {"channels", TORCHKILN_BUCKET_POW2}, {"hint", TORCHKILN_BUCKET_NONE},
    {"tiles", TORCHKILN_BUCKET_NONE},    {"map_channels", TORCHKILN_BUCKET_NONE}};

// Elements of a pack of 16 bytes.
std::int64_t full_vector(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}
// Sums are float, or double where nothing adds two at once.
std::int64_t scatter_vector(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 1 : 4; }

Geometry over_parts(const Sizes& s, const PartTunables& t) {
  const std::int64_t at_once =
      sampled_roi::divided_bins(s.bins, s.hint, static_cast<i32>(t.entries)).at_once;
  return linear(s.groups * ceil_div(s.bins, at_once) * ceil_div(s.channels, t.channels),
                t.block_size);
}

// The table of samples and the sums must fit into static shared memory, which is 48 KB.
bool gather_fits(std::int64_t scalar, const GatherTunables& t) {
  const bool wide = scalar == TORCHKILN_DOUBLE;
  const std::int64_t patch =
      wide ? sizeof(sampled_roi::Patch<double>) : sizeof(sampled_roi::Patch<float>);
  const std::int64_t pixels = sampled_roi::kTileSide * sampled_roi::kTileSide;
  return t.entries * (wide ? 48 : 32) + t.block_size * (patch + 4 + pixels * (wide ? 8 : 4)) <=
         48 * 1024 - 64;
}

Forward::Declaration forward_declaration(const char* path, const char* op) {
  return {
      .path = path,
      .entry = "forward",
      .operators = {op},
      .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes), bools("channels_last"),
                  ints("vector", {1, 2, 4, 8})},
      .sizes = kSizes,
      .tunables = {ints("entries", {128, 256, 512}), ints("channels", {32, 64, 128, 256}),
                   ints("block_size", {128, 256, 512})},
      .defaults = {{256, 64, 256}, {256, 128, 256}},
      .valid =
          [](const ForwardStatics& s) {
            return s.vector == 1 || (s.channels_last != 0 && s.vector == full_vector(s.scalar));
          },
      .choose = [](const Forward::Problem& p) { return p.statics.channels_last != 0 ? 1u : 0u; },
      .geometry = [](const Forward::Problem& p,
                     const PartTunables& t) { return over_parts(p.sizes, t); },
  };
}

Scatter::Declaration scatter_declaration(const char* path, const char* op, bool vectorised) {
  return {
      .path = path,
      .entry = "scatter",
      .operators = {op},
      .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes),
                  ints("vector", vectorised ? std::vector<std::int64_t>{1, 4}
                                            : std::vector<std::int64_t>{1})},
      .sizes = kSizes,
      .tunables = {ints("entries", {128, 256, 512}), ints("channels", {32, 64, 128, 256}),
                   ints("block_size", {128, 256, 512})},
      .defaults = {{256, 128, 256}},
      // The order of atomics is free.
      .tolerance = 1e-4,
      .valid =
          [](const ScatterStatics& s) {
            return s.vector == 1 || s.vector == scatter_vector(s.scalar);
          },
      .geometry = [](const Scatter::Problem& p,
                     const PartTunables& t) { return over_parts(p.sizes, t); },
  };
}

Gather::Declaration gather_declaration(const char* path, const char* op) {
  return {
      .path = path,
      .entry = "gather",
      .operators = {op},
      .statics = {types("scalar", kFloatTypes), types("index", kIndexTypes),
                  bools("channels_last")},
      .sizes = kSizes,
      .tunables = {ints("entries", {128, 256}), ints("block_size", {32, 64, 128})},
      .defaults = {{256, 128}, {256, 64}, {128, 64}},
      .legal = [](const Gather::Problem& p,
                  const GatherTunables& t) { return gather_fits(p.statics.scalar, t); },
      .choose = [](const Gather::Problem& p) -> std::uint32_t {
        if (p.statics.scalar == TORCHKILN_DOUBLE) return 2;
        return p.sizes.map_channels <= 64 ? 1 : 0;
      },
      .geometry =
          [](const Gather::Problem& p, const GatherTunables& t) {
            return linear(p.sizes.tiles * ceil_div(p.sizes.map_channels, t.block_size),
                          t.block_size);
          },
  };
}

// The kernels of one operator.
struct Kernels {
  Forward forward;
  Scatter scatter;
  Gather gather;

  Kernels(const char* path, const char* op, bool vectorised = true)
      : forward(forward_declaration(path, op)),
        scatter(scatter_declaration(path, op, vectorised)),
        gather(gather_declaration(path, op)) {}
};

const Kernels rotated("detection/roi_align_rotated.cuh", "roi_align_rotated");
const Kernels oriented("detection/riroi_align_rotated.cuh", "riroi_align_rotated");
const Kernels bezier("detection/bezier_align.cuh", "bezier_align");
// Each channel has a maximum of its own: lanes with neighbouring channels share sectors of memory, packs do not.
const Kernels border("detection/border_align.cuh", "border_align", false);
const Kernels feature("detection/rotated_feature_align.cuh", "rotated_feature_align");

const Kernels& kernels_of(SampledKind kind) {
  switch (kind) {
    case SampledKind::kRotated:
      return rotated;
    case SampledKind::kOriented:
      return oriented;
    case SampledKind::kBezier:
      return bezier;
    case SampledKind::kBorder:
      return border;
    default:
      return feature;
  }
}

std::int64_t index_type(const Args& a) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  return std::max(a.n * a.c * a.h * a.w, a.groups * a.bins * a.channels) <= kMost ? TORCHKILN_I32
                                                                                  : TORCHKILN_I64;
}

Sizes sizes_of(const Args& a) {
  constexpr std::int64_t kSide = sampled_roi::kTileSide;
  return {a.groups, a.bins, a.channels, a.hint, a.n * ceil_div(a.h, kSide) * ceil_div(a.w, kSide),
          a.c};
}

Buffer winners(const SampledPlan& p, bool written) {
  constexpr std::size_t at = offsetof(Args, argmax);
  if (p.args.argmax == nullptr) return unused(at);
  return written ? writes(at, p.argmax) : reads(at, p.argmax);
}

// Same bits every time: each cell is written once.
Tensor gather(const CudaPlace& place, SampledPlan& p) {
  const Args& a = p.args;
  p.maps = empty_layout(p.output, p.output.scalar_type(), {a.n, a.c, a.h, a.w}, p.channels_last);
  p.args.maps = p.maps.mutable_data_ptr();
  kernels_of(p.kind).gather.run(
      place, {kernel_type(p.output.scalar_type()), index_type(a), p.channels_last}, sizes_of(a),
      p.args,
      {reads(offsetof(Args, boxes), p.boxes), reads(offsetof(Args, output), p.output),
       winners(p, false), writes(offsetof(Args, maps), p.maps)});
  return p.maps;
}

// Sums by channel, in float or double, which become the gradient's dtype and layout.
Tensor scatter(const CudaPlace& place, SampledPlan& p) {
  const Args& a = p.args;
  const ScalarType dtype = p.output.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  Tensor sums = empty_layout(p.output, wide, {a.n, a.c, a.h, a.w}, true);
  torch::stable::zero_(sums);
  p.args.maps = sums.mutable_data_ptr();
  const std::int64_t scalar = kernel_type(dtype), most = scatter_vector(scalar);
  const bool vectorised =
      p.kind != SampledKind::kBorder && a.channels % most == 0 && aligned_to_16(p.args.output);
  kernels_of(p.kind).scatter.run(
      place, {scalar, index_type(a), vectorised ? most : 1}, sizes_of(a), p.args,
      {reads(offsetof(Args, boxes), p.boxes), reads(offsetof(Args, output), p.output),
       winners(p, false), updates(offsetof(Args, maps), sums)});
  return as_layout(place, sums, p.channels_last, dtype);
}

// Lanes of a warp exchange turned channels: blocks of orientations must not straddle warps.
bool can_exchange(const Args& a) {
  return a.orientations <= 32 && (a.orientations & (a.orientations - 1)) == 0;
}

void forward(const CudaPlace& place, const SampledPlan& p) {
  const std::int64_t scalar = kernel_type(p.maps.scalar_type()), wide = full_vector(scalar);
  const bool vectorised = p.channels_last && p.args.channels % wide == 0 &&
                          (p.kind != SampledKind::kOriented || can_exchange(p.args)) &&
                          aligned_to_16(p.args.maps) && aligned_to_16(p.args.output);
  kernels_of(p.kind).forward.run(
      place, {scalar, index_type(p.args), p.channels_last, vectorised ? wide : 1}, sizes_of(p.args),
      p.args,
      {reads(offsetof(Args, boxes), p.boxes), reads(offsetof(Args, maps), p.maps),
       writes(offsetof(Args, output), p.output), winners(p, true)});
}

// How many taps an element cost as much as the copies of a map to channels last, and of the results back. A pixel's
// channels are then read 16 bytes at a time, four times as fast; turned channels once and not twice. Samples of curved
// regions lie so close together that lanes on bins read whole sectors.
std::int64_t taps_worth_copies(SampledKind kind) {
  if (kind == SampledKind::kBezier) return 8;
  return kind == SampledKind::kOriented ? 2 : 3;
}

bool is_worth_copies(const SampledPlan& p) {
  const Args& a = p.args;
  const std::int64_t results = a.groups * a.bins * a.channels;
  const std::int64_t elements = a.n * a.c * a.h * a.w + results * (a.argmax != nullptr ? 2 : 1);
  const std::int64_t taps = 4 * std::max<std::int64_t>(a.hint, 1) * results;
  return taps > elements * taps_worth_copies(p.kind);
}

void forward_by_channel(const CudaPlace& place, const SampledPlan& p) {
  SampledPlan last = p;
  const std::array<std::int64_t, 4> shape = {p.output.size(0), p.output.size(1), p.output.size(2),
                                             p.output.size(3)};
  const auto like = [&](const Tensor& t) { return empty_layout(t, t.scalar_type(), shape, true); };
  last.channels_last = true;
  last.maps = as_layout(place, p.maps, true);
  last.args.maps = const_cast<void*>(last.maps.const_data_ptr());
  last.output = like(p.output);
  last.args.output = last.output.mutable_data_ptr();
  if (p.args.argmax != nullptr) {
    last.argmax = like(p.argmax);
    last.args.argmax = mutable_data<i32>(last.argmax);
  }
  forward(place, last);
  copy_layout(place, last.output, p.output);
  if (p.args.argmax != nullptr) copy_layout(place, last.argmax, p.argmax);
}

}  // namespace

void run_sampled_cuda(const SampledPlan& p) {
  const CudaPlace place(p.maps);
  if (p.channels_last || !is_worth_copies(p)) {
    forward(place, p);
  } else {
    forward_by_channel(place, p);
  }
}

Tensor run_sampled_backward_cuda(SampledPlan p, bool deterministic) {
  const CudaPlace place(p.output);
  // Lanes are on channels, whatever the layout of the maps.
  p.output = as_layout(place, p.output, true);
  p.args.output = const_cast<void*>(p.output.const_data_ptr());
  if (p.kind == SampledKind::kBorder) {
    p.argmax = as_layout(place, p.argmax, true);
    p.args.argmax = const_cast<i32*>(data<i32>(p.argmax));
  }
  return deterministic ? gather(place, p) : scatter(place, p);
}

}  // namespace torchkiln::bindings
