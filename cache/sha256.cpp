// SHA-256: padding and pieces, and the portable compression function as FIPS 180-4, 6.2 writes it.
// SPDX-License-Identifier: Apache-2.0
#include "cache/sha256.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "cache/sha256_blocks.h"

namespace torchkiln::cache {
namespace {

std::uint32_t load_big_endian(const char* bytes) {
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word = (word << 8) | static_cast<std::uint8_t>(bytes[i]);
  return word;
}

std::array<std::uint32_t, 64> message_schedule(const char* block) {
  std::array<std::uint32_t, 64> w{};
  for (std::size_t t = 0; t < 16; ++t) w[t] = load_big_endian(block + 4 * t);
  for (std::size_t t = 16; t < 64; ++t) {
    const std::uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
    const std::uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
    w[t] = w[t - 16] + s0 + w[t - 7] + s1;
  }
  return w;
}

void mix_in(Sha256State& state, const char* block) {
  const std::array<std::uint32_t, 64> w = message_schedule(block);
  auto [a, b, c, d, e, f, g, h] = state;
  for (std::size_t t = 0; t < 64; ++t) {
    const std::uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    const std::uint32_t choice = (e & f) ^ (~e & g);
    const std::uint32_t t1 = h + sum1 + choice + kSha256Round[t] + w[t];
    const std::uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    const std::uint32_t majority = (a & b) ^ (a & c) ^ (b & c);
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + sum0 + majority;
  }
  const std::array<std::uint32_t, 8> mixed = {a, b, c, d, e, f, g, h};
  for (std::size_t i = 0; i < mixed.size(); ++i) state[i] += mixed[i];
}

// Lock-free, unlike a local static: a forked child may come here while the parent is in it.
Sha256Blocks fastest_blocks() {
  static std::atomic<Sha256Blocks> known = nullptr;
  Sha256Blocks fastest = known.load(std::memory_order_relaxed);
  if (fastest == nullptr) {
    const Sha256Blocks x86 = sha256_blocks_x86();
    fastest = x86 != nullptr ? x86 : &sha256_blocks_portable;
    known.store(fastest, std::memory_order_relaxed);
  }
  return fastest;
}

}  // namespace

void sha256_blocks_portable(Sha256State& state, const char* bytes, std::size_t blocks) {
  for (; blocks > 0; --blocks, bytes += kSha256BlockBytes) mix_in(state, bytes);
}

Sha256& Sha256::update(std::string_view bytes) {
  while (!bytes.empty()) {
    const std::size_t filled = total_bytes_ % kSha256BlockBytes;
    const std::size_t whole = bytes.size() / kSha256BlockBytes;
    std::size_t taken = std::min(bytes.size(), kSha256BlockBytes - filled);
    if (filled == 0 && whole > 0) {
      taken = whole * kSha256BlockBytes;
      fastest_blocks()(state_, bytes.data(), whole);
    } else {
      std::memcpy(pending_.data() + filled, bytes.data(), taken);
      if (filled + taken == kSha256BlockBytes) fastest_blocks()(state_, pending_.data(), 1);
    }
    total_bytes_ += taken;
    bytes.remove_prefix(taken);
  }
  return *this;
}

std::array<std::uint8_t, 32> Sha256::digest() {
  const std::uint64_t total_bits = total_bytes_ * 8;
  update(std::string_view("\x80", 1));
  static constexpr std::array<char, kSha256BlockBytes> kZeros{};
  const std::size_t filled = total_bytes_ % kSha256BlockBytes;
  const std::size_t padding = (filled <= 56 ? 56 : 56 + kSha256BlockBytes) - filled;
  update({kZeros.data(), padding});
  std::array<char, 8> length{};
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(total_bits >> (56 - 8 * i));
  update({length.data(), length.size()});

  std::array<std::uint8_t, 32> result{};
  for (std::size_t i = 0; i < result.size(); ++i) {
    result[i] = static_cast<std::uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
  }
  *this = Sha256();
  return result;
}

std::string sha256_hex(std::string_view bytes) {
  static constexpr std::string_view kDigits = "0123456789abcdef";
  std::string hex;
  hex.reserve(64);
  for (const std::uint8_t byte : Sha256().update(bytes).digest()) {
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

}  // namespace torchkiln::cache
