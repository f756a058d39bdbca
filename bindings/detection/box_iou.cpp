// box_iou in all its modes, pair by pair and row by row: schema, checks and shapes, launches.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/box_iou.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <tuple>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/layout.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using box_iou::AlignedBackwardArgs;
using box_iou::Args;
using box_iou::BackwardArgs;

constexpr const char* kOp = "box_iou";
// As many as a multiprocessor holds of this kernel, each with the same number of rows: what a thread does before its
// first row costs as much as a few rows.
constexpr std::int64_t kThreadsPerMultiprocessor = 1024;

struct Statics {
  std::int64_t scalar, mode;
};
struct ForwardStatics {
  std::int64_t scalar, mode, vector;
};
struct Sizes {
  std::int64_t n, m;
};
struct Tunables {
  std::int64_t block_size;
};

using Forward = Kernel<Args, ForwardStatics, Sizes, Tunables>;
using Backward = Kernel<BackwardArgs, Statics, Sizes, Tunables>;
struct Rows {
  std::int64_t n;
};
using Aligned = Kernel<Args, Statics, Rows, Tunables>;
using AlignedBackward = Kernel<AlignedBackwardArgs, Statics, Rows, Tunables>;

// Columns a thread: up to 16 bytes, where every row's begin allows it.
std::int64_t full_vector(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 2 : 4; }

// Threads that fill the GPU, all with the same number of rows but the last; at least one for each vector of a row.
Geometry over_pairs(const Forward::Problem& p, const Tunables& t) {
  const std::int64_t vectors = p.sizes.m / p.statics.vector;
  const std::int64_t wanted = p.device.multiprocessors * kThreadsPerMultiprocessor;
  const std::int64_t rows_each =
      std::clamp<std::int64_t>(p.sizes.n * vectors / wanted, 1, p.sizes.n);
  return linear(ceil_div(ceil_div(p.sizes.n, rows_each) * vectors, t.block_size), t.block_size);
}

const Forward forward_kernel({
    .path = "detection/box_iou.cuh",
    .entry = "forward",
    .operators = {"box_iou"},
    .statics = {types("scalar", kFloatTypes), ints("mode", {0, 1, 2, 3, 4, 5, 6}),
                ints("vector", {1, 2, 4})},
    .sizes = {{"n", TORCHKILN_BUCKET_NONE}, {"m", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}, {64}},
    .valid =
        [](const ForwardStatics& s) { return s.vector == 1 || s.vector == full_vector(s.scalar); },
    .choose = [](const Forward::Problem& p) { return p.sizes.m <= 64 ? 1u : 0u; },
    .geometry = &over_pairs,
});

const Backward backward_kernel({
    .path = "detection/box_iou.cuh",
    .entry = "backward",
    .operators = {"box_iou"},
    .statics = {types("scalar", kFloatTypes), ints("mode", {0, 1, 2, 3, 4, 7})},
    .sizes = {{"n", TORCHKILN_BUCKET_NONE}, {"m", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{256}, {32}},
    .choose = [](const Backward::Problem& p) { return p.sizes.m <= 64 ? 1u : 0u; },
    .geometry = [](const Backward::Problem& p,
                   const Tunables& t) { return linear(p.sizes.n, t.block_size); },
});

const Aligned aligned_kernel({
    .path = "detection/box_iou.cuh",
    .entry = "aligned",
    .operators = {"box_iou"},
    .statics = {types("scalar", kFloatTypes), ints("mode", {0, 1, 2, 3, 4, 5, 6})},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .geometry =
        [](const Aligned::Problem& p, const Tunables& t) {
          return linear(ceil_div(p.sizes.n, t.block_size), t.block_size);
        },
});

const AlignedBackward aligned_backward_kernel({
    .path = "detection/box_iou.cuh",
    .entry = "aligned_backward",
    .operators = {"box_iou"},
    .statics = {types("scalar", kFloatTypes), ints("mode", {0, 1, 2, 3, 4})},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .geometry =
        [](const AlignedBackward::Problem& p, const Tunables& t) {
          return linear(ceil_div(p.sizes.n, t.block_size), t.block_size);
        },
});

void check_pair(const Tensor& boxes1, const Tensor& boxes2, const BoxIouOptions& options,
                std::int64_t last_mode) {
  check_rows(kOp, "boxes1", boxes1, 4);
  check_rows(kOp, "boxes2", boxes2, 4);
  check_same_dtype(kOp, "boxes2", boxes2, "boxes1", boxes1);
  check_same_device(kOp, "boxes2", boxes2, "boxes1", boxes1);
  if (options.mode < box_iou::kIou || options.mode > last_mode) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "mode",
         "be 0 (iou), 1 (giou), 2 (diou), 3 (ciou) or 4 (iof), or 5 or 6 (mmcv's iou and iof, "
         "without a gradient)",
         std::to_string(options.mode));
  }
  if (!(options.offset >= 0) || std::isinf(options.offset))
    fail(TORCHKILN_ERROR_VALUE, kOp, "offset", "be a finite number of at least 0",
         std::to_string(options.offset));
  if (options.aligned) check_shape(kOp, "boxes2", boxes2, {boxes1.size(0), 4});
}

