// From a specialisation to a checked object by NVRTC, in a closed world: every text is given in
// memory, no folder is searched.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache/object.h"
#include "jit/driver/nvrtc_api.h"
#include "jit/spec/specialization.h"
#include "jit/spec/template_source.h"

namespace torchkiln::jit {

// Immutable: any number of threads may compile at once. Each needs a stack of at least 512 KB, so
// run it on the threads of a CompilePool.
class Compiler {
 public:
  // `sources` must outlive the compiler.
  Compiler(NvrtcApi nvrtc, const TemplateSources& sources);

  // `key` is the cache key of these arguments. Throws Error(COMPILE) with the log, an excerpt and all
  // that is needed to repeat the compile in its details, Error(COMPILER) when NVRTC itself is
  // broken.
  cache::Object compile(const Specialization& specialization, const Target& target,
                        const std::string& key,
                        const std::vector<std::string>& canonical_options) const;

  const std::string& id() const { return id_; }
  int version() const { return nvrtc_.version; }  // 13050 for 13.5
  const std::vector<int>& architectures() const { return nvrtc_.architectures; }
  const std::string& path() const { return nvrtc_.path; }

 private:
  NvrtcApi nvrtc_;
  const TemplateSources& sources_;
  std::string id_;
  bool handlers_watched_ = false;
};

// What is wrong with code that should run on `target`, whoever made it; nothing when it may be handed to the driver. For
// bytes whose digest has been checked, as those of every object that was read.
std::optional<std::string> validate_code(const nlohmann::json& header, std::string_view payload,
                                         const Target& target);
// The same, and the digest in the header is that of the payload.
std::optional<std::string> validate_object(const nlohmann::json& header, std::string_view payload,
                                           const Target& target);
inline std::optional<std::string> validate_object(const cache::Object& object,
                                                  const Target& target) {
  return validate_object(object.header, object.payload, target);
}

}  // namespace torchkiln::jit
