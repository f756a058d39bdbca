// How a file appears in the store: at once and whole, or not at all, whatever befalls the writer.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace torchkiln::cache {

// 0, or EEXIST when somebody was first (their file stays), or the errno of what failed.
// Both directories lie on one file system. The temporary file is gone afterwards in every case
// but the death of this process.
int publish_file(int temporary_directory, int target_directory, const std::string& name,
                 std::string_view bytes);

// Removes what killed writers left: older than an hour when the writer was on this host and is
// gone, older than a day in any case. Ages end when the directory last changed, so call it after a
// publish_file.
void sweep_temporaries(int temporary_directory);

}  // namespace torchkiln::cache
