// The gradient of the maps of deformable aggregation with the same bits every time, each row written once.
//
//   count   how many samples each bin of an image and camera gets; `ends` must be 0 before
//   place   where bins begin, a block for the list of an image and camera
//   fill    puts samples into their bins, in any order
//   order   sorts the samples of each bin
//   gather  a warp owns a few neighbouring rows of the maps, 32 packs of channels of them in registers; the block lists the
//           samples of all bins that may touch its rows, and each warp adds those that touch its own, in order. Blocks
//           that have too many leave their rows to
//   gather_crowds, where the warps of a block share the samples of a few rows, and add up what they have in order
// spills: a few words for double, and on sm_75, whose threads have fewer registers in blocks of this size
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

// ---- candidates ----------------------------------------------------------------------------------------------------

// Neighbouring pixels of one map, [begin, end) of the rows of its source, and the bins with samples that may touch them.
struct Piece {
  i32 camera, level;
  i32 first, h, w;  // of the map
  i32 begin, end;
  Bins rows, columns;
};

// What a block works on, in shared memory, for registers are what it lacks.
template <class T, int kBlockSize>
struct Stage {
  Run run;
  Piece pieces[2 * kWarpSize];
  i32 count;  // of pieces
  Touch<T> touches[kMostCandidates];
  i32 begins[kBlockSize];   // of rows of bins: the first sample in the list
  i32 offsets[kBlockSize];  // and how many samples come before it
  int partial[kBlockSize / kWarpSize];
};

__device__ __forceinline__ i32 maps_of(const Args& args) {
  return i32(args.cameras) * (args.shapes == nullptr ? 1 : i32(args.levels));
}

// The map of a number; those of one source where levels stand one by one.
__device__ __forceinline__ Map map_at(const Args& args, const Run& run, i32 number, Piece& piece) {
  const bool one_by_one = args.shapes == nullptr;
  const i32 levels = one_by_one ? 1 : i32(args.levels);
  piece.camera = number / levels;
  piece.level = one_by_one ? run.source : number - piece.camera * levels;
  return map_of(args, run.image, piece.camera, piece.level);
}

__device__ __forceinline__ void find_bins(const Args& args, Piece& piece) {
  const i32 begin = piece.begin - piece.first, last = piece.end - 1 - piece.first;
  const i32 top = begin / piece.w, bottom = last / piece.w;
  const bool in_one = top == bottom;
  piece.rows = bins_of(args, top, bottom, piece.h);
  piece.columns = bins_of(args, in_one ? begin - top * piece.w : 0,
                          in_one ? last - bottom * piece.w : piece.w - 1, piece.w);
}

// Lists the parts of rows [begin, end), at most kRows, that lie in the maps [first, first + kWarpSize), in order. A map of
// rows at least as long has up to two, each in one of its rows. Every thread must call; barriers begin and end it.
template <int kRows, int kBlockSize, class T>
__device__ __forceinline__ void list_pieces(const Args& args, Stage<T, kBlockSize>& stage,
                                            i32 begin, i32 end, i32 first) {
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    const i32 number = first + i32(threadIdx.x);
    Piece piece;
    Map map = {0, 0, 0, 0};
    if (number < maps_of(args)) map = map_at(args, stage.run, number, piece);
    piece.first = i32(map.first);
    piece.h = map.h;
    piece.w = map.w;
    const bool here = map.h > 0 && piece.first < end && begin - piece.first < map.h * map.w;
    i32 stop = 0, rest = kRows;
    if (here) {
      piece.begin = max_of(begin, piece.first);
      stop = min_of(end - piece.first, map.h * map.w) + piece.first;
      if (map.w >= kRows) rest = map.w - (piece.begin - piece.first) % map.w;
    }
    const bool two = here && rest < stop - piece.begin;
    const u32 before = (1u << threadIdx.x) - 1;
    const u32 ones = __ballot_sync(0xffffffffu, here), twos = __ballot_sync(0xffffffffu, two);
    i32 place = __popc(ones & before) + __popc(twos & before);
    if (threadIdx.x == 0) stage.count = __popc(ones) + __popc(twos);
#pragma unroll 1
    for (; here && piece.begin < stop; piece.begin = piece.end) {
      piece.end = piece.begin + min_of(rest, stop - piece.begin);
      find_bins(args, piece);
      stage.pieces[place++] = piece;
      rest = kRows;
    }
  }
  __syncthreads();
}

