// The bundles that this process serves kernels from: those of TORCHKILN_BUNDLES, in order, then those of installed
// packages.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cache/bundle.h"

namespace torchkiln::jit {

// Thread-safe. Opened at the first look, once; a file that cannot be used costs one warning.
class Bundles {
 public:
  using Source = std::function<std::vector<std::string>()>;
  using List = std::vector<std::unique_ptr<const cache::Bundle>>;

  Bundles(std::vector<std::string> configured, Source installed)
      : configured_(std::move(configured)), installed_(std::move(installed)) {}

  // Objects of the key in the first bundle that has some.
  std::vector<cache::ObjectView> find(const std::string& key,
                                      const cache::Bundle::Validate& validate);
  const List& list();

  struct Refused {
    std::string path, why;
  };
  const std::vector<Refused>& refused();  // files that could not be used

  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  void open(const std::string& path);

  std::vector<std::string> configured_;
  Source installed_;
  std::mutex mutex_;  // held while opening
  bool opened_ = false;
  List list_;
  std::vector<Refused> refused_;
};

// A bundle for a tool: throws Error(VALUE) when it cannot be used.
std::unique_ptr<cache::Bundle> open_bundle(const std::string& path);

// Bundles of the packages in these site-packages folders: a distribution names a package of its own in the entry point
// group "torchkiln.bundles", and every *.bundle in that package's folder counts. Sorted. Reads text files only.
std::vector<std::string> installed_bundles(std::span<const std::string> site_directories);

}  // namespace torchkiln::jit
