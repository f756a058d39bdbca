// A specialisation: template file, entry and typed template arguments. It prints itself for people, for NVRTC and for
// the cache key.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

// "float", "half", ...: the C++ name in kernel_templates/common/types.h.
const char* type_name(std::int64_t type);
std::optional<std::int64_t> type_from_name(std::string_view name);
std::string all_type_names();  // "float, half, ..."

// The floating types by torch's names, which users write and read.
struct Dtype {
  std::string_view name;
  std::int64_t type;
};
inline constexpr std::array<Dtype, 4> kDtypes = {{{"float32", TORCHKILN_FLOAT},
                                                  {"float16", TORCHKILN_HALF},
                                                  {"bfloat16", TORCHKILN_BFLOAT16},
                                                  {"float64", TORCHKILN_DOUBLE}}};

struct TemplateArgument {
  std::string name;
  torchkiln_param_kind kind = TORCHKILN_PARAM_INT;
  std::int64_t value = 0;  // torchkiln_type for a type argument

  std::string cpp() const;   // float, 256, true
  std::string text() const;  // float, block_size=256, aligned=true
  bool operator==(const TemplateArgument&) const = default;
};

// What a user's kernel is called with; the program asserts it.
struct KernelParameter {
  std::string name;
  torchkiln_passing passing = TORCHKILN_VALUE;
  std::int64_t type = TORCHKILN_FLOAT;

  bool operator==(const KernelParameter&) const = default;
};

// Whether a template was added by a user: its names are the user's own.
inline bool is_user_path(std::string_view path) { return path.starts_with("user/"); }

struct Specialization {
  std::string path;   // detection/box_iou.cuh
  std::string entry;  // forward
  std::vector<TemplateArgument> arguments;
  std::vector<KernelParameter> parameters = {};  // empty: one struct
  std::uint32_t args_size = 0;                   // 0: not asserted
  std::int32_t min_architecture = 75;
  bool architecture_specific = false;  // needs sm_XYa

  std::string text() const;  // detection/box_iou.forward<float, block_size=256>
  std::string name_expression()
      const;                    // torchkiln::box_iou::forward<float, 256>, mine::forward<float>
  std::string program() const;  // the translation unit that instantiates it
  nlohmann::json to_json() const;
  static Specialization from_json(const nlohmann::json& json);  // throws Error(VALUE)
  bool operator==(const Specialization&) const = default;
};

// What NVRTC is asked to make: a cubin for one architecture, or PTX for a virtual one.
struct Target {
  int architecture = 0;  // 90 for compute capability 9.0
  bool specific = false;
  bool ptx = false;

  std::string text() const;                      // sm_90, sm_90a, compute_90
  static Target parse(const std::string& text);  // throws Error(VALUE)
  bool operator==(const Target&) const = default;
};

}  // namespace torchkiln::jit
