// Launches of multi-scale deformable attention.
// SPDX-License-Identifier: Apache-2.0
#include <cstddef>

#include "bindings/deformable/multi_scale_deformable_attention.h"
#include "bindings/support/cuda.h"
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
struct Sizes {
  std::int64_t queries;            // of all images and heads
  std::int64_t channels, samples;  // of a query
  std::int64_t pixels, heads;      // of an image; of all images
};
struct QueryTunables {
  std::int64_t lanes, points, block_size;
};
struct StripTunables {
  std::int64_t lanes, pixels, sets, block_size;

  std::int64_t strip() const { return block_size / lanes / sets * pixels; }
};
struct PatchTunables {
  std::int64_t lanes, queries, block_size;
};
struct BoundSizes {
  std::int64_t runs;
};
struct BlockTunables {
  std::int64_t block_size;
};

using Forward = Kernel<Args, Statics, Sizes, QueryTunables>;
using Backward = Kernel<Args, BackwardStatics, Sizes, QueryTunables>;
using Merge = Kernel<Args, Statics, Sizes, PatchTunables>;
using Bound = Kernel<Args, NoStatics, BoundSizes, BlockTunables>;
using Gather = Kernel<Args, Statics, Sizes, StripTunables>;

constexpr const char* kPath = "deformable/multi_scale_deformable_attention.cuh";
constexpr const char* kMergePath = "deformable/multi_scale_deformable_attention_merge.cuh";
constexpr const char* kGatherPath = "deformable/multi_scale_deformable_attention_gather.cuh";
const std::vector<const char*> kOperators = {"multi_scale_deformable_attention",
                                             "multi_scale_deformable_attention_fused"};
const std::vector<torchkiln_size> kSizes = {{"queries", TORCHKILN_BUCKET_POW2},
                                            {"channels", TORCHKILN_BUCKET_POW2},
                                            {"samples", TORCHKILN_BUCKET_POW2},
                                            {"pixels", TORCHKILN_BUCKET_POW2},
                                            {"heads", TORCHKILN_BUCKET_NONE}};
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
bool reads_exist(const Statics& s) { return exists(s, full_vector(s.scalar)); }
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

// A block takes neighbouring queries of one head.
std::int64_t blocks_of(const Sizes& s, std::int64_t queries) {
  return s.heads == 0 ? 0 : s.heads * ceil_div(s.queries / s.heads, queries);
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

const Bound bound_kernel({
    .path = kGatherPath,
    .entry = "bound",
    .operators = kOperators,
    .statics = {},
    .sizes = {{"runs", TORCHKILN_BUCKET_NONE}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}},
    .geometry =
        [](const Bound::Problem& p, const BlockTunables& t) {
          return linear(ceil_div(p.sizes.runs, t.block_size / 32), t.block_size);
        },
});

const Gather gather_kernel({
    .path = kGatherPath,
    .entry = "gather",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), types("place", kFloatTypes),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("lanes", {4, 8, 16, 32}), ints("pixels", {2, 4, 8}), ints("sets", {1, 2, 4}),
                 ints("block_size", {128, 256})},
    .defaults = {{4, 2, 4, 256}, {8, 4, 4, 256}, {32, 4, 4, 256}},
    .valid = &reads_exist,
    // The sums of a thread are in registers; those of all sets but one in shared memory, in the end.
    .legal =
        [](const Gather::Problem& p, const StripTunables& t) {
          const std::int64_t sums = t.pixels * p.statics.vector;
          return sums <= 32 && t.block_size / t.sets * (t.sets - 1) * sums *
                                       accumulator_bytes(p.statics.scalar) <=
                                   16384;
        },
    .choose = &lanes_for<Gather::Problem>,
    .geometry =
        [](const Gather::Problem& p, const StripTunables& t) {
          const std::int64_t strips = ceil_div(p.sizes.pixels, t.strip());
          const std::int64_t chunks = ceil_div(p.sizes.channels, t.lanes * p.statics.vector);
          return linear(strips * chunks * p.sizes.heads, t.block_size);
        },
});

Sizes sizes_of(const Args& a) { return {a.b * a.m * a.q, a.d, a.l * a.p, a.s, a.b * a.m}; }

