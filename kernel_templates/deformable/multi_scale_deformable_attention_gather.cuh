// Multi-scale deformable attention on the GPU: the value gradient, the same bits every time.
//
//   bound     the least and last pixel of each run of kRun samples
//   gather    a block owns a strip of neighbouring pixels and a chunk of channels of a head, looks for runs, then samples,
//             that touch it, and each group of its lanes sums, in registers, what falls on kPixels pixels
//
// spills: three blocks of a multiprocessor hide each other's barriers, and leave a thread 80 registers; a few bytes remain
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/scan.cuh"
#include "deformable/multi_scale_deformable_attention_samples.cuh"

namespace torchkiln::multi_scale_deformable_attention_gather {

using namespace torchkiln::multi_scale_deformable_attention;

// Runs that a thread lists, and a warp reads, between two barriers: few of the samples read touch the strip, so the time
// goes into waiting for them.
constexpr int kAhead = 4;

// The least and last pixel of each run of samples, a warp a run.
template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) bound(const Args args) {
  const i64 per_row = args.q * args.p, runs = (per_row + kRun - 1) / kRun;
  const i64 warp = i64(blockIdx.x) * (kBlockSize / kWarpSize) + threadIdx.x / kWarpSize;
  const i64 row = warp / runs, run = warp - row * runs;
  if (row >= args.b * args.m * args.l) return;
  const Level size = level_of(args.shapes, args.starts, args.s, row % args.l);
  const i64 lane = threadIdx.x % kWarpSize, own = run * kRun + lane;
  const i32 first = own < per_row ? args.firsts[row * per_row + own] : kOutside;
  i32 least = first == kOutside ? 2147483647 : first;
  i32 last = first == kOutside ? -1 : first + size.w + 1;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    least = min_of(least, __shfl_xor_sync(0xffffffffu, least, offset));
    last = max_of(last, __shfl_xor_sync(0xffffffffu, last, offset));
  }
  if (lane == 0) {
    args.spans[2 * warp] = least;
    args.spans[2 * warp + 1] = last;
  }
}

// What two neighbouring pixels get of a sample.
template <class T>
struct alignas(2 * sizeof(T)) Hit {
  T left, right;
};

// What the threads of a block of `gather` are to each other: kSets sets of groups of kLanes lanes. The groups of a set
// share the strip, kPixels pixels each; the sets share the samples, and their sums are added up in the end.
template <class Scalar, int kVector, int kLanes, int kPixels, int kSets, int kBlockSize>
struct Split {
  static constexpr int kGroups = kBlockSize / kLanes / kSets;  // of a set
  static constexpr int kStrip = kGroups * kPixels;
  static constexpr int kChannels = kLanes * kVector;
  static constexpr int kBytes = 16384;
  // Samples that are added up at once: so many as have room for their rows of the gradient.
  static constexpr int kRows = kBytes / int(sizeof(Scalar)) / kChannels;
  static constexpr int kBatch = kRows < kBlockSize ? kRows : kBlockSize;
  static_assert(kGroups % (kWarpSize / kLanes) == 0, "a warp belongs to one set");

  __device__ __forceinline__ static i32 set() { return i32(threadIdx.x) / kLanes / kGroups; }
  __device__ __forceinline__ static i32 group() { return i32(threadIdx.x) / kLanes % kGroups; }
};

// Samples are collected until they are worth being added up.
template <class Scalar, class AnySplit, int kBlockSize>
struct Collected {
  using T = Acc<Scalar>;
  union alignas(16) {
    Scalar rows[AnySplit::kBatch * AnySplit::kChannels];  // of the gradient of the output
    T partial_sums[AnySplit::kBytes / int(sizeof(T))];    // in the end
  };
  Hit<T> hits[2 * AnySplit::kBatch];
  i32 pixels[2 * AnySplit::kBatch];  // of hits: the left one, from the strip's first; or kOutside
  i32 samples[(1 + kAhead) * kBlockSize];  // of the row
  i32 runs[kAhead * kBlockSize];
  i32 counts[2][kBlockSize / kWarpSize];
  int partial[kBlockSize / kWarpSize];
};

