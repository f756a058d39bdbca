// Launches of the gradient of the maps of deformable_aggregation without atomics on it.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "bindings/deformable/deformable_aggregation_cuda.h"

namespace torchkiln::bindings::aggregation {
namespace {

using deformable_aggregation::kMostCandidates;
using deformable_aggregation::kRunRows;

struct NoStatics {};
struct SampleStatics {
  std::int64_t scalar;  // what places are computed in
};
struct GatherStatics {
  std::int64_t scalar, weight, gradient, vector;
};
struct GatherTunables {
  std::int64_t packs, block_size;
};
struct CrowdTunables {
  std::int64_t packs, pixels, block_size;
};

using Samples = Kernel<Args, SampleStatics, Sizes, BlockTunables>;
using OfLists = Kernel<Args, NoStatics, Sizes, BlockTunables>;
using Gather = Kernel<Args, GatherStatics, Sizes, GatherTunables>;
using Crowds = Kernel<Args, GatherStatics, Sizes, CrowdTunables>;

constexpr const char* kPath = "deformable/deformable_aggregation_gather.cuh";

// ---- samples by bins ----

// Bins on a side: about one for each pixel of a camera's maps, and not many more than samples.
std::int64_t grid_for(const Sizes& s) {
  const std::int64_t pixels = ceil_div(s.rows, s.cameras);
  const std::int64_t bins = std::min<std::int64_t>(pixels, 4 * s.queries * (s.pairs / s.cameras));
  const auto side = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(bins))));
  return std::clamp<std::int64_t>(side, 1, 4096);
}

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

const OfLists place_kernel({
    .path = kPath,
    .entry = "place",
    .operators = kOperators,
    .statics = {},
    .sizes = kSizes,
    .tunables = {ints("block_size", {256, 512, 1024})},
    .defaults = {{1024}},
    .geometry =
        [](const OfLists::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.batch * p.sizes.cameras, t.block_size);
        },
});

const OfLists order_kernel({
    .path = kPath,
    .entry = "order",
    .operators = kOperators,
    .statics = {},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256})},
    .defaults = {{128}},
    .geometry =
        [](const OfLists::Problem& p, const BlockTunables& t) {
          const Sizes& s = p.sizes;
          const std::int64_t side = grid_for(s);
          return linear(ceil_div(s.batch * s.cameras * side * side, t.block_size), t.block_size);
        },
});

// ---- gather ----

std::int64_t bytes_of_sum(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 8 : 4; }

bool is_gather(const GatherStatics& s) {
  return is_own_or_sum(s.scalar, s.weight) && is_own_or_sum(s.scalar, s.gradient) &&
         (s.vector == 1 || s.vector == full_vector(s.scalar) ||
          s.vector == full_vector(s.scalar) / 2);
}

std::vector<Parameter> gather_statics() {
  return {types("scalar", kFloatTypes), types("weight", kFloatTypes),
          types("gradient", kFloatTypes), ints("vector", {1, 2, 4, 8})};
}

std::int64_t chunks(const GatherStatics& s, std::int64_t channels, std::int64_t packs) {
  return ceil_div(channels, 32 * s.vector * packs);
}

// Runs of rows end with their source: at most one more for each.
std::int64_t runs(const Sizes& s) { return s.batch * (s.rows / kRunRows + s.sources); }

// Sums that a lane keeps in registers; twice as many spill.
constexpr std::int64_t kMostSums = 32;

// A second pack where there are channels for it.
std::uint32_t packs_for(const GatherStatics& s, std::int64_t channels) {
  return channels > 32 * s.vector && s.vector < 8 && s.scalar != TORCHKILN_DOUBLE ? 1 : 0;
}

const Gather gather_kernel({
    .path = kPath,
    .entry = "gather",
    .operators = kOperators,
    .statics = gather_statics(),
    .sizes = kSizes,
    .tunables = {ints("packs", {1, 2}), ints("block_size", {128, 256, 512})},
    .defaults = {{1, 256}, {2, 256}},
    .valid = is_gather,
    .legal =
        [](const Gather::Problem& p, const GatherTunables& t) {
          const std::int64_t rows = kRunRows / (t.block_size / 32);
          return rows * t.packs * p.statics.vector * bytes_of_sum(p.statics.scalar) / 4 <=
                 kMostSums;
        },
    .choose = [](const Gather::Problem& p) { return packs_for(p.statics, p.sizes.channels); },
    .geometry =
        [](const Gather::Problem& p, const GatherTunables& t) {
          return linear(runs(p.sizes) * chunks(p.statics, p.sizes.channels, t.packs), t.block_size);
        },
});