BoxIouSide plan_side(const Tensor& grad_output, const Tensor& boxes, const Tensor& others,
                     std::int64_t row_stride, std::int64_t column_stride,
                     const BoxIouOptions& options) {
  BoxIouSide p{.grad_output = grad_output,
               .boxes = as_contiguous(boxes),
               .others = as_contiguous(others),
               .grad_boxes = empty(boxes, boxes.scalar_type(), {boxes.size(0), 4}),
               .args = {}};
  p.args = {.grad_output = grad_output.const_data_ptr(),
            .boxes = p.boxes.const_data_ptr(),
            .others = p.others.const_data_ptr(),
            .grad_boxes = p.grad_boxes.mutable_data_ptr(),
            .n = boxes.size(0),
            .m = others.size(0),
            .row_stride = row_stride,
            .column_stride = column_stride,
            .eps = options.eps,
            .offset = options.offset};
  return p;
}

}  // namespace

BoxIouPlan plan_box_iou(const Tensor& boxes1, const Tensor& boxes2, const BoxIouOptions& options) {
  check_pair(boxes1, boxes2, options, box_iou::kMmcvIof);
  BoxIouPlan p{.boxes1 = as_contiguous(boxes1),
               .boxes2 = as_contiguous(boxes2),
               .out = options.aligned
                          ? empty(boxes1, boxes1.scalar_type(), {boxes1.size(0)})
                          : empty(boxes1, boxes1.scalar_type(), {boxes1.size(0), boxes2.size(0)}),
               .args = {}};
  p.args = {.boxes1 = p.boxes1.const_data_ptr(),
            .boxes2 = p.boxes2.const_data_ptr(),
            .out = p.out.mutable_data_ptr(),
            .n = p.boxes1.size(0),
            .m = p.boxes2.size(0),
            .eps = options.eps,
            .offset = options.offset};
  return p;
}

void check_box_iou_backward(const Tensor& grad_output, const Tensor& boxes1, const Tensor& boxes2,
                            const BoxIouOptions& options) {
  check_pair(boxes1, boxes2, options, box_iou::kIof);
  check_same_dtype(kOp, "grad_output", grad_output, "boxes1", boxes1);
  check_same_device(kOp, "grad_output", grad_output, "boxes1", boxes1);
  if (options.aligned) return check_shape(kOp, "grad_output", grad_output, {boxes1.size(0)});
  check_shape(kOp, "grad_output", grad_output, {boxes1.size(0), boxes2.size(0)});
}

std::pair<BoxIouSide, BoxIouSide> plan_box_iou_sides(const Tensor& grad_output,
                                                     const Tensor& boxes1, const Tensor& boxes2,
                                                     const BoxIouOptions& options) {
  const std::int64_t rows = grad_output.stride(0), columns = grad_output.stride(1);
  return {plan_side(grad_output, boxes1, boxes2, rows, columns, options),
          plan_side(grad_output, boxes2, boxes1, columns, rows, options)};
}

AlignedBoxIouPlan plan_aligned_box_iou(const Tensor& grad_output, const Tensor& boxes1,
                                       const Tensor& boxes2, const BoxIouOptions& options) {
  AlignedBoxIouPlan p{.grad_output = grad_output,
                      .boxes1 = as_contiguous(boxes1),
                      .boxes2 = as_contiguous(boxes2),
                      .grad_boxes1 = empty(boxes1, boxes1.scalar_type(), {boxes1.size(0), 4}),
                      .grad_boxes2 = empty(boxes2, boxes2.scalar_type(), {boxes2.size(0), 4}),
                      .args = {}};
  p.args = {.grad_output = grad_output.const_data_ptr(),
            .boxes1 = p.boxes1.const_data_ptr(),
            .boxes2 = p.boxes2.const_data_ptr(),
            .grad_boxes1 = p.grad_boxes1.mutable_data_ptr(),
            .grad_boxes2 = p.grad_boxes2.mutable_data_ptr(),
            .n = boxes1.size(0),
            .stride = grad_output.stride(0),
            .eps = options.eps,
            .offset = options.offset};
  return p;
}

