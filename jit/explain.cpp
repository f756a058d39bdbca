// Answers about kernels that are not running.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/explain.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <set>

#include "jit/compile/ladder.h"
#include "jit/control.h"
#include "jit/driver/device.h"
#include "jit/driver/nvrtc_api.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
using Row = std::vector<std::int64_t>;
using Values = std::map<std::string, std::string>;

// What decides the ladder: a device, here or by its data sheet, and the compiler if there is one.
struct Subject {
  torchkiln_device device{};
  DeviceIdentity identity;  // whose tuning records count; empty when there are none
  std::shared_ptr<const Compiler> compiler;
  std::string no_compiler;  // why
  int driver_version = 0;

  Ladder ladder_of(bool specific, int min_architecture) const {
    if (!compiler) return ladder(device, specific, min_architecture, {}, 0, driver_version);
    return ladder(device, specific, min_architecture, compiler->architectures(),
                  compiler->version(), driver_version);
  }
};

Subject subject_of(Engine& engine, const json& request) {
  Subject subject;
  try {
    subject.compiler = engine.objects().compiler();
  } catch (const Error& e) {
    subject.no_compiler = e.what();
  }
  const json target = request.value("target", json());
  if (target.is_null()) {
    subject.device = engine.driver().device(request.value("device", 0));
    subject.identity = engine.tuner().identity(request.value("device", 0));
    subject.driver_version = engine.driver().version();
    return subject;
  }
  const int architecture = Target::parse(target.get<std::string>()).architecture;
  subject.device = typical_device(architecture);
  subject.identity = engine.tuner().recorded_device(architecture).value_or(DeviceIdentity{});
  // Nothing is known of that machine's driver: it is taken to be as new as the compiler.
  subject.driver_version = subject.compiler ? subject.compiler->version() : 0;
  return subject;
}

Error bad_value(const std::string& name, const std::string& rule, const std::string& got) {
  return {TORCHKILN_ERROR_VALUE, name + " must " + rule + "; got " + got, {}, name};
}

std::int64_t parse_number(const std::string& name, const std::string& text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size()) return value;
  throw bad_value(name, "be a whole number", text);
}

std::int64_t parse_value(const torchkiln_param& param, const std::string& text) {
  if (param.kind == TORCHKILN_PARAM_BOOL && (text == "true" || text == "false"))
    return text == "true" ? 1 : 0;
  if (param.kind != TORCHKILN_PARAM_TYPE) return parse_number(param.name, text);
  if (const auto type = type_from_name(text)) return *type;
  throw bad_value(param.name, "be one of " + all_type_names(), text);
}

// The static values asked about: those given, else all generic ones that exist.
std::vector<Row> statics_of(const Kernel& kernel, std::span<const std::int64_t> dtypes,
                            const Values& values) {
  std::set<Row> rows;
  for (const Specialization& s : expand(kernel, dtypes)) {
    Row row;
    for (std::uint32_t i = 0; i < kernel.n_statics; ++i) {
      const torchkiln_param& param = kernel.declaration.params[i];
      const auto given = values.find(param.name);
      row.push_back(given == values.end() ? s.arguments[i].value
                                          : parse_value(param, given->second));
    }
    const auto valid = kernel.declaration.valid;
    if (valid == nullptr || valid(kernel.declaration.context, row.data()) != 0)
      rows.insert(std::move(row));
  }
  return {rows.begin(), rows.end()};
}

// Sizes in declaration order; nothing when none is given.
std::optional<Row> sizes_of(const Kernel& kernel, const Values& values) {
  Row sizes;
  std::string missing;
  for (std::uint32_t i = 0; i < kernel.declaration.n_sizes; ++i) {
    const std::string name = kernel.declaration.sizes[i].name;
    if (const auto given = values.find(name); given != values.end()) {
      sizes.push_back(parse_number(name, given->second));
    } else {
      missing += (missing.empty() ? "" : ", ") + name;
    }
  }
  if (sizes.empty()) return std::nullopt;
  if (!missing.empty()) throw bad_value("sizes", "all be given", "none for " + missing);
  return sizes;
}

// What would be launched for these sizes; without sizes, everything that the defaults may be.
std::vector<Choice> choices_of(Engine& engine, const Kernel& kernel, const Subject& subject,
                               const Row& statics, const std::optional<Row>& sizes) {
  const torchkiln_declaration& d = kernel.declaration;
  if (sizes) {
    const torchkiln_problem problem{&subject.device, statics.data(), sizes->data(), d.context};
    return {engine.tuner().look_up(subject.identity, kernel, problem)};
  }
  std::vector<Choice> choices;
  for (std::uint32_t i = 0; i < d.n_defaults; ++i) {
    const auto row = tunables_of_row(kernel, i);
    if (!runs_somewhere(kernel, statics, row, {&subject.device, 1})) continue;
    const std::string why = d.n_defaults == 1
                                ? "the only default"
                                : "default " + std::to_string(i + 1) + " of " +
                                      std::to_string(d.n_defaults) + "; sizes and device decide";
    choices.push_back({{row.begin(), row.end()}, Quality::kDefault, why});
  }
  return choices;
}

