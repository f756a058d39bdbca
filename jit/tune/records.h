// The tuning records that this process uses: files of the cache's directory, records in bundles, or exactly those that
// were imported.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cache/object.h"
#include "cache/record_files.h"
#include "jit/deploy/bundles.h"
#include "jit/driver/device.h"
#include "jit/tune/record.h"

namespace torchkiln::jit {

struct Match {
  TuningRecord record;
  std::vector<std::int64_t> tunables;  // legal for the problem
  int distance = 0;                    // 0: the same buckets
};

using RecordsByKey = std::map<TuningKey, TuningRecord>;
// Merged with what is there.
void add(RecordsByKey& to, const TuningRecord& record);

// A record with the device that it was measured on.
struct Placed {
  DeviceIdentity device;
  TuningRecord record;
};

// Thread-safe.
class Records {
 public:
  // Both must outlive it.
  Records(const cache::Store& store, Bundles& bundles) : files_(store), bundles_(bundles) {}

  // The nearest usable record for a problem on this device.
  std::optional<Match> find(const DeviceIdentity& device, const Kernel& kernel,
                            const TuningKey& key, const torchkiln_problem& problem);
  // What is stored under exactly this key, complete or not.
  std::optional<TuningRecord> exact(const DeviceIdentity& device, const TuningKey& key);
  // Merged into what is known and into the file; 0 or the errno of writing it.
  int save(const DeviceIdentity& device, const TuningRecord& record);

  std::vector<Placed> all();  // reads every file and bundle
  // From now on exactly these are used; they are merged into the files too.
  void replace(std::vector<Placed> records);

  struct Health {
    DeviceIdentity device;
    std::string file;
    std::size_t records = 0, unreadable = 0;
    std::map<TuningEnvironment, std::size_t> environments;  // records measured in each
  };
  std::vector<Health> examine() const;  // the files as they are now

  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  // By device and template.
  using Place = std::pair<std::string, std::string>;
  struct Known {
    DeviceIdentity device;
    RecordsByKey records;
  };
  Known& known(const DeviceIdentity& device, const std::string& kernel);
  void load_from_bundles(Known& to, const Place& place);
  void load_everything();

  cache::RecordFiles files_;
  Bundles& bundles_;
  std::mutex mutex_;  // guards what follows
  std::map<Place, Known> known_;
  bool imported_ = false;
};

// A file of records: a line about the device, then one a record.
struct RecordText {
  std::optional<DeviceIdentity> device;
  std::vector<TuningRecord> records;
  std::size_t unreadable = 0;  // lines
};
RecordText parse_records(const std::string& text);
std::string print_records(const DeviceIdentity& device, const RecordsByKey& records);

// detection.roi_align for detection/roi_align.cuh:direct: the file of a kernel's records.
std::string record_name(const std::string& kernel);
// Where a bundle keeps such a file.
std::string record_key(const std::string& device, const std::string& name);
inline constexpr const char* kRecordCompiler =
    "tuning-records";  // in place of a compiler's identity
// Of a header that anybody may have written.
inline bool is_record(const cache::ObjectView& object) {
  const auto compiler = object.header.find("compiler");
  return compiler != object.header.end() && *compiler == kRecordCompiler;
}

}  // namespace torchkiln::jit
