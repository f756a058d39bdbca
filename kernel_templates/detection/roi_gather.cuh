// The gradient of maps that regions were averaged from, by the tables of roi_align.cuh: a block owns a tile of 8 x 8
// pixels for 32 * kLaneChannels channels, and a warp one row of it, lanes on channels, its sums in registers. Regions that
// touch the tile come in batches, whose weights are laid out in shared memory first, so that a warp waits for memory once
// a region: for the gradients of the bins that it takes. kSplit warps share a row, and each takes every kSplit-th region.
// No atomics, no zero fill, the same bits every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/roi_align.cuh"

namespace torchkiln::roi_align {

constexpr int kSide = 8;       // of a tile
constexpr int kPieceBins = 8;  // bins of an axis that a piece holds
constexpr int kGroupBins = 4;  // neighbouring bins whose gradients are asked for at once

// What a tile takes of up to 8 x 8 bins of one region. Zero: nothing.
template <class T>
struct alignas(16) Piece {
  T rows[kSide][kPieceBins];
  T columns[kPieceBins][kSide];
  i32 region, first_row_bin, first_column_bin;
  u32 column_bins;  // a bit for each bin that has columns in the tile
};

// Pieces of regions are numbered region by region, row by row.
struct PieceNumbers {
  i32 down, across;

  __device__ __forceinline__ i64 region(i64 piece) const {
    return down * across == 1 ? piece
                              : piece / (down * across);  // the usual one without a division
  }
};
__device__ __forceinline__ PieceNumbers pieces_of(const Regions& r) {
  return {i32(r.pooled_h + kPieceBins - 1) / kPieceBins,
          i32(r.pooled_w + kPieceBins - 1) / kPieceBins};
}

// 16 neighbouring threads lay out one piece, one bin of one axis each; all threads of a warp must call. `exists` is the
// same for these 16.
template <class T, class AnyArgs>
__device__ __forceinline__ void lay_out(const AnyArgs& args, const TileAt& at, bool exists,
                                        i64 number, Piece<T>& piece) {
  const Regions& r = args.regions;
  const PieceNumbers n = pieces_of(r);
  const i64 region = n.region(number);
  const i32 part = i32(number - region * (n.down * n.across));
  const i32 first_row_bin = part / n.across * kPieceBins;
  const i32 first_column_bin = (part - part / n.across * n.across) * kPieceBins;
  const int bin = threadIdx.x % kPieceBins;
  const bool columns = threadIdx.x % (2 * kPieceBins) >= kPieceBins;
  const i32 of_axis = (columns ? first_column_bin : first_row_bin) + bin;
  const bool has_bin = exists && of_axis < i32(columns ? r.pooled_w : r.pooled_h);
  bool touches_tile = false;
  if (exists) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) (columns ? piece.columns[bin][i] : piece.rows[i][bin]) = T(0);
  }
  if (has_bin) {
    const Table<T> table = table_of<T>(args, region);
    const Tap<T>* taps = columns ? table.columns : table.rows;
    const Range range = columns ? table.column_bins[of_axis] : table.row_bins[of_axis];
    const i32 origin = columns ? at.x : at.y;
    i32 i = range.begin;
    // Where a bin's pixels are neighbours, those before the tile are left out.
    if (range.end - range.begin > kSide) {
      const i32 first = taps[range.begin].pixel, last = taps[range.end - 1].pixel;
      if (last - first == range.end - 1 - range.begin) i += max_of(origin - first, 0);
    }
#pragma unroll 2
    for (; i < range.end; ++i) {
      const Tap<T> tap = taps[i];
      const i32 local = tap.pixel - origin;
      if (local >= kSide) break;
      if (local < 0) continue;
      (columns ? piece.columns[bin][local] : piece.rows[local][bin]) = tap.weight;
      touches_tile = true;
    }
  }
  const u32 bins = __ballot_sync(0xffffffffu, touches_tile);
  if (exists && threadIdx.x % (2 * kPieceBins) == 0) {
    piece.region = i32(region);
    piece.first_row_bin = first_row_bin;
    piece.first_column_bin = first_column_bin;
    piece.column_bins = bins >> (threadIdx.x % kWarpSize + kPieceBins) & 0xffu;
  }
}

