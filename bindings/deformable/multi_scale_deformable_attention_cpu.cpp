// Multi-scale deformable attention on the CPU. Forward, and gradients of places and weights: threads over queries. The
// value's gradient: threads over levels of heads of images, each adds all samples in order into sums of its own: no
// atomics, the same result for any number of threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <vector>

#include "bindings/deformable/multi_scale_deformable_attention.h"
#include "bindings/support/parallel.h"

namespace torchkiln::bindings {
namespace {

using msda::Args;
using msda::Level;
using msda::Query;
using msda::Softmax;
using msda::Taps;
using msda::Weights;

std::size_t place_of(std::int64_t i) { return static_cast<std::size_t>(i); }

// ---- inner loops, over the channels of a head ----

template <class Scalar>
struct Four {
  const Scalar* at[4];
};

// sums[i] += share * (the blend of four pixels)
template <class Scalar, class T>
[[gnu::always_inline]] inline void blend_all(T* __restrict__ sums, Four<Scalar> from, Weights<T> w,
                                             T share, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const T sum = w.at[0] * load(from.at[0][i]) + w.at[1] * load(from.at[1][i]) +
                  w.at[2] * load(from.at[2][i]) + w.at[3] * load(from.at[3][i]);
    sums[i] += share * sum;
  }
}

// The products of a gradient with four pixels, in eight sums each, which is what vectorises.
template <class Scalar, class T>
[[gnu::always_inline]] inline Weights<T> multiply_all(const T* __restrict__ gradient,
                                                      Four<Scalar> from, std::int64_t n) {
  constexpr std::int64_t kSums = 8;
  Weights<T> result;
  for (std::size_t corner = 0; corner < 4; ++corner) {
    const Scalar* values = from.at[corner];
    T sums[kSums] = {};
    std::int64_t i = 0;
    for (; i + kSums <= n; i += kSums) {
      for (std::int64_t j = 0; j < kSums; ++j) sums[j] += gradient[i + j] * load(values[i + j]);
    }
    T sum = T(0);
    for (; i < n; ++i) sum += gradient[i] * load(values[i]);
    for (const T part : sums) sum += part;
    result.at[corner] = sum;
  }
  return result;
}

// sums[i] += weight * gradient[i]
template <class Scalar, class T>
[[gnu::always_inline]] inline void add_all(T* __restrict__ sums,
                                           const Scalar* __restrict__ gradient, T weight,
                                           std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * load(gradient[i]);
}

#define TORCHKILN_MSDA_LOOPS(Scalar)                                                             \
  TORCHKILN_VECTORISED void blend(Acc<Scalar>* sums, const Four<Scalar>& from,                   \
                                  const Weights<Acc<Scalar>>& w, Acc<Scalar> share,              \
                                  std::int64_t n) {                                              \
    blend_all(sums, from, w, share, n);                                                          \
  }                                                                                              \
  TORCHKILN_VECTORISED Weights<Acc<Scalar>> multiply(const Acc<Scalar>* gradient,                \
                                                     const Four<Scalar>& from, std::int64_t n) { \
    return multiply_all(gradient, from, n);                                                      \
  }                                                                                              \
  TORCHKILN_VECTORISED void add(Acc<Scalar>* sums, const Scalar* gradient, Acc<Scalar> weight,   \
                                std::int64_t n) {                                                \
    add_all(sums, gradient, weight, n);                                                          \
  }
TORCHKILN_MSDA_LOOPS(float)
TORCHKILN_MSDA_LOOPS(double)
TORCHKILN_MSDA_LOOPS(half)
TORCHKILN_MSDA_LOOPS(bfloat16)
#undef TORCHKILN_MSDA_LOOPS

// ---- samples ----

template <class T, class Place>
Softmax<T> softmax_of(const Args& a, Query query) {
  if (a.references == nullptr) return {T(0), T(1)};
  const Place* logits = static_cast<const Place*>(a.weights) + query.first;
  T greatest = msda::kLowest<T>, sum = T(0);
  for (std::int64_t s = 0; s < a.l * a.p; ++s) greatest = max_of(T(load(logits[s])), greatest);
  for (std::int64_t s = 0; s < a.l * a.p; ++s) sum += exp_of(T(load(logits[s])) - greatest);
  return {greatest, T(1) / sum};
}

const u8* mask_of(const Args& a, std::int64_t image) {
  return a.mask == nullptr ? nullptr : a.mask + image * a.s;
}

template <class Scalar, class T>
Four<Scalar> pixels_of(const Args& a, std::int64_t image, std::int64_t head, const Taps<T>& taps) {
  Four<Scalar> result;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::int64_t pixel = image * a.s + taps.pixels.at[i];
    result.at[i] = static_cast<const Scalar*>(a.value) + (pixel * a.m + head) * a.d;
  }
  return result;
}

