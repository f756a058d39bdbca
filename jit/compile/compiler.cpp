// The compile, the checks of its result, and the report of its failure.
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/compiler.h"

#include <algorithm>
#include <chrono>
#include <string_view>

#include "cache/sha256.h"
#include "jit/compile/nvrtc_log.h"
#include "jit/compile/options.h"
#include "jit/compile/pool.h"
#include "jit/compile/program.h"
#include "jit/driver/elf.h"
#include "jit/driver/exit_handlers.h"
#include "jit/driver/nvrtc_finder.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

using Clock = std::chrono::steady_clock;

// One compile, and all that its failure must be able to tell.
struct Job {
  const Specialization& specialization;
  const Target& target;
  std::string key;
  std::vector<std::string> canonical;
  std::vector<std::string> options;
  std::string name;  // of the program
  std::string text;  // of the program
  std::vector<SourceFile> files;

  std::string label() const { return specialization.text() + "@" + target.text(); }
};

nlohmann::json details_of(const Job& job, const std::string& log, const std::string& quote) {
  nlohmann::json files = nlohmann::json::object();
  for (const SourceFile& file : job.files) files[file.path] = std::string(file.text);
  return {{"log", log},
          {"excerpt", quote},
          {"options", job.options},
          {"specialization", job.specialization.text()},
          {"target", job.target.text()},
          {"program", job.text},
          {"files", files}};
}

bool names_a_file_of(const Job& job, std::string_view name) {
  return std::any_of(job.files.begin(), job.files.end(), [&](const SourceFile& file) {
    return std::find(file.names.begin(), file.names.end(), name) != file.names.end();
  });
}

// A virtual name with a folder keeps headers of the working directory out, and the embedding step
// refuses odd includes; but NVRTC opens an absolute path in every mode. So each directive must name
// a file of the closure, or the key would not cover what was compiled.
void require_closed(const Job& job) {
  for (const SourceFile& file : job.files) {
    for (const IncludeLine& include : include_lines(file.text)) {
      if (names_a_file_of(job, include.name())) continue;
      throw Error(TORCHKILN_ERROR_COMPILE,
                  job.label() +
                      ": #include must name a template file by its path, in quotes; got " +
                      std::string(include.what) + " in " + file.path + "(" +
                      std::to_string(include.line) + "). Templates include nothing but templates.",
                  details_of(job, "", excerpt(file.text, include.line)));
    }
  }
}

// NVRTC ends the process when it gets no memory, so it is not started where it would get none.
void require_memory(const Job& job) {
  constexpr std::uint64_t kMegabyte = std::uint64_t{1} << 20;
  constexpr std::uint64_t kNeeded = 128 * kMegabyte;
  const std::uint64_t left = free_address_space();
  if (left >= kNeeded) return;
  throw Error(TORCHKILN_ERROR_COMPILER,
              job.label() + ": 128 MB of address space must be free to compile a kernel; got " +
                  std::to_string(left / kMegabyte) + " MB. Raise the limit (ulimit -v).");
}

std::string_view text_of(const Job& job, const std::string& file) {
  if (file == job.name) return job.text;
  for (const SourceFile& source : job.files) {
    const auto& names = source.names;
    if (std::find(names.begin(), names.end(), file) != names.end()) return source.text;
  }
  return {};
}

[[noreturn]] void throw_failure(const Job& job, const NvrtcApi& nvrtc, NvrtcResult result,
                                const std::string& log) {
  const std::string version = version_text(nvrtc.version);
  FirstError error = parse_first_error(log);
  if (error.text.empty()) error.text = nvrtc.nvrtcGetErrorString(result);
  if (result == kNvrtcBuiltins) {
    throw Error(TORCHKILN_ERROR_COMPILER,
                "NVRTC " + version + ": libnvrtc-builtins of the same version must lie beside " +
                    nvrtc.path + "; got " + error.text + ". Run pip install torchkiln[compiler].",
                details_of(job, log, ""));
  }
  const std::string place =
      error.file.empty() ? "" : error.file + "(" + std::to_string(error.line) + "): ";
  throw Error(
      TORCHKILN_ERROR_COMPILE,
      job.label() + ": NVRTC " + version + " failed. First error: " + place + error.text + ".",
      details_of(job, log, excerpt(text_of(job, error.file), error.line)));
}

nlohmann::json header_of(const Job& job, const Resources& resources,
                         const std::string& lowered_name, const std::string& payload) {
  // The numbers of PTX are not known before the driver compiles it.
  const auto number = [&](int value) {
    return resources.known ? nlohmann::json(value) : nlohmann::json();
  };
  return {{"key", job.key},
          {"kind", job.target.ptx ? "ptx" : "cubin"},
          {"specialization", job.specialization.to_json()},
          {"text", job.specialization.text()},
          {"target", job.target.text()},
          {"options", job.canonical},
          {"lowered_name", lowered_name},
          {"registers", number(resources.registers)},
          {"shared_bytes", number(resources.shared_bytes)},
          {"stack_bytes", number(resources.stack_bytes)},
          {"spill_bytes", number(resources.spill_bytes)},
          {"payload_sha256", cache::sha256_hex(payload)}};
}

