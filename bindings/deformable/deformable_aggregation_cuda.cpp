// Launches of deformable_aggregation.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/deformable/deformable_aggregation_cuda.h"

namespace torchkiln::bindings {
namespace {

using namespace aggregation;  // NOLINT: the launches of this operator

struct NormalizeStatics {
  std::int64_t weight;
};
struct ForwardStatics {
  std::int64_t scalar, weight, vector;
};
struct PointStatics {
  std::int64_t scalar, weight, vector, scatter;
};
struct ForwardTunables {
  std::int64_t channels, taps, block_size;
};
struct PointTunables {
  std::int64_t taps, block_size;
};
struct PartStatics {
  std::int64_t sum;
};
using Normalize = Kernel<Args, NormalizeStatics, Sizes, BlockTunables>;
using Forward = Kernel<Args, ForwardStatics, Sizes, ForwardTunables>;
using AddParts = Kernel<Args, PartStatics, Sizes, BlockTunables>;
using Points = Kernel<Args, PointStatics, Sizes, PointTunables>;

constexpr const char* kPath = "deformable/deformable_aggregation.cuh";

const Normalize normalize_kernel({
    .path = kPath,
    .entry = "normalize",
    .operators = kOperators,
    .statics = {types("weight", kFloatTypes)},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}},
    .geometry =
        [](const Normalize::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.batch * p.sizes.queries, t.block_size);
        },
});

// All of 512 bytes of channels, so that points are listed once for them; of parts of long lists of points half as many, and
// larger blocks. Four loads of 16 bytes are in flight for each tap; of two taps, two doubles a load want too many registers,
// and eight half values where a block has several lists.
const std::vector<ForwardTunables> kForwardDefaults = {{32, 1, 128},  {64, 2, 128}, {128, 2, 128},
                                                       {256, 2, 128}, {32, 1, 256}, {64, 1, 256},
                                                       {64, 2, 256},  {128, 1, 256}};

std::uint32_t default_forward(const ForwardStatics& statics, const Sizes& s) {
  const bool half = is_half(statics.scalar);
  if (s.channels <= 32 || statics.scalar == TORCHKILN_DOUBLE) return s.parts > 1 ? 4 : 0;
  if (s.parts == 1) return s.channels <= 64 ? 1 : (statics.vector == 8 && s.channels > 128 ? 3 : 2);
  return half ? (s.channels > 64 ? 7 : 5) : 6;
}

const Forward forward_kernel({
    .path = kPath,
    .entry = "forward",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("weight", kFloatTypes),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("channels", {32, 64, 128, 256}), ints("taps", {1, 2}),
                 ints("block_size", {64, 128, 256, 512})},
    .defaults = kForwardDefaults,
    .valid =
        [](const ForwardStatics& s) {
          return is_own_or_sum(s.scalar, s.weight) &&
                 (s.vector == 1 || s.vector == full_vector(s.scalar));
        },
    .legal = [](const Forward::Problem& p,
                const ForwardTunables& t) { return t.channels / p.statics.vector <= t.block_size; },
    .choose = [](const Forward::Problem& p) { return default_forward(p.statics, p.sizes); },
    .geometry =
        [](const Forward::Problem& p, const ForwardTunables& t) {
          const Sizes& s = p.sizes;
          return linear(s.batch * s.queries * s.parts * ceil_div(s.channels, t.channels),
                        t.block_size);
        },
});

