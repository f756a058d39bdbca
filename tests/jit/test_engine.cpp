// The life of a launch from declaration to cuLaunchKernel, on a fake driver with the real NVRTC.
//
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "cache/sha256.h"
#include "jit/control.h"
#include "jit/engine.h"
#include "jit/error.h"
#include "tests/jit/support/declared.h"
#include "tests/jit/support/fake_driver.h"
#include "tests/jit/support/files.h"

// ---- what the launch path must not do: counted while `counting` is on -------------------------------------------

namespace {
std::atomic<bool> counting{false};
std::atomic<int> allocations{0};
std::atomic<int> locks{0};
}  // namespace

// Never inlined: g++ 12 would see free() after operator new in its callers and call them mismatched.
__attribute__((noinline)) void* operator new(std::size_t size) {
  if (counting.load(std::memory_order_relaxed)) ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
// std::stable_sort asks with nothrow and gives back without.
__attribute__((noinline)) void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  if (counting.load(std::memory_order_relaxed)) ++allocations;
  return std::malloc(size);
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  using Lock = int (*)(pthread_mutex_t*);
  static const Lock real = reinterpret_cast<Lock>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
  if (counting.load(std::memory_order_relaxed)) ++locks;
  return real(mutex);
}

namespace torchkiln::jit {
namespace {

using testing::FakeDriver;

constexpr char kSource[] = R"(#pragma once
namespace torchkiln { using half = unsigned short; using i32 = int; }
namespace torchkiln::scale {
struct Args { void* data; long long n; };
template <class Scalar, int kFactor, int kBlockSize>
__global__ void forward(Args args) {
  const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
  if (i < args.n) static_cast<Scalar*>(args.data)[i] *= kFactor;
}
}  // namespace torchkiln::scale
)";

struct Args {
  void* data;
  std::int64_t n;
};

// A kernel with one type, one static int, one size in power-of-two buckets and one tunable with two defaults.
struct Declared {
  const char* operators[1] = {"scale"};
  std::int64_t types[2] = {TORCHKILN_FLOAT, TORCHKILN_DOUBLE};
  std::int64_t factors[1] = {2};
  std::int64_t blocks[3] = {64, 128, 256};
  std::int64_t defaults[2] = {128, 256};
  torchkiln_param params[3] = {{"scalar", TORCHKILN_PARAM_TYPE, 0, types, 2, 0},
                               {"factor", TORCHKILN_PARAM_INT, 0, factors, 1, 0},
                               {"block_size", TORCHKILN_PARAM_INT, 1, blocks, 3, 0}};
  torchkiln_size sizes[1] = {{"n", TORCHKILN_BUCKET_POW2}};
  torchkiln_declaration declaration{};

  Declared() {
    declaration = testing::declare("demo/scale.cuh", "forward", operators, params, sizes, defaults);
    declaration.args_size = sizeof(Args);
    declaration.min_architecture = 75;
    declaration.choose = [](const torchkiln_problem* p) { return p->sizes[0] > 1000 ? 1u : 0u; };
    declaration.geometry = [](const torchkiln_problem* p, const std::int64_t* t,
                              torchkiln_geometry* g) {
      const auto block = static_cast<std::uint32_t>(t[0]);
      *g = {{static_cast<std::uint32_t>((p->sizes[0] + t[0] - 1) / t[0]), 1, 1}, {block, 1, 1}, 0};
    };
  }
};

// One engine in a cache folder of its own, or in a given one.
class World {
 public:
  explicit World(const std::string& source = kSource, std::filesystem::path folder = {})
      : source_(source), digest_(cache::sha256_hex(source)), folder_(std::move(folder)) {
    if (folder_.empty()) folder_ = own_.path();
    table_.push_back({"demo/scale.cuh", source_.c_str(), source_.size(), digest_.c_str()});
    engine = make();
    kernel = engine->declare(declared_.declaration);
  }

