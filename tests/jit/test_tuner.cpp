// Tuning through the engine: launches in mode `tune` on a fake driver and clock, with the real NVRTC.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "cache/sha256.h"
#include "jit/control.h"
#include "jit/engine.h"
#include "jit/error.h"
#include "jit/tune/interrupt.h"
#include "tests/jit/support/declared.h"
#include "tests/jit/support/fake_driver.h"
#include "tests/jit/support/files.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
using testing::FakeDriver;

constexpr char kSource[] = R"(#pragma once
namespace torchkiln { using half = unsigned short; using i32 = int; }
namespace torchkiln::scale {
struct Args { const float* from; float* to; float* sum; long long n; };
template <class Scalar, int kVector, int kBlockSize>
__global__ void forward(Args args) {
  const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
  if (i < args.n) args.to[i] = args.from[i] * kVector / kVector;
  if (i == 0) *args.sum += 1;
}
}  // namespace torchkiln::scale
)";

struct Args {
  const float* from;
  float* to;
  float* sum;
  std::int64_t n;
};

struct Declared {
  const char* operators[1] = {"scale"};
  std::int64_t types[1] = {TORCHKILN_FLOAT};
  std::vector<std::int64_t> vectors = {1, 2};
  std::int64_t blocks[4] = {64, 128, 256, 512};
  std::int64_t defaults[2] = {1, 128};
  torchkiln_param params[3] = {{"scalar", TORCHKILN_PARAM_TYPE, 0, types, 1, 0},
                               {"vector", TORCHKILN_PARAM_INT, 1, nullptr, 0, 0},
                               {"block_size", TORCHKILN_PARAM_INT, 1, blocks, 4, 0}};
  torchkiln_size sizes[1] = {{"n", TORCHKILN_BUCKET_POW2}};
  torchkiln_declaration declaration{};

  explicit Declared(std::vector<std::int64_t> values) : vectors(std::move(values)) {
    params[1].values = vectors.data();
    params[1].n_values = static_cast<std::uint32_t>(vectors.size());
    declaration = testing::declare("demo/scale.cuh", "forward", operators, params, sizes, defaults);
    declaration.args_size = sizeof(Args);
    declaration.min_architecture = 75;
    declaration.geometry = [](const torchkiln_problem* p, const std::int64_t* t,
                              torchkiln_geometry* g) {
      const auto block = static_cast<std::uint32_t>(t[1]);
      *g = {{static_cast<std::uint32_t>((p->sizes[0] + t[1] - 1) / t[1]), 1, 1}, {block, 1, 1}, 0};
    };
  }
};

// An engine with a launch whose three buffers lie in the fake driver's memory.
class World {
 public:
  explicit World(std::filesystem::path folder, std::vector<std::int64_t> vectors = {1, 2})
      : digest_(cache::sha256_hex(kSource)), declared_(std::move(vectors)) {
    table_.push_back({"demo/scale.cuh", kSource, sizeof(kSource) - 1, digest_.c_str()});
    Settings settings = Settings::from_environment();
    settings.cache_dir = folder.string();
    settings.compile_jobs = 2;
    engine = std::make_unique<Engine>(Engine::Parts{.settings = settings,
                                                    .templates = table_,
                                                    .open_driver = [] { return FakeDriver::api(); },
                                                    .compilers = {}});
    kernel = engine->declare(declared_.declaration);
    const CudaApi api = FakeDriver::api();
    api.cuMemAlloc(&from, kBytes);
    api.cuMemAlloc(&to, kBytes);
    api.cuMemAlloc(&sum, sizeof(float));
    std::memset(reinterpret_cast<void*>(to), 0x7f, kBytes);
  }
  ~World() {
    const CudaApi api = FakeDriver::api();
    for (const CudaPointer pointer : {from, to, sum}) api.cuMemFree(pointer);
  }

