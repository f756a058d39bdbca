// Overlaps of rotated rectangles, quadrilaterals and upright boxes in space: schema, checks and shapes, CPU loops,
// launches.
// SPDX-License-Identifier: Apache-2.0
#include "detection/box_iou_rotated.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"
#include "bindings/support/widen.h"

namespace torchkiln::bindings {
namespace {

using namespace box_iou_rotated;

constexpr const char* kOp = "box_iou_rotated";
constexpr std::int64_t kPairNanoseconds = 20;

struct Statics {
  std::int64_t scalar, form, mode;
};
struct Sizes {
  std::int64_t n, m;
};
struct PairTunables {
  std::int64_t block_size, rows;
};
struct RowTunables {
  std::int64_t block_size;
};

// What a form can be asked for.
bool has_mode(std::int64_t form, std::int64_t mode) {
  if (form == kRectangle || form == kQuad || form == kPeerQuad) return mode == kIou || mode == kIof;
  return mode == (form == kGround || form == kPeerGround ? kArea : kIou);
}

bool has_rows(std::int64_t form) {
  return form == kRectangle || form == kQuad || form == kPeerQuad;
}

// mmcv has its rules in float32 only.
bool has_type(std::int64_t form, std::int64_t scalar) {
  return form < kPeerQuad || scalar == TORCHKILN_FLOAT;
}

using Pairs = Kernel<Args, Statics, Sizes, PairTunables>;
using Rows = Kernel<Args, Statics, Sizes, RowTunables>;

std::int64_t tiles(const Pairs::Problem& p, const PairTunables& t) {
  return ceil_div(p.sizes.n, t.rows) * ceil_div(p.sizes.m, t.block_size);
}

const Pairs pairs_kernel({
    .path = "detection/box_iou_rotated.cuh",
    .entry = "pairs",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes), ints("form", {0, 1, 2, 3, 4, 5, 6, 7}),
                ints("mode", {0, 1, 2})},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}, {"m", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256}), ints("rows", {4, 8, 16, 32, 64})},
    .defaults = {{128, 32}, {64, 8}},
    .valid =
        [](const Statics& s) { return has_mode(s.form, s.mode) && has_type(s.form, s.scalar); },
    // Tall tiles, where there are enough of them, load each column less often.
    .choose =
        [](const Pairs::Problem& p) {
          return tiles(p, {128, 32}) < 8 * p.device.multiprocessors ? 1u : 0u;
        },
    .geometry = [](const Pairs::Problem& p,
                   const PairTunables& t) { return linear(tiles(p, t), t.block_size); },
});

const Rows aligned_kernel({
    .path = "detection/box_iou_rotated.cuh",
    .entry = "aligned",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes), ints("form", {0, 1, 2, 3, 4, 5, 6, 7}),
                ints("mode", {0, 1, 2})},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}, {"m", TORCHKILN_BUCKET_NONE}},
    .tunables = {ints("block_size", {32, 64, 128, 256})},
    .defaults = {{128}},
    .valid =
        [](const Statics& s) {
          return has_mode(s.form, s.mode) && has_type(s.form, s.scalar) && has_rows(s.form);
        },
    .geometry =
        [](const Rows::Problem& p, const RowTunables& t) {
          return linear(ceil_div(p.sizes.n, t.block_size), t.block_size);
        },
});

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor boxes1, boxes2, out;
  Args args;
};

const char* name_of(std::int64_t form) {
  switch (form) {
    case kQuad:
    case kPeerQuad:
      return "box_iou_quadri";
    case kCorners:
      return "boxes_iou_bev";
    case kGround:
    case kPeerGround:
      return "boxes_overlap_bev";
    case kPrism:
    case kPeerPrism:
      return "boxes_iou3d";
    default:
      return kOp;
  }
}

