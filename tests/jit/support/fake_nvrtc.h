// An NVRTC that takes as long as it is told, counts its compiles across processes and makes the same small cubin from
// the same program: what tests of the cache need instead of 100 MB and 40 ms.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <filesystem>
#include <span>
#include <string>

#include "jit/objects.h"
#include "jit/spec/template_source.h"

namespace torchkiln::jit::testing {

class FakeNvrtc {
 public:
  // Each compile takes `duration` and appends a byte to `counter`. One at a time in a process: NVRTC is a table of plain
  // functions. Makes two small files in `folder`, from which the identity is read.
  FakeNvrtc(const std::filesystem::path& folder, std::chrono::milliseconds duration,
            const std::filesystem::path& counter);

  CompilerSource source(const TemplateSources& sources) const;
  static std::size_t compiles(const std::filesystem::path& counter);

 private:
  NvrtcApi api_;
};

// Kernels enough: scale<float, block_size=index>.
std::span<const EmbeddedFile> scale_files();
TemplateSources scale_sources();
Specialization scale_specialization(int index);
// What a compile of it must give, whoever made it and wherever it was kept.
bool is_right_kernel(const cache::ObjectView& object, int index);

}  // namespace torchkiln::jit::testing
