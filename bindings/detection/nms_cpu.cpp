// nms and its relatives on the CPU. Boxes are walked by descending score; each is tested against the boxes kept so far
// (those given by two corners lie as separate coordinate arrays), so a suppressed box stops at its first suppressor and
// never meets another suppressed one. Classes are independent of each other and run in parallel; inside a class, the tests of
// a panel of boxes against the boxes kept before it do.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "bindings/detection/nms.h"
#include "bindings/support/parallel.h"
#include "bindings/support/widen.h"
#include "detection/nms_shapes.h"

// One body per instruction set, chosen at load. Without contraction, so that every set keeps the same boxes.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHKILN_UNCONTRACTED \
  __attribute__((optimize("O3", "fp-contract=off"), target_clones("avx512f", "avx2", "default")))
#else
#define TORCHKILN_UNCONTRACTED
#endif

namespace torchkiln::bindings {
namespace {

constexpr std::int64_t kLane = 32;  // kept boxes tested between two looks at the result

// What a panel of boxes and a test cost.
template <class Kind>
constexpr std::int64_t kPanel = Kind::kIsCheap ? 512 : 64;
template <class Kind>
constexpr double kPairNanoseconds = Kind::kIsCheap ? 0.4 : 8;

// Kept boxes by coordinate, padded to whole lanes with boxes that overlap nothing (their area is NaN).
template <class T>
struct KeptBoxes {
  std::vector<T> x1, y1, x2, y2, area;
  std::int64_t n = 0;

  void add(const Box<T>& box, T box_area) {
    if (n % kLane == 0) {
      for (std::vector<T>* column : {&x1, &y1, &x2, &y2})
        column->resize(static_cast<std::size_t>(n + kLane), T(0));
      area.resize(static_cast<std::size_t>(n + kLane), static_cast<T>(__builtin_nan("")));
    }
    const auto at = static_cast<std::size_t>(n++);
    x1[at] = box.x1, y1[at] = box.y1, x2[at] = box.x2, y2[at] = box.y2, area[at] = box_area;
  }
};

// Sets `hit` where one of 32 boxes meets a condition on `inter` and `united`. The maths is that of geometry/overlap.h,
// written out because a call of a function with other options is not inlined.
#define TORCHKILN_TEST_LANE(T, condition)                                  \
  hit = 0;                                                                 \
  for (std::int64_t j = lane; j < lane + kLane; ++j) {                     \
    T width = (x2[j] < bx2 ? x2[j] : bx2) - (x1[j] > bx1 ? x1[j] : bx1);   \
    T height = (y2[j] < by2 ? y2[j] : by2) - (y1[j] > by1 ? y1[j] : by1);  \
    width = width > T(0) ? width : T(0);                                   \
    height = height > T(0) ? height : T(0);                                \
    const T inter = width * height, united = (area[j] + box_area) - inter; \
    hit |= (condition) ? 1 : 0;                                            \
  }

// Does any of the boxes [begin, end) overlap the box too much? Both are multiples of kLane. A division takes longer than
// all the rest: a product with a little less than the threshold finds the lanes in question.
#define TORCHKILN_ANY_EXCEEDS(T)                                                               \
  TORCHKILN_UNCONTRACTED bool any_exceeds(const T* x1, const T* y1, const T* x2, const T* y2,  \
                                          const T* area, std::int64_t begin, std::int64_t end, \
                                          const Box<T>& box, T box_area, T threshold) {        \
    const T low = threshold > T(0) ? threshold * T(1 - 1e-6) : threshold;                      \
    const T bx1 = box.x1, by1 = box.y1, bx2 = box.x2, by2 = box.y2;                            \
    int hit = 0;                                                                               \
    for (std::int64_t lane = begin; lane < end; lane += kLane) {                               \
      TORCHKILN_TEST_LANE(T, inter > low * united)                                             \
      if (hit == 0) continue;                                                                  \
      TORCHKILN_TEST_LANE(T, inter / united > threshold)                                       \
      if (hit != 0) return true;                                                               \
    }                                                                                          \
    return false;                                                                              \
  }
TORCHKILN_ANY_EXCEEDS(float)
TORCHKILN_ANY_EXCEEDS(double)
#undef TORCHKILN_ANY_EXCEEDS
#undef TORCHKILN_TEST_LANE

template <class T>
bool any_exceeds(const KeptBoxes<T>& kept, std::int64_t begin, std::int64_t end, const Box<T>& box,
                 T area, T threshold) {
  end = (end + kLane - 1) / kLane * kLane;
  return any_exceeds(kept.x1.data(), kept.y1.data(), kept.x2.data(), kept.y2.data(),
                     kept.area.data(), begin / kLane * kLane, end, box, area, threshold);
}

// Kept boxes of any other kind.
template <class Kind>
struct KeptShapes {
  using T = typename Kind::T;
  using Shape = typename Kind::Shape;
  std::vector<Shape> shapes;
  std::vector<T> areas;
  std::int64_t n = 0;