// Samples of one level, head and image, and the strip of pixels of a block.
struct Target {
  i64 image, head, row;
  i32 level, begin, pixels;
  Level size;

  // Whether a sample whose first pixel is this one may touch the strip.
  __device__ __forceinline__ bool meets(i32 first) const {
    return u32(first) - u32(begin) + 1 <= u32(pixels) ||
           u32(first + size.w) - u32(begin) + 1 <= u32(pixels);
  }
};

// Two hits of a sample, on its upper and its lower pixels.
template <class T, class Place>
__device__ __forceinline__ void expand(const Args& args, const Target& to, i32 sample, Hit<T>* hits,
                                       i32* pixels) {
  const i32 points = i32(args.p), query = sample / points;
  const i32 own = to.level * points + sample - query * points;
  const auto at = query_at(args, to.image, to.head, query);
  const auto position = position_of<T, Place>(args, at, own, to.level, to.size);
  const u8* mask = args.mask == nullptr ? nullptr : args.mask + to.image * args.s;
  const Taps<T> taps = taps_at(position, to.size, mask);
  const T share = args.shares != nullptr
                      ? static_cast<const T*>(args.shares)[to.row * args.q * args.p + sample]
                      : T(load(static_cast<const Place*>(args.weights)[at.first + own]));
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const i32 pixel = taps.first + lower * to.size.w - to.begin;
    const bool hit = (taps.live >> 2 * lower & 3u) != 0 && pixel >= -1 && pixel < to.pixels;
    pixels[lower] = hit ? pixel : kOutside;
    hits[lower] = {taps.weights.at[2 * lower] * share, taps.weights.at[2 * lower + 1] * share};
  }
}

// What falls on the kPixels pixels of a group of lanes, for kVector channels of a lane.
template <int kPixels, int kVector, class T>
struct Sums {
  T at[kPixels][kVector];

  __device__ __forceinline__ void add(i32 pixel, Hit<T> hit, const T* gradient) {
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const T weight = pixel == j ? hit.left : (pixel + 1 == j ? hit.right : T(0));
      if (weight == T(0)) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) at[j][i] += weight * gradient[i];
    }
  }
};

// Reads the gradients of a batch: all at once, because those who add them have to wait for each.
template <class Scalar, int kVector, int kLanes, int kBlockSize>
__device__ __forceinline__ void load_rows(Scalar* rows, const i32* samples, i32 count,
                                          const Args& args, const Target& to, i32 first_channel) {
  const i32 stride = i32(args.m * args.d * i64(sizeof(Scalar))), points = i32(args.p);
  const i32 part = i32(threadIdx.x) % kLanes * kVector;
  if (first_channel + part >= args.d) return;
  const Scalar* gradients = static_cast<const Scalar*>(args.output) +
                            (to.image * args.q * args.m + to.head) * args.d + first_channel + part;
#pragma unroll 4
  for (i32 row = i32(threadIdx.x) / kLanes; row < count; row += kBlockSize / kLanes) {
    const auto values = load_pack<kVector>(apart(gradients, samples[row] / points, stride));
    store_pack<kVector>(rows + row * (kLanes * kVector) + part, values);
  }
}

