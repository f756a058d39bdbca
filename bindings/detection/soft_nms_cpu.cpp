// soft_nms and soft_nms_padded on the CPU. Scores only fall, so a box that is still the best after all boxes selected
// before it have lowered it is the next one: only those that come into question are lowered at once. The others wait
// until many boxes have been selected, which then lower them chunk by chunk, in vector loops, on all threads.
// SPDX-License-Identifier: Apache-2.0
#if defined(__GNUC__) && !defined(__clang__)
// Without contraction every instruction set has the same scores. A comparison might raise a floating-point exception, and
// g++ keeps that, at the price of no vectors.
#pragma GCC optimize("O3", "fp-contract=off", "no-trapping-math")
#endif
#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/detection/soft_nms.h"
#include "bindings/support/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHKILN_CLONED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TORCHKILN_CLONED
#endif
#define TORCHKILN_INLINE [[gnu::always_inline]] inline

namespace torchkiln::bindings {
namespace {

using soft_nms::Args;

constexpr double kPairNanoseconds = 1.0;
// Boxes whose arrays stay in the first cache while others lower them; of these, boxes that exp() is tried for together.
constexpr std::size_t kChunk = 128, kLanes = 32;
// Selected boxes that have not lowered everything yet.
constexpr std::size_t kMostWaiting = 64;
constexpr std::int32_t kTaken = std::numeric_limits<std::int32_t>::max();

// A score as an integer: the better the higher, NaN lowest. Integers have maxima in vector loops, whatever they hold.
template <class T>
using Key = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
template <class T>
constexpr Key<T> kGone = std::numeric_limits<Key<T>>::min();

template <class T>
TORCHKILN_INLINE Key<T> key_of(T score) {
  const auto bits = std::bit_cast<Key<T>>(score + T(0));  // there are two zeros
  const Key<T> key = bits < 0 ? bits ^ std::numeric_limits<Key<T>>::max() : bits;
  return is_nan(score) ? kGone<T> + 1 : key;
}

template <class T>
struct Chunk {
  std::array<T, kChunk> x1, y1, x2, y2, area, score;
  // Of the score; and by how many of the boxes that wait it has been lowered. kGone and kTaken without a box that is left.
  std::array<Key<T>, kChunk> key;
  std::array<std::int32_t, kChunk> lowered;
  std::array<std::int64_t, kChunk> row;

