// Who runs first at exit: us, before a library that registers handlers of its own at a bad moment.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace torchkiln::jit {

// From now on `registered` is called, on the same thread, right after each exit handler that the
// loaded library registers by __cxa_atexit. `path` is its file with links resolved, `function` any
// function of it. False where that cannot be had; nothing is changed then. May be called again,
// and by several threads.
//
// Handlers run in reverse order, so whoever must run before those of the library has to register
// after each of them. There is no such call in the C library: this changes the library's own link
// to __cxa_atexit, which nobody else sees.
bool watch_exit_handlers(const std::string& path, const void* function, void (*registered)());

}  // namespace torchkiln::jit
