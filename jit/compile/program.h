// One NVRTC program: create, compile, read results, destroy.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "jit/driver/nvrtc_api.h"
#include "jit/spec/template_source.h"

namespace torchkiln::jit {

// Used by one thread. Throws Error(COMPILER) when a call fails that has no reason to.
class Program {
 public:
  Program(const NvrtcApi& nvrtc, const std::string& text, const std::string& name,
          const std::vector<SourceFile>& headers);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program();

  void instantiate(const std::string& name_expression);
  NvrtcResult compile(const std::vector<std::string>& options);

  std::string log() const;
  std::string lowered_name(const std::string& name_expression) const;
  std::string cubin() const;
  std::string ptx() const;  // with the final zero byte, which the driver needs

 private:
  using SizeCall = NvrtcResult (*)(NvrtcProgram, std::size_t*);
  using ReadCall = NvrtcResult (*)(NvrtcProgram, char*);

  void check(NvrtcResult result, const char* call) const;
  std::string read(SizeCall size, ReadCall contents, const char* call) const;

  const NvrtcApi& nvrtc_;
  NvrtcProgram program_ = nullptr;
};

}  // namespace torchkiln::jit