  Box<T> box(std::size_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
};

template <class T>
struct Waiting {
  std::array<Box<T>, kMostWaiting> boxes;
  std::array<T, kMostWaiting> areas;
  std::size_t count = 0;
};

template <class T>
struct Rule {
  i64 method;
  T threshold, sigma, min_score;
};

// ---- what runs in vectors: inlined into a function for each instruction set ----

template <class T>
TORCHKILN_INLINE void lower_by_factor(Chunk<T>& c, const Box<T> box, T area, std::int32_t at,
                                      const Rule<T> rule) {
  const bool is_linear = rule.method == soft_nms::kLinear;
  for (std::size_t i = 0; i < kChunk; ++i) {
    const T inter = guarded_intersection(box, c.box(i)), total = (area + c.area[i]) - inter;
    const T iou = inter / total, factor = is_linear ? T(1) - iou : T(0);
    const bool acts = (c.lowered[i] <= at) & (total > T(0)) & (iou >= rule.threshold) &
                      !(c.score[i] < rule.min_score);
    c.score[i] = acts ? c.score[i] * factor : c.score[i];
  }
}

template <class T>
TORCHKILN_INLINE void lower_by_exp(Chunk<T>& c, const Box<T> box, T area, std::int32_t at,
                                   const Rule<T> rule) {
  for (std::size_t begin = 0; begin < kChunk; begin += kLanes) {
    T exponents[kLanes];
    std::int32_t acting = 0;
    for (std::size_t k = 0; k < kLanes; ++k) {
      const std::size_t i = begin + k;
      const T inter = guarded_intersection(box, c.box(i)), total = (area + c.area[i]) - inter;
      const T iou = inter / total, exponent = -(iou * iou) / rule.sigma;
      const bool acts =
          (c.lowered[i] <= at) & (total > T(0)) & (inter > T(0)) & !(c.score[i] < rule.min_score);
      exponents[k] = acts ? exponent : T(1);
      acting += acts;
    }
    if (acting == 0) continue;
    for (std::size_t k = 0; k < kLanes; ++k) {
      if (!(exponents[k] > T(0))) c.score[begin + k] *= exp_of(exponents[k]);
    }
  }
}

template <class T>
TORCHKILN_INLINE Key<T> best_key(const Chunk<T>& c) {
  Key<T> best = kGone<T>;
  for (std::size_t i = 0; i < kChunk; ++i) best = std::max(best, c.key[i]);
  return best;
}

// Lowers a chunk by all that wait, then by nothing: its keys are those of its scores. Returns how many boxes are left.
template <class T>
TORCHKILN_INLINE std::int32_t settle(Chunk<T>& c, const Waiting<T>& waiting, const Rule<T>& rule) {
  for (std::size_t p = 0; p < waiting.count; ++p) {
    const auto at = static_cast<std::int32_t>(p);
    if (rule.method == soft_nms::kGaussian) {
      lower_by_exp(c, waiting.boxes[p], waiting.areas[p], at, rule);
    } else {
      lower_by_factor(c, waiting.boxes[p], waiting.areas[p], at, rule);
    }
  }
  std::int32_t left = 0;
  for (std::size_t i = 0; i < kChunk; ++i) {
    const bool is_gone = (c.lowered[i] == kTaken) | (c.score[i] < rule.min_score);
    c.key[i] = is_gone ? kGone<T> : key_of(c.score[i]);
    c.lowered[i] = is_gone ? kTaken : 0;
    left += !is_gone;
  }
  return left;
}

TORCHKILN_CLONED Key<float> best_of(const Chunk<float>& c) { return best_key(c); }
TORCHKILN_CLONED Key<double> best_of(const Chunk<double>& c) { return best_key(c); }
TORCHKILN_CLONED std::int32_t settle_all(Chunk<float>& c, const Waiting<float>& waiting,
                                         const Rule<float>& rule) {
  return settle(c, waiting, rule);
}
TORCHKILN_CLONED std::int32_t settle_all(Chunk<double>& c, const Waiting<double>& waiting,
                                         const Rule<double>& rule) {
  return settle(c, waiting, rule);
}

// ---- selection ----

template <class T>
struct Found {
  T score;
  std::int64_t row;
};

// By descending score, NaN last, then by row.
template <class T>
bool comes_before(const Found<T>& a, const Found<T>& b) {
  if (is_nan(a.score) != is_nan(b.score)) return is_nan(b.score);
  return a.score != b.score && !is_nan(a.score) ? a.score > b.score : a.row < b.row;
}

// What is left of one class, in the order of its rows.
template <class T>
class Left {
 public:
  template <class Scalar>
  Left(const Args& args, std::span<const std::int64_t> rows, const Scalar*)
      : rule_{args.method, static_cast<T>(args.iou_threshold), static_cast<T>(args.sigma),
              static_cast<T>(args.min_score)},
        // A negative score would rise: nothing may wait then.
        most_waiting_(args.min_score >= 0 ? kMostWaiting : 1) {
    for (const std::int64_t row : rows) {
      const T score = load(static_cast<const Scalar*>(args.scores)[row]);
      if (score < rule_.min_score) continue;
      const Box<T> box =
          nms::participant<nms::Boxes<Scalar>>(soft_nms::load_box<Scalar>(args, row), score);
      add(box, guarded_area(box), score, row);
    }
    rank_all();
  }

  // Takes out the best.
  std::optional<Found<T>> take_best() {
    if (waiting_.count == most_waiting_) lower_all();
    while (!chunks_.empty()) {
      const auto at = static_cast<std::size_t>(std::ranges::max_element(bests_) - bests_.begin());
      if (bests_[at] == kGone<T>) break;
      Chunk<T>& c = chunks_[at];
      const auto i = static_cast<std::size_t>(std::ranges::find(c.key, bests_[at]) - c.key.begin());
      const bool is_ready = c.lowered[i] == static_cast<std::int32_t>(waiting_.count);
      is_ready ? take(c, i) : lower(c, i);
      bests_[at] = best_of(c);
      if (is_ready) return Found<T>{c.score[i], c.row[i]};
    }
    return std::nullopt;
  }