// Adds what a row of the tile takes of a piece.
template <class Scalar, class Index, int kLaneChannels, class AnyArgs, class T = Acc<Scalar>>
__device__ __forceinline__ void add_piece(const AnyArgs& args, const TileAt& at, int row,
                                          const Piece<T>& piece, T (&sums)[kSide][kLaneChannels]) {
  const Regions& r = args.regions;
  const int lane = threadIdx.x % kWarpSize;
  const u32 row_bins =
      __ballot_sync(0xffffffffu, lane < kPieceBins && piece.rows[row][lane % kPieceBins] != T(0));
  if (row_bins == 0) return;
  const i32 pooled_w = i32(r.pooled_w);
  const Index first_bin = Index(piece.region) * Index(r.pooled_h * r.pooled_w) +
                          piece.first_row_bin * pooled_w + piece.first_column_bin;
  const Scalar* bins = static_cast<const Scalar*>(args.bins) + first_bin * Index(r.c);
  // Channels and bins that are not there read their neighbours, and nobody takes it.
  Index channels[kLaneChannels];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    channels[i] = Index(min_of(at.channel + lane + i * kWarpSize, r.c - 1));
  }
  const i32 last_bin = pooled_w - 1 - piece.first_column_bin;
#pragma unroll 1
  for (u32 columns = piece.column_bins; columns != 0;) {
    const int first = __ffs(columns) - 1;
    const u32 group = columns >> first;
    columns &= ~(((1u << kGroupBins) - 1) << first);
    T gradients[kGroupBins][kLaneChannels] = {};  // of the bins, as this row takes them
#pragma unroll 1
    for (u32 rest = row_bins; rest != 0; rest &= rest - 1) {
      // Two rows of bins at once: most rows of pixels have no more.
      const int one = __ffs(rest) - 1;
      rest &= rest - 1;
      const bool has_other = rest != 0;
      const int other = has_other ? __ffs(rest) - 1 : one;
      T of_one[kGroupBins][kLaneChannels], of_other[kGroupBins][kLaneChannels];
      const Scalar* from_one = bins + Index(one * pooled_w) * Index(r.c);
      const Scalar* from_other = bins + Index(other * pooled_w) * Index(r.c);
#pragma unroll
      for (int j = 0; j < kGroupBins; ++j) {
        const Index bin = Index(min_of(first + j, last_bin)) * Index(r.c);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
          of_one[j][i] = load(from_one[bin + channels[i]]);
          of_other[j][i] = has_other ? load(from_other[bin + channels[i]]) : T(0);
        }
      }
      const T weight = piece.rows[row][one], other_weight = piece.rows[row][other];
#pragma unroll
      for (int j = 0; j < kGroupBins; ++j) {
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
          gradients[j][i] += weight * of_one[j][i] + other_weight * of_other[j][i];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kGroupBins; ++j) {
      if ((group >> j & 1) == 0) continue;
#pragma unroll
      for (int x = 0; x < kSide; ++x) {
        const T weight = piece.columns[first + j][x];
        if (weight == T(0)) continue;  // a gradient that is not finite stays in its bin
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) sums[x][i] += weight * gradients[j][i];
      }
    }
  }
}

// Adds the sums of the kSplit warps of a row, and writes the tile. `shared` holds it with one place of padding a pixel, so
// that a row of pixels of one channel is read without bank conflicts.
template <class Scalar, class Index, bool kLast, int kLaneChannels, int kSplit,
          class T = Acc<Scalar>>
