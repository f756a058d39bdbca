// Launches of multi-scale deformable attention.
// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "bindings/deformable/multi_scale_deformable_attention.h"
#include "bindings/support/buffers.h"
#include "bindings/support/layout.h"

namespace torchkiln::bindings {
namespace {

using msda::Args;

struct Statics {
  std::int64_t scalar, place, vector;
};
struct BackwardStatics {
  std::int64_t scalar, place, scatter, vector;
};
struct NoStatics {};
struct SampleStatics {
  std::int64_t scalar;  // what places are computed in
};
struct SumStatics {
  std::int64_t scalar, vector;
};
struct Sizes {
  std::int64_t queries;            // of all images and heads
  std::int64_t channels, samples;  // of a query
  std::int64_t pixels, heads;      // of an image; of all images
};
struct QueryTunables {
  std::int64_t lanes, points, block_size;
};
struct PatchTunables {
  std::int64_t lanes, queries, block_size;
};
struct PixelTunables {
  std::int64_t lanes, turns, block_size;
};
struct RunTunables {
  std::int64_t lanes, block_size;
};
struct BlockTunables {
  std::int64_t block_size;
};

using Forward = Kernel<Args, Statics, Sizes, QueryTunables>;
using Backward = Kernel<Args, BackwardStatics, Sizes, QueryTunables>;
using Merge = Kernel<Args, Statics, Sizes, PatchTunables>;
using OfCells = Kernel<Args, NoStatics, Sizes, BlockTunables>;
using OfSamples = Kernel<Args, SampleStatics, Sizes, BlockTunables>;
using Gather = Kernel<Args, SumStatics, Sizes, PixelTunables>;
using OfRuns = Kernel<Args, SumStatics, Sizes, RunTunables>;

constexpr const char* kPath = "deformable/multi_scale_deformable_attention.cuh";
constexpr const char* kMergePath = "deformable/multi_scale_deformable_attention_merge.cuh";
constexpr const char* kCellsPath = "deformable/multi_scale_deformable_attention_cells.cuh";
constexpr const char* kGatherPath = "deformable/multi_scale_deformable_attention_gather.cuh";
constexpr const char* kRunsPath = "deformable/multi_scale_deformable_attention_runs.cuh";
const std::vector<const char*> kOperators = {"multi_scale_deformable_attention",
                                             "multi_scale_deformable_attention_fused"};
const std::vector<torchkiln_size> kSizes = {{"queries", TORCHKILN_BUCKET_POW2},
                                            {"channels", TORCHKILN_BUCKET_POW2},
                                            {"samples", TORCHKILN_BUCKET_POW2},
                                            {"pixels", TORCHKILN_BUCKET_POW2},
                                            {"heads", TORCHKILN_BUCKET_NONE}};
// A quarter of what the GPUs of a data centre keep resident.
constexpr std::int64_t kFewLanes = 65536;
// Static shared memory, without the levels.
constexpr std::int64_t kSharedBytes = 48 * 1024 - 320;

// Elements of a pack of 16 bytes.
std::int64_t full_vector(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}
std::int64_t accumulator_bytes(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 8 : 4; }

// The same of sums. What lanes add atomically must fill sectors together: with more in a lane, each instruction touches a
// part of every sector, and the L2 cache takes as long for a part.
std::int64_t sum_vector(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 2 : 4; }

template <class AnyStatics>
bool exists(const AnyStatics& s, std::int64_t vector) {
  const bool places =
      s.place == s.scalar || (s.place == TORCHKILN_FLOAT &&
                              (s.scalar == TORCHKILN_HALF || s.scalar == TORCHKILN_BFLOAT16));
  return places && (s.vector == 1 || s.vector == vector);
}
bool reads_exist(const Statics& s) {
  return exists(s, full_vector(s.scalar)) || exists(s, sum_vector(s.scalar));
}
bool merge_exists(const Statics& s) {
  return s.scalar != TORCHKILN_DOUBLE && exists(s, sum_vector(s.scalar));
}
bool backward_exists(const BackwardStatics& s) {
  return exists(s, s.scatter != 0 ? sum_vector(s.scalar) : full_vector(s.scalar));
}

// Which of 4, 8 and 32 lanes: all channels of a query at once, or at most in two turns.
template <class AnyProblem>
std::uint32_t lanes_for(const AnyProblem& p) {
  const std::int64_t vectors = ceil_div(p.sizes.channels, p.statics.vector);
  return vectors <= 4 ? 0 : (vectors <= 16 ? 1 : 2);
}

// A block takes neighbouring queries of one head, or so many samples of those.
std::int64_t blocks_of(const Sizes& s, std::int64_t queries, std::int64_t samples = 1) {
  return s.heads == 0 ? 0 : s.heads * ceil_div(s.queries / s.heads * samples, queries);
}
Geometry over_queries(const Sizes& s, const QueryTunables& t) {
  return linear(blocks_of(s, t.block_size / t.lanes), t.block_size);
}

// A table of samples for each query of a block, `numbers` of the accumulator's type in each.
bool table_fits(std::int64_t scalar, const QueryTunables& t, std::int64_t numbers) {
  const std::int64_t bytes = 16 + numbers * accumulator_bytes(scalar);
  return t.block_size / t.lanes * t.points * bytes <= kSharedBytes;
}

const std::vector<Parameter> kQueryTunables = {ints("lanes", {4, 8, 16, 32}),
                                               ints("points", {8, 16, 32}),
                                               ints("block_size", {64, 128, 256, 512})};
// The last three for few queries.
const std::vector<QueryTunables> kForwardDefaults = {{4, 8, 256},  {8, 8, 256},  {32, 16, 128},
                                                     {4, 16, 128}, {8, 16, 128}, {32, 16, 128}};
const std::vector<QueryTunables> kBackwardDefaults = {{4, 16, 128}, {8, 16, 256}, {32, 16, 128},
                                                      {4, 16, 128}, {8, 16, 128}, {32, 16, 128}};

// Many queries in a block share pixels in the L1 cache; few of them must be spread over the GPU.
template <class AnyProblem>
std::uint32_t queries_for(const AnyProblem& p) {
  const std::int64_t vectors = ceil_div(p.sizes.channels, p.statics.vector);
  const bool few = p.sizes.queries * vectors < 2048 * p.device.multiprocessors;
  return lanes_for(p) + (few ? 3 : 0);
}

const Forward forward_kernel({
    .path = kPath,
    .entry = "forward",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("place", kFloatTypes),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = kQueryTunables,
    .defaults = kForwardDefaults,
    .valid = &reads_exist,
    .legal = [](const Forward::Problem& p,
                const QueryTunables& t) { return table_fits(p.statics.scalar, t, 5); },
    .choose = &queries_for<Forward::Problem>,
    .geometry = [](const Forward::Problem& p,
                   const QueryTunables& t) { return over_queries(p.sizes, t); },
});

const Backward backward_kernel({
    .path = kPath,
    .entry = "backward",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("place", kFloatTypes), bools("scatter"),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = kQueryTunables,
    .defaults = kBackwardDefaults,
    .valid = &backward_exists,
    .legal = [](const Backward::Problem& p,
                const QueryTunables& t) { return table_fits(p.statics.scalar, t, 8); },
    .choose = &queries_for<Backward::Problem>,
    .geometry = [](const Backward::Problem& p,
                   const QueryTunables& t) { return over_queries(p.sizes, t); },
});

std::int64_t merge_bytes(const Merge::Problem& p, const PatchTunables& t) {
  const std::int64_t bytes = p.statics.scalar == TORCHKILN_FLOAT ? 4 : 2;
  return msda::merge_bytes(bytes, t.lanes * p.statics.vector, t.queries, t.block_size);
}
bool merge_fits(const Merge::Problem& p, const PatchTunables& t) {
  return merge_bytes(p, t) <= p.device.shared_bytes_per_block;
}
// The last three where shared memory is small.
const std::vector<PatchTunables> kPatchDefaults = {{4, 256, 256}, {8, 256, 256}, {32, 64, 128},
                                                   {4, 128, 128}, {8, 128, 128}, {32, 32, 128}};

const Merge merge_kernel({
    .path = kMergePath,
    .entry = "merge",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("place", kFloatTypes),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("lanes", {4, 8, 16, 32}), ints("queries", {32, 64, 128, 256}),
                 ints("block_size", {128, 256, 512})},
    .defaults = kPatchDefaults,
    .valid = &merge_exists,
    .legal = &merge_fits,
    .choose = [](const Merge::Problem& p) -> std::uint32_t {
      const std::uint32_t lanes = lanes_for(p);
      return lanes + (merge_fits(p, kPatchDefaults[lanes]) ? 0 : 3);
    },
    .geometry =
        [](const Merge::Problem& p, const PatchTunables& t) {
          return linear(blocks_of(p.sizes, t.queries), t.block_size,
                        static_cast<std::uint32_t>(merge_bytes(p, t)));
        },
});

// `order` has a thread for each cell, `place` a block for each image and head, and one more.
template <bool kOrder>
OfCells cells_kernel(const char* entry) {
  return OfCells({
      .path = kCellsPath,
      .entry = entry,
      .operators = kOperators,
      .statics = {},
      .sizes = kSizes,
      .tunables = {kOrder ? ints("block_size", {64, 128, 256})
                          : ints("block_size", {256, 512, 1024})},
      .defaults = {{kOrder ? 128 : 1024}},
      .geometry =
          [](const OfCells::Problem& p, const BlockTunables& t) {
            const Sizes& s = p.sizes;
            const std::int64_t placing = s.heads == 0 ? 0 : s.heads + 1;
            return linear(kOrder ? s.heads * ceil_div(s.pixels, t.block_size) : placing,
                          t.block_size);
          },
  });
}
const OfCells place_kernel = cells_kernel<false>("place");
const OfCells order_kernel = cells_kernel<true>("order");

// A thread has kOwn samples.
template <std::int64_t kOwn>
OfSamples samples_kernel(const char* entry, std::int64_t block_size) {
  return OfSamples({
      .path = kCellsPath,
      .entry = entry,
      .operators = kOperators,
      .statics = {types("scalar", {TORCHKILN_FLOAT, TORCHKILN_DOUBLE})},
      .sizes = kSizes,
      .tunables = {ints("block_size", {128, 256, 512})},
      .defaults = {{block_size}},
      .geometry =
          [](const OfSamples::Problem& p, const BlockTunables& t) {
            return linear(blocks_of(p.sizes, kOwn * t.block_size, p.sizes.samples), t.block_size);
          },
  });
}
const OfSamples count_kernel = samples_kernel<msda::kCountedByThread>("count", 512);
const OfSamples fill_kernel = samples_kernel<1>("fill", 256);

bool sums_exist(const SumStatics& s) { return s.vector == 1 || s.vector == sum_vector(s.scalar); }

const Gather gather_kernel({
    .path = kGatherPath,
    .entry = "gather",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), ints("vector", {1, 2, 4})},
    .sizes = kSizes,
    .tunables = {ints("lanes", {4, 8, 16, 32}), ints("turns", {1, 2, 4}),
                 ints("block_size", {64, 128, 256})},
    .defaults = {{4, 4, 256}, {8, 4, 256}, {32, 4, 256}},
    .valid = &sums_exist,
    .choose = &lanes_for<Gather::Problem>,
    .geometry =
        [](const Gather::Problem& p, const PixelTunables& t) {
          const std::int64_t pixels = t.block_size / t.lanes;
          const std::int64_t patches = ceil_div(ceil_div(p.sizes.pixels, pixels), t.turns);
          const std::int64_t chunks = ceil_div(p.sizes.channels, t.lanes * p.statics.vector);
          return linear(patches * chunks * p.sizes.heads, t.block_size);
        },
});

