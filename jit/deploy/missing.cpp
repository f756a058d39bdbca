// Comparing a specialisation with what is there.
// SPDX-License-Identifier: Apache-2.0
#include "jit/deploy/missing.h"

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torchkiln::jit {
namespace {

// A kernel in a bundle or in the cache, as its header tells.
struct Present {
  Specialization specialization;
  std::string target, where;
};

// Headers of a damaged or foreign file name nothing that could help.
std::optional<Present> present_of(const nlohmann::json& header, const std::string& where) try {
  return Present{Specialization::from_json(header.at("specialization")),
                 header.at("target").get<std::string>(), where};
} catch (const std::exception&) {
  return std::nullopt;
}

std::vector<Present> all_present(Objects& objects) {
  std::vector<Present> list;
  const auto add = [&](const nlohmann::json& header, const std::string& where) {
    if (auto present = present_of(header, where)) list.push_back(std::move(*present));
  };
  for (const auto& bundle : objects.bundles().list()) {
    std::string why;
    for (std::size_t i = 0; i < bundle->size(); ++i) {
      if (const auto item = bundle->item(i, why)) add(item->object.header, bundle->path().string());
    }
  }
  cache::Store& store = objects.store();
  for (const cache::Entry& entry : store.list()) {
    const auto object = store.find(entry.key, entry.compiler, true,
                                   [](const cache::Object&) { return std::nullopt; });
    if (object) add(object->header, "the cache");
  }
  return list;
}

// One clause for each difference; empty when only the source of the template, or a compile option, can differ.
std::vector<std::string> differences(const Specialization& wanted, const std::string& target,
                                     const Present& present) {
  std::vector<std::string> list;
  for (std::size_t i = 0; i < wanted.arguments.size(); ++i) {
    const TemplateArgument& asked = wanted.arguments[i];
    const auto& given = present.specialization.arguments;
    const std::string has = i < given.size() ? given[i].cpp() : "nothing";
    if (has != asked.cpp())
      list.push_back(asked.name + " is " + has + " instead of " + asked.cpp());
  }
  if (present.target != target) {
    list.push_back("the architecture is " + present.target + " instead of " + target);
  }
  return list;
}

struct Nearest {
  std::string text, where;
  std::vector<std::string> differences;
};

std::optional<Nearest> nearest_to(const Specialization& wanted, const std::string& target,
                                  const std::vector<Present>& present) {
  std::optional<Nearest> best;
  for (const Present& p : present) {
    if (p.specialization.path != wanted.path || p.specialization.entry != wanted.entry) continue;
    Nearest candidate{p.specialization.text() + "@" + p.target, p.where,
                      differences(wanted, target, p)};
    const auto rank = [](const Nearest& n) { return std::pair(n.differences.size(), n.text); };
    if (!best || rank(candidate) < rank(*best)) {
      best = std::move(candidate);
    }
  }
  return best;
}

std::string quoted(const std::string& word) {
  const bool plain = std::all_of(word.begin(), word.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 ||
           std::string_view("/._-+=:,@").find(c) != std::string_view::npos;
  });
  if (plain) return word;
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

// --ops nms --dtypes float32 --arch sm_90: the generic variants, one of which serves the launch.
std::string selection(const Kernel& kernel, const Specialization& wanted,
                      const std::string& target) {
  const char* module = kernel.declaration.module;
  std::string text = module == nullptr ? "" : " --import " + quoted(module);
  text += std::string(" --ops ") + kernel.declaration.operators[0];
  for (const TemplateArgument& argument : wanted.arguments) {
    const auto dtype = std::ranges::find(kDtypes, argument.value, &Dtype::type);
    if (argument.kind != TORCHKILN_PARAM_TYPE || dtype == kDtypes.end()) continue;
    text += " --dtypes " + std::string(dtype->name);
    break;
  }
  return text + " --arch " + target;
}

// Into the bundle that the program uses, else into the cache.
std::string command_for(Objects& objects, const Kernel& kernel, const Specialization& wanted,
                        const std::string& target) {
  const std::string what = selection(kernel, wanted, target);
  if (objects.bundles().list().empty()) return "torchkiln warm" + what;
  const std::string bundle = objects.bundles().list().front()->path().string();
  const std::string addition = quoted(bundle + ".addition");
  return "torchkiln bundle create --out " + addition + what + " && torchkiln bundle merge --out " +
         quoted(bundle) + " " + quoted(bundle) + " " + addition;
}

}  // namespace

Error missing_kernel(Objects& objects, const Kernel& kernel, const Specialization& wanted,
                     const torchkiln_device& device) {
  const Target exact{.architecture = device.major * 10 + device.minor,
                     .specific = wanted.architecture_specific};
  const std::string target = exact.text();
  const std::string plain_target = Target{.architecture = exact.architecture}.text();
  const auto nearest = nearest_to(wanted, target, all_present(objects));
  const std::string command = command_for(objects, kernel, wanted, plain_target);

  std::string text = wanted.text() + "@" + target +
                     " is in no bundle and not in the cache, no generic variant is there to stand "
                     "in for it, and compiling is forbidden (TORCHKILN_JIT=forbid or seal()).";
  nlohmann::json details = {{"specialization", wanted.text()},
                            {"target", target},
                            {"nearest", nullptr},
                            {"differences", nlohmann::json::array()},
                            {"command", command}};
  if (nearest) {
    std::string differences;
    for (const std::string& d : nearest->differences) {
      differences += (differences.empty() ? "" : ", ") + d;
    }
    if (differences.empty()) {
      differences =
          "it was made from other sources (by another version of torchkiln), with other options, "
          "or "
          "by a compiler that the policy rules out";
    }
    text +=
        " The nearest one is " + nearest->text + " in " + nearest->where + ": " + differences + ".";
    details["nearest"] = nearest->text;
    details["differences"] = nearest->differences;
  }
  text += " To add it, where there is a compiler: " + command;
  return {TORCHKILN_ERROR_MISSING, text, details};
}

}  // namespace torchkiln::jit
