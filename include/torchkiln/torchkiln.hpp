// torchkiln.h turned back into C++: errors as exceptions, kernels with typed arguments, statics, sizes and tunables.
// Header only; needs C++20 and libtorchkiln.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "torchkiln/torchkiln.h"

namespace torchkiln {

// A failed call of the engine. what() is the sentence for the user.
class Error : public std::runtime_error {
 public:
  explicit Error(const torchkiln_error& record)
      : std::runtime_error(record.message), kind(static_cast<torchkiln_error_kind>(record.kind)) {}
  torchkiln_error_kind kind;
};

inline void check(std::int32_t status) {
  if (status != 0) throw Error(*torchkiln_last_error());
}

// One template parameter of a declaration.
struct Parameter {
  const char* name;
  torchkiln_param_kind kind;
  std::vector<std::int64_t> values;
  bool constant = false;
};
inline Parameter types(const char* name, std::vector<std::int64_t> values) {
  return {.name = name, .kind = TORCHKILN_PARAM_TYPE, .values = std::move(values)};
}
inline Parameter ints(const char* name, std::vector<std::int64_t> values) {
  return {.name = name, .kind = TORCHKILN_PARAM_INT, .values = std::move(values)};
}
inline Parameter bools(const char* name) {
  return {.name = name, .kind = TORCHKILN_PARAM_BOOL, .values = {0, 1}};
}
// A number of a layer (channels, groups, kernel size) that a launch may compile in; with 0 the program takes it from its
// arguments and serves every value. `warm --ops` compiles the 0, and the usual values.
inline Parameter layer_constant(const char* name, std::vector<std::int64_t> usual = {}) {
  usual.insert(usual.begin(), 0);
  return {.name = name, .kind = TORCHKILN_PARAM_INT, .values = std::move(usual), .constant = true};
}

inline const std::vector<std::int64_t> kFloatTypes = {TORCHKILN_FLOAT, TORCHKILN_HALF,
                                                      TORCHKILN_BFLOAT16, TORCHKILN_DOUBLE};

using Geometry = torchkiln_geometry;
using Device = torchkiln_device;
using Buffer = torchkiln_buffer;

// Where and with whose memory to launch.
struct Place {
  std::int32_t device = 0;
  void* stream = nullptr;
  const torchkiln_allocator* allocator = nullptr;
};

namespace detail {

// Statics, Sizes and Tunables are structs of int64 members (or empty): the C interface sees them as arrays.
template <class T>
constexpr std::size_t int64_count() {
  static_assert(std::is_trivially_copyable_v<T> &&
                (std::is_empty_v<T> || sizeof(T) % sizeof(std::int64_t) == 0));
  return std::is_empty_v<T> ? 0 : sizeof(T) / sizeof(std::int64_t);
}
template <class T>
const std::int64_t* as_int64(const T& value) {
  return reinterpret_cast<const std::int64_t*>(&value);
}
template <class T>
const T& from_int64(const std::int64_t* values) {
  return *reinterpret_cast<const T*>(values);
}

}  // namespace detail

// A kernel template of your own: CUDA C++ that may include torchkiln's headers (common/, geometry/) by their path, and
// `headers`, name to text. A global, above the kernels that are declared from it by `.path = my_template.path()`; their
// entry is named from the global namespace, "forward" or "mine::forward". Nothing is compiled here. `name` (letters,
// digits, _, - and /) stands in manifests and errors. Throws Error for another text under a name that is taken.
class Template {
 public:
  Template(const std::string& name, const std::string& source,
           const std::map<std::string, std::string>& headers = {})
      : path_("user/" + name + ".cuh") {
    const std::string folder = path_.substr(0, path_.rfind('/') + 1);
    for (const auto& [header, text] : headers)
      check(torchkiln_add_template((folder + header).c_str(), text.c_str()));
    check(torchkiln_add_template(path_.c_str(), source.c_str()));
  }
  Template(const Template&) = delete;
  Template& operator=(const Template&) = delete;

  const char* path() const { return path_.c_str(); }

 private:
  std::string path_;
};

// A kernel template with everything the engine needs: declared once as a global, run many times. The template's
// parameters are Statics' members, then Tunables' members, in order; it takes one Args by value.
template <class Args, class Statics, class Sizes, class Tunables>
class Kernel {
 public:
  struct Problem {
    const Device& device;
    const Statics& statics;
    const Sizes& sizes;
  };

  struct Declaration {
    const char* path;
    const char* entry;
    std::vector<const char*> operators;
    std::vector<Parameter> statics;  // which program; values are what `warm --ops` compiles
    std::vector<torchkiln_size> sizes;
    std::vector<Parameter> tunables;  // how fast; values are the search space
    std::vector<Tunables> defaults;   // everything that `choose` can return
    double tolerance = 0;             // between two points, of the largest value; 0: by type
    std::int32_t min_architecture = 75;
    torchkiln_feature feature = TORCHKILN_FEATURE_NONE;
    bool (*valid)(const Statics&) = nullptr;
    bool (*legal)(const Problem&, const Tunables&) = nullptr;
    std::uint32_t (*choose)(const Problem&) = nullptr;
    Geometry (*geometry)(const Problem&, const Tunables&) = nullptr;
  };

