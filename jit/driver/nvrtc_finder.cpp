// Finds NVRTC in the order of NVIDIA's own Python packages.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/nvrtc_finder.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <string_view>
#include <system_error>

#include "jit/driver/dynamic_library.h"
#include "jit/driver/elf.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kLibrary = "libnvrtc.so";
constexpr std::string_view kAltLibrary = "libnvrtc.alt.so";
constexpr std::string_view kBuiltins = "libnvrtc-builtins.so";
constexpr std::string_view kAltBuiltins = "libnvrtc-builtins.alt.so";
constexpr int kMajors[] = {13, 12};  // newest first
constexpr std::size_t kLibraryDigits = 16;
constexpr std::size_t kBuiltinsDigits = 8;
const std::string kDefaultPlaces =
    "TORCHKILN_NVRTC_PATH, the libraries of this process, pip packages (nvidia/*/lib), "
    "CONDA_PREFIX, LD_LIBRARY_PATH, the system's loader, CUDA_HOME, CUDA_PATH and /usr/local/cuda";

// 13050 of "libnvrtc.so.13.5.92" after the stem "libnvrtc.so"; 13000 when there is no minor, 0 when
// the name is another one. `exact` says whether there was a minor.
int version_of_name(std::string_view name, std::string_view stem, bool& exact) {
  exact = false;
  if (!name.starts_with(stem) || name.size() <= stem.size() + 1 || name[stem.size()] != '.') {
    return 0;
  }
  const char* at = name.data() + stem.size() + 1;
  const char* end = name.data() + name.size();
  int major = 0;
  int minor = 0;
  const auto [rest, error] = std::from_chars(at, end, major);
  if (error != std::errc() || major < 1 || major > 99) return 0;
  if (rest != end && *rest == '.') {
    exact = std::from_chars(rest + 1, end, minor).ec == std::errc() && minor >= 0 && minor < 100;
  }
  return major * 1000 + (exact ? minor * 10 : 0);
}

std::string real_path(const std::string& path) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  return error ? path : real.string();
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

struct Builtins {
  std::string path;
  int version = 0;
};

Builtins builtins_in(const fs::path& folder, std::string_view stem, int major, int wanted) {
  Builtins best;
  for (const std::string& name : names_in(folder)) {
    bool exact = false;
    const int version = version_of_name(name, stem, exact);
    if (!exact || (major != 0 && version / 1000 != major)) continue;
    const bool better = best.version != wanted && (version == wanted || version > best.version);
    if (best.path.empty() || better) best = {(folder / name).string(), version};
  }
  return best;
}

Builtins find_builtins(const std::string& nvrtc_path) {
  const fs::path real = real_path(nvrtc_path);
  const bool alt = real.filename().string().starts_with(kAltLibrary);
  bool exact = false;
  const int named = version_of_name(real.filename().string(), alt ? kAltLibrary : kLibrary, exact);
  const std::string_view stem = alt ? kAltBuiltins : kBuiltins;
  for (const fs::path& folder : {fs::path(nvrtc_path).parent_path(), real.parent_path()}) {
    const Builtins found = builtins_in(folder, stem, named / 1000, exact ? named : 0);
    if (!found.path.empty()) return found;
  }
  return {"", exact ? named : 0};
}

std::string make_id(int version, const std::string& path, const std::string& builtins) {
  const std::string zeros(std::max(kLibraryDigits, kBuiltinsDigits), '0');
  const std::string library_id = file_identity(path).value_or(zeros) + zeros;
  const std::string builtins_id =
      (builtins.empty() ? zeros : file_identity(builtins).value_or(zeros)) + zeros;
  return "nvrtc-" + version_text(version) + "-" + library_id.substr(0, kLibraryDigits) + "-" +
         builtins_id.substr(0, kBuiltinsDigits);
}

// The libnvrtc of one folder for each major that we know, newest first. The bare development link
// counts only where no versioned name is.
void add_folder(std::vector<NvrtcCandidate>& list, const fs::path& folder, const std::string& why) {
  std::error_code error;
  const std::size_t before = list.size();
  for (const int major : kMajors) {
    const fs::path file = folder / (std::string(kLibrary) + "." + std::to_string(major));
    if (fs::is_regular_file(file, error)) list.push_back({file.string(), why});
  }
  const fs::path bare = folder / kLibrary;
  if (list.size() == before && fs::is_regular_file(bare, error)) {
    list.push_back({bare.string(), why});
  }
}

// nvidia/cu13/lib, nvidia/cuda_nvrtc/lib: one site may hold both, of different age.
void add_site(std::vector<NvrtcCandidate>& list, const std::string& site) {
  std::vector<NvrtcCandidate> found;
  const fs::path packages = fs::path(site) / "nvidia";
  for (const std::string& name : names_in(packages)) {
    if (name.starts_with("cu")) add_folder(found, packages / name / "lib", "pip package");
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& left, const auto& right) {
    return left.version() > right.version();
  });
  list.insert(list.end(), found.begin(), found.end());
}

void add_explicit(std::vector<NvrtcCandidate>& list, const std::string& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    add_folder(list, path, "TORCHKILN_NVRTC_PATH");
    add_folder(list, fs::path(path) / "lib64", "TORCHKILN_NVRTC_PATH");
    add_folder(list, fs::path(path) / "lib", "TORCHKILN_NVRTC_PATH");
  } else {
    // Also one that does not exist: opening it tells why.
    const bool bare_name = path.find('/') == std::string::npos && fs::exists(path, error);
    list.push_back({bare_name ? "./" + path : path, "TORCHKILN_NVRTC_PATH"});
  }
}

