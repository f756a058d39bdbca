// The gradient of the maps of deformable aggregation with the same bits every time, each row written once.
//
//   count   how many samples each pixel of the maps gets, of those that have it above and to the left of them
//   sum     of these counts, those of a block's pixels
//   place   where the samples of each pixel begin
//   fill    puts samples there, in any order
//   order   sorts those of each pixel
//   gather  a warp owns a run of rows of the maps, a lane finds the samples around each, the warp adds up what rows get of
//           them, in order, 32 packs of channels in registers; what a query has there is made one before its gradient is
//           read. Then the warps of a block share the samples of its quads of rows that have too many for one
// spills: up to 200 bytes, for one more block on a multiprocessor
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bins.cuh"
#include "common/pack.cuh"
#include "deformable/deformable_aggregation.h"

namespace torchkiln::deformable_aggregation_gather {

using namespace deformable_aggregation;

// ---- samples by pixels ---------------------------------------------------------------------------------------------

__device__ __forceinline__ i32 maps_of(const Args& args) {
  return i32(args.cameras) * i32(args.levels);
}

// Levels whose sizes are read, and whose bins are added to, before the first is waited for.
constexpr int kLevelsAtOnce = 4;

// `tell(bins, sample)` for the samples of this thread from that one on, if a camera sees them; -1 is no bin.
template <class T, int kBlockSize, class Tell>
__device__ __forceinline__ void each_seen(const Args& args, const Tell& tell) {
  const u32 samples = u32(args.queries * args.points), cameras = u32(args.cameras);
  const u32 pair = blockIdx.x * u32(kBlockSize) + threadIdx.x;  // with levels fewer than 2^31
  if (pair >= u32(args.batch) * samples * cameras) return;
  T x, y;
  location_at(args, i64(pair), x, y);
  if (!is_seen(x, y)) return;
  const u32 all = pair / cameras, image = all / samples;
  const i32 camera = i32(pair - all * cameras), levels = i32(args.levels);
  const i32 first = i32(all - image * samples) * maps_of(args) + camera * levels;
#pragma unroll 1
  for (i32 level = 0; level < levels; level += kLevelsAtOnce) {
    Map maps[kLevelsAtOnce];
#pragma unroll
    for (int i = 0; i < kLevelsAtOnce; ++i) {
      maps[i] = level + i < levels ? map_of(args, i64(image), camera, level + i) : Map{0, 0, 0, 0};
    }
    i64 bins[kLevelsAtOnce];
#pragma unroll
    for (int i = 0; i < kLevelsAtOnce; ++i) {
      const Map& map = maps[i];
      const Touch<T> touch = touch_of(map.h, map.w, x, y);
      const i32 row = min_of(max_of(touch.top, 0), map.h - 1);
      const i32 column = min_of(max_of(touch.left, 0), map.w - 1);
      const i64 bin = first_bin(args, map.source) + map.first + row * map.w + column;
      bins[i] = map.h == 0 || map.w == 0 ? -1 : bin;
    }
    tell(bins, first + level);
  }
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) count(const Args args) {
  each_seen<Scalar, kBlockSize>(args, [&](const i64(&bins)[kLevelsAtOnce], i32) {
#pragma unroll
    for (int i = 0; i < kLevelsAtOnce; ++i) {
      if (bins[i] >= 0) atomicAdd(args.ends + bins[i], 1);
    }
  });
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) sum(const Args args) {
  sum_bins<kBlockSize, kBinsOfBlock>(args.ends, args.sums);
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) place(const Args args) {
  place_bins<kBlockSize, kBinsOfBlock>(args.ends, args.sums);
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) fill(const Args args) {
  each_seen<Scalar, kBlockSize>(args, [&](const i64(&bins)[kLevelsAtOnce], i32 sample) {
    i32 places[kLevelsAtOnce];
#pragma unroll
    for (int i = 0; i < kLevelsAtOnce; ++i) {
      if (bins[i] >= 0) places[i] = atomicAdd(args.ends + bins[i], 1);
    }
#pragma unroll
    for (int i = 0; i < kLevelsAtOnce; ++i) {
      if (bins[i] >= 0) args.samples[places[i]] = sample + i;
    }
  });
}

// The sorted list's part of the bins [from, to].
struct Span {
  i32 begin, count;

