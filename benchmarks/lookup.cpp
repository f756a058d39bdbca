// Times what a warm start does for one kernel: open a bundle, find an object in it or in the cache folder, verify it.
// Opens neither a compiler nor the driver. Prints JSON; benchmarks/deployment.py makes the report of it.
//
//   torchkiln_lookup_benchmark <bundle> <cache folder> <bytes: the object next to this size is taken>
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "cache/bundle.h"
#include "cache/store.h"
#include "jit/compile/compiler.h"
#include "jit/deploy/bundles.h"
#include "jit/spec/specialization.h"

namespace {

using torchkiln::cache::Bundle;
using torchkiln::cache::ObjectView;
using torchkiln::cache::Store;
using torchkiln::jit::Target;
using torchkiln::jit::validate_code;

constexpr int kRounds = 2000;

double median_microseconds(const std::function<bool()>& f) {
  std::vector<double> times;
  for (int i = 0; i < kRounds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    if (!f()) throw std::runtime_error("the object was not found");
    times.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
            .count());
  }
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

Bundle::Item nearest_to(const Bundle& bundle, std::size_t bytes) {
  std::optional<Bundle::Item> best;
  const auto distance = [&](const Bundle::Item& item) {
    return std::max(item.bytes.size(), bytes) - std::min(item.bytes.size(), bytes);
  };
  std::string why;
  for (std::size_t i = 0; i < bundle.size(); ++i) {
    auto item = bundle.item(i, why);
    if (!item) throw std::runtime_error(why);
    if (!best || distance(*item) < distance(*best)) best = std::move(item);
  }
  return std::move(best.value());
}

bool maps(const std::string& library) {
  std::ifstream file("/proc/self/maps");
  for (std::string line; std::getline(file, line);) {
    if (line.find(library) != line.npos) return true;
  }
  return false;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 4) throw std::runtime_error("needs a bundle, a cache folder and a size");
  const std::string path = arguments[1];
  const auto bundle = torchkiln::jit::open_bundle(path);
  const Bundle::Item item = nearest_to(*bundle, std::strtoul(arguments[3], nullptr, 10));
  const Target target = Target::parse(item.object.header.at("target").get<std::string>());
  const auto compiler = item.object.header.at("compiler").get<std::string>();
  Store store(arguments[2], [](const std::string& sentence) { std::cerr << sentence << "\n"; });
  store.publish(item.key, compiler, {item.object.header, std::string(item.object.payload)});

  const double open = median_microseconds(
      [&] { return torchkiln::jit::open_bundle(path)->size() == bundle->size(); });
  const double in_bundle = median_microseconds([&] {
    return !bundle
                ->find(
                    item.key,
                    [&](const ObjectView& o) { return validate_code(o.header, o.payload, target); })
                .empty();
  });
  const double in_store = median_microseconds([&] {
    return store
        .find(item.key, compiler, false,
              [&](const torchkiln::cache::Object& o) {
                return validate_code(o.header, o.payload, target);
              })
        .has_value();
  });
  std::cout << nlohmann::json{{"objects", bundle->size()},
                              {"bytes", bundle->bytes()},
                              {"object_bytes", item.bytes.size()},
                              {"code_bytes", item.object.payload.size()},
                              {"open_us", open},
                              {"bundle_us", in_bundle},
                              {"store_us", in_store},
                              {"libnvrtc_opened", maps("libnvrtc")},
                              {"libcuda_opened", maps("libcuda")}}
                   .dump(1)
            << "\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
