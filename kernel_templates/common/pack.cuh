// Loads and stores of up to 16 bytes at once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

// kCount neighbouring elements; a pointer to them must be aligned to their size together.
template <class Scalar, int kCount>
union Pack {
  static constexpr int kBytes = kCount * int(sizeof(Scalar));
  static_assert(kBytes <= 16);
  Scalar at[kCount];
  u32 words[kBytes >= 4 ? kBytes / 4 : 1];
};

// Keep the compiler from reading a number or working a pointer out again wherever it is used, which takes longer than what is
// done with it.
__device__ __forceinline__ u32 worked_out(u32 value) {
#if defined(__CUDACC_RTC__)
  asm("" : "+r"(value));
#endif
  return value;
}
template <class T>
__device__ __forceinline__ T* worked_out(T* pointer) {
#if defined(__CUDACC_RTC__)
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// A row of many, of `bytes` bytes each.
template <class Value>
__device__ __forceinline__ Value* row_at(Value* rows, i32 row, u32 bytes) {
  u64 offset = u64(u32(row)) * bytes;
#if defined(__CUDACC_RTC__)
  // One instruction with the addition; the compiler loses that the factors have 32 bits.
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(offset) : "r"(row), "r"(bytes));
#endif
  const char* at = reinterpret_cast<const char*>(rows) + offset;
  return const_cast<Value*>(reinterpret_cast<const Value*>(at));
}

// By words: an initialiser in braces may become a constant in memory, which every use then waits for.
template <int kCount, class Scalar>
__device__ __forceinline__ Pack<Scalar, kCount> zero_pack() {
  Pack<Scalar, kCount> result;
#pragma unroll
  for (u32& word : result.words) word = 0;
  return result;
}

// Of memory that no thread of the launch writes.
template <int kCount, class Scalar>
__device__ __forceinline__ Pack<Scalar, kCount> load_pack(const Scalar* from) {
  using Result = Pack<Scalar, kCount>;
  Result result;
  if constexpr (Result::kBytes == 16) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    result.words[0] = words.x;
    result.words[1] = words.y;
    result.words[2] = words.z;
    result.words[3] = words.w;
  } else if constexpr (Result::kBytes == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
    result.words[0] = words.x;
    result.words[1] = words.y;
  } else if constexpr (Result::kBytes == 4) {
    result.words[0] = __ldg(reinterpret_cast<const u32*>(from));
  } else {
    for (int i = 0; i < kCount; ++i) result.at[i] = from[i];
  }
  return result;
}

// Of shared memory, or of what this thread writes afterwards: not through the cache for what is only read.
template <int kCount, class Scalar>
__device__ __forceinline__ Pack<Scalar, kCount> read_pack(const Scalar* from) {
  using Result = Pack<Scalar, kCount>;
  Result result;
  if constexpr (Result::kBytes == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    result.words[0] = words.x;
    result.words[1] = words.y;
    result.words[2] = words.z;
    result.words[3] = words.w;
  } else if constexpr (Result::kBytes == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    result.words[0] = words.x;
    result.words[1] = words.y;
  } else {
    for (int i = 0; i < kCount; ++i) result.at[i] = from[i];
  }
  return result;
}

// For i from the thread's number on, in steps of a block, up to `count`: use(i, load(i)), kTurns loads in flight. The last
// of them may load again what another one has; a loop for the rest would be as much code once more, and nothing in flight.
template <int kTurns, int kBlockSize, class Load, class Use>
__device__ __forceinline__ void at_once(i32 count, const Load& load, const Use& use) {
#pragma unroll 1
  for (i32 first = threadIdx.x; first < count; first += kTurns * kBlockSize) {
    decltype(load(first)) values[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      values[turn] = load(min_of(first + turn * kBlockSize, count - 1));
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const i32 i = first + turn * kBlockSize;
      if (i < count) use(i, values[turn]);
    }
  }
}

// Has memory brought into the second cache, where a later load finds it.
__device__ __forceinline__ void prefetch(const void* from) {
#if defined(__CUDACC_RTC__)
  asm volatile("prefetch.global.L2 [%0];" : : "l"(from));
#endif
}

template <int kCount, class Scalar>
__device__ __forceinline__ void store_pack(Scalar* to, const Pack<Scalar, kCount>& value) {
  using Value = Pack<Scalar, kCount>;
  if constexpr (Value::kBytes == 16) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
  } else if constexpr (Value::kBytes == 8) {
    *reinterpret_cast<uint2*>(to) = make_uint2(value.words[0], value.words[1]);
  } else if constexpr (Value::kBytes == 4) {
    *reinterpret_cast<u32*>(to) = value.words[0];
  } else {
    for (int i = 0; i < kCount; ++i) to[i] = value.at[i];
  }
}

// The same, of global memory, and surely at once: the compiler takes a store of several words apart and, in some kernels,
// does not put it together again.
template <int kCount, class Scalar>
__device__ __forceinline__ void store_whole(Scalar* to, const Pack<Scalar, kCount>& value) {
#if defined(__CUDACC_RTC__)
  const u32* words = value.words;
  if constexpr (Pack<Scalar, kCount>::kBytes == 16) {
    asm volatile(
        "{.reg .u64 to; cvta.to.global.u64 to, %0; st.global.v4.u32 [to], {%1, %2, %3, %4};}"
        :
        : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
    return;
  } else if constexpr (Pack<Scalar, kCount>::kBytes == 8) {
    asm volatile("{.reg .u64 to; cvta.to.global.u64 to, %0; st.global.v2.u32 [to], {%1, %2};}"
                 :
                 : "l"(to), "r"(words[0]), "r"(words[1])
                 : "memory");
    return;
  }
#endif
  store_pack<kCount>(to, value);
}

}  // namespace torchkiln
