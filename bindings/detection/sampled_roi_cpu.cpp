// Operators that pool bilinear samples, on the CPU. Forward: threads over parts of the bins of a group; pixels and
// weights of their samples are worked out once for all channels. Backward: threads over blocks of channels of an image,
// each adds all bins in order into sums of its own: no atomics, the same result for any number of threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "bindings/detection/sampled_roi.h"
#include "bindings/detection/sampled_roi_table.h"
#include "bindings/support/parallel.h"

namespace torchkiln::bindings {
namespace {

using sampled::kEntries;
using sampled::place;
using sampled::Table;
using sampled_roi::Args;
using sampled_roi::Patch;

// Channels of a gradient that one task sums.
constexpr std::int64_t kChannelBlock = 32;

// sums[i] += weight * values[i]
TORCHKILN_VECTORISED void add_scaled(float* __restrict__ sums, const float* __restrict__ values,
                                     float weight, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * values[i];
}
TORCHKILN_VECTORISED void add_scaled(double* __restrict__ sums, const double* __restrict__ values,
                                     double weight, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * values[i];
}
template <class Half>
void add_scaled(float* sums, const Half* values, float weight, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += weight * load(values[i]);
}

// All samples of a table in one channel.
template <class Scalar, class AnyTable, class T>
void take_all(const Scalar* map, const AnyTable& table, T* values) {
  const std::size_t n = table.entries();
  const i32* pixels = table.pixels();
  const T* weights = table.weights();
  for (std::size_t i = 0; i < n; ++i) {
    values[i] = T(0);
    for (std::size_t k = 0; pixels[i] >= 0 && k < 4; ++k)
      values[i] += weights[k * n + i] * load(map[pixels[k * n + i]]);
  }
}

// ---- forward ----

// Of all channels and the bins of a part: (channels, bins), or (bins, channels) for channels_last.
template <class T>
struct Sums {
  std::vector<T> values, samples;
  std::vector<i32> winners;

