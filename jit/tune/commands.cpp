// Modes, spaces, reports and records as JSON.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/commands.h"

#include <algorithm>

#include "cache/sha256.h"
#include "jit/control.h"
#include "jit/driver/device.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;

json space_to_json(const Kernel& kernel, std::span<const torchkiln_device> devices) {
  const torchkiln_declaration& d = kernel.declaration;
  json statics = json::array(), tunables = json::array(), sizes = json::array();
  std::int64_t points = 1;
  for (std::uint32_t i = 0; i < d.n_params; ++i) {
    (i < kernel.n_statics ? statics : tunables)
        .push_back({{"name", d.params[i].name}, {"values", values_to_json(d.params[i])}});
    if (i >= kernel.n_statics) points *= d.params[i].n_values;
  }
  for (std::uint32_t i = 0; i < d.n_sizes; ++i) {
    sizes.push_back({{"name", d.sizes[i].name},
                     {"bucket", d.sizes[i].bucket == TORCHKILN_BUCKET_POW2 ? "pow2" : "none"}});
  }
  json defaults = json::array();
  for (std::uint32_t i = 0; i < d.n_defaults; ++i)
    defaults.push_back(
        named(kernel, {d.defaults + std::size_t{i} * kernel.n_tunables, kernel.n_tunables}));
  return {{"kernel", std::string(d.path) + ":" + d.entry},
          {"operators", std::vector<std::string>(d.operators, d.operators + d.n_operators)},
          {"statics", statics},
          {"sizes", sizes},
          {"tunables", tunables},
          {"points", points},
          {"legal", count_legal(kernel, devices)},
          {"defaults", defaults}};
}

json report_to_json(const TuningReport& report) {
  const TuningRecord& r = report.record;
  json failed = json::array();
  for (const Trial& trial : r.trials) {
    if (!trial.failure.empty())
      failed.push_back({{"point", trial.point}, {"reason", trial.failure}});
  }
  return {{"kernel", r.program},
          {"statics", r.key.statics},
          {"sizes", r.sizes},
          {"default", r.standard},
          {"best", r.best},
          {"default_us", r.default_us},
          {"best_us", r.default_us * (1 - r.gain())},
          {"gain", r.gain()},
          {"noise", r.noise()},
          {"points", report.points},
          {"measured", report.measured},
          {"reused", report.reused},
          {"failed", failed},
          {"gpu_ms", report.gpu_ms},
          {"wall_ms", report.wall_ms},
          {"stopped", report.stopped},
          {"verified", r.verified}};
}

json placed_to_json(const Placed& placed) {
  return {{"device", placed.device.to_json()}, {"record", placed.record.to_json()}};
}

json stale_to_json(const Records::Health& health, const TuningEnvironment& now) {
  json list = json::array();
  for (const auto& [then, count] : health.environments) {
    for (const auto& [field, recorded, here] : changes(then, now))
      list.push_back({{"field", field}, {"recorded", recorded}, {"now", here}, {"records", count}});
  }
  return list;
}

json records_to_json(Engine& engine) {
  json records = json::array();
  for (const Placed& placed : engine.tuner().records().all())
    records.push_back(placed_to_json(placed));
  const std::string digest = cache::sha256_hex(records.dump());
  return {{"records", std::move(records)}, {"digest", digest}};
}

}  // namespace

json set_tuning(Engine& engine, const json& request) {
  const TuningState before = engine.tuner().state();
  TuningState now = before;
  if (request.contains("mode")) now.mode = parse_tune_mode(request.at("mode").get<std::string>());
  for (const auto& [name, value] :
       {std::pair("budget_ms", &now.budget_ms), std::pair("total_ms", &now.total_ms)}) {
    if (!request.contains(name)) continue;
    *value = request.at(name).get<double>();
    if (!(*value >= 0))
      throw Error(TORCHKILN_ERROR_VALUE,
                  std::string(name) + " must be at least 0; got " + request.at(name).dump(), {},
                  name);
  }
  engine.tuner().set_state(now);
  return {{"mode", tune_mode_name(before.mode)},
          {"budget_ms", before.budget_ms},
          {"total_ms", before.total_ms}};
}

json list_spaces(Engine& engine, const json& request) {
  const json target = request.value("target", json());
  std::vector<torchkiln_device> devices = typical_devices();
  if (!target.is_null())
    devices = {typical_device(Target::parse(target.get<std::string>()).architecture)};
  std::vector<const Kernel*> kernels;
  const auto add = [&](const Kernel* kernel) {
    if (std::find(kernels.begin(), kernels.end(), kernel) == kernels.end())
      kernels.push_back(kernel);
  };
  const json wanted = request.value("operators", json());
  if (wanted.is_null()) {
    for (const Kernel* kernel : engine.kernels()) add(kernel);
  }
  for (const json& name : wanted) {
    for (const Kernel* kernel : engine.kernels_of(name.get<std::string>())) add(kernel);
  }
  json spaces = json::array();
  for (const Kernel* kernel : kernels) spaces.push_back(space_to_json(*kernel, devices));
  return {{"spaces", spaces}};
}

json report_tuning(Engine& engine, const json& request) {
  const auto since = request.value("since", std::size_t{0});
  json tuned = json::array();
  for (const TuningReport& report : engine.tuner().reports_since(since))
    tuned.push_back(report_to_json(report));
  const std::size_t next = since + tuned.size();
  return {{"next", next}, {"tuned", std::move(tuned)}};
}

json export_records(Engine& engine, const json&) { return records_to_json(engine); }

json import_records(Engine& engine, const json& request) {
  std::vector<Placed> records;
  for (const json& row : request.at("records")) {
    auto device = DeviceIdentity::from_json(row.value("device", json()));
    auto record = TuningRecord::from_json(row.value("record", json()));
    if (!device || !record) {
      throw Error(TORCHKILN_ERROR_VALUE,
                  "records must be what records.export gave; got " + row.dump().substr(0, 200), {},
                  "records");
    }
    records.push_back({std::move(*device), std::move(*record)});
  }
  engine.tuner().records().replace(std::move(records));
  engine.tuner().records_changed();
  json now = records_to_json(engine);
  return {{"records", now.at("records").size()}, {"digest", now.at("digest")}};
}

json examine_records(Engine& engine, const json&) {
  const TuningEnvironment now = engine.tuner().environment();
  json files = json::array();
  for (const Records::Health& health : engine.tuner().records().examine()) {
    files.push_back({{"file", health.file},
                     {"device", health.device.name.empty() ? json() : health.device.to_json()},
                     {"records", health.records},
                     {"unreadable", health.unreadable},
                     {"stale", stale_to_json(health, now)}});
  }
  json devices = json::array();
  try {
    for (int i = 0; i < device_count(engine.driver().api()); ++i)
      devices.push_back(engine.tuner().identity(i).to_json());
  } catch (const Error&) {  // no driver here
  }
  return {{"files", files},
          {"devices", devices},
          {"state", engine.objects().store().state()},
          {"writable", engine.objects().store().writable()}};
}

}  // namespace torchkiln::jit