  explicit Kernel(Declaration declaration) : declaration_(std::move(declaration)) { declare(); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  void run(const Place& place, const Statics& statics, const Sizes& sizes, const Args& args,
           std::initializer_list<Buffer> buffers) const {
    const torchkiln_launch launch = {
        .struct_size = sizeof(torchkiln_launch),
        .device = place.device,
        .stream = place.stream,
        .statics = detail::as_int64(statics),
        .sizes = detail::as_int64(sizes),
        .args = &args,
        .buffers = buffers.begin(),
        .n_buffers = static_cast<std::uint32_t>(buffers.size()),
        .allocator = place.allocator,
    };
    check(torchkiln_run(kernel_, &launch));
  }

 private:
  static const Kernel& self(const void* context) { return *static_cast<const Kernel*>(context); }
  static Problem problem(const torchkiln_problem* p) {
    return {*p->device, detail::from_int64<Statics>(p->statics),
            detail::from_int64<Sizes>(p->sizes)};
  }

  void declare() {
    for (const Parameter& p : declaration_.statics) add_parameter(p, 0);
    for (const Parameter& p : declaration_.tunables) add_parameter(p, 1);
    if (declaration_.statics.size() != detail::int64_count<Statics>() ||
        declaration_.tunables.size() != detail::int64_count<Tunables>() ||
        declaration_.sizes.size() != detail::int64_count<Sizes>()) {
      throw std::logic_error(std::string(declaration_.path) +
                             ": declared parameters do not match their structs");
    }
    const torchkiln_declaration c = {
        .struct_size = sizeof(torchkiln_declaration),
        .path = declaration_.path,
        .entry = declaration_.entry,
        .operators = declaration_.operators.data(),
        .n_operators = static_cast<std::uint32_t>(declaration_.operators.size()),
        .params = params_.data(),
        .n_params = static_cast<std::uint32_t>(params_.size()),
        .sizes = declaration_.sizes.data(),
        .n_sizes = static_cast<std::uint32_t>(declaration_.sizes.size()),
        .defaults = reinterpret_cast<const std::int64_t*>(declaration_.defaults.data()),
        .n_defaults = static_cast<std::uint32_t>(declaration_.defaults.size()),
        .args_size = sizeof(Args),
        .tolerance = declaration_.tolerance,
        .min_architecture = declaration_.min_architecture,
        .feature = declaration_.feature,
        .context = this,
        .valid = declaration_.valid ? &valid_thunk : nullptr,
        .legal = declaration_.legal ? &legal_thunk : nullptr,
        .choose = declaration_.choose ? &choose_thunk : nullptr,
        .geometry = &geometry_thunk,
        .arguments = nullptr,
        .n_arguments = 0,
        .module = nullptr,
    };
    check(torchkiln_declare(&c, &kernel_));
  }

  void add_parameter(const Parameter& p, std::int32_t tunable) {
    params_.push_back({.name = p.name,
                       .kind = p.kind,
                       .tunable = tunable,
                       .values = p.values.data(),
                       .n_values = static_cast<std::uint32_t>(p.values.size()),
                       .constant = p.constant ? 1 : 0});
  }

  static std::int32_t valid_thunk(const void* context, const std::int64_t* statics) {
    return self(context).declaration_.valid(detail::from_int64<Statics>(statics));
  }
  static std::int32_t legal_thunk(const torchkiln_problem* p, const std::int64_t* tunables) {
    return self(p->context).declaration_.legal(problem(p), detail::from_int64<Tunables>(tunables));
  }
  static std::uint32_t choose_thunk(const torchkiln_problem* p) {
    return self(p->context).declaration_.choose(problem(p));
  }
  static void geometry_thunk(const torchkiln_problem* p, const std::int64_t* tunables,
                             torchkiln_geometry* out) {
    *out =
        self(p->context).declaration_.geometry(problem(p), detail::from_int64<Tunables>(tunables));
  }

  Declaration declaration_;
  std::vector<torchkiln_param> params_;
  torchkiln_kernel* kernel_ = nullptr;
};

// A one-dimensional launch; a grid of 0 blocks launches nothing.
inline Geometry linear(std::int64_t blocks, std::int64_t block_size,
                       std::uint32_t dynamic_shared_bytes = 0) {
  return {{static_cast<std::uint32_t>(blocks), 1, 1},
          {static_cast<std::uint32_t>(block_size), 1, 1},
          dynamic_shared_bytes};
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The process's counters by name, the same as Python's torchkiln.statistics().
inline std::map<std::string, std::uint64_t> statistics() {
  std::vector<torchkiln_counter> rows(torchkiln_statistics(nullptr, 0));
  torchkiln_statistics(rows.data(), static_cast<std::uint32_t>(rows.size()));
  std::map<std::string, std::uint64_t> result;
  for (const torchkiln_counter& row : rows) result[row.name] = row.value;
  return result;
}

// A command of the engine: JSON in, JSON out; throws Error. Commands are listed in jit/control.cpp.
inline std::string control(const std::string& command, const std::string& request = "{}") {
  char* reply = nullptr;
  check(torchkiln_control(command.c_str(), request.c_str(), &reply));
  const std::unique_ptr<char, decltype(&torchkiln_free)> owner(reply, &torchkiln_free);
  return reply;
}

}  // namespace torchkiln