  void tune(double budget_ms = 1000, double total_ms = 60'000) {
    control(*engine, "tune.set",
            {{"mode", "tune"}, {"budget_ms", budget_ms}, {"total_ms", total_ms}});
  }
  void launch(std::int64_t n = 1000, CudaStream stream = nullptr, bool name_all = true) {
    const Args args{reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to),
                    reinterpret_cast<float*>(sum), n};
    const torchkiln_buffer buffers[] = {
        {offsetof(Args, from), TORCHKILN_READ, TORCHKILN_FLOAT, kBytes},
        {offsetof(Args, to), TORCHKILN_WRITE, TORCHKILN_FLOAT, kBytes},
        {offsetof(Args, sum), TORCHKILN_READ_WRITE, TORCHKILN_FLOAT, sizeof(float)}};
    const std::int64_t statics[] = {TORCHKILN_FLOAT}, sizes[] = {n};
    const torchkiln_launch l = {.struct_size = sizeof(l),
                                .device = 0,
                                .stream = stream,
                                .statics = statics,
                                .sizes = sizes,
                                .args = &args,
                                .buffers = buffers,
                                .n_buffers = name_all ? 3u : 2u,
                                .allocator = &allocator};
    engine->run(*kernel, l);
  }
  json reports() { return control(*engine, "tune.report", json::object()).at("tuned"); }

  static constexpr std::size_t kBytes = 4096 * sizeof(float);
  static inline int memory_left = 1 << 30;  // allocations
  const torchkiln_allocator allocator = {
      [](void*, std::uint64_t bytes, void** owner) -> void* {
        if (memory_left-- <= 0) return nullptr;
        CudaPointer pointer = 0;
        FakeDriver::api().cuMemAlloc(&pointer, bytes);
        *owner = reinterpret_cast<void*>(pointer);
        return *owner;
      },
      [](void*, void* owner) { FakeDriver::api().cuMemFree(reinterpret_cast<CudaPointer>(owner)); },
      nullptr};
  std::unique_ptr<Engine> engine;
  Kernel* kernel = nullptr;
  CudaPointer from = 0, to = 0, sum = 0;

 private:
  std::string digest_;
  std::vector<EmbeddedFile> table_;
  Declared declared_;
};

class TunerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (testing::test_nvrtcs().empty()) GTEST_SKIP() << "no NVRTC: set TORCHKILN_NVRTC_PATH";
    World::memory_left = 1 << 30;
    driver.args_bytes = sizeof(Args);
    // 256 threads are best, and 512 are worst.
    driver.cost = [](const FakeDriver::Launch& launch) {
      return launch.block[0] == 256 ? 0.007 : launch.block[0] == 512 ? 0.02 : 0.01;
    };
  }
  void TearDown() override { set_interrupt(nullptr, nullptr); }

  static Args args_of(const FakeDriver::Launch& launch) {
    Args args{};
    std::memcpy(&args, launch.args.data(), sizeof(args));
    return args;
  }
  // Launches of the user's own buffers.
  std::vector<FakeDriver::Launch> own_launches(const World& world) const {
    std::vector<FakeDriver::Launch> result;
    for (const auto& launch : driver.launches()) {
      if (args_of(launch).to == reinterpret_cast<float*>(world.to)) result.push_back(launch);
    }
    return result;
  }

  FakeDriver driver;
  testing::TemporaryFolder folder;
};

TEST_F(TunerTest, ChoosesThePlantedBestAndRecordsIt) {
  World world(folder.path());
  world.tune();
  world.launch();
  const json report = world.reports().at(0);
  EXPECT_EQ(report.at("best").at("block_size"), 256);
  EXPECT_NEAR(report.at("gain").get<double>(), 0.3, 1e-3);
  EXPECT_EQ(report.at("points"), 8);
  EXPECT_EQ(report.at("measured"), 7);
  EXPECT_EQ(report.at("stopped"), "");
  EXPECT_TRUE(report.at("verified"));
  EXPECT_EQ(own_launches(world).size(), 1u);
  EXPECT_EQ(own_launches(world).at(0).block[0], 256u);

  World next(folder.path());  // lookup is the default
  next.launch();
  EXPECT_EQ(own_launches(next).at(0).block[0], 256u);
  EXPECT_TRUE(next.reports().empty());
  EXPECT_EQ(next.engine->statistics().compiles.load(), 0u);
}

