// soft_nms and soft_nms_padded: schema, checks, launches. (The CPU version is soft_nms_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/soft_nms.h"

#include <cmath>
#include <cstddef>
#include <tuple>

namespace torchkiln::bindings {
namespace {

using soft_nms::Args;

struct SelectStatics {
  std::int64_t scalar, classes;
};
struct SelectTunables {
  std::int64_t items, block_size;
};
struct RankStatics {
  std::int64_t scalar;
};
struct RankTunables {
  std::int64_t block_size;
};
struct MergeTunables {
  std::int64_t lanes, block_size;
};
struct Sizes {
  std::int64_t n;
};

using Select = Kernel<Args, SelectStatics, Sizes, SelectTunables>;
using Rank = Kernel<Args, RankStatics, Sizes, RankTunables>;
using Merge = Kernel<Args, RankStatics, Sizes, MergeTunables>;

const std::vector<const char*> kOperators = {"soft_nms", "soft_nms_padded"};

// Few threads make a step short; the boxes of one class should fit into their registers.
const Select select_kernel({
    .path = "detection/soft_nms.cuh",
    .entry = "select",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes), bools("classes")},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("items", {1, 2, 4}), ints("block_size", {64, 128, 256, 512})},
    .defaults = {{4, 128}, {4, 256}, {4, 512}},
    .choose =
        [](const Select::Problem& p) {
          if (p.statics.classes != 0 || p.sizes.n <= 512) return 0u;
          return p.sizes.n <= 1024 ? 1u : 2u;
        },
    .geometry =
        [](const Select::Problem& p, const SelectTunables& t) {
          const std::int64_t n = p.sizes.n;
          return linear(p.statics.classes != 0 ? ceil_div(n, soft_nms::kPlaces) : 1, t.block_size);
        },
});

const Rank rank_kernel({
    .path = "detection/soft_nms.cuh",
    .entry = "rank",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{512}},
    .geometry =
        [](const Rank::Problem& p, const RankTunables& t) {
          return linear(ceil_div(p.sizes.n, soft_nms::kTile), t.block_size);
        },
});

const Merge merge_kernel({
    .path = "detection/soft_nms.cuh",
    .entry = "merge",
    .operators = kOperators,
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("lanes", {1, 4, 8, 16, 32}), ints("block_size", {128, 256})},
    .defaults = {{8, 256}},
    .geometry =
        [](const Merge::Problem& p, const MergeTunables& t) {
          return linear(ceil_div(p.sizes.n * t.lanes, t.block_size), t.block_size);
        },
});

// The bytes of one accumulator, and of one key: a score and a row.
std::int64_t accumulator_bytes(const SoftPlan& p) {
  return p.nms.boxes.scalar_type() == ScalarType::Double ? 8 : 4;
}
std::int64_t key_bytes(const SoftPlan& p) { return 2 * accumulator_bytes(p); }

// The scratch memory of a call beyond that of the order, cut from one allocation.
struct Workspace {
  std::int64_t live_boxes, live_scores, live_rows, selected, ranked;  // bytes

  explicit Workspace(const SoftPlan& p)
      : live_boxes(4 * p.args.n * accumulator_bytes(p)),
        live_scores(p.args.n * accumulator_bytes(p)),
        live_rows(p.args.n * 4),
        selected(p.nms.args.idxs != nullptr ? p.args.n * key_bytes(p) : 0),
        ranked(p.args.n > soft_nms::kTile ? selected : 0) {}

  static std::int64_t padded(std::int64_t bytes) { return ceil_div(bytes, 16) * 16; }
  std::int64_t total() const {
    return padded(live_boxes) + padded(live_scores) + padded(live_rows) + padded(selected) +
           padded(ranked);
  }
  void place(std::uint8_t* memory, Args& args) const {
    const auto take = [&](std::int64_t bytes) {
      std::uint8_t* const part = memory;
      memory += padded(bytes);
      return part;
    };
    args.live_boxes = take(live_boxes);
    args.live_scores = take(live_scores);
    args.live_rows = reinterpret_cast<u32*>(take(live_rows));
    args.selected = take(selected);
    args.ranked = take(ranked);
  }
};

struct Outputs {
  Tensor indices, scores;
  std::int64_t* count;
};

