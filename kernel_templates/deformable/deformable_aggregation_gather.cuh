// The gradient of the maps of deformable aggregation with the same bits every time, each row written once.
//
//   count   how many samples each bin of an image and camera gets; `ends` must be 0 before
//   place   where bins begin, a block for the list of an image and camera
//   fill    puts samples into their bins, in any order
//   order   sorts the samples of each bin
//   gather  a warp owns a run of rows of the maps, walks all bins with samples that may touch these, a sample a lane, lists
//           those that do, and adds them in order, 32 packs of channels of the rows in registers. No warp waits for
//           another. Those that find too many leave their run to
//   gather_crowds, where the warps of a block share the samples of a run, and add up what they have in order
// spills: up to 16 bytes of a few variants, outside of the sums
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bins.cuh"
#include "common/pack.cuh"
#include "deformable/deformable_aggregation.h"

namespace torchkiln::deformable_aggregation_gather {

using namespace deformable_aggregation;

// ---- samples by bins -----------------------------------------------------------------------------------------------

// `tell(list, bin, sample)` for that of this thread, if a camera sees it.
template <class T, int kBlockSize, class Tell>
__device__ __forceinline__ void each_seen(const Args& args, const Tell& tell) {
  const i64 samples = args.queries * args.points;
  const i64 pair = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (pair >= args.batch * samples * args.cameras) return;
  T x, y;
  location_at(args, pair, x, y);
  if (!is_seen(x, y)) return;
  const i64 all = pair / args.cameras, image = all / samples;
  tell(list_of(args, image, i32(pair - all * args.cameras)), bin_of(args, x, y),
       i32(all - image * samples));
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) count(const Args args) {
  each_seen<Scalar, kBlockSize>(args, [&](i64 list, i32 bin, i32) {
    atomicAdd(args.ends + list * args.grid * args.grid + bin, 1);
  });
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) place(const Args args) {
  const i64 bins = args.grid * args.grid;
  place_bins<kBlockSize>(args.ends + blockIdx.x * bins, i32(bins));
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) fill(const Args args) {
  each_seen<Scalar, kBlockSize>(args, [&](i64 list, i32 bin, i32 sample) {
    const i32 at = atomicAdd(args.ends + list * args.grid * args.grid + bin, 1);
    args.samples[list * args.queries * args.points + at] = sample;
  });
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) order(const Args args) {
  const i64 bins = args.grid * args.grid, bin = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i64 list = bin / bins;
  i32 begin = 0, end = 0;
  if (list < args.batch * args.cameras) {
    end = args.ends[bin];
    begin = bin == list * bins ? 0 : args.ends[bin - 1];
  }
  order_bins<kBlockSize>(args.samples + list * args.queries * args.points + begin, end - begin);
}

// ---- samples that touch rows ---------------------------------------------------------------------------------------

__device__ __forceinline__ i32 lane_of() { return i32(threadIdx.x) % kWarpSize; }

__device__ __forceinline__ i32 maps_of(const Args& args) {
  return i32(args.cameras) * (args.shapes == nullptr ? 1 : i32(args.levels));
}

// Neighbouring pixels of one row of a map: the run's rows [begin, end).
struct Strip {
  i32 camera, level, h, w;
  i32 begin, end;
  i32 y, x;  // of the first

  // Of a lane, but for y and x.
  __device__ __forceinline__ Strip of(i32 lane) const {
    return {__shfl_sync(0xffffffffu, camera, lane),
            __shfl_sync(0xffffffffu, level, lane),
            __shfl_sync(0xffffffffu, h, lane),
            __shfl_sync(0xffffffffu, w, lane),
            __shfl_sync(0xffffffffu, begin, lane),
            __shfl_sync(0xffffffffu, end, lane),
            0,
            0};
  }
};

// A sample of the list that touches a run: its rows get a share each, neighbours that of the left and the right one.
template <class T>
struct alignas(8) Sample {
  i32 query;   // of all images
  i32 weight;  // where the row of weights begins, inside of the query
  i32 rows;  // a bit for each that gets a share; from bit kRunRows on, 1 + the left neighbour, which may lie outside
  T left, right;