// Which samples lie in the columns of up to kBlockSize rows of bins of a piece, from row `first` on; returns how many.
// Every thread must call.
template <int kBlockSize, class T>
__device__ __forceinline__ i32 list_rows(const Args& args, Stage<T, kBlockSize>& stage,
                                         const Piece& piece, i32 first) {
  const i64 list = list_of(args, stage.run.image, piece.camera);
  const i32* ends = args.ends + list * args.grid * args.grid;
  const i32 row = first + i32(threadIdx.x);
  i32 begin = 0, count = 0;
  if (row <= piece.rows.last) {
    const i64 at = row * args.grid;
    if (at + piece.columns.first > 0) begin = ends[at + piece.columns.first - 1];
    count = ends[at + piece.columns.last] - begin;
  }
  int total;
  const int offset = block_exclusive_sum<kBlockSize>(count, stage.partial, total);
  stage.begins[threadIdx.x] = begin;
  stage.offsets[threadIdx.x] = offset;
  __syncthreads();
  return total;
}

// Fills the stage with the listed samples [first, first + count) of `rows` rows of bins. Every thread must call; a barrier
// ends it.
template <int kBlockSize, class T>
__device__ __forceinline__ void fill_stage(const Args& args, Stage<T, kBlockSize>& stage,
                                           const Piece& piece, i32 rows, i32 first, i32 count) {
  const i32 points = i32(args.points), image = stage.run.image;
  const i64 samples = args.queries * args.points;
  const i32* list = args.samples + list_of(args, image, piece.camera) * samples;
#pragma unroll 1
  for (i32 i = threadIdx.x; i < count; i += kBlockSize) {
    i32 row = 0, beyond = rows;  // the last row that does not begin after it
    while (row + 1 < beyond) {
      const i32 middle = (row + beyond) / 2;
      if (stage.offsets[middle] <= first + i) {
        row = middle;
      } else {
        beyond = middle;
      }
    }
    const i64 at = stage.begins[row] + (first + i - stage.offsets[row]);
    const i32 sample = list[at];
    T x, y;
    location_at(args, (image * samples + sample) * args.cameras + piece.camera, x, y);
    Touch<T> touch = touch_of(piece.h, piece.w, x, y);
    touch.query = sample / points;
    touch.weight = weight_row(args, sample - touch.query * points, piece.camera, piece.level);
    stage.touches[i] = touch;
  }
  __syncthreads();
}

// ---- sums ----------------------------------------------------------------------------------------------------------

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

// The rows of a warp: kPixels from `row` on, of which a lane sums kPacks packs of kVector channels.
template <class T, int kVector, int kPixels, int kPacks>
struct Sums {
  T at[kPixels][kPacks][kVector] = {};
  i32 row;
  i32 begin, end, y, x;  // of these rows [begin, end) lie in the piece, from this pixel on
  // Packs behind the last channel do as the last one does.
  i32 channel[kPacks], group[kPacks];

