// deformable_aggregation on the CPU. Forward, and the gradients of places and weights: threads over queries. Gradient of
// the maps: threads over blocks of channels of an image, each adds all samples in order, whatever maps they share. The
// same result for any number of threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <type_traits>

#include "bindings/deformable/deformable_aggregation.h"
#include "bindings/support/parallel.h"

namespace torchkiln::bindings {
namespace {

using namespace deformable_aggregation;  // NOLINT: the maths of this operator

// Channels of a gradient that one task sums.
constexpr i64 kChannelBlock = 32;
constexpr i64 kLanes = 16;

std::size_t place(std::int64_t at) { return static_cast<std::size_t>(at); }

// The four pixels of a sample; a row of zeros for those outside.
template <class Scalar>
using Rows = std::array<const Scalar*, 4>;

// sums[i] += factors[0] * rows[0][i] + ...
TORCHKILN_VECTORISED void add_rows(float* __restrict__ sums, const Rows<float>& rows,
                                   const float* factors, std::int64_t n) {
  const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  for (std::int64_t i = 0; i < n; ++i)
    sums[i] += factors[0] * a[i] + factors[1] * b[i] + factors[2] * c[i] + factors[3] * d[i];
}
template <class Scalar, class T>
void add_rows(T* sums, const Rows<Scalar>& rows, const T* factors, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::size_t k = 0; k < 4; ++k) sums[i] += factors[k] * load(rows[k][i]);
  }
}

// dots[k] = sum of gradient[i] * rows[k][i], in kLanes parts.
TORCHKILN_VECTORISED void dot_rows(const float* __restrict__ gradient, const Rows<float>& rows,
                                   float* dots, std::int64_t n) {
  for (std::size_t k = 0; k < 4; ++k) {
    const float* row = rows[k];
    float parts[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (std::int64_t j = 0; j < kLanes; ++j) parts[j] += gradient[i + j] * row[i + j];
    }
    for (; i < n; ++i) parts[0] += gradient[i] * row[i];
    dots[k] = 0;
    for (const float part : parts) dots[k] += part;
  }
}
template <class Scalar, class T>
void dot_rows(const T* gradient, const Rows<Scalar>& rows, T* dots, std::int64_t n) {
  for (std::size_t k = 0; k < 4; ++k) {
    dots[k] = T(0);
    for (std::int64_t i = 0; i < n; ++i) dots[k] += gradient[i] * load(rows[k][i]);
  }
}

// sums[i] += factor * values[i]
TORCHKILN_VECTORISED void add_scaled(float* __restrict__ sums, const float* __restrict__ values,
                                     float factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += factor * values[i];
}
TORCHKILN_VECTORISED void add_scaled(double* __restrict__ sums, const double* __restrict__ values,
                                     double factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += factor * values[i];
}

void check_indices(const Args& a) {
  if (a.shapes == nullptr) return;
  for (i32 camera = 0; camera < a.cameras; ++camera) {
    for (i32 level = 0; level < a.levels; ++level) {
      if (map_of(a, 0, camera, level).h > 0) continue;
      const auto own = deformable_aggregation::extent_at(a, camera * a.levels + level);
      fail(TORCHKILN_ERROR_INDEX, "deformable_aggregation", "spatial_shape and scale_start_index",
           "lie in the " + std::to_string(a.rows) + " rows of feature_maps",
           std::to_string(own.h) + " x " + std::to_string(own.w) + " from row " +
               std::to_string(own.first));
    }
  }
}

// f(pair, map, tap) for all samples of a query that cameras see, in order; pair is point * cameras + camera.
template <class T, class F>
void each_sample(const Args& a, i64 query, const F& f) {
  const i64 image = query / a.queries, pairs = a.points * a.cameras;
  for (i64 pair = 0; pair < pairs; ++pair) {
    T x = T(0), y = T(0);
    location_at(a, query * pairs + pair, x, y);
    if (!is_seen(x, y)) continue;
    const i32 point = static_cast<i32>(pair / a.cameras);
    const i32 camera = static_cast<i32>(pair % a.cameras);
    for (i32 level = 0; level < a.levels; ++level) {
      const Map map = map_of(a, image, camera, level);
      Tap<T> tap = tap_of(map, x, y);
      tap.weight = weight_row(a, point, camera, level);
      f(pair, map, tap);
    }
  }
}

template <class Scalar, class T>
Rows<Scalar> rows_at(const Args& a, const Tap<T>& tap, const std::vector<Scalar>& zeros) {
  Rows<Scalar> rows;
  for (std::size_t k = 0; k < 4; ++k) {
    rows[k] = tap.pixels[k] < 0
                  ? zeros.data()
                  : static_cast<const Scalar*>(a.maps[tap.source]) + tap.pixels[k] * a.channels;
  }
  return rows;
}

// Nanoseconds that a query takes, about.
std::int64_t cost_of(const Args& a) {
  return a.points * a.cameras * (4 + a.levels * a.channels / 8);
}

// ---- forward ----

