// Sorting what was given to a call, binding template parameters, reading tensors.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/python_module/call.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>

namespace py = pybind11;

namespace torchkiln::python {
namespace {

std::string names_of(const Declared& d) {
  std::string list;
  for (const Argument& a : d.arguments) list += (list.empty() ? "" : ", ") + std::string(a.text());
  for (const Static& s : d.statics) list += std::string(", ") + s.text();
  return list;
}

bool same_text(PyObject* a, PyObject* b) { return a == b || PyUnicode_Compare(a, b) == 0; }

std::string device_text(DlDevice device) {
  if (device.type == kDlCpu) return "cpu";
  const std::string number = std::to_string(device.id);
  if (device.type == kDlCuda) return "cuda:" + number;
  return "device " + number + " of DLPack type " + std::to_string(device.type);
}

std::string tuple_text(const std::int64_t* values, std::int32_t count) {
  std::string text = "(";
  for (std::int32_t i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return text + (count == 1 ? ",)" : ")");
}

// torch.float8_e5m2, which no kernel takes, has a name only in torch.
std::string dtype_text(PyObject* value, int type) {
  if (type >= 0) return kDtypeNames.at(static_cast<std::size_t>(type));
  try {
    const auto text = py::str(py::handle(value).attr("dtype")).cast<std::string>();
    return text.starts_with("torch.") ? text.substr(6) : text;
  } catch (py::error_already_set&) {
    return "another one";
  }
}

}  // namespace

bool Call::fail(PyObject* kind, const char* argument, const std::string& rule_and_value) const {
  PyErr_Format(kind, "%s: %s %s", d_.name.c_str(), argument, rule_and_value.c_str());
  return false;
}

// Arguments by position, then by name; static parameters by name.
bool Call::sort(PyObject* const* args, std::size_t n_args, PyObject* names) {
  if (n_args > d_.arguments.size()) {
    const std::string most = std::to_string(d_.arguments.size());
    return fail(PyExc_TypeError, "args",
                "must be at most " + most + " by position (" + names_of(d_) +
                    "; template parameters by keyword); got " + std::to_string(n_args));
  }
  std::copy_n(args, n_args, given_.begin());
  const Py_ssize_t n_names = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  for (Py_ssize_t i = 0; i < n_names; ++i) {
    if (!take(PyTuple_GET_ITEM(names, i), args[static_cast<Py_ssize_t>(n_args) + i])) return false;
  }
  for (std::size_t i = 0; i < d_.arguments.size(); ++i) {
    if (given_.at(i) == nullptr)
      return fail(PyExc_TypeError, d_.arguments[i].text(), "must be given; got no value for it");
  }
  return true;
}

bool Call::take(PyObject* name, PyObject* value) {
  for (std::size_t i = 0; i < d_.statics.size(); ++i) {
    if (same_text(d_.statics[i].name, name)) return bind(i, value);
  }
  for (std::size_t i = 0; i < d_.arguments.size(); ++i) {
    if (!same_text(d_.arguments[i].name, name)) continue;
    if (given_.at(i) != nullptr)
      return fail(PyExc_TypeError, d_.arguments[i].text(), "must be given once; got two values");
    given_.at(i) = value;
    return true;
  }
  return fail(PyExc_TypeError, "keywords",
              "must be among " + names_of(d_) + "; got " + PyUnicode_AsUTF8(name));
}

// The value of a static parameter by keyword.
bool Call::bind(std::size_t index, PyObject* value) {
  const Static& s = d_.statics[index];
  std::int64_t number = 0;
  if (s.kind == TORCHKILN_PARAM_TYPE) {
    PyObject* known = PyDict_GetItemWithError(d_.dtypes, value);
    if (known == nullptr) {
      if (PyErr_Occurred() != nullptr) PyErr_Clear();  // no key of any dict
      return fail(PyExc_TypeError, s.text(), "must be a dtype that kernels know" + got(value));
    }
    number = PyLong_AsLongLong(known);
  } else if (s.kind == TORCHKILN_PARAM_BOOL) {
    if (!PyBool_Check(value)) return fail(PyExc_TypeError, s.text(), "must be a bool" + got(value));
    number = value == Py_True ? 1 : 0;
  } else {
    if (!PyLong_Check(value)) return fail(PyExc_TypeError, s.text(), "must be an int" + got(value));
    int overflow = 0;
    number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) number = std::numeric_limits<std::int64_t>::min();
  }
  const auto& values = s.values;
  if (std::find(values.begin(), values.end(), number) == values.end()) {
    std::string list;
    for (const std::int64_t v : values) {
      list += list.empty() ? "" : ", ";
      if (s.kind == TORCHKILN_PARAM_TYPE) list += kDtypeNames.at(static_cast<std::size_t>(v));
      if (s.kind == TORCHKILN_PARAM_BOOL) list += v != 0 ? "True" : "False";
      if (s.kind == TORCHKILN_PARAM_INT) list += std::to_string(v);
    }
    const std::string text = py::str(value).cast<std::string>();
    return fail(PyExc_ValueError, s.text(),
                "must be among " + list + "; got " + text + ". Add it to template");
  }
  statics_.at(index) = number;
  bound_by_.at(index) = s.name;
  return true;
}

// What neither a tensor nor a keyword has given.
bool Call::bind_rest() {
  for (std::size_t i = 0; i < d_.statics.size(); ++i) {
    const Static& s = d_.statics[i];
    if (bound_by_.at(i) != nullptr) continue;
    if (s.values.size() != 1)
      return fail(PyExc_TypeError, s.text(), "must be given by keyword; got no value for it");
    statics_.at(i) = s.values.front();
  }
  return true;
}

bool Call::pack() {
  for (std::size_t i = 0; i < d_.arguments.size(); ++i) {
    const Argument& argument = d_.arguments[i];
    PyObject* value = given_.at(i);
    if (!(argument.is_tensor() ? pack_tensor(argument, value) : pack_number(argument, value)))
      return false;
  }
  return true;
}

// ---- tensors -----------------------------------------------------------------------------------------------------

bool Call::pack_tensor(const Argument& argument, PyObject* value) {
  const Lender* lender = lender_of(value);
  if (lender == nullptr) {
    if (PyErr_Occurred() != nullptr) return false;
    return fail(PyExc_TypeError, argument.text(), "must be a tensor" + got(value));
  }
  if (lender->table == nullptr) {
    return fail(PyExc_TypeError, argument.text(),
                "must be a tensor with memory of its own" + got(value) +
                    ". Call the kernel inside of an operator: torchkiln.library.op");
  }
  DlTensor tensor{};
  if (lender->table->read(value, &tensor) != 0) {
    py::error_already_set why;
    return fail(
        PyExc_ValueError, argument.text(),
        std::string("must be a dense tensor; got one of which its library says: ") + why.what());
  }
  if (!check_device(argument, tensor) || !check_type(argument, value, tensor)) return false;
  if (!is_contiguous(tensor)) {
    return fail(PyExc_ValueError, argument.text(),
                "must be contiguous; got shape " + tuple_text(tensor.shape, tensor.ndim) +
                    " with strides " + tuple_text(tensor.strides, tensor.ndim) +
                    ". Call .contiguous(), or pass the view that is");
  }
  table_ = lender->table;
  put(argument, static_cast<std::byte*>(tensor.data) + tensor.byte_offset);
  const std::int64_t type = argument.type_param < 0
                                ? argument.type
                                : statics_.at(static_cast<std::size_t>(argument.type_param));
  const bool is_float = type <= TORCHKILN_DOUBLE;
  buffers_.at(n_buffers_++) = {
      .offset = argument.offset,
      .access = static_cast<std::int16_t>(argument.kind == Kind::kIn    ? TORCHKILN_READ
                                          : argument.kind == Kind::kOut ? TORCHKILN_WRITE
                                                                        : TORCHKILN_READ_WRITE),
      .type = static_cast<std::int16_t>(is_float ? type : std::int64_t{TORCHKILN_BYTES}),
      .bytes = bytes_of(tensor)};
  return true;
}

bool Call::check_device(const Argument& argument, const DlTensor& tensor) {
  const DlDevice device = tensor.device;
  if (device.type != kDlCuda) {
    return fail(PyExc_ValueError, argument.text(),
                "must be on a CUDA device; got " + device_text(device) +
                    ". torchkiln.library.op gives other devices a function of their own");
  }
  if (first_tensor_ == nullptr) {
    first_tensor_ = &argument;
    device_ = device.id;
    return true;
  }
  if (device.id == device_) return true;
  return fail(PyExc_ValueError, argument.text(),
              std::string("must be on the device of ") + first_tensor_->text() + " (" +
                  device_text({kDlCuda, device_}) + "); got " + device_text(device));
}

// A tensor of a template type binds it; those after it must agree.
bool Call::check_type(const Argument& argument, PyObject* value, const DlTensor& tensor) {
  const int type = type_of(tensor.dtype);
  if (argument.type_param < 0) {
    if (type == argument.type) return true;
    return fail(PyExc_TypeError, argument.text(),
                std::string("must be ") + kDtypeNames.at(static_cast<std::size_t>(argument.type)) +
                    "; got " + dtype_text(value, type));
  }
  const auto index = static_cast<std::size_t>(argument.type_param);
  if (PyObject* by = bound_by_.at(index)) {
    const std::int64_t bound = statics_.at(index);
    if (type == bound) return true;
    return fail(PyExc_TypeError, argument.text(),
                std::string("must have the dtype of ") + PyUnicode_AsUTF8(by) + " (" +
                    kDtypeNames.at(static_cast<std::size_t>(bound)) + "); got " +
                    dtype_text(value, type));
  }
  const auto& values = d_.statics[index].values;
  if (std::find(values.begin(), values.end(), type) == values.end()) {
    std::string list;
    for (const std::int64_t v : values)
      list += (list.empty() ? "" : ", ") + std::string(kDtypeNames.at(static_cast<std::size_t>(v)));
    return fail(PyExc_TypeError, argument.text(),
                "must be of " + list + "; got " + dtype_text(value, type));
  }
  statics_.at(index) = type;
  bound_by_.at(index) = argument.name;
  return true;
}

}  // namespace torchkiln::python
