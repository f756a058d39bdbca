// Launches of deformable_aggregation.
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cstddef>
#include <utility>

#include "bindings/deformable/deformable_aggregation.h"
#include "bindings/support/cuda.h"
#include "bindings/support/layout.h"

namespace torchkiln::bindings {
namespace {

using deformable_aggregation::Args;
using deformable_aggregation::kMostMaps;

struct NormalizeStatics {
  std::int64_t weight;
};
struct ForwardStatics {
  std::int64_t scalar, weight, vector;
};
struct PointStatics {
  std::int64_t scalar, weight, vector, scatter;
};
struct CollectStatics {
  std::int64_t scalar;
};
struct GatherStatics {
  std::int64_t scalar, weight, gradient;
};
struct Sizes {
  std::int64_t batch, queries, pairs, cameras, channels, groups;
  std::int64_t rows;     // of all maps of an image
  std::int64_t sources;  // tensors that these lie in
};
struct BlockTunables {
  std::int64_t block_size;
};
struct ForwardTunables {
  std::int64_t channels, block_size;
};
struct GatherTunables {
  std::int64_t rows, block_size;
};

using Normalize = Kernel<Args, NormalizeStatics, Sizes, BlockTunables>;
using Forward = Kernel<Args, ForwardStatics, Sizes, ForwardTunables>;
using Points = Kernel<Args, PointStatics, Sizes, BlockTunables>;
using Collect = Kernel<Args, CollectStatics, Sizes, BlockTunables>;
using Gather = Kernel<Args, GatherStatics, Sizes, GatherTunables>;

constexpr const char* kPath = "deformable/deformable_aggregation.cuh";
const std::vector<const char*> kOperators = {"deformable_aggregation"};
const std::vector<torchkiln_size> kSizes = {
    {"batch", TORCHKILN_BUCKET_NONE},    {"queries", TORCHKILN_BUCKET_POW2},
    {"pairs", TORCHKILN_BUCKET_POW2},    {"cameras", TORCHKILN_BUCKET_NONE},
    {"channels", TORCHKILN_BUCKET_POW2}, {"groups", TORCHKILN_BUCKET_NONE},
    {"rows", TORCHKILN_BUCKET_NONE},     {"sources", TORCHKILN_BUCKET_NONE}};

// Elements of a pack of 16 bytes.
std::int64_t full_vector(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}
std::int64_t sum_of(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT;
}
bool is_own_or_sum(std::int64_t scalar, std::int64_t other) {
  return other == scalar || other == sum_of(scalar);
}
bool is_half(std::int64_t scalar) { return scalar != sum_of(scalar); }

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

// As many channels as lie in 256 bytes. Long lists of points get large blocks where there are few queries.
const std::vector<ForwardTunables> kForwardDefaults = {{32, 128}, {32, 512},  {64, 128},
                                                       {64, 512}, {128, 128}, {128, 512}};

const Forward forward_kernel({
    .path = kPath,
    .entry = "forward",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("weight", kFloatTypes),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("channels", {32, 64, 128, 256}), ints("block_size", {64, 128, 256, 512})},
    .defaults = kForwardDefaults,
    .valid =
        [](const ForwardStatics& s) {
          return is_own_or_sum(s.scalar, s.weight) &&
                 (s.vector == 1 || s.vector == full_vector(s.scalar));
        },
    .legal = [](const Forward::Problem& p,
                const ForwardTunables& t) { return t.channels / p.statics.vector <= t.block_size; },
    .choose = [](const Forward::Problem& p) -> std::uint32_t {
      const Sizes& s = p.sizes;
      const bool half = is_half(p.statics.scalar), wide = p.statics.scalar == TORCHKILN_DOUBLE;
      const std::uint32_t width = s.channels <= 32 || wide ? 0 : (half && s.channels > 64 ? 2 : 1);
      const std::int64_t blocks =
          s.batch * s.queries * ceil_div(s.channels, kForwardDefaults[2 * width].channels);
      const bool few = blocks < 16 * p.device.multiprocessors;
      return 2 * width + (few && s.pairs >= 512 ? 1 : 0);
    },
    .geometry =
        [](const Forward::Problem& p, const ForwardTunables& t) {
          const Sizes& s = p.sizes;
          return linear(s.batch * s.queries * ceil_div(s.channels, t.channels), t.block_size);
        },
});

// Static and dynamic shared memory together stay within the 48 KB that every device gives unasked.
bool points_fit(std::int64_t scalar, const Sizes& s, const BlockTunables& t) {
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
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}, {256}},
    // The order of atomics is free.
    .tolerance = 1e-4,
    .valid =
        [](const PointStatics& s) {
          return is_own_or_sum(s.scalar, s.weight) && !(s.scatter != 0 && is_half(s.scalar)) &&
                 (s.vector == 1 || s.vector == full_vector(s.scalar));
        },
    .legal = [](const Points::Problem& p,
                const BlockTunables& t) { return points_fit(p.statics.scalar, p.sizes, t); },
    .choose =
        [](const Points::Problem& p) {
          return p.sizes.pairs > 128 && p.statics.scalar != TORCHKILN_DOUBLE ? 1u : 0u;
        },
    .geometry =
        [](const Points::Problem& p, const BlockTunables& t) {
          const Sizes& s = p.sizes;
          const std::int64_t bytes = p.statics.scalar == TORCHKILN_DOUBLE ? 8 : 4;
          return linear(s.batch * s.queries * ceil_div(s.pairs, t.block_size), t.block_size,
                        static_cast<std::uint32_t>((s.channels + s.groups) * bytes));
        },
});