void check(const Tensor& boxes1, const Tensor& boxes2, std::int64_t form, std::int64_t mode,
           bool aligned) {
  if (form < kRectangle || form > kPeerPrism)
    fail(TORCHKILN_ERROR_VALUE, kOp, "form", "be from 0 to 7", std::to_string(form));
  const char* op = name_of(form);
  if (!has_mode(form, mode))
    fail(TORCHKILN_ERROR_VALUE, op, "mode", "be one that the form has", std::to_string(mode));
  check_rows(op, "boxes1", boxes1, columns_of(static_cast<int>(form)));
  check_rows(op, "boxes2", boxes2, columns_of(static_cast<int>(form)));
  check_same_dtype(op, "boxes2", boxes2, "boxes1", boxes1);
  check_same_device(op, "boxes2", boxes2, "boxes1", boxes1);
  if (!has_type(form, kernel_type(boxes1.scalar_type()))) {
    fail(TORCHKILN_ERROR_TYPE, op, "boxes1", "be float32 by mmcv's rules",
         text(boxes1.scalar_type()));
  }
  if (!aligned) return;
  if (!has_rows(form)) fail(TORCHKILN_ERROR_VALUE, op, "aligned", "be False", "True");
  if (boxes1.size(0) != boxes2.size(0)) {
    fail(TORCHKILN_ERROR_VALUE, op, "boxes2",
         "have as many rows as boxes1 (" + std::to_string(boxes1.size(0)) + ")",
         std::to_string(boxes2.size(0)), "Or leave out aligned=True, to compare every pair");
  }
}

Plan plan(const Tensor& boxes1, const Tensor& boxes2, std::int64_t form, std::int64_t mode,
          bool aligned, bool clockwise) {
  check(boxes1, boxes2, form, mode, aligned);
  const std::int64_t n = boxes1.size(0), m = boxes2.size(0);
  Plan p{.boxes1 = as_contiguous(boxes1),
         .boxes2 = as_contiguous(boxes2),
         .out = aligned ? empty(boxes1, boxes1.scalar_type(), {n})
                        : empty(boxes1, boxes1.scalar_type(), {n, m}),
         .args = {}};
  p.args = {.boxes1 = p.boxes1.const_data_ptr(),
            .boxes2 = p.boxes2.const_data_ptr(),
            .out = p.out.mutable_data_ptr(),
            .n = n,
            .m = m,
            .turn = clockwise ? 1 : -1};
  return p;
}

// Calls f.operator()<T, kForm, kMode>() with the type that dtype is computed in.
template <class F>
void with_variant(ScalarType dtype, std::int64_t form, std::int64_t mode, const F& f) {
  if (form == kPeerQuad) {
    return mode == kIof ? f.template operator()<float, kPeerQuad, kIof>()
                        : f.template operator()<float, kPeerQuad, kIou>();
  }
  if (form == kPeerGround) return f.template operator()<float, kPeerGround, kArea>();
  if (form == kPeerPrism) return f.template operator()<float, kPeerPrism, kIou>();
  with_wide(dtype, [&]<class T>() {
    switch (form) {
      case kQuad:
        return mode == kIof ? f.template operator()<T, kQuad, kIof>()
                            : f.template operator()<T, kQuad, kIou>();
      case kCorners:
        return f.template operator()<T, kCorners, kIou>();
      case kGround:
        return f.template operator()<T, kGround, kArea>();
      case kPrism:
        return f.template operator()<T, kPrism, kIou>();
      default:
        return mode == kIof ? f.template operator()<T, kRectangle, kIof>()
                            : f.template operator()<T, kRectangle, kIou>();
    }
  });
}

// Elements [begin, end) of the result, row after row.
template <class T, int kForm, int kMode>
void pair_elements(const Args& args, const T* boxes1, const std::vector<ShapeOf<kForm, T>>& others,
                   std::int64_t begin, std::int64_t end, T* out) {
  for (std::int64_t i = begin / args.m; i * args.m < end; ++i) {
    const auto shape = load_shape<kForm>(boxes1, i, args.turn);
    const std::int64_t row = i * args.m;
    for (std::int64_t at = std::max<std::int64_t>(begin, row);
         at < std::min<std::int64_t>(end, row + args.m); ++at) {
      const auto& other = others[static_cast<std::size_t>(at - row)];
      out[at - begin] = value_of<kMode>(shape, other, shared_area(shape, other));
    }
  }
}

