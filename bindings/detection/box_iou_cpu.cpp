// box_iou on the CPU, in all its modes, pair by pair and row by row.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/detection/box_iou.h"
#include "bindings/support/parallel.h"
#include "bindings/support/widen.h"

namespace torchkiln::bindings {
namespace {

using box_iou::AlignedBackwardArgs;
using box_iou::Args;
using box_iou::BackwardArgs;

constexpr std::int64_t kPairNanoseconds = 4;

// Elements that are computed between two conversions.
constexpr std::int64_t kBlock = 256;

// Calls f.operator()<T, kMode>() with the type that dtype is computed in.
template <class F>
void with_variant(ScalarType dtype, std::int64_t mode, const F& f) {
  with_wide(dtype, [&]<class T>() {
    switch (mode) {
      case box_iou::kIou:
        return f.template operator()<T, box_iou::kIou>();
      case box_iou::kGiou:
        return f.template operator()<T, box_iou::kGiou>();
      case box_iou::kDiou:
        return f.template operator()<T, box_iou::kDiou>();
      case box_iou::kCiou:
        return f.template operator()<T, box_iou::kCiou>();
      case box_iou::kIof:
        return f.template operator()<T, box_iou::kIof>();
      case box_iou::kMmcvIou:
        return f.template operator()<T, box_iou::kMmcvIou>();
      case box_iou::kMmcvIof:
        return f.template operator()<T, box_iou::kMmcvIof>();
      default:
        return f.template operator()<T, box_iou::kIofOther>();
    }
  });
}

// One set of boxes with each coordinate in a row of its own, so that a loop over boxes is a vector loop.
template <class T>
struct Columns {
  std::vector<T> x1, y1, x2, y2, area;

  Columns(const T* boxes, std::int64_t count, double offset) {
    const auto size = static_cast<std::size_t>(count);
    for (std::vector<T>* column : {&x1, &y1, &x2, &y2, &area}) column->resize(size);
    for (std::size_t j = 0; j < size; ++j) {
      const Box<T> box = box_iou::load_box(boxes, static_cast<i64>(j), offset);
      x1[j] = box.x1;
      y1[j] = box.y1;
      x2[j] = box.x2;
      y2[j] = box.y2;
      area[j] = torchkiln::area(box);
    }
  }
};

// The IoU of one box with all of a set. A NaN coordinate comes through the area. Written out twice, and without calls,
// because a function with other options is not inlined.
#define TORCHKILN_IOU_ROW(T)                                                                 \
  TORCHKILN_VECTORISED void iou_row(const Box<T>& box, T own_area, const T* __restrict__ x1, \
                                    const T* __restrict__ y1, const T* __restrict__ x2,      \
                                    const T* __restrict__ y2, const T* __restrict__ areas,   \
                                    std::size_t count, T* __restrict__ out) {                \
    const T bx1 = box.x1, by1 = box.y1, bx2 = box.x2, by2 = box.y2;                          \
    for (std::size_t j = 0; j < count; ++j) {                                                \
      const T width = (x2[j] < bx2 ? x2[j] : bx2) - (x1[j] > bx1 ? x1[j] : bx1);             \
      const T height = (y2[j] < by2 ? y2[j] : by2) - (y1[j] > by1 ? y1[j] : by1);            \
      const T inter = (width > T(0) ? width : T(0)) * (height > T(0) ? height : T(0));       \
      const bool larger = own_area > areas[j];                                               \
      const T most = larger ? own_area : areas[j], least = larger ? areas[j] : own_area;     \
      const T sum = (most - inter) + least;                                                  \
      const T united = sum < most ? most : sum; /* union_of() */                             \
      const T ratio = inter / (united == T(0) ? T(1) : united);                              \
      out[j] = united == T(0) ? T(0) : ratio;                                                \
    }                                                                                        \
  }
TORCHKILN_IOU_ROW(float)
TORCHKILN_IOU_ROW(double)
#undef TORCHKILN_IOU_ROW

// Pairs of one box with all of another set.
template <class T, int kMode>
void forward_row(const Box<T>& box, const T* boxes2, const Columns<T>& columns, const Args& args,
                 T* out) {
  if constexpr (kMode == box_iou::kIou) {
    iou_row(box, area(box), columns.x1.data(), columns.y1.data(), columns.x2.data(),
            columns.y2.data(), columns.area.data(), columns.area.size(), out);
  } else {
    for (std::int64_t j = 0; j < args.m; ++j) {
      out[j] = box_iou::element<kMode>(box, box_iou::load_box(boxes2, j, args.offset),
                                       static_cast<T>(args.eps), static_cast<T>(args.offset));
    }
  }
}

template <class T, int kMode>
void forward_pairs(const BoxIouPlan& p, const T* boxes1, const T* boxes2) {
  const Args& args = p.args;
  const ScalarType dtype = p.out.scalar_type();
  const Columns<T> columns(boxes2, kMode == box_iou::kIou ? args.m : 0, args.offset);
  parallel_for(args.n, args.m * kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
    Narrow<T> out;
    for (std::int64_t i = begin; i < end; ++i) {
      T* row = out.part(dtype, args.out, i * args.m, args.m);
      forward_row<T, kMode>(box_iou::load_box(boxes1, i, args.offset), boxes2, columns, args, row);
      out.round(dtype, args.out, i * args.m, args.m);
    }
  });
}

template <class T, int kMode>
void forward_aligned(const BoxIouPlan& p, const T* boxes1, const T* boxes2) {
  const Args& args = p.args;
  const ScalarType dtype = p.out.scalar_type();
  parallel_for(args.n, kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
    Narrow<T> out;
    T* elements = out.part(dtype, args.out, begin, end - begin);
    for (std::int64_t i = begin; i < end; ++i) {
      elements[i - begin] = box_iou::element<kMode>(
          box_iou::load_box(boxes1, i, args.offset), box_iou::load_box(boxes2, i, args.offset),
          static_cast<T>(args.eps), static_cast<T>(args.offset));
    }
    out.round(dtype, args.out, begin, end - begin);
  });
}