__device__ __forceinline__ void write_sums(const Regions& r, void* to, i32 image, const TileAt& at,
                                           const T (&sums)[kSide][kLaneChannels], T* shared) {
  constexpr int kChannels = kWarpSize * kLaneChannels, kPitch = kChannels + 1;
  constexpr int kPixels = kSide * kSide, kBlockSize = kWarpSize * kSide * kSplit;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (int part = 0; part < kSplit; ++part) {
    __syncthreads();
    if (warp / kSide != part) continue;
#pragma unroll
    for (int x = 0; x < kSide; ++x) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        T& sum = shared[(warp % kSide * kSide + x) * kPitch + lane + i * kWarpSize];
        sum = part == 0 ? sums[x][i] : sum + sums[x][i];
      }
    }
  }
  __syncthreads();
  // A thread stays on its pixel, or on its channel.
  constexpr int kOwn = kLast ? kChannels : kPixels, kStep = kBlockSize / kOwn;
  static_assert(kBlockSize % kOwn == 0);
  const int own = threadIdx.x % kOwn;
  const i32 height = i32(r.h), width = i32(r.w),
            channels = i32(min_of(r.c - at.channel, i64(kChannels)));
  if constexpr (kLast) {
    if (own >= channels) return;
    Scalar* pixels = static_cast<Scalar*>(to) + at.channel + own;
#pragma unroll 2
    for (int pixel = threadIdx.x / kOwn; pixel < kPixels; pixel += kStep) {
      const i32 y = at.y + pixel / kSide, x = at.x + pixel % kSide;
      if (y >= height || x >= width) continue;
      const Index offset = ((Index(image) * height + y) * width + x) * Index(r.c);
      store(pixels[offset], shared[pixel * kPitch + own]);
    }
  } else {
    const i32 y = at.y + own / kSide, x = at.x + own % kSide;
    if (y >= height || x >= width) return;
    const Index size = Index(height) * width;
    const i32 first = threadIdx.x / kOwn;
    Scalar* pixel = static_cast<Scalar*>(to) +
                    (Index(image) * Index(r.c) + Index(at.channel) + first) * size +
                    Index(y) * width + x;
#pragma unroll 4
    for (int channel = first; channel < channels; channel += kStep, pixel += kStep * size) {
      store(*pixel, shared[own * kPitch + channel]);
    }
  }
}

// Block number `block` of those that own tiles of the gradient of r's maps; first_image as elsewhere.
template <class Scalar, class Index, bool kLast, int kLaneChannels, int kSplit, class AnyArgs>
__device__ __forceinline__ void gather_average(const AnyArgs& args, const Regions& r, void* maps,
                                               u32 block, i32 first_image) {
  using T = Acc<Scalar>;
  constexpr int kBlockSize = kWarpSize * kSide * kSplit, kChannels = kWarpSize * kLaneChannels;
  constexpr int kBatch = kBlockSize / (2 * kPieceBins);
  // Pieces first, then the tile.
  union Memory {
    Piece<T> pieces[kBatch];
    T sums[kSide * kSide * (kChannels + 1)];
  };
  __shared__ Memory memory;
  __shared__ i32 list[kBlockSize];
  __shared__ int partial[kBlockSize / kWarpSize];
  const u32 tiles_x = u32((r.w + kSide - 1) / kSide), tiles_y = u32((r.h + kSide - 1) / kSide);
  const u32 chunks = u32((r.c + kChannels - 1) / kChannels);
  TileAt at;
  at.channel = i64(block % chunks) * kChannels;
  block /= chunks;
  at.x = i32(block % tiles_x) * kSide;
  block /= tiles_x;
  at.y = i32(block % tiles_y) * kSide;
  const i32 of_level = i32(block / tiles_y);
  at.image = first_image + of_level;
  const int warp = threadIdx.x / kWarpSize, row = warp % kSide, part = warp / kSide;
  const int sixteenth = threadIdx.x / (2 * kPieceBins);
  const PieceNumbers n = pieces_of(r);
  const i64 pieces = r.k * (n.down * n.across);
  T sums[kSide][kLaneChannels] = {};
#pragma unroll 1
  for (i64 begin = 0; begin < pieces; begin += kBlockSize) {
    const i64 candidate = begin + threadIdx.x;
    const i64 region = n.region(candidate);
    const bool listed = candidate < pieces &&
                        touches(static_cast<const Span*>(args.spans)[region], at, kSide, kSide);
    int total;
    const int slot = block_exclusive_sum<kBlockSize>(listed ? 1 : 0, partial, total);
    if (listed) list[slot] = i32(threadIdx.x);
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < total; first += kBatch) {
      const bool exists = first + sixteenth < total;
      lay_out<T>(args, at, exists, begin + (exists ? list[first + sixteenth] : 0),
                 memory.pieces[sixteenth]);
      __syncthreads();
      const int count = min_of(total - first, kBatch);
#pragma unroll 1
      for (int i = part; i < count; i += kSplit) {
        add_piece<Scalar, Index, kLaneChannels>(args, at, row, memory.pieces[i], sums);
      }
      __syncthreads();
    }
  }
  write_sums<Scalar, Index, kLast, kLaneChannels, kSplit>(r, maps, of_level, at, sums, memory.sums);
}

}  // namespace torchkiln::roi_align