// `add` has lanes for each run of samples, `join` for each pixel.
template <bool kAdd>
OfRuns runs_kernel(const char* entry) {
  return OfRuns({
      .path = kRunsPath,
      .entry = entry,
      .operators = kOperators,
      .statics = {types("scalar", kFloatTypes), ints("vector", {1, 2, 4})},
      .sizes = kSizes,
      .tunables = {ints("lanes", {4, 8, 16, 32}), ints("block_size", {64, 128, 256})},
      .defaults = {{4, 256}, {8, 256}, {32, 256}},
      .valid = &sums_exist,
      .choose = &lanes_for<OfRuns::Problem>,
      .geometry =
          [](const OfRuns::Problem& p, const RunTunables& t) {
            const Sizes& s = p.sizes;
            const std::int64_t of_head = s.heads == 0 ? 0 : s.queries / s.heads * s.samples;
            const std::int64_t owners = kAdd ? ceil_div(of_head, msda::kRun) : s.pixels;
            const std::int64_t chunks = ceil_div(s.channels, t.lanes * p.statics.vector);
            return linear(ceil_div(owners, t.block_size / t.lanes) * chunks * s.heads,
                          t.block_size);
          },
  });
}
const OfRuns add_kernel = runs_kernel<true>("add");
const OfRuns join_kernel = runs_kernel<false>("join");