  void add(const Shape& shape, T area) {
    shapes.push_back(shape), areas.push_back(area);
    ++n;
  }
  // The first of [begin, end) that exceeds, or `end`.
  std::int64_t first(std::int64_t begin, std::int64_t end, const Shape& shape, T area,
                     T threshold) const {
    for (; begin < end; ++begin) {
      const auto at = static_cast<std::size_t>(begin);
      if (Kind::exceeds(shapes[at], areas[at], shape, area, threshold)) break;
    }
    return begin;
  }
};

template <class Kind>
bool any_exceeds(const KeptShapes<Kind>& kept, std::int64_t begin, std::int64_t end,
                 const typename Kind::Shape& shape, typename Kind::T area,
                 typename Kind::T threshold) {
  return kept.first(begin, end, shape, area, threshold) < end;
}

template <class Kind>
using Kept = std::conditional_t<std::is_same_v<Kind, nms::Boxes<typename Kind::Scalar>> ||
                                    std::is_same_v<Kind, nms::NormalBoxes<typename Kind::Scalar>>,
                                KeptBoxes<typename Kind::T>, KeptShapes<Kind>>;

template <class Kind>
typename Kind::Shape load_part(const nms::Args& args, std::int64_t row) {
  const auto* scores = static_cast<const typename Kind::Scalar*>(args.scores);
  return nms::participant<Kind>(Kind::load(args, row), load(scores[row]));
}

// Marks in `keep` (by row) the boxes of one class; `rows` are its rows by descending score.
template <class Kind>
void suppress(const nms::Args& args, std::span<const std::int64_t> rows,
              std::vector<std::uint8_t>& keep) {
  const auto threshold = static_cast<typename Kind::T>(args.iou_threshold);
  const auto n = static_cast<std::int64_t>(rows.size());
  Kept<Kind> kept;
  const std::int64_t most = std::min(n, kPanel<Kind>);
  std::vector<typename Kind::Shape> shapes(static_cast<std::size_t>(most));
  std::vector<std::uint8_t> dead(static_cast<std::size_t>(most));
  for (std::int64_t begin = 0; begin < n; begin += kPanel<Kind>) {
    const std::int64_t size = std::min(kPanel<Kind>, n - begin), before = kept.n;
    const double cost = kPairNanoseconds<Kind> * static_cast<double>(before);
    parallel_for(size, static_cast<std::int64_t>(cost), [&](std::int64_t from, std::int64_t to) {
      for (auto i = static_cast<std::size_t>(from); i < static_cast<std::size_t>(to); ++i) {
        shapes[i] = load_part<Kind>(args, rows[static_cast<std::size_t>(begin) + i]);
        dead[i] = any_exceeds(kept, 0, before, shapes[i], Kind::area(shapes[i]), threshold);
      }
    });
    for (std::size_t i = 0; i < static_cast<std::size_t>(size); ++i) {
      if (dead[i] != 0) continue;
      const auto area = Kind::area(shapes[i]);
      if (any_exceeds(kept, before, kept.n, shapes[i], area, threshold)) continue;
      kept.add(shapes[i], area);
      keep[static_cast<std::size_t>(rows[static_cast<std::size_t>(begin) + i])] = 1;
    }
  }
}

// The rows by descending score, the lower row first among equals, NaN last.
template <class Scalar>
std::vector<std::int64_t> by_score(const nms::Args& args) {
  const auto* scores = static_cast<const Scalar*>(args.scores);
  std::vector<std::int64_t> rows(static_cast<std::size_t>(args.n));
  std::iota(rows.begin(), rows.end(), std::int64_t{0});
  std::stable_sort(rows.begin(), rows.end(), [&](std::int64_t a, std::int64_t b) {
    const auto left = load(scores[a]), right = load(scores[b]);
    return is_nan(right) ? !is_nan(left) : left > right;
  });
  return rows;
}

std::int64_t class_of(const nms::Args& args, std::int64_t row) {
  switch (args.idx_bytes) {
    case 1:
      return static_cast<const std::int8_t*>(args.idxs)[row];
    case 2:
      return static_cast<const std::int16_t*>(args.idxs)[row];
    case 4:
      return static_cast<const std::int32_t*>(args.idxs)[row];
    default:
      return static_cast<const std::int64_t*>(args.idxs)[row];
  }
}

// The kept rows by descending score.
template <class Kind>
std::vector<std::int64_t> kept_rows(const nms::Args& args) {
  using Scalar = typename Kind::Scalar;
  std::vector<std::int64_t> rows = by_score<Scalar>(args);
  std::erase_if(rows, [&](std::int64_t row) { return nms::left_out<Scalar>(args, row); });
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(args.n));
  if (args.idxs == nullptr) {
    suppress<Kind>(args, rows, keep);
  } else {
    std::vector<std::int64_t> grouped = rows;
    const auto classes = split(args, grouped);
    const auto n_classes = static_cast<std::int64_t>(classes.size());
    const std::int64_t size = args.n / std::max<std::int64_t>(1, n_classes);
    parallel_for(n_classes, 20 * size, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c)
        suppress<Kind>(args, classes[static_cast<std::size_t>(c)], keep);
    });
  }
  std::erase_if(rows, [&](std::int64_t row) { return keep[static_cast<std::size_t>(row)] == 0; });
  return rows;
}