// Adds the set's share of hits [0, n) to the group's pixels; each group goes through its own ones, in order. Every thread
// must call.
template <class AnySplit, int kLanes, int kSets, class Scalar, int kPixels, int kVector, class T>
__device__ __forceinline__ void add_hits(const Scalar* rows, const Hit<T>* hits, const i32* pixels,
                                         i32 n, Sums<kPixels, kVector, T>& sums) {
  constexpr int kWarpGroups = kWarpSize / kLanes;
  const i32 group = AnySplit::group(), lane = threadIdx.x % kWarpSize;
  const i32 first_group = group / kWarpGroups * kWarpGroups;
#pragma unroll 1
  for (i32 begin = AnySplit::set() * kWarpSize; begin < n; begin += kSets * kWarpSize) {
    const i32 pixel = begin + lane < n ? pixels[begin + lane] : kOutside;
    u32 own = 0;
#pragma unroll
    for (int j = 0; j < kWarpGroups; ++j) {
      const i32 first = (first_group + j) * kPixels;
      const u32 found = __ballot_sync(0xffffffffu, pixel >= first - 1 && pixel < first + kPixels);
      if (first_group + j == group) own = found;
    }
#pragma unroll 1
    for (; own != 0; own &= own - 1) {
      const i32 at = begin + __ffs(int(own)) - 1;
      const Scalar* row = rows + at / 2 * (kLanes * kVector) + lane % kLanes * kVector;
      const auto given = read_pack<kVector>(row);
      T gradient[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) gradient[i] = load(given.at[i]);
      sums.add(pixels[at] - group * kPixels, hits[at], gradient);
    }
  }
}

// Goes through the samples of a level that touch the strip. Every thread of the block must call.
template <class Place, class AnySplit, int kLanes, int kSets, int kBlockSize, class Scalar,
          int kPixels, int kVector, class T>
__device__ __forceinline__ void add_level(Collected<Scalar, AnySplit, kBlockSize>& collected,
                                          const Args& args, const Target& to, i32 first_channel,
                                          Sums<kPixels, kVector, T>& sums) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const i32 per_row = i32(args.q * args.p), runs = (per_row + kRun - 1) / kRun;
  const i32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const i32* firsts = args.firsts + to.row * per_row;
  const i32* spans = args.spans + to.row * runs * 2;
  i32 pending = 0, parity = 0;
#pragma unroll 1
  for (i32 base = 0; base < runs; base += kAhead * kBlockSize) {
    const i32 candidate = base + kAhead * i32(threadIdx.x);
    u32 listed = 0;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (candidate + j < runs && spans[2 * (candidate + j)] < to.begin + to.pixels &&
          spans[2 * (candidate + j) + 1] >= to.begin) {
        listed |= 1u << j;
      }
    }
    int total;
    int place = block_exclusive_sum<kBlockSize>(__popc(listed), collected.partial, total);
    for (; listed != 0; listed &= listed - 1) {
      collected.runs[place++] = candidate + __ffs(int(listed)) - 1;
    }
    __syncthreads();
    // The last round of all adds up what is left.
    const bool last = base + kAhead * kBlockSize >= runs;
#pragma unroll 1
    for (i32 i = 0; i < total || (last && i == 0); i += kAhead * kWarps) {
      const i32 first_run = i + kAhead * warp;
      u32 found[kAhead];
      i32 own_count = 0;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const i32 own =
            first_run + j < total ? collected.runs[first_run + j] * kRun + lane : per_row;
        found[j] = u32(own < per_row ? firsts[own] : kOutside);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        found[j] = __ballot_sync(0xffffffffu, to.meets(i32(found[j])));
        own_count += __popc(found[j]);
      }
      if (lane == 0) collected.counts[parity][warp] = own_count;
      __syncthreads();
      i32 before = pending;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const i32 count = collected.counts[parity][w];
        if (w < warp) before += count;
        pending += count;
      }
      // The other counts are those of the next round, whose barrier all readers of these have reached before it ends.
      parity ^= 1;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const i32 at = before + __popc(found[j] & ((1u << lane) - 1u));
        if ((found[j] >> lane & 1u) != 0) {
          collected.samples[at] = collected.runs[first_run + j] * kRun + lane;
        }
        before += __popc(found[j]);
      }
      if (pending < kBlockSize && !(last && i + kAhead * kWarps >= total)) continue;