template <class T, int kForm, int kMode>
void aligned_elements(const Args& args, const T* boxes1, const T* boxes2, std::int64_t begin,
                      std::int64_t end, T* out) {
  for (std::int64_t i = begin; i < end; ++i) {
    const auto a = load_shape<kForm>(boxes1, i, args.turn);
    const auto b = load_shape<kForm>(boxes2, i, args.turn);
    out[i - begin] = value_of<kMode>(a, b, shared_area(a, b));
  }
}

// f(begin, end, out) writes a part of the result.
template <class T, class F>
void for_parts(const Tensor& out, std::int64_t nanoseconds, const F& f) {
  const ScalarType dtype = out.scalar_type();
  void* memory = out.mutable_data_ptr();
  parallel_for(out.numel(), nanoseconds, [&](std::int64_t begin, std::int64_t end) {
    Narrow<T> part;
    f(begin, end, part.part(dtype, memory, begin, end - begin));
    part.round(dtype, memory, begin, end - begin);
  });
}

template <class T, int kForm, int kMode>
void pairs_cpu(const Plan& p, const T* boxes1, const T* boxes2) {
  std::vector<ShapeOf<kForm, T>> others(static_cast<std::size_t>(p.args.m));
  parallel_for(p.args.m, kPairNanoseconds, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j)
      others[static_cast<std::size_t>(j)] = load_shape<kForm>(boxes2, j, p.args.turn);
  });
  for_parts<T>(p.out, kPairNanoseconds, [&](std::int64_t begin, std::int64_t end, T* out) {
    pair_elements<T, kForm, kMode>(p.args, boxes1, others, begin, end, out);
  });
}

Tensor cpu(const Tensor& boxes1, const Tensor& boxes2, std::int64_t form, std::int64_t mode,
           bool aligned, bool clockwise) {
  const Plan p = plan(boxes1, boxes2, form, mode, aligned, clockwise);
  with_variant(p.out.scalar_type(), form, mode, [&]<class T, int kForm, int kMode>() {
    const Wide<T> wide1(p.boxes1), wide2(p.boxes2);
    if (!aligned) return pairs_cpu<T, kForm, kMode>(p, wide1.get(), wide2.get());
    for_parts<T>(p.out, 5 * kPairNanoseconds, [&](std::int64_t begin, std::int64_t end, T* out) {
      aligned_elements<T, kForm, kMode>(p.args, wide1.get(), wide2.get(), begin, end, out);
    });
  });
  return p.out;
}

Tensor cuda(const Tensor& boxes1, const Tensor& boxes2, std::int64_t form, std::int64_t mode,
            bool aligned, bool clockwise) {
  const Plan p = plan(boxes1, boxes2, form, mode, aligned, clockwise);
  if (p.out.numel() == 0) return p.out;
  const auto run = [&](const auto& kernel) {
    kernel.run(CudaPlace(p.out), {kernel_type(p.out.scalar_type()), form, mode},
               {p.args.n, p.args.m}, p.args,
               {reads(offsetof(Args, boxes1), p.boxes1), reads(offsetof(Args, boxes2), p.boxes2),
                writes(offsetof(Args, out), p.out)});
  };
  if (aligned) {
    run(aligned_kernel);
  } else {
    run(pairs_kernel);
  }
  return p.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "box_iou_rotated(Tensor boxes1, Tensor boxes2, int form=0, int mode=0, bool aligned=False, "
      "bool clockwise=True) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) { m.impl("box_iou_rotated", TORCH_BOX(&cpu)); }
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) { m.impl("box_iou_rotated", TORCH_BOX(&cuda)); }

}  // namespace torchkiln::bindings
