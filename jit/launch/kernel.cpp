// Declared kernels.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/launch/kernel.h"

#include <algorithm>
#include <array>
#include <bit>

#include "jit/driver/device.h"
#include "jit/error.h"

namespace {

using torchkiln::jit::Error;

void require(bool condition, const torchkiln_declaration& d, const char* rule) {
  if (condition) return;
  throw Error(TORCHKILN_ERROR_INTERNAL,
              std::string("declaration of ") + d.path + "." + d.entry + " must " + rule);
}

std::uint32_t size_of(const torchkiln_argument& argument) {
  if (argument.passing != TORCHKILN_VALUE) return sizeof(void*);
  switch (argument.type) {
    case TORCHKILN_DOUBLE:
    case TORCHKILN_I64:
    case TORCHKILN_U64:
      return 8;
    case TORCHKILN_I16:
    case TORCHKILN_U16:
      return 2;
    case TORCHKILN_U8:
    case TORCHKILN_BOOL:
    case TORCHKILN_I8:
      return 1;
    default:
      return 4;
  }
}

std::uint32_t packed_size(std::span<const torchkiln_argument> arguments) {
  std::uint32_t end = 0;
  for (const torchkiln_argument& argument : arguments) {
    const std::uint32_t size = size_of(argument);
    end = (end + size - 1) / size * size + size;
  }
  return end;
}

void check_arguments(const torchkiln_declaration& d, std::uint32_t n_statics) {
  const std::span arguments(d.arguments, d.n_arguments);
  for (const torchkiln_argument& a : arguments) {
    const bool is_value = a.passing == TORCHKILN_VALUE;
    const bool by_param = a.type_param >= 0;
    require(a.passing >= TORCHKILN_VALUE && a.passing <= TORCHKILN_CONST_POINTER, d,
            "say how arguments are passed");
    require(by_param || (a.type >= 0 && a.type < TORCHKILN_TYPE_COUNT), d,
            "give arguments a torchkiln_type");
    require(!by_param || (!is_value && a.type_param < static_cast<std::int32_t>(n_statics) &&
                          d.params[a.type_param].kind == TORCHKILN_PARAM_TYPE),
            d, "take types of pointers from static type parameters");
    require(!is_value || (a.type != TORCHKILN_HALF && a.type != TORCHKILN_BFLOAT16), d,
            "pass no half types by value");
  }
  require(d.args_size == packed_size(arguments), d, "give the size of the packed arguments");
}

}  // namespace

torchkiln_kernel::torchkiln_kernel(const torchkiln_declaration& d) : declaration(d) {
  require(d.struct_size == sizeof(torchkiln_declaration), d,
          "be built with this version's torchkiln.h");
  is_user = torchkiln::jit::is_user_path(d.path);
  require(d.n_params <= TORCHKILN_MAX_PARAMS, d, "have at most 16 parameters");
  require(d.n_sizes <= TORCHKILN_MAX_SIZES, d, "have at most 8 sizes");
  require(d.n_defaults >= 1 && d.geometry != nullptr, d, "have a default and a geometry");
  for (std::uint32_t i = 0; i < d.n_params; ++i) {
    const bool tunable = d.params[i].tunable != 0;
    require(tunable || n_tunables == 0, d, "list static parameters before tunables");
    ++(tunable ? n_tunables : n_statics);
    if (d.params[i].constant != 0) {
      const auto* values = d.params[i].values;
      require(
          !tunable && d.params[i].kind == TORCHKILN_PARAM_INT &&
              std::find(values, values + d.params[i].n_values, 0) != values + d.params[i].n_values,
          d, "have layer constants that are static integers with the value 0");
    }
  }
  require(d.arguments == nullptr || is_user, d, "take one struct, being a kernel of the library");
  if (d.arguments != nullptr) check_arguments(d, n_statics);
}