// "" for a value of another type: headers come from files.
std::string string_field(const nlohmann::json& header, const char* name) {
  if (!header.is_object()) return "";
  const auto field = header.find(name);
  return field != header.end() && field->is_string() ? field->get<std::string>() : "";
}

std::optional<std::string> validate_cubin(std::string_view payload, const std::string& symbol,
                                          const Target& target) {
  const CubinFacts facts = inspect_cubin(payload, symbol);
  if (!facts.is_elf) return "the payload is no ELF file";
  if (facts.machine != kCudaMachine) {
    return "the ELF machine must be 190 (CUDA); got " + std::to_string(facts.machine);
  }
  if (facts.architecture != target.architecture) {
    return "the code must be for sm_" + std::to_string(target.architecture) + "; got sm_" +
           std::to_string(facts.architecture);
  }
  if (!facts.has_symbol) return "the kernel " + symbol + " is not in the code";
  if (facts.text_bytes == 0) return "the kernel " + symbol + " is empty";
  return std::nullopt;
}

std::optional<std::string> validate_ptx(std::string_view payload, const std::string& symbol,
                                        const Target& target) {
  const auto holds = [&](const std::string& part) { return payload.find(part) != payload.npos; };
  // The driver takes no length for PTX: it reads up to the zero.
  if (payload.empty() || payload.find('\0') != payload.size() - 1) {
    return "PTX must end with its only zero byte";
  }
  const std::string name =
      "sm_" + std::to_string(target.architecture) + (target.specific ? "a" : "");
  const std::size_t at = payload.find(".target " + name);
  const std::size_t end = at + std::string_view(".target ").size() + name.size();
  // The next letter tells sm_90 from sm_90a.
  if (at == payload.npos || std::string_view(", \t\r\n").find(payload[end]) == std::string::npos) {
    return "the PTX is not for " + target.text();
  }
  if (!holds(".entry " + symbol + "(")) return "the kernel " + symbol + " is not in the PTX";
  return std::nullopt;
}

}  // namespace

Compiler::Compiler(NvrtcApi nvrtc, const TemplateSources& sources)
    : nvrtc_(std::move(nvrtc)), sources_(sources), id_(compiler_id(nvrtc_)) {
  // NVRTC registers its handlers one by one, in the middle of its first compile. Without this an
  // exit() of another thread at that moment lets them run before the pool's, beside the compile.
  handlers_watched_ = watch_exit_handlers(
      nvrtc_.path, reinterpret_cast<const void*>(nvrtc_.nvrtcCompileProgram), &renew_exit_handler);
}

cache::Object Compiler::compile(const Specialization& specialization, const Target& target,
                                const std::string& key,
                                const std::vector<std::string>& canonical_options) const {
  const auto start = Clock::now();
  const Job job = {.specialization = specialization,
                   .target = target,
                   .key = key,
                   .canonical = canonical_options,
                   .options = nvrtc_options(canonical_options, target,
                                            !is_user_path(specialization.path), version(), key),
                   .name = "/torchkiln/" + specialization.entry + ".cu",
                   .text = specialization.program(),
                   .files = sources_.closure(specialization.path)};
  require_closed(job);
  require_memory(job);

  Program program(nvrtc_, job.text, job.name, job.files);
  const std::string expression = specialization.name_expression();
  program.instantiate(expression);
  const NvrtcResult result = program.compile(job.options);
  if (!handlers_watched_) renew_exit_handler();
  const std::string log = program.log();
  if (result != kNvrtcSuccess) throw_failure(job, nvrtc_, result, log);

  cache::Object object;
  object.payload = target.ptx ? program.ptx() : program.cubin();
  object.header =
      header_of(job, parse_resources(log), program.lowered_name(expression), object.payload);
  object.header["compiler"] = id_;
  object.header["nvrtc"] = version_text(version());
  object.header["warnings"] = parse_warnings(log);
  object.header["milliseconds"] =
      std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  if (const auto wrong = validate_object(object, target)) {
    throw Error(TORCHKILN_ERROR_COMPILE,
                job.label() + ": NVRTC " + version_text(version()) +
                    " must give code for the target; got a file in which " + *wrong + ".",
                details_of(job, log, ""));
  }
  return object;
}

std::optional<std::string> validate_code(const nlohmann::json& header, std::string_view payload,
                                         const Target& target) {
  if (string_field(header, "target") != target.text()) {
    return "the target must be " + target.text() + "; got " + string_field(header, "target");
  }
  if (string_field(header, "kind") != (target.ptx ? "ptx" : "cubin")) {
    return "the kind of the payload does not fit the target";
  }
  const std::string symbol = string_field(header, "lowered_name");
  if (symbol.empty()) return "the header names no kernel";
  return target.ptx ? validate_ptx(payload, symbol, target)
                    : validate_cubin(payload, symbol, target);
}

std::optional<std::string> validate_object(const nlohmann::json& header, std::string_view payload,
                                           const Target& target) {
  if (string_field(header, "target") == target.text() &&
      string_field(header, "payload_sha256") != cache::sha256_hex(payload)) {
    return "the payload does not have the digest in its header";
  }
  return validate_code(header, payload, target);
}

}  // namespace torchkiln::jit
