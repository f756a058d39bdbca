// What the CUDA and the CPU half of the nms family share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/tensor.h"
#include "detection/nms.h"

namespace torchkiln::bindings {

// Rows are numbered with 32 bits in the kernels.
inline constexpr std::int64_t kMaxBoxes = std::int64_t{1} << 30;

// What the rows of `boxes` are. (nms_shapes.h has the other kinds.)
inline constexpr std::int64_t kBoxKind = -1;
struct BoxForm {
  std::int64_t kind, columns;
  const char* classes;  // names of arguments
  const char* threshold = "iou_threshold";
};
inline constexpr BoxForm kCorners = {kBoxKind, 4, "idxs"};

// The arguments that are inputs, and the tensors that keep their pointers alive.
struct NmsPlan {
  const char* op;
  Tensor boxes, scores, idxs;
  std::int64_t kind;
  nms::Args args;
};

NmsPlan plan_nms(const char* op, const Tensor& boxes, const Tensor& scores,
                 const std::optional<Tensor>& classes, double iou_threshold,
                 const BoxForm& form = kCorners);
// Size of one class; fails unless it is an integer.
std::int64_t class_bytes(const char* op, const char* argument, const Tensor& idxs);
void check_offset(const char* op, double offset);
void check_max_output(const char* op, std::int64_t max_output);
// The same where the result is as long, whatever the number of boxes is.
void check_padded_output(const char* op, std::int64_t max_output);

// Boxes on the device in the order of suppression: arguments for the kernels that follow, and the memory behind them.
struct Ordered {
  Tensor workspace;
  nms::Args args;
};
// Launches that put boxes in order and fill `indices` with -1; `count` is only noted in the arguments.
Ordered order(const CudaPlace& cuda_place, const NmsPlan& p, const Tensor& indices,
              std::int64_t* count);

// Launches that follow: results go to what `order` was given.
void suppress(const CudaPlace& cuda_place, const NmsPlan& p, const Ordered& ordered);

// Rows of the kept boxes, as many as there are but no more than `max_output`; or so many, padded, and their number.
struct Padded {
  Tensor indices, count;
};
Tensor sized_cuda(const NmsPlan& p, std::int64_t max_output);
Padded padded_cuda(const NmsPlan& p, std::int64_t max_output);
Tensor sized_cpu(const NmsPlan& p, std::int64_t max_output);
Padded padded_cpu(const NmsPlan& p, std::int64_t max_output);

// Every row by descending score, the number of its group, and how many groups there are.
struct Groups {
  Tensor rows, groups, count;
};
Groups groups_cuda(const NmsPlan& p);
Groups groups_cpu(const NmsPlan& p);

// A number in page-locked memory that the device writes directly: no copy is queued to read a result's size.
std::int64_t* host_number();

// The classes of the CPU version, as ranges of `rows`, which is sorted by class and keeps its order inside each.
std::vector<std::span<const std::int64_t>> split(const nms::Args& args,
                                                 std::vector<std::int64_t>& rows);

}  // namespace torchkiln::bindings
