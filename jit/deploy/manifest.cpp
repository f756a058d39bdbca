// Manifests as JSON, and specialisations as text.
// SPDX-License-Identifier: Apache-2.0
#include "jit/deploy/manifest.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <iterator>
#include <system_error>
#include <vector>

#include "cache/files.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr int kFormat = 1;
constexpr std::size_t kMaxBytes = std::size_t{64} << 20;

Error wrong_manifest(const std::string& name, const std::string& got) {
  return {TORCHKILN_ERROR_VALUE,
          "manifest must be a JSON file as 'torchkiln record' writes it; got " + got + " in " +
              name + ". Record it again.",
          {},
          "manifest"};
}

[[noreturn]] void fail(const std::string& text, const std::string& why) {
  throw Error(
      TORCHKILN_ERROR_VALUE,
      "manifest must name kernels of this version; got " + text + ", " + why + ". Record it again.",
      {}, "manifest");
}

[[noreturn]] void fail_unknown_user_kernel(const std::string& text) {
  throw Error(TORCHKILN_ERROR_VALUE,
              "manifest must name kernels that are declared in this process; got " + text +
                  ". Name the module that declares it: --import MODULE.",
              {}, "manifest");
}

// The parser quotes the bytes that it met; a sentence is valid UTF-8 wherever it goes.
std::string printable(std::string text) {
  for (char& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

struct Parts {
  std::string path, entry;
  std::vector<std::string> arguments;
};

// detection/box_iou.forward<float, mode=0, block_size=256>
Parts split(const std::string& text) {
  const std::size_t open = text.find('<');
  const std::size_t dot = text.rfind('.', open);
  if (open == text.npos || dot == text.npos || text.back() != '>') {
    fail(text, "which is not like detection/box_iou.forward<float, mode=0, block_size=256>");
  }
  Parts parts{text.substr(0, dot) + ".cuh", text.substr(dot + 1, open - dot - 1), {}};
  for (std::size_t at = open + 1; at < text.size() - 1;) {
    const std::size_t end = std::min(text.find(", ", at), text.size() - 1);
    parts.arguments.push_back(text.substr(at, end - at));
    at = end + 2;
  }
  return parts;
}

// The value in "float", "block_size=256" or "aligned=true"; nothing when the text belongs to another parameter.
std::optional<std::int64_t> value_of(const torchkiln_param& param, const std::string& text) {
  if (param.kind == TORCHKILN_PARAM_TYPE) return type_from_name(text);
  const std::string prefix = std::string(param.name) + "=";
  if (!text.starts_with(prefix)) return std::nullopt;
  const std::string value = text.substr(prefix.size());
  if (param.kind == TORCHKILN_PARAM_BOOL) {
    if (value != "true" && value != "false") return std::nullopt;
    return value == "true" ? 1 : 0;
  }
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size()) return std::nullopt;
  return number;
}

std::vector<std::int64_t> values_of(const Kernel& kernel, const Parts& parts,
                                    const std::string& text) {
  const torchkiln_declaration& d = kernel.declaration;
  if (parts.arguments.size() != d.n_params) {
    fail(text, "whose kernel has " + std::to_string(d.n_params) + " parameters");
  }
  std::vector<std::int64_t> values;
  for (std::uint32_t i = 0; i < d.n_params; ++i) {
    const auto value = value_of(d.params[i], parts.arguments[i]);
    if (!value)
      fail(text, "whose parameter " + parts.arguments[i] + " must be " + d.params[i].name);
    values.push_back(*value);
  }
  if (d.valid != nullptr && d.valid(d.context, values.data()) == 0) {
    fail(text, "a combination that does not exist");
  }
  return values;
}

}  // namespace

std::string manifest_text(const Manifest& manifest) {
  return nlohmann::json{{"format", kFormat}, {"kernels", manifest}}.dump(2) + "\n";
}

Manifest parse_manifest(const std::string& text, const std::string& name) try {
  const auto json = nlohmann::json::parse(text);
  if (json.at("format").get<int>() != kFormat) {
    throw wrong_manifest(name, "format " + json.at("format").dump());
  }
  return json.at("kernels").get<Manifest>();
} catch (const nlohmann::json::exception& error) {
  throw wrong_manifest(name, printable(error.what()));
}

std::optional<std::string> read_manifest_text(const std::filesystem::path& path) {
  std::error_code error;  // before opening: a named pipe must not hang us
  const auto size = std::filesystem::file_size(path, error);
  if (error == std::errc::no_such_file_or_directory) return std::nullopt;
  if (error) throw wrong_manifest(path.string(), error.message());
  if (size > kMaxBytes) throw wrong_manifest(path.string(), "no file of usual size");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw wrong_manifest(path.string(), cache::error_text(errno));
  return std::string(std::istreambuf_iterator<char>(file), {});
}

std::optional<Manifest> read_manifest(const std::filesystem::path& path) {
  const auto text = read_manifest_text(path);
  return text ? std::optional(parse_manifest(*text, path.string())) : std::nullopt;
}

Specialization parse_specialization(const std::string& text, std::span<Kernel* const> kernels) {
  const Parts parts = split(text);
  const Kernel* kernel = find_kernel(kernels, parts.path, parts.entry);
  if (kernel == nullptr && is_user_path(parts.path)) fail_unknown_user_kernel(text);
  if (kernel == nullptr) fail(text, "which no operator launches");
  const auto values = values_of(*kernel, parts, text);
  const std::span all(values);
  return specialize(*kernel, all.first(kernel->n_statics), all.subspan(kernel->n_statics));
}

}  // namespace torchkiln::jit
