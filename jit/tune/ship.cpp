// Winners and records, by program.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/ship.h"

#include <algorithm>
#include <map>
#include <set>

namespace torchkiln::jit {
namespace {

using nlohmann::json;

// What stays the same when a program is tuned: its kernel and static values.
std::string untuned(std::span<Kernel* const> kernels, const Specialization& s) {
  const Kernel* kernel = find_kernel(kernels, s.path, s.entry);
  std::string text = s.path + ":" + s.entry;
  const std::size_t count = kernel == nullptr ? 0 : kernel->n_statics;
  for (std::size_t i = 0; i < std::min(count, s.arguments.size()); ++i)
    text += "," + s.arguments[i].text();
  return text;
}

}  // namespace

void add_winners(Engine& engine, const std::vector<std::string>& architectures, json& list) {
  const auto kernels = engine.kernels();
  std::map<std::string, std::string> wanted;  // with the operator that wants it
  std::set<std::string> present;
  for (const json& row : list) {
    wanted.emplace(untuned(kernels, Specialization::from_json(row)),
                   row.at("operator").get<std::string>());
    present.insert(row.at("text").get<std::string>());
  }
  for (const std::string& arch : architectures) {
    for (const Specialization& s :
         winners(engine.tuner(), kernels, Target::parse(arch).architecture)) {
      const auto by = wanted.find(untuned(kernels, s));
      if (by == wanted.end() || present.contains(s.text())) continue;
      json row = s.to_json();
      row["operator"] = by->second;
      row["arch"] = arch;
      list.push_back(std::move(row));
    }
  }
}

void add_records(Engine& engine, const json& items, cache::BundleObjects& objects) {
  std::set<std::string> programs;
  for (const json& item : items) {
    const auto s = Specialization::from_json(item.at("specialization"));
    programs.insert(s.text() + "@" + Target::parse(item.at("target").get<std::string>()).text());
  }
  std::map<std::pair<std::string, std::string>, std::pair<DeviceIdentity, RecordsByKey>> files;
  for (const auto& [device, record] : engine.tuner().records().all()) {
    if (!programs.contains(record.program + "@sm_" + std::to_string(device.architecture))) continue;
    auto& file = files[{device.id(), record_name(record.key.kernel)}];
    file.first = device;
    file.second.emplace(record.key, record);
  }
  for (const auto& [place, file] : files) {
    const std::string key = record_key(place.first, place.second);
    const json header = {{"key", key},
                         {"compiler", kRecordCompiler},
                         {"device", place.first},
                         {"text", place.second}};
    objects[{key, kRecordCompiler}] =
        cache::encode_object(header, print_records(file.first, file.second));
  }
}

std::string merge_records(const std::string& object, const cache::ObjectView& other) {
  std::string why;
  const auto present = cache::decode_object_view(object, why);
  if (!present) throw Error(TORCHKILN_ERROR_INTERNAL, "a record in a bundle " + why);
  const RecordText ours = parse_records(std::string(present->payload));
  const RecordText theirs = parse_records(std::string(other.payload));
  if (!ours.device || !theirs.device) return object;
  RecordsByKey all;
  for (const auto* text : {&ours, &theirs}) {
    for (const TuningRecord& record : text->records) add(all, record);
  }
  return cache::encode_object(present->header, print_records(*ours.device, all));
}

}  // namespace torchkiln::jit