  std::unique_ptr<Engine> make() {
    Settings settings = Settings::from_environment();
    settings.cache_dir = folder_.string();
    settings.compile_jobs = 2;
    return std::make_unique<Engine>(Engine::Parts{.settings = settings,
                                                  .templates = table_,
                                                  .open_driver = [] { return FakeDriver::api(); },
                                                  .compilers = {}});
  }

  void launch(std::int64_t n, std::int64_t type = TORCHKILN_FLOAT) {
    const Args args{nullptr, n};
    const std::int64_t statics[] = {type, 2};
    const std::int64_t sizes[] = {n};
    const torchkiln_launch l = {.struct_size = sizeof(l),
                                .device = 0,
                                .stream = nullptr,
                                .statics = statics,
                                .sizes = sizes,
                                .args = &args,
                                .buffers = nullptr,
                                .n_buffers = 0,
                                .allocator = nullptr};
    engine->run(*kernel, l);
  }

  std::uint64_t compiles() const { return engine->statistics().compiles.load(); }
  const std::filesystem::path& folder() const { return folder_; }

  std::unique_ptr<Engine> engine;
  Kernel* kernel = nullptr;

 private:
  std::string source_, digest_;
  testing::TemporaryFolder own_;
  std::filesystem::path folder_;
  std::vector<EmbeddedFile> table_;
  Declared declared_;
};

class EngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (testing::test_nvrtcs().empty()) GTEST_SKIP() << "no NVRTC: set TORCHKILN_NVRTC_PATH";
  }
  FakeDriver driver;
};

Error failure_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e;
  }
  ADD_FAILURE() << "no error";
  return {TORCHKILN_ERROR_NONE, ""};
}

TEST_F(EngineTest, LaunchesWithTheDefaultOfItsBucket) {
  World world;
  world.launch(100);
  world.launch(5000);
  const auto launches = driver.launches();
  ASSERT_EQ(launches.size(), 2u);
  EXPECT_EQ(launches[0].block[0], 128u);
  EXPECT_EQ(launches[0].grid[0], 1u);
  EXPECT_EQ(launches[1].block[0], 256u);
  EXPECT_EQ(launches[1].grid[0], 20u);
}

TEST_F(EngineTest, FirstSizesDoNotFixLaterOnes) {
  World world;
  world.launch(5000);
  world.launch(10);
  EXPECT_EQ(driver.launches().back().block[0], 128u);
}

TEST_F(EngineTest, SizesOfOneBucketMayHaveDifferentDefaults) {
  World world;
  for (const std::int64_t n : {900, 1010, 900}) world.launch(n);  // `choose` changes at 1000
  const auto launches = driver.launches();
  ASSERT_EQ(launches.size(), 3u);
  EXPECT_EQ(launches[0].block[0], 128u);
  EXPECT_EQ(launches[1].block[0], 256u);
  EXPECT_EQ(launches[2].block[0], 128u);
}

TEST_F(EngineTest, EmptyGridLaunchesNothing) {
  World world;
  world.launch(0);
  EXPECT_TRUE(driver.launches().empty());
}

TEST_F(EngineTest, WarmLaunchTakesNoLockAndMakesNoAllocation) {
  World world;
  const auto run = [&] {
    for (int i = 0; i < 100; ++i) world.launch(100 + i % 20);
  };
  run();
  // The fake driver itself allocates and locks, so the launch is swallowed by an entry that does neither.
  static int launched = 0;
  const auto quiet = world.engine->driver().api();
  const_cast<CudaApi&>(world.engine->driver().api()).cuLaunchKernel =
      [](CudaFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
         CudaStream, void**, void**) -> CudaResult {
    ++launched;
    return kCudaSuccess;
  };
  counting = true;
  run();
  counting = false;
  EXPECT_EQ(allocations.load(), 0);
  EXPECT_EQ(locks.load(), 0);
  EXPECT_EQ(launched, 100);
  EXPECT_EQ(world.engine->statistics().cold_launches.load(), 1u);
  const_cast<CudaApi&>(world.engine->driver().api()) = quiet;
}

