// A libnvrtc that compiles for the emulated GPU: the host's C++ compiler on the same texts, with device.h in front. What it
// gives as a cubin is one to look at, and holds a library of the host where the machine code would be.
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

#include "cache/sha256.h"
#include "jit/driver/nvrtc_api.h"
#include "tests/jit/support/fake_cubin.h"

extern char** environ;

// Read again when they change: the caches of programs know a compiler by the build-id of its file.
asm(R"(.section .rodata
.incbin ")" TORCHKILN_EMULATOR_FOLDER R"(/device.h"
.incbin ")" TORCHKILN_EMULATOR_FOLDER R"(/abi.h"
.previous)");

namespace torchkiln::jit {

struct NvrtcProgramHandle {
  struct File {
    std::string name, text;
  };
  std::string text, name, expression, lowered, cubin, log;
  std::vector<File> headers;
};

}  // namespace torchkiln::jit

namespace {

using torchkiln::jit::NvrtcProgram;
using torchkiln::jit::NvrtcResult;
namespace fs = std::filesystem;

constexpr int kArchitectures[] = {75, 80, 86, 89, 90, 100, 120};
constexpr NvrtcResult kSuccess = torchkiln::jit::kNvrtcSuccess;

// A folder for one compile.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "torchkiln-XXXXXX").string();
    if (::mkdtemp(name.data()) != nullptr) path_ = name;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// Dynamic shared memory is the only one whose size nobody knows here: a pointer takes its place.
std::string with_dynamic_shared(const std::string& text) {
  static const std::regex declaration(R"(extern\s+__shared__\s+([^;\[\]]*?)(\w+)\s*\[\s*\]\s*;)");
  return std::regex_replace(
      text, declaration,
      "typedef $1 torchkiln_cell_of_$2; torchkiln_cell_of_$2* const $2 = "
      "reinterpret_cast<torchkiln_cell_of_$2*>(torchkiln_emulated.grid->dynamic_shared());");
}

std::string entry_of(const std::string& expression) {
  return R"(
extern "C" {
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
void torchkiln_run(const char* arguments) {
  torchkiln_emulator::call(&)" +
         expression + R"(, arguments);
}
__attribute__((section(".data"))) torchkiln_emulator::Kernel torchkiln_emulated = {
  &torchkiln_run, nullptr, nullptr, __bss_start, _end};
}
)";
}

// Runs the compiler; what it prints goes to `log`.
bool succeeds(std::vector<std::string> command, const fs::path& log) {
  std::vector<char*> arguments;
  for (std::string& word : command) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, log.c_str(), O_CREAT | O_WRONLY,
                                     0600);
  pid_t child = 0;
  const int failed =
      ::posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  int status = -1;
  if (failed == 0) {
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
  }
  return failed == 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Sums take in products unrounded, as on the GPU. (g++ does so with its expensive optimisations only.)
std::vector<std::string> fusing() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("fma")) return {};
  return {"-ffp-contract=fast", "-fexpensive-optimizations", "-mfma"};
#else
  return {"-ffp-contract=fast", "-fexpensive-optimizations"};
#endif
}

std::vector<std::string> command_for(const fs::path& folder, const fs::path& source,
                                     const fs::path& result) {
  std::vector<std::string> command = {
      TORCHKILN_EMULATOR_CXX, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-nostartfiles",
      "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing",
      // A large frame must not step over the page below the stack.
      "-fstack-clash-protection",
      // Flexible arrays apart, an index beyond an array traps, and so does a pointer that is not aligned.
      "-fsanitize=bounds,alignment",
#if defined(__clang__)
      "-fsanitize-trap=all",
#else
      "-fsanitize-undefined-trap-on-error", "-fno-gnu-unique",
#endif
      "-Wl,-Bsymbolic", "-include", TORCHKILN_EMULATOR_FOLDER "/device.h",
      "-fmacro-prefix-map=" + folder.string() + "/=", "-I" + folder.string(), "-o", result.string(),
      source.string(), "-lm"};
  for (const std::string& option : fusing()) command.push_back(option);
  return command;
}