std::int64_t vector_of(const MsdaPlan& p, const void* third, std::int64_t wanted) {
  const bool aligned =
      aligned_to_16(p.args.value) && aligned_to_16(p.args.output) && aligned_to_16(third);
  return p.args.d % wanted == 0 && aligned ? wanted : 1;
}
std::int64_t vector_of(const MsdaPlan& p, const void* third) {
  return vector_of(p, third, full_vector(kernel_type(p.value.scalar_type())));
}

Buffer reads_if(std::size_t at, bool there, const Tensor& tensor) {
  return there ? reads(at, tensor) : unused(at);
}

// What `gather` is told of samples.
struct Located {
  Tensor firsts, shares, spans;
  std::int64_t runs = 0;  // of all rows

  Located(const MsdaPlan& p, Args& args) {
    const std::int64_t rows = args.b * args.m * args.l, per_row = args.q * args.p;
    const bool wide = p.value.scalar_type() == ScalarType::Double;
    runs = rows * ceil_div(per_row, msda::kRun);
    firsts = empty(p.value, ScalarType::Int, {rows, per_row});
    spans = empty(p.value, ScalarType::Int, {runs, 2});
    args.firsts = mutable_data<i32>(firsts);
    args.spans = mutable_data<i32>(spans);
    if (!p.has_references()) return;
    shares = empty(p.value, wide ? ScalarType::Double : ScalarType::Float, {rows, per_row});
    args.shares = shares.mutable_data_ptr();
  }
};

Tensor run_gather(const CudaPlace& place, const MsdaPlan& p, const MsdaGradients& g, Args args,
                  const Located& located) {
  bound_kernel.run(
      place, {}, {located.runs}, args,
      {reads(offsetof(Args, shapes), p.shapes), reads(offsetof(Args, starts), p.starts),
       reads(offsetof(Args, firsts), located.firsts), writes(offsetof(Args, spans), located.spans),
       unused(offsetof(Args, value)), unused(offsetof(Args, mask)), unused(offsetof(Args, places)),
       unused(offsetof(Args, weights)), unused(offsetof(Args, references)),
       unused(offsetof(Args, output)), unused(offsetof(Args, grad_value)),
       unused(offsetof(Args, grad_places)), unused(offsetof(Args, grad_weights)),
       unused(offsetof(Args, shares))});
  args.grad_value = g.value.mutable_data_ptr();
  gather_kernel.run(
      place,
      {kernel_type(p.value.scalar_type()), kernel_type(p.places.scalar_type()),
       vector_of(p, args.grad_value)},
      sizes_of(args), args,
      {reads(offsetof(Args, shapes), p.shapes), reads(offsetof(Args, starts), p.starts),
       reads_if(offsetof(Args, mask), p.has_mask(), p.mask),
       reads(offsetof(Args, places), p.places), reads(offsetof(Args, weights), p.weights),
       reads_if(offsetof(Args, references), p.has_references(), p.references),
       reads(offsetof(Args, output), p.output), writes(offsetof(Args, grad_value), g.value),
       reads(offsetof(Args, firsts), located.firsts),
       reads_if(offsetof(Args, shares), p.has_references(), located.shares),
       reads(offsetof(Args, spans), located.spans), unused(offsetof(Args, value)),
       unused(offsetof(Args, grad_places)), unused(offsetof(Args, grad_weights))});
  return g.value;
}

// The gradients of places and weights; and the value's sums, or what `gather` needs.
void run_queries(const CudaPlace& place, const MsdaPlan& p, const MsdaGradients& g,
                 const Args& args, bool scatter, Buffer sums, Buffer firsts, Buffer shares) {
  const std::int64_t scalar = kernel_type(p.value.scalar_type());
  const std::int64_t vector = scatter ? sum_vector(scalar) : full_vector(scalar);
  backward_kernel.run(
      place,
      {scalar, kernel_type(p.places.scalar_type()), scatter, vector_of(p, args.grad_value, vector)},
      sizes_of(args), args,
      {reads(offsetof(Args, value), p.value), reads(offsetof(Args, shapes), p.shapes),
       reads(offsetof(Args, starts), p.starts),
       reads_if(offsetof(Args, mask), p.has_mask(), p.mask),
       reads(offsetof(Args, places), p.places), reads(offsetof(Args, weights), p.weights),
       reads_if(offsetof(Args, references), p.has_references(), p.references),
       reads(offsetof(Args, output), p.output), writes(offsetof(Args, grad_places), g.places),
       writes(offsetof(Args, grad_weights), g.weights), unused(offsetof(Args, spans)), sums, firsts,
       shares});
}

