// Checks of users' kernels.
// SPDX-License-Identifier: Apache-2.0
#include "jit/launch/user_kernel.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <set>
#include <string_view>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

Error wrong(const std::string& kernel, const std::string& argument, const std::string& rule,
            const std::string& got) {
  return {TORCHKILN_ERROR_VALUE,
          kernel + ": " + argument + " must " + rule + "; got " + got,
          {},
          argument};
}

bool is_letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_'; }
bool is_word_part(char c) {
  return is_letter(c) || std::isdigit(static_cast<unsigned char>(c)) != 0;
}

bool is_identifier(std::string_view name) {
  return !name.empty() && is_letter(name[0]) &&
         std::all_of(name.begin(), name.end(), &is_word_part);
}

// forward, or mine::forward
bool is_qualified(std::string_view name) {
  for (std::size_t at = name.find("::"); at != name.npos; at = name.find("::")) {
    if (!is_identifier(name.substr(0, at))) return false;
    name.remove_prefix(at + 2);
  }
  return is_identifier(name);
}

std::string_view last_part(std::string_view entry) {
  const std::size_t colons = entry.rfind("::");
  return colons == entry.npos ? entry : entry.substr(colons + 2);
}

std::vector<std::string_view> words_of(std::string_view text) {
  std::vector<std::string_view> words;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at;
    while (end < text.size() && is_word_part(text[end])) ++end;
    if (end > at) words.push_back(text.substr(at, end - at));
    at = std::max(end, at + 1);
  }
  return words;
}

// The functions behind the word __global__; a macro may make others.
std::set<std::string> kernels_in(std::string_view text) {
  constexpr std::string_view kGlobal = "__global__";
  std::set<std::string> names;
  for (std::size_t at = text.find(kGlobal); at != text.npos; at = text.find(kGlobal, at)) {
    at += kGlobal.size();
    const std::size_t end = std::min(text.find_first_of("{;", at), text.size());
    std::size_t open = text.find('(', at);
    if (text.substr(at, open - at).find("__launch_bounds__") != std::string_view::npos) {
      open = text.find('(', std::min(text.find(')', open), text.size()));
    }
    if (open >= end) continue;
    const auto words = words_of(text.substr(at, open - at));
    if (!words.empty()) names.emplace(words.back());
  }
  return names;
}

void check_entry(const torchkiln_declaration& d, const std::string& name,
                 const std::vector<SourceFile>& files) {
  if (!is_qualified(d.entry)) {
    throw wrong(name, "entry", "be a C++ name such as forward or mine::forward", d.entry);
  }
  const std::string_view entry = last_part(d.entry);
  std::string known;
  for (const SourceFile& file : files) {
    if (!is_user_path(file.path)) continue;
    const auto words = words_of(file.text);
    if (std::find(words.begin(), words.end(), entry) != words.end()) return;
    for (const std::string& kernel : kernels_in(file.text))
      known += (known.empty() ? "" : ", ") + kernel;
  }
  throw wrong(name, "entry", "be a __global__ function of the source",
              std::string(d.entry) +
                  (known.empty() ? ". The source has none." : ". The source has " + known + "."));
}

bool takes_half(const torchkiln_declaration& d) {
  const auto is_half = [](std::int64_t type) {
    return type == TORCHKILN_HALF || type == TORCHKILN_BFLOAT16;
  };
  const std::span params(d.params, d.n_params);
  const std::span arguments(d.arguments, d.arguments == nullptr ? 0 : d.n_arguments);
  return std::any_of(arguments.begin(), arguments.end(),
                     [&](const auto& a) { return a.type_param < 0 && is_half(a.type); }) ||
         std::any_of(params.begin(), params.end(), [&](const torchkiln_param& p) {
           return p.kind == TORCHKILN_PARAM_TYPE &&
                  std::any_of(p.values, p.values + p.n_values, is_half);
         });
}

void check_types(const torchkiln_declaration& d, const std::string& name,
                 const std::vector<SourceFile>& files) {
  const auto has_types = [](const SourceFile& file) { return file.path == "common/types.h"; };
  if (!takes_half(d) || std::any_of(files.begin(), files.end(), has_types)) return;
  throw wrong(
      name, "source",
      "include \"common/types.h\" where types may be half or bfloat16: it has torchkiln::half "
      "and torchkiln::bfloat16",
      "none");
}