namespace torchkiln::jit {
namespace {

bool is_float_type(std::int64_t type) { return type <= TORCHKILN_DOUBLE; }

// The generic values of one static parameter, without the floating types that nobody asked for.
std::vector<std::int64_t> generic_values(const torchkiln_param& param,
                                         std::span<const std::int64_t> dtypes) {
  std::vector<std::int64_t> values(param.values, param.values + param.n_values);
  if (param.kind != TORCHKILN_PARAM_TYPE || dtypes.empty()) return values;
  std::erase_if(values, [&](std::int64_t type) {
    return is_float_type(type) && std::find(dtypes.begin(), dtypes.end(), type) == dtypes.end();
  });
  return values;
}

using Row = std::vector<std::int64_t>;

// All combinations of one value of each column.
std::vector<Row> product(std::span<const Row> columns) {
  std::vector<Row> rows = {{}};
  for (const Row& column : columns) {
    std::vector<Row> longer;
    for (const Row& row : rows) {
      for (const std::int64_t value : column) {
        longer.push_back(row);
        longer.back().push_back(value);
      }
    }
    rows = std::move(longer);
  }
  return rows;
}

// All combinations of the static parameters' generic values that exist.
std::vector<Row> generic_statics(const Kernel& kernel, std::span<const std::int64_t> dtypes) {
  const torchkiln_declaration& d = kernel.declaration;
  std::vector<Row> columns;
  for (std::uint32_t i = 0; i < kernel.n_statics; ++i) {
    columns.push_back(generic_values(d.params[i], dtypes));
  }
  std::vector<Row> rows = product(columns);
  if (d.valid != nullptr) {
    std::erase_if(rows, [&](const Row& row) { return d.valid(d.context, row.data()) == 0; });
  }
  return rows;
}

std::vector<Row> default_points(const Kernel& kernel) {
  std::vector<Row> rows;
  for (std::uint32_t i = 0; i < kernel.declaration.n_defaults; ++i) {
    const auto row = tunables_of_row(kernel, i);
    rows.emplace_back(row.begin(), row.end());
  }
  return rows;
}

std::vector<Row> points_of(const Kernel& kernel, Points points) {
  if (points == Points::kDefaults) return default_points(kernel);
  std::vector<Row> columns;
  for (std::uint32_t i = kernel.n_statics; i < kernel.declaration.n_params; ++i) {
    const torchkiln_param& p = kernel.declaration.params[i];
    Row values(p.values, p.values + p.n_values);
    if (points == Points::kCorners) {
      const auto [least, most] = std::minmax_element(values.begin(), values.end());
      values = *least == *most ? Row{*least} : Row{*least, *most};
    }
    columns.push_back(std::move(values));
  }
  return product(columns);
}

// What is legal may depend on sizes, whose meaning only the declaration knows: few, usual and many of everything.
constexpr std::array<std::int64_t, 3> kUsualSizes = {16, 1024, 65'536};

}  // namespace

std::uint8_t bucket_of(const torchkiln_size& size, std::int64_t value) {
  if (size.bucket == TORCHKILN_BUCKET_NONE || value <= 0) return 0;
  return static_cast<std::uint8_t>(std::bit_width(static_cast<std::uint64_t>(value)));
}

std::vector<std::vector<std::int64_t>> legal_points(const Kernel& kernel,
                                                    const torchkiln_problem& problem) {
  std::vector<Row> points = points_of(kernel, Points::kAll);
  std::erase_if(points, [&](const Row& row) { return !is_legal(kernel, problem, row); });
  return points;
}

bool runs_somewhere(const Kernel& kernel, std::span<const std::int64_t> statics,
                    std::span<const std::int64_t> point,
                    std::span<const torchkiln_device> devices) {
  if (kernel.declaration.legal == nullptr) return true;
  const auto runs = [&](const torchkiln_device& device, std::int64_t size) {
    std::array<std::int64_t, TORCHKILN_MAX_SIZES> sizes{};
    sizes.fill(size);
    const torchkiln_problem problem{&device, statics.data(), sizes.data(),
                                    kernel.declaration.context};
    return is_legal(kernel, problem, point);
  };
  return std::any_of(devices.begin(), devices.end(), [&](const torchkiln_device& device) {
    return std::any_of(kUsualSizes.begin(), kUsualSizes.end(),
                       [&](std::int64_t size) { return runs(device, size); });
  });
}

const Kernel* find_kernel(std::span<Kernel* const> kernels, const std::string& path,
                          const std::string& entry) {
  const auto found = std::find_if(kernels.begin(), kernels.end(), [&](const Kernel* kernel) {
    return path == kernel->declaration.path && entry == kernel->declaration.entry;
  });
  return found == kernels.end() ? nullptr : *found;
}

LaunchKey launch_key(const Kernel& kernel, const torchkiln_launch& launch) {
  LaunchKey key;
  key.device = launch.device;
  key.n_statics = kernel.n_statics;
  std::copy_n(launch.statics, kernel.n_statics, key.statics.begin());
  for (std::uint32_t i = 0; i < kernel.declaration.n_sizes; ++i) {
    key.buckets[i] = bucket_of(kernel.declaration.sizes[i], launch.sizes[i]);
  }
  return key;
}

bool is_legal(const Kernel& kernel, const torchkiln_problem& problem,
              std::span<const std::int64_t> tunables) {
  const auto legal = kernel.declaration.legal;
  return legal == nullptr || legal(&problem, tunables.data()) != 0;
}

std::span<const std::int64_t> tunables_of_row(const Kernel& kernel, std::uint32_t row) {
  return {kernel.declaration.defaults + std::size_t{row} * kernel.n_tunables, kernel.n_tunables};
}

std::uint32_t default_row(const Kernel& kernel, const torchkiln_problem& problem) {
  const torchkiln_declaration& d = kernel.declaration;
  const auto runs = [&](std::uint32_t row) {
    return is_legal(kernel, problem, tunables_of_row(kernel, row));
  };
  const std::uint32_t first = d.choose == nullptr ? 0 : d.choose(&problem);
  if (first < d.n_defaults && runs(first)) return first;
  for (std::uint32_t row = 0; row < d.n_defaults; ++row) {
    if (runs(row)) return row;
  }
  throw Error(TORCHKILN_ERROR_INTERNAL,
              std::string(d.path) + "." + d.entry + ": no default is legal on this device");
}

std::span<const std::int64_t> choose_tunables(const Kernel& kernel,
                                              const torchkiln_problem& problem) {
  return tunables_of_row(kernel, default_row(kernel, problem));
}

namespace {

// The defaults that run on this problem, the chosen one first.
std::vector<Variant> default_variants(const Kernel& kernel, const torchkiln_problem& problem) {
  const torchkiln_declaration& d = kernel.declaration;
  const Row statics(problem.statics, problem.statics + kernel.n_statics);
  if (d.valid != nullptr && d.valid(d.context, statics.data()) == 0) return {};
  const auto chosen = choose_tunables(kernel, problem);
  std::vector<Variant> variants = {{statics, {chosen.begin(), chosen.end()}}};
  for (Row& row : default_points(kernel)) {
    if (!is_legal(kernel, problem, row)) continue;
    if (row != variants.front().tunables) variants.push_back({statics, std::move(row)});
  }
  return variants;
}

}  // namespace

std::vector<Variant> substitutes(const Kernel& kernel, const torchkiln_problem& problem,
                                 std::span<const std::int64_t> chosen) {
  const Row exact(problem.statics, problem.statics + kernel.n_statics);
  Row generic = exact;
  for (std::uint32_t i = 0; i < kernel.n_statics; ++i) {
    if (kernel.declaration.params[i].constant != 0) generic[i] = 0;
  }
  std::vector<Variant> variants = default_variants(kernel, problem);
  std::erase_if(variants, [&](const Variant& v) {
    return std::equal(v.tunables.begin(), v.tunables.end(), chosen.begin(), chosen.end());
  });
  if (generic != exact) {
    torchkiln_problem generic_problem = problem;
    generic_problem.statics = generic.data();
    for (Variant& v : default_variants(kernel, generic_problem)) variants.push_back(std::move(v));
  }
  return variants;
}

Specialization specialize(const Kernel& kernel, std::span<const std::int64_t> statics,
                          std::span<const std::int64_t> tunables) {
  const torchkiln_declaration& d = kernel.declaration;
  Specialization s;
  s.path = d.path;
  s.entry = d.entry;
  s.args_size = d.args_size;
  s.min_architecture = d.min_architecture;
  s.architecture_specific = d.feature == TORCHKILN_FEATURE_SPECIFIC;
  for (std::uint32_t i = 0; i < d.n_params; ++i) {
    const torchkiln_param& p = d.params[i];
    const std::int64_t value = i < kernel.n_statics ? statics[i] : tunables[i - kernel.n_statics];
    s.arguments.push_back({p.name, static_cast<torchkiln_param_kind>(p.kind), value});
  }
  for (std::uint32_t i = 0; d.arguments != nullptr && i < d.n_arguments; ++i) {
    const torchkiln_argument& a = d.arguments[i];
    const std::int64_t type =
        a.type_param < 0 ? a.type : statics[static_cast<std::size_t>(a.type_param)];
    s.parameters.push_back({a.name, static_cast<torchkiln_passing>(a.passing), type});
  }
  return s;
}

std::vector<Specialization> expand(const Kernel& kernel, std::span<const std::int64_t> dtypes,
                                   Points points, std::span<const torchkiln_device> devices) {
  const std::vector<torchkiln_device> known = typical_devices();
  if (devices.empty()) devices = known;
  std::vector<Row> rows = points_of(kernel, points);
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  std::vector<Specialization> result;
  for (const Row& statics : generic_statics(kernel, dtypes)) {
    for (const Row& point : rows) {
      if (runs_somewhere(kernel, statics, point, devices)) {
        result.push_back(specialize(kernel, statics, point));
      }
    }
  }
  return result;
}

std::size_t count_legal(const Kernel& kernel, std::span<const torchkiln_device> devices) {
  const std::vector<Row> statics = generic_statics(kernel, {});
  std::vector<Row> points = points_of(kernel, Points::kAll);
  std::erase_if(points, [&](const Row& point) {
    return std::none_of(statics.begin(), statics.end(), [&](const Row& row) {
      return runs_somewhere(kernel, row, point, devices);
    });
  });
  return points.size();
}

bool launches_for(const Kernel& kernel, const std::string& operator_name) {
  const auto* names = kernel.declaration.operators;
  return std::find(names, names + kernel.declaration.n_operators, operator_name) !=
         names + kernel.declaration.n_operators;
}

}  // namespace torchkiln::jit