// f(taps, weight, sample, level) for all samples of a query, also those outside.
template <class T, class Place, class F>
void for_each_sample(const Args& a, const std::vector<Level>& levels, std::int64_t image,
                     Query query, const F& f) {
  const Softmax<T> softmax = softmax_of<T, Place>(a, query);
  for (i32 level = 0, sample = 0; level < a.l; ++level) {
    const Level size = levels[place_of(level)];
    for (std::int64_t point = 0; point < a.p; ++point, ++sample) {
      const auto at = msda::position_of<T, Place>(a, query, sample, level, size);
      f(msda::taps_at(at, size, mask_of(a, image)),
        msda::weight_of<T, Place>(a, query, sample, softmax), sample, level);
    }
  }
}

std::vector<Level> levels_of(const Args& a) {
  std::vector<Level> levels;
  for (std::int64_t l = 0; l < a.l; ++l)
    levels.push_back(msda::level_of(a.shapes, a.starts, a.s, l));
  return levels;
}

// Of one query and head.
std::int64_t cost_of(const Args& a) { return 20 + a.l * a.p * (15 + a.d); }

// ---- forward ----

template <class Scalar, class Place>
void attend(const Args& a, const std::vector<Level>& levels, std::int64_t row,
            std::vector<Acc<Scalar>>& sums) {
  using T = Acc<Scalar>;
  const std::int64_t image = row / a.q;
  for (std::int64_t head = 0; head < a.m; ++head) {
    std::ranges::fill(sums, T(0));
    for_each_sample<T, Place>(a, levels, image, msda::query_at(a, image, head, row - image * a.q),
                              [&](const Taps<T>& taps, T weight, i32, i32) {
                                if (taps.live == 0) return;
                                blend(sums.data(), pixels_of<Scalar>(a, image, head, taps),
                                      taps.weights, weight, a.d);
                              });
    Scalar* to = static_cast<Scalar*>(a.output) + (row * a.m + head) * a.d;
    for (std::int64_t i = 0; i < a.d; ++i) store(to[i], sums[place_of(i)]);
  }
}

// ---- gradients of places and weights ----

template <class T>
struct QueryScratch {
  std::vector<T> gradient, of_weights;
};

// shares: the weight of each sample of all queries, or null.
template <class Scalar, class Place>
void differentiate(const Args& a, const std::vector<Level>& levels, std::int64_t row,
                   QueryScratch<Acc<Scalar>>& scratch, Acc<Scalar>* shares) {
  using T = Acc<Scalar>;
  const std::int64_t image = row / a.q;
  scratch.gradient.resize(place_of(a.d));
  scratch.of_weights.resize(place_of(a.l * a.p));
  for (std::int64_t head = 0; head < a.m; ++head) {
    const Query query = msda::query_at(a, image, head, row - image * a.q);
    const Scalar* from = static_cast<const Scalar*>(a.output) + (row * a.m + head) * a.d;
    for (std::int64_t i = 0; i < a.d; ++i) scratch.gradient[place_of(i)] = load(from[i]);
    T total = T(0);
    for_each_sample<T, Place>(
        a, levels, image, query, [&](const Taps<T>& taps, T weight, i32 sample, i32 level) {
          Weights<T> products = {};
          if (taps.live != 0) {
            products =
                multiply(scratch.gradient.data(), pixels_of<Scalar>(a, image, head, taps), a.d);
          }
          const auto gradient = msda::gradient_of(
              msda::Blend<T>{taps.fraction_y, taps.fraction_x, taps.live}, products);
          msda::write_places<T, Place>(a, query, sample, level, levels[place_of(level)],
                                       {gradient.at.y * weight, gradient.at.x * weight});
          scratch.of_weights[place_of(sample)] = gradient.weight;
          total += weight * gradient.weight;
          if (shares != nullptr) shares[query.first + sample] = weight;
        });
    Place* to = static_cast<Place*>(a.grad_weights) + query.first;
    for (std::int64_t s = 0; s < a.l * a.p; ++s) {
      const T own = scratch.of_weights[place_of(s)];
      store(to[s], shares == nullptr ? own : shares[query.first + s] * (own - total));
    }
  }
}

// ---- gradient of the value ----

// Levels [first, last) of a head and image, and the pixels that are theirs alone.
struct ValueTask {
  std::int64_t first, last, begin, end;
};

// A task for each level; one for all where levels share pixels.
std::vector<ValueTask> value_tasks(const Args& a, const std::vector<Level>& levels) {
  std::vector<ValueTask> tasks;
  std::vector<std::array<std::int64_t, 2>> areas;
  for (std::int64_t l = 0; l < a.l; ++l) {
    const Level level = levels[place_of(l)];
    const std::int64_t begin = level.start, end = begin + std::int64_t{level.h} * level.w;
    if (begin == end) continue;
    tasks.push_back({l, l + 1, begin, end});
    areas.push_back({begin, end});
  }
  std::ranges::sort(areas);
  for (std::size_t i = 1; i < areas.size(); ++i) {
    if (areas[i][0] < areas[i - 1][1]) return {{0, a.l, 0, a.s}};
  }
  return tasks;
}

