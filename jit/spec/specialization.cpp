// Texts of a specialisation, and its JSON form.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/spec/specialization.h"

#include <array>
#include <charconv>
#include <filesystem>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr std::array<const char*, TORCHKILN_TYPE_COUNT> kTypeNames = {
    "float", "half", "bfloat16", "double", "i32", "i64", "u8"};

std::string stem(const std::string& path) { return std::filesystem::path(path).stem().string(); }

template <class F>
std::string join(const std::vector<TemplateArgument>& arguments, F&& text_of) {
  std::string result;
  for (const TemplateArgument& argument : arguments) {
    if (!result.empty()) result += ", ";
    result += text_of(argument);
  }
  return result;
}

std::int64_t type_from_name(const std::string& name) {
  for (std::size_t i = 0; i < kTypeNames.size(); ++i) {
    if (name == kTypeNames[i]) return static_cast<std::int64_t>(i);
  }
  throw Error(TORCHKILN_ERROR_VALUE,
              "specialization: a type argument must be one of float, half, bfloat16, double, "
              "i32, i64, u8; got " +
                  name);
}

TemplateArgument argument_from_json(const nlohmann::json& json) {
  TemplateArgument argument;
  argument.name = json.at("name").get<std::string>();
  const nlohmann::json& value = json.at("value");
  if (value.is_string()) {
    argument.kind = TORCHKILN_PARAM_TYPE;
    argument.value = type_from_name(value.get<std::string>());
  } else if (value.is_boolean()) {
    argument.kind = TORCHKILN_PARAM_BOOL;
    argument.value = value.get<bool>() ? 1 : 0;
  } else {
    argument.kind = TORCHKILN_PARAM_INT;
    argument.value = value.get<std::int64_t>();
  }
  return argument;
}

nlohmann::json argument_to_json(const TemplateArgument& argument) {
  nlohmann::json value = argument.value;
  if (argument.kind == TORCHKILN_PARAM_TYPE) value = type_name(argument.value);
  if (argument.kind == TORCHKILN_PARAM_BOOL) value = argument.value != 0;
  return {{"name", argument.name}, {"value", value}};
}

}  // namespace

const char* type_name(std::int64_t type) { return kTypeNames.at(static_cast<std::size_t>(type)); }

std::string TemplateArgument::cpp() const {
  if (kind == TORCHKILN_PARAM_TYPE) return type_name(value);
  if (kind == TORCHKILN_PARAM_BOOL) return value != 0 ? "true" : "false";
  return std::to_string(value);
}

std::string TemplateArgument::text() const {
  return kind == TORCHKILN_PARAM_TYPE ? cpp() : name + "=" + cpp();
}

std::string Specialization::text() const {
  const std::string file = std::filesystem::path(path).replace_extension().string();
  return file + "." + entry + "<" + join(arguments, [](const auto& a) { return a.text(); }) + ">";
}

std::string Specialization::name_expression() const {
  std::string name = "torchkiln::" + stem(path) + "::" + entry;
  if (arguments.empty()) return name;
  // Types are qualified: the expression is looked up in the global namespace.
  return name + "<" +
         join(arguments,
              [](const auto& a) {
                const bool own_type = a.kind == TORCHKILN_PARAM_TYPE &&
                                      a.value != TORCHKILN_FLOAT && a.value != TORCHKILN_DOUBLE;
                return own_type ? "torchkiln::" + a.cpp() : a.cpp();
              }) +
         ">";
}

std::string Specialization::program() const {
  std::string text = "#include \"" + path + "\"\n";
  if (args_size == 0) return text;
  // Host and device must agree about the one struct that crosses the boundary, or the kernel reads garbage.
  return text +
         "template <class A> constexpr unsigned long args_size(void (*)(A)) { return sizeof(A); }\n"
         "static_assert(args_size(&" +
         name_expression() + ") == " + std::to_string(args_size) +
         ", \"host and device disagree about the size of the kernel's arguments\");\n";
}

nlohmann::json Specialization::to_json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const TemplateArgument& argument : arguments) list.push_back(argument_to_json(argument));
  return {{"path", path},
          {"entry", entry},
          {"arguments", list},
          {"args_size", args_size},
          {"min_architecture", min_architecture},
          {"architecture_specific", architecture_specific},
          {"text", text()}};
}

Specialization Specialization::from_json(const nlohmann::json& json) try {
  Specialization s;
  s.path = json.at("path").get<std::string>();
  s.entry = json.at("entry").get<std::string>();
  for (const nlohmann::json& argument : json.at("arguments"))
    s.arguments.push_back(argument_from_json(argument));
  s.args_size = json.value("args_size", 0u);
  s.min_architecture = json.value("min_architecture", 75);
  s.architecture_specific = json.value("architecture_specific", false);
  return s;
} catch (const nlohmann::json::exception& e) {
  throw Error(TORCHKILN_ERROR_VALUE,
              std::string("specialization: must have path, entry and arguments; got JSON with ") +
                  e.what());
}

std::string Target::text() const {
  return (ptx ? "compute_" : "sm_") + std::to_string(architecture) + (specific ? "a" : "");
}

Target Target::parse(const std::string& text) {
  Target target;
  const std::string prefix = text.substr(0, text.find('_') + 1);
  target.ptx = prefix == "compute_";
  const char* begin = text.data() + prefix.size();
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(begin, end, target.architecture);
  target.specific = rest + 1 == end && *rest == 'a';
  const bool known = (target.ptx || prefix == "sm_") && error == std::errc() &&
                     (rest == end || target.specific) && target.architecture >= 50 &&
                     target.architecture < 1000;
  if (!known) {
    throw Error(TORCHKILN_ERROR_VALUE, "arch must look like sm_90; got " + text, {}, "arch");
  }
  return target;
}

}  // namespace torchkiln::jit
