// The type: a call runs through Call's steps. By hand over CPython's interface: a binding library would make a tuple of the
// arguments and references to each tensor, which costs more than the launch.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/python_module/launcher.h"

#include <structmember.h>

#include <array>
#include <cstddef>

#include "bindings/python_module/call.h"
#include "bindings/python_module/gil.h"

namespace py = pybind11;

namespace torchkiln::python {
namespace {

struct Launcher {
  PyObject_HEAD vectorcallfunc call;
  const Declared* declared;
};

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

}  // namespace

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

namespace {

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
