// The declaration of a kernel that Python wrote, and the engine's way back to Python's functions. It lives as long as the
// process, as the engine asks for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "torchkiln/torchkiln.h"

namespace torchkiln::python {

inline constexpr std::size_t kMaxArguments = 64;

enum class Kind { kIn, kOut, kInOut, kSize, kValue };

struct Argument {
  PyObject* name = nullptr;  // interned
  Kind kind = Kind::kIn;
  std::int32_t type = -1;        // torchkiln_type; -1: that of a static parameter
  std::int32_t type_param = -1;  // its index
  std::uint32_t offset = 0;      // in the packed arguments
  std::uint32_t size_index = 0;  // among the sizes

  bool is_tensor() const { return kind <= Kind::kInOut; }
  const char* text() const { return PyUnicode_AsUTF8(name); }
};

struct Static {
  PyObject* name = nullptr;  // interned
  std::int32_t kind = TORCHKILN_PARAM_INT;
  std::vector<std::int64_t> values;

  const char* text() const { return PyUnicode_AsUTF8(name); }
};

class Declared {
 public:
  // From the dict that torchkiln/_kernel.py makes; throws what Python should see.
  explicit Declared(const pybind11::dict& spec);
  Declared(const Declared&) = delete;
  Declared& operator=(const Declared&) = delete;

  const std::string name;
  std::vector<Argument> arguments;
  std::vector<Static> statics;
  PyObject* dtypes = nullptr;  // torch.dtype -> torchkiln_type
  torchkiln_kernel* kernel = nullptr;

 private:
  const char* keep(const std::string& text) { return texts_.emplace_back(text).c_str(); }
  void add_arguments(const pybind11::list& args);
  void add_params(const pybind11::list& params);
  void declare(const pybind11::dict& spec);

  void geometry(const torchkiln_problem& problem, const std::int64_t* tunables,
                torchkiln_geometry& out) const;
  bool is_still_legal(const torchkiln_problem& problem, const std::int64_t* tunables) const;
  std::int64_t ask(PyObject* function, const torchkiln_problem& problem,
                   const std::int64_t* tunables) const;
  PyObject* call(PyObject* function, const torchkiln_problem& problem,
                 const std::int64_t* tunables) const;

  const char* operator_ = nullptr;
  std::deque<std::string> texts_;
  std::deque<std::vector<std::int64_t>> values_;
  std::vector<torchkiln_param> params_;
  std::vector<torchkiln_size> sizes_;
  std::vector<torchkiln_argument> parameters_;
  std::vector<std::int64_t> defaults_;
  std::uint32_t args_size_ = 0;
  PyObject *geometry_ = nullptr, *legal_ = nullptr, *choose_ = nullptr;
};

// Raises what a function of Python raised while the engine had called it on this thread; false when there is nothing.
bool raise_kept_error();

// Raises the engine's last error on this thread as the exception of torchkiln.errors.
void raise_engine_error();

}  // namespace torchkiln::python
