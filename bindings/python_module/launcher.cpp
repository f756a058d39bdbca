// A call of a user's kernel: checks what it is given, packs it, launches. Nothing is allocated on the way, and Python runs
// only where a geometry is asked for the first time. By hand over CPython's interface: a binding library would make a
// tuple of the arguments and references to each tensor, which costs more than the launch.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/python_module/launcher.h"

#include <structmember.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>

#include "bindings/python_module/declared.h"
#include "bindings/python_module/gil.h"
#include "bindings/python_module/tensor.h"

namespace py = pybind11;

namespace torchkiln::python {
namespace {

struct Launcher {
  PyObject_HEAD vectorcallfunc call;
  const Declared* declared;
};

// ---- memory for the engine ---------------------------------------------------------------------------------------

// (bytes, device) -> (owner, address), in Python.
PyObject* allocate_function = nullptr;

void* allocate(void* context, std::uint64_t bytes, void** owner) {
  const py::gil_scoped_acquire lock;
  const auto device = static_cast<long>(reinterpret_cast<std::intptr_t>(context));
  PyObject* pair = PyObject_CallFunction(allocate_function, "Kl",
                                         static_cast<unsigned long long>(bytes), device);  // NOLINT
  PyObject* object = nullptr;
  unsigned long long address = 0;  // NOLINT: PyArg_ParseTuple's
  const bool ok = pair != nullptr && PyArg_ParseTuple(pair, "OK", &object, &address);
  if (ok) *owner = Py_NewRef(object);
  Py_XDECREF(pair);
  PyErr_Clear();  // the engine takes it for no memory, and says so
  return ok ? reinterpret_cast<void*>(address) : nullptr;
}

void release(void*, void* owner) {
  const py::gil_scoped_acquire lock;
  Py_DECREF(static_cast<PyObject*>(owner));
}

const torchkiln_allocator* allocator_for(std::int32_t device) {
  static const auto table = [] {
    std::array<torchkiln_allocator, 64> result{};
    for (std::size_t i = 0; i < result.size(); ++i)
      result.at(i) = {&allocate, &release, reinterpret_cast<void*>(i)};
    return result;
  }();
  const auto index = static_cast<std::size_t>(device);
  return allocate_function != nullptr && index < table.size() ? &table.at(index) : nullptr;
}

// ---- one call ----------------------------------------------------------------------------------------------------

class Call {
 public:
  explicit Call(const Declared& declared) : d_(declared) {}

  // Each step: false with a Python error.
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

  bool fail(PyObject* kind, const char* argument, const std::string& rule_and_value) const {
    PyErr_Format(kind, "%s: %s %s", d_.name.c_str(), argument, rule_and_value.c_str());
    return false;
  }
  // The type's name for people: "must be an int; got str".
  static std::string got(PyObject* value) {
    return std::string("; got ") + Py_TYPE(value)->tp_name;
  }

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

std::string names_of(const Declared& d) {
  std::string list;
  for (const Argument& a : d.arguments) list += (list.empty() ? "" : ", ") + std::string(a.text());
  for (const Static& s : d.statics) list += std::string(", ") + s.text();
  return list;
}

bool same_text(PyObject* a, PyObject* b) { return a == b || PyUnicode_Compare(a, b) == 0; }

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

// ---- numbers -----------------------------------------------------------------------------------------------------

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

// ---- the launch --------------------------------------------------------------------------------------------------

bool Call::run() {
  void* stream = nullptr;
  if (table_->current_stream(kDlCuda, device_, &stream) != 0) return false;
  const torchkiln_launch launch = {.struct_size = sizeof(torchkiln_launch),
                                   .device = device_,
                                   .stream = stream,
                                   .statics = statics_.data(),
                                   .sizes = sizes_.data(),
                                   .args = packed_.data(),
                                   .buffers = buffers_.data(),
                                   .n_buffers = n_buffers_,
                                   .allocator = allocator_for(device_)};
  // A launch waits where the queue of the stream is full, and the first one compiles.
  PyThreadState* const thread = PyEval_SaveThread();
  const std::int32_t status = torchkiln_run(d_.kernel, &launch);
  take_lock_again(thread);
  if (raise_kept_error()) return false;
  if (status == 0) return true;
  raise_engine_error();
  return false;
}

PyObject* launch(PyObject* self, PyObject* const* args, std::size_t flagged, PyObject* names) try {
  Call call(*reinterpret_cast<Launcher*>(self)->declared);
  const auto n_args = static_cast<std::size_t>(PyVectorcall_NARGS(flagged));
  if (!call.sort(args, n_args, names) || !call.pack() || !call.bind_rest() || !call.run())
    return nullptr;
  Py_RETURN_NONE;
} catch (py::error_already_set& error) {  // a __str__ or a __name__ that raises
  error.restore();
  return nullptr;
} catch (const std::exception& error) {
  PyErr_SetString(PyExc_RuntimeError, error.what());
  return nullptr;
}

// ---- the type ----------------------------------------------------------------------------------------------------

int init(PyObject* object, PyObject* args, PyObject* keywords) try {
  PyObject* spec = nullptr;
  std::array<char, 5> word = {"spec"};
  std::array<char*, 2> names = {word.data(), nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!", names.data(), &PyDict_Type, &spec))
    return -1;
  auto* self = reinterpret_cast<Launcher*>(object);
  self->declared =
      new Declared(py::reinterpret_borrow<py::dict>(spec));  // for good: the engine keeps it
  self->call = &launch;
  // Before 3.12 a class made in Python does not inherit the quick way to call it.
  PyTypeObject* type = Py_TYPE(object);
  if (type->tp_call == &PyVectorcall_Call) type->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL;
  return 0;
} catch (py::error_already_set& error) {
  error.restore();
  return -1;
} catch (const std::exception& error) {
  PyErr_SetString(PyExc_RuntimeError, error.what());
  return -1;
}

std::array<PyMemberDef, 2> members = {
    {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Launcher, call), READONLY, nullptr}, {}}};

std::array<PyType_Slot, 5> slots = {
    {{Py_tp_doc, const_cast<char*>("A declared kernel; a call launches it. See torchkiln.Kernel.")},
     {Py_tp_init, reinterpret_cast<void*>(&init)},
     {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
     {Py_tp_members, members.data()},
     {0, nullptr}}};

PyType_Spec type_spec = {
    .name = "torchkiln._control.Launcher",
    .basicsize = sizeof(Launcher),
    .itemsize = 0,
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = slots.data()};

}  // namespace

void add_launcher(py::module_& module) {
  module.attr("Launcher") = py::reinterpret_steal<py::object>(PyType_FromSpec(&type_spec));
  py::tuple dtypes(kDtypeNames.size());
  for (std::size_t i = 0; i < kDtypeNames.size(); ++i) dtypes[i] = py::str(kDtypeNames.at(i));
  module.attr("DTYPES") = dtypes;
  module.def(
      "set_allocator",
      [](const py::function& function) {
        allocate_function = py::object(function).release().ptr();
      },
      py::arg("function"),
      "Sets what gives memory for tuning: (bytes, device) -> (owner, address).");
}

}  // namespace torchkiln::python
