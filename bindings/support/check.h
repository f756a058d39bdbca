// Argument checks of operators. Each leaves a record of kind, argument and sentence on this thread and throws; the
// Python function turns the record into TypeError, ValueError or IndexError. Texts are only built on failure.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "bindings/support/tensor.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::bindings {

// Throws "<op>: <argument> must <rule>; got <got>. <way_out>".
[[noreturn]] void fail(torchkiln_error_kind kind, const char* op, const char* argument,
                       const std::string& rule, const std::string& got,
                       const std::string& way_out = "");

void check_floating(const char* op, const char* argument, const Tensor& tensor);
// Float dtype and shape (N, columns).
void check_rows(const char* op, const char* argument, const Tensor& tensor, std::int64_t columns);
void check_dim(const char* op, const char* argument, const Tensor& tensor, std::int64_t dim,
               const char* shape);
void check_same_dtype(const char* op, const char* argument, const Tensor& tensor,
                      const char* other_name, const Tensor& other);
void check_same_device(const char* op, const char* argument, const Tensor& tensor,
                       const char* other_name, const Tensor& other);
void check_shape(const char* op, const char* argument, const Tensor& tensor,
                 std::initializer_list<std::int64_t> shape);
void check_positive(const char* op, const char* argument, std::int64_t value);
// A threshold on an overlap: any number but NaN.
void check_not_nan(const char* op, const char* argument, double value);

}  // namespace torchkiln::bindings
