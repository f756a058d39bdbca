// Argument checks of operators.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/support/check.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace torchkiln::bindings {

void fail(torchkiln_error_kind kind, const char* op, const char* argument, const std::string& rule,
          const std::string& got, const std::string& way_out) {
  std::string message = std::string(op) + ": " + argument + " must " + rule + "; got " + got;
  if (!way_out.empty()) message += ". " + way_out;
  torchkiln_set_error(kind, argument, message.c_str());
  throw std::runtime_error(message);
}

void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  if (is_floating(tensor.scalar_type())) return;
  fail(TORCHKILN_ERROR_TYPE, op, argument, "be a floating-point tensor", text(tensor.scalar_type()),
       std::string("Convert it with ") + argument + ".float()");
}

void check_rows(const char* op, const char* argument, const Tensor& tensor, std::int64_t columns) {
  check_floating(op, argument, tensor);
  if (tensor.dim() == 2 && tensor.size(1) == columns) return;
  fail(TORCHKILN_ERROR_VALUE, op, argument, "have shape (N, " + std::to_string(columns) + ")",
       text(tensor));
}

void check_dim(const char* op, const char* argument, const Tensor& tensor, std::int64_t dim,
               const char* shape) {
  if (tensor.dim() == dim) return;
  fail(TORCHKILN_ERROR_VALUE, op, argument, std::string("have shape ") + shape, text(tensor));
}

void check_same_dtype(const char* op, const char* argument, const Tensor& tensor,
                      const char* other_name, const Tensor& other) {
  if (tensor.scalar_type() == other.scalar_type()) return;
  fail(TORCHKILN_ERROR_TYPE, op, argument,
       std::string("have the dtype of ") + other_name + " (" + text(other.scalar_type()) + ")",
       text(tensor.scalar_type()));
}

void check_same_device(const char* op, const char* argument, const Tensor& tensor,
                       const char* other_name, const Tensor& other) {
  if (tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index())
    return;
  fail(TORCHKILN_ERROR_VALUE, op, argument,
       std::string("be on the device of ") + other_name + " (" + device_text(other) + ")",
       device_text(tensor));
}

void check_shape(const char* op, const char* argument, const Tensor& tensor,
                 std::initializer_list<std::int64_t> shape) {
  const Shape got = shape_of(tensor);
  if (std::equal(got.begin(), got.end(), shape.begin(), shape.end())) return;
  std::string wanted = "(";
  for (const std::int64_t size : shape)
    wanted += (wanted.size() > 1 ? ", " : "") + std::to_string(size);
  fail(TORCHKILN_ERROR_VALUE, op, argument,
       "have shape " + wanted + (shape.size() == 1 ? ",)" : ")"), text(tensor));
}

void check_positive(const char* op, const char* argument, std::int64_t value) {
  if (value > 0) return;
  fail(TORCHKILN_ERROR_VALUE, op, argument, "be at least 1", std::to_string(value));
}

void check_not_nan(const char* op, const char* argument, double value) {
  if (!std::isnan(value)) return;
  fail(TORCHKILN_ERROR_VALUE, op, argument, "be a number", "nan");
}

}  // namespace torchkiln::bindings
