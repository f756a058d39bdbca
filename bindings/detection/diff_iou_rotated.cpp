// The differentiable overlap of rotated rectangles and of upright boxes in space: schema, checks and shapes, CPU loops,
// launches.
// SPDX-License-Identifier: Apache-2.0
#include "detection/diff_iou_rotated.h"

#include <algorithm>
#include <cstddef>
#include <tuple>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using diff_iou_rotated::Args;
using diff_iou_rotated::BackwardArgs;

constexpr std::int64_t kPairNanoseconds = 100;

struct Statics {
  std::int64_t scalar, space;
};
struct Sizes {
  std::int64_t n;
};
struct Tunables {
  std::int64_t block_size;
};

// Small blocks: a loss has a few hundred pairs, and they must not meet on a few multiprocessors.
template <class A>
Kernel<A, Statics, Sizes, Tunables> declared(const char* entry) {
  using Declared = Kernel<A, Statics, Sizes, Tunables>;
  return Declared({
      .path = "detection/diff_iou_rotated.cuh",
      .entry = entry,
      .operators = {"diff_iou_rotated"},
      .statics = {types("scalar", kFloatTypes), bools("space")},
      .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
      .tunables = {ints("block_size", {32, 64, 128, 256})},
      .defaults = {{128}, {32}},
      .choose = [](const typename Declared::Problem& p) { return p.sizes.n <= 16384 ? 1u : 0u; },
      .geometry =
          [](const typename Declared::Problem& p, const Tunables& t) {
            return linear(ceil_div(p.sizes.n, t.block_size), t.block_size);
          },
  });
}
const Kernel<Args, Statics, Sizes, Tunables> forward_kernel = declared<Args>("forward");
const Kernel<BackwardArgs, Statics, Sizes, Tunables> backward_kernel =
    declared<BackwardArgs>("backward");

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor boxes1, boxes2, out;
  Args args;
};

void check_pair(const Tensor& boxes1, const Tensor& boxes2, bool space) {
  const char* op = space ? "diff_iou_rotated_3d" : "diff_iou_rotated_2d";
  const std::int64_t columns = space ? 7 : 5;
  check_floating(op, "boxes1", boxes1);
  if (boxes1.dim() == 0 || boxes1.size(boxes1.dim() - 1) != columns) {
    fail(TORCHKILN_ERROR_VALUE, op, "boxes1", "have shape (..., " + std::to_string(columns) + ")",
         text(boxes1));
  }
  check_same_dtype(op, "boxes2", boxes2, "boxes1", boxes1);
  check_same_device(op, "boxes2", boxes2, "boxes1", boxes1);
  if (!std::ranges::equal(shape_of(boxes1), shape_of(boxes2))) {
    fail(TORCHKILN_ERROR_VALUE, op, "boxes2", "have the shape of boxes1 " + text(boxes1),
         text(boxes2));
  }
}

Shape without_columns(const Tensor& boxes) {
  const Shape shape = shape_of(boxes);
  return shape.first(shape.size() - 1);
}

Plan plan(const Tensor& boxes1, const Tensor& boxes2, bool space) {
  check_pair(boxes1, boxes2, space);
  Plan p{.boxes1 = as_contiguous(boxes1),
         .boxes2 = as_contiguous(boxes2),
         .out = empty(boxes1, boxes1.scalar_type(), without_columns(boxes1)),
         .args = {}};
  p.args = {.boxes1 = p.boxes1.const_data_ptr(),
            .boxes2 = p.boxes2.const_data_ptr(),
            .out = p.out.mutable_data_ptr(),
            .n = p.out.numel()};
  return p;
}

struct BackwardPlan {
  Tensor grad_output, boxes1, boxes2, grad_boxes1, grad_boxes2;
  BackwardArgs args;
};

// Has every element the same address? So has the gradient of a sum.
bool is_one_number(const Tensor& tensor) {
  return std::ranges::all_of(tensor.strides(), [](std::int64_t stride) { return stride == 0; });
}

