// Records: their text, matching, merging by many processes, damage.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "jit/deploy/bundles.h"
#include "jit/tune/records.h"
#include "tests/jit/support/declared.h"
#include "tests/jit/support/files.h"

namespace torchkiln::jit {
namespace {

const DeviceIdentity kDevice = {"NVIDIA H200", 90, 132, 62914560, 6144, 3201000, true};

TuningRecord record_for(int bucket, std::int64_t best = 256, int samples = 20) {
  TuningRecord r;
  r.key = {"demo/scale.cuh:forward", "digest", {{"scalar", "float"}}, {{"n", bucket}}};
  r.environment = {"13.0", 13000, "0.1.0"};
  r.sizes = {{"n", 1 << bucket}};
  r.best = {{"block_size", best}};
  r.standard = {{"block_size", 128}};
  r.program = "demo/scale.forward<float, block_size=" + std::to_string(best) + ">";
  r.default_us = 12.5;
  r.verified = r.complete = true;
  r.trials = {{{{"block_size", 128}}, 1, 0, 1, "", 0},
              {{{"block_size", best}}, 0.8, 0.01, samples, "", 0},
              {{{"block_size", 1024}}, 0, 0, 0, "too many registers", 0}};
  return r;
}

// A kernel with one tunable that is illegal at 256 on sizes above 2^20.
struct Declared {
  const char* operators[1] = {"scale"};
  std::int64_t types[1] = {TORCHKILN_FLOAT};
  std::int64_t blocks[3] = {64, 128, 256};
  std::int64_t defaults[1] = {128};
  torchkiln_param params[2] = {{"scalar", TORCHKILN_PARAM_TYPE, 0, types, 1, 0},
                               {"block_size", TORCHKILN_PARAM_INT, 1, blocks, 3, 0}};
  torchkiln_size sizes[1] = {{"n", TORCHKILN_BUCKET_POW2}};
  torchkiln_declaration declaration{};

  Declared() {
    declaration = testing::declare("demo/scale.cuh", "forward", operators, params, sizes, defaults);
    declaration.legal = [](const torchkiln_problem* p, const std::int64_t* t) {
      return std::int32_t{t[0] != 256 || p->sizes[0] <= (1 << 20)};
    };
  }
};

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

class RecordsTest : public ::testing::Test {
 protected:
  cache::Store store() const {
    return {folder.path().string(), [](const std::string&) {}};
  }
  std::optional<Match> find(Records& records, std::int64_t n) {
    const std::int64_t statics[] = {TORCHKILN_FLOAT}, sizes[] = {n};
    const torchkiln_device facts{9, 0, 132, 232448, 1 << 20};
    const torchkiln_problem problem{&facts, statics, sizes, nullptr};
    return records.find(kDevice, kernel, tuning_key(kernel, "digest", statics, sizes), problem);
  }
  std::filesystem::path file() const {
    return folder.path() / "v1" / "tuning" / kDevice.id() / "demo.scale.jsonl";
  }

