// nms and its relatives: schemas, checks, registration. (nms_cuda.cpp launches, nms_cpu.cpp has the CPU versions.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/nms.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "detection/nms_shapes.h"

namespace torchkiln::bindings {
namespace {

using Classes = std::optional<Tensor>;
using Number = std::optional<double>;
using Count = std::optional<std::int64_t>;

constexpr BoxForm kTurned = {nms::kRotated, 5, "labels"};
constexpr BoxForm kFourVertices = {nms::kQuads, 8, "labels"};
constexpr BoxForm kUpright = {nms::kRotated, 7, "labels"};
constexpr BoxForm kUprightNormal = {nms::kNormal, 7, "labels"};
// mmcv's rules, for its drop-in; by number.
constexpr BoxForm kPeers[] = {{nms::kPeerRotated, 7, "labels"}, {nms::kPeerQuads, 8, "labels"}};
constexpr BoxForm kMatched = {nms::kInclusive, 4, "idxs"};

// What only boxes given by corners have.
struct Options {
  double offset;
  Number score_threshold;
};

NmsPlan plan_corners(const char* op, const Tensor& boxes, const Tensor& scores, const Classes& idxs,
                     double iou_threshold, const Options& options) {
  NmsPlan p = plan_nms(op, boxes, scores, idxs, iou_threshold);
  check_offset(op, options.offset);
  if (options.score_threshold.has_value()) {
    check_not_nan(op, "score_threshold", *options.score_threshold);
    p.args.score_threshold = *options.score_threshold;
  }
  p.args.offset = options.offset;
  return p;
}

NmsPlan plan_turned(const char* op, const Tensor& boxes, const Tensor& scores, double iou_threshold,
                    const Classes& labels, bool clockwise) {
  NmsPlan p = plan_nms(op, boxes, scores, labels, iou_threshold, kTurned);
  p.args.angle_sign = clockwise ? 1 : -1;
  return p;
}

NmsPlan plan_lanes(const char* op, const Tensor& boxes, const Tensor& scores, double distance,
                   const Classes& labels) {
  check_floating(op, "boxes", boxes);
  constexpr std::int64_t kFewest = nms::Lanes<float>::kHead + 2;
  if (boxes.dim() != 2 || boxes.size(1) < kFewest) {
    fail(TORCHKILN_ERROR_VALUE, op, "boxes", "have shape (N, 5 + S) with S of at least 2",
         text(boxes));
  }
  const BoxForm form = {nms::kLanes, boxes.size(1), "labels", "distance"};
  return plan_nms(op, boxes, scores, labels, distance, form);
}

// The operators of one device.
template <auto sized, auto padded, auto groups>
struct Operators {
  static Tensor all(const NmsPlan& p) { return sized(p, kMaxBoxes); }
  static Tensor most(const NmsPlan& p, const Count& max_output) {
    if (max_output.has_value()) check_max_output(p.op, *max_output);
    return sized(p, max_output.value_or(kMaxBoxes));
  }
  static Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, double offset,
                    Number score_threshold, Count max_output) {
    return most(
        plan_corners("nms", boxes, scores, std::nullopt, iou_threshold, {offset, score_threshold}),
        max_output);
  }
  static Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                            double iou_threshold, double offset, Number score_threshold,
                            Count max_output) {
    return most(
        plan_corners("batched_nms", boxes, scores, idxs, iou_threshold, {offset, score_threshold}),
        max_output);
  }
  static Tensor nms_rotated(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                            const Classes& labels, bool clockwise) {
    return all(plan_turned("nms_rotated", boxes, scores, iou_threshold, labels, clockwise));
  }
  static Tensor nms_quadri(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                           const Classes& labels) {
    return all(plan_nms("nms_quadri", boxes, scores, labels, iou_threshold, kFourVertices));
  }
  static Tensor nms3d(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                      const Classes& labels) {
    return all(plan_nms("nms3d", boxes, scores, labels, iou_threshold, kUpright));
  }
  static Tensor nms3d_normal(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                             const Classes& labels) {
    return all(plan_nms("nms3d_normal", boxes, scores, labels, iou_threshold, kUprightNormal));
  }

  static Tensor nms_by_peer(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                            std::int64_t form, const Classes& labels) {
    constexpr const char* kOp = "_nms_by_peer";
    if (form < 0 || form > 1)
      fail(TORCHKILN_ERROR_VALUE, kOp, "form", "be 0 or 1", std::to_string(form));
    return all(plan_nms(kOp, boxes, scores, labels, iou_threshold, kPeers[form]));
  }

  static Tensor line_nms(const Tensor& boxes, const Tensor& scores, double distance,
                         const Classes& labels) {
    return all(plan_lanes("line_nms", boxes, scores, distance, labels));
  }