#pragma unroll 1
      for (i32 first = 0; first < pending; first += AnySplit::kBatch) {
        const i32 count = min_of(i32(AnySplit::kBatch), pending - first);
        __syncthreads();
        const i32* samples = collected.samples + first;
        if (i32(threadIdx.x) < count) {
          expand<T, Place>(args, to, samples[threadIdx.x], collected.hits + 2 * threadIdx.x,
                           collected.pixels + 2 * threadIdx.x);
        }
        load_rows<Scalar, kVector, kLanes, kBlockSize>(collected.rows, samples, count, args, to,
                                                       first_channel);
        __syncthreads();
        add_hits<AnySplit, kLanes, kSets>(collected.rows, collected.hits, collected.pixels,
                                          2 * count, sums);
      }
      pending = 0;
    }
  }
}

// Adds the sums of all sets to those of the first one, in order. Every thread of the block must call.
template <class AnySplit, int kSets, int kPixels, int kVector, class T>
__device__ __forceinline__ void join_sets(T* shared, Sums<kPixels, kVector, T>& sums) {
  constexpr int kThreads = AnySplit::kGroups * (AnySplit::kChannels / kVector);  // of a set
  const i32 set = AnySplit::set(), own = i32(threadIdx.x) % kThreads;
  // Neighbours of a set lie side by side.
  const auto at = [&](i32 of_set, int number) -> T& {
    return shared[((of_set - 1) * (kPixels * kVector) + number) * kThreads + own];
  };
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kPixels * kVector && set > 0; ++j)
    at(set, j) = sums.at[j / kVector][j % kVector];
  __syncthreads();
#pragma unroll 1
  for (i32 other = 1; other < kSets && set == 0; ++other) {
#pragma unroll
    for (int j = 0; j < kPixels * kVector; ++j) sums.at[j / kVector][j % kVector] += at(other, j);
  }
}

// Grid: chunks of channels, heads, images, then strips, those of the coarse levels first: most samples fall on them.
template <class Scalar, class Place, int kVector, int kLanes, int kPixels, int kSets,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) gather(const Args args) {
  using T = Acc<Scalar>;
  using AnySplit = Split<Scalar, kVector, kLanes, kPixels, kSets, kBlockSize>;
  __shared__ Collected<Scalar, AnySplit, kBlockSize> collected;
  const u32 chunks = u32((args.d + AnySplit::kChannels - 1) / AnySplit::kChannels);
  const u32 strips = u32((args.s + AnySplit::kStrip - 1) / AnySplit::kStrip);
  u32 rest = blockIdx.x;
  const i32 first_channel = i32(rest % chunks) * AnySplit::kChannels;
  rest /= chunks;
  Target to = {};
  to.head = rest % u32(args.m);
  rest /= u32(args.m);
  to.image = rest % u32(args.b);
  to.begin = i32(strips - 1 - rest / u32(args.b)) * AnySplit::kStrip;
  to.pixels = i32(min_of(i64(AnySplit::kStrip), args.s - to.begin));
  Sums<kPixels, kVector, T> sums = {};
#pragma unroll 1
  for (to.level = 0; to.level < args.l; ++to.level) {
    to.size = level_of(args.shapes, args.starts, args.s, to.level);
    const i64 end = i64(to.size.start) + i64(to.size.h) * to.size.w;
    if (to.size.start >= to.begin + to.pixels || end <= to.begin) continue;
    to.row = (to.image * args.m + to.head) * args.l + to.level;
    add_level<Place, AnySplit, kLanes, kSets, kBlockSize, Scalar>(collected, args, to,
                                                                  first_channel, sums);
  }
  if constexpr (kSets > 1) join_sets<AnySplit, kSets>(collected.partial_sums, sums);
  const i32 channel = first_channel + i32(threadIdx.x) % kLanes * kVector;
  if (channel >= args.d || AnySplit::set() > 0) return;
  const i32 own = AnySplit::group() * kPixels;
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
    if (own + j >= to.pixels) return;
    const i64 pixel = to.image * args.s + to.begin + own + j;
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(result.at[i], sums.at[j][i]);
    store_pack<kVector>(
        static_cast<Scalar*>(args.grad_value) + (pixel * args.m + to.head) * args.d + channel,
        result);
  }
}

}  // namespace torchkiln::multi_scale_deformable_attention_gather
