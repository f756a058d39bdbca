// Launches of the gradient of the maps of deformable_aggregation without atomics on it.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/deformable/deformable_aggregation_cuda.h"

namespace torchkiln::bindings::aggregation {
namespace {

using deformable_aggregation::kBinsOfBlock;
using deformable_aggregation::kMostRows;
using deformable_aggregation::kQuad;
using deformable_aggregation::quads_of;

struct NoStatics {};
struct SampleStatics {
  std::int64_t scalar;  // what places are computed in
};
struct GatherStatics {
  std::int64_t scalar, weight, gradient, vector;
};
struct GatherTunables {
  std::int64_t packs, rows, at_once, block_size;
};

using Samples = Kernel<Args, SampleStatics, Sizes, BlockTunables>;
using OfBins = Kernel<Args, NoStatics, Sizes, BlockTunables>;
using Gather = Kernel<Args, GatherStatics, Sizes, GatherTunables>;

constexpr const char* kPath = "deformable/deformable_aggregation_gather.cuh";

// ---- samples by bins ----

std::int64_t blocks_of_bins(const Sizes& s) { return ceil_div(s.batch * s.rows, kBinsOfBlock); }

Samples samples_kernel(const char* entry) {
  return Samples({
      .path = kPath,
      .entry = entry,
      .operators = kOperators,
      .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
      .sizes = kSizes,
      .tunables = {ints("block_size", {128, 256, 512})},
      .defaults = {{256}},
      .geometry =
          [](const Samples::Problem& p, const BlockTunables& t) {
            const Sizes& s = p.sizes;
            return linear(ceil_div(s.batch * s.queries * s.pairs, t.block_size), t.block_size);
          },
  });
}

const Samples count_kernel = samples_kernel("count");
const Samples fill_kernel = samples_kernel("fill");

// `order` has a thread for each bin, `sum` and `place` have a block for several thousand. Few threads of a block where lists
// of points are long: those of few bins have work, and others wait for them.
template <bool kOrder>
OfBins bins_kernel(const char* entry) {
  return OfBins({
      .path = kPath,
      .entry = entry,
      .operators = kOperators,
      .statics = {},
      .sizes = kSizes,
      .tunables = {kOrder ? ints("block_size", {64, 128, 256})
                          : ints("block_size", {256, 512, 1024})},
      .defaults =
          kOrder ? std::vector<BlockTunables>{{128}, {64}} : std::vector<BlockTunables>{{1024}},
      .choose = [](const OfBins::Problem& p) { return kOrder && p.sizes.parts > 1 ? 1U : 0U; },
      .geometry =
          [](const OfBins::Problem& p, const BlockTunables& t) {
            const std::int64_t blocks = blocks_of_bins(p.sizes);
            return linear(kOrder ? blocks * (kBinsOfBlock / t.block_size) : blocks, t.block_size);
          },
  });
}

const OfBins sum_kernel = bins_kernel<false>("sum");
const OfBins place_kernel = bins_kernel<false>("place");
const OfBins order_kernel = bins_kernel<true>("order");

// ---- gather ----

// In units of kQuad rows; sources begin with a whole run.
std::int64_t quads(const Sizes& s) {
  return s.batch * quads_of(s.rows + (s.sources - 1) * (kMostRows - 1));
}

// Runs of a few rows where lists of points are long, which lie together: all of a run's samples are its block's. Floats with
// a second pack where there are channels for it; half values with more loads in flight, and in small blocks where there are
// many of these.
const std::vector<GatherTunables> kGatherDefaults = {{1, 16, 2, 128}, {2, 16, 2, 128},
                                                     {1, 4, 2, 128},  {2, 4, 2, 128},
                                                     {1, 8, 4, 64},   {1, 8, 4, 128}};

std::uint32_t default_gather(const GatherStatics& statics, const Sizes& s) {
  constexpr std::int64_t kManyRows = 200'000;
  const bool more = s.channels > 32 * statics.vector;
  if (is_half(statics.scalar) && s.parts == 1) return s.batch * s.rows > kManyRows ? 4 : 5;
  return (more && statics.vector < 8 && statics.scalar != TORCHKILN_DOUBLE ? 1 : 0) +
         (s.parts > 1 ? 2 : 0);
}

const Gather gather_kernel({
    .path = kPath,
    .entry = "gather",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("weight", kFloatTypes),
                types("gradient", kFloatTypes), ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("packs", {1, 2}), ints("rows", {kQuad, 8, 16, kMostRows}),
                 ints("at_once", {2, 4, 8}), ints("block_size", {64, 128, 256})},
    .defaults = kGatherDefaults,
    .valid =
        [](const GatherStatics& s) {
          return is_own_or_sum(s.scalar, s.weight) && is_own_or_sum(s.scalar, s.gradient) &&
                 (s.vector == 1 || s.vector == full_vector(s.scalar) ||
                  s.vector == full_vector(s.scalar) / 2);
        },
    .legal =
        [](const Gather::Problem& p, const GatherTunables& t) {
          // Sums of a quad in static shared memory, beside lists and a word for each warp.
          const std::int64_t bytes = p.statics.scalar == TORCHKILN_DOUBLE ? 8 : 4;
          const std::int64_t sums = kQuad * p.statics.vector * t.packs * bytes;
          return t.block_size * (sums + 24 + 9 * bytes) + t.block_size / 8 <= 48 * 1024;
        },
    .choose = [](const Gather::Problem& p) { return default_gather(p.statics, p.sizes); },
    .geometry =
        [](const Gather::Problem& p, const GatherTunables& t) {
          const std::int64_t chunks = deformable_aggregation::chunk_count(
              static_cast<i32>(p.sizes.channels), static_cast<i32>(p.sizes.groups),
              static_cast<i32>(32 * p.statics.vector * t.packs));
          const std::int64_t runs = quads(p.sizes) / (t.rows / kQuad);
          return linear(ceil_div(runs, t.block_size / 32) * chunks, t.block_size);
        },
});

// ---- launches ----

// As many elements a lane as can be read at once, half as many where lanes would have none.
std::int64_t gather_vector(const AggregationGradient& g) {
  const std::int64_t channels = g.plan.args.channels;
  const std::int64_t vector = aligned_to_16(g.grad_output.const_data_ptr()) ? vector_of(g.plan) : 1;
  if (channels <= 32) return 1;
  return vector > 1 && 16 * vector >= channels ? vector / 2 : vector;
}

// Where samples are counted by bins, and behind that what is counted of blocks of bins.
struct Lists {
  Tensor counts, samples;
  std::int64_t blocks;

