// One call of a declared kernel: what was given is checked, packed and launched. Nothing is allocated on the way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Python.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "bindings/python_module/declared.h"
#include "bindings/python_module/tensor.h"

namespace torchkiln::python {

// The type's name for people: "must be an int; got str".
inline std::string got(PyObject* value) { return std::string("; got ") + Py_TYPE(value)->tp_name; }

// The steps in order; each returns false with a Python error. Used once, with the interpreter's lock.
class Call {
 public:
  explicit Call(const Declared& declared) : d_(declared) {}

  bool sort(PyObject* const* args, std::size_t n_args, PyObject* names);
  bool pack();
  bool bind_rest();
  bool run();

 private:
  bool take(PyObject* name, PyObject* value);
  bool bind(std::size_t index, PyObject* value);
  bool pack_tensor(const Argument& argument, PyObject* value);
  bool check_device(const Argument& argument, const DlTensor& tensor);
  bool check_type(const Argument& argument, PyObject* value, const DlTensor& tensor);
  bool pack_number(const Argument& argument, PyObject* value);
  bool integer(const Argument& argument, PyObject* value, std::int64_t& out);
  bool floating(const Argument& argument, PyObject* value);

  bool fail(PyObject* kind, const char* argument, const std::string& rule_and_value) const;
  template <class T>
  void put(const Argument& argument, T value) {
    std::memcpy(packed_.data() + argument.offset, &value, sizeof(value));
  }

  const Declared& d_;
  std::array<PyObject*, kMaxArguments> given_{};
  alignas(16) std::array<std::byte, kMaxArguments * 8> packed_;
  std::array<torchkiln_buffer, kMaxArguments> buffers_;
  std::uint32_t n_buffers_ = 0;
  std::array<std::int64_t, TORCHKILN_MAX_PARAMS> statics_;
  // The argument that gave a static's value; its own name where a keyword did.
  std::array<PyObject*, TORCHKILN_MAX_PARAMS> bound_by_{};
  std::array<std::int64_t, TORCHKILN_MAX_SIZES> sizes_;
  const DlExchange* table_ = nullptr;
  const Argument* first_tensor_ = nullptr;
  std::int32_t device_ = 0;
};

}  // namespace torchkiln::python
