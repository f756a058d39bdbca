// What people see: progress lines, the log sink, counters, explain and dump.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <thread>

#include "cache/sha256.h"
#include "jit/compile/progress.h"
#include "jit/driver/elf.h"
#include "jit/explain.h"
#include "jit/log.h"
#include "jit/objects.h"
#include "tests/jit/support/fake_driver.h"
#include "tests/jit/support/files.h"
#include "torchkiln/torchkiln.hpp"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
using namespace std::chrono_literals;

// Collects what would go to the standard error stream.
class Sentences {
 public:
  Sentences() { set_log_sink(&Sentences::add, this); }
  ~Sentences() { set_log_sink(nullptr, nullptr); }
  Sentences(const Sentences&) = delete;
  Sentences& operator=(const Sentences&) = delete;

  std::vector<std::pair<int, std::string>> list;

 private:
  static void add(void* self, std::int32_t level, const char* sentence) {
    static_cast<Sentences*>(self)->list.emplace_back(level, sentence);
  }
};

// ---- progress ----

class ProgressTest : public ::testing::Test {
 protected:
  Progress::Clock::time_point now;
  std::vector<std::string> lines;
  Progress progress{[this](const std::string& line) { lines.push_back(line); },
                    [this] { return now; }};
};

TEST_F(ProgressTest, IsSilentForASecondThenCounts) {
  for (int i = 0; i < 9; ++i) {
    Progress::Compile compile(progress, "kernel " + std::to_string(i));
    now += 100ms;
  }
  EXPECT_TRUE(lines.empty());
  {
    Progress::Compile compile(progress, "a slow one");
    now += 50ms;
    compile.tick();
    EXPECT_TRUE(lines.empty());
    now += 50ms;
    compile.tick();
    compile.tick();
  }
  EXPECT_EQ(lines, std::vector<std::string>{
                       "compiling kernels for the cache: 9 done, 1.0 s, now a slow one"});
}

TEST_F(ProgressTest, SpeaksAgainAfterFiveMoreSeconds) {
  Progress::Compile compile(progress, "a very slow one");
  for (int tenth = 0; tenth < 125; ++tenth) {
    now += 100ms;
    compile.tick();
  }
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_NE(lines[2].find("11.0 s"), std::string::npos) << lines[2];
}

TEST_F(ProgressTest, TimeBetweenCompilesAndOverlapsCountOnce) {
  {
    Progress::Compile first(progress, "first"), second(progress, "second");
    now += 600ms;
  }
  now += 1h;
  Progress::Compile third(progress, "third");
  now += 300ms;
  third.tick();
  EXPECT_TRUE(lines.empty());
}

// ---- the sink ----

TEST(Log, ASinkGetsLevelAndSentence) {
  Sentences sentences;
  warn("something");
  log(TORCHKILN_LOG_INFO, "for your information");
  ASSERT_EQ(sentences.list.size(), 2u);
  EXPECT_EQ(sentences.list[0], std::pair(30, std::string("something")));
  EXPECT_EQ(sentences.list[1], std::pair(20, std::string("for your information")));
}

TEST(Log, WithoutASinkItGoesToTheErrorStream) {
  ::testing::internal::CaptureStderr();
  warn("something");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "torchkiln: something\n");
}

TEST(Log, AChildForkedInsideTheSinkCanSpeak) {
  // The sink is entered by one thread, and this one forks: in the child nobody will ever leave it.
  static std::atomic<bool> inside = false, leave = false;
  set_log_sink(
      [](void*, std::int32_t, const char*) {
        inside = true;
        while (!leave) std::this_thread::yield();
      },
      nullptr);
  std::thread speaker([] { warn("held"); });
  while (!inside) std::this_thread::yield();
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    log_after_fork_in_child();
    set_log_sink([](void*, std::int32_t, const char*) { ::_exit(0); }, nullptr);
    warn("spoken");
    ::_exit(1);
  }
  leave = true;
  speaker.join();
  set_log_sink(nullptr, nullptr);
  int status = 1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// ---- counters ----

TEST(Statistics, HaveTheSameNamesInCAndInJson) {
  const auto counters = torchkiln::statistics();
  const json reply = json::parse(torchkiln::control("statistics"));
  ASSERT_EQ(counters.size(), reply.size());
  for (const auto& [name, value] : counters) EXPECT_EQ(reply.at(name), value) << name;
  torchkiln_counter first{};
  EXPECT_EQ(torchkiln_statistics(&first, 1), counters.size());
  EXPECT_STREQ(first.name, "launches");
}

// ---- with a compiler ----

constexpr char kSource[] = R"(#pragma once
namespace torchkiln::scale {
struct Args { void* data; long long n; };
template <class Scalar, int kFactor, int kBlockSize>
__global__ void forward(Args args) {
  const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
  if (i < args.n) static_cast<Scalar*>(args.data)[i] *= kFactor;
}
}  // namespace torchkiln::scale
)";

NvrtcApi nvrtc;  // of slow_compile, which is a plain function

NvrtcResult slow_compile(NvrtcProgram program, int n, const char* const* options) {
  std::this_thread::sleep_for(1300ms);
  return nvrtc.nvrtcCompileProgram(program, n, options);
}

