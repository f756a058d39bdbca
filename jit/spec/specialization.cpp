// Texts of a specialisation, and its JSON form.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/spec/specialization.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr std::array<const char*, TORCHKILN_TYPE_COUNT> kTypeNames = {
    "float", "half", "bfloat16", "double", "i32", "i64", "u8",
    "bool",  "i8",   "i16",      "u16",    "u32", "u64"};

// As a user's file may write them: only the half types are ours.
constexpr std::array<const char*, TORCHKILN_TYPE_COUNT> kPlainNames = {"float",
                                                                       "torchkiln::half",
                                                                       "torchkiln::bfloat16",
                                                                       "double",
                                                                       "int",
                                                                       "long long",
                                                                       "unsigned char",
                                                                       "bool",
                                                                       "signed char",
                                                                       "short",
                                                                       "unsigned short",
                                                                       "unsigned int",
                                                                       "unsigned long long"};

const char* plain_name(std::int64_t type) { return kPlainNames.at(static_cast<std::size_t>(type)); }

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

std::int64_t parse_type(const std::string& name) {
  if (const auto type = type_from_name(name)) return *type;
  throw Error(TORCHKILN_ERROR_VALUE, "specialization: a type argument must be one of " +
                                         all_type_names() + "; got " + name);
}

constexpr std::array kPassings = {"value", "pointer", "const pointer"};  // torchkiln_passing

torchkiln_passing parse_passing(const std::string& name) {
  const auto* found = std::find(kPassings.begin(), kPassings.end(), name);
  if (found != kPassings.end()) return static_cast<torchkiln_passing>(found - kPassings.begin());
  throw Error(TORCHKILN_ERROR_VALUE,
              "specialization: passing must be value, pointer or const pointer; got " + name);
}

TemplateArgument argument_from_json(const nlohmann::json& json) {
  TemplateArgument argument;
  argument.name = json.at("name").get<std::string>();
  const nlohmann::json& value = json.at("value");
  if (value.is_string()) {
    argument.kind = TORCHKILN_PARAM_TYPE;
    argument.value = parse_type(value.get<std::string>());
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

// The C++ types that a kernel may give this parameter, the usual one first.
std::vector<std::string> types_of(const KernelParameter& parameter) {
  std::vector<std::string> names = {plain_name(parameter.type)};
  // Two names of one type of 64 bits.
  if (parameter.type == TORCHKILN_I64) names.emplace_back("long");
  if (parameter.type == TORCHKILN_U64) names.emplace_back("unsigned long");
  if (parameter.passing == TORCHKILN_VALUE) return names;
  names.emplace_back("void");
  for (std::string& name : names) {
    name = (parameter.passing == TORCHKILN_CONST_POINTER ? "const " : "") + name + "*";
  }
  return names;
}

// A kernel that takes other parameters than it is called with would read garbage.
constexpr const char* kSignatureTools = R"(
namespace torchkiln_signature {
template <class... P> struct List { static constexpr int size = sizeof...(P); };
template <class... P> List<P...> list_of(void (*)(P...));
template <int I, class L> struct At { using Type = void; };
template <class P, class... R> struct At<0, List<P, R...>> { using Type = P; };
template <int I, class P, class... R> struct At<I, List<P, R...>> : At<I - 1, List<R...>> {};
template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
template <class L, int I, class... Allowed> constexpr bool is = (same<typename At<I, L>::Type, Allowed> || ...);
)";

std::string signature_assertions(const Specialization& s) {
  const std::string count = std::to_string(s.parameters.size());
  std::string text =
      kSignatureTools + ("using Kernel = decltype(list_of(&::" + s.name_expression()) +
      "));\nstatic_assert(Kernel::size == " + count + ", \"args must be the parameters of " +
      s.entry + "; got " + count + " args\");\n";
  for (std::size_t i = 0; i < s.parameters.size(); ++i) {
    std::string allowed, words;
    for (const std::string& type : types_of(s.parameters[i])) {
      allowed += ", " + type;
      words += (words.empty() ? "" : " or ") + type;
    }
    text += "static_assert(is<Kernel, " + std::to_string(i) + allowed + ">, \"parameter " +
            std::to_string(i + 1) + " of " + s.entry + " must be " + words + ", as args says of " +
            s.parameters[i].name + "\");\n";
  }
  return text + "}  // namespace torchkiln_signature\n";
}

nlohmann::json parameters_to_json(const std::vector<KernelParameter>& parameters) {
  nlohmann::json list = nlohmann::json::array();
  for (const KernelParameter& p : parameters)
    list.push_back(
        {{"name", p.name}, {"passing", kPassings.at(p.passing)}, {"type", type_name(p.type)}});
  return list;
}

}  // namespace

std::optional<std::int64_t> type_from_name(std::string_view name) {
  const auto* found = std::find(kTypeNames.begin(), kTypeNames.end(), name);
  if (found == kTypeNames.end()) return std::nullopt;
  return found - kTypeNames.begin();
}

std::string all_type_names() {
  std::string names;
  for (const char* name : kTypeNames) names += (names.empty() ? "" : ", ") + std::string(name);
  return names;
}

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
  const bool user = is_user_path(path);
  const std::string name = user ? entry : "torchkiln::" + stem(path) + "::" + entry;
  if (arguments.empty()) return name;
  // Types are qualified: the expression is looked up in the global namespace.
  return name + "<" +
         join(arguments,
              [user](const auto& a) {
                if (a.kind != TORCHKILN_PARAM_TYPE) return a.cpp();
                if (user) return std::string(plain_name(a.value));
                const bool own_type = a.value != TORCHKILN_FLOAT && a.value != TORCHKILN_DOUBLE;
                return own_type ? "torchkiln::" + a.cpp() : a.cpp();
              }) +
         ">";
}

std::string Specialization::program() const {
  std::string text = "#include \"" + path + "\"\n";
  if (!parameters.empty()) return text + signature_assertions(*this);
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
  nlohmann::json json = {{"path", path},
                         {"entry", entry},
                         {"arguments", list},
                         {"args_size", args_size},
                         {"min_architecture", min_architecture},
                         {"architecture_specific", architecture_specific},
                         {"text", text()}};
  if (!parameters.empty()) json["parameters"] = parameters_to_json(parameters);
  return json;
}

Specialization Specialization::from_json(const nlohmann::json& json) try {
  Specialization s;
  s.path = json.at("path").get<std::string>();
  s.entry = json.at("entry").get<std::string>();
  for (const nlohmann::json& argument : json.at("arguments"))
    s.arguments.push_back(argument_from_json(argument));
  for (const nlohmann::json& p : json.value("parameters", nlohmann::json::array()))
    s.parameters.push_back({p.at("name").get<std::string>(),
                            parse_passing(p.at("passing").get<std::string>()),
                            parse_type(p.at("type").get<std::string>())});
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
