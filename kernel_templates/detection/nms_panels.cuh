// Non-maximum suppression on the GPU, without host synchronisation and without the quadratic bit mask; for any kind of
// boxes (see nms.h). The kernels are in nms.cuh and nms_shapes.cuh.
//
//   sort      one block sorts one tile of keys (score, or class and score); with one tile it also does merge's work
//   merge     every key finds its place among the other tiles; boxes are gathered into that order
//   suppress  one block decides one panel of kPanel boxes; see below
//   compact   (in nms.cuh) with classes only: writes the kept rows by score (without classes, suppress does)
//
// suppress: block b tests its boxes against the kept boxes of panels 0 to b-1, as those become known, decides its own
// panel and publishes one word per 32 boxes. Blocks take panels from a counter, so a block only ever waits for blocks
// that run already: no deadlock, whatever is resident. Tests against the two panels before it and inside its own need
// no decision and are done while waiting; so between two decisions lies one word through L2 and a few ballots, about
// half a microsecond. Work is n times the number of kept boxes, memory 32 n bytes. With classes the order is by class,
// a class is one interval of it, and a block looks back only to where the class of its first box begins: classes run
// side by side and never test each other.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/scan.cuh"
#include "common/sort.cuh"
#include "detection/nms.h"

namespace torchkiln::nms {

template <class Scalar, bool kClasses>
constexpr int kKeyWords = (kClasses ? 1 : 0) + sizeof(Acc<Scalar>) / 4;

__device__ __forceinline__ u64 load_class(const Args& args, i64 row) {
  switch (args.idx_bytes) {
    case 1:
      return static_cast<const u8*>(args.idxs)[row];
    case 2:
      return static_cast<const u16*>(args.idxs)[row];
    case 4:
      return static_cast<const u32*>(args.idxs)[row];
    default:
      return static_cast<const u64*>(args.idxs)[row];
  }
}

// The key of a row: [class,] score, row. Order 0 is by score alone.
template <class Scalar, bool kClasses>
__device__ __forceinline__ SortKey<kKeyWords<Scalar, kClasses>> make_key(const Args& args, u32 row,
                                                                         int order) {
  SortKey<kKeyWords<Scalar, kClasses>> key;
  if (kClasses) key.word[0] = order == 0 ? 0 : load_class(args, row);
  const auto score = descending_key(load(static_cast<const Scalar*>(args.scores)[row]));
  constexpr int kAt = kClasses ? 1 : 0;
  if constexpr (sizeof(score) == 8) {
    key.word[kAt] = score;
    key.word[kAt + 1] = row;
  } else {
    key.word[kAt] = u64(score) << 32 | row;
  }
  return key;
}

// The least key of the same class.
template <int kWords>
__device__ __forceinline__ SortKey<kWords> class_begin(const SortKey<kWords>& key) {
  SortKey<kWords> begin = {};
  begin.word[0] = key.word[0];
  return begin;
}

// Records that `key` is at `place` of the given order, and its class begins at `first`.
template <class Kind, bool kClasses, int kWords>
__device__ __forceinline__ void put(const Args& args, const SortKey<kWords>& key, int order,
                                    u32 place, u32 first) {
  using Scalar = typename Kind::Scalar;
  const u32 row = u32(key.word[kWords - 1]);
  if (kClasses && order == 0) {
    args.score_rows[place] = row;
    args.score_ranks[row] = place;
    return;
  }
  const auto score = load(static_cast<const Scalar*>(args.scores)[row]);
  static_cast<typename Kind::Shape*>(args.sorted_boxes)[place] =
      participant<Kind>(Kind::load(args, row), score);
  args.sorted_rows[place] = row;
  if (kClasses) args.first[place] = first;
}

// What later launches expect to find: nothing decided, nothing kept, padding.
template <bool kClasses>
__device__ __forceinline__ void clear(const Args& args) {
  const i64 threads = i64(gridDim.x) * gridDim.y * blockDim.x;
  const i64 thread = (i64(blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
#pragma unroll 1
  for (i64 i = thread; i < args.n_words; i += threads) args.words[i] = 0;
#pragma unroll 1
  for (i64 i = thread; i < args.max_output; i += threads) args.indices[i] = -1;
  if (kClasses) {
#pragma unroll 1
    for (i64 i = thread; i < (args.n + 15) / 16 * 16; i += threads) args.kept[i] = 0;
  }
  if (thread < 2) args.counters[thread] = 0;
}

template <class Kind, bool kClasses, int kBlockSize>
__device__ __forceinline__ void sort_boxes(const Args& args) {
  using Scalar = typename Kind::Scalar;
  using Key = SortKey<kKeyWords<Scalar, kClasses>>;
  __shared__ Key keys[kTile];
  const int order = kClasses ? blockIdx.y : 0;
  const i64 begin = i64(blockIdx.x) * kTile;
  const int count = int(min_of(args.n - begin, i64(kTile)));
#pragma unroll 1
  for (int i = threadIdx.x; i < kTile; i += kBlockSize) {
    if (i < count) {
      keys[i] = make_key<Scalar, kClasses>(args, u32(begin + i), order);
    } else {
      for (u64& word : keys[i].word) word = ~u64(0);
    }
  }
  clear<kClasses>(args);
  __syncthreads();
  sort_tile<kTile, kBlockSize>(keys);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kBlockSize) {
    if (gridDim.x > 1) {
      static_cast<Key*>(args.keys)[order * args.n + begin + i] = keys[i];
    } else {
      const int first = kClasses && order == 1 ? count_less(keys, count, class_begin(keys[i])) : 0;
      put<Kind, kClasses>(args, keys[i], order, i, first);
    }
  }
}

// kLanes neighbouring threads share one key and divide the tiles among them.
template <class Kind, bool kClasses, int kLanes, int kBlockSize>
__device__ __forceinline__ void merge_boxes(const Args& args) {
  using Scalar = typename Kind::Scalar;
  using Key = SortKey<kKeyWords<Scalar, kClasses>>;
  const int order = kClasses ? blockIdx.y : 0;
  const Key* keys = static_cast<const Key*>(args.keys) + order * args.n;
  const u32 n = u32(args.n), item = blockIdx.x * (kBlockSize / kLanes) + threadIdx.x / kLanes;
  const u32 at = min_of(item, n - 1);  // no early return: the sums below need every lane
  const Key key = keys[at];
  u32 place = 0, first = 0;
#pragma unroll 1
  for (u32 tile = threadIdx.x % kLanes; tile <= (n - 1) / kTile; tile += kLanes) {
    const u32 begin = tile * kTile;
    const int count = int(min_of(n - begin, u32(kTile)));
    place += tile == at / kTile ? at - begin : u32(count_less(keys + begin, count, key));
    if (kClasses && order == 1) first += count_less(keys + begin, count, class_begin(key));
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    place += __shfl_xor_sync(0xffffffffu, place, offset);
    if (kClasses) first += __shfl_xor_sync(0xffffffffu, first, offset);
  }
  if (item < n && threadIdx.x % kLanes == 0) {
    put<Kind, kClasses>(args, key, order, place, first);
  }
}

// ---- suppress ------------------------------------------------------------------------------------------------------

constexpr int kNear = 2;  // panels before a panel that are tested ahead of their decision
constexpr u32 kAllLanes = ~u32(0);

// What a block holds. Row i of a mask has bit j set when box j of the other panel would suppress own box i.
template <class Kind, int kPanel>
struct Panel {
  using T = typename Kind::T;
  using Shape = typename Kind::Shape;
  static constexpr int kWords = kPanel / kWarpSize;
  static constexpr int kOthers = kNear * kPanel;  // kept boxes in shared memory at a time
  // Those of the panels before, oldest first, and then of kept boxes; behind them the own ones.
  Shape box[kOthers + kPanel];
  T area[kOthers + kPanel];
  u32 first[kPanel];                    // place where the box's class begins
  u32 mask[1 + kNear][kPanel][kWords];  // against itself, the panel before, the one before that
  u32 dead[kWords];                 // left out for their scores, or suppressed by earlier panels
  u32 list[kWarpSize * kWarpSize];  // places of newly decided kept boxes
  int n_list;
  int n_panels;  // how many panels they come from
  u32 ticket;
};

__device__ __forceinline__ u64 read_word(const u64* word) {
  return *static_cast<const volatile u64*>(word);
}

template <class Kind>
__device__ __forceinline__ typename Kind::Shape load_sorted(const Args& args, i64 place) {
  if (place < 0 || place >= args.n) return Kind::absent();
  return static_cast<const typename Kind::Shape*>(args.sorted_boxes)[place];
}

// Tests own boxes against those of the panel `back` panels before: a warp has 32 of them in its lanes.
template <int kPanel, int kBlockSize, class Kind>
__device__ __forceinline__ void test_panel(Panel<Kind, kPanel>& panel, i64 begin, int back,
                                           typename Kind::T threshold) {
  constexpr int kWords = Panel<Kind, kPanel>::kWords;
  const int lane = threadIdx.x % kWarpSize, warp = warp_number();
  constexpr int kOthers = Panel<Kind, kPanel>::kOthers;
  const int word = warp % kWords, at = word * kWarpSize + lane - back * kPanel;
  const i64 place = begin + at;
  const auto other = panel.box[kOthers + at];
  const auto other_area = panel.area[kOthers + at];
#pragma unroll 1
  for (int i = warp / kWords; i < kPanel; i += kBlockSize / kWarpSize / kWords) {
    const bool earlier = place < begin + i && place >= i64(panel.first[i]);
    const bool hit =
        earlier && Kind::template exceeds<true>(other, other_area, panel.box[kOthers + i],
                                                panel.area[kOthers + i], threshold);
    const u32 bits = __ballot_sync(kAllLanes, hit);
    if (lane == 0) panel.mask[back][i][word] = bits;
  }
}

// Waits until panel `from` is decided, then lists the kept boxes of all decided panels in [from, end), as many as fit.
// One warp calls. Returns the number of kept boxes.
template <int kPanel, class Kind>
__device__ __forceinline__ int collect(const Args& args, Panel<Kind, kPanel>& panel, i64 from,
                                       i64 end, u32 first_place) {
  constexpr int kWords = Panel<Kind, kPanel>::kWords;
  const int lane = threadIdx.x % kWarpSize;
  const i64 at = from * kWords + lane;
  int panels = 0;
  u32 bits = 0;
  while (true) {
    const u64 word = at < end * kWords ? read_word(args.words + at) : 0;
    const u32 open = ~__ballot_sync(kAllLanes, word >> 32 != 0);
    panels = (open == 0 ? kWarpSize : __ffs(open) - 1) / kWords;
    bits = lane < panels * kWords ? u32(word) : 0;
    if (panels > 0) break;
    // Our turn is end - from decisions away, each several times this long: fewer readers of a hot line.
    __nanosleep(u32(min_of((end - from) * 100, i64(2000))));
  }
  // Boxes before the class that continues into this panel are of no interest.
  const i64 skip = i64(first_place) - at * kWarpSize;
  if (skip >= kWarpSize) {
    bits = 0;
  } else if (skip > 0) {
    bits &= kAllLanes << skip;
  }
  const int inclusive = warp_inclusive_sum(__popc(bits));
  int slot = inclusive - __popc(bits);
#pragma unroll 1
  for (u32 rest = bits; rest != 0; rest &= rest - 1) {
    panel.list[slot++] = u32(at * kWarpSize) + __ffs(rest) - 1;
  }
  const int total = __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
  if (lane == 0) {
    panel.n_list = total;
    panel.n_panels = panels;
  }
  return total;
}

// Tests own boxes against the listed kept ones; kBlockSize / kPanel threads share an own box.
template <int kPanel, int kBlockSize, class Kind>
__device__ __forceinline__ void apply_list(const Args& args, Panel<Kind, kPanel>& panel,
                                           typename Kind::T threshold) {
  constexpr int kParts = kBlockSize / kPanel, kOthers = Panel<Kind, kPanel>::kOthers;
  using Shape = typename Kind::Shape;
  constexpr int kUnroll = Kind::kIsCheap ? 2 : 1;
  const int own = threadIdx.x % kPanel, part = threadIdx.x / kPanel;
  const auto box = panel.box[kOthers + own];
  const auto area = panel.area[kOthers + own];
  const int n_list = panel.n_list;
  bool hit = panel.dead[own / kWarpSize] >> own % kWarpSize & 1;
#pragma unroll 1
  for (int begin = 0; begin < n_list; begin += kOthers) {
    const int count = min_of(n_list - begin, kOthers);
#pragma unroll 1
    for (int k = threadIdx.x; k < count; k += kBlockSize) {
      panel.box[k] = static_cast<const Shape*>(args.sorted_boxes)[panel.list[begin + k]];
      panel.area[k] = Kind::area(panel.box[k]);
    }
    __syncthreads();
    if (!hit) {
#pragma unroll kUnroll
      for (int k = part; k < count; k += kParts) {
        hit |= Kind::template exceeds<true>(panel.box[k], panel.area[k], box, area, threshold);
      }
    }
    __syncthreads();
  }
  const u32 bits = __ballot_sync(kAllLanes, hit);
  if (threadIdx.x % kWarpSize == 0 && bits != 0) atomicOr(&panel.dead[own / kWarpSize], bits);
  __syncthreads();
}

// Waits for the panels just before this one and marks what their kept boxes suppress. One warp calls.
template <int kPanel, class Kind>
__device__ __forceinline__ int follow_near(const Args& args, Panel<Kind, kPanel>& panel, i64 index,
                                           i64 from, u32* dead) {
  constexpr int kWords = Panel<Kind, kPanel>::kWords;
  const int lane = threadIdx.x % kWarpSize;
  int kept = 0;
#pragma unroll 1
  for (i64 p = max_of(from, index - kNear); p < index; ++p) {
    u64 word;
    do {
      word = lane < kWords ? read_word(args.words + p * kWords + lane) : u64(1) << 32;
    } while (__any_sync(kAllLanes, word >> 32 == 0));
    const u32 bits = lane < kWords ? u32(word) : 0;
#pragma unroll 1
    for (int other = 0; other < kWords; ++other) {
      const u32 keep = __shfl_sync(kAllLanes, bits, other);
      kept += __popc(keep);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const u32 mask = panel.mask[index - p][w * kWarpSize + lane][other];
        dead[w] |= __ballot_sync(kAllLanes, (mask & keep) != 0);
      }
    }
  }
  return kept;
}

// Decides the boxes of `open`: kept when no kept box before it suppresses it. Each round decides every box whose
// possible suppressors are all decided; the rounds are as many as the longest chain of overlaps. One warp calls.
template <int kPanel, class Kind>
__device__ __forceinline__ void decide(const Panel<Kind, kPanel>& panel, u32* open, u32* keep) {
  constexpr int kWords = Panel<Kind, kPanel>::kWords;
  const int lane = threadIdx.x % kWarpSize;
  u32 mask[kWords][kWords];
  u32 any = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    any |= open[w];
    keep[w] = 0;
#pragma unroll
    for (int v = 0; v < kWords; ++v) mask[w][v] = panel.mask[0][w * kWarpSize + lane][v];
  }
#pragma unroll 1
  while (any != 0) {
    any = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      u32 hit = 0, waiting = 0;
#pragma unroll
      for (int v = 0; v <= w; ++v) {
        hit |= mask[w][v] & keep[v];
        waiting |= mask[w][v] & open[v];
      }
      const bool undecided = open[w] >> lane & 1;
      const u32 gone = __ballot_sync(kAllLanes, undecided && hit != 0);
      const u32 kept = __ballot_sync(kAllLanes, undecided && hit == 0 && waiting == 0);
      keep[w] |= kept;
      open[w] &= ~(kept | gone);
      any |= open[w];
    }
  }
}