  using Pair = std::tuple<Tensor, Tensor>;
  static Pair line_nms_padded(const Tensor& boxes, const Tensor& scores, double distance,
                              std::int64_t max_output, const Classes& labels) {
    return pad(plan_lanes("line_nms_padded", boxes, scores, distance, labels), max_output);
  }
  static Pair pad(const NmsPlan& p, std::int64_t max_output) {
    check_padded_output(p.op, max_output);
    Padded result = padded(p, max_output);
    return {result.indices, result.count};
  }
  static Pair nms_padded(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                         std::int64_t max_output, const Classes& idxs, double offset,
                         Number score_threshold) {
    return pad(
        plan_corners("nms_padded", boxes, scores, idxs, iou_threshold, {offset, score_threshold}),
        max_output);
  }
  static Pair nms_rotated_padded(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                                 std::int64_t max_output, const Classes& labels, bool clockwise) {
    return pad(plan_turned("nms_rotated_padded", boxes, scores, iou_threshold, labels, clockwise),
               max_output);
  }
  static Pair nms_quadri_padded(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                                std::int64_t max_output, const Classes& labels) {
    return pad(plan_nms("nms_quadri_padded", boxes, scores, labels, iou_threshold, kFourVertices),
               max_output);
  }
  static Pair nms3d_padded(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                           std::int64_t max_output, const Classes& labels) {
    return pad(plan_nms("nms3d_padded", boxes, scores, labels, iou_threshold, kUpright),
               max_output);
  }
  static Pair nms3d_normal_padded(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                                  std::int64_t max_output, const Classes& labels) {
    return pad(
        plan_nms("nms3d_normal_padded", boxes, scores, labels, iou_threshold, kUprightNormal),
        max_output);
  }

  using Triple = std::tuple<Tensor, Tensor, Tensor>;
  static Triple grouped(const NmsPlan& p) {
    Groups result = groups(p);
    return {result.rows, result.groups, result.count};
  }
  static Triple nms_groups(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    return grouped(plan_nms("nms_groups", boxes, scores, std::nullopt, iou_threshold, kMatched));
  }
  static Triple line_nms_groups(const Tensor& boxes, const Tensor& scores, double distance) {
    return grouped(plan_lanes("line_nms_groups", boxes, scores, distance, std::nullopt));
  }
};

using OnCuda = Operators<&sized_cuda, &padded_cuda, &groups_cuda>;
using OnCpu = Operators<&sized_cpu, &padded_cpu, &groups_cpu>;

}  // namespace

NmsPlan plan_nms(const char* op, const Tensor& boxes, const Tensor& scores,
                 const std::optional<Tensor>& classes, double iou_threshold, const BoxForm& form) {
  check_rows(op, "boxes", boxes, form.columns);
  check_dim(op, "scores", scores, 1, "(N,)");
  check_same_dtype(op, "scores", scores, "boxes", boxes);
  check_same_device(op, "scores", scores, "boxes", boxes);
  check_shape(op, "scores", scores, {boxes.size(0)});
  if (classes.has_value()) {
    class_bytes(op, form.classes, *classes);
    check_dim(op, form.classes, *classes, 1, "(N,)");
    check_same_device(op, form.classes, *classes, "boxes", boxes);
    check_shape(op, form.classes, *classes, {boxes.size(0)});
  }
  check_not_nan(op, form.threshold, iou_threshold);
  if (boxes.size(0) >= kMaxBoxes)
    fail(TORCHKILN_ERROR_VALUE, op, "boxes", "have fewer than 2^30 rows", text(boxes));
  NmsPlan p{.op = op,
            .boxes = as_contiguous(boxes),
            .scores = as_contiguous(scores),
            .idxs = classes.has_value() ? as_contiguous(*classes) : Tensor(),
            .kind = form.kind,
            .args = {}};
  p.args.boxes = p.boxes.const_data_ptr();
  p.args.scores = p.scores.const_data_ptr();
  p.args.n = boxes.size(0);
  p.args.columns = form.columns;
  p.args.iou_threshold = iou_threshold;
  p.args.angle_sign = 1;
  p.args.score_threshold = std::numeric_limits<double>::quiet_NaN();
  if (classes.has_value()) {
    p.args.idxs = p.idxs.const_data_ptr();
    p.args.idx_bytes = class_bytes(op, form.classes, p.idxs);
  }
  return p;
}

std::int64_t class_bytes(const char* op, const char* argument, const Tensor& idxs) {
  switch (idxs.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    case ScalarType::Short:
      return 2;
    case ScalarType::Int:
      return 4;
    case ScalarType::Long:
      return 8;
    default:
      fail(TORCHKILN_ERROR_TYPE, op, argument, "be an integer tensor", text(idxs.scalar_type()),
           std::string("Convert it with ") + argument + ".long()");
  }
}