  testing::TemporaryFolder folder;
  Declared declared;
  Kernel kernel{declared.declaration};
  Bundles bundles{{}, {}};
};

TEST(TuningRecord, TextAndBack) {
  const TuningRecord r = record_for(10);
  const auto back = TuningRecord::from_json(nlohmann::json::parse(r.to_json().dump()));
  ASSERT_TRUE(back);
  EXPECT_EQ(back->to_json(), r.to_json());
  EXPECT_DOUBLE_EQ(back->gain(), 0.2);
}

TEST(TuningRecord, WhatIsNoRecordIsNothing) {
  auto json = record_for(10).to_json();
  json["trials"][1]["ratio"] = -1;
  EXPECT_FALSE(TuningRecord::from_json(json));
  EXPECT_FALSE(TuningRecord::from_json({{"kernel", 3}}));
  EXPECT_FALSE(TuningRecord::from_json(nlohmann::json::array()));
}

TEST(TuningRecord, MergingKeepsAllTrialsAndIsSymmetric) {
  TuningRecord a = record_for(10, 256, 20), b = record_for(10, 64, 5);
  const TuningRecord ab = merge(a, b), ba = merge(b, a);
  EXPECT_EQ(ab.to_json(), ba.to_json());
  EXPECT_EQ(ab.trials.size(), 4u);
  EXPECT_EQ(ab.best.at("block_size"), 256);
  b.complete = true;
  a.complete = false;
  EXPECT_EQ(merge(a, b).best.at("block_size"), 64);
}

TEST(TuningKey, DistanceInPowersOfTwo) {
  const TuningKey a = record_for(10).key;
  EXPECT_EQ(distance(a, record_for(10).key), 0);
  EXPECT_EQ(distance(a, record_for(12).key), 2);
  EXPECT_EQ(distance(a, record_for(13).key), std::nullopt);
  TuningKey other = record_for(10).key;
  other.statics["scalar"] = "half";
  EXPECT_EQ(distance(a, other), std::nullopt);
  other = a;
  other.digest = "edited";
  EXPECT_EQ(distance(a, other), std::nullopt);
}

TEST(DeviceIdentity, IsAFileName) {
  EXPECT_TRUE(kDevice.id().starts_with("nvidia-h200-"));
  DeviceIdentity other = kDevice;
  other.multiprocessors = 66;
  EXPECT_NE(other.id(), kDevice.id());
  EXPECT_EQ(DeviceIdentity::from_json(kDevice.to_json()), kDevice);
  EXPECT_FALSE(DeviceIdentity::from_json({{"name", "x"}}));
}

TEST_F(RecordsTest, ExactNearAndTooFar) {
  const cache::Store s = store();
  Records records(s, bundles);
  EXPECT_EQ(records.save(kDevice, record_for(10)), 0);
  EXPECT_EQ(find(records, 1000)->distance, 0);  // bit width 10
  EXPECT_EQ(find(records, 300)->distance, 1);
  EXPECT_EQ(find(records, 4000)->distance, 2);
  EXPECT_FALSE(find(records, 10'000));
}

TEST_F(RecordsTest, OfTwoTheNearer) {
  const cache::Store s = store();
  Records records(s, bundles);
  records.save(kDevice, record_for(8, 64));
  records.save(kDevice, record_for(11, 256));
  EXPECT_EQ(find(records, 1000)->tunables, std::vector<std::int64_t>{256});
  EXPECT_EQ(find(records, 300)->tunables, std::vector<std::int64_t>{64});
}

TEST_F(RecordsTest, AChoiceThatIsNotLegalForTheSizeIsNotUsed) {
  const cache::Store s = store();
  Records records(s, bundles);
  records.save(kDevice, record_for(20, 256));
  EXPECT_TRUE(find(records, 1 << 20 >> 1));
  EXPECT_FALSE(find(records, (1 << 20) + 1));
}

TEST_F(RecordsTest, AValueThatIsGoneIsNotUsed) {
  const cache::Store s = store();
  Records records(s, bundles);
  records.save(kDevice, record_for(10, 512));
  EXPECT_FALSE(find(records, 1000));
}

TEST_F(RecordsTest, AnotherDeviceHasOtherRecords) {
  const cache::Store s = store();
  Records records(s, bundles);
  DeviceIdentity other = kDevice;
  other.name = "NVIDIA H100";
  records.save(other, record_for(10));
  EXPECT_FALSE(find(records, 1000));
}

TEST_F(RecordsTest, TheNextProcessFindsThem) {
  const cache::Store s = store();
  Records(s, bundles).save(kDevice, record_for(10));
  Records next(s, bundles);
  EXPECT_EQ(find(next, 1000)->record.to_json(), record_for(10).to_json());
  EXPECT_EQ(next.all().size(), 1u);
}

TEST_F(RecordsTest, ManyProcessesLoseNothing) {
  constexpr int kProcesses = 16, kEach = 12;
  for (int p = 0; p < kProcesses; ++p) {
    if (fork() != 0) continue;
    const cache::Store s = store();
    Records records(s, bundles);
    for (int i = 0; i < kEach; ++i) {
      TuningRecord r = record_for(i, 256, 10 + p);
      r.trials.push_back({{{"block_size", 10'000 + p}}, 2, 0, 1, "", 0});
      if (records.save(kDevice, r) != 0) _exit(1);
    }
    _exit(0);
  }
  for (int p = 0; p < kProcesses; ++p) {
    int status = 0;
    ASSERT_GT(wait(&status), 0);
    EXPECT_EQ(status, 0);
  }
  const cache::Store s = store();
  const auto all = Records(s, bundles).all();
  ASSERT_EQ(all.size(), static_cast<std::size_t>(kEach));
  for (const Placed& placed : all) EXPECT_EQ(placed.record.trials.size(), 3u + kProcesses);
}

TEST(TuningEnvironmentTest, ChangesAreNamed) {
  const TuningEnvironment then{"13.0", 13010, "0.1.0"};
  EXPECT_TRUE(changes(then, then).empty());
  EXPECT_TRUE(changes(then, {"13.0", 13040, "0.1.0"}).empty());  // of the driver the major counts
  EXPECT_TRUE(changes(then, {}).empty());                        // unknown here
  const auto list = changes(then, {"13.5", 12080, "0.2.0"});
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0].field + list[0].then + list[0].now, "compiler13.013.5");
  EXPECT_EQ(list[1].field + list[1].then + list[1].now, "driver1312");
  EXPECT_EQ(list[2].field + list[2].then + list[2].now, "library0.1.00.2.0");
}

TEST_F(RecordsTest, ExamineCountsByEnvironment) {
  const cache::Store s = store();
  Records records(s, bundles);
  TuningRecord other = record_for(10);
  other.environment.compiler = "12.8";
  records.save(kDevice, other);
  for (int bucket = 15; bucket < 25; bucket += 5) records.save(kDevice, record_for(bucket));
  const auto health = records.examine().at(0);
  EXPECT_EQ(health.file, file().string());
  EXPECT_EQ(health.records, 3u);
  EXPECT_EQ(health.environments.at(other.environment), 1u);
  EXPECT_EQ(health.environments.at(record_for(15).environment), 2u);
}

TEST_F(RecordsTest, ADamagedLineCostsItselfOnly) {
  const cache::Store s = store();
  {
    Records records(s, bundles);
    for (int bucket = 5; bucket < 25; bucket += 5) records.save(kDevice, record_for(bucket));
  }
  std::string text = read(file());
  text.insert(text.find("\"kernel\"", text.size() / 2), "}{");
  std::ofstream(file()) << text;
  Records records(s, bundles);
  EXPECT_EQ(records.all().size(), 3u);
  EXPECT_EQ(records.examine().at(0).unreadable, 1u);
}

TEST_F(RecordsTest, NoDamageCrashes) {
  const cache::Store s = store();
  Records(s, bundles).save(kDevice, record_for(10));
  const std::string text = read(file());
  std::mt19937 random(7);
  for (int i = 0; i < 2000; ++i) {
    std::string damaged = text;
    for (int k = 0; k < 1 + i % 4; ++k)
      damaged[random() % damaged.size()] = static_cast<char>(random());
    if (i % 5 == 0) damaged.resize(random() % damaged.size());
    for (const TuningRecord& r : parse_records(damaged).records) {
      EXPECT_TRUE(std::isfinite(r.gain()));
      unnamed(kernel, r.best);
    }
  }
}

TEST_F(RecordsTest, ImportedOnesAreTheOnlyOnes) {
  const cache::Store s = store();
  Records records(s, bundles);
  records.save(kDevice, record_for(10, 64));
  records.replace({{kDevice, record_for(20)}});
  EXPECT_FALSE(find(records, 1000));
  EXPECT_EQ(records.all().size(), 1u);
  // The file has both.
  EXPECT_EQ(Records(s, bundles).all().size(), 2u);
}

TEST_F(RecordsTest, AFolderThatCannotBeWrittenCostsOnlyTheNextProcess) {
  const cache::Store s("/proc/nowhere", [](const std::string&) {});
  Records records(s, bundles);
  EXPECT_NE(records.save(kDevice, record_for(10)), 0);
  EXPECT_TRUE(find(records, 1000));
}

}  // namespace
}  // namespace torchkiln::jit
