// Loading, matching, saving.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/records.h"

#include <algorithm>
#include <sstream>

#include "cache/sha256.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;

constexpr int kFormat = 1;

json parse_line(const std::string& line) { return json::parse(line, nullptr, false); }

RecordsByKey by_key(const std::vector<TuningRecord>& records) {
  RecordsByKey result;
  for (const TuningRecord& record : records) add(result, record);
  return result;
}

}  // namespace

void add(RecordsByKey& to, const TuningRecord& record) {
  const auto [place, added] = to.try_emplace(record.key, record);
  if (!added) place->second = merge(place->second, record);
}

RecordText parse_records(const std::string& text) {
  RecordText result;
  std::istringstream lines(text);
  std::string line;
  if (!std::getline(lines, line)) return result;
  const json header = parse_line(line);
  if (!header.is_object() || header.value("format", json()) != kFormat) {
    result.unreadable = 1;
    return result;
  }
  result.device = DeviceIdentity::from_json(header.value("device", json()));
  while (std::getline(lines, line)) {
    if (auto record = TuningRecord::from_json(parse_line(line))) {
      result.records.push_back(std::move(*record));
    } else {
      ++result.unreadable;
    }
  }
  return result;
}

std::string print_records(const DeviceIdentity& device, const RecordsByKey& records) {
  std::string text = json{{"format", kFormat}, {"device", device.to_json()}}.dump() + "\n";
  for (const auto& [key, record] : records) text += record.to_json().dump() + "\n";
  return text;
}

std::string record_name(const std::string& kernel) {
  std::string name = kernel.substr(0, kernel.find(".cuh"));
  std::replace(name.begin(), name.end(), '/', '.');
  return name;
}

std::string record_key(const std::string& device, const std::string& name) {
  return cache::sha256_hex("torchkiln tuning records\n" + device + "\n" + name);
}

void Records::load_from_bundles(Known& to, const Place& place) {
  const auto objects =
      bundles_.find(record_key(place.first, place.second),
                    [](const cache::ObjectView&) { return std::optional<std::string>(); });
  for (const cache::ObjectView& object : objects) {
    for (const TuningRecord& record : parse_records(std::string(object.payload)).records)
      add(to.records, record);
  }
}

Records::Known& Records::known(const DeviceIdentity& device, const std::string& kernel) {
  const Place place{device.id(), record_name(kernel)};
  const auto [found, added] = known_.try_emplace(place, Known{device, {}});
  if (added && !imported_) {
    found->second.records = by_key(parse_records(files_.read(place.first, place.second)).records);
    load_from_bundles(found->second, place);
  }
  return found->second;
}

std::optional<Match> Records::find(const DeviceIdentity& device, const Kernel& kernel,
                                   const TuningKey& key, const torchkiln_problem& problem) {
  std::vector<Match> candidates;
  {
    const std::scoped_lock lock(mutex_);
    for (const auto& [other, record] : known(device, key.kernel).records) {
      const auto apart = distance(key, other);
      auto tunables = apart ? unnamed(kernel, record.best) : std::nullopt;
      if (tunables) candidates.push_back({record, std::move(*tunables), *apart});
    }
  }
  // Stable, and before it in the order of keys: of equally near ones every process takes the same.
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Match& a, const Match& b) { return a.distance < b.distance; });
  // Unlocked: what is legal may be a user's function, which takes Python's lock.
  for (Match& match : candidates) {
    if (is_legal(kernel, problem, match.tunables)) return std::move(match);
  }
  return std::nullopt;
}

std::optional<TuningRecord> Records::exact(const DeviceIdentity& device, const TuningKey& key) {
  const std::scoped_lock lock(mutex_);
  const auto& records = known(device, key.kernel).records;
  const auto found = records.find(key);
  if (found == records.end()) return std::nullopt;
  return found->second;
}

int Records::save(const DeviceIdentity& device, const TuningRecord& record) {
  {
    const std::scoped_lock lock(mutex_);
    // Replaces: the record was made from what was known, and may know that a trial was wrong.
    known(device, record.key.kernel).records.insert_or_assign(record.key, record);
  }
  return files_.merge(device.id(), record_name(record.key.kernel), [&](const std::string& present) {
    auto records = by_key(parse_records(present).records);
    const auto [place, added] = records.try_emplace(record.key, record);
    if (!added) place->second = merge(record, place->second);
    return print_records(device, records);
  });
}

// Asking for a place loads it whole.
void Records::load_everything() {
  const auto load = [&](const RecordText& text) {
    if (!text.device) return;
    for (const TuningRecord& record : text.records) known(*text.device, record.key.kernel);
  };
  for (const auto& file : files_.list()) load(parse_records(files_.read(file.folder, file.name)));
  for (const auto& bundle : bundles_.list()) {
    for (std::size_t row = 0; row < bundle->size(); ++row) {
      std::string why;
      const auto item = bundle->item(row, why);
      if (item && is_record(item->object)) load(parse_records(std::string(item->object.payload)));
    }
  }
}

std::vector<Placed> Records::all() {
  const std::scoped_lock lock(mutex_);
  if (!imported_) load_everything();
  std::vector<Placed> result;
  for (const auto& [place, here] : known_) {
    for (const auto& [key, record] : here.records) result.push_back({here.device, record});
  }
  return result;
}

void Records::replace(std::vector<Placed> records) {
  const std::scoped_lock lock(mutex_);
  known_.clear();
  imported_ = true;
  for (const Placed& placed : records)
    add(known(placed.device, placed.record.key.kernel).records, placed.record);
  for (const auto& [place, here] : known_) {
    files_.merge(place.first, place.second, [&here = here](const std::string& present) {
      auto all = by_key(parse_records(present).records);
      for (const auto& [key, record] : here.records) add(all, record);
      return print_records(here.device, all);
    });
  }
}

std::vector<Records::Health> Records::examine() const {
  std::vector<Health> result;
  for (const auto& file : files_.list()) {
    const auto text = parse_records(files_.read(file.folder, file.name));
    Health health{text.device.value_or(DeviceIdentity{}),
                  file.path.string(),
                  text.records.size(),
                  text.unreadable,
                  {}};
    for (const TuningRecord& record : text.records) ++health.environments[record.environment];
    result.push_back(std::move(health));
  }
  return result;
}

}  // namespace torchkiln::jit