  void reset(std::int64_t n, bool maximum) {
    values.assign(place(n), T(0));
    if (maximum) winners.assign(place(n), -1);
  }
  void offer(std::size_t at, T value, i32 sample) {
    T& best = values[at];
    if (winners[at] < 0 || value > best || (is_nan(value) && !is_nan(best))) {
      best = value;
      winners[at] = sample;
    }
  }
};

// Where the image of a bin begins; one that is not there is not read.
template <class Scalar>
const Scalar* maps_of(const Args& a, i32 image) {
  return static_cast<const Scalar*>(a.maps) + std::max<std::int64_t>(0, image) * a.c * a.h * a.w;
}

template <class Op, class Scalar, class T>
void pool_first(const Args& a, const Table<Op, T>& table, Sums<T>& sums) {
  const std::int64_t bins = table.bins();
  const Scalar* map = maps_of<Scalar>(a, table.patch(0).image);
  sums.samples.resize(table.entries());
  for (std::int64_t c = 0; c < a.channels; ++c, map += a.h * a.w) {
    take_all(map, table, sums.samples.data());
    for (i32 s = 0; s < table.count(); ++s) {
      const T* values = sums.samples.data() + s * bins;
      if constexpr (Op::kMaximum) {
        for (std::int64_t b = 0; b < bins; ++b)
          sums.offer(place(c * bins + b), values[b], table.begin() + s);
      } else {
        T* own = sums.values.data() + c * bins;
        for (std::int64_t b = 0; b < bins; ++b) own[b] += values[b];
      }
    }
  }
}

template <class Op, class Scalar, class T>
void pool_last(const Args& a, const Table<Op, T>& table, Sums<T>& sums) {
  const Scalar* maps = maps_of<Scalar>(a, table.patch(0).image);
  for (std::int64_t b = 0; b < table.bins(); ++b) {
    const std::int64_t border =
        Op::kBordered ? (table.first() + b) % sampled_roi::kBorders * a.channels : 0;
    for (i32 s = 0; s < table.count(); ++s) {
      T* to = sums.values.data() + b * a.channels;
      if constexpr (Op::kMaximum) {
        sums.samples.assign(place(a.channels), T(0));
        to = sums.samples.data();
      }
      table.of_sample(b, s, [&](i32 pixel, T weight) {
        add_scaled(to, maps + pixel * a.c + border, weight, a.channels);
      });
      if constexpr (Op::kMaximum) {
        for (std::int64_t c = 0; c < a.channels; ++c)
          sums.offer(place(b * a.channels + c), to[c], table.begin() + s);
      }
    }
  }
}

// The result of one element out of the sums.
template <class Op, class Scalar, class T>
T finished(const Args& a, const Table<Op, T>& table, const Sums<T>& sums, bool channels_last,
           std::int64_t bin, std::int64_t channel) {
  const auto sum = [&](std::int64_t c) {
    return sums.values[place(channels_last ? bin * a.channels + c : c * table.bins() + bin)];
  };
  T value = sum(channel);
  if constexpr (Op::kOriented) {
    const Patch<T>& p = table.patch(bin);
    const i32 n = static_cast<i32>(a.orientations);
    value = (T(1) - p.blend) * sum(sampled_roi::turned_channel(channel, p.turn, n)) +
            p.blend * sum(sampled_roi::turned_channel(channel, p.turn - 1, n));
  }
  if constexpr (Op::kIdentity) {
    const std::int64_t own = table.first() + bin;
    value += load(maps_of<Scalar>(
        a, table.patch(bin).image)[channels_last ? own * a.c + channel : channel * a.bins + own]);
  }
  return value;
}

template <class Op, class Scalar, class T>
void pool_part(const Args& a, bool channels_last, std::int64_t group, Table<Op, T>& table,
               Sums<T>& sums) {
  const std::int64_t bins = table.bins();
  sums.reset(bins * a.channels, Op::kMaximum);
  for (i32 begin = 0; begin < table.most(); begin += table.chunk()) {
    table.fill(begin);
    channels_last ? pool_last<Op, Scalar>(a, table, sums) : pool_first<Op, Scalar>(a, table, sums);
  }
  const std::int64_t outer = channels_last ? bins : a.channels;
  const std::int64_t inner = channels_last ? a.channels : bins;
  auto* output = static_cast<Scalar*>(a.output);
  for (std::int64_t i = 0; i < outer; ++i) {
    const std::int64_t at = channels_last ? (group * a.bins + table.first() + i) * a.channels
                                          : (group * a.channels + i) * a.bins + table.first();
    for (std::int64_t j = 0; j < inner; ++j) {
      store(output[at + j], finished<Op, Scalar>(a, table, sums, channels_last,
                                                 channels_last ? i : j, channels_last ? j : i));
      if (Op::kMaximum && a.argmax != nullptr) {
        a.argmax[at + j] = sums.winners[place(i * inner + j)];
      }
    }
  }
}

// ---- backward ----

// What one task sums: (h * w, count) of an image, channels [begin, begin + count) of border `border`.
template <class T>
struct Task {
  std::int64_t image, border, begin, count;
  std::vector<T> sums, gradient;
};

// Strides of the gradient of bins.
struct OutputAt {
  std::int64_t group, bin, channel;
};

// The gradients that the channels of a task get from a bin.
template <class Op, class Scalar, class T>
void load_gradients(const Args& a, const Scalar* from, const OutputAt& stride, const Patch<T>& p,
                    Task<T>& task) {
  for (std::int64_t i = 0; i < task.count; ++i) {
    const std::int64_t c = task.begin + i;
    T& gradient = task.gradient[place(i)];
    if constexpr (Op::kOriented) {
      const i32 n = static_cast<i32>(a.orientations);
      const auto at = [&](i32 turn) {
        return load(from[sampled_roi::turned_channel(c, turn, n) * stride.channel]);
      };
      gradient = (T(1) - p.blend) * at(-p.turn) + p.blend * at(1 - p.turn);
    } else {
      gradient = load(from[c * stride.channel]);
    }
  }
}

template <class Op, class Scalar, class T>
void add_part(const Args& a, const OutputAt& stride, std::int64_t group, const Table<Op, T>& table,
              Task<T>& task) {
  for (std::int64_t b = 0; b < table.bins(); ++b) {
    const std::int64_t bin = table.first() + b;
    if (Op::kBordered && bin % sampled_roi::kBorders != task.border) continue;
    const std::int64_t at = group * stride.group + bin * stride.bin;
    load_gradients<Op>(a, static_cast<const Scalar*>(a.output) + at, stride, table.patch(b), task);
    if constexpr (Op::kMaximum) {
      for (std::int64_t i = 0; i < task.count; ++i) {
        const i32 s = a.argmax[at + (task.begin + i) * stride.channel] - table.begin();
        if (s < 0 || s >= table.count()) continue;
        table.of_sample(b, s, [&](i32 pixel, T weight) {
          task.sums[place(pixel * task.count + i)] += weight * task.gradient[place(i)];
        });
      }
    } else {
      for (i32 s = 0; s < table.count(); ++s) {
        table.of_sample(b, s, [&](i32 pixel, T weight) {
          add_scaled(task.sums.data() + pixel * task.count, task.gradient.data(), weight,
                     task.count);
        });
      }
    }
  }
}

template <class Op, class Scalar, class T>
void write_sums(const Args& a, bool channels_last, const OutputAt& stride, const Task<T>& task) {
  const std::int64_t pixels = a.h * a.w, channel = task.border * a.channels + task.begin;
  auto* maps = static_cast<Scalar*>(a.maps) + task.image * a.c * pixels;
  const auto* output = static_cast<const Scalar*>(a.output) + task.image * stride.group;
  for (std::int64_t pixel = 0; pixel < pixels; ++pixel) {
    for (std::int64_t i = 0; i < task.count; ++i) {
      T sum = task.sums[place(pixel * task.count + i)];
      if constexpr (Op::kIdentity) {
        sum += load(output[pixel * stride.bin + (task.begin + i) * stride.channel]);
      }
      store(maps[channels_last ? pixel * a.c + channel + i : (channel + i) * pixels + pixel], sum);
    }
  }
}

template <class Op, class Scalar, class T>
void gradient_of(const Args& a, bool channels_last, Task<T>& task) {
  const OutputAt stride = channels_last ? OutputAt{a.bins * a.channels, a.channels, 1}
                                        : OutputAt{a.bins * a.channels, 1, a.bins};
  task.sums.assign(place(a.h * a.w * task.count), T(0));
  task.gradient.resize(place(task.count));
  // Pixels are numbered without their block of channels.
  Table<Op, T> table(a, true);
  const std::int64_t first_group = Op::kByImage ? task.image : 0;
  const std::int64_t end_group = Op::kByImage ? task.image + 1 : a.groups;
  const std::int64_t at_once = sampled_roi::divided_bins(a.bins, a.hint, kEntries).at_once;
  for (std::int64_t group = first_group; group < end_group; ++group) {
    for (std::int64_t first = 0; first < a.bins; first += at_once) {
      table.lay_out(group, first, std::min<std::int64_t>(at_once, a.bins - first), task.image);
      for (i32 begin = 0; begin < table.most(); begin += table.chunk()) {
        table.fill(begin);
        add_part<Op, Scalar>(a, stride, group, table, task);
      }
    }
  }
  write_sums<Op, Scalar>(a, channels_last, stride, task);
}

// A region without an image is an error here, where nobody waits for it.
template <class T>
void check_images(const SampledPlan& p) {
  if (p.kind == SampledKind::kBorder || p.kind == SampledKind::kFeature) return;
  const std::int64_t columns = p.boxes.size(1);
  for (std::int64_t row = 0; row < p.args.groups; ++row) {
    if (sampled_roi::image_of<T>(p.args, row * columns) >= 0) continue;
    fail(TORCHKILN_ERROR_INDEX, name_of(p.kind),
         p.kind == SampledKind::kBezier ? "beziers" : "boxes",
         "have batch indices from 0 to " + std::to_string(p.args.n - 1),
         std::to_string(sampled_roi::number<double>(p.args, row * columns)) + " in row " +
             std::to_string(row));
  }
}

template <class Op, class Scalar>
void forward(const SampledPlan& p) {
  using T = Acc<Scalar>;
  const Args& a = p.args;
  const std::int64_t at_once = sampled_roi::divided_bins(a.bins, a.hint, kEntries).at_once;
  const std::int64_t parts = (a.bins + at_once - 1) / at_once;
  const std::int64_t cost = at_once * a.hint * (40 + 4 * a.channels);
  parallel_for(a.groups * parts, cost, [&](std::int64_t begin, std::int64_t end) {
    Table<Op, T> table(a, p.channels_last);
    Sums<T> sums;
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t group = item / parts, first = item % parts * at_once;
      table.lay_out(group, first, std::min<std::int64_t>(at_once, a.bins - first), -1);
      pool_part<Op, Scalar>(a, p.channels_last, group, table, sums);
    }
  });
}

template <class Op, class Scalar>
void backward(const SampledPlan& p) {
  using T = Acc<Scalar>;
  const Args& a = p.args;
  const std::int64_t borders = Op::kBordered ? sampled_roi::kBorders : 1;
  const std::int64_t blocks = (a.channels + kChannelBlock - 1) / kChannelBlock;
  const std::int64_t cost = kChannelBlock * a.h * a.w;
  parallel_for(a.n * borders * blocks, cost, [&](std::int64_t begin, std::int64_t end) {
    Task<T> task;
    for (std::int64_t item = begin; item < end; ++item) {
      task.begin = item % blocks * kChannelBlock;
      task.count = std::min<std::int64_t>(kChannelBlock, a.channels - task.begin);
      task.border = item / blocks % borders;
      task.image = item / blocks / borders;
      gradient_of<Op, Scalar>(a, p.channels_last, task);
    }
  });
}

// An empty tensor of its sizes by channel.
Tensor empty_layout_like(const Tensor& tensor) {
  return empty_layout(tensor, tensor.scalar_type(),
                      {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, true);
}

// Lanes on channels take a sample in a sixth of the time; turning the maps round and the output back takes as long as
// about a sample a pixel.
bool is_worth_turning(const SampledPlan& p) {
  const Args& a = p.args;
  if (p.channels_last || p.maps.numel() == 0) return false;
  return a.channels >= 8 && a.groups * a.bins * a.hint >= 2 * a.n * a.h * a.w;
}

}  // namespace

void run_sampled_cpu(const SampledPlan& p) {
  if (is_worth_turning(p)) {
    SampledPlan turned = p;
    turned.channels_last = true;
    turned.maps = as_layout(p.maps, true);
    turned.output = empty_layout_like(p.output);
    turned.args.maps = const_cast<void*>(turned.maps.const_data_ptr());
    turned.args.output = turned.output.mutable_data_ptr();
    if (p.args.argmax != nullptr) {
      turned.argmax = empty_layout_like(p.argmax);
      turned.args.argmax = mutable_data<i32>(turned.argmax);
    }
    run_sampled_cpu(turned);
    Tensor output = p.output, argmax = p.argmax;
    torch::stable::copy_(output, turned.output);
    if (p.args.argmax != nullptr) torch::stable::copy_(argmax, turned.argmax);
    return;
  }
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_images<Acc<Scalar>>(p);
    if (p.maps.numel() == 0 || p.output.numel() == 0) return;
    with_samples(p.kind, [&]<class Op>() { forward<Op, Scalar>(p); });
  });
}

Tensor run_sampled_backward_cpu(SampledPlan p) {
  const Args& a = p.args;
  p.maps = empty_layout(p.output, p.output.scalar_type(), {a.n, a.c, a.h, a.w}, p.channels_last);
  p.args.maps = p.maps.mutable_data_ptr();
  p.output = as_layout(p.output, p.channels_last);
  p.args.output = const_cast<void*>(p.output.const_data_ptr());
  if (p.kind == SampledKind::kBorder) {
    p.argmax = as_layout(p.argmax, p.channels_last);
    p.args.argmax = const_cast<i32*>(data<i32>(p.argmax));
  }
  with_float(p.maps.scalar_type(), [&]<class Scalar>() {
    check_images<Acc<Scalar>>(p);
    if (p.maps.numel() == 0 || p.output.numel() == 0) return;
    with_samples(p.kind, [&]<class Op>() { backward<Op, Scalar>(p); });
  });
  return p.maps;
}

}  // namespace torchkiln::bindings
