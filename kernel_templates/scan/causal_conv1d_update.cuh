// causal_conv1d_update on the GPU: a thread for each channel of each sequence, or for as many as 16 bytes of state hold.
// spills: up to 8 bytes in float64, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "scan/causal_conv1d_update.h"

namespace torchkiln::causal_conv1d_update {

// Grid of both kernels: blocks of a sequence's channels, and sequences in two dimensions.
__device__ __forceinline__ u32 sequence_of_block() { return blockIdx.z * gridDim.y + blockIdx.y; }

// Any strides, any number of inputs, rings.
template <class Scalar, int kWidth, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) update(const Args args) {
  const u32 sequence = sequence_of_block(), channel = blockIdx.x * kBlockSize + threadIdx.x;
  if (sequence >= args.batch || channel >= args.channels) return;
  Step<Scalar, kWidth>(args, sequence, channel).run();
}

// The weights of neighbouring channels, as they lie in memory.
template <class Scalar, int kWidth, int kChannels>
struct Weights {
  static constexpr bool kIsHalf = sizeof(Scalar) == 2;
  Pack<Scalar, kWidth * kChannels> own;
  Pack<float, kIsHalf ? kWidth : 1> wide[kIsHalf ? kChannels : 1];

  __device__ __forceinline__ Weights(const Args& args, u32 channel) {
    if (!kIsHalf || args.weight_is_float == 0) {
      own =
          load_pack<kWidth * kChannels>(static_cast<const Scalar*>(args.weight) + channel * kWidth);
    } else if constexpr (kIsHalf) {
      const float* from = static_cast<const float*>(args.weight) + channel * kWidth;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) wide[c] = load_pack<kWidth>(from + c * kWidth);
    }
  }
  __device__ __forceinline__ Acc<Scalar> of(const Args& args, int c, int j) const {
    if constexpr (kIsHalf) {
      if (args.weight_is_float != 0) return wide[c].at[j];
    }
    return load(own.at[c * kWidth + j]);
  }
};

// One new input, and a state of rows of kWidth inputs: no ring, x and state contiguous but for the first dimension, state,
// weight and x aligned to kChannels channels, which divide their number. Everything is read at once.
template <class Scalar, int kWidth, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) update_rows(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kChannels = channels_at_once(kWidth, sizeof(Scalar));
  const u32 sequence = sequence_of_block();
  const u32 channel = (blockIdx.x * kBlockSize + threadIdx.x) * kChannels;
  if (sequence >= args.batch || channel >= args.channels) return;
  Scalar* out = static_cast<Scalar*>(args.out) + (i64(sequence) * args.channels + channel);
  const i64 row = row_of(args, sequence);
  if (row < 0) {
    store_pack<kChannels>(out, zero_pack<kChannels, Scalar>());
    return;
  }
  Scalar* state =
      static_cast<Scalar*>(args.state) + (row * args.state_strides.batch + i64(channel) * kWidth);
  auto inputs = read_pack<kWidth * kChannels>(state);
  const auto x = load_pack<kChannels>(static_cast<const Scalar*>(args.x) +
                                      (i64(sequence) * args.x_strides.batch + channel));
  const Weights<Scalar, kWidth, kChannels> weights(args, channel);
  Either<Scalar> bias[kChannels];
  if (args.bias != nullptr) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      bias[c].read(args.bias, args.bias_is_float != 0, channel + c);
  }
  Pack<Scalar, kChannels> result;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    T sum = args.bias != nullptr ? bias[c].value(args.bias_is_float != 0) : T(0);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      Scalar& cell = inputs.at[c * kWidth + j];
      cell = j + 1 < kWidth ? inputs.at[c * kWidth + j + 1] : x.at[c];
      sum += weights.of(args, c, j) * load(cell);
    }
    store(result.at[c], args.silu != 0 ? silu_of(sum) : sum);
  }
  store_pack<kWidth * kChannels>(state, inputs);
  store_pack<kChannels>(out, result);
}

}  // namespace torchkiln::causal_conv1d_update
