// convex_iou and convex_giou: schemas, checks and shapes, CPU loops, launches.
// SPDX-License-Identifier: Apache-2.0
#include "detection/convex_iou.h"

#include <algorithm>
#include <cstddef>
#include <tuple>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using convex_iou::Args;
using convex_iou::GiouArgs;
using convex_iou::kCorners;
using convex_iou::kRow;

constexpr std::int64_t kHullNanoseconds = 500, kPairNanoseconds = 50, kGiouNanoseconds = 3000;
constexpr std::int64_t kMaxGridY = 65'535;

// ---- kernels ----

struct Statics {
  std::int64_t scalar;
};
struct Sizes {
  std::int64_t n, m;
};
struct GiouSizes {
  std::int64_t n;
};
struct Tunables {
  std::int64_t rows, block_size;
};
struct BlockSize {
  std::int64_t block_size;
};

using Forward = Kernel<Args, Statics, Sizes, Tunables>;
using Giou = Kernel<GiouArgs, Statics, GiouSizes, BlockSize>;

const Forward forward_kernel({
    .path = "detection/convex_iou.cuh",
    .entry = "forward",
    .operators = {"convex_iou"},
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"n", TORCHKILN_BUCKET_NONE}, {"m", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("rows", {8, 16, 32, 64}), ints("block_size", {64, 128, 256})},
    .defaults = {{32, 128}, {32, 64}},
    .choose = [](const Forward::Problem& p) { return p.sizes.m <= 64 ? 1u : 0u; },
    .geometry =
        [](const Forward::Problem& p, const Tunables& t) {
          Geometry g = linear(ceil_div(p.sizes.n, t.rows), t.block_size);
          g.grid[1] = static_cast<std::uint32_t>(ceil_div(p.sizes.m, t.block_size));
          return g;
        },
});

const Giou giou_kernel({
    .path = "detection/convex_iou.cuh",
    .entry = "giou_forward",
    .operators = {"convex_giou"},
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{32}},
    .geometry =
        [](const Giou::Problem& p, const BlockSize& t) {
          return linear(ceil_div(p.sizes.n, t.block_size), t.block_size);
        },
});

// ---- checks and shapes ----

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor pointsets, polygons, out;
  Args args;
};
struct GiouPlan {
  Tensor pointsets, polygons, giou, gradient;
  GiouArgs args;
};

void check(const char* op, const Tensor& pointsets, const Tensor& polygons) {
  check_rows(op, "pointsets", pointsets, kRow);
  check_rows(op, "polygons", polygons, kCorners);
  check_same_dtype(op, "polygons", polygons, "pointsets", pointsets);
  check_same_device(op, "polygons", polygons, "pointsets", pointsets);
}

Plan plan(const Tensor& pointsets, const Tensor& polygons) {
  constexpr const char* kOp = "convex_iou";
  check(kOp, pointsets, polygons);
  if (polygons.size(0) > 64 * kMaxGridY) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "polygons",
         "have at most " + std::to_string(64 * kMaxGridY) + " rows",
         std::to_string(polygons.size(0)));
  }
  const ScalarType dtype = pointsets.scalar_type();
  Plan p{.pointsets = as_contiguous(pointsets),
         .polygons = as_contiguous(polygons),
         .out = empty(pointsets, dtype, {pointsets.size(0), polygons.size(0)}),
         .args = {}};
  p.args = {.pointsets = p.pointsets.const_data_ptr(),
            .polygons = p.polygons.const_data_ptr(),
            .out = p.out.mutable_data_ptr(),
            .n = p.pointsets.size(0),
            .m = p.polygons.size(0)};
  return p;
}

GiouPlan plan_giou(const Tensor& pointsets, const Tensor& polygons) {
  constexpr const char* kOp = "convex_giou";
  check(kOp, pointsets, polygons);
  check_shape(kOp, "polygons", polygons, {pointsets.size(0), kCorners});
  const ScalarType dtype = pointsets.scalar_type();
  GiouPlan p{.pointsets = as_contiguous(pointsets),
             .polygons = as_contiguous(polygons),
             .giou = empty(pointsets, dtype, {pointsets.size(0)}),
             .gradient = empty(pointsets, dtype, {pointsets.size(0), std::int64_t{kRow}}),
             .args = {}};
  p.args = {.pointsets = p.pointsets.const_data_ptr(),
            .polygons = p.polygons.const_data_ptr(),
            .giou = p.giou.mutable_data_ptr(),
            .gradient = p.gradient.mutable_data_ptr(),
            .n = p.pointsets.size(0)};
  return p;
}