TEST_F(TunerTest, WhatCannotRunTheseSizesGivesWayToTheDefault) {
  World world(folder.path());
  world.tune();
  world.launch(900);
  world.kernel->declaration.legal = [](const torchkiln_problem* p, const std::int64_t* t) {
    return static_cast<std::int32_t>(p->sizes[0] <= 1000 || t[1] == 128);
  };
  control(*world.engine, "tune.set", {{"mode", "lookup"}});
  for (const std::int64_t n : {900, 1010, 900}) world.launch(n);  // of one bucket
  const auto launches = own_launches(world);
  ASSERT_EQ(launches.size(), 4u);
  EXPECT_EQ(launches[1].block[0], 256u);
  EXPECT_EQ(launches[2].block[0], 128u);
  EXPECT_EQ(launches[3].block[0], 256u);
}

TEST_F(TunerTest, NeverTouchesTheUsersMemory) {
  World world(folder.path());
  world.tune();
  driver.effect = [&](const FakeDriver::Launch& launch) {
    const Args args = args_of(launch);
    std::memset(args.to, 0, World::kBytes);
    *args.sum += 1;
  };
  *reinterpret_cast<float*>(world.sum) = 41;
  world.launch();
  EXPECT_EQ(*reinterpret_cast<float*>(world.sum), 42);
  EXPECT_EQ(own_launches(world).size(), 1u);
  EXPECT_EQ(driver.live_allocations(), 3u);  // every copy was given back
}

TEST_F(TunerTest, AConsumedBufferIsFreshInEachLaunch) {
  World world(folder.path());
  world.tune();
  float most = 0;
  driver.effect = [&](const FakeDriver::Launch& launch) {
    float& sum = *args_of(launch).sum;
    sum += 1;
    most = std::max(most, sum);
  };
  *reinterpret_cast<float*>(world.sum) = 0;
  world.launch();
  EXPECT_EQ(most, 1);
}

TEST_F(TunerTest, AWrongCandidateIsExcludedAndTheNextIsTaken) {
  driver.cost = [](const FakeDriver::Launch& launch) {
    return launch.block[0] == 256 ? 0.005 : launch.block[0] == 512 ? 0.007 : 0.01;
  };
  driver.effect = [&](const FakeDriver::Launch& launch) {
    const float value = launch.block[0] == 256 ? 2.0f : 1.0f;
    for (int i = 0; i < 1000; ++i) args_of(launch).to[i] = value;
  };
  World world(folder.path());
  world.tune();
  world.launch();
  const json report = world.reports().at(0);
  EXPECT_EQ(report.at("best").at("block_size"), 512);
  ASSERT_EQ(report.at("failed").size(), 2u);  // two vector widths
  EXPECT_NE(report.at("failed")[0].at("reason").get<std::string>().find("not that of the default"),
            std::string::npos);
}

TEST_F(TunerTest, LookupUsesNearSizesAndOffUsesNone) {
  World world(folder.path());
  world.tune();
  world.launch(1000);
  control(*world.engine, "tune.set", {{"mode", "lookup"}});
  world.launch(2000);
  EXPECT_EQ(own_launches(world).back().block[0], 256u);
  control(*world.engine, "tune.set", {{"mode", "off"}});
  world.launch(1000);
  EXPECT_EQ(own_launches(world).back().block[0], 128u);
}

TEST_F(TunerTest, AWarmKernelIsTunedToo) {
  World world(folder.path());
  world.launch();
  EXPECT_EQ(own_launches(world).back().block[0], 128u);
  world.tune();
  world.launch();
  EXPECT_EQ(own_launches(world).back().block[0], 256u);
  world.launch();
  EXPECT_EQ(world.reports().size(), 1u);
}

TEST_F(TunerTest, ANewValueCostsOnlyItsOwnPoints) {
  {
    World world(folder.path(), {1, 2});
    world.tune();
    world.launch();
  }
  World wider(folder.path(), {1, 2, 4});
  wider.tune();
  wider.launch();
  const json report = wider.reports().at(0);
  EXPECT_EQ(report.at("points"), 12);
  EXPECT_EQ(report.at("measured"), 4);
  EXPECT_EQ(report.at("reused"), 7);
  EXPECT_EQ(report.at("best").at("block_size"), 256);
}

TEST_F(TunerTest, WhatIsRecordedIsNotMeasuredAgain) {
  {
    World world(folder.path());
    world.tune();
    world.launch();
  }
  World again(folder.path());
  again.tune();
  again.launch();
  EXPECT_TRUE(again.reports().empty());
  EXPECT_EQ(own_launches(again).back().block[0], 256u);
}