void keep_first_of_each_file(std::vector<NvrtcCandidate>& list) {
  std::vector<std::string> seen;
  std::erase_if(list, [&seen](const NvrtcCandidate& candidate) {
    const std::string file = candidate.by_soname() ? candidate.path : real_path(candidate.path);
    if (std::find(seen.begin(), seen.end(), file) != seen.end()) return true;
    seen.push_back(file);
    return false;
  });
}

// secure_getenv: a set-user-id program must not load what its caller names.
std::string variable(const char* name) {
  const char* value = ::secure_getenv(name);
  return value == nullptr ? "" : value;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(separator, at), text.size());
    // An empty part means the working directory to the loader; we search nothing there.
    if (end > at) parts.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

}  // namespace

int NvrtcCandidate::version() const { return by_soname() ? 0 : find_builtins(path).version; }

std::string NvrtcCandidate::compiler_id() const {
  if (by_soname()) return "";
  const Builtins builtins = find_builtins(path);
  std::error_code error;
  if (builtins.version == 0 || !fs::is_regular_file(path, error)) return "";
  return make_id(builtins.version, path, builtins.path);
}

std::string compiler_id(const NvrtcApi& nvrtc) {
  return make_id(nvrtc.version, nvrtc.path, find_builtins(nvrtc.path).path);
}

std::string builtins_beside(const std::string& nvrtc_path) {
  return find_builtins(nvrtc_path).path;
}

NvrtcSearch NvrtcSearch::of_process(const Settings& settings,
                                    std::span<const std::string> site_directories) {
  NvrtcSearch search;
  search.explicit_path = settings.nvrtc_path;
  search.mapped = mapped_libraries();
  search.site_directories.assign(site_directories.begin(), site_directories.end());
  search.conda_prefix = variable("CONDA_PREFIX");
  search.library_path = split(variable("LD_LIBRARY_PATH"), ':');
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    const std::string toolkit = variable(name);
    if (!toolkit.empty()) search.toolkits.push_back(toolkit);
  }
  search.toolkits.push_back("/usr/local/cuda");
  return search;
}

std::vector<NvrtcCandidate> NvrtcSearch::find() const {
  std::vector<NvrtcCandidate> list;
  if (!explicit_path.empty()) {
    add_explicit(list, explicit_path);
    return list;
  }
  for (const std::string& library : mapped) {
    const std::string name = fs::path(library).filename().string();
    bool exact = false;
    const bool is_nvrtc = name == kLibrary || version_of_name(name, kLibrary, exact) >= 12000;
    if (is_nvrtc) list.push_back({real_path(library), "already loaded"});
  }
  for (const std::string& site : site_directories) add_site(list, site);
  if (!conda_prefix.empty()) add_folder(list, fs::path(conda_prefix) / "lib", "CONDA_PREFIX");
  for (const std::string& folder : library_path) add_folder(list, folder, "LD_LIBRARY_PATH");
  for (const int major : ask_loader ? std::span(kMajors) : std::span<const int>()) {
    list.push_back({std::string(kLibrary) + "." + std::to_string(major), "system loader"});
  }
  for (const std::string& toolkit : toolkits) {
    add_folder(list, fs::path(toolkit) / "lib64", "CUDA toolkit");
  }
  keep_first_of_each_file(list);
  return list;
}

std::string NvrtcSearch::places() const {
  if (!explicit_path.empty()) return "TORCHKILN_NVRTC_PATH (" + explicit_path + ")";
  std::string text = "libraries of this process";
  for (const std::string& site : site_directories) text += ", " + site + "/nvidia/*/lib";
  if (!conda_prefix.empty()) text += ", " + conda_prefix + "/lib";
  for (const std::string& folder : library_path) text += ", " + folder;
  if (ask_loader) text += ", the system's loader (libnvrtc.so.13, libnvrtc.so.12)";
  for (const std::string& toolkit : toolkits) text += ", " + toolkit + "/lib64";
  return text;
}

std::vector<NvrtcCandidate> find_nvrtc(const Settings& settings,
                                       std::span<const std::string> site_directories) {
  return NvrtcSearch::of_process(settings, site_directories).find();
}

NvrtcApi load_first(std::span<const NvrtcCandidate> candidates, const std::string& places) {
  nlohmann::json tried = nlohmann::json::array();
  std::string broken;  // why a file that exists was of no use
  for (const NvrtcCandidate& candidate : candidates) {
    try {
      return load_nvrtc(candidate.path);
    } catch (const Error& error) {
      tried.push_back({{"path", candidate.path}, {"why", candidate.why}, {"error", error.what()}});
      if (broken.empty() && !candidate.by_soname()) broken = std::string(" ") + error.what() + ".";
    }
  }
  throw Error(TORCHKILN_ERROR_COMPILER,
              "compiler: NVRTC must be installed to compile a kernel; got none that loads from " +
                  (places.empty() ? kDefaultPlaces : places) + "." + broken +
                  " Run pip install torchkiln[compiler], or set TORCHKILN_NVRTC_PATH.",
              {{"tried", tried}});
}

NvrtcApi open_nvrtc(const NvrtcSearch& search) {
  return load_first(search.find(), search.places());
}

}  // namespace torchkiln::jit
