// What a kernel compiled for the host and the grid that runs it agree on.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace torchkiln_emulator {

struct Position {
  unsigned x, y, z;
};

// What the thread that runs can ask about itself.
struct Thread {
  Position thread, block, block_size, grid_size;
};

// Where in the kernel's source something is called.
struct Place {
  const char* file;
  int line;
};

enum WarpCall {
  kSyncWarp,
  kBallot,
  kAll,
  kAny,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kMatchAny,
  kMatchAll,
  kReduceAdd,
  kReduceMin,
  kReduceMinSigned,
  kReduceMax,
  kReduceMaxSigned,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
};
enum BlockCall { kSyncThreads, kSyncThreadsCount, kSyncThreadsAnd, kSyncThreadsOr };

// The grid, as a kernel calls it.
struct Grid {
  // Waits for the lanes in `mask`. `operand`: lane, distance or lane mask of a shuffle, in segments of `width` lanes.
  unsigned long long (*warp)(WarpCall call, unsigned mask, unsigned long long value, int operand,
                             int width, Place place);
  // Waits for the block.
  int (*block)(BlockCall call, int predicate, Place place);
  // Lets other threads and blocks run.
  void (*yield)();
  void* (*dynamic_shared)();
  void (*fail)(const char* what, Place place);
};

// What an object exports as `torchkiln_emulated`.
struct Kernel {
  void (*run)(const char* arguments);  // packed with their natural alignment
  Grid* grid;                          // set by whoever runs it
  Thread* thread;                      // the one that runs
  char *shared_begin, *shared_end;     // all of its static shared memory
};

}  // namespace torchkiln_emulator