template <int kWords>
__device__ __forceinline__ void publish(const Args& args, i64 index, const u32* keep) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if (lane == w) {
      *static_cast<volatile u64*>(args.words + index * kWords + w) = u64(1) << 32 | keep[w];
    }
  }
}

// Writes the rows of the kept boxes: behind `before` others, or as flags by score when there are classes.
template <bool kClasses, int kWords>
__device__ __forceinline__ void write_kept(const Args& args, i64 begin, const u32* keep,
                                           i64 before) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const i64 at = before + __popc(keep[w] & ((u32(1) << lane) - 1));
    if (keep[w] >> lane & 1) {
      const u32 row = args.sorted_rows[begin + w * kWarpSize + lane];
      if (kClasses) {
        args.kept[args.score_ranks[row]] = 1;
      } else if (at < args.max_output) {
        args.indices[at] = row;
      }
    }
    before += __popc(keep[w]);
  }
}

// The last block clears what the launch used, so that a launch finds the state it left. One warp calls, last of all.
__device__ __forceinline__ void leave(const Args& args) {
  const int lane = threadIdx.x % kWarpSize;
  u32 finished = 0;
  __syncwarp();
  if (lane == 0) finished = atomicInc(args.counters + 1, gridDim.x - 1);
  if (__shfl_sync(kAllLanes, finished, 0) != gridDim.x - 1) return;
#pragma unroll 1
  for (i64 i = lane; i < args.n_words; i += kWarpSize) args.words[i] = 0;
}