  __device__ __forceinline__ Sums(const Args& args, i32 first_row, i32 first_channel)
      : row(first_row), begin(0), end(0), y(0), x(0) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      channel[pack] = min_of(first_channel + channel_of(pack), i32(args.channels) - kVector);
      group[pack] = channel[pack] / (i32(args.channels) / i32(args.groups));
    }
  }
  static __device__ __forceinline__ i32 channel_of(int pack) {
    return (pack * kWarpSize + i32(threadIdx.x) % kWarpSize) * kVector;
  }

  // Whether any row lies in the piece.
  __device__ __forceinline__ bool find(const Piece& piece) {
    begin = max_of(piece.begin - row, 0);
    end = min_of(piece.end - row, kPixels);
    const i32 pixel = row + begin - piece.first;
    y = pixel / piece.w;
    x = pixel - y * piece.w;
    return begin < end;
  }

  // Whether a sample touches a row, and its share of each; -1 of others.
  __device__ __forceinline__ bool touched(const Touch<T>& touch, i32 width, T* shares) const {
    i32 next_y = y, next_x = x;
    bool any = false;
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      shares[k] = T(-1);
      if (k < begin || k >= end) continue;
      shares[k] = touch.share(next_y, next_x);
      any |= shares[k] >= T(0);
      const bool last = ++next_x == width;
      next_x = last ? 0 : next_x;
      next_y += last;
    }
    return any;
  }
};

// Where the numbers of an image's queries begin.
template <class Weight, class Grad, class T>
struct Queries {
  const Grad* gradient;
  const Weight* weights;
  const T* normalizer;
  u32 channels, groups, per_query;  // weights of a query

  __device__ __forceinline__ Queries(const Args& args, i64 image)
      : gradient(static_cast<const Grad*>(args.grad_output) + image * args.queries * args.channels),
        weights(static_cast<const Weight*>(args.weights) +
                weights_of_query(args, image * args.queries)),
        normalizer(args.normalizer == nullptr ? nullptr
                                              : static_cast<const T*>(args.normalizer) +
                                                    image * args.queries * 2 * args.groups),
        channels(u32(args.channels)),
        groups(u32(args.groups)),
        per_query(u32(weights_of_query(args, 1))) {}

  __device__ __forceinline__ const Grad* gradient_of(const Touch<T>& touch, i32 channel) const {
    return gradient + (u64(u32(touch.query)) * channels + u32(channel));
  }
  __device__ __forceinline__ T weight_of(const Touch<T>& touch, i32 group) const {
    const T weight =
        T(load(weights[u64(u32(touch.query)) * per_query + u32(touch.weight + group)]));
    if (normalizer == nullptr) return weight;
    const T* row = normalizer + u64(u32(touch.query)) * (2 * groups) + group;
    return Normalizer<T>{row[0], row[groups], true}(weight);
  }
};

// Adds samples of the stage: lane i looks whether number begin + i * step touches a row, and the warp adds those that do.
// The whole warp must call.
template <class Weight, class Grad, int kBlockSize, class T, int kVector, int kPixels, int kPacks>
__device__ __forceinline__ void add_touches(const Queries<Weight, Grad, T>& queries,
                                            const Stage<T, kBlockSize>& stage, i32 width, i32 begin,
                                            i32 step, i32 count,
                                            Sums<T, kVector, kPixels, kPacks>& sums) {
  constexpr int kAtOnce =
      kPacks > 1 || sizeof(T) == 8 ? 1 : 2;  // samples that loads are in flight for
  const i32 own = begin + i32(threadIdx.x) % kWarpSize * step;
  T shares[kPixels];
  const bool touches =
      sums.touched(stage.touches[min_of(own, count - 1)], width, shares) && own < count;
  u32 left = __ballot_sync(0xffffffffu, touches);
#pragma unroll 1
  while (left != 0) {
    i32 lanes[kAtOnce];
    Values<Grad, kVector> values[kAtOnce][kPacks];
    T weights[kAtOnce][kPacks];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      lanes[i] = __ffs(i32(left)) - 1;  // -1: no more
      left &= left - 1;
      const Touch<T>& touch = stage.touches[begin + max_of(lanes[i], lanes[0]) * step];
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        values[i][pack].read(queries.gradient_of(touch, sums.channel[pack]));
        weights[i][pack] = queries.weight_of(touch, sums.group[pack]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (lanes[i] < 0) continue;
      T own_values[kPacks][kVector];
#pragma unroll
      for (int c = 0; c < kPacks * kVector; ++c) {
        own_values[c / kVector][c % kVector] =
            weights[i][c / kVector] * T(values[i][c / kVector].at(c % kVector));
      }
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const T share = __shfl_sync(0xffffffffu, shares[k], lanes[i]);
        if (share < T(0)) continue;  // nothing of a sample elsewhere, NaN neither
#pragma unroll
        for (int c = 0; c < kPacks * kVector; ++c) {
          sums.at[k][c / kVector][c % kVector] += share * own_values[c / kVector][c % kVector];
        }
      }
    }
  }
}