  __device__ __forceinline__ bool touches(int row) const { return (rows >> row & 1) != 0; }
  __device__ __forceinline__ T share(int row) const {
    return rows >> kRunRows == row + 1 ? left : right;
  }
};

// What a strip gets of a sample of the list; nothing, NaN neither, of one that does not touch it.
template <class T>
__device__ __forceinline__ Sample<T> sample_of(const Args& args, i32 image, const Strip& strip,
                                               i32 number) {
  T x, y;
  location_at(args, (image * args.queries * args.points + number) * args.cameras + strip.camera, x,
              y);
  const Touch<T> touch = touch_of(strip.h, strip.w, x, y);
  const i32 below = strip.y - touch.top, left = touch.left - strip.x + strip.begin;
  Sample<T> sample = {};
  if (u32(below) > 1u || left + 1 < strip.begin || left >= strip.end) return sample;
  const T share = below != 0 ? touch.down : T(1) - touch.down;
  sample.left = share * (T(1) - touch.right);
  sample.right = share * touch.right;
  if (left >= strip.begin) sample.rows |= 1 << left;
  if (left + 1 < strip.end) sample.rows |= 1 << (left + 1);
  sample.rows |= (left + 1) << kRunRows;
  const i32 points = i32(args.points), query = number / points;
  sample.query = image * i32(args.queries) + query;
  sample.weight = weight_row(args, number - query * points, strip.camera, strip.level);
  return sample;
}

// The samples in the columns of up to 32 rows of bins, one after the other.
struct Candidates {
  i32 offset;  // how many samples come before the lane's row of bins
  i32 base;    // what leads from there to places in the list
  i32 count;   // of all

  // Those of rows of bins from `first` on. The whole warp must call.
  __device__ __forceinline__ Candidates(const Args& args, const i32* ends, const Bins& rows,
                                        const Bins& columns, i32 first) {
    const i32 row = first + lane_of();
    i32 begin = 0, own = 0;
    if (row <= rows.last) {
      const i64 at = row * args.grid;
      if (at + columns.first > 0) begin = ends[at + columns.first - 1];
      own = ends[at + columns.last] - begin;
    }
    const i32 sum = warp_inclusive_sum(own);
    offset = sum - own;
    base = begin - offset;
    count = __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
  }

  // The place of a number in the list. The whole warp must call.
  __device__ __forceinline__ i32 at(i32 number) const {
    i32 row = 0;  // the last that does not begin after it
#pragma unroll
    for (i32 step = kWarpSize / 2; step > 0; step /= 2) {
      if (__shfl_sync(0xffffffffu, offset, row + step) <= number) row += step;
    }
    return __shfl_sync(0xffffffffu, base, row) + number;
  }
};

// `tell(sample)` for what a strip gets of every kParts-th sample from number `part` on, 32 at a time, a lane each. False when
// `tell` says so, or where there are too many for a warp that is to look at all. The whole warp must call.
template <class T, int kParts, class Tell>
__device__ __forceinline__ bool each_of_strip(const Args& args, i32 image, const Strip& strip,
                                              i32 part, const Tell& tell) {
  const i64 list = list_of(args, image, strip.camera);
  const i32* ends = args.ends + list * args.grid * args.grid;
  const i32* samples = args.samples + list * args.queries * args.points;
  const Bins rows = bins_of(args, strip.y, strip.y, strip.h);
  const Bins columns = bins_of(args, strip.x, strip.x + strip.end - strip.begin - 1, strip.w);
#pragma unroll 1
  for (i32 row = rows.first; row <= rows.last; row += kWarpSize) {
    const Candidates candidates(args, ends, rows, columns, row);
    if (kParts == 1 && candidates.count > kMostCandidates) return false;
#pragma unroll 1
    for (i32 first = part; first < candidates.count; first += kParts * kWarpSize) {
      const i32 number = first + lane_of() * kParts;
      const i32 at = candidates.at(min_of(number, candidates.count - 1));
      Sample<T> own = {};
      if (number < candidates.count) own = sample_of<T>(args, image, strip, samples[at]);
      if (!tell(own)) return false;
    }
  }
  return true;
}

// Makes of `strip` all rows of a run that lie in the map of a number, whatever rows of that; returns the first one's pixel.
__device__ __forceinline__ i32 cut(const Args& args, const Run& run, i32 number, Strip& strip) {
  const bool one_by_one = args.shapes == nullptr;
  const i32 levels = one_by_one ? 1 : i32(args.levels);
  strip.camera = number / levels;
  strip.level = one_by_one ? run.source : number - strip.camera * levels;
  const Map map = map_of(args, run.image, strip.camera, strip.level);
  strip.h = map.h;
  strip.w = map.w;
  const i32 before = run.image * rows_of(args, run.source) + run.first - i32(map.first);
  strip.begin = max_of(-before, 0);
  strip.end = min_of(map.h * map.w - before, run.rows);
  return max_of(before, 0);
}

// The same for a run, in whatever maps its rows lie.
template <class T, int kParts, class Tell>
__device__ __forceinline__ bool each_of_run(const Args& args, const Run& run, i32 part,
                                            const Tell& tell) {
  const i32 maps = maps_of(args);
#pragma unroll 1
  for (i32 first = 0; first < maps; first += kWarpSize) {
    Strip own = {};
    i32 own_pixel = 0;
    if (first + lane_of() < maps) own_pixel = cut(args, run, first + lane_of(), own);
    u32 left = __ballot_sync(0xffffffffu, own.begin < own.end);
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const i32 lane = __ffs(i32(left)) - 1, pixel = __shfl_sync(0xffffffffu, own_pixel, lane);
      Strip strip = own.of(lane);
      strip.y = pixel / strip.w;
      strip.x = pixel - strip.y * strip.w;
#pragma unroll 1
      for (const i32 stop = strip.end; strip.begin < stop; strip.begin = strip.end) {
        strip.end = min_of(stop, strip.begin + strip.w - strip.x);
        if (!each_of_strip<T, kParts>(args, run.image, strip, part, tell)) return false;
        ++strip.y;
        strip.x = 0;
      }
    }
  }
  return true;
}