 private:
  void add(const Box<T>& box, T area, T score, std::int64_t row) {
    if (count_ % kChunk == 0) {
      chunks_.emplace_back();
      chunks_.back().lowered.fill(kTaken);
      chunks_.back().key.fill(kGone<T>);
    }
    Chunk<T>& c = chunks_.back();
    const std::size_t i = count_++ % kChunk;
    c.x1[i] = box.x1, c.y1[i] = box.y1, c.x2[i] = box.x2, c.y2[i] = box.y2;
    c.area[i] = area, c.score[i] = score, c.row[i] = row;
    c.key[i] = key_of(score), c.lowered[i] = 0;
  }

  void rank_all() {
    bests_.resize(chunks_.size());
    std::ranges::transform(chunks_, bests_.begin(), [](const Chunk<T>& c) { return best_of(c); });
  }

  void take(Chunk<T>& c, std::size_t i) {
    waiting_.boxes[waiting_.count] = c.box(i);
    waiting_.areas[waiting_.count++] = c.area[i];
    c.key[i] = kGone<T>;
    c.lowered[i] = kTaken;
  }

  // Lowers one box by those that wait.
  void lower(Chunk<T>& c, std::size_t i) {
    const Box<T> box = c.box(i);
    auto p = static_cast<std::size_t>(c.lowered[i]);
    for (; p < waiting_.count && !(c.score[i] < rule_.min_score); ++p) {
      const T inter = guarded_intersection(waiting_.boxes[p], box);
      const T total = (waiting_.areas[p] + c.area[i]) - inter;
      if (!soft_nms::is_lowered(rule_.method, inter, total, rule_.threshold)) continue;
      c.score[i] *= soft_nms::factor(rule_.method, inter, total, rule_.sigma);
    }
    const bool is_gone = c.score[i] < rule_.min_score;
    c.key[i] = is_gone ? kGone<T> : key_of(c.score[i]);
    c.lowered[i] = is_gone ? kTaken : static_cast<std::int32_t>(p);
  }

  // Lowers all boxes by those that wait.
  void lower_all() {
    std::vector<std::int32_t> left(chunks_.size());
    const double cost = kPairNanoseconds * static_cast<double>(kChunk * waiting_.count);
    parallel_for(static_cast<std::int64_t>(chunks_.size()), static_cast<std::int64_t>(cost),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end);
                        ++i) {
                     left[i] = settle_all(chunks_[i], waiting_, rule_);
                     bests_[i] = best_of(chunks_[i]);
                   }
                 });
    waiting_.count = 0;
    const auto all_left = std::accumulate(left.begin(), left.end(), std::size_t{0});
    if (all_left < count_ / 4 * 3) drop_gone();
  }

  void drop_gone() {
    const std::vector<Chunk<T>> old = std::exchange(chunks_, {});
    count_ = 0;
    for (const Chunk<T>& c : old) {
      for (std::size_t i = 0; i < kChunk; ++i) {
        if (c.key[i] != kGone<T>) add(c.box(i), c.area[i], c.score[i], c.row[i]);
      }
    }
    rank_all();
  }

  Rule<T> rule_;
  std::size_t most_waiting_, count_ = 0;
  std::vector<Chunk<T>> chunks_;
  std::vector<Key<T>> bests_;  // of each chunk
  Waiting<T> waiting_;
};

template <class Scalar>
std::vector<Found<Acc<Scalar>>> select(const Args& args, std::span<const std::int64_t> rows,
                                       std::int64_t most) {
  std::vector<Found<Acc<Scalar>>> found;
  Left<Acc<Scalar>> left(args, rows, static_cast<const Scalar*>(nullptr));
  while (static_cast<std::int64_t>(found.size()) < most) {
    const auto best = left.take_best();
    if (!best) break;
    found.push_back(*best);
  }
  return found;
}