int architecture_in(int n_options, const char* const* options) {
  for (int i = 0; i < n_options; ++i) {
    const std::string_view option = options[i];
    const std::size_t at = option.find("=sm_");
    int architecture = 0;
    if (at == option.npos) continue;
    std::from_chars(option.data() + at + 4, option.data() + option.size(), architecture);
    return architecture;
  }
  return 0;
}

NvrtcResult compile(NvrtcProgram program, int n_options, const char* const* options) {
  const Folder folder;
  for (const auto& header : program->headers) {
    write(folder.path() / header.name, with_dynamic_shared(header.text));
  }
  const fs::path source = folder.path() / "program.cpp";
  write(source, with_dynamic_shared(program->text) + entry_of(program->expression));
  const fs::path result = folder.path() / "kernel.so", log = folder.path() / "log";
  const bool done = succeeds(command_for(folder.path(), source, result), log);
  // In NVRTC's form: file(line): error: text.
  static const std::regex place(R"(([^\s:]+):(\d+):\d+: )"), root(folder.path().string() + "/");
  program->log = std::regex_replace(std::regex_replace(read(log), root, ""), place, "$1($2): ");
  const int architecture = architecture_in(n_options, options);
  if (!done || architecture == 0) return torchkiln::jit::kNvrtcCompilation;
  torchkiln::jit::testing::FakeCubin cubin;
  cubin.architecture = architecture;
  cubin.text = read(result);
  cubin.kernel = "emulated_" + torchkiln::cache::sha256_hex(cubin.text).substr(0, 16);
  program->lowered = cubin.kernel;
  program->cubin = cubin.bytes();
  return kSuccess;
}

}  // namespace

#define TORCHKILN_EXPORT extern "C" __attribute__((visibility("default")))

TORCHKILN_EXPORT NvrtcResult nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return kSuccess;
}
TORCHKILN_EXPORT const char* nvrtcGetErrorString(NvrtcResult) {
  return "the host's compiler failed";
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetNumSupportedArchs(int* count) {
  *count = static_cast<int>(std::size(kArchitectures));
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetSupportedArchs(int* architectures) {
  std::copy(std::begin(kArchitectures), std::end(kArchitectures), architectures);
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcCreateProgram(NvrtcProgram* program, const char* text,
                                                const char* name, int n_headers,
                                                const char* const* headers,
                                                const char* const* names) {
  *program = new torchkiln::jit::NvrtcProgramHandle;
  (*program)->text = text;
  (*program)->name = name;
  for (int i = 0; i < n_headers; ++i) (*program)->headers.push_back({names[i], headers[i]});
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcDestroyProgram(NvrtcProgram* program) {
  delete *program;
  *program = nullptr;
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcAddNameExpression(NvrtcProgram program, const char* expression) {
  program->expression = expression;
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcCompileProgram(NvrtcProgram program, int n_options,
                                                 const char* const* options) {
  try {
    return compile(program, n_options, options);
  } catch (const std::exception& error) {
    program->log = std::string("error: ") + error.what();
    return torchkiln::jit::kNvrtcCompilation;
  }
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetLoweredName(NvrtcProgram program, const char*,
                                                 const char** lowered) {
  *lowered = program->lowered.c_str();
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetCUBINSize(NvrtcProgram program, std::size_t* bytes) {
  *bytes = program->cubin.size();
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetCUBIN(NvrtcProgram program, char* cubin) {
  std::memcpy(cubin, program->cubin.data(), program->cubin.size());
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetPTXSize(NvrtcProgram, std::size_t* bytes) {
  *bytes = 0;
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetPTX(NvrtcProgram, char*) { return kSuccess; }
TORCHKILN_EXPORT NvrtcResult nvrtcGetProgramLogSize(NvrtcProgram program, std::size_t* bytes) {
  *bytes = program->log.size() + 1;
  return kSuccess;
}
TORCHKILN_EXPORT NvrtcResult nvrtcGetProgramLog(NvrtcProgram program, char* log) {
  std::memcpy(log, program->log.c_str(), program->log.size() + 1);
  return kSuccess;
}
