// Programs, options and results of the fake.
// SPDX-License-Identifier: Apache-2.0
#include "tests/jit/support/fake_nvrtc.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <charconv>
#include <cstring>
#include <fstream>
#include <system_error>
#include <thread>

#include "cache/sha256.h"
#include "jit/driver/nvrtc_finder.h"
#include "tests/jit/support/fake_cubin.h"

namespace torchkiln::jit {

struct NvrtcProgramHandle {
  std::string text;
  std::string expression;
  std::string cubin;
  std::string log;
};

namespace testing {
namespace {

constexpr int kVersion = 13000;
constexpr std::size_t kCodeBytes = 4500;  // with the rest a cubin of 5 KB, as small kernels have

struct Behaviour {
  std::chrono::milliseconds duration;
  std::string counter;
};
// Never freed and without a lock: compiles of other threads and forked children read it.
std::atomic<const Behaviour*> behaviour = nullptr;

std::string lowered(const std::string& expression) {
  return "_Z" + cache::sha256_hex(expression).substr(0, 16);
}

// Told by nothing but the name expression, so that a wrong kernel is seen.
std::string code_of(const std::string& expression) {
  std::string code;
  while (code.size() < kCodeBytes) code += cache::sha256_hex(expression + code);
  return code;
}

void count_compile(const std::string& counter) {
  const int fd = ::open(counter.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) return;
  [[maybe_unused]] const auto written = ::write(fd, "+", 1);
  ::close(fd);
}

int architecture_in(int n_options, const char* const* options) {
  constexpr std::string_view kFlag = "sm_";
  for (int i = 0; i < n_options; ++i) {
    const std::string_view option = options[i];
    const std::size_t at = option.find(kFlag);
    int architecture = 0;
    if (at == option.npos || !option.starts_with("-")) continue;
    const char* digits = option.data() + at + kFlag.size();
    std::from_chars(digits, option.data() + option.size(), architecture);
    if (architecture > 0) return architecture;
  }
  return 0;
}

NvrtcResult compile(NvrtcProgram program, int n_options, const char* const* options) {
  const Behaviour& now = *behaviour.load();
  count_compile(now.counter);
  std::this_thread::sleep_for(now.duration);
  FakeCubin cubin;
  cubin.architecture = architecture_in(n_options, options);
  cubin.kernel = lowered(program->expression);
  cubin.text = code_of(program->expression);
  program->cubin = cubin.bytes();
  return kNvrtcSuccess;
}

NvrtcResult create(NvrtcProgram* program, const char* text, const char*, int, const char* const*,
                   const char* const*) {
  *program = new NvrtcProgramHandle;
  (*program)->text = text;
  return kNvrtcSuccess;
}

NvrtcResult destroy(NvrtcProgram* program) {
  delete *program;
  *program = nullptr;
  return kNvrtcSuccess;
}

NvrtcResult add_expression(NvrtcProgram program, const char* expression) {
  program->expression = expression;
  return kNvrtcSuccess;
}

// The caller copies it before the program dies.
NvrtcResult lowered_name(NvrtcProgram program, const char*, const char** name) {
  program->log = lowered(program->expression);
  *name = program->log.c_str();
  return kNvrtcSuccess;
}

NvrtcResult cubin_size(NvrtcProgram program, std::size_t* bytes) {
  *bytes = program->cubin.size();
  return kNvrtcSuccess;
}

NvrtcResult get_cubin(NvrtcProgram program, char* cubin) {
  std::memcpy(cubin, program->cubin.data(), program->cubin.size());
  return kNvrtcSuccess;
}

NvrtcResult log_size(NvrtcProgram, std::size_t* bytes) {
  *bytes = 0;
  return kNvrtcSuccess;
}

NvrtcResult get_log(NvrtcProgram, char*) { return kNvrtcSuccess; }
const char* error_string(NvrtcResult) { return "fake error"; }

// A real kernel, so that a real compiler can take the place of the fake.
constexpr const char kSource[] = R"(#pragma once
namespace torchkiln { using half = unsigned short; using i32 = int; }
namespace torchkiln::scale {
struct Args { void* data; float factor; int n; };
template <class Scalar, int kBlockSize>
__global__ void forward(Args args) {
  const int i = blockIdx.x * kBlockSize + threadIdx.x;
  if (i < args.n) static_cast<Scalar*>(args.data)[i] *= args.factor;
}
}  // namespace torchkiln::scale
)";
const std::string kPath = "demo/scale.cuh";

}  // namespace

FakeNvrtc::FakeNvrtc(const std::filesystem::path& folder, std::chrono::milliseconds duration,
                     const std::filesystem::path& counter) {
  behaviour = new Behaviour{duration, counter.string()};
  const auto write = [&](const char* name, const char* id) {
    const auto path = folder / name;
    if (std::filesystem::exists(path)) return path.string();
    // Whole from the first moment: others may be reading it.
    const auto fresh = folder / ("fresh-" + std::to_string(::gettid()) + name);
    std::ofstream(fresh, std::ios::binary) << fake_library(id);
    std::error_code ignored;
    std::filesystem::rename(fresh, path, ignored);
    return path.string();
  };
  api_.path = write("libnvrtc.so.13", "0123456789abcdef0123");
  write("libnvrtc-builtins.so.13.0", "fedcba98fedcba98fedc");
  api_.version = kVersion;
  api_.architectures = {75, 80, 90, 100};
  api_.nvrtcGetErrorString = &error_string;
  api_.nvrtcCreateProgram = &create;
  api_.nvrtcDestroyProgram = &destroy;
  api_.nvrtcCompileProgram = &compile;
  api_.nvrtcAddNameExpression = &add_expression;
  api_.nvrtcGetLoweredName = &lowered_name;
  api_.nvrtcGetCUBINSize = &cubin_size;
  api_.nvrtcGetCUBIN = &get_cubin;
  api_.nvrtcGetProgramLogSize = &log_size;
  api_.nvrtcGetProgramLog = &get_log;
}

CompilerSource FakeNvrtc::source(const TemplateSources& sources) const {
  return {
      .identity = [api = api_] { return compiler_id(api); },
      .open = [api = api_, &sources] { return std::make_shared<const Compiler>(api, sources); }};
}

std::size_t FakeNvrtc::compiles(const std::filesystem::path& counter) {
  std::error_code none;
  const auto bytes = std::filesystem::file_size(counter, none);
  return none ? 0 : static_cast<std::size_t>(bytes);
}

std::span<const EmbeddedFile> scale_files() {
  static const std::string digest = cache::sha256_hex(kSource);
  static const EmbeddedFile file = {kPath.c_str(), kSource, sizeof(kSource) - 1, digest.c_str()};
  return {&file, 1};
}

TemplateSources scale_sources() { return TemplateSources(scale_files()); }

Specialization scale_specialization(int index) {
  return {.path = kPath,
          .entry = "forward",
          .arguments = {{"scalar", TORCHKILN_PARAM_TYPE, TORCHKILN_FLOAT},
                        {"block_size", TORCHKILN_PARAM_INT, index}}};
}

bool is_right_kernel(const cache::ObjectView& object, int index) {
  FakeCubin cubin;
  cubin.architecture = 90;
  const std::string expression = scale_specialization(index).name_expression();
  cubin.kernel = lowered(expression);
  cubin.text = code_of(expression);
  return object.payload == cubin.bytes();
}

}  // namespace testing
}  // namespace torchkiln::jit