Sizes sizes_of(const Args& a) { return {a.b * a.m * a.q, a.d, a.l * a.p, a.s, a.b * a.m}; }

std::int64_t vector_of(const MsdaPlan& p, const void* third, std::int64_t wanted) {
  const bool aligned =
      aligned_to_16(p.args.value) && aligned_to_16(p.args.output) && aligned_to_16(third);
  return p.args.d % wanted == 0 && aligned ? wanted : 1;
}
// Few queries are too few lanes to hide what they wait for: of half types each then takes half as many channels.
std::int64_t forward_vector(const MsdaPlan& p) {
  const std::int64_t scalar = kernel_type(p.value.scalar_type()), full = full_vector(scalar);
  const bool few = p.args.b * p.args.m * p.args.q * ceil_div(p.args.d, full) < kFewLanes;
  return vector_of(p, nullptr, few ? sum_vector(scalar) : full);
}

using Buffers = BuffersOf<offsetof(Args, b) / sizeof(void*), sizes_of>;

// Levels, and what makes samples.
Buffers samples_of(const MsdaPlan& p) {
  Buffers buffers;
  buffers.set(reads(offsetof(Args, shapes), p.shapes))
      .set(reads(offsetof(Args, starts), p.starts))
      .set(reads(offsetof(Args, places), p.places))
      .set(reads(offsetof(Args, weights), p.weights));
  if (p.has_mask()) buffers.set(reads(offsetof(Args, mask), p.mask));
  if (p.has_references()) buffers.set(reads(offsetof(Args, references), p.references));
  return buffers;
}