template <class Scalar, class Place>
void add_samples(const Args& a, const std::vector<Level>& levels, const ValueTask& task,
                 std::int64_t image, std::int64_t head, const Acc<Scalar>* shares,
                 std::vector<Acc<Scalar>>& sums) {
  using T = Acc<Scalar>;
  sums.assign(place_of((task.end - task.begin) * a.d), T(0));
  for (std::int64_t q = 0; q < a.q; ++q) {
    const Query query = msda::query_at(a, image, head, q);
    const Scalar* gradient =
        static_cast<const Scalar*>(a.output) + ((image * a.q + q) * a.m + head) * a.d;
    for (std::int64_t s = task.first * a.p; s < task.last * a.p; ++s) {
      const auto sample = static_cast<i32>(s), level = static_cast<i32>(s / a.p);
      const Level size = levels[place_of(level)];
      const Taps<T> taps = msda::taps_at(msda::position_of<T, Place>(a, query, sample, level, size),
                                         size, mask_of(a, image));
      const T share = shares != nullptr
                          ? shares[query.first + s]
                          : T(load(static_cast<const Place*>(a.weights)[query.first + s]));
      for (std::size_t i = 0; i < 4; ++i) {
        if ((taps.live >> i & 1u) == 0) continue;
        add(sums.data() + (taps.pixels.at[i] - task.begin) * a.d, gradient,
            taps.weights.at[i] * share, a.d);
      }
    }
  }
  for (std::int64_t pixel = task.begin; pixel < task.end; ++pixel) {
    Scalar* to = static_cast<Scalar*>(a.grad_value) + ((image * a.s + pixel) * a.m + head) * a.d;
    const T* from = sums.data() + (pixel - task.begin) * a.d;
    for (std::int64_t i = 0; i < a.d; ++i) store(to[i], from[i]);
  }
}

// ---- both ----

// Calls f.operator()<Scalar, Place>(): places have the value's dtype, or are float.
template <class F>
void with_types(const MsdaPlan& p, const F& f) {
  with_float(p.value.scalar_type(), [&]<class Scalar>() {
    if constexpr (sizeof(Scalar) == 2) {
      if (p.places.scalar_type() == ScalarType::Float)
        return f.template operator()<Scalar, float>();
    }
    f.template operator()<Scalar, Scalar>();
  });
}

template <class Scalar, class Place>
void differentiate_all(const Args& a, bool fused) {
  using T = Acc<Scalar>;
  const std::vector<Level> levels = levels_of(a);
  std::vector<T> shares(place_of(fused ? a.b * a.q * a.m * a.l * a.p : 0));
  T* kept = fused ? shares.data() : nullptr;
  parallel_for(a.b * a.q, 2 * a.m * cost_of(a), [&](std::int64_t begin, std::int64_t end) {
    QueryScratch<T> scratch;
    for (std::int64_t row = begin; row < end; ++row)
      differentiate<Scalar, Place>(a, levels, row, scratch, kept);
  });
  const std::vector<ValueTask> tasks = value_tasks(a, levels);
  const auto n = static_cast<std::int64_t>(tasks.size());
  if (n == 0) return;
  parallel_for(a.b * a.m * n, 2 * a.q * cost_of(a) / n, [&](std::int64_t begin, std::int64_t end) {
    std::vector<T> sums;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t of_head = i / n;
      add_samples<Scalar, Place>(a, levels, tasks[place_of(i % n)], of_head / a.m, of_head % a.m,
                                 kept, sums);
    }
  });
}

}  // namespace

void run_msda_cpu(const MsdaPlan& p) {
  const Args& a = p.args;
  const std::vector<Level> levels = levels_of(a);
  with_types(p, [&]<class Scalar, class Place>() {
    parallel_for(a.b * a.q, a.m * cost_of(a), [&](std::int64_t begin, std::int64_t end) {
      std::vector<Acc<Scalar>> sums(place_of(a.d));
      for (std::int64_t row = begin; row < end; ++row) attend<Scalar, Place>(a, levels, row, sums);
    });
  });
}

void run_msda_backward_cpu(const MsdaPlan& p, const MsdaGradients& g) {
  Args args = p.args;
  Tensor grad_value = g.value;
  // Pixels may be in no level.
  torch::stable::zero_(grad_value);
  args.grad_value = grad_value.mutable_data_ptr();
  args.grad_places = g.places.mutable_data_ptr();
  args.grad_weights = g.weights.mutable_data_ptr();
  with_types(p, [&]<class Scalar, class Place>() {
    differentiate_all<Scalar, Place>(args, p.has_references());
  });
}

}  // namespace torchkiln::bindings
