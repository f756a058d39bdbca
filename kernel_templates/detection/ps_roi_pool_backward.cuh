// ps_roi_align and ps_roi_pool on the GPU, backward:
//
//   gather    a block owns a tile of the gradient of the maps of one bin (channels_last: of neighbouring bins of a row), for
//             a few outputs, which share a bin's geometry. A thread owns a pixel of them and keeps its sums in registers. Of
//             the regions that touch the tile a batch is laid out in shared memory: gradients, weights, and for each row and
//             each column of the tile a mask of the entries that take any of it. The entries of a pixel are the bits that
//             its row and its column share; it adds them one by one. No atomics on numbers, no zero fill, the same bits
//             every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/scan.cuh"
#include "detection/ps_roi_pool.h"

namespace torchkiln::ps_roi_pool_backward {

using namespace torchkiln::ps_roi_pool;

constexpr int kWordBits = 32;

// What a block sums: bins from `bin` on of a row, outputs from `output` on, and a tile.
struct Part {
  i32 image, row_bin, bin, bins, output, outputs;
  i32 y, x, height, width;
};

// Neighbouring blocks have neighbouring bins.
__device__ __forceinline__ Part own_part(const Args& args, u32 block) {
  const Regions& r = args.regions;
  const Cut& cut = args.cut;
  Part part;
  const auto next = [&](i64 parts) {
    const u32 above = block / u32(parts), own = block - above * u32(parts);
    block = above;
    return i32(own);
  };
  part.bin = next(cut.of_bins) * cut.bins;
  part.row_bin = next(r.pooled_h);
  part.output = next(cut.of_outputs) * cut.outputs;
  part.x = next(cut.across) * cut.width;
  part.y = next(cut.down) * cut.height;
  part.image = i32(block);
  part.bins = min_of(cut.bins, i32(r.pooled_w) - part.bin);
  part.outputs = min_of(cut.outputs, i32(args.outputs) - part.output);
  part.width = min_of(cut.width, i32(r.w) - part.x);
  part.height = min_of(cut.height, i32(r.h) - part.y);
  return part;
}

// ---- regions -------------------------------------------------------------------------------------------------------

template <class T>
struct Box {
  T image, x1, y1, x2, y2;
};
// All of it on its way at once. By value: a reference would put the kernel's arguments on the stack.
template <class T>
TORCHKILN_HD_CALLED Box<T> box_at(const void* boxes, i64 type, i64 region) {
  const auto read = [&](const auto* from) {
    from += region * 5;
    return Box<T>{T(load(from[0])), T(load(from[1])), T(load(from[2])), T(load(from[3])),
                  T(load(from[4]))};
  };
  switch (type) {
    case kHalfNumbers:
      return read(static_cast<const half*>(boxes));
    case kBfloat16Numbers:
      return read(static_cast<const bfloat16*>(boxes));
    case kDoubleNumbers:
      return read(static_cast<const double*>(boxes));
    default:
      return read(static_cast<const float*>(boxes));
  }
}

template <int kPooling, class T>
__device__ __forceinline__ auto axis_of(const Args& args, const Box<T>& box, bool columns) {
  const T low = columns ? box.x1 : box.y1, high = columns ? box.x2 : box.y2;
  if constexpr (kPooling == kCells) {
    return cells_of(args, low, high, columns);
  } else {
    const Regions& r = args.regions;
    return roi_align::axis_of(low, high, r, columns ? r.pooled_w : r.pooled_h);
  }
}

// Those that the bins `first` to `last` take, or a few more.
template <class T>
__device__ __forceinline__ Range pixels_of(const Cells<T>& axis, i32 first, i32 last, i64) {
  if (is_empty(axis)) return {0, 0};
  return {axis.bins.begin(first), axis.bins.end(last)};
}
template <class T>
__device__ __forceinline__ Range pixels_of(const roi_align::Axis<T>& axis, i32 first, i32 last,
                                           i64 size) {
  if (is_empty(axis)) return {0, 0};
  const T begin = axis.start + T(first) * axis.bin - T(1);
  const T end = axis.start + T(last + 1) * axis.bin + T(2);
  return {pixel_below(axis, begin, size), pixel_below(axis, end, size) + 1};
}

template <int kPooling, class T>
__device__ __forceinline__ bool touches(const Args& args, const Part& part, i64 region) {
  const Regions& r = args.regions;
  if (region >= r.k) return false;
  const Box<T> box = box_at<T>(r.boxes, r.box_type, region);
  bool does = box.image > T(-1) && box.image < T(r.n) && i32(box.image) == part.image;
#pragma unroll 1
  for (int columns = 0; columns < 2; ++columns) {
    const i32 first = columns ? part.bin : part.row_bin;
    const i32 last = columns ? first + part.bins - 1 : first;
    const i32 begin = columns ? part.x : part.y;
    const Range pixels =
        pixels_of(axis_of<kPooling>(args, box, columns != 0), first, last, columns ? r.w : r.h);
    does = does && !pixels.is_empty() && pixels.end > begin &&
           pixels.begin < begin + (columns ? part.width : part.height);
  }
  return does;
}

// ---- batches -------------------------------------------------------------------------------------------------------

// Regions in shared memory.
template <class T>
struct Batch {
  T* gradients;  // (entries, bins, kOutputs)
  T* weights;    // (entries, cut.weights())
  u32* masks;    // (entries / 32, cut.lines()): a bit for each entry that takes any of a line
  i32 cleared;   // words of both, which begin with zeros
};
template <int kOutputs, class T>
__device__ __forceinline__ Batch<T> batch_in(void* memory, const Cut& cut, int pooling) {
  Batch<T> batch;
  batch.gradients = static_cast<T*>(memory);
  batch.weights = batch.gradients + cut.entries * cut.bins * kOutputs;
  const i32 weights = cut.entries * cut.weights(pooling);
  batch.masks = reinterpret_cast<u32*>(batch.weights + weights);
  batch.cleared = weights * i32(sizeof(T) / sizeof(u32)) + cut.entries / kWordBits * cut.lines();
  return batch;
}

template <class Scalar, bool kLast, int kOutputs, int kBlockSize, class T = Acc<Scalar>>
__device__ __forceinline__ void copy_gradients(const Args& args, const Part& part, i64 begin,
                                               const i32* regions, int count, T* to) {
  constexpr int kAtOnce = kLast ? 4 : 2;
  const Regions& r = args.regions;
  const i32 bins = i32(r.pooled_h * r.pooled_w), outputs = i32(args.outputs);
  const i32 bin_step = args.bins_last ? outputs : 1, output_step = args.bins_last ? 1 : bins;
  const u32 bytes = u32(r.c) * u32(sizeof(Scalar));
  const Scalar* from = static_cast<const Scalar*>(args.bins) + begin * r.c +
                       part.output * output_step +
                       (part.row_bin * i32(r.pooled_w) + part.bin) * bin_step;
  const float inverse = count_quotient(1.0f, static_cast<float>(part.bins));
  const auto output_of = [&](i32 item) { return kLast ? quotient(item, inverse) : item; };
  const auto ask = [&](i32 item) {
    const i32 row = output_of(item), output = row % kOutputs;
    Scalar gradient = {};
    if (output < part.outputs) {
      const i32 bin = item - row * part.bins;
      gradient = row_at(from, regions[row / kOutputs],
                        bytes)[output * output_step + (kLast ? bin * bin_step : 0)];
    }
    return gradient;
  };
  const auto keep = [&](i32 item, Scalar gradient) {
    const i32 row = output_of(item), bin = kLast ? item - row * part.bins : 0;
    const i32 at = kLast ? (row / kOutputs * args.cut.bins + bin) * kOutputs + row % kOutputs : row;
    to[at] = load(gradient);
  };
  at_once<kAtOnce, kBlockSize>(count * kOutputs * part.bins, ask, keep);
}

// The rows of a tile, or its columns for one bin: what an entry gives to them.
template <class T>
struct Side {
  i64 size;  // of the map
  i32 bin, low, count;
  T* weights;
  u32* masks;
  u32 bit;
};
template <class T>
__device__ __forceinline__ void fill_side(const Cells<T>& axis, const Side<T>& side) {
  const Range cells = axis.bins.bin_of(side.bin);
  if (cells.is_empty()) return;
  *side.weights = count_quotient(T(1), T(cells.end - cells.begin));
  const i32 end = min_of(cells.end - side.low, side.count);
#pragma unroll 1
  for (i32 i = max_of(cells.begin - side.low, 0); i < end; ++i) atomicOr(side.masks + i, side.bit);
}
template <class T>
__device__ __forceinline__ void fill_side(const roi_align::Axis<T>& axis, const Side<T>& side) {
  if (is_empty(axis)) return;
  const T share = count_quotient(T(1), T(axis.count));
  i32 first, last;
  sample_range(axis, side.bin, side.size, first, last);
#pragma unroll 1
  for (i32 i = first; i < last; ++i) {
    const Taps<T> taps = sample_taps(axis, side.bin, i, side.size);
#pragma unroll 1
    for (int tap = 0; tap < 2; ++tap) {
      const T weight = tap == 0 ? taps.weight_low : taps.weight_high;
      const i32 line = (tap == 0 ? taps.low : taps.high) - side.low;
      // Nothing is multiplied by 0: gradients need not be finite.
      if (weight == T(0) || line < 0 || line >= side.count) continue;
      side.weights[line] += weight * share;
      atomicOr(side.masks + line, side.bit);
    }
  }
}

// One thread, the rows of an entry or the columns of one of its bins.
template <int kPooling, int kBlockSize, class T>
__device__ __forceinline__ void fill_sides(const Args& args, const Part& part, i64 begin,
                                           const i32* regions, int count, const Batch<T>& batch) {
  const Regions& r = args.regions;
  const Cut& cut = args.cut;
  const i32 sides = 1 + part.bins;
  const float inverse = count_quotient(1.0f, static_cast<float>(sides));
#pragma unroll 1
  for (i32 item = threadIdx.x; item < count * sides; item += kBlockSize) {
    const i32 entry = quotient(item, inverse), number = item - entry * sides;
    const bool columns = number > 0;
    const i32 line = columns ? cut.height + (number - 1) * cut.width : 0;
    const Side<T> side = {
        columns ? r.w : r.h,
        columns ? part.bin + number - 1 : part.row_bin,
        columns ? part.x : part.y,
        columns ? part.width : part.height,
        batch.weights + entry * cut.weights(kPooling) + (kPooling == kCells ? number : line),
        batch.masks + entry / kWordBits * cut.lines() + line,
        u32(1) << entry % kWordBits};
    const Box<T> box = box_at<T>(r.boxes, r.box_type, begin + regions[entry]);
    fill_side(axis_of<kPooling>(args, box, columns), side);
  }
}

// ---- pixels --------------------------------------------------------------------------------------------------------

// A thread's: where its row and its columns lie among the lines and the weights.
struct Pixel {
  bool exists;
  i32 y, x, bin;
  i32 row_line, column_line, row_weight, column_weight;
};
template <int kPooling, bool kLast>
__device__ __forceinline__ Pixel own_pixel(const Cut& cut, const Part& part) {
  Pixel own;
  const i32 bins = kLast ? cut.bins : 1, pixel = divided(i32(threadIdx.x), bins);
  own.bin = i32(threadIdx.x) - pixel * bins;
  own.y = divided(pixel, cut.width);
  own.x = pixel - own.y * cut.width;
  own.exists = own.y < part.height && own.x < part.width && own.bin < part.bins;
  own.row_line = own.y;
  own.column_line = cut.height + own.bin * cut.width + own.x;
  own.row_weight = kPooling == kCells ? 0 : own.row_line;
  own.column_weight = kPooling == kCells ? 1 + own.bin : own.column_line;
  return own;
}

// In the order of the entries.
template <int kPooling, int kOutputs, class T>
__device__ __forceinline__ void add_batch(const Cut& cut, const Pixel& own, const Batch<T>& batch,
                                          int count, T (&sums)[kOutputs]) {
  constexpr int kAtOnce = 16 / sizeof(T);
#pragma unroll 1
  for (i32 word = 0; word * kWordBits < count; ++word) {
    const u32* masks = batch.masks + word * cut.lines();
    u32 hits = masks[own.row_line] & masks[own.column_line];
#pragma unroll 1
    for (; hits != 0; hits &= hits - 1) {
      const i32 entry = word * kWordBits + __ffs(hits) - 1;
      const T* weights = batch.weights + entry * cut.weights(kPooling);
      const T weight = weights[own.row_weight] * weights[own.column_weight];
      const T* gradients = batch.gradients + (entry * cut.bins + own.bin) * kOutputs;
#pragma unroll
      for (int i = 0; i < kOutputs; i += kAtOnce) {
        const Pack<T, kAtOnce> some = read_pack<kAtOnce>(gradients + i);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sums[i + j] += weight * some.at[j];
      }
    }
  }
}

template <class Scalar, bool kLast, int kOutputs, class T = Acc<Scalar>>
__device__ __forceinline__ void write_sums(const Args& args, const Part& part, const Pixel& own,
                                           const T (&sums)[kOutputs]) {
  const Regions& r = args.regions;
  const i64 size = r.h * r.w, bins = r.pooled_h * r.pooled_w;
  const i64 pixel = (part.y + own.y) * r.w + part.x + own.x;
  const i64 channel = part.output * bins + part.row_bin * r.pooled_w + part.bin + own.bin;
  const i64 step = bins * (kLast ? 1 : size);
  Scalar* to = static_cast<Scalar*>(args.maps) + part.image * r.c * size +
               (kLast ? pixel * r.c + channel : channel * size + pixel);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    if (i < part.outputs) store(*to, sums[i]);
    to += step;
  }
}