// Decides the boxes of `open` that earlier panels have left, publishes if asked, writes. One warp calls.
template <bool kClasses, int kPanel, class Kind>
__device__ __forceinline__ void settle(const Args& args, const Panel<Kind, kPanel>& panel,
                                       i64 index, u32* open, bool publishes, i64 before) {
  constexpr int kWords = Panel<Kind, kPanel>::kWords;
  u32 keep[kWords];
  decide(panel, open, keep);
  if (publishes) publish<kWords>(args, index, keep);
  write_kept<kClasses, kWords>(args, index * kPanel, keep, before);
  if (!kClasses && index == gridDim.x - 1 && threadIdx.x == 0) {
    i64 total = before;
#pragma unroll
    for (int w = 0; w < kWords; ++w) total += __popc(keep[w]);
    *args.count = min_of(total, args.max_output);
  }
}

// Takes from `carried` what the kept boxes of earlier panels suppress, as those become known. The warp that settles gets
// the number of these; every thread of the block must call.
template <bool kClasses, int kPanel, int kBlockSize, class Kind>
__device__ __forceinline__ i64 look_back(const Args& args, Panel<Kind, kPanel>& panel, i64 index,
                                         u32 class_begin_place, typename Kind::T threshold,
                                         u32* carried) {
  constexpr int kWords = Panel<Kind, kPanel>::kWords;
  const bool leader = warp_number() == 0;
  i64 before = 0;
  const i64 from = class_begin_place / kPanel;
  bool alive = true;
#pragma unroll 1
  for (i64 p = from; p < index - kNear; p += panel.n_panels) {
    __syncthreads();
    if (leader) collect(args, panel, p, index - kNear, class_begin_place);
    __syncthreads();
    before += panel.n_list;
    if (alive) apply_list<kPanel, kBlockSize>(args, panel, threshold);
    // A panel without hope needs no more tests; the rest of the loop only counts.
    alive = !kClasses && before >= args.max_output ? false : alive;
    u32 left = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) left |= carried[w] & ~panel.dead[w];
    alive = alive && left != 0;
    if (!alive && (kClasses || index != gridDim.x - 1)) break;
  }
  if (!leader) return before;
  u32 dead[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) dead[w] = panel.dead[w];
  if (alive || index == gridDim.x - 1) {
    before += follow_near<kPanel>(args, panel, index, from, dead);
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) carried[w] = alive ? carried[w] & ~dead[w] : 0;
  return before;
}

