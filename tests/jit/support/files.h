// A temporary folder, and where the tests find NVRTC.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "jit/driver/nvrtc_finder.h"

namespace torchkiln::jit::testing {

namespace fs = std::filesystem;

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (fs::temp_directory_path() / "torchkiln-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = pattern;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }

  const fs::path& path() const { return path_; }
  // Writes a file with its folders; its path.
  std::string write(const std::string& name, const std::string& bytes) const {
    const fs::path file = path_ / name;
    fs::create_directories(file.parent_path());
    std::ofstream(file, std::ios::binary) << bytes;
    return file.string();
  }

 private:
  fs::path path_;
};

inline std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// TORCHKILN_NVRTC_PATH (a file or a folder), or TORCHKILN_TEST_SITE_DIRS: site-packages folders,
// separated by colons. Nothing else is searched, so that a toolkit of the machine is never used.
inline std::vector<NvrtcCandidate> test_nvrtcs() {
  NvrtcSearch search;
  search.ask_loader = false;
  search.explicit_path = variable("TORCHKILN_NVRTC_PATH");
  std::istringstream sites(variable("TORCHKILN_TEST_SITE_DIRS"));
  for (std::string site; std::getline(sites, site, ':');) search.site_directories.push_back(site);
  return search.find();
}

}  // namespace torchkiln::jit::testing
