// points_in_polygons: schema, checks and shapes, CPU loops, launch.
// SPDX-License-Identifier: Apache-2.0
#include "detection/points_in_polygons.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using points_in_polygons::Args;
using points_in_polygons::kCorners;
using points_in_polygons::Point;
using points_in_polygons::Polygon;

constexpr const char* kOp = "points_in_polygons";
constexpr std::int64_t kPairNanoseconds = 4;
// As many as fill every multiprocessor twice: the second half balances the first.
constexpr std::int64_t kThreadsPerMultiprocessor = 4096;
constexpr std::int64_t kVector = 4;

struct Statics {
  std::int64_t scalar, peer, vector;
};
struct Sizes {
  std::int64_t n, m;
};
struct Tunables {
  std::int64_t block_size;
};

using Forward = Kernel<Args, Statics, Sizes, Tunables>;

// At least one thread for each vector of a row, at most one for each vector.
Geometry over_pairs(const Forward::Problem& p, const Tunables& t) {
  const std::int64_t vectors = p.sizes.m / p.statics.vector;
  const std::int64_t wanted = p.device.multiprocessors * kThreadsPerMultiprocessor;
  const std::int64_t rows = std::clamp<std::int64_t>(ceil_div(wanted, vectors), 1, p.sizes.n);
  return linear(ceil_div(rows * vectors, t.block_size), t.block_size);
}

const Forward forward_kernel({
    .path = "detection/points_in_polygons.cuh",
    .entry = "forward",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes), ints("peer", {0, 1}), ints("vector", {1, kVector})},
    .sizes = {{"n", TORCHKILN_BUCKET_NONE}, {"m", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}},
    // Its divisions take long to compile, and a number for each thread is a whole line for a warp.
    .valid = [](const Statics& s) { return s.peer == 0 || s.vector == 1; },
    .geometry = &over_pairs,
});

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor points, polygons, out;
  Args args;
};

Plan plan(const Tensor& points, const Tensor& polygons, bool as_mmcv) {
  check_rows(kOp, "points", points, 2);
  check_rows(kOp, "polygons", polygons, 2 * kCorners);
  check_same_dtype(kOp, "polygons", polygons, "points", points);
  check_same_device(kOp, "polygons", polygons, "points", points);
  const std::int64_t n = points.size(0), m = polygons.size(0);
  Plan p{.points = as_contiguous(points),
         .polygons = as_contiguous(polygons),
         .out = empty(points, as_mmcv ? ScalarType::Float : ScalarType::Bool, {n, m}),
         .args = {}};
  p.args = {.points = p.points.const_data_ptr(),
            .polygons = p.polygons.const_data_ptr(),
            .out = p.out.mutable_data_ptr(),
            .n = n,
            .m = m};
  return p;
}

// Polygons with each coordinate in a row of its own, so that a loop over them is a vector loop.
template <class T>
struct Columns {
  std::size_t count;
  std::vector<T> x, y;  // those of all first corners, then those of all second ones, and so on

  template <class Scalar>
  Columns(const Scalar* polygons, std::int64_t m)
      : count(static_cast<std::size_t>(m)), x(kCorners * count), y(kCorners * count) {
    for (std::size_t j = 0; j < count; ++j) {
      const Polygon<T> polygon = points_in_polygons::load_polygon(polygons, static_cast<i64>(j));
      for (std::size_t i = 0; i < kCorners; ++i) {
        x[i * count + j] = polygon.x[i];
        y[i * count + j] = polygon.y[i];
      }
    }
  }
};

