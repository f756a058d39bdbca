// CUDA as kernels see it, for the host's C++ compiler. The emulated NVRTC includes it before a kernel; it stands for what
// NVRTC knows by itself and needs no other header. Functions that wait also say where they are called.
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Code that is shared with the CPU takes the intrinsics that forbid the compiler to fuse.
#define TORCHKILN_EMULATED_GPU 1

#include "abi.h"

extern "C" torchkiln_emulator::Kernel torchkiln_emulated;

// ---- words -----------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ const static
#define __grid_constant__
// Whatever is static and zero at first belongs to the block that runs: the grid exchanges it.
#define __shared__ static
#define threadIdx (torchkiln_emulated.thread->thread)
#define blockIdx (torchkiln_emulated.thread->block)
#define blockDim (torchkiln_emulated.thread->block_size)
#define gridDim (torchkiln_emulated.thread->grid_size)
#define warpSize 32

using size_t = decltype(sizeof(0));
using uint3 = torchkiln_emulator::Position;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// ---- vector types ----------------------------------------------------------------------------------------------------

#define TORCHKILN_VECTORS(Type, Name, align2, align4)              \
  struct Name##1 { Type x; };                                      \
  struct alignas(align2) Name##2 { Type x, y; };                   \
  struct alignas(align4) Name##4 { Type x, y, z, w; };             \
  inline Name##1 make_##Name##1(Type x) { return {x}; }            \
  inline Name##2 make_##Name##2(Type x, Type y) { return {x, y}; } \
  inline Name##4 make_##Name##4(Type x, Type y, Type z, Type w) { return {x, y, z, w}; }
TORCHKILN_VECTORS(signed char, char, 2, 4)
TORCHKILN_VECTORS(unsigned char, uchar, 2, 4)
TORCHKILN_VECTORS(short, short, 4, 8)
TORCHKILN_VECTORS(unsigned short, ushort, 4, 8)
TORCHKILN_VECTORS(int, int, 8, 16)
TORCHKILN_VECTORS(unsigned, uint, 8, 16)
TORCHKILN_VECTORS(float, float, 8, 16)
TORCHKILN_VECTORS(long long, longlong, 16, 16)
TORCHKILN_VECTORS(unsigned long long, ulonglong, 16, 16)
TORCHKILN_VECTORS(double, double, 16, 16)
#undef TORCHKILN_VECTORS
struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

// ---- waiting ---------------------------------------------------------------------------------------------------------

