// Looking into bundles: what is in them, and the proof that it is whole and complete.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>
#include <set>

#include "jit/deploy/commands.h"
#include "jit/deploy/manifest.h"
#include "jit/tune/ship.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;

json facts_of(const cache::ObjectView& object) {
  const json& header = object.header;
  return {{"specialization", header.value("text", "")},
          {"arch", header.value("target", "")},
          {"compiler", header.value("compiler", "")},
          {"registers", number_field(header, "registers")},
          {"spill_bytes", number_field(header, "spill_bytes")},
          {"shared_bytes", number_field(header, "shared_bytes")},
          {"bytes", object.payload.size()}};
}

// What a bundle holds, as far as it is sound: specialisation -> architectures, and what else must be told.
struct Contents {
  std::map<std::string, std::set<std::string>> architectures_of;
  std::map<std::string, int> least_architecture;
  std::set<std::string> architectures, compilers;
  json spilling = json::array();
  json problems = json::array();
  std::size_t records = 0;  // files of tuning records

  void problem(const std::string& object, const std::string& why) {
    problems.push_back({{"object", object}, {"why", why}});
  }
};

// Sound code under a key that this version of the library will look for. Headers of hostile files may hold anything.
std::string fault_in(Engine& engine, const cache::Bundle::Item& item) try {
  const json& header = item.object.header;
  const auto specialization = Specialization::from_json(header.at("specialization"));
  const Target target = Target::parse(header.at("target").get<std::string>());
  if (header.value("text", "") != specialization.text()) return "its text is not its own";
  if (const auto wrong = validate_object(header, item.object.payload, target)) return *wrong;
  if (engine.objects().key_of(specialization, target) != item.key) {
    return "it was made from other sources or with other options: this version of torchkiln will "
           "not "
           "find it";
  }
  return {};
} catch (const std::exception& error) {
  return error.what();
}

void examine(Engine& engine, const cache::Bundle& bundle, std::size_t row, Contents& contents) {
  std::string why;
  const auto item = bundle.item(row, why);
  if (!item) return contents.problem("object " + std::to_string(row), why);
  if (is_record(item->object)) {
    ++contents.records;
    return;
  }
  why = fault_in(engine, *item);
  if (!why.empty()) return contents.problem(item->key.substr(0, 12), why);
  const json facts = facts_of(item->object);
  const auto text = facts.at("specialization").get<std::string>();
  const auto arch = facts.at("arch").get<std::string>();
  contents.architectures_of[text].insert(arch);
  contents.architectures.insert(arch);
  contents.compilers.insert(facts.at("compiler").get<std::string>());
  contents.least_architecture[text] =
      Specialization::from_json(item->object.header.at("specialization")).min_architecture;
  if (facts.at("spill_bytes").is_number() && facts.at("spill_bytes") != 0) {
    contents.spilling.push_back(
        {{"specialization", text}, {"arch", arch}, {"spill_bytes", facts.at("spill_bytes")}});
  }
}

Manifest wanted_specializations(const json& request, const Contents& contents) {
  Manifest wanted;
  if (!request.contains("manifest") || request.at("manifest").is_null()) {
    for (const auto& [text, architectures] : contents.architectures_of) wanted.insert(text);
    return wanted;
  }
  const auto path = request.at("manifest").get<std::string>();
  if (auto manifest = read_manifest(path)) return *manifest;
  throw Error(TORCHKILN_ERROR_VALUE, "manifest must be a file that is there; got " + path, {},
              "manifest");
}

// sm_90 is served by sm_90a too: a kernel has one of them.
bool has(const std::set<std::string>& architectures, const std::string& wanted) {
  return architectures.contains(wanted) || architectures.contains(wanted + "a");
}

json missing_from(const Contents& contents, const Manifest& wanted,
                  const std::vector<std::string>& architectures) {
  json missing = json::array();
  for (const std::string& text : wanted) {
    const auto found = contents.architectures_of.find(text);
    const auto least = contents.least_architecture.find(text);
    for (const std::string& arch : architectures) {
      const int number = Target::parse(arch).architecture;
      if (least != contents.least_architecture.end() && number < least->second) continue;
      if (found != contents.architectures_of.end() && has(found->second, arch)) continue;
      missing.push_back({{"specialization", text}, {"arch", arch}});
    }
  }
  return missing;
}

std::vector<std::string> wanted_architectures(const json& request, const Contents& contents) {
  const json asked = request.value("architectures", json());
  if (!asked.is_null()) return asked.get<std::vector<std::string>>();
  std::set<std::string> plain;
  for (const std::string& arch : contents.architectures) {
    plain.insert(arch.ends_with('a') ? arch.substr(0, arch.size() - 1) : arch);
  }
  return {plain.begin(), plain.end()};
}

}  // namespace

json list_bundle(Engine&, const json& request) {
  const auto bundle = open_bundle(request.at("path").get<std::string>());
  json objects = json::array();
  for (std::size_t i = 0; i < bundle->size(); ++i) {
    std::string why;
    if (const auto item = bundle->item(i, why)) {
      if (is_record(item->object)) continue;
      objects.push_back(facts_of(item->object));
    } else {
      throw Error(TORCHKILN_ERROR_VALUE,
                  "bundle must be undamaged; got " + bundle->path().string() + ": " + why, {},
                  "bundle");
    }
  }
  std::sort(objects.begin(), objects.end(), [](const json& a, const json& b) {
    return std::tie(a["specialization"], a["arch"], a["compiler"]) <
           std::tie(b["specialization"], b["arch"], b["compiler"]);
  });
  return {{"path", bundle->path().string()}, {"bytes", bundle->bytes()}, {"objects", objects}};
}

json verify_bundle(Engine& engine, const json& request) {
  const auto bundle = open_bundle(request.at("path").get<std::string>());
  Contents contents;
  for (std::size_t i = 0; i < bundle->size(); ++i) examine(engine, *bundle, i, contents);
  const auto architectures = wanted_architectures(request, contents);
  const Manifest wanted = wanted_specializations(request, contents);
  return {{"path", bundle->path().string()},
          {"objects", bundle->size() - contents.records},
          {"bytes", bundle->bytes()},
          {"records", contents.records},
          {"architectures", contents.architectures},
          {"compilers", contents.compilers},
          {"specializations", contents.architectures_of.size()},
          {"spilling", contents.spilling},
          {"missing", missing_from(contents, wanted, architectures)},
          {"problems", contents.problems}};
}

}  // namespace torchkiln::jit