const AddParts add_parts_kernel({
    .path = kPath,
    .entry = "add_parts",
    .operators = kOperators,
    .statics = {types("sum", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .geometry =
        [](const AddParts::Problem& p, const BlockTunables& t) {
          const Sizes& s = p.sizes;
          return linear(ceil_div(s.batch * s.queries * s.channels, t.block_size), t.block_size);
        },
});

// Static and dynamic shared memory together stay within the 48 KB that every device gives unasked.
bool points_fit(std::int64_t scalar, const Sizes& s, const PointTunables& t) {
  const bool wide = scalar == TORCHKILN_DOUBLE;
  // For a thread: place and number of a pair, a tap, the sides of its map.
  const std::int64_t each = wide ? 4 * 8 + 4 + sizeof(deformable_aggregation::Tap<double>)
                                 : 4 * 4 + 4 + sizeof(deformable_aggregation::Tap<float>);
  return t.block_size * each + 256 + (s.channels + s.groups) * (wide ? 8 : 4) <= 48 * 1024;
}

const Points points_kernel({
    .path = kPath,
    .entry = "points",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("weight", kFloatTypes),
                ints("vector", {1, 2, 4, 8}), bools("scatter")},
    .sizes = kSizes,
    .tunables = {ints("taps", {1, 2}), ints("block_size", {64, 128, 256, 512})},
    // Loads of two taps are in flight where two levels of half values are as many bytes as one of floats.
    .defaults = {{1, 128}, {1, 256}, {2, 128}, {2, 256}},
    // The order of atomics is free.
    .tolerance = 1e-4,
    .valid =
        [](const PointStatics& s) {
          return is_own_or_sum(s.scalar, s.weight) && !(s.scatter != 0 && is_half(s.scalar)) &&
                 (s.vector == 1 || s.vector == full_vector(s.scalar));
        },
    .legal =
        [](const Points::Problem& p, const PointTunables& t) {
          return !(p.statics.scatter != 0 && t.taps > 1) &&
                 points_fit(p.statics.scalar, p.sizes, t);
        },
    .choose = [](const Points::Problem& p) -> std::uint32_t {
      const Sizes& s = p.sizes;
      const bool half = is_half(p.statics.scalar);
      if (p.statics.scalar == TORCHKILN_DOUBLE) return 0;
      // Half as many blocks are enough where these wait for atomics, and better where they are few.
      const bool few = s.batch * s.queries <= 2048 && s.pairs <= 128;
      const bool large = half ? few : (p.statics.scatter != 0 || s.pairs > 128);
      return (large ? 1 : 0) + (half ? 2 : 0);
    },
    .geometry =
        [](const Points::Problem& p, const PointTunables& t) {
          const Sizes& s = p.sizes;
          const std::int64_t bytes = p.statics.scalar == TORCHKILN_DOUBLE ? 8 : 4;
          return linear(s.batch * s.queries * ceil_div(s.pairs, t.block_size), t.block_size,
                        static_cast<std::uint32_t>((s.channels + s.groups) * bytes));
        },
});

// ---- launches ----

void launch_points(const CudaPlace& place, const AggregationGradient& g, bool scatter) {
  const AggregationPlan& p = g.plan;
  Buffers buffers = inputs_of(p);
  buffers.read(offsetof(Args, output), p.output)
      .read(offsetof(Args, grad_output), g.grad_output)
      .set(writes(offsetof(Args, grad_locations), g.grad_locations))
      .set(writes(offsetof(Args, grad_weights), g.grad_weights));
  if (scatter) buffers = with_gradients(buffers, g, TORCHKILN_READ_WRITE);
  const std::int64_t scalar = kernel_type(p.maps.front().scalar_type());
  const PointStatics statics = {scalar, kernel_type(p.weights.scalar_type()), vector_of(p),
                                scatter};
  buffers.run(points_kernel, place, statics, p.args);
}

}  // namespace

void run_aggregation_cuda(const AggregationPlan& p) {
  const CudaPlace place(p.output);
  const std::int64_t weight = kernel_type(p.weights.scalar_type());
  if (p.normalizer.defined()) {
    Buffers()
        .read(offsetof(Args, weights), p.weights)
        .set(writes(offsetof(Args, normalizer), p.normalizer))
        .run(normalize_kernel, place, NormalizeStatics{weight}, p.args);
  }
  const std::int64_t scalar = kernel_type(p.maps.front().scalar_type());
  const ForwardStatics statics = {scalar, weight, vector_of(p)};
  Buffers buffers = inputs_of(p);
  const std::int64_t parts = parts_of(p.args);
  if (parts == 1) {
    buffers.set(writes(offsetof(Args, output), p.output))
        .run(forward_kernel, place, statics, p.args);
    return;
  }
  Args args = p.args;
  Tensor partials = empty(p.output, sum_type(p.maps.front().scalar_type()),
                          {parts, args.batch, args.queries, args.channels});
  args.partials = partials.mutable_data_ptr();
  buffers.set(writes(offsetof(Args, partials), partials)).run(forward_kernel, place, statics, args);
  Buffers()
      .read(offsetof(Args, partials), partials)
      .set(writes(offsetof(Args, output), p.output))
      .run(add_parts_kernel, place, PartStatics{sum_of(scalar)}, args);
}

void run_aggregation_backward_cuda(AggregationGradient& g, bool deterministic) {
  const CudaPlace place(g.grad_output);
  // Atomics add floats: for the half types they would need a copy of the maps that is twice as large.
  const bool half = is_half(kernel_type(g.plan.maps.front().scalar_type()));
  const bool scatter = !g.gradients.empty() && !deterministic && !half;
  if (scatter) {
    for (Tensor& gradient : g.gradients) torch::stable::zero_(gradient);
  }
  launch_points(place, g, scatter);
  if (!g.gradients.empty() && !scatter) launch_gather(place, g);
}

}  // namespace torchkiln::bindings
