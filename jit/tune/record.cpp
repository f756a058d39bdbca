// Records as JSON, merged and compared.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/record.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

namespace torchkiln::jit {
namespace {

using nlohmann::json;

constexpr int kMostApart = 2;  // powers of two

json trial_to_json(const Trial& t) {
  json row = {{"point", t.point}};
  if (t.samples > 0) row.update({{"ratio", t.ratio}, {"noise", t.noise}, {"samples", t.samples}});
  if (!t.failure.empty()) row["failure"] = t.failure;
  if (t.spill_bytes > 0) row["spill_bytes"] = t.spill_bytes;
  return row;
}

Trial trial_from_json(const json& row) {
  Trial t;
  t.point = row.at("point").get<Point>();
  t.ratio = row.value("ratio", 0.0);
  t.noise = row.value("noise", 0.0);
  t.samples = row.value("samples", 0);
  t.failure = row.value("failure", "");
  t.spill_bytes = row.value("spill_bytes", std::int64_t{0});
  return t;
}

// Numbers of a hostile or damaged file must not decide anything by being no numbers.
bool sound(const Trial& t) {
  return std::isfinite(t.ratio) && t.ratio >= 0 && std::isfinite(t.noise) && t.noise >= 0 &&
         t.samples >= 0 && (t.samples > 0) == (t.ratio > 0);
}

}  // namespace

std::vector<EnvironmentChange> changes(const TuningEnvironment& then,
                                       const TuningEnvironment& now) {
  std::vector<EnvironmentChange> list;
  const auto compare = [&](const char* field, const std::string& before, const std::string& after) {
    if (!after.empty() && before != after) list.push_back({field, before, after});
  };
  const auto major = [](int version) {
    return version == 0 ? std::string() : std::to_string(version / 1000);
  };
  compare("compiler", then.compiler, now.compiler);
  compare("driver", major(then.driver), major(now.driver));
  compare("library", then.library, now.library);
  return list;
}

int TuningRecord::samples() const {
  return std::accumulate(trials.begin(), trials.end(), 0,
                         [](int sum, const Trial& t) { return sum + t.samples; });
}

const Trial* TuningRecord::find(const Point& point) const {
  const auto found =
      std::find_if(trials.begin(), trials.end(), [&](const Trial& t) { return t.point == point; });
  return found == trials.end() ? nullptr : &*found;
}

double TuningRecord::gain() const {
  const Trial* trial = best == standard ? nullptr : find(best);
  return trial == nullptr || trial->samples == 0 ? 0 : 1 - trial->ratio;
}

double TuningRecord::noise() const {
  const Trial* trial = find(best);
  return trial == nullptr ? 0 : trial->noise;
}

json TuningRecord::to_json() const {
  json list = json::array();
  for (const Trial& t : trials) list.push_back(trial_to_json(t));
  return {{"kernel", key.kernel},
          {"digest", key.digest},
          {"statics", key.statics},
          {"buckets", key.buckets},
          {"environment",
           {{"compiler", environment.compiler},
            {"driver", environment.driver},
            {"library", environment.library}}},
          {"sizes", sizes},
          {"best", best},
          {"default", standard},
          {"program", program},
          {"default_us", default_us},
          {"verified", verified},
          {"complete", complete},
          {"trials", list}};
}

std::optional<TuningRecord> TuningRecord::from_json(const json& row) try {
  TuningRecord r;
  r.key = {row.at("kernel").get<std::string>(), row.at("digest").get<std::string>(),
           row.at("statics").get<std::map<std::string, std::string>>(),
           row.at("buckets").get<std::map<std::string, int>>()};
  const json& environment = row.at("environment");
  r.environment = {environment.value("compiler", ""), environment.value("driver", 0),
                   environment.value("library", "")};
  r.sizes = row.at("sizes").get<std::map<std::string, std::int64_t>>();
  r.best = row.at("best").get<Point>();
  r.standard = row.at("default").get<Point>();
  r.program = row.at("program").get<std::string>();
  r.default_us = row.value("default_us", 0.0);
  r.verified = row.value("verified", false);
  r.complete = row.value("complete", false);
  for (const json& trial : row.at("trials")) r.trials.push_back(trial_from_json(trial));
  if (!std::all_of(r.trials.begin(), r.trials.end(), sound)) return std::nullopt;
  return r;
} catch (const json::exception&) {
  return std::nullopt;
}

TuningKey tuning_key(const Kernel& kernel, const std::string& digest,
                     std::span<const std::int64_t> statics, std::span<const std::int64_t> sizes) {
  const torchkiln_declaration& d = kernel.declaration;
  TuningKey key{std::string(d.path) + ":" + d.entry, digest, {}, {}};
  for (std::uint32_t i = 0; i < kernel.n_statics; ++i) {
    const TemplateArgument argument{
        d.params[i].name, static_cast<torchkiln_param_kind>(d.params[i].kind), statics[i]};
    key.statics[argument.name] = argument.cpp();
  }
  for (std::uint32_t i = 0; i < d.n_sizes; ++i)
    key.buckets[d.sizes[i].name] = bucket_of(d.sizes[i], sizes[i]);
  return key;
}

std::vector<std::string> tunable_names(const Kernel& kernel) {
  std::vector<std::string> names;
  for (std::uint32_t i = kernel.n_statics; i < kernel.declaration.n_params; ++i)
    names.emplace_back(kernel.declaration.params[i].name);
  return names;
}

Point named(const Kernel& kernel, std::span<const std::int64_t> tunables) {
  Point point;
  for (std::uint32_t i = 0; i < kernel.n_tunables; ++i)
    point[kernel.declaration.params[kernel.n_statics + i].name] = tunables[i];
  return point;
}

std::optional<std::vector<std::int64_t>> unnamed(const Kernel& kernel, const Point& point) {
  if (point.size() != kernel.n_tunables) return std::nullopt;
  std::vector<std::int64_t> row;
  for (std::uint32_t i = 0; i < kernel.n_tunables; ++i) {
    const torchkiln_param& p = kernel.declaration.params[kernel.n_statics + i];
    const auto value = point.find(p.name);
    if (value == point.end()) return std::nullopt;
    if (std::find(p.values, p.values + p.n_values, value->second) == p.values + p.n_values)
      return std::nullopt;
    row.push_back(value->second);
  }
  return row;
}

TuningRecord merge(const TuningRecord& a, const TuningRecord& b) {
  // The same of two equals whatever the order, so that machines agree.
  const auto knows = [](const TuningRecord& r) {
    return std::make_tuple(r.complete, r.samples(), r.best);
  };
  const bool b_knows_more = knows(a) < knows(b);
  TuningRecord result = b_knows_more ? b : a;
  for (const Trial& trial : (b_knows_more ? a : b).trials) {
    const auto same = std::find_if(result.trials.begin(), result.trials.end(),
                                   [&](const Trial& t) { return t.point == trial.point; });
    if (same == result.trials.end()) result.trials.push_back(trial);
  }
  std::sort(result.trials.begin(), result.trials.end(),
            [](const Trial& x, const Trial& y) { return x.point < y.point; });
  return result;
}

std::optional<int> distance(const TuningKey& a, const TuningKey& b) {
  if (a.kernel != b.kernel || a.digest != b.digest || a.statics != b.statics ||
      a.buckets.size() != b.buckets.size())
    return std::nullopt;
  int sum = 0;
  for (const auto& [name, bucket] : a.buckets) {
    const auto other = b.buckets.find(name);
    if (other == b.buckets.end()) return std::nullopt;
    const int apart = std::abs(bucket - other->second);
    if (apart > kMostApart) return std::nullopt;
    sum += apart;
  }
  return sum;
}

}  // namespace torchkiln::jit