Buffer part(std::size_t offset, torchkiln_access access, std::int64_t bytes) {
  return buffer(offset, access, bytes);
}
constexpr auto kRead = TORCHKILN_READ, kWrite = TORCHKILN_WRITE, kUpdate = TORCHKILN_READ_WRITE;

void launch_select(const CudaPlace& place, const SoftPlan& p, const Args& args, const Workspace& w,
                   const Outputs& out) {
  const bool classes = args.sorted_rows != nullptr;
  const std::int64_t rows = classes ? args.n * 4 : 0;
  const SelectStatics statics{kernel_type(p.nms.boxes.scalar_type()), classes ? 1 : 0};
  select_kernel.run(
      place, statics, {args.n}, args,
      {reads(offsetof(Args, boxes), p.nms.boxes), reads(offsetof(Args, scores), p.nms.scores),
       part(offsetof(Args, sorted_rows), kRead, rows), part(offsetof(Args, first), kRead, rows),
       part(offsetof(Args, live_boxes), kWrite, w.live_boxes),
       part(offsetof(Args, live_scores), kWrite, w.live_scores),
       part(offsetof(Args, live_rows), kWrite, w.live_rows),
       part(offsetof(Args, selected), kWrite, w.selected),
       part(offsetof(Args, n_selected), kUpdate, classes ? 4 : 0), unused(offsetof(Args, ranked)),
       classes ? unused(offsetof(Args, indices)) : writes(offsetof(Args, indices), out.indices),
       classes ? unused(offsetof(Args, out_scores))
               : writes(offsetof(Args, out_scores), out.scores),
       part(offsetof(Args, count), kWrite, classes ? 0 : 8)});
}

void launch_rank(const CudaPlace& place, const SoftPlan& p, const Args& args, const Workspace& w,
                 const Outputs& out) {
  const RankStatics statics{kernel_type(p.nms.boxes.scalar_type())};
  rank_kernel.run(
      place, statics, {args.n}, args,
      {part(offsetof(Args, selected), kRead, w.selected),
       part(offsetof(Args, ranked), kWrite, w.ranked), part(offsetof(Args, n_selected), kRead, 4),
       updates(offsetof(Args, indices), out.indices),
       updates(offsetof(Args, out_scores), out.scores), part(offsetof(Args, count), kWrite, 8),
       unused(offsetof(Args, boxes)), unused(offsetof(Args, scores)),
       unused(offsetof(Args, sorted_rows)), unused(offsetof(Args, first)),
       unused(offsetof(Args, live_boxes)), unused(offsetof(Args, live_scores)),
       unused(offsetof(Args, live_rows))});
  if (args.n <= soft_nms::kTile) return;
  merge_kernel.run(
      place, statics, {args.n}, args,
      {part(offsetof(Args, ranked), kRead, w.ranked), updates(offsetof(Args, indices), out.indices),
       updates(offsetof(Args, out_scores), out.scores), unused(offsetof(Args, boxes)),
       unused(offsetof(Args, scores)), unused(offsetof(Args, sorted_rows)),
       unused(offsetof(Args, first)), unused(offsetof(Args, live_boxes)),
       unused(offsetof(Args, live_scores)), unused(offsetof(Args, live_rows)),
       unused(offsetof(Args, selected)), unused(offsetof(Args, n_selected)),
       unused(offsetof(Args, count))});
}

// Results go to `out`, whose count may lie in host memory that the device can write. Nothing waits for the host.
void launch(const CudaPlace& place, const SoftPlan& p, const Outputs& out) {
  const Workspace sizes(p);
  const Tensor workspace = empty(p.nms.boxes, ScalarType::Byte, {sizes.total()});
  Args args = p.args;
  sizes.place(mutable_data<std::uint8_t>(workspace), args);
  args.indices = reinterpret_cast<i64*>(out.indices.mutable_data_ptr());
  args.out_scores = out.scores.mutable_data_ptr();
  args.count = reinterpret_cast<i64*>(out.count);
  args.max_output = out.indices.numel();
  if (p.nms.args.idxs == nullptr) {
    launch_select(place, p, args, sizes, out);
    return;
  }
  const Ordered ordered = order(place, p.nms, out.indices, out.count);
  args.sorted_rows = ordered.args.sorted_rows;
  args.first = ordered.args.first;
  args.n_selected = ordered.args.counters;
  launch_select(place, p, args, sizes, out);
  launch_rank(place, p, args, sizes, out);
}