// Grid: one-dimensional, the parts of the gradient. Dynamic shared memory: a batch.
// Threads without a pixel help to find and to lay out regions.
template <class Scalar, int kPooling, bool kLast, int kOutputs, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, sizeof(Acc<Scalar>) == 8 ? 1 : 1024 / kBlockSize)
    gather(const Args args) {
  using T = Acc<Scalar>;
  extern __shared__ uint4 memory[];
  __shared__ i32 list[kBlockSize];
  __shared__ int partial[kBlockSize / kWarpSize];
  const Regions& r = args.regions;
  const Cut& cut = args.cut;
  const Part part = own_part(args, blockIdx.x);
  const Batch<T> batch = batch_in<kOutputs, T>(memory, cut, kPooling);
  const Pixel own = own_pixel<kPooling, kLast>(cut, part);
  T sums[kOutputs] = {};
#pragma unroll 1
  for (i64 begin = 0; begin < r.k; begin += kBlockSize) {
    const bool listed = touches<kPooling, T>(args, part, begin + threadIdx.x);
    int total;
    const int slot = block_exclusive_count<kBlockSize>(listed, partial, total);
    if (listed) list[slot] = i32(threadIdx.x);
#pragma unroll 1
    for (int first = 0; first < total; first += cut.entries) {
      const int count = min_of(total - first, cut.entries);
#pragma unroll 1
      for (int i = threadIdx.x; i < batch.cleared; i += kBlockSize) {
        reinterpret_cast<u32*>(batch.weights)[i] = 0;
      }
      __syncthreads();
      copy_gradients<Scalar, kLast, kOutputs, kBlockSize>(args, part, begin, list + first, count,
                                                          batch.gradients);
      fill_sides<kPooling, kBlockSize>(args, part, begin, list + first, count, batch);
      __syncthreads();
      if (own.exists) add_batch<kPooling>(cut, own, batch, count, sums);
      __syncthreads();
    }
  }
  if (own.exists) write_sums<Scalar, kLast>(args, part, own, sums);
}

}  // namespace torchkiln::ps_roi_pool_backward