void check_offset(const char* op, double offset) {
  if (offset >= 0 && !std::isinf(offset)) return;
  fail(TORCHKILN_ERROR_VALUE, op, "offset", "be a finite number of at least 0",
       std::to_string(offset));
}

void check_max_output(const char* op, std::int64_t max_output) {
  if (max_output >= 0) return;
  fail(TORCHKILN_ERROR_VALUE, op, "max_output", "be at least 0", std::to_string(max_output));
}

void check_padded_output(const char* op, std::int64_t max_output) {
  check_max_output(op, max_output);
  if (max_output <= kMaxBoxes) return;
  fail(TORCHKILN_ERROR_VALUE, op, "max_output", "be at most 2^30", std::to_string(max_output),
       "No more rows can be kept than there are boxes");
}

}  // namespace torchkiln::bindings

#define TORCHKILN_NMS_IMPL(m, Device)                                     \
  using torchkiln::bindings::Device;                                      \
  m.impl("nms", TORCH_BOX(&Device::nms));                                 \
  m.impl("batched_nms", TORCH_BOX(&Device::batched_nms));                 \
  m.impl("nms_padded", TORCH_BOX(&Device::nms_padded));                   \
  m.impl("nms_rotated", TORCH_BOX(&Device::nms_rotated));                 \
  m.impl("nms_rotated_padded", TORCH_BOX(&Device::nms_rotated_padded));   \
  m.impl("nms_quadri", TORCH_BOX(&Device::nms_quadri));                   \
  m.impl("nms_quadri_padded", TORCH_BOX(&Device::nms_quadri_padded));     \
  m.impl("nms3d", TORCH_BOX(&Device::nms3d));                             \
  m.impl("nms3d_padded", TORCH_BOX(&Device::nms3d_padded));               \
  m.impl("nms3d_normal", TORCH_BOX(&Device::nms3d_normal));               \
  m.impl("nms3d_normal_padded", TORCH_BOX(&Device::nms3d_normal_padded)); \
  m.impl("line_nms", TORCH_BOX(&Device::line_nms));                       \
  m.impl("line_nms_padded", TORCH_BOX(&Device::line_nms_padded));         \
  m.impl("_nms_by_peer", TORCH_BOX(&Device::nms_by_peer));                \
  m.impl("nms_groups", TORCH_BOX(&Device::nms_groups));                   \
  m.impl("line_nms_groups", TORCH_BOX(&Device::line_nms_groups))

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "nms(Tensor boxes, Tensor scores, float iou_threshold, float offset=0., "
      "float? score_threshold=None, int? max_output=None) -> Tensor");
  m.def(
      "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, "
      "float offset=0., float? score_threshold=None, int? max_output=None) -> Tensor");
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, float iou_threshold, int max_output, "
      "Tensor? idxs=None, float offset=0., float? score_threshold=None) -> (Tensor, Tensor)");
  m.def(
      "nms_rotated(Tensor boxes, Tensor scores, float iou_threshold, Tensor? labels=None, "
      "bool clockwise=True) -> Tensor");
  m.def(
      "nms_rotated_padded(Tensor boxes, Tensor scores, float iou_threshold, int max_output, "
      "Tensor? labels=None, bool clockwise=True) -> (Tensor, Tensor)");
  for (const char* name : {"nms_quadri", "nms3d", "nms3d_normal"}) {
    const std::string start = std::string(name);
    const std::string inputs = "(Tensor boxes, Tensor scores, float iou_threshold, ";
    m.def((start + inputs + "Tensor? labels=None) -> Tensor").c_str());
    m.def((start + "_padded" + inputs + "int max_output, Tensor? labels=None) -> (Tensor, Tensor)")
              .c_str());
  }
  m.def("line_nms(Tensor boxes, Tensor scores, float distance, Tensor? labels=None) -> Tensor");
  m.def(
      "line_nms_padded(Tensor boxes, Tensor scores, float distance, int max_output, "
      "Tensor? labels=None) -> (Tensor, Tensor)");
  m.def(
      "_nms_by_peer(Tensor boxes, Tensor scores, float iou_threshold, int form, "
      "Tensor? labels=None) -> Tensor");
  m.def("nms_groups(Tensor boxes, Tensor scores, float iou_threshold) -> (Tensor, Tensor, Tensor)");
  m.def("line_nms_groups(Tensor boxes, Tensor scores, float distance) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) { TORCHKILN_NMS_IMPL(m, OnCuda); }
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) { TORCHKILN_NMS_IMPL(m, OnCpu); }
