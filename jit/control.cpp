// The table of control commands.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/control.h"

#include <algorithm>
#include <cstdlib>
#include <map>

#include "jit/deploy/commands.h"
#include "jit/driver/device.h"
#include "jit/driver/nvrtc_finder.h"
#include "jit/explain.h"
#include "jit/selftest.h"
#include "jit/tune/commands.h"
#include "jit/tune/ship.h"
#include "jit/warm.h"

// The environment, for the check for misspelt settings.
extern char** environ;  // NOLINT

namespace torchkiln::jit {
namespace {

using nlohmann::json;

json params_to_json(const Kernel& kernel) {
  json list = json::array();
  for (std::uint32_t i = 0; i < kernel.declaration.n_params; ++i) {
    const torchkiln_param& p = kernel.declaration.params[i];
    list.push_back({{"name", p.name},
                    {"tunable", p.tunable != 0},
                    {"constant", p.constant != 0},
                    {"values", values_to_json(p)}});
  }
  return list;
}

std::vector<std::string> operators_of(const Kernel& kernel) {
  const auto* names = kernel.declaration.operators;
  return {names, names + kernel.declaration.n_operators};
}

json kernels(Engine& engine, const json&) {
  json list = json::array();
  for (const Kernel* kernel : engine.kernels()) {
    list.push_back({{"path", kernel->declaration.path},
                    {"entry", kernel->declaration.entry},
                    {"operators", operators_of(*kernel)},
                    {"parameters", params_to_json(*kernel)}});
  }
  return {{"kernels", list}};
}

// Names of torchkiln_type, in its order.
json types(Engine&, const json&) {
  json names = json::array();
  for (std::int64_t type = 0; type < TORCHKILN_TYPE_COUNT; ++type) names.push_back(type_name(type));
  return {{"types", names}};
}

Points parse_points(const std::string& name) {
  if (name == "defaults") return Points::kDefaults;
  if (name == "corners") return Points::kCorners;
  if (name == "all") return Points::kAll;
  throw Error(TORCHKILN_ERROR_VALUE, "points must be defaults, corners or all; got " + name, {},
              "points");
}

// The device that a target such as "sm_90" stands for; none when there is no target.
std::vector<torchkiln_device> devices_of(const json& target) {
  if (target.is_null()) return {};
  return {typical_device(Target::parse(target.get<std::string>()).architecture)};
}

// Specialisations of the named operators (all when null), each once, tagged with the first operator that wants it:
// "points" of the search space that a GPU of "target", or any GPU, can run; and the choices recorded for GPUs of
// "architectures", each for its own.
json expand_operators(Engine& engine, const json& request) {
  const auto dtypes = parse_dtypes(request.value("dtypes", json()));
  const Points points = parse_points(request.value("points", "defaults"));
  const auto devices = devices_of(request.value("target", json()));
  const json wanted = request.value("operators", json());
  json list = json::array();
  std::vector<const Kernel*> done;
  const auto add = [&](const Kernel* kernel, const std::string& name) {
    if (std::find(done.begin(), done.end(), kernel) != done.end()) return;
    done.push_back(kernel);
    for (const Specialization& s : expand(*kernel, dtypes, points, devices)) {
      json row = s.to_json();
      row["operator"] = name;
      list.push_back(std::move(row));
    }
  };
  if (wanted.is_null()) {
    for (const Kernel* kernel : engine.kernels()) add(kernel, kernel->declaration.operators[0]);
  }
  for (const json& item : wanted) {
    const auto name = item.get<std::string>();
    for (const Kernel* kernel : engine.kernels_of(name)) add(kernel, name);
  }
  add_winners(engine, request.value("architectures", std::vector<std::string>()), list);
  return {{"specializations", list}};
}

json compile(Engine& engine, const json& request) {
  const auto specialization = Specialization::from_json(request.at("specialization"));
  Target target = Target::parse(request.at("target").get<std::string>());
  target.specific = specialization.architecture_specific;
  const Origin origin = request.value("own_compiler", false) ? Origin::kOwnCompiler : Origin::kAny;
  const Found found = engine.objects().get(specialization, target, Priority::kPrewarm, origin);
  const json& header = found.object->header;
  return {{"specialization", specialization.text()},
          {"arch", target.text()},
          {"status", found.layer == Layer::kCompiled ? "compiled" : "hit"},
          {"layer", layer_name(found.layer)},
          {"milliseconds", found.milliseconds},
          {"compile_milliseconds", number_field(header, "milliseconds")},
          {"registers", number_field(header, "registers")},
          {"spill_bytes", number_field(header, "spill_bytes")},
          {"shared_bytes", number_field(header, "shared_bytes")},
          {"bytes", found.object->payload.size()},
          {"key", found.key}};
}

json cache_stat(Engine& engine, const json&) {
  cache::Store& store = engine.objects().store();
  const auto entries = store.list();
  std::uint64_t bytes = 0;
  for (const cache::Entry& entry : entries) bytes += entry.bytes;
  const cache::StoreCounters c = store.counters();
  return {{"state", store.state()},
          {"readable", store.readable()},
          {"writable", store.writable()},
          {"entries", entries.size()},
          {"bytes", bytes},
          {"limit_bytes", engine.settings().cache_max_bytes},
          {"hits", c.hits},
          {"misses", c.misses},
          {"damaged", c.damaged},
          {"published", c.published},
          {"publish_failures", c.publish_failures}};
}

json cache_list(Engine& engine, const json&) {
  json list = json::array();
  cache::Store& store = engine.objects().store();
  for (const cache::Entry& entry : store.list()) {
    const auto used = std::chrono::system_clock::to_time_t(entry.used);
    list.push_back({{"key", entry.key},
                    {"compiler", entry.compiler},
                    {"bytes", entry.bytes},
                    {"used", static_cast<std::int64_t>(used)},
                    {"path", entry.path.string()}});
    const auto object = store.find(entry.key, entry.compiler, true,
                                   [](const cache::Object&) { return std::nullopt; });
    if (!object) continue;
    list.back()["specialization"] = object->header.value("text", "");
    list.back()["arch"] = object->header.value("target", "");
    list.back()["registers"] = number_field(object->header, "registers");
  }
  return {{"entries", list}};
}

json cache_clear(Engine& engine, const json&) {
  return {{"freed_bytes", engine.objects().store().clear()}};
}

json statistics(Engine& engine, const json&) { return engine.statistics().to_json(); }

std::vector<std::string> unknown_variables() {
  std::vector<std::string> unknown;
  for (char** variable = environ; variable != nullptr && *variable != nullptr; ++variable) {
    const std::string text = *variable;
    const std::string name = text.substr(0, text.find('='));
    if (!name.starts_with("TORCHKILN_")) continue;
    const auto infos = setting_infos();
    const bool known = std::any_of(infos.begin(), infos.end(),
                                   [&](const auto& info) { return name == info.name; });
    if (!known) unknown.push_back(name);
  }
  return unknown;
}

json settings(Engine& engine, const json&) {
  json variables = json::array();
  for (const SettingInfo& info : setting_infos()) {
    variables.push_back({{"name", info.name}, {"meaning", info.meaning}});
  }
  return {{"values", engine.settings().to_json()},
          {"variables", variables},
          {"unknown", unknown_variables()}};
}

json nvrtc(Engine& engine, const json& request) {
  json list = json::array();
  for (const NvrtcCandidate& candidate : nvrtc_search(engine.settings()).find()) {
    list.push_back(
        {{"path", candidate.path}, {"why", candidate.why}, {"compiler", candidate.compiler_id()}});
  }
  json reply = {{"candidates", list}};
  if (request.value("load", false)) {
    const auto compiler = engine.objects().compiler();
    reply["path"] = compiler->path();
    reply["compiler"] = compiler->id();
    reply["version"] = version_text(compiler->version());
    reply["architectures"] = compiler->architectures();
  }
  return reply;
}

json driver(Engine& engine, const json&) {
  Driver& d = engine.driver();
  json devices = json::array();
  for (int i = 0; i < device_count(d.api()); ++i) {
    const torchkiln_device& facts = d.device(i);
    devices.push_back({{"name", device_name(d.api(), i)},
                       {"major", facts.major},
                       {"minor", facts.minor},
                       {"multiprocessors", facts.multiprocessors},
                       {"shared_bytes_per_block", facts.shared_bytes_per_block},
                       {"l2_bytes", facts.l2_bytes},
                       {"compute_mode", compute_mode(d.api(), i)}});
  }
  return {{"version", d.version()}, {"devices", devices}};
}

json site_directories(Engine&, const json& request) {
  set_site_directories(request.at("paths").get<std::vector<std::string>>());
  return json::object();
}

// What this library was built with, such as "GCC 12.2".
json build(Engine&, const json&) {
#if defined(__clang__)
  const std::string name = "Clang";
  const int major = __clang_major__, minor = __clang_minor__;
#else
  const std::string name = "GCC";
  const int major = __GNUC__, minor = __GNUC_MINOR__;
#endif
  return {{"compiler", name + " " + std::to_string(major) + "." + std::to_string(minor)}};
}

json stop_for_exit(Engine& engine, const json&) {
  engine.objects().stop_for_exit();
  return json::object();
}

json selftest_store(Engine& engine, const json&) { return test_store(engine.settings()); }

using Command = json (*)(Engine&, const json&);
const std::map<std::string, Command>& commands() {
  static const std::map<std::string, Command> table = {
      {"kernels", &kernels},
      {"types", &types},
      {"expand", &expand_operators},
      {"compile", &compile},
      {"cache.stat", &cache_stat},
      {"cache.list", &cache_list},
      {"cache.clear", &cache_clear},
      {"statistics", &statistics},
      {"settings", &settings},
      {"nvrtc", &nvrtc},
      {"driver", &driver},
      {"build", &build},
      {"set_site_directories", &site_directories},
      {"selftest.store", &selftest_store},
      {"manifest.expand", &expand_manifests},
      {"record.start", &start_recording},
      {"record.stop", &stop_recording},
      {"seal", &seal},
      {"bundles", &bundles_in_use},
      {"bundle.create", &create_bundle},
      {"bundle.merge", &merge_bundles},
      {"bundle.list", &list_bundle},
      {"bundle.verify", &verify_bundle},
      {"tune.set", &set_tuning},
      {"tune.list", &list_spaces},
      {"tune.report", &report_tuning},
      {"records.export", &export_records},
      {"records.import", &import_records},
      {"records.examine", &examine_records},
      {"explain", &explain},
      {"ladder", &explain_ladder},
      {"dump", &dump},
      {"warm", &warm},
      {"stop_for_exit", &stop_for_exit},
  };
  return table;
}

}  // namespace

json values_to_json(const torchkiln_param& param) {
  json values = json::array();
  for (const std::int64_t value : std::span(param.values, param.n_values)) {
    values.push_back(param.kind == TORCHKILN_PARAM_TYPE ? json(type_name(value)) : json(value));
  }
  return values;
}

std::vector<std::int64_t> parse_dtypes(const json& names) {
  std::vector<std::int64_t> types;
  for (const json& name : names) {
    const auto found = std::ranges::find(kDtypes, name.get<std::string>(), &Dtype::name);
    if (found == kDtypes.end()) {
      throw Error(TORCHKILN_ERROR_VALUE,
                  "dtypes must be among float32, float16, bfloat16, float64; got " +
                      name.get<std::string>(),
                  {}, "dtypes");
    }
    types.push_back(found->type);
  }
  return types;
}

json control(Engine& engine, const std::string& command, const json& request) {
  const auto found = commands().find(command);
  if (found == commands().end()) {
    throw Error(TORCHKILN_ERROR_VALUE, "control: command must be a known one; got " + command);
  }
  return found->second(engine, request);
}

}  // namespace torchkiln::jit
