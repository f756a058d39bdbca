// A specialisation: template file, entry and typed template arguments. It prints itself for people, for NVRTC and for
// the cache key.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

// "float", "half", ...: the C++ name in kernel_templates/common/types.h.
const char* type_name(std::int64_t type);

struct TemplateArgument {
  std::string name;
  torchkiln_param_kind kind = TORCHKILN_PARAM_INT;
  std::int64_t value = 0;  // torchkiln_type for a type argument

  std::string cpp() const;   // float, 256, true
  std::string text() const;  // float, block_size=256, aligned=true
  bool operator==(const TemplateArgument&) const = default;
};

struct Specialization {
  std::string path;   // detection/box_iou.cuh
  std::string entry;  // forward
  std::vector<TemplateArgument> arguments;
  std::uint32_t args_size = 0;  // 0: not asserted
  std::int32_t min_architecture = 75;
  bool architecture_specific = false;  // needs sm_XYa

  std::string text() const;             // detection/box_iou.forward<float, block_size=256>
  std::string name_expression() const;  // torchkiln::box_iou::forward<float, 256>
  std::string program() const;          // the translation unit that instantiates it
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