TEST_F(TunerTest, AnotherDriverMeasuresAgainWhereAskedTo) {
  {
    World world(folder.path());
    world.tune();
    world.launch();
  }
  driver.version = 14000;
  World looked(folder.path());
  looked.launch();
  EXPECT_EQ(own_launches(looked).back().block[0], 256u);
  looked.tune();
  looked.launch();
  EXPECT_EQ(looked.reports().at(0).at("measured"), 7);
}

TEST_F(TunerTest, AnInterruptedSearchGoesOnWhereItWas) {
  {
    World world(folder.path());
    world.tune();
    static int asked = 0;
    asked = 0;
    set_interrupt([](void*) { return std::int32_t{++asked > 6}; }, nullptr);
    world.launch();
    EXPECT_EQ(world.reports().at(0).at("stopped"), "interrupted");
    EXPECT_EQ(own_launches(world).back().block[0], 128u);
    set_interrupt(nullptr, nullptr);
  }
  World resumed(folder.path());
  resumed.tune();
  resumed.launch();
  const json report = resumed.reports().at(0);
  EXPECT_EQ(report.at("stopped"), "");
  EXPECT_GT(report.at("reused").get<int>(), 0);
  EXPECT_LT(report.at("measured").get<int>(), 7);
  EXPECT_EQ(report.at("best").at("block_size"), 256);
}

TEST_F(TunerTest, BudgetsOfAKeyAndOfTheProcess) {
  World world(folder.path());
  world.tune(0);
  world.launch();
  EXPECT_TRUE(world.reports().empty());
  world.tune(1000, 5);
  world.launch(1000);
  world.launch(100'000);
  world.launch(1'000'000);
  double spent = 0;
  for (const json& report : world.reports()) spent += report.at("gpu_ms").get<double>();
  EXPECT_LT(world.reports().size(), 3u);
  EXPECT_LT(spent, 5 + 15);
}

TEST_F(TunerTest, CaptureIsRefusedOnlyWhereItWouldMeasure) {
  World world(folder.path());
  world.tune();
  const auto stream = reinterpret_cast<CudaStream>(std::uintptr_t{0x77});
  driver.set_capturing(stream, true);
  try {
    world.launch(1000, stream);
    FAIL() << "measured in a capture";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), TORCHKILN_ERROR_CAPTURE);
  }
  EXPECT_FALSE(driver.capture_invalidated());
  driver.set_capturing(stream, false);
  world.launch(1000, stream);
  driver.set_capturing(stream, true);
  world.launch(1000, stream);
  EXPECT_TRUE(driver.launches().back().captured);
}

TEST_F(TunerTest, WithoutMemoryTheDefaultRuns) {
  World world(folder.path());
  world.tune();
  World::memory_left = 2;  // not even one set
  world.launch();
  EXPECT_EQ(own_launches(world).back().block[0], 128u);
  EXPECT_NE(world.reports().at(0).at("stopped").get<std::string>().find("memory"),
            std::string::npos);
  EXPECT_EQ(driver.live_allocations(), 3u);
}

TEST_F(TunerTest, APointerThatTheLaunchDoesNotNameIsNotTuned) {
  World world(folder.path());
  world.tune();
  world.launch(1000, nullptr, false);
  EXPECT_NE(world.reports().at(0).at("stopped").get<std::string>().find("name every buffer"),
            std::string::npos);
  EXPECT_EQ(own_launches(world).size(), 1u);
}

TEST_F(TunerTest, WhereCompilingIsForbiddenNothingIsTuned) {
  World world(folder.path());
  world.launch();  // the default is there
  world.tune();
  control(*world.engine, "seal", {{"mode", "forbid"}});
  world.launch();
  EXPECT_TRUE(world.reports().empty());
  EXPECT_EQ(world.engine->statistics().compiles.load(), 1u);
  EXPECT_EQ(own_launches(world).back().block[0], 128u);
}

TEST_F(TunerTest, AnEmptyLaunchIsNotTuned) {
  World world(folder.path());
  world.tune();
  world.launch(0);
  EXPECT_TRUE(world.reports().empty());
}