namespace {

Tensor cuda(const Tensor& boxes1, const Tensor& boxes2, std::int64_t mode, double eps, bool aligned,
            double offset) {
  const BoxIouPlan p = plan_box_iou(boxes1, boxes2, {mode, eps, aligned, offset});
  if (p.out.numel() == 0) return p.out;
  const std::int64_t scalar = kernel_type(p.out.scalar_type());
  if (aligned) {
    aligned_kernel.run(
        CudaPlace(p.out), {scalar, mode}, {p.args.n}, p.args,
        {reads(offsetof(Args, boxes1), p.boxes1), reads(offsetof(Args, boxes2), p.boxes2),
         writes(offsetof(Args, out), p.out)});
    return p.out;
  }
  const bool aligned_rows = aligned_to_16(p.args.boxes1) && aligned_to_16(p.args.boxes2);
  const bool vectorised =
      p.args.m % full_vector(scalar) == 0 && aligned_rows && aligned_to_16(p.args.out);
  const std::int64_t vector = vectorised ? full_vector(scalar) : 1;
  forward_kernel.run(CudaPlace(p.out), {scalar, mode, vector}, {p.args.n, p.args.m}, p.args,
                     {reads(offsetof(Args, boxes1), p.boxes1),
                      reads(offsetof(Args, boxes2), p.boxes2), writes(offsetof(Args, out), p.out)});
  return p.out;
}

void cuda_side(const BoxIouSide& p, std::int64_t mode) {
  if (p.args.n == 0) return;
  backward_kernel.run(CudaPlace(p.boxes), {kernel_type(p.boxes.scalar_type()), mode},
                      {p.args.n, p.args.m}, p.args,
                      {reads(offsetof(BackwardArgs, grad_output), p.grad_output),
                       reads(offsetof(BackwardArgs, boxes), p.boxes),
                       reads(offsetof(BackwardArgs, others), p.others),
                       writes(offsetof(BackwardArgs, grad_boxes), p.grad_boxes)});
}

void cuda_aligned_backward(const AlignedBoxIouPlan& p, std::int64_t mode) {
  if (p.args.n == 0) return;
  aligned_backward_kernel.run(CudaPlace(p.boxes1), {kernel_type(p.boxes1.scalar_type()), mode},
                              {p.args.n}, p.args,
                              {reads(offsetof(AlignedBackwardArgs, grad_output), p.grad_output),
                               reads(offsetof(AlignedBackwardArgs, boxes1), p.boxes1),
                               reads(offsetof(AlignedBackwardArgs, boxes2), p.boxes2),
                               writes(offsetof(AlignedBackwardArgs, grad_boxes1), p.grad_boxes1),
                               writes(offsetof(AlignedBackwardArgs, grad_boxes2), p.grad_boxes2)});
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& boxes1,
                                         const Tensor& boxes2, std::int64_t mode, double eps,
                                         bool aligned, double offset) {
  const BoxIouOptions options{mode, eps, aligned, offset};
  check_box_iou_backward(grad_output, boxes1, boxes2, options);
  if (aligned) {
    const auto p = plan_aligned_box_iou(grad_output, boxes1, boxes2, options);
    cuda_aligned_backward(p, mode);
    return {p.grad_boxes1, p.grad_boxes2};
  }
  const auto [side1, side2] = plan_box_iou_sides(grad_output, boxes1, boxes2, options);
  cuda_side(side1, mode);
  cuda_side(side2, box_iou::exchanged(static_cast<int>(mode)));
  return {side1.grad_boxes, side2.grad_boxes};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "box_iou(Tensor boxes1, Tensor boxes2, int mode=0, float eps=1e-7, bool aligned=False, float "
      "offset=0.) -> Tensor");
  m.def(
      "_box_iou_backward(Tensor grad_output, Tensor boxes1, Tensor boxes2, int mode, float eps, "
      "bool aligned, float offset) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("box_iou", TORCH_BOX(&cuda));
  m.impl("_box_iou_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace torchkiln::bindings
