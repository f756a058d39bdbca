// The launch of the copy between memory layouts.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/layout_copy.h"

#include <cstddef>

#include "detection/layout_copy.h"

namespace torchkiln::bindings {
namespace {

using layout_copy::Args;
using layout_copy::kSide;

struct Statics {
  std::int64_t from, to, vector;
};
struct Sizes {
  std::int64_t matrices, rows, columns;
};
struct Tunables {
  std::int64_t block_size;
};
using Transpose = Kernel<Args, Statics, Sizes, Tunables>;

const std::vector<std::int64_t> kTypes = {TORCHKILN_FLOAT, TORCHKILN_HALF, TORCHKILN_BFLOAT16,
                                          TORCHKILN_DOUBLE, TORCHKILN_I32};

bool is_half_type(std::int64_t type) {
  return type == TORCHKILN_HALF || type == TORCHKILN_BFLOAT16;
}

const Transpose transpose_kernel({
    .path = "detection/layout_copy.cuh",
    .entry = "transpose",
    .operators = {"bezier_align", "border_align", "multi_scale_roi_align", "prroi_pool",
                  "ps_roi_align", "ps_roi_pool", "riroi_align_rotated", "roi_align",
                  "roi_align_rotated", "rotated_feature_align"},
    .statics = {types("from", kTypes), types("to", kTypes), ints("vector", {1, 2})},
    .sizes = {{"matrices", TORCHKILN_BUCKET_NONE},
              {"rows", TORCHKILN_BUCKET_POW2},
              {"columns", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {128, 256, 512})},
    .defaults = {{256}},
    .valid =
        [](const Statics& s) {
          return (s.from == s.to || (s.from == TORCHKILN_FLOAT && is_half_type(s.to))) &&
                 (s.vector == 1 || is_half_type(s.to));
        },
    .geometry =
        [](const Transpose::Problem& p, const Tunables& t) {
          const Sizes& s = p.sizes;
          return linear(s.matrices * ceil_div(s.rows, kSide) * ceil_div(s.columns, kSide),
                        t.block_size);
        },
});

std::int64_t type_of(ScalarType dtype) {
  return dtype == ScalarType::Int ? std::int64_t{TORCHKILN_I32} : kernel_type(dtype);
}

}  // namespace

void copy_layout(const CudaPlace& place, const Tensor& from, const Tensor& to) {
  const bool to_last = has_layout(to, true);
  const std::int64_t pixels = to.size(2) * to.size(3), channels = to.size(1);
  const Args args = {.from = from.const_data_ptr(),
                     .to = to.mutable_data_ptr(),
                     .matrices = to.size(0),
                     .rows = to_last ? channels : pixels,
                     .columns = to_last ? pixels : channels};
  const std::int64_t type = type_of(to.scalar_type());
  const bool even = args.rows % 2 == 0 && args.columns % 2 == 0;
  // Halves by the word.
  const std::int64_t vector = is_half_type(type) && even && aligned_to_16(args.from) ? 2 : 1;
  transpose_kernel.run(place, {type_of(from.scalar_type()), type, vector},
                       {args.matrices, args.rows, args.columns}, args,
                       {reads(offsetof(Args, from), from), writes(offsetof(Args, to), to)});
}

Tensor as_layout(const CudaPlace& place, const Tensor& tensor, bool channels_last,
                 ScalarType dtype) {
  const ScalarType own = tensor.scalar_type();
  if (own == dtype && has_layout(tensor, channels_last)) return tensor;
  Tensor copy =
      empty_layout(tensor, dtype, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)},
                   channels_last);
  const bool converts = own == dtype || (own == ScalarType::Float && is_half_type(type_of(dtype)));
  if (converts && has_layout(tensor, !channels_last) && tensor.numel() > 0) {
    copy_layout(place, tensor, copy);
  } else {
    torch::stable::copy_(copy, tensor);
  }
  return copy;
}

Tensor as_layout(const CudaPlace& place, const Tensor& tensor, bool channels_last) {
  return as_layout(place, tensor, channels_last, tensor.scalar_type());
}

}  // namespace torchkiln::bindings