TEST_F(TunerTest, ExplainTellsTheQualityOfTheMatch) {
  World world(folder.path());
  world.tune();
  world.launch(1000);
  const auto quality = [&](std::int64_t n) {
    const json reply = control(*world.engine, "explain",
                               {{"operator", "scale"}, {"values", {{"n", std::to_string(n)}}}});
    return reply.at("kernels").at(0).at("tunables_quality").get<std::string>();
  };
  EXPECT_EQ(quality(1000), "exact");
  EXPECT_EQ(quality(3000), "near");
  EXPECT_EQ(quality(1'000'000), "default");
}

TEST_F(TunerTest, WarmCompilesWinnersAndABundleCarriesTheirRecords) {
  {
    World world(folder.path());
    world.tune();
    world.launch();
  }
  World world(folder.path());
  const json wanted = control(*world.engine, "expand",
                              {{"operators", {"scale"}}, {"architectures", {"sm_90", "sm_80"}}});
  json items = json::array();
  for (const json& s : wanted.at("specializations")) {
    if (s.contains("arch")) {
      EXPECT_EQ(s.at("arch"), "sm_90");
      EXPECT_NE(s.at("text").get<std::string>().find("block_size=256"), std::string::npos);
    }
    control(*world.engine, "compile", {{"specialization", s}, {"target", "sm_90"}});
    items.push_back({{"specialization", s}, {"target", "sm_90"}});
  }
  ASSERT_EQ(items.size(), 2u);  // the default and the winner
  const std::string bundle = (folder.path() / "all.bundle").string();
  control(*world.engine, "bundle.create", {{"out", bundle}, {"items", items}});
  const json verified = control(*world.engine, "bundle.verify", {{"path", bundle}});
  EXPECT_TRUE(verified.at("problems").empty());
  EXPECT_EQ(verified.at("records"), 1);

  // A machine with the bundle and nothing else.
  ::setenv("TORCHKILN_BUNDLES", bundle.c_str(), 1);
  ::setenv("TORCHKILN_JIT", "forbid", 1);
  testing::TemporaryFolder empty;
  World production(empty.path());
  ::unsetenv("TORCHKILN_BUNDLES");
  ::unsetenv("TORCHKILN_JIT");
  production.launch();
  EXPECT_EQ(own_launches(production).back().block[0], 256u);
  EXPECT_EQ(production.engine->statistics().missing.load(), 0u);
}

TEST_F(TunerTest, ImportedRecordsRule) {
  World world(folder.path());
  world.tune();
  world.launch();
  const json exported = control(*world.engine, "records.export", json::object());
  testing::TemporaryFolder other;
  World rank(other.path());
  const json reply = control(*rank.engine, "records.import", {{"records", exported.at("records")}});
  EXPECT_EQ(reply.at("digest"), exported.at("digest"));
  EXPECT_EQ(reply.at("records"), 1);
  rank.launch();
  EXPECT_EQ(own_launches(rank).back().block[0], 256u);
  EXPECT_THROW(control(*rank.engine, "records.import", {{"records", {{{"device", 3}}}}}), Error);
}

TEST_F(TunerTest, SpacesAreListed) {
  World world(folder.path());
  const json space = control(*world.engine, "tune.list", {{"target", "sm_90"}}).at("spaces").at(0);
  EXPECT_EQ(space.at("kernel"), "demo/scale.cuh:forward");
  EXPECT_EQ(space.at("points"), 8);
  EXPECT_EQ(space.at("legal"), 8);
  EXPECT_EQ(space.at("defaults").at(0), (json{{"vector", 1}, {"block_size", 128}}));
}

TEST_F(TunerTest, StateComesBack) {
  World world(folder.path());
  const json before = control(*world.engine, "tune.set", {{"mode", "tune"}, {"budget_ms", 5}});
  EXPECT_EQ(before.at("mode"), "lookup");
  EXPECT_EQ(before.at("budget_ms"), 300);
  EXPECT_EQ(control(*world.engine, "tune.set", before).at("budget_ms"), 5);
  EXPECT_THROW(control(*world.engine, "tune.set", {{"mode", "fast"}}), Error);
  EXPECT_THROW(control(*world.engine, "tune.set", {{"budget_ms", -1}}), Error);
}

}  // namespace
}  // namespace torchkiln::jit
