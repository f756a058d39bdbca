// Finding and opening bundles.
// SPDX-License-Identifier: Apache-2.0
#include "jit/deploy/bundles.h"

#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "jit/error.h"
#include "jit/log.h"

namespace torchkiln::jit {
namespace {

namespace fs = std::filesystem;

// Who owns the file that this code came from: a package installed by another user may bring a bundle of the same user.
uid_t owner_of_this_library() {
  Dl_info info{};
  struct stat status{};
  const bool known = ::dladdr(reinterpret_cast<void*>(&owner_of_this_library), &info) != 0 &&
                     ::stat(info.dli_fname, &status) == 0;
  return known ? status.st_uid : ::geteuid();
}

std::vector<std::string> bundles_in(const fs::path& folder) {
  std::vector<std::string> paths;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (entry.path().extension() == ".bundle") paths.push_back(entry.path().string());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::string trimmed(const std::string& text) {
  const std::size_t first = text.find_first_not_of(" \t\r");
  if (first == text.npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

// The values in section [torchkiln.bundles] of an entry_points.txt.
std::vector<std::string> bundle_packages(const fs::path& entry_points) {
  std::vector<std::string> packages;
  std::ifstream file(entry_points);
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    line = trimmed(line);
    const std::size_t equals = line.find('=');
    if (line.starts_with('[')) {
      inside = line == "[torchkiln.bundles]";
    } else if (inside && equals != line.npos && !line.starts_with('#')) {
      packages.push_back(trimmed(line.substr(equals + 1)));
    }
  }
  return packages;
}

// acme.kernels -> acme/kernels. Anything but names and dots is no package, and could lead elsewhere.
fs::path folder_of_package(std::string package) {
  const bool is_name = std::all_of(package.begin(), package.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '.';
  });
  if (!is_name || package.empty() || package.find("..") != package.npos || package[0] == '.')
    return {};
  std::replace(package.begin(), package.end(), '.', '/');
  return package;
}

}  // namespace

std::vector<cache::ObjectView> Bundles::find(const std::string& key,
                                             const cache::Bundle::Validate& validate) {
  for (const auto& bundle : list()) {
    if (auto objects = bundle->find(key, validate); !objects.empty()) return objects;
  }
  return {};
}

const Bundles::List& Bundles::list() {
  std::vector<Refused> fresh;
  {
    const std::scoped_lock lock(mutex_);
    if (opened_) return list_;
    opened_ = true;
    try {
      for (const std::string& path : configured_) open(path);
      for (const std::string& path : installed_ ? installed_() : std::vector<std::string>()) {
        open(path);
      }
    } catch (const std::exception& error) {  // a folder that cannot be read to its end
      refused_.push_back({"folder", error.what()});
    }
    fresh = refused_;
  }
  for (const Refused& r : fresh) {  // unlocked: a warning may call back
    warn("bundle " + r.path + " cannot be used: " + r.why +
         ". Its kernels are looked for elsewhere.");
  }
  return list_;
}

const std::vector<Bundles::Refused>& Bundles::refused() {
  list();
  return refused_;
}

void Bundles::open(const std::string& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    for (const std::string& file : bundles_in(path)) open(file);
    return;
  }
  const auto same = [&](const auto& bundle) { return bundle->path() == path; };
  if (std::any_of(list_.begin(), list_.end(), same)) return;
  std::string why;
  auto bundle = cache::Bundle::open(path, owner_of_this_library(), warn, why);
  if (bundle) {
    list_.push_back(std::move(bundle));
  } else {
    refused_.push_back({path, why});
  }
}

std::unique_ptr<cache::Bundle> open_bundle(const std::string& path) {
  std::string why;
  auto bundle = cache::Bundle::open(path, owner_of_this_library(), {}, why);
  if (!bundle) {
    throw Error(
        TORCHKILN_ERROR_VALUE,
        "bundle must be a file that 'torchkiln bundle create' made; got " + path + ": " + why, {},
        "bundle");
  }
  return bundle;
}

std::vector<std::string> installed_bundles(std::span<const std::string> site_directories) {
  std::vector<std::string> paths;
  for (const fs::path site : site_directories) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(site, error)) {
      if (entry.path().extension() != ".dist-info") continue;
      for (const std::string& package : bundle_packages(entry.path() / "entry_points.txt")) {
        const fs::path folder = folder_of_package(package);
        if (folder.empty()) continue;
        for (std::string& path : bundles_in(site / folder)) paths.push_back(std::move(path));
      }
    }
  }
  std::sort(paths.begin(), paths.end());
  paths.erase(std::unique(paths.begin(), paths.end()), paths.end());
  return paths;
}

}  // namespace torchkiln::jit
