// Declarations made by Python.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/python_module/declared.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <utility>

namespace py = pybind11;

namespace torchkiln::python {
namespace {

thread_local PyObject* kept_error = nullptr;

void keep_error() {
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback != nullptr) PyException_SetTraceback(value, traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  if (kept_error == nullptr) {
    kept_error = value;
  } else {
    Py_XDECREF(value);
  }
}

// A geometry that was asked for before. Python's `grid` costs microseconds, and sizes seldom change.
struct Remembered {
  const Declared* of = nullptr;
  const torchkiln_device* device = nullptr;
  std::array<std::int64_t, TORCHKILN_MAX_PARAMS + TORCHKILN_MAX_SIZES> values{};
  torchkiln_geometry geometry{};
};

// By thread, so that nothing is shared and nothing locked.
Remembered& remembered(std::uint64_t hash) {
  constexpr std::size_t kSlots = 256;
  thread_local std::unique_ptr<std::array<Remembered, kSlots>> slots;
  if (!slots) slots = std::make_unique<std::array<Remembered, kSlots>>();
  return (*slots)[hash % kSlots];
}

std::uint32_t size_of(std::int32_t type) {
  switch (type) {
    case TORCHKILN_DOUBLE:
    case TORCHKILN_I64:
    case TORCHKILN_U64:
      return 8;
    case TORCHKILN_I16:
    case TORCHKILN_U16:
      return 2;
    case TORCHKILN_BOOL:
    case TORCHKILN_I8:
    case TORCHKILN_U8:
      return 1;
    default:
      return 4;
  }
}

PyObject* interned(const py::handle& text) {
  PyObject* name = text.cast<py::str>().release().ptr();
  PyUnicode_InternInPlace(&name);
  return name;
}

PyObject* function_or_null(const py::handle& function) {
  return function.is_none() ? nullptr : Py_NewRef(function.ptr());
}

Kind kind_from(const std::string& name) {
  constexpr std::array kNames = {"in", "out", "inout", "size", "value"};
  return static_cast<Kind>(std::find(kNames.begin(), kNames.end(), name) - kNames.begin());
}

}  // namespace

bool raise_kept_error() {
  if (kept_error == nullptr) return false;
  PyObject* error = std::exchange(kept_error, nullptr);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
  Py_DECREF(error);
  return true;
}

void raise_engine_error() {
  try {
    const auto record = py::module_::import("torchkiln._control").attr("last_error")();
    const auto error = py::module_::import("torchkiln.errors").attr("from_record")(record);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  } catch (py::error_already_set& e) {
    e.restore();
  }
}

Declared::Declared(const py::dict& spec) : name(spec["name"].cast<std::string>()) {
  add_params(spec["params"]);
  add_arguments(spec["args"]);
  for (const py::handle row : spec["defaults"]) {
    for (const py::handle value : row) defaults_.push_back(value.cast<std::int64_t>());
  }
  dtypes = Py_NewRef(spec["dtypes"].ptr());
  geometry_ = function_or_null(spec["geometry"]);
  legal_ = function_or_null(spec["legal"]);
  choose_ = function_or_null(spec["choose"]);
  declare(spec);
}

// Rows of name, kind, tunable, values.
void Declared::add_params(const py::list& params) {
  for (const py::handle item : params) {
    const auto row = item.cast<py::tuple>();
    const auto kind = row[1].cast<std::int32_t>();
    const bool tunable = row[2].cast<bool>();
    const auto& values = values_.emplace_back(row[3].cast<std::vector<std::int64_t>>());
    if (!tunable) statics.push_back({interned(row[0]), kind, values});
    params_.push_back({.name = keep(row[0].cast<std::string>()),
                       .kind = kind,
                       .tunable = tunable ? 1 : 0,
                       .values = values.data(),
                       .n_values = static_cast<std::uint32_t>(values.size()),
                       .constant = 0});
  }
}

// Rows of name, kind, type, type_param.
void Declared::add_arguments(const py::list& args) {
  for (const py::handle item : args) {
    const auto row = item.cast<py::tuple>();
    Argument a{.name = interned(row[0]),
               .kind = kind_from(row[1].cast<std::string>()),
               .type = row[2].cast<std::int32_t>(),
               .type_param = row[3].cast<std::int32_t>()};
    const std::uint32_t size = a.is_tensor() ? sizeof(void*) : size_of(a.type);
    a.offset = (args_size_ + size - 1) / size * size;
    args_size_ = a.offset + size;
    a.size_index = static_cast<std::uint32_t>(sizes_.size());
    const char* text = keep(row[0].cast<std::string>());
    if (a.kind == Kind::kSize) sizes_.push_back({text, TORCHKILN_BUCKET_POW2});
    const torchkiln_passing pointer =
        a.kind == Kind::kIn ? TORCHKILN_CONST_POINTER : TORCHKILN_POINTER;
    parameters_.push_back({.name = text,
                           .passing = a.is_tensor() ? pointer : TORCHKILN_VALUE,
                           .type = a.type,
                           .type_param = a.type_param});
    arguments.push_back(a);
  }
}

void Declared::declare(const py::dict& spec) {
  operator_ = name.c_str();
  const py::object module = spec["module"];
  torchkiln_declaration d = {
      .struct_size = sizeof(torchkiln_declaration),
      .path = keep(spec["path"].cast<std::string>()),
      .entry = keep(spec["entry"].cast<std::string>()),
      .operators = &operator_,
      .n_operators = 1,
      .params = params_.data(),
      .n_params = static_cast<std::uint32_t>(params_.size()),
      .sizes = sizes_.data(),
      .n_sizes = static_cast<std::uint32_t>(sizes_.size()),
      .defaults = defaults_.data(),
      .n_defaults = static_cast<std::uint32_t>(spec["defaults"].cast<py::list>().size()),
      .args_size = args_size_,
      .tolerance = spec["tolerance"].cast<double>(),
      .min_architecture = spec["min_architecture"].cast<std::int32_t>(),
      .feature = TORCHKILN_FEATURE_NONE,
      .context = this,
      .valid = nullptr,
      .legal = nullptr,
      .choose = nullptr,
      .geometry =
          [](const torchkiln_problem* p, const std::int64_t* tunables, torchkiln_geometry* out) {
            static_cast<const Declared*>(p->context)->geometry(*p, tunables, *out);
          },
      .arguments = parameters_.data(),
      .n_arguments = static_cast<std::uint32_t>(parameters_.size()),
      .module = module.is_none() ? nullptr : keep(module.cast<std::string>()),
  };
  if (legal_ != nullptr) {
    d.legal = [](const torchkiln_problem* p, const std::int64_t* tunables) {
      const auto* self = static_cast<const Declared*>(p->context);
      return static_cast<std::int32_t>(self->ask(self->legal_, *p, tunables));
    };
  }
  if (choose_ != nullptr) {
    d.choose = [](const torchkiln_problem* p) {
      const auto* self = static_cast<const Declared*>(p->context);
      return static_cast<std::uint32_t>(self->ask(self->choose_, *p, nullptr));
    };
  }
  if (torchkiln_declare(&d, &kernel) != 0) {
    raise_engine_error();
    throw py::error_already_set();
  }
}

// function(values, device) with the values of statics, sizes and tunables (none for choose) in a row. Needs the lock.
PyObject* Declared::call(PyObject* function, const torchkiln_problem& problem,
                         const std::int64_t* tunables) const {
  const std::size_t n_tunables = tunables == nullptr ? 0 : params_.size() - statics.size();
  py::list values;
  for (std::size_t i = 0; i < statics.size(); ++i) values.append(problem.statics[i]);
  for (std::size_t i = 0; i < sizes_.size(); ++i) values.append(problem.sizes[i]);
  for (std::size_t i = 0; i < n_tunables; ++i) values.append(tunables[i]);
  const torchkiln_device& d = *problem.device;
  const py::tuple device =
      py::make_tuple(d.major, d.minor, d.multiprocessors, d.shared_bytes_per_block, d.l2_bytes);
  return PyObject_CallFunctionObjArgs(function, values.ptr(), device.ptr(), nullptr);
}

// 0 when Python's function raises.
std::int64_t Declared::ask(PyObject* function, const torchkiln_problem& problem,
                           const std::int64_t* tunables) const {
  const py::gil_scoped_acquire lock;
  if (kept_error != nullptr) return 0;
  PyObject* reply = call(function, problem, tunables);
  const std::int64_t answer = reply == nullptr ? 0 : PyLong_AsLongLong(reply);
  Py_XDECREF(reply);
  if (PyErr_Occurred() != nullptr) keep_error();
  return kept_error == nullptr ? answer : 0;
}

// A choice serves all sizes of its buckets, and was only asked about at the first of them.
bool Declared::is_still_legal(const torchkiln_problem& problem,
                              const std::int64_t* tunables) const {
  if (legal_ == nullptr || ask(legal_, problem, tunables) != 0) return true;
  if (kept_error != nullptr) return false;
  std::string got;
  for (std::size_t i = 0; i < sizes_.size(); ++i) {
    got +=
        (i == 0 ? "" : ", ") + std::string(sizes_[i].name) + "=" + std::to_string(problem.sizes[i]);
  }
  PyErr_Format(PyExc_ValueError,
               "%s: legal must give one answer for all sizes between two powers of two, because a "
               "choice is remembered for them together; got another one for %s. Make what it tells "
               "sizes apart by a parameter of template",
               name.c_str(), got.c_str());
  keep_error();
  return false;
}

// No blocks, so that nothing is launched, when Python's function raises.
void Declared::geometry(const torchkiln_problem& problem, const std::int64_t* tunables,
                        torchkiln_geometry& out) const {
  decltype(Remembered::values) values{};
  auto* end = std::copy_n(problem.statics, statics.size(), values.data());
  end = std::copy_n(problem.sizes, sizes_.size(), end);
  end = std::copy_n(tunables, params_.size() - statics.size(), end);
  std::uint64_t hash = reinterpret_cast<std::uintptr_t>(this);
  for (const auto* value = values.data(); value != end; ++value)
    hash = (hash ^ static_cast<std::uint64_t>(*value)) * 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
  Remembered& slot = remembered(hash ^ (hash >> 32));
  if (slot.of == this && slot.device == problem.device &&
      std::equal(values.data(), end, slot.values.data())) {
    out = slot.geometry;
    return;
  }
  out = {};
  const py::gil_scoped_acquire lock;
  if (kept_error != nullptr || !is_still_legal(problem, tunables)) return;
  PyObject* reply = call(geometry_, problem, tunables);
  torchkiln_geometry g{};
  const bool ok = reply != nullptr &&
                  PyArg_ParseTuple(reply, "IIIIIII", &g.grid[0], &g.grid[1], &g.grid[2],
                                   &g.block[0], &g.block[1], &g.block[2], &g.dynamic_shared_bytes);
  Py_XDECREF(reply);
  if (!ok) return keep_error();
  out = g;
  slot = {this, problem.device, values, g};
}

}  // namespace torchkiln::python
