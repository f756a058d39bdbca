// RAII around an nvrtcProgram.
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/program.h"

#include "jit/error.h"

namespace torchkiln::jit {

Program::Program(const NvrtcApi& nvrtc, const std::string& text, const std::string& name,
                 const std::vector<SourceFile>& headers)
    : nvrtc_(nvrtc) {
  // Zero-terminated copies: nothing says that a string_view ends with a zero.
  std::vector<std::string> texts;
  std::vector<const char*> contents;
  std::vector<const char*> names;
  texts.reserve(headers.size());
  for (const SourceFile& header : headers) {
    texts.emplace_back(header.text);
    for (const std::string& name_of_header : header.names) {
      contents.push_back(texts.back().c_str());
      names.push_back(name_of_header.c_str());
    }
  }
  check(nvrtc.nvrtcCreateProgram(&program_, text.c_str(), name.c_str(),
                                 static_cast<int>(names.size()), contents.data(), names.data()),
        "nvrtcCreateProgram");
}

Program::~Program() { nvrtc_.nvrtcDestroyProgram(&program_); }

void Program::instantiate(const std::string& name_expression) {
  check(nvrtc_.nvrtcAddNameExpression(program_, name_expression.c_str()), "nvrtcAddNameExpression");
}

NvrtcResult Program::compile(const std::vector<std::string>& options) {
  std::vector<const char*> pointers;
  for (const std::string& option : options) pointers.push_back(option.c_str());
  return nvrtc_.nvrtcCompileProgram(program_, static_cast<int>(pointers.size()), pointers.data());
}

std::string Program::log() const {
  std::string text =
      read(nvrtc_.nvrtcGetProgramLogSize, nvrtc_.nvrtcGetProgramLog, "nvrtcGetProgramLog");
  while (!text.empty() && text.back() == '\0') text.pop_back();
  return text;
}

std::string Program::lowered_name(const std::string& name_expression) const {
  const char* lowered = nullptr;
  check(nvrtc_.nvrtcGetLoweredName(program_, name_expression.c_str(), &lowered),
        "nvrtcGetLoweredName");
  return lowered;
}

std::string Program::cubin() const {
  return read(nvrtc_.nvrtcGetCUBINSize, nvrtc_.nvrtcGetCUBIN, "nvrtcGetCUBIN");
}

std::string Program::ptx() const {
  return read(nvrtc_.nvrtcGetPTXSize, nvrtc_.nvrtcGetPTX, "nvrtcGetPTX");
}

void Program::check(NvrtcResult result, const char* call) const {
  if (result == kNvrtcSuccess) return;
  throw Error(TORCHKILN_ERROR_COMPILER, "NVRTC " + version_text(nvrtc_.version) + ": " + call +
                                            " must succeed; got " +
                                            nvrtc_.nvrtcGetErrorString(result) + ".");
}

std::string Program::read(SizeCall size, ReadCall contents, const char* call) const {
  std::size_t bytes = 0;
  check(size(program_, &bytes), call);
  std::string text(bytes, '\0');
  if (bytes > 0) check(contents(program_, text.data()), call);
  return text;
}

}  // namespace torchkiln::jit