const Collect collect_kernel({
    .path = kPath,
    .entry = "collect",
    .operators = kOperators,
    .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{1024}},
    .geometry =
        [](const Collect::Problem& p, const BlockTunables& t) {
          return linear(p.sizes.batch * p.sizes.cameras, t.block_size);
        },
});

// The sums and the lists of a block must fit into static shared memory, which is 48 KB.
bool gather_fits(std::int64_t scalar, const GatherTunables& t) {
  const bool wide = scalar == TORCHKILN_DOUBLE;
  const std::int64_t touch = wide ? sizeof(deformable_aggregation::Touch<double>)
                                  : sizeof(deformable_aggregation::Touch<float>);
  return t.block_size * (t.rows * (wide ? 8 : 4) + 3 * touch) <= 48 * 1024 - 256;
}

const Gather gather_kernel({
    .path = kPath,
    .entry = "gather",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("weight", kFloatTypes),
                types("gradient", kFloatTypes)},
    .sizes = kSizes,
    .tunables = {ints("rows", {16, 32, 64, 128}), ints("block_size", {32, 64, 128, 256})},
    .defaults = {{64, 128}, {64, 64}},
    .valid =
        [](const GatherStatics& s) {
          return is_own_or_sum(s.scalar, s.weight) && is_own_or_sum(s.scalar, s.gradient);
        },
    .legal = [](const Gather::Problem& p,
                const GatherTunables& t) { return gather_fits(p.statics.scalar, t); },
    .choose =
        [](const Gather::Problem& p) {
          return p.statics.scalar == TORCHKILN_DOUBLE || p.sizes.channels <= 64 ? 1u : 0u;
        },
    .geometry =
        [](const Gather::Problem& p, const GatherTunables& t) {
          // Runs of rows end with their source: at most one more for each.
          const Sizes& s = p.sizes;
          const std::int64_t runs = s.rows / t.rows + s.sources;
          return linear(s.batch * runs * ceil_div(s.channels, t.block_size), t.block_size);
        },
});

// ---- launches ----

Sizes sizes_of(const Args& a) {
  Sizes s = {a.batch,  a.queries, a.points * a.cameras, a.cameras, a.channels,
             a.groups, 0,         sources_of(a)};
  for (i32 source = 0; source < s.sources; ++source) s.rows += rows_of(a, source);
  return s;
}

std::int64_t vector_of(const AggregationPlan& p) {
  const Args& a = p.args;
  const std::int64_t wide = full_vector(kernel_type(p.maps.front().scalar_type()));
  bool aligned = a.channels / a.groups % wide == 0;
  for (const Tensor& map : p.maps) aligned = aligned && aligned_to_16(map.const_data_ptr());
  return aligned ? wide : 1;
}

// The pointers of Args, in its order.
constexpr std::size_t kPointers = 2 * kMostMaps + 11;

class Buffers {
 public:
  Buffers() {
    for (std::size_t i = 0; i < kPointers; ++i) at(i) = unused(i * sizeof(void*));
  }