  __device__ __forceinline__ Span(const i32* ends, i64 from, i64 to)
      : begin(from > 0 ? ends[from - 1] : 0), count(ends[to] - begin) {}
};

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) order(const Args args) {
  const i64 bin = spread_bin<kBlockSize>(blockIdx.x, gridDim.x);
  const Span span(args.ends, bin, bin);
  order_bins<kBlockSize>(args.samples, span.begin, span.count);
}

// ---- shares of rows ------------------------------------------------------------------------------------------------

__device__ __forceinline__ i32 lane_of() { return i32(threadIdx.x) % kWarpSize; }

template <class T>
__device__ __forceinline__ T of_lane(T value, i32 lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// A map that has rows of a run.
struct Place {
  i32 number, h, w;
  i32 before;  // pixels of the map before the run, less than 0 where it begins inside of that

  // Of a map, whatever its number. It has none where h is 0.
  __device__ __forceinline__ Place(const Args& args, const Run& run, i32 map) : number(map) {
    const u32 levels = u32(args.levels), camera = u32(map) / levels;
    const Map own = map_of(args, run.image, i32(camera), i32(u32(map) - camera * levels));
    h = own.source == run.source ? own.h : 0;
    w = own.w;
    before = run.image * rows_of(args, run.source) + run.first - i32(own.first);
  }
  __device__ __forceinline__ Place(const Place& own, i32 lane)
      : number(of_lane(own.number, lane)),
        h(of_lane(own.h, lane)),
        w(of_lane(own.w, lane)),
        before(of_lane(own.before, lane)) {}

  __device__ __forceinline__ bool has(i32 row) const { return u32(before + row) < u32(h * w); }
  __device__ __forceinline__ bool has_any(i32 rows) const {
    return before + rows > 0 && before < h * w;
  }
};

// The samples around rows of a run that lie in a map, row by row: from the pixels above, then from those beside. A lane
// knows its row's.
struct Around {
  i32 first;     // how many are those of rows before
  i32 above;     // how many of its own come from above
  i32 bases[2];  // what leads from numbers to places in the list: of these, of others
  i32 y;         // of its pixel
  i32 count;     // of all rows
  u32 rows;      // a bit for each that the map has

  // The whole warp must call.
  __device__ __forceinline__ Around(const Args& args, const Run& run, const Place& place)
      : above(0), bases{}, y(0) {
    const bool inside = lane_of() < run.rows && place.has(lane_of());
    rows = __ballot_sync(0xffffffffu, inside);
    i32 beside = 0;
    if (inside) {
      const i32 pixel = place.before + lane_of();
      y = i32(u32(pixel) / u32(place.w));
      const i32 left = pixel != y * place.w ? 1 : 0;
      const i64 bin = first_bin(args, run.source) + i64(run.image) * rows_of(args, run.source) +
                      run.first + lane_of();
      if (pixel >= place.w) {
        const Span span(args.ends, bin - place.w - left, bin - place.w);
        bases[0] = span.begin;
        above = span.count;
      }
      const Span span(args.ends, bin - left, bin);
      bases[1] = span.begin;
      beside = span.count;
    }
    const i32 sum = warp_inclusive_sum(above + beside);
    first = sum - above - beside;
    bases[0] -= first;
    bases[1] -= first + above;
    count = of_lane(sum, kWarpSize - 1);
  }

  // The row of a number. The whole warp must call.
  __device__ __forceinline__ i32 row(i32 number) const {
    i32 row = 0;  // the last that does not begin after it
#pragma unroll
    for (i32 step = kWarpSize / 2; step > 0; step /= 2) {
      if (of_lane(first, row + step) <= number) row += step;
    }
    return row;
  }
};

// What a row of a run gets of a sample.
template <class T>
struct alignas(sizeof(T) == 8 ? 8 : 16) Share {
  i32 query;   // of all images
  i32 weight;  // where the row of weights begins, inside of the query
  i32 row;     // -1 if it gets nothing
  T factor;
};

template <class T>
__device__ __forceinline__ Share<T> share_of(const Args& args, const Run& run, const Place& place,
                                             i32 row, i32 y, i32 listed) {
  const i32 points = i32(args.points), levels = i32(args.levels);
  const i32 sample = args.maps_of_image.quotient(listed);
  const i32 query = args.points_of_query.quotient(sample);
  const i32 camera = i32(u32(place.number) / u32(levels));
  Share<T> share = {0, 0, -1, T(0)};
  if (listed - sample * maps_of(args) != place.number) return share;  // maps overlap
  T right, down;
  location_at(args, (run.image * args.queries * points + sample) * args.cameras + camera, right,
              down);
  const Touch<T> touch = touch_of(place.h, place.w, right, down);
  const i32 x = place.before + row - y * place.w;
  const i32 below = y - touch.top, beside = x - touch.left;
  if (u32(below) > 1u || u32(beside) > 1u) return share;
  share.query = run.image * i32(args.queries) + query;
  share.weight = weight_row(args, sample - query * points, camera, place.number - camera * levels);
  share.row = row;
  share.factor = (below != 0 ? touch.down : T(1) - touch.down) *
                 (beside != 0 ? touch.right : T(1) - touch.right);
  return share;
}

// `tell(place, around)` for all maps that have rows of a run. The whole warp must call.
template <class Tell>
__device__ __forceinline__ void each_map(const Args& args, const Run& run, const Tell& tell) {
  const i32 maps = maps_of(args);
#pragma unroll 1
  for (i32 first = 0; first < maps; first += kWarpSize) {
    const i32 map = first + lane_of();
    const Place own(args, run, min_of(map, maps - 1));
    u32 left = __ballot_sync(0xffffffffu, map < maps && own.has_any(run.rows));
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const Place place(own, __ffs(i32(left)) - 1);
      tell(place, Around(args, run, place));
    }
  }
}