class WithCompiler : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto candidates = testing::test_nvrtcs();
    if (candidates.empty()) GTEST_SKIP() << "no NVRTC: set TORCHKILN_NVRTC_PATH";
    nvrtc = load_first(candidates);
    api = nvrtc;
    table.push_back({"demo/scale.cuh", kSource, sizeof(kSource) - 1, digest.c_str()});
    sources = std::make_unique<TemplateSources>(table);
  }

  Engine& engine() {
    if (engine_) return *engine_;
    Settings settings;
    settings.cache_dir = folder.path().string();
    engine_ = std::make_unique<Engine>(Engine::Parts{
        .settings = settings,
        .templates = table,
        .open_driver = [] { return testing::FakeDriver::api(); },
        .compilers = {.identity = [this] { return no_compiler ? "" : make_compiler()->id(); },
                      .open = [this] { return make_compiler(); }}});
    kernel = engine_->declare(declaration());
    return *engine_;
  }

  std::shared_ptr<const Compiler> make_compiler() {
    if (no_compiler) throw Error(TORCHKILN_ERROR_COMPILER, "there is no NVRTC here");
    return std::make_shared<const Compiler>(api, *sources);
  }

  static const torchkiln_declaration& declaration() {
    static const char* operators[] = {"scale"};
    static const std::int64_t types[] = {TORCHKILN_FLOAT, TORCHKILN_DOUBLE}, factors[] = {2},
                              blocks[] = {128, 256};
    static const torchkiln_param params[] = {{"scalar", TORCHKILN_PARAM_TYPE, 0, types, 2, 0},
                                             {"factor", TORCHKILN_PARAM_INT, 0, factors, 1, 0},
                                             {"block_size", TORCHKILN_PARAM_INT, 1, blocks, 2, 0}};
    static const torchkiln_size sizes[] = {{"n", TORCHKILN_BUCKET_POW2}};
    static const torchkiln_declaration result = {
        .struct_size = sizeof(torchkiln_declaration),
        .path = "demo/scale.cuh",
        .entry = "forward",
        .operators = operators,
        .n_operators = 1,
        .params = params,
        .n_params = 3,
        .sizes = sizes,
        .n_sizes = 1,
        .defaults = blocks,
        .n_defaults = 2,
        .args_size = 16,
        .tolerance = 0,
        .min_architecture = 75,
        .feature = TORCHKILN_FEATURE_NONE,
        .context = nullptr,
        .valid = nullptr,
        .legal = nullptr,
        .choose = [](const torchkiln_problem* p) { return p->sizes[0] > 1000 ? 1u : 0u; },
        .geometry = [](const torchkiln_problem*, const std::int64_t*,
                       torchkiln_geometry* g) { *g = {{1, 1, 1}, {128, 1, 1}, 0}; },
        .arguments = nullptr,
        .n_arguments = 0,
        .module = nullptr};
    return result;
  }

  json explained(const json& values, const json& more = {{"target", "sm_90"}}) {
    json request = {{"operator", "scale"}, {"values", values}};
    request.update(more);
    return explain(engine(), request).at("kernels");
  }

  testing::TemporaryFolder folder;
  testing::FakeDriver driver;
  NvrtcApi api;
  bool no_compiler = false;
  Kernel* kernel = nullptr;
  const std::string digest = cache::sha256_hex(kSource);
  std::vector<EmbeddedFile> table;
  std::unique_ptr<TemplateSources> sources;

 private:
  std::unique_ptr<Engine> engine_;
};

TEST_F(WithCompiler, ASlowCompileThatSomebodyWaitsForGetsOneLine) {
  api.nvrtcCompileProgram = &slow_compile;
  Sentences sentences;
  const std::int64_t statics[] = {TORCHKILN_FLOAT, 2}, tunables[] = {128};
  Objects& objects = engine().objects();
  const auto specialization = specialize(*kernel, statics, tunables);
  objects.get(specialization, {.architecture = 80}, Priority::kPrewarm);
  EXPECT_TRUE(sentences.list.empty());  // warm has a progress bar of its own
  objects.get(specialization, {.architecture = 90}, Priority::kInteractive);
  ASSERT_EQ(sentences.list.size(), 1u);
  EXPECT_EQ(sentences.list[0].first, TORCHKILN_LOG_INFO);
  EXPECT_EQ(sentences.list[0].second,
            "compiling kernels for the cache: 0 done, 1.0 s, now "
            "demo/scale.forward<float, factor=2, block_size=128>@sm_90");
}