// ---- CPU ----

template <class Scalar>
void iou_row(const Args& args, std::int64_t row) {
  using convex_iou::bounds_of;
  convex_iou::PointHull hull;
  convex_iou::hull_of(static_cast<const Scalar*>(args.pointsets) + row * kRow, hull);
  const convex_iou::Bounds own = bounds_of(hull, hull.count, hull.area);
  auto* out = static_cast<Scalar*>(args.out) + row * args.m;
  for (std::int64_t j = 0; j < args.m; ++j) {
    const auto q = load_outline<double>(static_cast<const Scalar*>(args.polygons) + j * kCorners);
    const bool is_apart = convex_iou::apart(own, bounds_of(q, 4, q.twice));
    store(out[j], static_cast<Acc<Scalar>>(is_apart ? 0.0 : convex_iou::iou(hull, q)));
  }
}

Tensor cpu(const Tensor& pointsets, const Tensor& polygons) {
  const Plan p = plan(pointsets, polygons);
  with_float(p.out.scalar_type(), [&]<class Scalar>() {
    parallel_for(p.args.n, kHullNanoseconds + p.args.m * kPairNanoseconds,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) iou_row<Scalar>(p.args, i);
                 });
  });
  return p.out;
}

template <class Scalar>
void giou_row(const GiouArgs& args, std::int64_t row) {
  double gradient[kRow];
  const double value =
      convex_iou::giou(static_cast<const Scalar*>(args.pointsets) + row * kRow,
                       static_cast<const Scalar*>(args.polygons) + row * kCorners, gradient);
  store(static_cast<Scalar*>(args.giou)[row], static_cast<Acc<Scalar>>(value));
  for (std::int64_t i = 0; i < kRow; ++i) {
    store(static_cast<Scalar*>(args.gradient)[row * kRow + i],
          static_cast<Acc<Scalar>>(gradient[i]));
  }
}

std::tuple<Tensor, Tensor> giou_cpu(const Tensor& pointsets, const Tensor& polygons) {
  const GiouPlan p = plan_giou(pointsets, polygons);
  with_float(p.giou.scalar_type(), [&]<class Scalar>() {
    parallel_for(p.args.n, kGiouNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) giou_row<Scalar>(p.args, i);
    });
  });
  return {p.giou, p.gradient};
}

// ---- CUDA ----

Tensor cuda(const Tensor& pointsets, const Tensor& polygons) {
  const Plan p = plan(pointsets, polygons);
  if (p.out.numel() == 0) return p.out;
  forward_kernel.run(
      CudaPlace(p.out), {kernel_type(p.out.scalar_type())}, {p.args.n, p.args.m}, p.args,
      {reads(offsetof(Args, pointsets), p.pointsets), reads(offsetof(Args, polygons), p.polygons),
       writes(offsetof(Args, out), p.out)});
  return p.out;
}

std::tuple<Tensor, Tensor> giou_cuda(const Tensor& pointsets, const Tensor& polygons) {
  const GiouPlan p = plan_giou(pointsets, polygons);
  if (p.args.n == 0) return {p.giou, p.gradient};
  giou_kernel.run(
      CudaPlace(p.giou), {kernel_type(p.giou.scalar_type())}, {p.args.n}, p.args,
      {reads(offsetof(GiouArgs, pointsets), p.pointsets),
       reads(offsetof(GiouArgs, polygons), p.polygons), writes(offsetof(GiouArgs, giou), p.giou),
       writes(offsetof(GiouArgs, gradient), p.gradient)});
  return {p.giou, p.gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def("convex_iou(Tensor pointsets, Tensor polygons) -> Tensor");
  m.def("convex_giou(Tensor pointsets, Tensor polygons) -> (Tensor giou, Tensor gradient)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("convex_iou", TORCH_BOX(&cpu));
  m.impl("convex_giou", TORCH_BOX(&giou_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("convex_iou", TORCH_BOX(&cuda));
  m.impl("convex_giou", TORCH_BOX(&giou_cuda));
}

}  // namespace torchkiln::bindings