// What a warp lists in shared memory: shares, and the weights of their groups. A column more, against conflicts of banks.
template <class T>
struct List {
  Share<T> shares[kWarpSize];
  T weights[kWarpSize][kMostGroups + 1];
};

// Lists the shares of 32 numbers from one on, those up to an end: first those that are something; returns how many these are.
// The whole warp must call.
template <class T>
__device__ __forceinline__ i32 list_shares(const Args& args, const Run& run, const Place& place,
                                           const Around& around, i32 first, i32 end,
                                           Share<T>* shares) {
  const i32 number = min_of(first + lane_of(), end - 1), row = around.row(number);
  const i32 beside = number - of_lane(around.first, row) < of_lane(around.above, row) ? 0 : 1;
  const i32 above_base = of_lane(around.bases[0], row), base = of_lane(around.bases[1], row);
  const i32 y = of_lane(around.y, row);
  Share<T> own = {0, 0, -1, T(0)};
  if (first + lane_of() < end) {
    const i32 listed = args.samples[number + (beside != 0 ? base : above_base)];
    own = share_of<T>(args, run, place, row, y, listed);
  }
  const u32 all = __ballot_sync(0xffffffffu, own.row >= 0), before = (1u << lane_of()) - 1;
  __syncwarp();
  shares[own.row >= 0 ? __popc(all & before) : __popc(all) + __popc(~all & before)] = own;
  __syncwarp();
  return __popc(all);
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// A warp's channels, and the groups that these lie in.
struct Chunk {
  i32 first, channels;
  i32 first_group, groups;

  // `most` channels or fewer.
  __device__ __forceinline__ Chunk(const Args& args, u32 number, i32 most) {
    const i32 all = i32(args.channels), each = all / i32(args.groups);
    const i32 step = chunk_channels(all, i32(args.groups), most);
    first = i32(number) * step;
    channels = min_of(step, all - first);
    first_group = i32(u32(first) / u32(each));
    groups = i32(u32(first + channels - 1) / u32(each)) + 1 - first_group;
  }
};

// Weights, times their share, of listed ones.
template <class Weight, class T>
__device__ __forceinline__ void read_weights(const Args& args, const Chunk& chunk, i32 count,
                                             List<T>& list) {
  static_assert(kMostGroups == 8);  // four shares of a warp at a time
  const i32 beside = lane_of() / kMostGroups, group = lane_of() % kMostGroups;
  const i64 of_query = weights_of_query(args, 1);
  const Weight* weights = static_cast<const Weight*>(args.weights) + chunk.first_group +
                          min_of(group, chunk.groups - 1);
  // Of all, read as they are: what is behind the last is not used, and to convert is to wait.
  Weight read[kMostGroups];
#pragma unroll
  for (int i = 0; i < kMostGroups; ++i) {
    const Share<T>& share = list.shares[4 * i + beside];
    read[i] = weights[share.query * of_query + share.weight];
  }
  T values[kMostGroups];
#pragma unroll
  for (int i = 0; i < kMostGroups; ++i) values[i] = T(load(read[i]));
  if (args.normalizer != nullptr) {
#pragma unroll 2
    for (int i = 0; i < kMostGroups; ++i) {
      if (4 * i + beside >= count || group >= chunk.groups) continue;
      const i32 query = list.shares[4 * i + beside].query;
      values[i] = normalizer_of<T>(args, query, chunk.first_group + group)(values[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMostGroups; ++i) {
    list.weights[4 * i + beside][group] = values[i] * list.shares[4 * i + beside].factor;
  }
}

// Points of a query lie together: makes one of neighbours in a list of `count` shares that are of one row and query, so that
// the query's gradient is read once for them; returns how many are left. The whole warp must call.
template <class Weight, class T>
__device__ __forceinline__ i32 merge_shares(const Args& args, const Chunk& chunk, i32 count,
                                            List<T>& list) {
  read_weights<Weight>(args, chunk, count, list);
  __syncwarp();
  const Share<T> own = list.shares[lane_of()];
  const i32 row = __shfl_up_sync(0xffffffffu, own.row, 1);
  const i32 query = __shfl_up_sync(0xffffffffu, own.query, 1);
  const bool begins = lane_of() == 0 || row != own.row || query != own.query || own.row < 0;
  const u32 begin = __ballot_sync(0xffffffffu, begins), upto = (2u << lane_of()) - 1;
  const i32 first = 31 - __clz(i32(begin & upto));
  const u32 last = begin >> 1 | 0x80000000u,
            merged = __ballot_sync(0xffffffffu, own.row >= 0) & last;
  T sums[kMostGroups];
#pragma unroll
  for (int group = 0; group < kMostGroups; ++group) sums[group] = list.weights[lane_of()][group];
  if (begin != 0xffffffffu) {
#pragma unroll
    for (int group = 0; group < kMostGroups; ++group) {
      if (group >= chunk.groups) break;
#pragma unroll
      for (i32 distance = 1; distance < kWarpSize; distance *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, sums[group], distance);
        if (lane_of() - distance >= first) sums[group] += other;
      }
    }
  }
  __syncwarp();
  if ((merged >> lane_of() & 1) != 0) {
    const i32 to = __popc(merged & (upto >> 1));
    list.shares[to] = own;
#pragma unroll
    for (int group = 0; group < kMostGroups; ++group) {
      if (group < chunk.groups) list.weights[to][group] = sums[group];
    }
  }
  __syncwarp();
  return __popc(merged);
}

// Elements for a lane, read as they are, up to 16 bytes at a time.
template <class Scalar, int kCount>
struct Values {
  static constexpr int kMost = 16 / int(sizeof(Scalar)), kPart = kCount < kMost ? kCount : kMost;
  Pack<Scalar, kPart> parts[kCount / kPart];

  __device__ __forceinline__ void read(const Scalar* from) {
#pragma unroll
    for (int i = 0; i < kCount / kPart; ++i) parts[i] = load_pack<kPart>(from + i * kPart);
  }
  __device__ __forceinline__ Acc<Scalar> at(int i) const {
    return load(parts[i / kPart].at[i % kPart]);
  }
};

// The kPacks packs of kVector channels that a lane sums. Packs behind the last channel of the chunk read what the last one
// does.
template <class Grad, int kVector, int kPacks>
struct Packs {
  const Grad* gradients[kPacks];
  u32 bytes;          // of a query's gradient
  i32 group[kPacks];  // of the chunk's

  __device__ __forceinline__ Packs(const Args& args, const Chunk& chunk)
      : bytes(u32(args.channels) * u32(sizeof(Grad))) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const i32 channel = chunk.first + min_of(channel_of(pack), chunk.channels - kVector);
      group[pack] = i32(u32(channel) * u32(args.groups) / u32(args.channels)) - chunk.first_group;
      gradients[pack] = static_cast<const Grad*>(args.grad_output) + channel;
    }
  }
  static __device__ __forceinline__ i32 channel_of(int pack) {
    return (pack * kWarpSize + lane_of()) * kVector;
  }
  __device__ __forceinline__ const Grad* gradient(int pack, i32 query) const {
    return row_at(gradients[pack], query, bytes);
  }
};

// 0, of which the compiler does not know that it is: sums that may become 0 it keeps in two places, and copies them each time.
template <class T>
__device__ __forceinline__ T zero_in_place() {
  T zero = T(0);
#if defined(__CUDACC_RTC__)
  if constexpr (sizeof(T) == 4) asm volatile("mov.b32 %0, 0;" : "=f"(zero));
#endif
  return zero;
}

// Sums of a row, up to now.
template <class T, int kVector, int kPacks>
struct Sums {
  T at[kPacks][kVector] = {};
  i32 row = -1;

  __device__ __forceinline__ void begin(i32 next) {
    const T zero = zero_in_place<T>();
#pragma unroll
    for (int i = 0; i < kPacks * kVector; ++i) at[i / kVector][i % kVector] = zero;
    row = next;
  }
};

// Adds up a list of merged shares, in order; `tell(sums)` of each row when another one begins. Loads are in flight for kAtOnce
// of them.
template <int kAtOnce, class Grad, class T, int kVector, int kPacks, class Tell>
__device__ __forceinline__ void add_shares(const Packs<Grad, kVector, kPacks>& packs,
                                           const List<T>& list, i32 count,
                                           Sums<T, kVector, kPacks>& sums, const Tell& tell) {
#pragma unroll 1
  for (i32 first = 0; first < count; first += kAtOnce) {
    Values<Grad, kVector> values[kAtOnce][kPacks];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const i32 query = list.shares[min_of(first + i, count - 1)].query;
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) values[i][pack].read(packs.gradient(pack, query));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= count) break;
      const i32 row = list.shares[first + i].row;
      if (row != sums.row) {
        tell(sums);
        sums.begin(row);
      }
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        const T weight = list.weights[first + i][packs.group[pack]];
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          sums.at[pack][c] += weight * T(values[i][pack].at(c));
        }
      }
    }
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class Scalar>
__device__ __forceinline__ Scalar* rows_at(const Args& args, const Run& run, i32 channel) {
  const i64 row = i64(run.image) * rows_of(args, run.source) + run.first;
  return static_cast<Scalar*>(args.gradients[run.source]) + (row * args.channels + channel);
}