// Texts in manifests and template arguments are built of these.
void check_names(const torchkiln_declaration& d, const std::string& name) {
  std::set<std::string> seen;
  const auto check = [&](const char* what, const char* value) {
    if (!is_identifier(value))
      throw wrong(name, what, "have names of letters, digits and _", value);
    if (!seen.insert(value).second) throw wrong(name, what, "have each name once", value);
  };
  for (std::uint32_t i = 0; i < d.n_params; ++i)
    check(d.params[i].tunable != 0 ? "tunables" : "template", d.params[i].name);
  for (std::uint32_t i = 0; d.arguments != nullptr && i < d.n_arguments; ++i)
    check("args", d.arguments[i].name);
}

// Whether texts of the one are texts of the other, too.
bool same_shape(const torchkiln_declaration& a, const torchkiln_declaration& b) {
  if (a.n_params != b.n_params || a.n_arguments != b.n_arguments || a.args_size != b.args_size)
    return false;
  for (std::uint32_t i = 0; i < a.n_params; ++i) {
    const torchkiln_param &p = a.params[i], &q = b.params[i];
    if (std::strcmp(p.name, q.name) != 0 || p.kind != q.kind || p.tunable != q.tunable)
      return false;
  }
  for (std::uint32_t i = 0; a.arguments != nullptr && i < a.n_arguments; ++i) {
    const torchkiln_argument &x = a.arguments[i], &y = b.arguments[i];
    if (x.passing != y.passing || x.type != y.type || x.type_param != y.type_param) return false;
  }
  return true;
}

void check_others(const Kernel& kernel, const std::string& name, std::span<Kernel* const> others) {
  const torchkiln_declaration& d = kernel.declaration;
  for (const Kernel* other : others) {
    const torchkiln_declaration& o = other->declaration;
    for (std::uint32_t i = 0; i < d.n_operators && !other->is_user; ++i) {
      if (launches_for(*other, d.operators[i]))
        throw wrong(name, "name", "not be that of an operator of torchkiln", d.operators[i]);
    }
    if (std::strcmp(d.path, o.path) == 0 && std::strcmp(d.entry, o.entry) == 0 &&
        !same_shape(d, o)) {
      throw wrong(name, "name",
                  "be another one: this process has a kernel of this name with other args, "
                  "template or tunables",
                  d.path + std::string(".") + d.entry);
    }
  }
}

std::string triple(const std::uint32_t* v) {
  return std::to_string(v[0]) + "x" + std::to_string(v[1]) + "x" + std::to_string(v[2]);
}

}  // namespace

void check_user_kernel(const Kernel& kernel, const TemplateSources& sources,
                       std::span<Kernel* const> others) {
  const torchkiln_declaration& d = kernel.declaration;
  const std::string name = d.n_operators > 0 ? d.operators[0] : d.path;
  if (!std::string_view(d.path).ends_with(".cuh"))
    throw wrong(name, "template", "have a path that ends with .cuh", d.path);
  if (d.n_operators == 0)
    throw wrong(name, "operators", "hold a name for the command line", "none");
  const auto files = sources.closure(d.path);
  check_names(d, name);
  check_entry(d, name, files);
  check_types(d, name, files);
  check_others(kernel, name, others);
}

void check_limits(const LaunchLimits& limits, const torchkiln_geometry& g,
                  const std::string& text) {
  constexpr std::array<std::uint32_t, 3> kMaxGrid = {2'147'483'647, 65'535, 65'535};
  constexpr std::array<std::uint32_t, 3> kMaxBlock = {1024, 1024, 64};
  const std::uint64_t threads = std::uint64_t{g.block[0]} * g.block[1] * g.block[2];
  for (std::size_t i = 0; i < 3; ++i) {
    if (g.grid[i] > kMaxGrid.at(i))
      throw wrong(text, "grid", "have at most 2147483647x65535x65535 blocks", triple(g.grid));
    if (g.block[i] < 1 || g.block[i] > kMaxBlock.at(i))
      throw wrong(text, "block", "have from 1 to 1024x1024x64 threads", triple(g.block));
  }
  if (threads > limits.threads) {
    throw wrong(text, "block",
                "have at most " + std::to_string(limits.threads) +
                    " threads, for which this kernel's registers and __launch_bounds__ are made",
                std::to_string(threads) + " (" + triple(g.block) + ")");
  }
  if (g.dynamic_shared_bytes > limits.dynamic_shared_bytes) {
    throw wrong(text, "shared",
                "be at most " + std::to_string(limits.dynamic_shared_bytes) +
                    " bytes, what the device has beside the kernel's static shared memory",
                std::to_string(g.dynamic_shared_bytes));
  }
}

}  // namespace torchkiln::jit