// The list and the sums of a block must fit into static shared memory, which is 48 KB.
bool crowds_fit(const GatherStatics& s, const CrowdTunables& t) {
  const std::int64_t sum = bytes_of_sum(s.scalar), touch = 16 + 2 * sum;
  const std::int64_t sums = t.block_size * s.vector * t.packs;
  return sums * sum + kMostCandidates * touch + 9 * t.block_size <= 48 * 1024 &&
         t.pixels * t.packs * s.vector * sum / 4 <= kMostSums;
}

const Crowds crowds_kernel({
    .path = kPath,
    .entry = "gather_crowds",
    .operators = kOperators,
    .statics = gather_statics(),
    .sizes = kSizes,
    .tunables = {ints("packs", {1, 2}), ints("pixels", {2, 4}),
                 ints("block_size", {128, 256, 512})},
    .defaults = {{1, 4, 256}, {2, 4, 256}},
    .valid = is_gather,
    .legal = [](const Crowds::Problem& p,
                const CrowdTunables& t) { return crowds_fit(p.statics, t); },
    .choose = [](const Crowds::Problem& p) { return packs_for(p.statics, p.sizes.channels); },
    .geometry =
        [](const Crowds::Problem& p, const CrowdTunables& t) {
          // How many are crowded only the device knows: a few blocks for each multiprocessor take all in turn.
          const std::int64_t all =
              runs(p.sizes) * (kRunRows / t.pixels) * chunks(p.statics, p.sizes.channels, t.packs);
          return linear(std::min<std::int64_t>(all, 4 * p.device.multiprocessors), t.block_size);
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

// Where the sizes of lists are counted, and what lies behind them: how many runs are crowded.
struct Lists {
  Tensor ends, samples, crowded;

  Lists(const Tensor& like, Args& a) {
    a.grid = grid_for(sizes_of(a));
    const std::int64_t bins = a.batch * a.cameras * a.grid * a.grid;
    ends = empty(like, ScalarType::Int, {bins + 1});
    samples = empty(like, ScalarType::Int, {a.batch * a.cameras * a.queries * a.points});
    crowded = empty(like, ScalarType::Int, {runs(sizes_of(a))});
    torch::stable::zero_(ends);
    a.ends = mutable_data<i32>(ends);
    a.samples = mutable_data<i32>(samples);
    a.crowds = a.ends + bins;
    a.crowded = mutable_data<i32>(crowded);
  }
  std::int64_t end_bytes() const { return (ends.numel() - 1) * std::int64_t{sizeof(i32)}; }
};

constexpr std::int64_t kCrowdsBytes = sizeof(i32);

void list_samples(const CudaPlace& place, const AggregationPlan& p, const Lists& lists) {
  const bool wide = p.maps.front().scalar_type() == ScalarType::Double;
  const SampleStatics statics = {wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT};
  Buffers ends;
  ends.set(updates(offsetof(Args, ends), lists.end_bytes()));
  Buffers places = ends;
  places.read(offsetof(Args, locations), p.locations);
  places.run(count_kernel, place, statics, p.args);
  ends.run(place_kernel, place, NoStatics{}, p.args);
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
  const Lists lists(g.grad_output, g.plan.args);
  list_samples(place, p, lists);
  const GatherStatics statics = {kernel_type(p.maps.front().scalar_type()),
                                 kernel_type(p.weights.scalar_type()),
                                 kernel_type(g.grad_output.scalar_type()), gather_vector(g)};
  Buffers inputs;
  inputs.read_points(p)
      .read(offsetof(Args, grad_output), g.grad_output)
      .read(offsetof(Args, samples), lists.samples)
      .set(reads(offsetof(Args, ends), lists.end_bytes()));
  Buffers buffers = with_gradients(inputs, g, TORCHKILN_WRITE);
  buffers.set(updates(offsetof(Args, crowds), kCrowdsBytes))
      .set(scratch(offsetof(Args, crowded), lists.crowded))
      .run(gather_kernel, place, statics, p.args);
  buffers = with_gradients(inputs, g, TORCHKILN_READ_WRITE);
  buffers.set(reads(offsetof(Args, crowds), kCrowdsBytes))
      .read(offsetof(Args, crowded), lists.crowded)
      .run(crowds_kernel, place, statics, p.args);
}

}  // namespace torchkiln::bindings::aggregation