// `rows` are those of a run, from the first channel on of the `channels` that are left.
template <class Scalar, int kVector, int kPacks, class T>
__device__ __forceinline__ void write_row(Scalar* rows, u32 bytes, i32 channels,
                                          const Sums<T, kVector, kPacks>& sums) {
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const i32 channel = (pack * kWarpSize + lane_of()) * kVector;
    if (channel >= channels) continue;
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int c = 0; c < kVector; ++c) store(result.at[c], sums.at[pack][c]);
    store_pack<kVector>(row_at(rows, sums.row, bytes) + channel, result);
  }
}

// Adds up what rows of a run get; `tell(sums)` of each row and map. Alone, the warp takes all samples, but those of rows whose
// bits it returns: rows that get too many, or of several maps, which are added up where sums are not yet rounded. Else it takes
// its part of them, one of `parts`.
template <class Weight, int kAtOnce, class Grad, class T, int kVector, int kPacks, class Tell>
__device__ __forceinline__ u32 gather_run(const Args& args, const Run& run, const Chunk& chunk,
                                          const Packs<Grad, kVector, kPacks>& packs, i32 most,
                                          i32 part, i32 parts, List<T>& list, const Tell& tell) {
  u32 seen = 0, crowded = 0;  // a bit for each row
  each_map(args, run, [&](const Place& place, const Around& around) {
    if (parts == 1) {
      if (around.count > most || (around.rows & seen) != 0) crowded |= around.rows;
      seen |= around.rows;
      if ((around.rows & crowded) != 0) return;
    }
    // What takes time is the number of lists, not their lengths.
    const i32 lists = i32(u32(around.count + kWarpSize - 1) / kWarpSize);
    const i32 each = (lists + parts - 1) / parts * kWarpSize;
    const i32 end = min_of((part + 1) * each, around.count);
    Sums<T, kVector, kPacks> sums;
#pragma unroll 1
    for (i32 first = part * each; first < end; first += kWarpSize) {
      const i32 all = list_shares(args, run, place, around, first, end, list.shares);
      const i32 count = merge_shares<Weight>(args, chunk, all, list);
      add_shares<kAtOnce>(packs, list, count, sums, tell);
    }
    tell(sums);
    __syncwarp();
  });
  return crowded;
}