Tensor cpu(const Tensor& boxes1, const Tensor& boxes2, std::int64_t mode, double eps, bool aligned,
           double offset) {
  const BoxIouPlan p = plan_box_iou(boxes1, boxes2, {mode, eps, aligned, offset});
  with_variant(p.out.scalar_type(), mode, [&]<class T, int kMode>() {
    const Wide<T> wide1(p.boxes1), wide2(p.boxes2);
    aligned ? forward_aligned<T, kMode>(p, wide1.get(), wide2.get())
            : forward_pairs<T, kMode>(p, wide1.get(), wide2.get());
  });
  return p.out;
}

template <class T>
void store_gradient(const Tensor& tensor, std::int64_t row, const Box<T>& grad) {
  const T numbers[] = {grad.x1, grad.y1, grad.x2, grad.y2};
  narrow(tensor.scalar_type(), numbers, 4, tensor.mutable_data_ptr(), 4 * row);
}

// The gradient of one box: of its pairs with all others.
template <class T, int kMode>
Box<T> backward_row(const BackwardArgs& args, ScalarType dtype, std::int64_t i, const Box<T>& box,
                    const T* others) {
  Box<T> grad{};
  T gradients[kBlock];
  for (std::int64_t begin = 0; begin < args.m; begin += kBlock) {
    const std::int64_t n = std::min<std::int64_t>(kBlock, args.m - begin);
    widen(dtype, args.grad_output, i * args.row_stride + begin * args.column_stride,
          args.column_stride, n, gradients);
    for (std::int64_t j = 0; j < n; ++j) {
      box_iou::add_gradient<kMode>(box, box_iou::load_box(others, begin + j, args.offset),
                                   static_cast<T>(args.eps), gradients[j], grad);
    }
  }
  return grad;
}

void cpu_side(const BoxIouSide& p, std::int64_t mode) {
  const BackwardArgs& args = p.args;
  with_variant(p.boxes.scalar_type(), mode, [&]<class T, int kMode>() {
    const Wide<T> boxes(p.boxes), others(p.others);
    parallel_for(args.n, 4 * args.m * kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const Box<T> box = box_iou::load_box(boxes.get(), i, args.offset);
        store_gradient(p.grad_boxes, i,
                       backward_row<T, kMode>(args, p.boxes.scalar_type(), i, box, others.get()));
      }
    });
  });
}

void cpu_aligned_backward(const AlignedBoxIouPlan& p, std::int64_t mode) {
  const AlignedBackwardArgs& args = p.args;
  with_variant(p.boxes1.scalar_type(), mode, [&]<class T, int kMode>() {
    const Wide<T> boxes1(p.boxes1), boxes2(p.boxes2);
    const auto eps = static_cast<T>(args.eps);
    parallel_for(args.n, 8 * kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const Box<T> box1 = box_iou::load_box(boxes1.get(), i, args.offset);
        const Box<T> box2 = box_iou::load_box(boxes2.get(), i, args.offset);
        T gradient = 0;
        widen(p.grad_output.scalar_type(), args.grad_output, i * args.stride, 1, 1, &gradient);
        Box<T> grad1{}, grad2{};
        box_iou::add_gradient<kMode>(box1, box2, eps, gradient, grad1);
        box_iou::add_gradient<box_iou::exchanged(kMode)>(box2, box1, eps, gradient, grad2);
        store_gradient(p.grad_boxes1, i, grad1);
        store_gradient(p.grad_boxes2, i, grad2);
      }
    });
  });
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& boxes1,
                                        const Tensor& boxes2, std::int64_t mode, double eps,
                                        bool aligned, double offset) {
  const BoxIouOptions options{mode, eps, aligned, offset};
  check_box_iou_backward(grad_output, boxes1, boxes2, options);
  if (aligned) {
    const auto p = plan_aligned_box_iou(grad_output, boxes1, boxes2, options);
    cpu_aligned_backward(p, mode);
    return {p.grad_boxes1, p.grad_boxes2};
  }
  const auto [side1, side2] = plan_box_iou_sides(grad_output, boxes1, boxes2, options);
  cpu_side(side1, mode);
  cpu_side(side2, box_iou::exchanged(static_cast<int>(mode)));
  return {side1.grad_boxes, side2.grad_boxes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&cpu));
  m.impl("_box_iou_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace torchkiln::bindings