template <class Kind, bool kClasses, int kPanel, int kBlockSize>
__device__ __forceinline__ void suppress_boxes(const Args& args) {
  using T = typename Kind::T;
  constexpr int kWords = kPanel / kWarpSize, kOthers = Panel<Kind, kPanel>::kOthers;
  __shared__ Panel<Kind, kPanel> panel;
  const int lane = threadIdx.x % kWarpSize;
  const bool leader = warp_number() == 0;
  const T threshold = T(args.iou_threshold);

  if (threadIdx.x == 0) panel.ticket = atomicInc(args.counters, gridDim.x - 1);
  if (threadIdx.x < kWords) panel.dead[threadIdx.x] = 0;
  __syncthreads();
  const i64 index = panel.ticket, begin = index * kPanel;
#pragma unroll 1
  for (int at = threadIdx.x; at < kOthers + kPanel; at += kBlockSize) {
    const int i = at - kOthers;
    panel.box[at] = load_sorted<Kind>(args, begin + i);
    panel.area[at] = Kind::area(panel.box[at]);
    if (i < 0) continue;
    panel.first[i] = kClasses && begin + i < args.n ? args.first[begin + i] : 0;
    if (begin + i < args.n && left_out<typename Kind::Scalar>(args, args.sorted_rows[begin + i])) {
      atomicOr(&panel.dead[i / kWarpSize], u32(1) << i % kWarpSize);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int back = 0; back <= kNear; ++back) {
    test_panel<kPanel, kBlockSize>(panel, begin, back, threshold);
  }
  __syncthreads();

  // The class of the first box may have begun in an earlier panel; the boxes of the others are all here.
  const int count = int(min_of(args.n - begin, i64(kPanel)));
  const u32 class_begin_place = panel.first[0];
  const bool looks_back = i64(class_begin_place) < begin;
  const bool last_is_local = kClasses && i64(panel.first[count - 1]) >= begin;
  u32 here[kWords], carried[kWords];  // boxes whose class begins here, and the others
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int i = w * kWarpSize + lane;
    const bool local = kClasses && i64(panel.first[i]) >= begin;
    here[w] = __ballot_sync(kAllLanes, i < count && local) & ~panel.dead[w];
    carried[w] = __ballot_sync(kAllLanes, i < count && !local);
  }
  // First what begins here, then what earlier panels have a say in: a loop, so that the code that settles is there once.
  // Panels that follow ask only for the class of our last box.
#pragma unroll 1
  for (bool back = !kClasses;; back = true) {
    i64 before = 0;  // kept boxes in earlier panels, as the leader knows it
    if (back) {
      before = look_back<kClasses, kPanel, kBlockSize>(args, panel, index, class_begin_place,
                                                       threshold, carried);
#pragma unroll
      for (int w = 0; w < kWords; ++w) here[w] = carried[w];
    }
    if (leader) settle<kClasses>(args, panel, index, here, back != last_is_local, before);
    if (back || !looks_back) break;
  }
  if (leader) leave(args);
}

}  // namespace torchkiln::nms