  // What a kernel does with the pointer of a field: one of `reads`, `writes`, `updates`, `scratch`.
  Buffers& set(const Buffer& buffer) {
    at(buffer.offset / sizeof(void*)) = buffer;
    return *this;
  }
  Buffers& read(std::size_t offset, const Tensor& tensor) {
    return tensor.defined() ? set(reads(offset, tensor)) : *this;
  }
  Buffers& read_inputs(const AggregationPlan& p) {
    for (std::size_t i = 0; i < p.maps.size(); ++i)
      read(offsetof(Args, maps) + i * sizeof(void*), p.maps[i]);
    return read_points(p);
  }
  Buffers& read_points(const AggregationPlan& p) {
    return read(offsetof(Args, shapes), p.shapes)
        .read(offsetof(Args, starts), p.starts)
        .read(offsetof(Args, locations), p.locations)
        .read(offsetof(Args, weights), p.weights)
        .read(offsetof(Args, normalizer), p.normalizer);
  }

  template <class AnyKernel, class Statics>
  void run(const AnyKernel& kernel, const Place& place, const Statics& statics,
           const Args& args) const {
    [&]<std::size_t... i>(std::index_sequence<i...>) {
      kernel.run(place, statics, sizes_of(args), args, {all_[i]...});
    }(std::make_index_sequence<kPointers>{});
  }

 private:
  Buffer& at(std::size_t i) { return all_[i]; }
  std::array<Buffer, kPointers> all_;
};
static_assert(offsetof(Args, seen_counts) == (kPointers - 1) * sizeof(void*));

Buffers with_gradients(Buffers buffers, const AggregationGradient& g, torchkiln_access access) {
  for (std::size_t i = 0; i < g.gradients.size(); ++i)
    buffers.set(buffer(offsetof(Args, gradients) + i * sizeof(void*), access, g.gradients[i]));
  return buffers;
}

void launch_points(const CudaPlace& place, const AggregationGradient& g, bool scatter) {
  const AggregationPlan& p = g.plan;
  Buffers buffers;
  buffers.read_inputs(p)
      .read(offsetof(Args, output), p.output)
      .read(offsetof(Args, grad_output), g.grad_output)
      .set(writes(offsetof(Args, grad_locations), g.grad_locations))
      .set(writes(offsetof(Args, grad_weights), g.grad_weights));
  if (scatter) buffers = with_gradients(buffers, g, TORCHKILN_READ_WRITE);
  const std::int64_t scalar = kernel_type(p.maps.front().scalar_type());
  const PointStatics statics = {scalar, kernel_type(p.weights.scalar_type()), vector_of(p),
                                scatter};
  buffers.run(points_kernel, place, statics, p.args);
}

void launch_gather(const CudaPlace& place, AggregationGradient& g) {
  const AggregationPlan& p = g.plan;
  Args& a = g.plan.args;
  const ScalarType dtype = p.maps.front().scalar_type();
  const bool wide = dtype == ScalarType::Double;
  const std::int64_t bytes = wide ? sizeof(deformable_aggregation::Seen<double>)
                                  : sizeof(deformable_aggregation::Seen<float>);
  const std::int64_t samples = a.batch * a.cameras * a.queries * a.points;
  const Tensor seen = empty(g.grad_output, ScalarType::Byte, {samples * bytes});
  const Tensor counts = empty(g.grad_output, ScalarType::Int, {a.batch * a.cameras});
  a.seen = seen.mutable_data_ptr();
  a.seen_counts = mutable_data<i32>(counts);
  Buffers()
      .read(offsetof(Args, locations), p.locations)
      .set(scratch(offsetof(Args, seen), seen))
      .set(writes(offsetof(Args, seen_counts), counts))
      .run(collect_kernel, place, CollectStatics{wide ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT}, a);
  const GatherStatics statics = {kernel_type(dtype), kernel_type(p.weights.scalar_type()),
                                 kernel_type(g.grad_output.scalar_type())};
  with_gradients(Buffers(), g, TORCHKILN_WRITE)
      .read_points(p)
      .read(offsetof(Args, grad_output), g.grad_output)
      .read(offsetof(Args, seen), seen)
      .read(offsetof(Args, seen_counts), counts)
      .run(gather_kernel, place, statics, a);
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
  const ForwardStatics statics = {kernel_type(p.maps.front().scalar_type()), weight, vector_of(p)};
  Buffers()
      .read_inputs(p)
      .set(writes(offsetof(Args, output), p.output))
      .run(forward_kernel, place, statics, p.args);
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