// `contains` for one point and all polygons, with `crosses` in numbers, which a compiler makes vectors of. Written out
// twice and without calls, because a function with other options is not inlined.
#define TORCHKILN_CONTAINS_ROW(T)                                                         \
  TORCHKILN_VECTORISED void contains_row(T px, T py, const T* __restrict__ x,             \
                                         const T* __restrict__ y, std::size_t count,      \
                                         std::uint8_t* __restrict__ out) {                \
    for (std::size_t j = 0; j < count; ++j) {                                             \
      T ax = px - x[(kCorners - 1) * count + j], ay = py - y[(kCorners - 1) * count + j]; \
      int above_a = ay >= 0 ? 1 : 0, inside = 0;                                          \
      for (std::size_t i = 0; i < kCorners; ++i) {                                        \
        const T bx = px - x[i * count + j], by = py - y[i * count + j];                   \
        const T one = ax * by, other = ay * bx;                                           \
        const int above_b = by >= 0 ? 1 : 0, more = one > other ? 1 : 0,                  \
                  less = one < other ? 1 : 0;                                             \
        inside ^= (above_a & (above_b ^ 1) & more) | (above_b & (above_a ^ 1) & less);    \
        ax = bx;                                                                          \
        ay = by;                                                                          \
        above_a = above_b;                                                                \
      }                                                                                   \
      out[j] = static_cast<std::uint8_t>(inside);                                         \
    }                                                                                     \
  }
TORCHKILN_CONTAINS_ROW(float)
TORCHKILN_CONTAINS_ROW(double)
#undef TORCHKILN_CONTAINS_ROW

template <class Scalar>
void rows(const Args& args, const Columns<Acc<Scalar>>& polygons, std::int64_t begin,
          std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const auto point = points_in_polygons::load_point(static_cast<const Scalar*>(args.points), i);
    contains_row(point.x, point.y, polygons.x.data(), polygons.y.data(), polygons.count,
                 static_cast<std::uint8_t*>(args.out) + i * args.m);
  }
}

template <class Scalar>
void rows_as_mmcv(const Args& args, std::int64_t begin, std::int64_t end) {
  const auto* polygons = static_cast<const Scalar*>(args.polygons);
  for (std::int64_t i = begin; i < end; ++i) {
    const auto point = points_in_polygons::load_point(static_cast<const Scalar*>(args.points), i);
    float* out = static_cast<float*>(args.out) + i * args.m;
    for (std::int64_t j = 0; j < args.m; ++j) {
      const auto polygon = points_in_polygons::load_polygon(polygons, j);
      out[j] = points_in_polygons::contains_as_mmcv(polygon, point) ? 1.0f : 0.0f;
    }
  }
}

Tensor cpu(const Tensor& points, const Tensor& polygons, bool as_mmcv) {
  const Plan p = plan(points, polygons, as_mmcv);
  with_float(points.scalar_type(), [&]<class Scalar>() {
    const Columns<Acc<Scalar>> columns(static_cast<const Scalar*>(p.args.polygons),
                                       as_mmcv ? 0 : p.args.m);
    parallel_for(p.args.n, p.args.m * kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      if (as_mmcv) return rows_as_mmcv<Scalar>(p.args, begin, end);
      rows<Scalar>(p.args, columns, begin, end);
    });
  });
  return p.out;
}

Tensor cuda(const Tensor& points, const Tensor& polygons, bool as_mmcv) {
  const Plan p = plan(points, polygons, as_mmcv);
  if (p.out.numel() == 0) return p.out;
  const std::int64_t vector = !as_mmcv && p.args.m % kVector == 0 ? kVector : 1;
  forward_kernel.run(
      CudaPlace(p.out), {kernel_type(points.scalar_type()), as_mmcv, vector}, {p.args.n, p.args.m},
      p.args,
      {reads(offsetof(Args, points), p.points), reads(offsetof(Args, polygons), p.polygons),
       writes(offsetof(Args, out), p.out)});
  return p.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def("points_in_polygons(Tensor points, Tensor polygons, bool as_mmcv=False) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) { m.impl(kOp, TORCH_BOX(&cpu)); }
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) { m.impl(kOp, TORCH_BOX(&cuda)); }

}  // namespace torchkiln::bindings