// Puts the lanes' samples that touch rows behind those of a list in shared memory; returns how many it then has. The whole
// warp must call.
template <class T>
__device__ __forceinline__ i32 append(Sample<T>* list, i32 count, const Sample<T>& own) {
  const u32 all = __ballot_sync(0xffffffffu, own.rows != 0);
  if (own.rows != 0) list[count + __popc(all & ((1u << lane_of()) - 1))] = own;
  return count + __popc(all);
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Packs of channels of a warp, and how many of these sum all channels.
template <int kVector, int kPacks>
struct Chunks {
  static constexpr i32 kChannels = kWarpSize * kVector * kPacks;
  static __device__ __forceinline__ u32 count(const Args& args) {
    return (u32(args.channels) + kChannels - 1) / kChannels;
  }
};

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

// Of a run's rows, of which a lane sums kPacks packs of kVector channels.
template <class T, int kVector, int kPacks>
struct Sums {
  T at[kRunRows][kPacks][kVector] = {};
  // Packs behind the last channel do as the last one does.
  i32 channel[kPacks], group[kPacks];

  __device__ __forceinline__ Sums(const Args& args, i32 first_channel) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      channel[pack] = min_of(first_channel + channel_of(pack), i32(args.channels) - kVector);
      group[pack] = channel[pack] / (i32(args.channels) / i32(args.groups));
    }
  }
  static __device__ __forceinline__ i32 channel_of(int pack) {
    return (pack * kWarpSize + lane_of()) * kVector;
  }
};

template <class Grad, class T>
__device__ __forceinline__ const Grad* gradient_of(const Args& args, const Sample<T>& sample,
                                                   i32 channel) {
  return static_cast<const Grad*>(args.grad_output) +
         (u64(u32(sample.query)) * u32(args.channels) + u32(channel));
}

template <class Weight, class T>
__device__ __forceinline__ T weight_of(const Args& args, const Sample<T>& sample, i32 group) {
  const u32 groups = u32(args.groups), query = u32(sample.query);
  const u64 at = u64(query) * u32(weights_of_query(args, 1)) + u32(sample.weight + group);
  const T weight = T(load(static_cast<const Weight*>(args.weights)[at]));
  if (args.normalizer == nullptr) return weight;
  const T* row = static_cast<const T*>(args.normalizer) + u64(query) * (2 * groups) + group;
  return Normalizer<T>{row[0], row[groups], true}(weight);
}

// Adds a warp's list of samples, in order.
template <class Weight, class Grad, class T, int kVector, int kPacks>
__device__ __forceinline__ void add_samples(const Args& args, const Sample<T>* list, i32 count,
                                            Sums<T, kVector, kPacks>& sums) {
  // Samples that loads are in flight for: up to 64 bytes of a lane.
  constexpr int kBytes = kVector * kPacks * int(sizeof(Grad));
  constexpr int kAtOnce = kBytes > 32 ? 1 : (kBytes > 16 || kPacks > 1 ? 2 : 4);
#pragma unroll 1
  for (i32 first = 0; first < count; first += kAtOnce) {
    Values<Grad, kVector> values[kAtOnce][kPacks];
    T weights[kAtOnce][kPacks];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Sample<T>& sample = list[min_of(first + i, count - 1)];
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        values[i][pack].read(gradient_of<Grad>(args, sample, sums.channel[pack]));
        weights[i][pack] = weight_of<Weight>(args, sample, sums.group[pack]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= count) continue;
      const Sample<T>& sample = list[first + i];
#pragma unroll
      for (int row = 0; row < kRunRows; ++row) {
        if (!sample.touches(row)) continue;
#pragma unroll
        for (int pack = 0; pack < kPacks; ++pack) {
          const T factor = sample.share(row) * weights[i][pack];
#pragma unroll
          for (int c = 0; c < kVector; ++c) {
            sums.at[row][pack][c] += factor * T(values[i][pack].at(c));
          }
        }
      }
    }
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class Scalar>
__device__ __forceinline__ Scalar* row_of(const Args& args, const Run& run, i32 row) {
  const i64 at = i64(run.image) * rows_of(args, run.source) + run.first + row;
  return static_cast<Scalar*>(args.gradients[run.source]) + at * args.channels;
}

template <class Scalar, class T, int kVector, int kPacks>
__device__ __forceinline__ void write_rows(const Args& args, const Run& run, i32 first_channel,
                                           const Sums<T, kVector, kPacks>& sums) {
#pragma unroll
  for (int row = 0; row < kRunRows; ++row) {
    Scalar* to = row_of<Scalar>(args, run, row);
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const i32 channel = first_channel + sums.channel_of(pack);
      if (row >= run.rows || channel >= args.channels) continue;
      Pack<Scalar, kVector> result;
#pragma unroll
      for (int c = 0; c < kVector; ++c) store(result.at[c], sums.at[row][pack][c]);
      store_pack<kVector>(to + channel, result);
    }
  }
}