json arguments_to_json(const Specialization& s, std::size_t begin, std::size_t end) {
  json result = json::object();
  for (std::size_t i = begin; i < end; ++i) result[s.arguments[i].name] = s.arguments[i].cpp();
  return result;
}

void add_object_facts(json& row, const Found& found) {
  const json& header = found.object->header;
  for (const char* name :
       {"registers", "shared_bytes", "stack_bytes", "spill_bytes", "compiler", "milliseconds"})
    row[name] = header.value(name, json());
  row["bytes"] = found.object->payload.size();
  row["key"] = found.key;
}

void add_rung(json& row, const Rung& rung) {
  row["rung"] = {{"target", rung.target.text()}, {"reason", rung.reason}};
}

// The same order as a launch (launch/resident.cpp), without its compile: a stored object of any rung, else what would be
// compiled.
void add_source(json& row, Engine& engine, const Subject& subject, const Specialization& s) {
  const Ladder tried = subject.ladder_of(s.architecture_specific, s.min_architecture);
  row["ladder"] = tried.explanation;
  std::vector<Rung> rungs = subject.compiler ? tried.rungs : tried.loadable;
  // A stored object for the exact chip serves even when this compiler does not know the chip.
  if (!tried.loadable.empty()) rungs.insert(rungs.begin(), tried.loadable.front());
  for (const Rung& rung : rungs) {
    const auto found = engine.objects().find(s, rung.target);
    if (!found) continue;
    row["layer"] = layer_name(found->layer);
    row["why"] = "stored";
    add_rung(row, rung);
    add_object_facts(row, *found);
    return;
  }
  if (engine.objects().mode() == JitMode::kForbid) {
    row["layer"] = "none";
    row["why"] =
        "in no layer, and compiling is forbidden; a launch takes a generic variant if one is "
        "stored";
  } else if (subject.compiler && !tried.rungs.empty()) {
    row["layer"] = "compile";
    row["why"] = "in no layer; the first call compiles it with NVRTC " +
                 version_text(subject.compiler->version());
    add_rung(row, tried.rungs.front());
  } else {
    row["layer"] = "none";
    row["why"] = subject.compiler ? tried.explanation : "in no layer, and " + subject.no_compiler;
  }
}

json row_of(Engine& engine, const Subject& subject, const Kernel& kernel, const Row& statics,
            const Choice& choice) {
  const Specialization s = specialize(kernel, statics, choice.tunables);
  json row = s.to_json();
  row = {{"specialization", row}, {"text", s.text()}};
  row["statics"] = arguments_to_json(s, 0, kernel.n_statics);
  row["tunables"] = arguments_to_json(s, kernel.n_statics, s.arguments.size());
  row["tunables_why"] = choice.why;
  row["tunables_quality"] = quality_name(choice.quality);
  add_source(row, engine, subject, s);
  return row;
}

// Every name in the request belongs to a kernel of the operator: a typing error must not pass for a default.
void require_known(const std::vector<const Kernel*>& kernels, const Values& values) {
  std::set<std::string> known;
  for (const Kernel* kernel : kernels) {
    for (std::uint32_t i = 0; i < kernel->n_statics; ++i)
      known.insert(kernel->declaration.params[i].name);
    for (std::uint32_t i = 0; i < kernel->declaration.n_sizes; ++i)
      known.insert(kernel->declaration.sizes[i].name);
  }
  std::string list;
  for (const std::string& name : known) list += (list.empty() ? "" : ", ") + name;
  for (const auto& [name, value] : values) {
    if (!known.contains(name)) throw bad_value("values", "be among " + list, name);
  }
}

}  // namespace

json explain_ladder(Engine& engine, const json& request) {
  constexpr int kOldestArchitecture = 75;
  const Ladder tried = subject_of(engine, request).ladder_of(false, kOldestArchitecture);
  json rungs = json::array();
  for (const Rung& rung : tried.rungs)
    rungs.push_back({{"target", rung.target.text()}, {"reason", rung.reason}});
  return {{"rungs", rungs}, {"explanation", tried.explanation}};
}

json explain(Engine& engine, const json& request) {
  const auto kernels = engine.kernels_of(request.at("operator").get<std::string>());
  const auto dtypes = parse_dtypes(request.value("dtypes", json()));
  const auto values = request.value("values", Values{});
  require_known(kernels, values);
  const Subject subject = subject_of(engine, request);
  json rows = json::array();
  for (const Kernel* kernel : kernels) {
    const auto sizes = sizes_of(*kernel, values);
    for (const Row& statics : statics_of(*kernel, dtypes, values)) {
      for (const Choice& choice : choices_of(engine, *kernel, subject, statics, sizes))
        rows.push_back(row_of(engine, subject, *kernel, statics, choice));
    }
  }
  return {{"kernels", rows},
          {"architecture", 10 * subject.device.major + subject.device.minor},
          {"compiler", subject.compiler ? subject.compiler->id() : subject.no_compiler}};
}

}  // namespace torchkiln::jit
