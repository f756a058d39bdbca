// min_area_polygons: schema, checks and shapes, CPU loop, launch.
// SPDX-License-Identifier: Apache-2.0
#include "detection/min_area_polygons.h"

#include <cstddef>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using min_area_polygons::Args;
using min_area_polygons::kCorners;
using min_area_polygons::kRow;

constexpr const char* kOp = "min_area_polygons";
constexpr std::int64_t kRowNanoseconds = 1000;

struct Statics {
  std::int64_t scalar;
};
struct Sizes {
  std::int64_t n;
};
struct Tunables {
  std::int64_t block_size;
};

using Forward = Kernel<Args, Statics, Sizes, Tunables>;

const Forward forward_kernel({
    .path = "detection/min_area_polygons.cuh",
    .entry = "forward",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{32}},
    .geometry =
        [](const Forward::Problem& p, const Tunables& t) {
          return linear(ceil_div(p.sizes.n, t.block_size), t.block_size);
        },
});

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor pointsets, polygons;
  Args args;
};

Plan plan(const Tensor& pointsets) {
  check_rows(kOp, "pointsets", pointsets, kRow);
  const std::int64_t n = pointsets.size(0);
  Plan p{.pointsets = as_contiguous(pointsets),
         .polygons = empty(pointsets, pointsets.scalar_type(), {n, std::int64_t{kCorners}}),
         .args = {}};
  p.args = {
      .pointsets = p.pointsets.const_data_ptr(), .polygons = p.polygons.mutable_data_ptr(), .n = n};
  return p;
}

template <class Scalar>
void find_row(const Args& args, std::int64_t row) {
  double corners[kCorners];
  min_area_polygons::polygon(static_cast<const Scalar*>(args.pointsets) + row * kRow, corners);
  for (std::int64_t i = 0; i < kCorners; ++i) {
    store(static_cast<Scalar*>(args.polygons)[row * kCorners + i],
          static_cast<Acc<Scalar>>(corners[i]));
  }
}

Tensor cpu(const Tensor& pointsets) {
  const Plan p = plan(pointsets);
  with_float(p.polygons.scalar_type(), [&]<class Scalar>() {
    parallel_for(p.args.n, kRowNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) find_row<Scalar>(p.args, i);
    });
  });
  return p.polygons;
}

Tensor cuda(const Tensor& pointsets) {
  const Plan p = plan(pointsets);
  if (p.args.n == 0) return p.polygons;
  forward_kernel.run(CudaPlace(p.polygons), {kernel_type(p.polygons.scalar_type())}, {p.args.n},
                     p.args,
                     {reads(offsetof(Args, pointsets), p.pointsets),
                      writes(offsetof(Args, polygons), p.polygons)});
  return p.polygons;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def("min_area_polygons(Tensor pointsets) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) { m.impl("min_area_polygons", TORCH_BOX(&cpu)); }
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) { m.impl("min_area_polygons", TORCH_BOX(&cuda)); }

}  // namespace torchkiln::bindings