// Packs of channels of a warp, and how many blocks stand beside each other to sum all channels.
template <int kVector, int kPacks>
struct Chunks {
  static constexpr i32 kChannels = kWarpSize * kVector * kPacks;
  static __device__ __forceinline__ u32 count(const Args& args) {
    return (u32(args.channels) + kChannels - 1) / kChannels;
  }
};

template <class Scalar, class T, int kVector, int kPixels, int kPacks>
__device__ __forceinline__ void write_rows(const Args& args, i32 source, i32 first_channel, i32 end,
                                           const Sums<T, kVector, kPixels, kPacks>& sums) {
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    Scalar* to = static_cast<Scalar*>(args.gradients[source]) + i64(sums.row + k) * args.channels;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const i32 channel = first_channel + sums.channel_of(pack);
      if (sums.row + k >= end || channel >= args.channels) continue;
      Pack<Scalar, kVector> result;
#pragma unroll
      for (int c = 0; c < kVector; ++c) store(result.at[c], sums.at[k][pack][c]);
      store_pack<kVector>(to + channel, result);
    }
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// Adds all samples that touch the block's rows [begin, end): with kCrowd each warp owns all of them, and has its share of
// the samples; else rows of its own. False where these are too many for that. Every thread must call.
template <int kRows, bool kCrowd, int kBlockSize, class Numbers, class T, class Own>
__device__ __forceinline__ bool add_all(const Args& args, Stage<T, kBlockSize>& stage, i32 begin,
                                        i32 end, const Numbers& queries, Own& sums) {
  constexpr i32 kWarps = kBlockSize / kWarpSize;
  const i32 warp = i32(threadIdx.x) / kWarpSize;
#pragma unroll 1
  for (i32 map = 0; map < maps_of(args); map += kWarpSize) {
    list_pieces<kRows>(args, stage, begin, end, map);
#pragma unroll 1
    for (i32 i = 0; i < stage.count; ++i) {
      const Piece& piece = stage.pieces[i];
      const bool any = sums.find(piece);
#pragma unroll 1
      for (i32 row = piece.rows.first; row <= piece.rows.last; row += kBlockSize) {
        const i32 total = list_rows<kBlockSize>(args, stage, piece, row);
        if (!kCrowd && total > kMostCandidates) return false;
        const i32 rows = min_of(piece.rows.last - row + 1, kBlockSize);
#pragma unroll 1
        for (i32 first = 0; first < total; first += kMostCandidates) {
          const i32 count = min_of(total - first, kMostCandidates);
          fill_stage<kBlockSize>(args, stage, piece, rows, first, count);
#pragma unroll 1
          for (i32 j = kCrowd ? warp : 0; any && j < count; j += kCrowd ? kBlockSize : kWarpSize) {
            add_touches(queries, stage, piece.w, j, kCrowd ? kWarps : 1, count, sums);
          }
          __syncthreads();
        }
      }
    }
  }
  return true;
}