// Queries that are the pixels of all levels meet on these.
bool merges(const MsdaPlan& p) {
  const Args& a = p.args;
  return p.value.scalar_type() != ScalarType::Double && a.q == a.s && a.s < msda::kMostMerged;
}

// Adds the value's gradient to `sums`.
void run_merge(const CudaPlace& place, const MsdaPlan& p, const Args& args, const Tensor& sums) {
  const std::int64_t scalar = kernel_type(p.value.scalar_type());
  merge_kernel.run(
      place,
      {scalar, kernel_type(p.places.scalar_type()),
       vector_of(p, args.grad_value, sum_vector(scalar))},
      sizes_of(args), args,
      {reads(offsetof(Args, shapes), p.shapes), reads(offsetof(Args, starts), p.starts),
       reads_if(offsetof(Args, mask), p.has_mask(), p.mask),
       reads(offsetof(Args, places), p.places), reads(offsetof(Args, weights), p.weights),
       reads_if(offsetof(Args, references), p.has_references(), p.references),
       reads(offsetof(Args, output), p.output), updates(offsetof(Args, grad_value), sums),
       unused(offsetof(Args, value)), unused(offsetof(Args, grad_places)),
       unused(offsetof(Args, grad_weights)), unused(offsetof(Args, firsts)),
       unused(offsetof(Args, shares)), unused(offsetof(Args, spans))});
}

}  // namespace

void run_msda_cuda(const MsdaPlan& p) {
  const CudaPlace place(p.value);
  forward_kernel.run(
      place,
      {kernel_type(p.value.scalar_type()), kernel_type(p.places.scalar_type()),
       vector_of(p, nullptr)},
      sizes_of(p.args), p.args,
      {reads(offsetof(Args, value), p.value), reads(offsetof(Args, shapes), p.shapes),
       reads(offsetof(Args, starts), p.starts),
       reads_if(offsetof(Args, mask), p.has_mask(), p.mask),
       reads(offsetof(Args, places), p.places), reads(offsetof(Args, weights), p.weights),
       reads_if(offsetof(Args, references), p.has_references(), p.references),
       writes(offsetof(Args, output), p.output), unused(offsetof(Args, grad_value)),
       unused(offsetof(Args, grad_places)), unused(offsetof(Args, grad_weights)),
       unused(offsetof(Args, firsts)), unused(offsetof(Args, shares)),
       unused(offsetof(Args, spans))});
}

Tensor run_msda_backward_cuda(const MsdaPlan& p, const MsdaGradients& g, bool deterministic) {
  const CudaPlace place(p.value);
  Args args = p.args;
  args.grad_places = g.places.mutable_data_ptr();
  args.grad_weights = g.weights.mutable_data_ptr();
  if (deterministic) {
    const Located located(p, args);
    run_queries(place, p, g, args, false, unused(offsetof(Args, grad_value)),
                writes(offsetof(Args, firsts), located.firsts),
                p.has_references() ? writes(offsetof(Args, shares), located.shares)
                                   : unused(offsetof(Args, shares)));
    return run_gather(place, p, g, args, located);
  }
  const ScalarType dtype = p.value.scalar_type();
  const bool wide = dtype == ScalarType::Float || dtype == ScalarType::Double;
  Tensor sums = wide ? g.value : empty(p.value, ScalarType::Float, shape_of(p.value));
  torch::stable::zero_(sums);
  args.grad_value = sums.mutable_data_ptr();
  const bool merged = merges(p);
  run_queries(
      place, p, g, args, !merged,
      merged ? unused(offsetof(Args, grad_value)) : updates(offsetof(Args, grad_value), sums),
      unused(offsetof(Args, firsts)), unused(offsetof(Args, shares)));
  if (merged) run_merge(place, p, args, sums);
  if (wide) return sums;
  Tensor result = g.value;
  torch::stable::copy_(result, sums);
  return result;
}

}  // namespace torchkiln::bindings