ScalarType sum_type(const MsdaPlan& p) {
  return p.value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
// Whether most pixels get something: samples are then counted and added up together, not by themselves.
bool is_dense(const Args& a) { return a.q * a.l * a.p >= 2 * a.s; }

// The samples of all cells, in order.
struct Lists {
  Tensor placed, ends, ranks, samples;

  Lists(const MsdaPlan& p, Args& args) {
    const std::int64_t heads = args.b * args.m, of_head = args.q * args.l * args.p;
    if (of_head > std::numeric_limits<i32>::max()) {
      fail(TORCHKILN_ERROR_VALUE, p.op,
           p.has_references() ? "sampling_offsets" : "sampling_locations",
           "have fewer than 2^31 points of all queries and levels where deterministic",
           std::to_string(of_head), "Call it for a part of the queries at a time");
    }
    placed = empty(p.value, sum_type(p), {heads, of_head, 4});
    ends = empty(p.value, ScalarType::Int, {heads * msda::cells_of(args) + 1});
    ranks = empty(p.value, ScalarType::Int, {heads, of_head});
    samples = empty(p.value, ScalarType::Int, {heads, of_head});
    torch::stable::zero_(ends);
    args.placed = placed.mutable_data_ptr();
    args.ends = mutable_data<i32>(ends);
    args.samples = mutable_data<i32>(samples);
  }
};

void list_samples(const CudaPlace& place, const MsdaPlan& p, const Args& args, const Lists& lists,
                  bool counted) {
  const SampleStatics statics = {kernel_type(sum_type(p))};
  const Buffers levels = Buffers()
                             .set(reads(offsetof(Args, shapes), p.shapes))
                             .set(reads(offsetof(Args, starts), p.starts))
                             .set(updates(offsetof(Args, ends), lists.ends));
  if (!counted) {
    Buffers(levels)
        .set(reads(offsetof(Args, placed), lists.placed))
        .set(scratch(offsetof(Args, ranks), lists.ranks))
        .run(count_kernel, place, statics, args);
  }
  levels.run(place_kernel, place, NoStatics{}, args);
  Buffers()
      .set(reads(offsetof(Args, placed), lists.placed))
      .set(reads(offsetof(Args, ends), lists.ends))
      .set(reads(offsetof(Args, ranks), lists.ranks))
      .set(scratch(offsetof(Args, samples), lists.samples))
      .run(fill_kernel, place, statics, args);
  Buffers()
      .set(reads(offsetof(Args, ends), lists.ends))
      .set(updates(offsetof(Args, samples), lists.samples))
      .run(order_kernel, place, NoStatics{}, args);
}

// What the kernels that add up samples read of these.
Buffers listed(const MsdaPlan& p, const Lists& lists) {
  Buffers buffers;
  if (p.has_mask()) buffers.set(reads(offsetof(Args, mask), p.mask));
  return buffers.set(reads(offsetof(Args, shapes), p.shapes))
      .set(reads(offsetof(Args, starts), p.starts))
      .set(reads(offsetof(Args, output), p.output))
      .set(reads(offsetof(Args, placed), lists.placed))
      .set(reads(offsetof(Args, ends), lists.ends))
      .set(reads(offsetof(Args, samples), lists.samples));
}

// The value's gradient, but where levels share pixels.
void run_runs(const CudaPlace& place, const MsdaPlan& p, const MsdaGradients& g, const Args& args,
              const SumStatics& statics, const Lists& lists, const Tensor& sums,
              const Tensor& seams) {
  Buffers(listed(p, lists))
      .set(scratch(offsetof(Args, sums), sums))
      .set(scratch(offsetof(Args, seams), seams))
      .run(add_kernel, place, statics, args);
  Buffers(listed(p, lists))
      .set(reads(offsetof(Args, sums), sums))
      .set(reads(offsetof(Args, seams), seams))
      .set(writes(offsetof(Args, grad_value), g.value))
      .run(join_kernel, place, statics, args);
}

Tensor add_up(const CudaPlace& place, const MsdaPlan& p, const MsdaGradients& g, Args args,
              const Lists& lists) {
  const std::int64_t scalar = kernel_type(p.value.scalar_type());
  args.grad_value = g.value.mutable_data_ptr();
  const SumStatics statics = {scalar, vector_of(p, args.grad_value, sum_vector(scalar))};
  if (is_dense(args)) {
    const std::int64_t heads = args.b * args.m;
    const Tensor sums = empty(p.value, sum_type(p), {heads, msda::cells_of(args), 2, args.d});
    const Tensor seams = empty(p.value, sum_type(p), {heads, msda::runs_of(args), 4, args.d});
    args.sums = sums.mutable_data_ptr();
    args.seams = seams.mutable_data_ptr();
    run_runs(place, p, g, args, statics, lists, sums, seams);
  }
  listed(p, lists)
      .set(updates(offsetof(Args, grad_value), g.value))
      .run(gather_kernel, place, statics, args);
  return g.value;
}

// The gradients of places and weights; and into `more` the value's sums, or what `gather` needs.
void run_queries(const CudaPlace& place, const MsdaPlan& p, const MsdaGradients& g,
                 const Args& args, bool scatter, std::initializer_list<Buffer> more) {
  const std::int64_t scalar = kernel_type(p.value.scalar_type());
  const std::int64_t vector = scatter ? sum_vector(scalar) : full_vector(scalar);
  Buffers buffers = samples_of(p)
                        .set(reads(offsetof(Args, value), p.value))
                        .set(reads(offsetof(Args, output), p.output))
                        .set(writes(offsetof(Args, grad_places), g.places))
                        .set(writes(offsetof(Args, grad_weights), g.weights));
  for (const Buffer& buffer : more) buffers.set(buffer);
  buffers.run(backward_kernel, place,
              BackwardStatics{scalar, kernel_type(p.places.scalar_type()), scatter,
                              vector_of(p, args.grad_value, vector)},
              args);
}

// Queries that are the pixels of all levels meet on these.
bool merges(const MsdaPlan& p) {
  const Args& a = p.args;
  return p.value.scalar_type() != ScalarType::Double && a.q == a.s && a.s < msda::kMostMerged;
}

// Adds the value's gradient to `sums`.
void run_merge(const CudaPlace& place, const MsdaPlan& p, const Args& args, const Tensor& sums) {
  const std::int64_t scalar = kernel_type(p.value.scalar_type());
  samples_of(p)
      .set(reads(offsetof(Args, output), p.output))
      .set(updates(offsetof(Args, grad_value), sums))
      .run(merge_kernel, place,
           Statics{scalar, kernel_type(p.places.scalar_type()),
                   vector_of(p, args.grad_value, sum_vector(scalar))},
           args);
}

}  // namespace