// What the warps of a block make of a quad of rows; each has sums of its own.
template <class T, int kWarps, int kChannels>
struct Parts {
  T at[kWarps][kQuad][kChannels];

  // By a warp, of its own.
  __device__ __forceinline__ void clear(i32 warp) {
#pragma unroll 4
    for (i32 i = lane_of(); i < kQuad * kChannels; i += kWarpSize) {
      at[warp][i / kChannels][i % kChannels] = T(0);
    }
    __syncwarp();
  }
  template <int kVector, int kPacks>
  __device__ __forceinline__ void add(i32 warp, const Sums<T, kVector, kPacks>& sums) {
#pragma unroll
    for (int i = 0; i < kPacks * kVector; ++i) {
      at[warp][sums.row][(i / kVector * kWarpSize + lane_of()) * kVector + i % kVector] +=
          sums.at[i / kVector][i % kVector];
    }
  }
  // By the block, in the order of warps.
  template <class Scalar>
  __device__ __forceinline__ void write(Scalar* rows, i32 count, u32 bytes, i32 channels) const {
#pragma unroll 1
    for (i32 i = threadIdx.x; i < count * kChannels; i += kWarps * kWarpSize) {
      const i32 row = i / kChannels, channel = i % kChannels;
      if (channel >= channels) continue;
      T sum = T(0);
#pragma unroll
      for (i32 warp = 0; warp < kWarps; ++warp) sum += at[warp][row][channel];
      store(row_at(rows, row, bytes)[channel], sum);
    }
  }
};