#define TORCHKILN_HERE torchkiln_emulator::Place place = {__builtin_FILE(), __builtin_LINE()}
namespace torchkiln_emulator {

inline unsigned long long warp(WarpCall call, unsigned mask, unsigned long long value, int operand,
                               int width, Place place) {
  return torchkiln_emulated.grid->warp(call, mask, value, operand, width, place);
}
template <class T>
T shuffle(WarpCall call, unsigned mask, T value, int operand, int width, Place place) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = warp(call, mask, bits, operand, width, place);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
unsigned long long bits_of(T value) {
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

}  // namespace torchkiln_emulator

inline void __syncthreads(TORCHKILN_HERE) {
  torchkiln_emulated.grid->block(torchkiln_emulator::kSyncThreads, 0, place);
}
inline int __syncthreads_count(int predicate, TORCHKILN_HERE) {
  return torchkiln_emulated.grid->block(torchkiln_emulator::kSyncThreadsCount, predicate, place);
}
inline int __syncthreads_and(int predicate, TORCHKILN_HERE) {
  return torchkiln_emulated.grid->block(torchkiln_emulator::kSyncThreadsAnd, predicate, place);
}
inline int __syncthreads_or(int predicate, TORCHKILN_HERE) {
  return torchkiln_emulated.grid->block(torchkiln_emulator::kSyncThreadsOr, predicate, place);
}
inline void __syncwarp(unsigned mask = ~0u, TORCHKILN_HERE) {
  torchkiln_emulator::warp(torchkiln_emulator::kSyncWarp, mask, 0, 0, 32, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, TORCHKILN_HERE) {
  return unsigned(
      torchkiln_emulator::warp(torchkiln_emulator::kBallot, mask, predicate != 0, 0, 32, place));
}
inline int __all_sync(unsigned mask, int predicate, TORCHKILN_HERE) {
  return int(
      torchkiln_emulator::warp(torchkiln_emulator::kAll, mask, predicate != 0, 0, 32, place));
}
inline int __any_sync(unsigned mask, int predicate, TORCHKILN_HERE) {
  return int(
      torchkiln_emulator::warp(torchkiln_emulator::kAny, mask, predicate != 0, 0, 32, place));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, TORCHKILN_HERE) {
  return torchkiln_emulator::shuffle(torchkiln_emulator::kShuffle, mask, value, lane, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, TORCHKILN_HERE) {
  return torchkiln_emulator::shuffle(torchkiln_emulator::kShuffleUp, mask, value, int(distance),
                                     width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, TORCHKILN_HERE) {
  return torchkiln_emulator::shuffle(torchkiln_emulator::kShuffleDown, mask, value, int(distance),
                                     width, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, TORCHKILN_HERE) {
  return torchkiln_emulator::shuffle(torchkiln_emulator::kShuffleXor, mask, value, lanes, width,
                                     place);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, TORCHKILN_HERE) {
  return unsigned(torchkiln_emulator::warp(torchkiln_emulator::kMatchAny, mask,
                                           torchkiln_emulator::bits_of(value), 0, 32, place));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, TORCHKILN_HERE) {
  const auto found = unsigned(torchkiln_emulator::warp(
      torchkiln_emulator::kMatchAll, mask, torchkiln_emulator::bits_of(value), 0, 32, place));
  *all = found != 0;
  return found;
}
#define TORCHKILN_REDUCE(name, Type, call)                                                        \
  inline Type __reduce_##name##_sync(unsigned mask, Type value, TORCHKILN_HERE) {                 \
    return Type(                                                                                  \
        torchkiln_emulator::warp(torchkiln_emulator::call, mask, unsigned(value), 0, 32, place)); \
  }
TORCHKILN_REDUCE(add, unsigned, kReduceAdd)
TORCHKILN_REDUCE(add, int, kReduceAdd)
TORCHKILN_REDUCE(min, unsigned, kReduceMin)
TORCHKILN_REDUCE(min, int, kReduceMinSigned)
TORCHKILN_REDUCE(max, unsigned, kReduceMax)
TORCHKILN_REDUCE(max, int, kReduceMaxSigned)
TORCHKILN_REDUCE(and, unsigned, kReduceAnd)
TORCHKILN_REDUCE(or, unsigned, kReduceOr)
TORCHKILN_REDUCE(xor, unsigned, kReduceXor)
#undef TORCHKILN_REDUCE

inline void __nanosleep(unsigned) { torchkiln_emulated.grid->yield(); }
inline void __threadfence() { torchkiln_emulated.grid->yield(); }
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap(TORCHKILN_HERE) {
  torchkiln_emulated.grid->fail("calls __trap()", place);
  __builtin_unreachable();
}

// ---- memory ----------------------------------------------------------------------------------------------------------

// A load of the read-only cache: the pointer must be aligned to its type, or the GPU faults.
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

// Threads change where they wait, and anywhere after a tick: what is exchanged must be what was read.
namespace torchkiln_emulator {
template <class T, class F>
T exchange(T* at, const F& next) {
  T old = *static_cast<volatile T*>(at);
  for (;;) {
    T value = T(next(old));
    if (__atomic_compare_exchange(at, &old, &value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
      return old;
    }
  }
}
}  // namespace torchkiln_emulator
#define TORCHKILN_ATOMIC(name, Type, expression)                                   \
  inline Type name(Type* at, Type value) {                                         \
    return torchkiln_emulator::exchange(at, [&](Type old) { return expression; }); \
  }
#define TORCHKILN_ATOMIC_INTEGER(Type)                                                           \
  TORCHKILN_ATOMIC(atomicAdd, Type, old + value)                                                 \
  TORCHKILN_ATOMIC(atomicExch, Type, value)                                                      \
  TORCHKILN_ATOMIC(atomicMin, Type, value < old ? value : old)                                   \
  TORCHKILN_ATOMIC(atomicMax, Type, value > old ? value : old)                                   \
  TORCHKILN_ATOMIC(atomicAnd, Type, old& value)                                                  \
  TORCHKILN_ATOMIC(atomicOr, Type, old | value)                                                  \
  TORCHKILN_ATOMIC(atomicXor, Type, old ^ value)                                                 \
  inline Type atomicCAS(Type* at, Type compare, Type value) {                                    \
    return torchkiln_emulator::exchange(at,                                                      \
                                        [&](Type old) { return old == compare ? value : old; }); \
  }
TORCHKILN_ATOMIC_INTEGER(int)
TORCHKILN_ATOMIC_INTEGER(unsigned)
TORCHKILN_ATOMIC_INTEGER(unsigned long long)
TORCHKILN_ATOMIC(atomicMin, long long, value < old ? value : old)
TORCHKILN_ATOMIC(atomicMax, long long, value > old ? value : old)
TORCHKILN_ATOMIC(atomicSub, int, old - value)
TORCHKILN_ATOMIC(atomicSub, unsigned, old - value)
TORCHKILN_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
TORCHKILN_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
TORCHKILN_ATOMIC(atomicAdd, float, old + value)
TORCHKILN_ATOMIC(atomicAdd, double, old + value)
TORCHKILN_ATOMIC(atomicExch, float, value)
inline unsigned short atomicCAS(unsigned short* at, unsigned short compare, unsigned short value) {
  return torchkiln_emulator::exchange(
      at, [&](unsigned short old) { return old == compare ? value : old; });
}
#undef TORCHKILN_ATOMIC_INTEGER
#undef TORCHKILN_ATOMIC

// ---- integers and bits -----------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned(static_cast<unsigned long long>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return int(static_cast<long long>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  shift &= 31;
  return shift == 0 ? high : high << shift | low >> (32 - shift);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  shift &= 31;
  return shift == 0 ? low : high << (32 - shift) | low >> shift;
}
template <class To, class From>
To torchkiln_bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}
inline unsigned __float_as_uint(float x) { return torchkiln_bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return torchkiln_bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return torchkiln_bit_cast<float>(x); }
inline float __int_as_float(int x) { return torchkiln_bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return torchkiln_bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return torchkiln_bit_cast<double>(x); }

#define TORCHKILN_MIN_MAX(Type)                             \
  inline Type min(Type a, Type b) { return b < a ? b : a; } \
  inline Type max(Type a, Type b) { return a < b ? b : a; }
TORCHKILN_MIN_MAX(int)
TORCHKILN_MIN_MAX(unsigned)
TORCHKILN_MIN_MAX(long)
TORCHKILN_MIN_MAX(unsigned long)
TORCHKILN_MIN_MAX(long long)
TORCHKILN_MIN_MAX(unsigned long long)
#undef TORCHKILN_MIN_MAX
extern "C" int abs(int) noexcept;
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }

// ---- floating point --------------------------------------------------------------------------------------------------

// The C function of a double, that of a float, and the overload for float.
#define TORCHKILN_MATH_1(name)              \
  extern "C" double name(double) noexcept;  \
  extern "C" float name##f(float) noexcept; \
  inline float name(float x) { return name##f(x); }
#define TORCHKILN_MATH_2(name)                     \
  extern "C" double name(double, double) noexcept; \
  extern "C" float name##f(float, float) noexcept; \
  inline float name(float x, float y) { return name##f(x, y); }
TORCHKILN_MATH_1(fabs)
TORCHKILN_MATH_1(floor)
TORCHKILN_MATH_1(ceil)
TORCHKILN_MATH_1(trunc)
TORCHKILN_MATH_1(round)
TORCHKILN_MATH_1(rint)
TORCHKILN_MATH_1(nearbyint)
TORCHKILN_MATH_1(sqrt)
TORCHKILN_MATH_1(cbrt)
TORCHKILN_MATH_1(exp)
TORCHKILN_MATH_1(exp2)
TORCHKILN_MATH_1(expm1)
TORCHKILN_MATH_1(log)
TORCHKILN_MATH_1(log2)
TORCHKILN_MATH_1(log10)
TORCHKILN_MATH_1(log1p)
TORCHKILN_MATH_1(sin)
TORCHKILN_MATH_1(cos)
TORCHKILN_MATH_1(tan)
TORCHKILN_MATH_1(asin)
TORCHKILN_MATH_1(acos)
TORCHKILN_MATH_1(atan)
TORCHKILN_MATH_1(sinh)
TORCHKILN_MATH_1(cosh)
TORCHKILN_MATH_1(tanh)
TORCHKILN_MATH_1(erf)
TORCHKILN_MATH_1(erfc)
TORCHKILN_MATH_1(lgamma)
TORCHKILN_MATH_1(tgamma)
TORCHKILN_MATH_2(pow)
TORCHKILN_MATH_2(fmod)
TORCHKILN_MATH_2(fmin)
TORCHKILN_MATH_2(fmax)
TORCHKILN_MATH_2(atan2)
TORCHKILN_MATH_2(hypot)
TORCHKILN_MATH_2(copysign)
#undef TORCHKILN_MATH_1
#undef TORCHKILN_MATH_2
extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" double remainder(double, double) noexcept;
extern "C" double ldexp(double, int) noexcept;
extern "C" float ldexpf(float, int) noexcept;
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
// Of pi * x: exact where the GPU's are, at multiples of a half.
inline void sincospif(float x, float* s, float* c) {
  const double angle = 3.141592653589793 * remainder(double(x), 2.0);
  *s = float(sin(angle));
  *c = float(cos(angle));
}
inline void sincosf(float x, float* s, float* c) {
  *s = sinf(x);
  *c = cosf(x);
}
inline void sincos(double x, double* s, double* c) {
  *s = sin(x);
  *c = cos(x);
}
inline bool isnan(float x) { return x != x; }
inline bool isnan(double x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }

namespace torchkiln_emulator {

// The compiler sees through nothing of it, so a product stays one.
template <class T>
T alone(T x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

}  // namespace torchkiln_emulator

inline float __fadd_rn(float x, float y) {
  return torchkiln_emulator::alone(torchkiln_emulator::alone(x) + torchkiln_emulator::alone(y));
}
inline float __fsub_rn(float x, float y) { return __fadd_rn(x, -y); }
inline float __fmul_rn(float x, float y) { return torchkiln_emulator::alone(x * y); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) {
  return torchkiln_emulator::alone(torchkiln_emulator::alone(x) + torchkiln_emulator::alone(y));
}
inline double __dsub_rn(double x, double y) { return __dadd_rn(x, -y); }
inline double __dmul_rn(double x, double y) { return torchkiln_emulator::alone(x * y); }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }

namespace torchkiln_emulator {

template <class T>
int to_int(T x, T rounded) {  // as cvt does: out of range to the nearest, NaN to 0
  if (x != x) return 0;
  if (rounded >= T(2147483648.0)) return 2147483647;
  return rounded < T(-2147483648.0) ? -2147483647 - 1 : int(rounded);
}

}  // namespace torchkiln_emulator
inline int __float2int_rn(float x) { return torchkiln_emulator::to_int(x, rintf(x)); }
inline int __float2int_rz(float x) { return torchkiln_emulator::to_int(x, truncf(x)); }
inline int __float2int_rd(float x) { return torchkiln_emulator::to_int(x, floorf(x)); }
inline int __float2int_ru(float x) { return torchkiln_emulator::to_int(x, ceilf(x)); }
inline float __int2float_rn(int x) { return float(x); }

// ---- the kernel's entry ----------------------------------------------------------------------------------------------

namespace torchkiln_emulator {

template <class T>
const T& next_argument(const char* arguments, size_t& at) {
  at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
  const T& value = *reinterpret_cast<const T*>(arguments + at);
  at += sizeof(T);
  return value;
}
// Braces fix the order in which arguments are read.
template <class... P>
struct Call {
  template <class F>
  Call(F* kernel, const P&... values) {
    kernel(values...);
  }
};
template <class... P>
void call(void (*kernel)(P...), const char* arguments) {
  size_t at = 0;
  Call<P...>{kernel, next_argument<P>(arguments, at)...};
}

}  // namespace torchkiln_emulator
