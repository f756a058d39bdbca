// The manifest: which specialisations a program used, as the texts that logs and errors print. Sorted, one a line, so
// that it can be compared, merged and reviewed like a source file.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <optional>
#include <set>
#include <span>
#include <string>

#include "jit/launch/kernel.h"
#include "jit/spec/specialization.h"

namespace torchkiln::jit {

using Manifest = std::set<std::string>;

std::string manifest_text(const Manifest& manifest);

// Throws Error(VALUE) for a text that is no manifest; `name` is for the sentence.
Manifest parse_manifest(const std::string& text, const std::string& name);

// Nothing when there is no file. Throws Error(VALUE) when it cannot be read.
std::optional<std::string> read_manifest_text(const std::filesystem::path& path);

// The same, and Error(VALUE) when it is no manifest.
std::optional<Manifest> read_manifest(const std::filesystem::path& path);

// The specialisation that a text stands for, by the kernel that is declared for it. Throws Error(VALUE) when there is
// none, or when its parameters have other names now.
Specialization parse_specialization(const std::string& text, std::span<Kernel* const> kernels);

}  // namespace torchkiln::jit