template <class Weight, class T>
void normalize(const Args& a, i64 query) {
  const Weight* logits = static_cast<const Weight*>(a.weights) + weights_of_query(a, query);
  T* to = static_cast<T*>(a.normalizer) + query * 2 * a.groups;
  const i64 rows = a.points * a.cameras * a.levels;
  for (i64 group = 0; group < a.groups; ++group) {
    Softmax<T> all = empty_softmax<T>();
    for (i64 row = 0; row < rows; ++row) all.add(T(load(logits[row * a.groups + group])));
    to[group] = all.most;
    to[a.groups + group] = all.inverse();
  }
}

template <class Scalar, class Weight>
void aggregate_queries(const Args& a, i64 begin, i64 end) {
  using T = Acc<Scalar>;
  const std::vector<Scalar> zeros(place(a.channels), Scalar{});
  std::vector<T> sums(place(a.channels));
  const i64 per_group = a.channels / a.groups;
  for (i64 query = begin; query < end; ++query) {
    if (a.normalizer != nullptr) normalize<Weight, T>(a, query);
    const Weight* weights = static_cast<const Weight*>(a.weights) + weights_of_query(a, query);
    std::fill(sums.begin(), sums.end(), T(0));
    each_sample<T>(a, query, [&](i64, const Map&, const Tap<T>& tap) {
      const Rows<Scalar> rows = rows_at(a, tap, zeros);
      for (i64 group = 0; group < a.groups; ++group) {
        const T weight = normalizer_of<T>(
            a, query, static_cast<i32>(group))(T(load(weights[tap.weight + group])));
        const T factors[4] = {weight * tap.share(0), weight * tap.share(1), weight * tap.share(2),
                              weight * tap.share(3)};
        const i64 c = group * per_group;
        add_rows(&sums[place(c)], Rows<Scalar>{rows[0] + c, rows[1] + c, rows[2] + c, rows[3] + c},
                 factors, per_group);
      }
    });
    for (i64 c = 0; c < a.channels; ++c)
      store_as(a.output, a.output_type, query * a.channels + c, sums[place(c)]);
  }
}

// ---- gradients of places and weights ----

template <class Scalar, class Weight>
class PointGradients {
 public:
  using T = Acc<Scalar>;
  explicit PointGradients(const Args& args)
      : a(args),
        zeros(place(args.channels), Scalar{}),
        gradient(place(args.channels)),
        mean(place(args.groups)) {}

  void run(i64 query) {
    const i64 per_group = a.channels / a.groups;
    std::fill(mean.begin(), mean.end(), T(0));
    for (i64 c = 0; c < a.channels; ++c) {
      const i64 at = query * a.channels + c;
      gradient[place(c)] = load_as<T>(a.grad_output, a.gradient_type, at);
      if (a.normalizer != nullptr) {
        mean[place(c / per_group)] += gradient[place(c)] * load_as<T>(a.output, a.output_type, at);
      }
    }
    fill_unseen(query);
    const i64 pairs = a.points * a.cameras;
    each_sample<T>(a, query, [&](i64 pair, const Map& map, const Tap<T>& tap) {
      if (pair != last_pair_) {
        place_of(query * pairs + last_pair_);
        last_pair_ = pair;
      }
      differentiate(query, map, tap);
    });
    place_of(query * pairs + last_pair_);
    last_pair_ = -1;
  }

 private:
  T weight_at(i64 query, i64 at, i64 group) const {
    return normalizer_of<T>(
        a, query, static_cast<i32>(group))(T(load(static_cast<const Weight*>(a.weights)[at])));
  }

  // What points get that no camera sees.
  void fill_unseen(i64 query) {
    const i64 first = weights_of_query(a, query);
    const i64 count = weights_of_query(a, query + 1) - first;
    for (i64 i = first; i < first + count; ++i) {
      const i64 group = (i - first) % a.groups;
      const T value =
          a.normalizer != nullptr ? -weight_at(query, i, group) * mean[place(group)] : T(0);
      store(static_cast<Weight*>(a.grad_weights)[i], value);
    }
    const i64 places = 2 * a.points * a.cameras;
    for (i64 i = query * places; i < (query + 1) * places; ++i)
      store_as(a.grad_locations, a.location_type, i, T(0));
  }

  // Stores the gradient of a place when all of its levels are added.
  void place_of(i64 pair) {
    if (last_pair_ < 0) return;
    store_as(a.grad_locations, a.location_type, 2 * pair, dx_);
    store_as(a.grad_locations, a.location_type, 2 * pair + 1, dy_);
    dx_ = dy_ = T(0);
  }

  void differentiate(i64 query, const Map& map, const Tap<T>& tap) {
    const i64 per_group = a.channels / a.groups;
    const Rows<Scalar> rows = rows_at(a, tap, zeros);
    const i64 first = weights_of_query(a, query) + tap.weight;
    for (i64 group = 0; group < a.groups; ++group) {
      const i64 c = group * per_group;
      T dots[4];
      dot_rows(&gradient[place(c)],
               Rows<Scalar>{rows[0] + c, rows[1] + c, rows[2] + c, rows[3] + c}, dots, per_group);
      const T weight = weight_at(query, first + group, group);
      const T top = dots[1] - dots[0], bottom = dots[3] - dots[2];
      const T upper = dots[0] + tap.right * top, lower = dots[2] + tap.right * bottom;
      dx_ += T(map.w) * weight * (top + tap.down * (bottom - top));
      dy_ += T(map.h) * weight * (lower - upper);
      T value = upper + tap.down * (lower - upper);
      if (a.normalizer != nullptr) value = weight * (value - mean[place(group)]);
      store(static_cast<Weight*>(a.grad_weights)[first + group], value);
    }
  }

