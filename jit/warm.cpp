// A work list, and threads that wait for the compile pool.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/warm.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "jit/compile/pool.h"
#include "jit/control.h"
#include "jit/deploy/commands.h"
#include "jit/tune/ship.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
using Work = std::vector<std::pair<Specialization, Target>>;

std::vector<Specialization> of_operators(Engine& engine, const json& request) {
  const json operators = request.value("operators", json());
  std::set<const Kernel*> kernels;
  if (operators.is_null()) {
    const auto all = engine.kernels();
    kernels.insert(all.begin(), all.end());
  }
  for (const json& name : operators) {
    const auto some = engine.kernels_of(name.get<std::string>());
    kernels.insert(some.begin(), some.end());
  }
  const auto dtypes = parse_dtypes(request.value("dtypes", json()));
  std::vector<Specialization> result;
  for (const Kernel* kernel : kernels) {
    const auto some = expand(*kernel, dtypes);
    result.insert(result.end(), some.begin(), some.end());
  }
  return result;
}

std::vector<Specialization> of_manifests(Engine& engine, const json& paths) {
  const json reply = expand_manifests(engine, {{"paths", paths}});
  if (const json& unknown = reply.at("unknown"); !unknown.empty())
    throw Error(TORCHKILN_ERROR_VALUE, unknown.front().at("error").get<std::string>());
  std::vector<Specialization> result;
  for (const json& row : reply.at("specializations"))
    result.push_back(Specialization::from_json(row));
  return result;
}

// Recorded choices are what launches will ask for.
void add_recorded(Engine& engine, const std::vector<Specialization>& specializations, Work& work,
                  const std::vector<std::string>& targets) {
  json list = json::array();
  for (const Specialization& s : specializations) {
    list.push_back(s.to_json());
    list.back()["operator"] = "";
  }
  const std::size_t before = list.size();
  add_winners(engine, targets, list);
  for (std::size_t i = before; i < list.size(); ++i) {
    const auto s = Specialization::from_json(list[i]);
    Target target = Target::parse(list[i].at("arch").get<std::string>());
    target.specific = s.architecture_specific;
    work.emplace_back(s, target);
  }
}

Work work_of(Engine& engine, const json& request) {
  const json manifests = request.value("manifests", json());
  const auto specializations =
      manifests.is_null() ? of_operators(engine, request) : of_manifests(engine, manifests);
  Work work;
  for (const json& name : request.at("targets")) {
    Target target = Target::parse(name.get<std::string>());
    for (const Specialization& s : specializations) {
      if (target.architecture < s.min_architecture) continue;
      target.specific = s.architecture_specific;
      work.emplace_back(s, target);
    }
  }
  add_recorded(engine, specializations, work, request.at("targets"));
  return work;
}

}  // namespace

json warm(Engine& engine, const json& request) {
  const Work work = work_of(engine, request);
  std::atomic<std::size_t> next = 0, compiled = 0, present = 0, failed = 0;
  std::mutex mutex;
  std::set<std::string> errors;
  const auto run = [&] {
    for (std::size_t i = next++; i < work.size(); i = next++) {
      try {
        const Found found = engine.objects().get(work[i].first, work[i].second, Priority::kPrewarm);
        ++(found.layer == Layer::kCompiled ? compiled : present);
      } catch (const Error& e) {
        ++failed;
        const std::scoped_lock lock(mutex);
        errors.insert(e.what());
      }
    }
  };
  const std::size_t most =
      engine.settings().compile_jobs != 0 ? engine.settings().compile_jobs : default_compile_jobs();
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < std::min(most, work.size()); ++i) threads.emplace_back(run);
  threads.clear();  // joins
  return {{"compiled", compiled.load()},
          {"present", present.load()},
          {"failed", failed.load()},
          {"errors", errors}};
}

}  // namespace torchkiln::jit