template <class Scalar, class Weight, class Grad, int kVector, int kPacks, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) gather(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kPixels = kRunRows / (kBlockSize / kWarpSize);
  static_assert(kPixels >= 1);
  __shared__ Stage<T, kBlockSize> stage;
  const u32 chunks = Chunks<kVector, kPacks>::count(args), chunk = blockIdx.x % chunks;
  const i32 first_channel = i32(chunk) * Chunks<kVector, kPacks>::kChannels;
  const Run run = run_at(args, i32(blockIdx.x / chunks));
  if (run.image >= args.batch) return;  // the host counts a run too many for some sources
  if (threadIdx.x == 0) stage.run = run;
  const i32 begin = run.image * rows_of(args, run.source) + run.first, end = begin + run.rows;
  Sums<T, kVector, kPixels, kPacks> sums(args, begin + i32(threadIdx.x) / kWarpSize * kPixels,
                                         first_channel);
  const Queries<Weight, Grad, T> queries(args, run.image);
  if (add_all<kRunRows, false>(args, stage, begin, end, queries, sums)) {
    write_rows<Scalar>(args, stage.run.source, first_channel, end, sums);
  } else if (chunk == 0 && threadIdx.x == 0) {
    args.crowded[atomicAdd(args.crowds, 1)] = i32(blockIdx.x / chunks);
  }
}

// Sums of the warps of a block become one, which is written, row by row. Every thread must call.
template <class Scalar, int kBlockSize, class T, int kVector, int kPixels, int kPacks>
__device__ __forceinline__ void write_sums(const Args& args, i32 source, i32 first_channel, i32 end,
                                           const Sums<T, kVector, kPixels, kPacks>& sums) {
  constexpr i32 kWarps = kBlockSize / kWarpSize, kChannels = Chunks<kVector, kPacks>::kChannels;
  __shared__ T parts[kWarps][kChannels];
  const i32 warp = i32(threadIdx.x) / kWarpSize;
  const i32 channels = min_of(kChannels, i32(args.channels) - first_channel);
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPacks * kVector; ++i) {
      parts[warp][sums.channel_of(i / kVector) + i % kVector] =
          sums.at[k][i / kVector][i % kVector];
    }
    __syncthreads();
    if (sums.row + k >= end) continue;
    Scalar* to = static_cast<Scalar*>(args.gradients[source]) + i64(sums.row + k) * args.channels +
                 first_channel;
#pragma unroll 1
    for (i32 c = threadIdx.x; c < channels; c += kBlockSize) {
      T sum = T(0);
#pragma unroll
      for (i32 i = 0; i < kWarps; ++i) sum += parts[i][c];
      store(to[c], sum);
    }
  }
}

template <class Scalar, class Weight, class Grad, int kVector, int kPacks, int kPixels,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) gather_crowds(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kParts = kRunRows / kPixels;
  __shared__ Stage<T, kBlockSize> stage;
  const i32 chunks = i32(Chunks<kVector, kPacks>::count(args));
  const i64 items = i64(*args.crowds) * kParts * chunks;
#pragma unroll 1
  for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
    const i64 part = item / chunks;
    const Run run = run_at(args, args.crowded[part / kParts]);
    const i32 own = i32(part % kParts) * kPixels;
    if (own >= run.rows) continue;
    const i32 begin = run.image * rows_of(args, run.source) + run.first + own;
    const i32 end = begin + min_of(kPixels, run.rows - own);
    const i32 first_channel = i32(item - part * chunks) * Chunks<kVector, kPacks>::kChannels;
    Sums<T, kVector, kPixels, kPacks> sums(args, begin, first_channel);
    const Queries<Weight, Grad, T> queries(args, run.image);
    __syncthreads();  // the rows before are done
    if (threadIdx.x == 0) stage.run = run;
    add_all<kPixels, true>(args, stage, begin, end, queries, sums);
    write_sums<Scalar, kBlockSize>(args, run.source, first_channel, end, sums);
  }
}

}  // namespace torchkiln::deformable_aggregation_gather