  Lists(const Tensor& like, Args& a) : blocks(blocks_of_bins(sizes_of(a))) {
    const std::int64_t bins = blocks * kBinsOfBlock;
    counts = empty(like, ScalarType::Int, {bins + blocks});
    samples = empty(like, ScalarType::Int, {a.batch * a.queries * a.points * a.cameras * a.levels});
    torch::stable::zero_(counts);
    a.ends = mutable_data<i32>(counts);
    a.sums = a.ends + bins;
    a.samples = mutable_data<i32>(samples);
  }
  std::int64_t end_bytes() const { return blocks * kBinsOfBlock * std::int64_t{sizeof(i32)}; }
  std::int64_t sum_bytes() const { return blocks * std::int64_t{sizeof(i32)}; }
};

void list_samples(const CudaPlace& place, const AggregationPlan& p, const Lists& lists) {
  const bool wide = p.maps.front().scalar_type() == ScalarType::Double;
  const SampleStatics statics = {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT};
  Buffers ends;
  ends.set(updates(offsetof(Args, ends), lists.end_bytes()));
  Buffers places = ends;
  places.read(offsetof(Args, locations), p.locations);
  places.run(count_kernel, place, statics, p.args);
  Buffers sums;
  sums.set(reads(offsetof(Args, ends), lists.end_bytes()))
      .set(writes(offsetof(Args, sums), lists.sum_bytes()))
      .run(sum_kernel, place, NoStatics{}, p.args);
  sums.set(updates(offsetof(Args, ends), lists.end_bytes()))
      .set(reads(offsetof(Args, sums), lists.sum_bytes()))
      .run(place_kernel, place, NoStatics{}, p.args);
  places.set(scratch(offsetof(Args, samples), lists.samples))
      .run(fill_kernel, place, statics, p.args);
  Buffers()
      .set(reads(offsetof(Args, ends), lists.end_bytes()))
      .set(updates(offsetof(Args, samples), lists.samples))
      .run(order_kernel, place, NoStatics{}, p.args);
}

}  // namespace

void launch_gather(const CudaPlace& place, AggregationGradient& g) {
  const AggregationPlan& p = g.plan;
  const std::int64_t listed =
      p.args.batch * p.args.queries * p.args.points * p.args.cameras * p.args.levels;
  if (listed > std::numeric_limits<i32>::max()) {
    fail(TORCHKILN_ERROR_VALUE, kOperators.front(), "weights",
         "have fewer than 2^31 rows of groups for a gradient without atomics",
         std::to_string(listed), "Call it for a part of the images or queries at a time");
  }
  const Lists lists(g.grad_output, g.plan.args);
  list_samples(place, p, lists);
  const GatherStatics statics = {kernel_type(p.maps.front().scalar_type()),
                                 kernel_type(p.weights.scalar_type()),
                                 kernel_type(g.grad_output.scalar_type()), gather_vector(g)};
  Buffers inputs = points_of(p);
  inputs.read(offsetof(Args, grad_output), g.grad_output)
      .read(offsetof(Args, samples), lists.samples)
      .set(reads(offsetof(Args, ends), lists.end_bytes()));
  with_gradients(inputs, g, TORCHKILN_WRITE).run(gather_kernel, place, statics, p.args);
}

}  // namespace torchkiln::bindings::aggregation
