// Element by element on the host: this runs for a few finalists, never in a loop.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/compare.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {
namespace {

template <class T>
T load(std::span<const std::byte> bytes, std::size_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

double from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

double from_half(std::uint16_t bits) {
  constexpr int kBias = 15, kFraction = 10, kInfinite = 31;
  const int exponent = (bits >> kFraction) & kInfinite, fraction = bits & 0x3ff;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == kInfinite)
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  // The leading one is there except below the smallest normal number.
  const int whole = exponent == 0 ? fraction : fraction | 0x400;
  return sign * std::ldexp(whole, (exponent == 0 ? 1 : exponent) - kBias - kFraction);
}

template <class Load>
Distance compare_floats(std::size_t count, const Load& value) {
  Distance result;
  for (std::size_t i = 0; i < count; ++i) {
    const auto [a, b] = value(i);
    if (std::isfinite(a) && std::isfinite(b)) {
      result.scale = std::max(result.scale, std::abs(a));
      result.apart = std::max(result.apart, std::abs(a - b));
    } else if (!(a == b || (std::isnan(a) && std::isnan(b)))) {
      ++result.different;
    }
  }
  return result;
}

}  // namespace

Distance compare(std::span<const std::byte> a, std::span<const std::byte> b, int type) {
  const auto floats = [&]<class T>(T, auto convert) {
    return compare_floats(a.size() / sizeof(T), [&](std::size_t i) {
      return std::pair<double, double>(convert(load<T>(a, i)), convert(load<T>(b, i)));
    });
  };
  const auto same = [](auto x) { return static_cast<double>(x); };
  switch (type) {
    case TORCHKILN_FLOAT:
      return floats(float{}, same);
    case TORCHKILN_DOUBLE:
      return floats(double{}, same);
    case TORCHKILN_HALF:
      return floats(std::uint16_t{}, from_half);
    case TORCHKILN_BFLOAT16:
      return floats(std::uint16_t{}, from_bfloat16);
    default:
      Distance result;
      for (std::size_t i = 0; i < a.size(); ++i) result.different += a[i] != b[i];
      return result;
  }
}

double relative_tolerance(int type, double declared) {
  if (declared > 0) return declared;
  switch (type) {
    case TORCHKILN_DOUBLE:
      return 1e-10;
    case TORCHKILN_HALF:
      return 4e-3;
    case TORCHKILN_BFLOAT16:
      return 3e-2;
    default:
      return 3e-5;
  }
}

}  // namespace torchkiln::jit
