// The lock-free table of launch records.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/launch/record.h"

#include <algorithm>

namespace torchkiln::jit {

bool LaunchKey::operator==(const LaunchKey& other) const {
  return device == other.device && epoch == other.epoch && default_row == other.default_row &&
         untuned == other.untuned && n_statics == other.n_statics && buckets == other.buckets &&
         std::equal(statics.begin(), statics.begin() + n_statics, other.statics.begin());
}

std::uint64_t LaunchKey::hash() const {
  constexpr std::uint64_t kMultiplier = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
  std::uint64_t h = (static_cast<std::uint64_t>(device) ^ default_row) * kMultiplier;
  for (std::uint32_t i = 0; i < n_statics; ++i) {
    h = (h ^ static_cast<std::uint64_t>(statics[i])) * kMultiplier;
  }
  for (const std::uint8_t bucket : buckets) h = (h ^ bucket) * kMultiplier;
  return h ^ (h >> 32);
}

const LaunchRecord* RecordTable::find(const LaunchKey& key) const {
  const LaunchRecord* record = slots_[key.hash() % kSlots].load(std::memory_order_acquire);
  while (record != nullptr && !(record->key == key)) record = record->next;
  return record;
}

const LaunchRecord* RecordTable::add(std::unique_ptr<LaunchRecord> record) {
  auto& slot = slots_[record->key.hash() % kSlots];
  LaunchRecord* added = record.release();
  added->next = slot.load(std::memory_order_relaxed);
  while (!slot.compare_exchange_weak(added->next, added, std::memory_order_release,
                                     std::memory_order_relaxed)) {
  }
  return added;
}

}  // namespace torchkiln::jit
