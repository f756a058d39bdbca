// What the files with CUDA launches of deformable_aggregation share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "bindings/deformable/deformable_aggregation.h"
#include "bindings/support/buffers.h"
#include "bindings/support/layout.h"

namespace torchkiln::bindings::aggregation {

using deformable_aggregation::Args;
using deformable_aggregation::kMostMaps;

struct Sizes {
  std::int64_t batch, queries, pairs;
  std::int64_t parts;  // of the pairs of a query
  std::int64_t channels, groups;
  std::int64_t rows;     // of all maps of an image
  std::int64_t sources;  // tensors that these lie in
};
struct BlockTunables {
  std::int64_t block_size;
};

inline const std::vector<const char*> kOperators = {"deformable_aggregation"};
inline const std::vector<torchkiln_size> kSizes = {
    {"batch", TORCHKILN_BUCKET_NONE},    {"queries", TORCHKILN_BUCKET_POW2},
    {"pairs", TORCHKILN_BUCKET_POW2},    {"parts", TORCHKILN_BUCKET_NONE},
    {"channels", TORCHKILN_BUCKET_POW2}, {"groups", TORCHKILN_BUCKET_NONE},
    {"rows", TORCHKILN_BUCKET_NONE},     {"sources", TORCHKILN_BUCKET_NONE}};

// Elements of a pack of 16 bytes.
inline std::int64_t full_vector(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}
inline std::int64_t sum_of(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT;
}
inline bool is_own_or_sum(std::int64_t scalar, std::int64_t other) {
  return other == scalar || other == sum_of(scalar);
}
inline bool is_half(std::int64_t scalar) { return scalar != sum_of(scalar); }

inline Sizes sizes_of(const Args& a) {
  Sizes s = {a.batch,  a.queries, a.points * a.cameras, parts_of(a), a.channels,
             a.groups, 0,         sources_of(a)};
  for (i32 source = 0; source < s.sources; ++source) s.rows += rows_of(a, source);
  return s;
}

inline std::int64_t vector_of(const AggregationPlan& p) {
  const Args& a = p.args;
  const std::int64_t wide = full_vector(kernel_type(p.maps.front().scalar_type()));
  bool aligned = a.channels / a.groups % wide == 0;
  for (const Tensor& map : p.maps) aligned = aligned && aligned_to_16(map.const_data_ptr());
  return aligned ? wide : 1;
}

// The pointers of Args, in its order.
constexpr std::size_t kPointers = 2 * kMostMaps + 13;

using Buffers = BuffersOf<kPointers, sizes_of>;
static_assert(offsetof(Args, samples) == (kPointers - 1) * sizeof(void*));

// What makes points, and the maps beside it.
inline Buffers points_of(const AggregationPlan& p) {
  Buffers buffers;
  return buffers.read(offsetof(Args, shapes), p.shapes)
      .read(offsetof(Args, starts), p.starts)
      .read(offsetof(Args, locations), p.locations)
      .read(offsetof(Args, weights), p.weights)
      .read(offsetof(Args, normalizer), p.normalizer);
}
inline Buffers inputs_of(const AggregationPlan& p) {
  Buffers buffers = points_of(p);
  for (std::size_t i = 0; i < p.maps.size(); ++i)
    buffers.read(offsetof(Args, maps) + i * sizeof(void*), p.maps[i]);
  return buffers;
}
inline Buffers with_gradients(Buffers buffers, const AggregationGradient& g,
                              torchkiln_access access) {
  for (std::size_t i = 0; i < g.gradients.size(); ++i)
    buffers.set(buffer(offsetof(Args, gradients) + i * sizeof(void*), access, g.gradients[i]));
  return buffers;
}

// The gradient of the maps without atomics, after that of places and weights.
void launch_gather(const CudaPlace& place, AggregationGradient& gradient);

}  // namespace torchkiln::bindings::aggregation