void run_msda_cuda(const MsdaPlan& p) {
  const CudaPlace place(p.value);
  samples_of(p)
      .set(reads(offsetof(Args, value), p.value))
      .set(writes(offsetof(Args, output), p.output))
      .run(forward_kernel, place,
           Statics{kernel_type(p.value.scalar_type()), kernel_type(p.places.scalar_type()),
                   forward_vector(p)},
           p.args);
}

Tensor run_msda_backward_cuda(const MsdaPlan& p, const MsdaGradients& g, bool deterministic) {
  const CudaPlace place(p.value);
  Args args = p.args;
  args.grad_places = g.places.mutable_data_ptr();
  args.grad_weights = g.weights.mutable_data_ptr();
  if (deterministic) {
    const Lists lists(p, args);
    const bool counts = !is_dense(args);
    args.ranks = counts ? mutable_data<i32>(lists.ranks) : nullptr;
    const Buffer ranks =
        counts ? scratch(offsetof(Args, ranks), lists.ranks) : unused(offsetof(Args, ranks));
    run_queries(place, p, g, args, false,
                {scratch(offsetof(Args, placed), lists.placed),
                 updates(offsetof(Args, ends), lists.ends), ranks});
    args.ranks = mutable_data<i32>(lists.ranks);
    list_samples(place, p, args, lists, counts);
    return add_up(place, p, g, args, lists);
  }
  const ScalarType dtype = p.value.scalar_type();
  const bool wide = dtype == ScalarType::Float || dtype == ScalarType::Double;
  Tensor sums = wide ? g.value : empty(p.value, ScalarType::Float, shape_of(p.value));
  torch::stable::zero_(sums);
  args.grad_value = sums.mutable_data_ptr();
  const bool merged = merges(p);
  run_queries(
      place, p, g, args, !merged,
      {merged ? unused(offsetof(Args, grad_value)) : updates(offsetof(Args, grad_value), sums)});
  if (merged) run_merge(place, p, args, sums);
  if (wide) return sums;
  Tensor result = g.value;
  torch::stable::copy_(result, sums);
  return result;
}

}  // namespace torchkiln::bindings