TEST_F(WithCompiler, ExplainNamesLayerRungTunablesAndRegisters) {
  json rows = explained({{"scalar", "float"}, {"n", "5000"}});
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(rows[0]["text"], "demo/scale.forward<float, factor=2, block_size=256>");
  EXPECT_EQ(rows[0]["layer"], "compile");
  EXPECT_EQ(rows[0]["rung"]["target"], "sm_90");
  EXPECT_EQ(rows[0]["tunables"], json({{"block_size", "256"}}));
  EXPECT_FALSE(rows[0].contains("registers"));
  EXPECT_EQ(engine().statistics().compiles.load(), 0u);

  const auto stored = Specialization::from_json(rows[0]["specialization"]);
  engine().objects().get(stored, {.architecture = 90}, Priority::kPrewarm);
  rows = explained({{"scalar", "float"}, {"n", "5000"}});
  EXPECT_EQ(rows[0]["layer"], "memory");
  EXPECT_GT(rows[0]["registers"], 0);
  // A relative of the same major is a lower rung of the same ladder.
  rows = explained({{"scalar", "float"}, {"n", "5000"}}, {{"target", "sm_91"}});
  EXPECT_EQ(rows[0]["rung"]["target"], "sm_90");
  EXPECT_NE(rows[0]["rung"]["reason"].get<std::string>().find("same major"), std::string::npos);
}

TEST_F(WithCompiler, ExplainWithoutSizesListsEveryDefault) {
  const json rows = explained(json::object());
  ASSERT_EQ(rows.size(), 4u);  // two dtypes, two defaults
  std::set<std::string> reasons;
  for (const json& row : rows) reasons.insert(row["tunables_why"].get<std::string>());
  EXPECT_TRUE(reasons.contains("default 2 of 2; sizes and device decide"));
}

TEST_F(WithCompiler, ExplainAsksTheDeviceWhenNoTargetIsGiven) {
  const json rows = explained({{"scalar", "float"}, {"n", "5"}}, json::object());
  EXPECT_EQ(rows[0]["rung"]["target"], "sm_90");
  driver.devices[0].facts.major = 8;
  Engine other({.settings = engine().settings(),
                .templates = table,
                .open_driver = [] { return testing::FakeDriver::api(); },
                .compilers = {.identity = [] { return std::string(); },
                              .open = [this] { return make_compiler(); }}});
  other.declare(declaration());
  EXPECT_EQ(explain_ladder(other, json::object())["rungs"][0]["target"], "sm_80");
}

TEST_F(WithCompiler, ExplainWithoutACompilerSaysSo) {
  no_compiler = true;
  const json rows = explained({{"scalar", "float"}, {"n", "5"}});
  EXPECT_EQ(rows[0]["layer"], "none");
  EXPECT_EQ(rows[0]["why"], "in no layer, and there is no NVRTC here");
}

TEST_F(WithCompiler, ExplainKnowsThatCompilingIsForbidden) {
  engine().objects().set_mode(JitMode::kForbid);
  const json rows = explained({{"scalar", "float"}, {"n", "5"}});
  EXPECT_EQ(rows[0]["layer"], "none");
  EXPECT_NE(rows[0]["why"].get<std::string>().find("compiling is forbidden"), std::string::npos);
}

TEST_F(WithCompiler, ExplainRefusesWhatItDoesNotKnow) {
  const auto message = [&](const std::string& op, const json& values) {
    try {
      explain(engine(), {{"operator", op}, {"values", values}, {"target", "sm_90"}});
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message("scala", json::object()), "ops must be among scale; got scala");
  EXPECT_EQ(message("scale", {{"m", "3"}}), "values must be among factor, n, scalar; got m");
  EXPECT_EQ(message("scale", {{"n", "three"}}), "n must be a whole number; got three");
  EXPECT_EQ(message("scale", {{"scalar", "int3"}}),
            "scalar must be one of float, half, bfloat16, double, i32, i64, u8, bool, i8, i16, "
            "u16, u32, u64; "
            "got int3");
}

TEST_F(WithCompiler, DumpWritesSourcePtxAndCubin) {
  const std::int64_t statics[] = {TORCHKILN_FLOAT, 2}, tunables[] = {128};
  engine();
  const auto s = specialize(*kernel, statics, tunables);
  const std::string out = (folder.path() / "dump").string();
  const json reply = dump(engine(), {{"specialization", s.to_json()},
                                     {"target", "sm_90"},
                                     {"folder", out},
                                     {"what", {"source", "ptx", "cubin"}}});
  const auto read = [&](const char* what) {
    std::ifstream file(reply["files"][what].get<std::string>(), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  EXPECT_EQ(read("source"), s.program());
  EXPECT_NE(read("ptx").find(".target sm_90"), std::string::npos);
  EXPECT_EQ(read("ptx").find('\0'), std::string::npos);
  EXPECT_EQ(inspect_cubin(read("cubin")).architecture, 90);
  EXPECT_EQ(json::parse(read("facts"))["target"], "sm_90");
  EXPECT_EQ(std::filesystem::path(reply["folder"].get<std::string>()).filename(),
            "demo_scale.forward_float_factor_2_block_size_128_sm_90");
  EXPECT_TRUE(std::filesystem::exists(reply["folder"].get<std::string>() + "/demo/scale.cuh"));

  // A file in the way is an error with a sentence.
  EXPECT_THROW(dump(engine(), {{"specialization", s.to_json()},
                               {"target", "sm_90"},
                               {"folder", reply["files"]["ptx"]},
                               {"what", {"source"}}}),
               Error);
}

}  // namespace
}  // namespace torchkiln::jit