template <class Scalar>
std::vector<Found<Acc<Scalar>>> select_all(const SoftPlan& p, std::int64_t most) {
  using T = Acc<Scalar>;
  std::vector<std::int64_t> rows(static_cast<std::size_t>(p.args.n));
  std::iota(rows.begin(), rows.end(), std::int64_t{0});
  if (p.nms.args.idxs == nullptr) return select<Scalar>(p.args, rows, most);
  const auto classes = split(p.nms.args, rows);
  std::vector<std::vector<Found<T>>> parts(classes.size());
  const auto n_classes = static_cast<std::int64_t>(classes.size());
  const double size =
      static_cast<double>(p.args.n) / static_cast<double>(std::max<std::int64_t>(1, n_classes));
  parallel_for(n_classes, static_cast<std::int64_t>(kPairNanoseconds * size * size),
               [&](std::int64_t begin, std::int64_t end) {
                 for (auto c = static_cast<std::size_t>(begin); c < static_cast<std::size_t>(end);
                      ++c)
                   parts[c] = select<Scalar>(p.args, classes[c], most);
               });
  std::vector<Found<T>> found;
  for (const auto& part : parts) found.insert(found.end(), part.begin(), part.end());
  std::sort(found.begin(), found.end(), comes_before<T>);
  if (static_cast<std::int64_t>(found.size()) > most) found.resize(static_cast<std::size_t>(most));
  return found;
}

// Selects at most `most` boxes into tensors of `size` elements; of as many as there are when it is -1.
std::tuple<Tensor, Tensor, std::int64_t> run(const SoftPlan& p, std::int64_t most,
                                             std::int64_t size) {
  return with_float(p.nms.boxes.scalar_type(), [&]<class Scalar>() {
    const auto found = select_all<Scalar>(p, most);
    const auto count = static_cast<std::int64_t>(found.size());
    if (size < 0) size = count;
    Tensor indices = empty(p.nms.boxes, ScalarType::Long, {size});
    Tensor scores = empty(p.nms.boxes, p.nms.boxes.scalar_type(), {size});
    auto* rows = mutable_data<std::int64_t>(indices);
    auto* values = mutable_data<Scalar>(scores);
    for (std::int64_t i = 0; i < size; ++i) {
      const auto at = static_cast<std::size_t>(i);
      rows[i] = i < count ? found[at].row : -1;
      store(values[i], i < count ? found[at].score : Acc<Scalar>(0));
    }
    return std::tuple{indices, scores, count};
  });
}

std::tuple<Tensor, Tensor> soft_nms_cpu(const Tensor& boxes, const Tensor& scores,
                                        double iou_threshold, double sigma, double min_score,
                                        std::int64_t method, const std::optional<Tensor>& idxs,
                                        double offset) {
  const SoftPlan p = plan_soft_nms("soft_nms", boxes, scores,
                                   {iou_threshold, sigma, min_score, method, offset}, idxs);
  const auto [indices, out, count] = run(p, p.args.n, -1);
  return {indices, out};
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_padded_cpu(const Tensor& boxes, const Tensor& scores,
                                                       std::int64_t max_output,
                                                       double iou_threshold, double sigma,
                                                       double min_score, std::int64_t method,
                                                       const std::optional<Tensor>& idxs,
                                                       double offset) {
  constexpr const char* kOp = "soft_nms_padded";
  const SoftPlan p =
      plan_soft_nms(kOp, boxes, scores, {iou_threshold, sigma, min_score, method, offset}, idxs);
  check_padded_output(kOp, max_output);
  const auto [indices, out, kept] = run(p, max_output, max_output);
  Tensor count = empty(boxes, ScalarType::Long, {});
  *mutable_data<std::int64_t>(count) = kept;
  return {indices, out, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms_cpu));
  m.impl("soft_nms_padded", TORCH_BOX(&soft_nms_padded_cpu));
}

}  // namespace torchkiln::bindings