// The run of a number, so that the last rows of each camera or image come first: those of small maps, which get more samples
// and take longest.
__device__ __forceinline__ i32 last_first(const Args& args, i32 number, i32 runs) {
  const i32 pieces = i32(args.batch) * (args.shapes != nullptr ? i32(args.cameras) : 1);
  const i32 each = runs / pieces, turn = number / pieces;
  return turn < each ? (number - turn * pieces) * each + each - 1 - turn : number;
}

template <class Scalar, class Weight, class Grad, int kVector, int kPacks, int kRows, int kAtOnce,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, sizeof(Acc<Scalar>) == 8 ? 1 : 768 / kBlockSize)
    gather(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kWarps = kBlockSize / kWarpSize, kChannels = kWarpSize * kVector * kPacks;
  constexpr i32 kQuads = kRows / kQuad;
  __shared__ List<T> lists[kWarps];
  __shared__ Parts<T, kWarps, kChannels> parts;
  __shared__ u32 crowded[kWarps];  // rows of the run of a warp
  const i32 warp = i32(threadIdx.x) / kWarpSize;
  const u32 chunks = u32(chunk_count(i32(args.channels), i32(args.groups), kChannels));
  const Chunk chunk(args, blockIdx.x % chunks, kChannels);
  const Packs<Grad, kVector, kPacks> packs(args, chunk);
  const u32 row_bytes = u32(args.channels) * u32(sizeof(Scalar));
  const i32 runs = i32(args.batch) * (quads_of_image(args) / kQuads);
  // First each warp by itself, then all of them for each crowded quad. One loop: what it adds up is compiled once.
#pragma unroll 1
  for (i32 turn = -1; turn < kWarps * kQuads; ++turn) {
    const bool alone = turn < 0;
    const i32 of_warp = alone ? warp : turn / kQuads, inner = alone ? 0 : turn % kQuads;
    if (!alone && (crowded[of_warp] >> (kQuad * inner) & ((1u << kQuad) - 1)) == 0) continue;
    // The warps of a block own runs far from each other: neighbours may all be crowded.
    const i32 number = of_warp * i32(gridDim.x / chunks) + i32(blockIdx.x / chunks);
    const i32 quad = last_first(args, number, runs) * kQuads + inner;
    Run run = run_at(args, quad, alone ? kRows : kQuad);
    if (run.image >= args.batch) run.rows = 0;
    Scalar* rows = rows_at<Scalar>(args, run, chunk.first);
    u32 written = 0, left = 0;
    if (!alone) parts.clear(warp);
    if (run.rows > 0) {
      left = gather_run<Weight, kAtOnce>(args, run, chunk, packs, most_shares(kRows),
                                         alone ? 0 : warp, alone ? 1 : kWarps, lists[warp],
                                         [&](const Sums<T, kVector, kPacks>& sums) {
                                           if (sums.row < 0) return;
                                           if (!alone) return parts.add(warp, sums);
                                           written |= 1u << sums.row;
                                           write_row(rows, row_bytes, chunk.channels, sums);
                                         });
    }
    if (alone) {
      Sums<T, kVector, kPacks> none;
#pragma unroll 1
      for (none.row = 0; none.row < run.rows; ++none.row) {
        if (((written | left) >> none.row & 1) == 0)
          write_row(rows, row_bytes, chunk.channels, none);
      }
      if (lane_of() == 0) crowded[warp] = left;
    }
    __syncthreads();
    if (alone) continue;
    parts.write(rows, run.rows, row_bytes, chunk.channels);
    __syncthreads();
  }
}

}  // namespace torchkiln::deformable_aggregation_gather