  const Args& a;
  std::vector<Scalar> zeros;
  std::vector<T> gradient, mean;
  i64 last_pair_ = -1;
  T dx_ = T(0), dy_ = T(0);
};

// ---- gradient of the maps ----

// Sums of the channels of a task: all rows of all maps of an image, row after row, map after map.
template <class T>
struct MapSums {
  std::vector<T> values;
  std::array<i64, kMostMaps + 1> first;  // row of each source
};

template <class Scalar, class Weight>
void add_query(const Args& a, i64 query, i64 begin, i64 channels, MapSums<Acc<Scalar>>& sums) {
  using T = Acc<Scalar>;
  const i64 per_group = a.channels / a.groups, image = query / a.queries;
  T gradient[kChannelBlock];
  for (i64 c = 0; c < channels; ++c) {
    gradient[c] = load_as<T>(a.grad_output, a.gradient_type, query * a.channels + begin + c);
  }
  const Weight* weights = static_cast<const Weight*>(a.weights) + weights_of_query(a, query);
  each_sample<T>(a, query, [&](i64, const Map&, const Tap<T>& tap) {
    const i64 shift = sums.first[place(tap.source)] - image * rows_of(a, tap.source);
    for (i64 c = 0; c < channels;) {
      const i64 group = (begin + c) / per_group;
      const i64 count = std::min(channels - c, (group + 1) * per_group - begin - c);
      const T weight =
          normalizer_of<T>(a, query, static_cast<i32>(group))(T(load(weights[tap.weight + group])));
      for (int k = 0; k < 4; ++k) {
        if (tap.pixels[k] < 0) continue;
        T* to = &sums.values[place((shift + tap.pixels[k]) * channels + c)];
        add_scaled(to, gradient + c, weight * tap.share(k), count);
      }
      c += count;
    }
  });
}

template <class Scalar, class Weight>
void sum_block(const Args& a, i64 image, i64 begin) {
  using T = Acc<Scalar>;
  const i64 channels = std::min(kChannelBlock, a.channels - begin);
  MapSums<T> sums;
  sums.first[0] = 0;
  for (i32 source = 0; source < sources_of(a); ++source)
    sums.first[place(source + 1)] = sums.first[place(source)] + rows_of(a, source);
  sums.values.assign(place(sums.first[place(sources_of(a))] * channels), T(0));
  for (i64 query = image * a.queries; query < (image + 1) * a.queries; ++query)
    add_query<Scalar, Weight>(a, query, begin, channels, sums);
  for (i32 source = 0; source < sources_of(a); ++source) {
    const i64 rows = rows_of(a, source);
    Scalar* to = static_cast<Scalar*>(a.gradients[source]) + image * rows * a.channels + begin;
    const T* from = sums.values.data() + sums.first[place(source)] * channels;
    for (i64 row = 0; row < rows; ++row) {
      for (i64 c = 0; c < channels; ++c) store(to[row * a.channels + c], from[row * channels + c]);
    }
  }
}

// Calls f.operator()<Scalar, Weight>().
template <class F>
void with_types(const AggregationPlan& p, const F& f) {
  with_float(p.maps.front().scalar_type(), [&]<class Scalar>() {
    if (p.weights.scalar_type() == p.maps.front().scalar_type()) {
      f.template operator()<Scalar, Scalar>();
    } else {
      f.template operator()<Scalar, Acc<Scalar>>();
    }
  });
}

}  // namespace

void run_aggregation_cpu(const AggregationPlan& p) {
  const Args& a = p.args;
  check_indices(a);
  with_types(p, [&]<class Scalar, class Weight>() {
    parallel_for(a.batch * a.queries, cost_of(a), [&](std::int64_t begin, std::int64_t end) {
      aggregate_queries<Scalar, Weight>(a, begin, end);
    });
  });
}

void run_aggregation_backward_cpu(AggregationGradient& g) {
  const Args& a = g.plan.args;
  check_indices(a);
  with_types(g.plan, [&]<class Scalar, class Weight>() {
    parallel_for(a.batch * a.queries, 2 * cost_of(a), [&](std::int64_t begin, std::int64_t end) {
      PointGradients<Scalar, Weight> gradients(a);
      for (i64 query = begin; query < end; ++query) gradients.run(query);
    });
    if (g.gradients.empty()) return;
    const std::int64_t blocks = (a.channels + kChannelBlock - 1) / kChannelBlock;
    parallel_for(a.batch * blocks, a.queries * cost_of(a) / blocks,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t at = begin; at < end; ++at)
                     sum_block<Scalar, Weight>(a, at / blocks, at % blocks * kChannelBlock);
                 });
  });
}

}  // namespace torchkiln::bindings