template <class Scalar, class Weight, class Grad, int kVector, int kPacks, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) gather(const Args args) {
  using T = Acc<Scalar>;
  const u32 chunks = Chunks<kVector, kPacks>::count(args), chunk = blockIdx.x % chunks;
  const i64 number = i64(blockIdx.x / chunks) * (kBlockSize / kWarpSize) + threadIdx.x / kWarpSize;
  const Run run = run_at(args, i32(number));
  if (run.image >= args.batch) return;  // that is a run too many for some sources
  const i32 first_channel = i32(chunk) * Chunks<kVector, kPacks>::kChannels;
  __shared__ Sample<T> lists[kBlockSize / kWarpSize][kMostTouching];
  Sample<T>* list = lists[threadIdx.x / kWarpSize];
  i32 count = 0;
  const bool all = each_of_run<T, 1>(args, run, 0, [&](const Sample<T>& own) {
    if (count > kMostTouching - kWarpSize) return false;
    count = append(list, count, own);
    return true;
  });
  if (!all) {
    if (chunk == 0 && lane_of() == 0) args.crowded[atomicAdd(args.crowds, 1)] = i32(number);
    return;
  }
  __syncwarp();
  Sums<T, kVector, kPacks> sums(args, first_channel);
  add_samples<Weight, Grad>(args, list, count, sums);
  write_rows<Scalar>(args, run, first_channel, sums);
}

// Sums of the warps of a block become one, which is written, row by row. Every thread must call.
template <class Scalar, int kBlockSize, class T, int kVector, int kPacks>
__device__ __forceinline__ void write_sums(const Args& args, const Run& run, i32 first_channel,
                                           const Sums<T, kVector, kPacks>& sums) {
  constexpr i32 kWarps = kBlockSize / kWarpSize, kChannels = Chunks<kVector, kPacks>::kChannels;
  __shared__ T parts[kWarps][kChannels];
  const i32 warp = i32(threadIdx.x) / kWarpSize;
  const i32 channels = min_of(kChannels, i32(args.channels) - first_channel);
#pragma unroll
  for (int row = 0; row < kRunRows; ++row) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPacks * kVector; ++i) {
      parts[warp][sums.channel_of(i / kVector) + i % kVector] =
          sums.at[row][i / kVector][i % kVector];
    }
    __syncthreads();
    if (row >= run.rows) continue;
    Scalar* to = row_of<Scalar>(args, run, row) + first_channel;
#pragma unroll 1
    for (i32 c = threadIdx.x; c < channels; c += kBlockSize) {
      T sum = T(0);
#pragma unroll
      for (i32 i = 0; i < kWarps; ++i) sum += parts[i][c];
      store(to[c], sum);
    }
  }
}

template <class Scalar, class Weight, class Grad, int kVector, int kPacks, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 512 / kBlockSize) gather_crowds(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kWarps = kBlockSize / kWarpSize;
  __shared__ Sample<T> lists[kWarps][kWarpSize];
  const i32 warp = i32(threadIdx.x) / kWarpSize;
  const i32 chunks = i32(Chunks<kVector, kPacks>::count(args));
  const i64 items = i64(*args.crowds) * chunks;
#pragma unroll 1
  for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
    const i64 crowd = item / chunks;
    const Run run = run_at(args, args.crowded[crowd]);
    const i32 first_channel = i32(item - crowd * chunks) * Chunks<kVector, kPacks>::kChannels;
    Sums<T, kVector, kPacks> sums(args, first_channel);
    each_of_run<T, kWarps>(args, run, warp, [&](const Sample<T>& own) {
      const i32 count = append(lists[warp], 0, own);
      __syncwarp();
      add_samples<Weight, Grad>(args, lists[warp], count, sums);
      __syncwarp();
      return true;
    });
    write_sums<Scalar, kBlockSize>(args, run, first_channel, sums);
  }
}

}  // namespace torchkiln::deformable_aggregation_gather
