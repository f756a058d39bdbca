// Replacing a file outside the store at once and whole: manifests and bundles.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <string_view>

namespace torchkiln::cache {

// 0, or the errno of what failed; then the old file, if any, is untouched. Readers see the old bytes
// or the new ones, whatever befalls the writer. The file is readable for all (0644) whatever the
// umask. Also removes what killed writers of the same file left beside it.
int replace_file(const std::filesystem::path& path, std::string_view bytes);

}  // namespace torchkiln::cache