// Calls f.operator()<T>(args) with boxes and scores of the type that they are computed in.
template <class F>
void with_numbers(const NmsPlan& p, const F& f) {
  with_wide(p.boxes.scalar_type(), [&]<class T>() {
    const Wide<T> boxes(p.boxes), scores(p.scores);
    nms::Args args = p.args;
    args.boxes = boxes.get();
    args.scores = scores.get();
    f.template operator()<T>(args);
  });
}

template <class T>
std::vector<std::int64_t> kept_rows(std::int64_t kind, const nms::Args& args) {
  switch (kind) {
    case nms::kRotated:
      return kept_rows<nms::RotatedBoxes<T>>(args);
    case nms::kQuads:
      return kept_rows<nms::Quads<T>>(args);
    case nms::kNormal:
      return kept_rows<nms::NormalBoxes<T>>(args);
    case nms::kLanes:
      return kept_rows<nms::Lanes<T>>(args);
    case nms::kPeerRotated:
      return kept_rows<nms::ShapeKind<T, nms::kPeerRotated>>(args);
    case nms::kPeerQuads:
      return kept_rows<nms::ShapeKind<T, nms::kPeerQuads>>(args);
    default:
      return kept_rows<nms::Boxes<T>>(args);
  }
}

template <class Kind>
void group(const nms::Args& args, const Groups& out) {
  const auto threshold = static_cast<typename Kind::T>(args.iou_threshold);
  KeptShapes<Kind> kept;
  auto* rows = mutable_data<std::int64_t>(out.rows);
  auto* groups = mutable_data<std::int64_t>(out.groups);
  for (const std::int64_t row : by_score<typename Kind::Scalar>(args)) {
    const auto shape = load_part<Kind>(args, row);
    const auto area = Kind::area(shape);
    const std::int64_t number = kept.first(0, kept.n, shape, area, threshold);
    if (number == kept.n) kept.add(shape, area);
    *rows++ = row;
    *groups++ = number;
  }
  *mutable_data<std::int64_t>(out.count) = kept.n;
}

std::vector<std::int64_t> kept_rows(const NmsPlan& p) {
  std::vector<std::int64_t> rows;
  with_numbers(p, [&]<class T>(const nms::Args& args) { rows = kept_rows<T>(p.kind, args); });
  return rows;
}

}  // namespace

std::vector<std::span<const std::int64_t>> split(const nms::Args& args,
                                                 std::vector<std::int64_t>& rows) {
  std::stable_sort(rows.begin(), rows.end(), [&](std::int64_t a, std::int64_t b) {
    return class_of(args, a) < class_of(args, b);
  });
  std::vector<std::span<const std::int64_t>> ranges;
  for (std::size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    while (end < rows.size() && class_of(args, rows[end]) == class_of(args, rows[begin])) ++end;
    ranges.emplace_back(rows.data() + begin, end - begin);
  }
  return ranges;
}

Tensor sized_cpu(const NmsPlan& p, std::int64_t max_output) {
  const std::vector<std::int64_t> rows = kept_rows(p);
  const std::int64_t kept = std::min(max_output, static_cast<std::int64_t>(rows.size()));
  Tensor indices = empty(p.boxes, ScalarType::Long, {kept});
  std::copy_n(rows.begin(), kept, mutable_data<std::int64_t>(indices));
  return indices;
}

Padded padded_cpu(const NmsPlan& p, std::int64_t max_output) {
  const std::vector<std::int64_t> rows = kept_rows(p);
  const std::int64_t kept = std::min(max_output, static_cast<std::int64_t>(rows.size()));
  const Padded out{.indices = empty(p.boxes, ScalarType::Long, {max_output}),
                   .count = empty(p.boxes, ScalarType::Long, {})};
  auto* indices = mutable_data<std::int64_t>(out.indices);
  std::copy_n(rows.begin(), kept, indices);
  std::fill(indices + kept, indices + max_output, std::int64_t{-1});
  *mutable_data<std::int64_t>(out.count) = kept;
  return out;
}

Groups groups_cpu(const NmsPlan& p) {
  const Groups out{.rows = empty(p.boxes, ScalarType::Long, {p.args.n}),
                   .groups = empty(p.boxes, ScalarType::Long, {p.args.n}),
                   .count = empty(p.boxes, ScalarType::Long, {})};
  with_numbers(p, [&]<class T>(const nms::Args& args) {
    if (p.kind == nms::kLanes) {
      group<nms::Lanes<T>>(args, out);
    } else {
      group<nms::InclusiveBoxes<T>>(args, out);
    }
  });
  return out;
}

}  // namespace torchkiln::bindings