TEST_F(EngineTest, SecondProcessCompilesNothingAndOpensNoCompiler) {
  World world;
  world.launch(100);
  EXPECT_EQ(world.compiles(), 1u);
  World second(kSource, world.folder());
  second.launch(100);
  EXPECT_EQ(second.compiles(), 0u);
  EXPECT_EQ(second.engine->statistics().hits_disk.load(), 1u);
  EXPECT_EQ(second.engine->statistics().nvrtc_opened.load(), 0u);
}

TEST_F(EngineTest, EditedTemplateMisses) {
  World world;
  world.launch(100);
  World edited(std::string(kSource) + "// edited\n", world.folder());
  edited.launch(100);
  EXPECT_EQ(edited.compiles(), 1u);
}

TEST_F(EngineTest, ThreadsOnOneKeyMakeOneCompile) {
  World world;
  std::vector<std::thread> threads;
  for (int i = 0; i < 32; ++i) threads.emplace_back([&] { world.launch(100); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(world.compiles(), 1u);
  EXPECT_EQ(driver.launches().size(), 32u);
}

TEST_F(EngineTest, KernelIsResidentBeforeItsFirstLaunch) {
  World world;
  world.launch(100);
  const auto calls = driver.calls();
  const auto at = [&](const char* name) {
    return std::find(calls.begin(), calls.end(), name) - calls.begin();
  };
  EXPECT_LT(at("cuFuncLoad"), at("cuLaunchKernel"));
  EXPECT_LT(at("cuKernelGetFunction"), at("cuFuncLoad"));
}

TEST_F(EngineTest, ThreadWithoutContextGetsThePrimaryOne) {
  driver.needs_context = true;
  World world;
  world.launch(100);
  std::thread([&] { world.launch(100); }).join();   // warm: the launch itself says 201
  std::thread([&] { world.launch(5000); }).join();  // cold
  EXPECT_EQ(driver.launches().size(), 3u);
}

TEST_F(EngineTest, CachedObjectThatTheDriverRefusesIsAMiss) {
  World world;
  world.launch(100);
  World second(kSource, world.folder());
  driver.fail("cuLibraryLoadData", kCudaNoBinaryForGpu);
  second.launch(100);
  EXPECT_EQ(second.compiles(), 1u);
  EXPECT_EQ(second.engine->statistics().refused.load(), 1u);
  World third(kSource, world.folder());
  third.launch(100);
  EXPECT_EQ(third.compiles(), 0u);  // healed
}

TEST_F(EngineTest, FreshObjectThatTheDriverRefusesIsAnError) {
  World world;
  driver.fail("cuLibraryLoadData", kCudaNoBinaryForGpu, -1);
  const Error e = failure_of([&] { world.launch(100); });
  EXPECT_EQ(e.kind(), TORCHKILN_ERROR_DRIVER);
  EXPECT_NE(std::string(e.what()).find("demo/scale.forward<float, factor=2, block_size=128>"),
            std::string::npos);
}

TEST_F(EngineTest, LaunchErrorTellsKernelAndShape) {
  World world;
  driver.fail("cuLaunchKernel", kCudaLaunchOutOfResources);
  const std::string text = failure_of([&] { world.launch(100); }).what();
  for (const char* part : {"demo/scale.forward<float", "grid 1x1x1", "block 128x1x1"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
}

TEST_F(EngineTest, CompileErrorComesBackInFullAndIsKept) {
  World world(std::string(kSource) + "int x = undeclared;\n");
  const Error first = failure_of([&] { world.launch(100); });
  const Error second = failure_of([&] { world.launch(100); });
  EXPECT_EQ(first.kind(), TORCHKILN_ERROR_COMPILE);
  EXPECT_STREQ(first.what(), second.what());
  EXPECT_NE(std::string(first.what()).find("demo/scale.cuh(11)"), std::string::npos)
      << first.what();
  const std::filesystem::path kept = first.details().at("source_path").get<std::string>();
  EXPECT_TRUE(std::filesystem::exists(kept / "program.cu"));
  EXPECT_TRUE(std::filesystem::exists(kept / "demo/scale.cuh"));
  EXPECT_TRUE(std::filesystem::exists(kept / "log.txt"));
}

TEST_F(EngineTest, ArgsOfAnotherSizeAreRefusedAtCompileTime) {
  World world;
  world.kernel->declaration.args_size = 24;
  const Error e = failure_of([&] { world.launch(100); });
  EXPECT_NE(e.details().at("log").get<std::string>().find("disagree"), std::string::npos);
}

TEST_F(EngineTest, GuardRefusesInCaptureAndSaysTheWayOut) {
  World world;
  const auto stream = reinterpret_cast<CudaStream>(std::uintptr_t{64});
  EXPECT_NO_THROW(world.engine->capture_guard(0, stream, "nms", ""));
  driver.set_capturing(stream, true);
  const Error e = failure_of(
      [&] { world.engine->synchronize(0, stream, "nms: reading the count", "Use nms_padded"); });
  EXPECT_EQ(e.kind(), TORCHKILN_ERROR_CAPTURE);
  EXPECT_NE(std::string(e.what()).find("Use nms_padded"), std::string::npos);
  EXPECT_FALSE(driver.capture_invalidated());
}

TEST_F(EngineTest, ColdKernelMayBeCompiledInCapture) {
  World world;
  driver.set_capturing(nullptr, true);
  world.launch(100);
  EXPECT_FALSE(driver.capture_invalidated());
  EXPECT_TRUE(driver.launches().back().captured);
}

TEST_F(EngineTest, UnknownGpuOfTheSameMajorRunsMachineCodeOfARelative) {
  driver.devices[0].facts.major = 9;
  driver.devices[0].facts.minor = 9;
  World world;
  world.launch(100);
  EXPECT_EQ(driver.launches().size(), 1u);
}

TEST_F(EngineTest, OldGpuIsAnErrorThatTellsTheLadder) {
  driver.devices[0].facts.major = 5;
  World world;
  const std::string text = failure_of([&] { world.launch(100); }).what();
  EXPECT_NE(text.find("sm_50"), std::string::npos) << text;
}

TEST_F(EngineTest, MissingDriverSaysSoEveryTime) {
  int opened = 0;
  Engine engine({.settings = {},
                 .templates = {},
                 .open_driver = [&]() -> CudaApi {
                   ++opened;
                   throw Error(TORCHKILN_ERROR_DRIVER, "no driver");
                 },
                 .compilers = {}});
  for (int i = 0; i < 2; ++i) {
    const Error e = failure_of([&] { engine.driver().api(); });
    EXPECT_EQ(e.kind(), TORCHKILN_ERROR_DRIVER);
    EXPECT_STREQ(e.what(), "no driver");
  }
  EXPECT_EQ(opened, 1);
}

// ---- processes ------------------------------------------------------------------------------------------------

int wait_for(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

TEST_F(EngineTest, SixtyFourProcessesMakeOneCompile) {
  testing::TemporaryFolder folder;
  const auto counter = folder.path() / "compiles";
  std::ofstream(counter).flush();
  int start[2];
  ASSERT_EQ(pipe(start), 0);
  std::vector<pid_t> children;
  for (int i = 0; i < 64; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      close(start[1]);
      char byte;
      if (read(start[0], &byte, 1) != 0) _exit(2);  // returns when the parent closes its end
      World world(kSource, folder.path());
      const auto spec = expand(*world.kernel, {}).front();
      const Found found =
          world.engine->objects().get(spec, {.architecture = 90}, Priority::kInteractive);
      if (found.layer == Layer::kCompiled)
        std::ofstream(counter, std::ios::app) << '+' << std::flush;
      _exit(found.object->payload.empty() ? 3 : 0);
    }
    children.push_back(child);
  }
  close(start[0]);
  close(start[1]);
  for (const pid_t child : children) EXPECT_EQ(wait_for(child), 0);
  EXPECT_EQ(std::filesystem::file_size(counter), 1u);
}

TEST_F(EngineTest, ForkedChildFindsButDoesNotCompile) {
  World world;
  const auto specs = expand(*world.kernel, {});
  const Target target{.architecture = 90};
  world.engine->objects().get(specs[0], target, Priority::kInteractive);
  const pid_t child = fork();
  if (child == 0) {
    if (!world.engine->objects().find(specs[0], target)) _exit(1);
    try {
      world.engine->objects().get(specs[1], target, Priority::kInteractive);
    } catch (const Error& e) {
      _exit(std::string(e.what()).find("forked") == std::string::npos ? 2 : 0);
    }
    _exit(3);
  }
  EXPECT_EQ(wait_for(child), 0);
}

// ---- control --------------------------------------------------------------------------------------------------

TEST_F(EngineTest, WarmNeedsNoDriver) {
  World world;
  const auto specs =
      control(*world.engine, "expand", {{"operators", {"scale"}}, {"dtypes", {"float32"}}});
  ASSERT_EQ(specs.at("specializations").size(), 2u);  // both defaults
  for (const char* arch : {"sm_80", "sm_120"}) {
    const nlohmann::json request = {{"specialization", specs["specializations"][0]},
                                    {"target", arch}};
    EXPECT_EQ(control(*world.engine, "compile", request).at("status"), "compiled");
    EXPECT_EQ(control(*world.engine, "compile", request).at("status"), "hit");
  }
  EXPECT_EQ(driver.calls().size(), 0u);
}

TEST_F(EngineTest, ExpandKnowsThePointsOfTheSearchSpace) {
  World world;
  const auto count = [&](nlohmann::json request) {
    request["dtypes"] = {"float32"};
    return control(*world.engine, "expand", request).at("specializations").size();
  };
  EXPECT_EQ(count({{"points", "defaults"}}), 2u);
  EXPECT_EQ(count({{"points", "corners"}}), 2u);
  EXPECT_EQ(count({{"points", "all"}, {"target", "sm_90"}}), 3u);
  const Error e = failure_of([&] { count({{"points", "some"}}); });
  EXPECT_EQ(e.kind(), TORCHKILN_ERROR_VALUE);
  EXPECT_NE(std::string(e.what()).find("defaults, corners or all"), std::string::npos) << e.what();
}

TEST_F(EngineTest, UnknownOperatorsAndDtypesAreNamed) {
  World world;
  const auto text = [&](const nlohmann::json& request) {
    return std::string(failure_of([&] { control(*world.engine, "expand", request); }).what());
  };
  EXPECT_NE(text({{"operators", {"none"}}}).find("scale"), std::string::npos);
  EXPECT_NE(text({{"dtypes", {"int4"}}}).find("bfloat16"), std::string::npos);
  EXPECT_EQ(failure_of([&] { control(*world.engine, "nonsense", {}); }).kind(),
            TORCHKILN_ERROR_VALUE);
}

TEST_F(EngineTest, MemoryOnlyWhenTheFolderIsRefused) {
  World world(kSource, "relative/folder");
  world.launch(100);
  EXPECT_EQ(world.compiles(), 1u);
  EXPECT_FALSE(std::filesystem::exists("relative"));
}

TEST_F(EngineTest, SelfTestOfTheStoreLeavesNothing) {
  World world;
  const auto checks = control(*world.engine, "selftest.store", {}).at("checks");
  for (const auto& check : checks) EXPECT_TRUE(check.at("ok")) << check;
  EXPECT_GE(checks.size(), 5u);
  EXPECT_TRUE(world.engine->objects().store().list().empty());
}

}  // namespace
}  // namespace torchkiln::jit