std::tuple<Tensor, Tensor> soft_nms_cuda(const Tensor& boxes, const Tensor& scores,
                                         double iou_threshold, double sigma, double min_score,
                                         std::int64_t method, const std::optional<Tensor>& idxs,
                                         double offset) {
  constexpr const char* kOp = "soft_nms";
  const SoftPlan p =
      plan_soft_nms(kOp, boxes, scores, {iou_threshold, sigma, min_score, method, offset}, idxs);
  Tensor indices = empty(boxes, ScalarType::Long, {p.args.n});
  Tensor out = empty(boxes, boxes.scalar_type(), {p.args.n});
  if (p.args.n == 0) return {indices, out};
  const CudaPlace place(boxes);
  constexpr const char* kWayOut =
      "Use torchkiln.ops.soft_nms_padded, whose result has a fixed size";
  check(torchkiln_capture_guard(place.device(), place.stream(), kOp, kWayOut));
  std::int64_t* count = host_number();
  launch(place, p, {indices, out, count});
  check(torchkiln_synchronize(place.device(), place.stream(), kOp, kWayOut));
  const std::int64_t kept = *static_cast<volatile std::int64_t*>(count);
  return {torch::stable::narrow(indices, 0, 0, kept), torch::stable::narrow(out, 0, 0, kept)};
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_padded_cuda(const Tensor& boxes, const Tensor& scores,
                                                        std::int64_t max_output,
                                                        double iou_threshold, double sigma,
                                                        double min_score, std::int64_t method,
                                                        const std::optional<Tensor>& idxs,
                                                        double offset) {
  constexpr const char* kOp = "soft_nms_padded";
  const SoftPlan p =
      plan_soft_nms(kOp, boxes, scores, {iou_threshold, sigma, min_score, method, offset}, idxs);
  check_padded_output(kOp, max_output);
  Tensor indices = empty(boxes, ScalarType::Long, {max_output});
  if (p.args.n == 0) {
    torch::stable::fill_(indices, -1);
    return {indices, zeros(boxes, boxes.scalar_type(), {max_output}),
            zeros(boxes, ScalarType::Long, {})};
  }
  const Tensor out = empty(boxes, boxes.scalar_type(), {max_output});
  const Tensor count = empty(boxes, ScalarType::Long, {});
  launch(CudaPlace(boxes), p, {indices, out, mutable_data<std::int64_t>(count)});
  return {indices, out, count};
}

}  // namespace

SoftPlan plan_soft_nms(const char* op, const Tensor& boxes, const Tensor& scores,
                       const Softness& softness, const std::optional<Tensor>& idxs) {
  SoftPlan p{.nms = plan_nms(op, boxes, scores, idxs, softness.iou_threshold), .args = {}};
  if (softness.method < soft_nms::kNaive || softness.method > soft_nms::kGaussian) {
    fail(TORCHKILN_ERROR_VALUE, op, "method", "be 0 (naive), 1 (linear) or 2 (gaussian)",
         std::to_string(softness.method));
  }
  check_not_nan(op, "min_score", softness.min_score);
  check_offset(op, softness.offset);
  if (!(softness.sigma > 0)) {
    fail(TORCHKILN_ERROR_VALUE, op, "sigma", "be greater than 0", std::to_string(softness.sigma));
  }
  p.args.boxes = p.nms.args.boxes;
  p.args.scores = p.nms.args.scores;
  p.args.n = p.nms.args.n;
  p.args.method = softness.method;
  p.args.iou_threshold = softness.iou_threshold;
  p.args.sigma = softness.sigma;
  p.args.min_score = softness.min_score;
  p.args.offset = softness.offset;
  return p;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, float iou_threshold=0.3, float sigma=0.5, "
      "float min_score=0.001, int method=1, Tensor? idxs=None, float offset=0.) -> "
      "(Tensor, Tensor)");
  m.def(
      "soft_nms_padded(Tensor boxes, Tensor scores, int max_output, float iou_threshold=0.3, "
      "float sigma=0.5, float min_score=0.001, int method=1, Tensor? idxs=None, float offset=0.)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("soft_nms", TORCH_BOX(&torchkiln::bindings::soft_nms_cuda));
  m.impl("soft_nms_padded", TORCH_BOX(&torchkiln::bindings::soft_nms_padded_cuda));
}