BackwardPlan plan_backward(const Tensor& grad_output, const Tensor& boxes1, const Tensor& boxes2,
                           bool space) {
  constexpr const char* kOp = "diff_iou_rotated";
  check_pair(boxes1, boxes2, space);
  check_same_dtype(kOp, "grad_output", grad_output, "boxes1", boxes1);
  check_same_device(kOp, "grad_output", grad_output, "boxes1", boxes1);
  if (!std::ranges::equal(shape_of(grad_output), without_columns(boxes1)))
    fail(TORCHKILN_ERROR_VALUE, kOp, "grad_output", "have the shape of the output",
         text(grad_output));
  const bool expanded = is_one_number(grad_output);
  BackwardPlan p{.grad_output = expanded ? grad_output : as_contiguous(grad_output),
                 .boxes1 = as_contiguous(boxes1),
                 .boxes2 = as_contiguous(boxes2),
                 .grad_boxes1 = empty(boxes1, boxes1.scalar_type(), shape_of(boxes1)),
                 .grad_boxes2 = empty(boxes2, boxes2.scalar_type(), shape_of(boxes2)),
                 .args = {}};
  p.args = {.grad_output = p.grad_output.const_data_ptr(),
            .boxes1 = p.boxes1.const_data_ptr(),
            .boxes2 = p.boxes2.const_data_ptr(),
            .grad_boxes1 = p.grad_boxes1.mutable_data_ptr(),
            .grad_boxes2 = p.grad_boxes2.mutable_data_ptr(),
            .n = grad_output.numel(),
            .stride = expanded ? 0 : 1};
  return p;
}

// Calls f.operator()<Scalar, kSpace>().
template <class F>
void with_variant(ScalarType dtype, bool space, const F& f) {
  with_float(dtype, [&]<class Scalar>() {
    return space ? f.template operator()<Scalar, true>() : f.template operator()<Scalar, false>();
  });
}

template <class Scalar, bool kSpace>
void forward_rows(const Args& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) diff_iou_rotated::forward_row<kSpace, Scalar>(args, i);
}

template <class Scalar, bool kSpace>
void backward_rows(const BackwardArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i)
    diff_iou_rotated::backward_row<kSpace, Scalar>(args, i);
}

Tensor cpu(const Tensor& boxes1, const Tensor& boxes2, bool space) {
  const Plan p = plan(boxes1, boxes2, space);
  with_variant(p.out.scalar_type(), space, [&]<class Scalar, bool kSpace>() {
    parallel_for(p.args.n, kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      forward_rows<Scalar, kSpace>(p.args, begin, end);
    });
  });
  return p.out;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& boxes1,
                                        const Tensor& boxes2, bool space) {
  const BackwardPlan p = plan_backward(grad_output, boxes1, boxes2, space);
  with_variant(p.boxes1.scalar_type(), space, [&]<class Scalar, bool kSpace>() {
    parallel_for(p.args.n, 2 * kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      backward_rows<Scalar, kSpace>(p.args, begin, end);
    });
  });
  return {p.grad_boxes1, p.grad_boxes2};
}

Tensor cuda(const Tensor& boxes1, const Tensor& boxes2, bool space) {
  const Plan p = plan(boxes1, boxes2, space);
  if (p.args.n == 0) return p.out;
  forward_kernel.run(CudaPlace(p.out), {kernel_type(p.out.scalar_type()), space}, {p.args.n},
                     p.args,
                     {reads(offsetof(Args, boxes1), p.boxes1),
                      reads(offsetof(Args, boxes2), p.boxes2), writes(offsetof(Args, out), p.out)});
  return p.out;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& boxes1,
                                         const Tensor& boxes2, bool space) {
  const BackwardPlan p = plan_backward(grad_output, boxes1, boxes2, space);
  if (p.args.n == 0) return {p.grad_boxes1, p.grad_boxes2};
  backward_kernel.run(CudaPlace(p.boxes1), {kernel_type(p.boxes1.scalar_type()), space}, {p.args.n},
                      p.args,
                      {reads(offsetof(BackwardArgs, grad_output), p.grad_output),
                       reads(offsetof(BackwardArgs, boxes1), p.boxes1),
                       reads(offsetof(BackwardArgs, boxes2), p.boxes2),
                       writes(offsetof(BackwardArgs, grad_boxes1), p.grad_boxes1),
                       writes(offsetof(BackwardArgs, grad_boxes2), p.grad_boxes2)});
  return {p.grad_boxes1, p.grad_boxes2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def("diff_iou_rotated(Tensor boxes1, Tensor boxes2, bool space=False) -> Tensor");
  m.def(
      "_diff_iou_rotated_backward(Tensor grad_output, Tensor boxes1, Tensor boxes2, bool space) -> "
      "(Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("diff_iou_rotated", TORCH_BOX(&cpu));
  m.impl("_diff_iou_rotated_backward", TORCH_BOX(&backward_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("diff_iou_rotated", TORCH_BOX(&cuda));
  m.impl("_diff_iou_rotated_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace torchkiln::bindings
