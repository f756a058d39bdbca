// soft_nms and soft_nms_padded on the CPU. What is left of a class lies as separate arrays in the order of its rows; a
// step lowers all scores by the box selected last, then drops the low ones and finds the best in one walk. Classes are
// independent of each other and run in parallel.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <numeric>
#include <span>
#include <tuple>
#include <vector>

#include "bindings/detection/soft_nms.h"
#include "bindings/support/parallel.h"

// Without contraction, so that every instruction set has the same scores.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHKILN_UNCONTRACTED                                          \
  __attribute__((optimize("O3", "fp-contract=off", "no-trapping-math"), \
                 target_clones("avx512f", "avx2", "default")))
#else
#define TORCHKILN_UNCONTRACTED
#endif

namespace torchkiln::bindings {
namespace {

using soft_nms::Args;

constexpr double kPairNanoseconds = 1.0;

// Intersections and unions of one box with many. The maths is guarded_intersection() of geometry/overlap.h, written out
// because a call of a function with other options is not inlined.
#define TORCHKILN_MEET(T)                                                                        \
  TORCHKILN_UNCONTRACTED void meet(const T* x1, const T* y1, const T* x2, const T* y2,           \
                                   const T* area, std::int64_t n, const Box<T>& box, T box_area, \
                                   T* inter, T* total) {                                         \
    const T bx1 = box.x1, by1 = box.y1, bx2 = box.x2, by2 = box.y2;                              \
    for (std::int64_t j = 0; j < n; ++j) {                                                       \
      T width = (bx2 < x2[j] ? bx2 : x2[j]) - (bx1 > x1[j] ? bx1 : x1[j]);                       \
      T height = (by2 < y2[j] ? by2 : y2[j]) - (by1 > y1[j] ? by1 : y1[j]);                      \
      width = width > T(0) ? width : T(0);                                                       \
      height = height > T(0) ? height : T(0);                                                    \
      inter[j] = width * height;                                                                 \
      total[j] = (box_area + area[j]) - inter[j];                                                \
    }                                                                                            \
  }
TORCHKILN_MEET(float)
TORCHKILN_MEET(double)
#undef TORCHKILN_MEET

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

// What is left of one class.
template <class T>
class Left {
 public:
  template <class Scalar>
  Left(const Args& args, std::span<const std::int64_t> rows, const Scalar*)
      : inter_(rows.size()), total_(rows.size()) {
    rows_.reserve(rows.size());
    for (auto* column : {&x1_, &y1_, &x2_, &y2_, &area_, &score_}) column->reserve(rows.size());
    for (const std::int64_t row : rows) {
      const T score = load(static_cast<const Scalar*>(args.scores)[row]);
      if (score < static_cast<T>(args.min_score)) continue;
      const Box<T> box = nms::participant<nms::Boxes<Scalar>>(
          load_box(static_cast<const Scalar*>(args.boxes), row), score);
      x1_.push_back(box.x1), y1_.push_back(box.y1), x2_.push_back(box.x2), y2_.push_back(box.y2);
      area_.push_back(guarded_area(box)), score_.push_back(score), rows_.push_back(row);
    }
  }

  std::size_t size() const { return rows_.size(); }

  // Takes out the best.
  Found<T> take_best() {
    const std::size_t n = size();
    std::size_t best = 0;
    for (std::size_t i = 1; i < n; ++i) {
      if (score_[i] > score_[best] || (is_nan(score_[best]) && !is_nan(score_[i]))) best = i;
    }
    const Found<T> found{score_[best], rows_[best]};
    taken_ = {x1_[best], y1_[best], x2_[best], y2_[best]};
    taken_area_ = area_[best];
    rows_[best] = -1;
    return found;
  }

  // Lowers the scores of the others by the box taken last, drops it and those that fall too low.
  void lower(const Args& args) {
    const T threshold = static_cast<T>(args.iou_threshold), sigma = static_cast<T>(args.sigma);
    const T min_score = static_cast<T>(args.min_score);
    const std::size_t n = size();
    meet(x1_.data(), y1_.data(), x2_.data(), y2_.data(), area_.data(), static_cast<std::int64_t>(n),
         taken_, taken_area_, inter_.data(), total_.data());
    std::size_t kept = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (rows_[i] < 0) continue;
      const bool is_lowered = soft_nms::is_lowered(args.method, inter_[i], total_[i], threshold);
      const T score = !is_lowered
                          ? score_[i]
                          : score_[i] * soft_nms::factor(args.method, inter_[i], total_[i], sigma);
      if (score < min_score) continue;
      rows_[kept] = rows_[i], score_[kept] = score, area_[kept] = area_[i];
      x1_[kept] = x1_[i], y1_[kept] = y1_[i], x2_[kept] = x2_[i], y2_[kept] = y2_[i];
      ++kept;
    }
    rows_.resize(kept);
  }

 private:
  std::vector<std::int64_t> rows_;
  std::vector<T> x1_, y1_, x2_, y2_, area_, score_, inter_, total_;
  Box<T> taken_{};
  T taken_area_{};
};

template <class Scalar>
std::vector<Found<Acc<Scalar>>> select(const Args& args, std::span<const std::int64_t> rows,
                                       std::int64_t most) {
  std::vector<Found<Acc<Scalar>>> found;
  Left<Acc<Scalar>> left(args, rows, static_cast<const Scalar*>(nullptr));
  while (left.size() > 0 && static_cast<std::int64_t>(found.size()) < most) {
    found.push_back(left.take_best());
    left.lower(args);
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
                                        std::int64_t method, const std::optional<Tensor>& idxs) {
  const SoftPlan p =
      plan_soft_nms("soft_nms", boxes, scores, {iou_threshold, sigma, min_score, method}, idxs);
  const auto [indices, out, count] = run(p, p.args.n, -1);
  return {indices, out};
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_padded_cpu(const Tensor& boxes, const Tensor& scores,
                                                       std::int64_t max_output,
                                                       double iou_threshold, double sigma,
                                                       double min_score, std::int64_t method,
                                                       const std::optional<Tensor>& idxs) {
  constexpr const char* kOp = "soft_nms_padded";
  const SoftPlan p =
      plan_soft_nms(kOp, boxes, scores, {iou_threshold, sigma, min_score, method}, idxs);
  check_max_output(kOp, max_output);
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
