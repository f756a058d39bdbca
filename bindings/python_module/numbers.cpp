// Numbers among the arguments of a call: their types and ranges.
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <limits>

#include "bindings/python_module/call.h"

namespace py = pybind11;

namespace torchkiln::python {
namespace {

struct Range {
  std::int64_t least, most;
};

Range range_of(std::int32_t type) {
  switch (type) {
    case TORCHKILN_I8:
      return {-128, 127};
    case TORCHKILN_U8:
      return {0, 255};
    case TORCHKILN_I16:
      return {-32'768, 32'767};
    case TORCHKILN_U16:
      return {0, 65'535};
    case TORCHKILN_I32:
      return {-2'147'483'648, 2'147'483'647};
    case TORCHKILN_U32:
      return {0, 4'294'967'295};
    case TORCHKILN_U64:  // values beyond are of no use to sizes, and seldom to others
      return {0, std::numeric_limits<std::int64_t>::max()};
    default:
      return {std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max()};
  }
}

}  // namespace

bool Call::pack_number(const Argument& argument, PyObject* value) {
  if (argument.type == TORCHKILN_FLOAT || argument.type == TORCHKILN_DOUBLE)
    return floating(argument, value);
  if (argument.type == TORCHKILN_BOOL) {
    if (!PyBool_Check(value))
      return fail(PyExc_TypeError, argument.text(), "must be a bool" + got(value));
    put(argument, static_cast<std::uint8_t>(value == Py_True));
    return true;
  }
  std::int64_t number = 0;
  if (!integer(argument, value, number)) return false;
  if (argument.kind == Kind::kSize) sizes_.at(argument.size_index) = number;
  switch (argument.type) {
    case TORCHKILN_I64:
    case TORCHKILN_U64:
      put(argument, number);
      break;
    case TORCHKILN_I32:
    case TORCHKILN_U32:
      put(argument, static_cast<std::int32_t>(number));
      break;
    case TORCHKILN_I16:
    case TORCHKILN_U16:
      put(argument, static_cast<std::int16_t>(number));
      break;
    default:
      put(argument, static_cast<std::int8_t>(number));
  }
  return true;
}

bool Call::integer(const Argument& argument, PyObject* value, std::int64_t& out) {
  PyObject* index = nullptr;
  if (PyLong_Check(value)) {
    index = Py_NewRef(value);
  } else if (lender_of(value) == nullptr && PyIndex_Check(value)) {  // of NumPy, for one
    index = PyNumber_Index(value);
  }
  if (index == nullptr) {
    PyErr_Clear();
    return fail(PyExc_TypeError, argument.text(), "must be an int" + got(value));
  }
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(index, &overflow);
  Py_DECREF(index);
  const Range range = range_of(argument.type);
  if (overflow == 0 && out >= range.least && out <= range.most) return true;
  return fail(PyExc_ValueError, argument.text(),
              "must be from " + std::to_string(range.least) + " to " + std::to_string(range.most) +
                  "; got " + py::str(value).cast<std::string>());
}

bool Call::floating(const Argument& argument, PyObject* value) {
  double number = 0;
  if (PyFloat_CheckExact(value)) {
    number = PyFloat_AS_DOUBLE(value);
  } else {
    // A tensor's value would have to be waited for.
    const bool is_number =
        lender_of(value) == nullptr && (PyFloat_Check(value) || PyNumber_Check(value) != 0);
    if (is_number) number = PyFloat_AsDouble(value);
    if (!is_number || PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return fail(PyExc_TypeError, argument.text(), "must be a float" + got(value));
    }
  }
  if (argument.type == TORCHKILN_DOUBLE) {
    put(argument, number);
    return true;
  }
  const double magnitude = number < 0 ? -number : number;
  if (magnitude > std::numeric_limits<float>::max() &&
      magnitude < std::numeric_limits<double>::infinity()) {
    return fail(PyExc_ValueError, argument.text(),
                "must be in the range of float; got " + py::str(value).cast<std::string>());
  }
  put(argument, static_cast<float>(number));
  return true;
}

}  // namespace torchkiln::python
