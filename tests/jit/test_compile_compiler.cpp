// Compiles with a real NVRTC; skipped where there is none.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <deque>
#include <filesystem>
#include <memory>
#include <thread>

#include "cache/sha256.h"
#include "jit/compile/compiler.h"
#include "jit/compile/pool.h"
#include "jit/driver/elf.h"
#include "jit/driver/exit_handlers.h"
#include "jit/error.h"
#include "tests/jit/support/fake_cubin.h"
#include "tests/jit/support/files.h"

namespace torchkiln::jit {
namespace {

const std::string kKey = cache::sha256_hex("a key");
const std::vector<std::string> kOptions = {"std=c++17"};

constexpr const char* kScale = R"(#include "demo/scale.h"
namespace torchkiln::scale {
template <class Scalar, int kBlockSize>
__global__ void forward(Args args) {
  const int i = blockIdx.x * kBlockSize + threadIdx.x;
  if (i < args.n) static_cast<Scalar*>(args.data)[i] *= args.factor;
}
}  // namespace torchkiln::scale
)";
constexpr const char* kScaleHeader = R"(#pragma once
namespace torchkiln::scale {
struct Args { void* data; float factor; int n; };
}
)";

// Owns texts and the table that points to them.
class Templates {
 public:
  Templates& add(const std::string& path, const std::string& text) {
    texts_.push_back({path, text, cache::sha256_hex(text)});
    return *this;
  }
  std::unique_ptr<TemplateSources> sources() const {
    std::vector<EmbeddedFile> files;
    for (const Row& row : texts_) {
      files.push_back({row.path.c_str(), row.text.c_str(), row.text.size(), row.sha256.c_str()});
    }
    return std::make_unique<TemplateSources>(files);
  }

 private:
  struct Row {
    std::string path, text, sha256;
  };
  std::deque<Row> texts_;
};

Specialization scale() {
  return {.path = "demo/scale.cuh",
          .entry = "forward",
          .arguments = {{"scalar", TORCHKILN_PARAM_TYPE, TORCHKILN_FLOAT},
                        {"block_size", TORCHKILN_PARAM_INT, 256}},
          .args_size = 16};
}

class RealCompiler : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto candidates = testing::test_nvrtcs();
    if (candidates.empty()) GTEST_SKIP() << "no NVRTC: set TORCHKILN_NVRTC_PATH";
    nvrtc_ = load_first(candidates);
    use(Templates().add("demo/scale.cuh", kScale).add("demo/scale.h", kScaleHeader));
  }

  void use(const Templates& templates) {
    templates_ = templates;
    compiler_.reset();
    sources_ = templates_.sources();
    compiler_ = std::make_unique<Compiler>(nvrtc_, *sources_);
  }

  // scale.cuh with `text` in front of it.
  void use_with(const std::string& text) {
    use(Templates().add("demo/scale.cuh", text + kScale).add("demo/scale.h", kScaleHeader));
  }

  cache::Object compile(const Target& target = {.architecture = 90}) {
    return pool_.run(Priority::kInteractive,
                     [&] { return compiler_->compile(scale(), target, kKey, kOptions); });
  }

  Error failure() {
    try {
      compile();
    } catch (const Error& error) {
      return error;
    }
    ADD_FAILURE() << "it compiled";
    return Error(TORCHKILN_ERROR_NONE, "");
  }

  NvrtcApi nvrtc_;
  Templates templates_;
  std::unique_ptr<TemplateSources> sources_;
  std::unique_ptr<Compiler> compiler_;
  CompilePool pool_{2};
};

TEST_F(RealCompiler, MakesACheckedObject) {
  const cache::Object object = compile();
  const nlohmann::json& header = object.header;
  EXPECT_EQ(header.at("key"), kKey);
  EXPECT_EQ(header.at("compiler"), compiler_->id());
  EXPECT_EQ(header.at("kind"), "cubin");
  EXPECT_EQ(header.at("target"), "sm_90");
  EXPECT_EQ(header.at("text"), "demo/scale.forward<float, block_size=256>");
  EXPECT_EQ(header.at("options"), nlohmann::json(kOptions));
  EXPECT_EQ(Specialization::from_json(header.at("specialization")), scale());
  EXPECT_EQ(header.at("payload_sha256"), cache::sha256_hex(object.payload));
  EXPECT_GT(header.at("registers").get<int>(), 0);
  EXPECT_EQ(header.at("shared_bytes"), 0);
  EXPECT_EQ(header.at("spill_bytes"), 0);
  EXPECT_GT(header.at("milliseconds").get<double>(), 0);
  EXPECT_EQ(header.at("nvrtc"), version_text(compiler_->version()));
  EXPECT_EQ(header.at("warnings"), nlohmann::json::array());
  EXPECT_EQ(validate_object(object, {.architecture = 90}), std::nullopt);
  const std::string name = header.at("lowered_name");
  EXPECT_TRUE(name.starts_with("_ZN9torchkiln5scale7forward")) << name;
  RecordProperty("milliseconds", std::to_string(header.at("milliseconds").get<double>()));
}

TEST_F(RealCompiler, EqualKeysGiveEqualBytes) { EXPECT_EQ(compile().payload, compile().payload); }

TEST_F(RealCompiler, EveryArchitectureOfTheCompiler) {
  std::vector<std::shared_future<cache::Object>> objects;
  std::vector<Target> targets;
  for (const int architecture : compiler_->architectures()) {
    if (architecture < 75) continue;
    targets.push_back({.architecture = architecture});
    if (architecture >= 90) targets.push_back({.architecture = architecture, .specific = true});
    targets.push_back({.architecture = architecture, .ptx = true});
  }
  for (const Target& target : targets) {
    objects.push_back(pool_.submit(Priority::kPrewarm, [this, &target] {
      return compiler_->compile(scale(), target, kKey, kOptions);
    }));
  }
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const cache::Object object = objects[i].get();
    EXPECT_EQ(validate_object(object, targets[i]), std::nullopt) << targets[i].text();
    if (targets[i].ptx) continue;
    EXPECT_EQ(inspect_cubin(object.payload).architecture, targets[i].architecture);
    const Target wrong{.architecture = targets[i].architecture + 1,
                       .specific = targets[i].specific};
    EXPECT_NE(validate_object(object, wrong), std::nullopt);
  }
}

TEST_F(RealCompiler, PtxHasNoResourcesYet) {
  const cache::Object object = compile({.architecture = 90, .ptx = true});
  EXPECT_EQ(object.header.at("kind"), "ptx");
  EXPECT_TRUE(object.header.at("registers").is_null());
  EXPECT_EQ(object.payload.back(), '\0');
  EXPECT_NE(validate_object(object, {.architecture = 90}), std::nullopt);
  EXPECT_NE(validate_object(object, {.architecture = 90, .specific = true, .ptx = true}),
            std::nullopt);
}

TEST_F(RealCompiler, SpillsAreSeen) {
  use(Templates().add("demo/scale.h", kScaleHeader).add("demo/scale.cuh", R"(#include "demo/scale.h"
namespace torchkiln::scale {
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(1024, 2) forward(Args args) {
  Scalar* p = static_cast<Scalar*>(args.data) + threadIdx.x;
  Scalar a[64];
  for (int i = 0; i < 64; ++i) a[i] = p[i * kBlockSize];
  for (int j = 0; j < args.n; ++j) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = a[(i * 7) % 64] * p[i + j] + a[i];
  }
  for (int i = 0; i < 64; ++i) p[i * kBlockSize] = a[i];
}
}
)"));
  const cache::Object object = compile();
  EXPECT_GT(object.header.at("spill_bytes").get<int>(), 0);
  EXPECT_GT(object.header.at("stack_bytes").get<int>(), 0);
  EXPECT_EQ(object.header.at("registers"), 32);
}

TEST_F(RealCompiler, ErrorNamesTheRightFile) {
  use(Templates()
          .add("demo/scale.cuh", kScale)
          .add("demo/scale.h",
               std::string(kScaleHeader) + "\n__device__ int f() {\n  return zork;\n}\n"));
  const Error error = failure();
  EXPECT_EQ(error.kind(), TORCHKILN_ERROR_COMPILE);
  EXPECT_EQ(std::string(error.what()),
            "demo/scale.forward<float, block_size=256>@sm_90: NVRTC " +
                version_text(nvrtc_.version) +
                " failed. First error: demo/scale.h(7): identifier \"zork\" is undefined.");
  const nlohmann::json& details = error.details();
  EXPECT_NE(details.at("excerpt").get<std::string>().find(">    7 |   return zork;"),
            std::string::npos);
  EXPECT_NE(details.at("log").get<std::string>().find("zork"), std::string::npos);
  EXPECT_EQ(details.at("program"), scale().program());
  EXPECT_EQ(details.at("specialization"), scale().text());
  EXPECT_EQ(details.at("target"), "sm_90");
  EXPECT_EQ(details.at("options").at(0), "--gpu-architecture=sm_90");
  EXPECT_EQ(details.at("files").at("demo/scale.cuh"), kScale);
}

TEST_F(RealCompiler, ArgumentStructsMustAgree) {
  Specialization wrong = scale();
  wrong.args_size = 24;
  try {
    compiler_->compile(wrong, {.architecture = 90}, kKey, kOptions);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("/torchkiln/forward.cu("), std::string::npos);
    EXPECT_NE(error.details().at("excerpt").get<std::string>().find("static_assert"),
              std::string::npos);
  }
}

TEST_F(RealCompiler, UnknownEntryIsACompileError) {
  Specialization wrong = scale();
  wrong.entry = "backward";
  wrong.args_size = 0;
  try {
    compiler_->compile(wrong, {.architecture = 90}, kKey, kOptions);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), TORCHKILN_ERROR_COMPILE);
    EXPECT_NE(std::string(error.what()).find("has no member \"backward\""), std::string::npos);
  }
}

TEST_F(RealCompiler, UnknownArchitectureIsACompileError) {
  try {
    compile({.architecture = 999});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), TORCHKILN_ERROR_COMPILE);
    EXPECT_NE(std::string(error.what()).find("gpu-architecture"), std::string::npos);
  }
}

TEST_F(RealCompiler, WarningsAreKept) {
  use_with("__device__ int warned() { int unused; return 1; }\n");
  const auto warnings = compile().header.at("warnings");
  ASSERT_EQ(warnings.size(), 1U) << warnings;
  EXPECT_TRUE(warnings[0].get<std::string>().starts_with("demo/scale.cuh(1): warning"));
}

// Puts the process into a folder with a header, and names that folder where compilers look.
class TrapFolder {
 public:
  TrapFolder() : before_(std::filesystem::current_path()) {
    folder_.write("trap.h", "struct Trap {};\n");
    std::filesystem::current_path(folder_.path());
    for (const char* name : kVariables) ::setenv(name, folder_.path().c_str(), 1);
  }
  TrapFolder(const TrapFolder&) = delete;
  TrapFolder& operator=(const TrapFolder&) = delete;
  ~TrapFolder() {
    std::filesystem::current_path(before_);
    for (const char* name : kVariables) ::unsetenv(name);
  }
  std::string header() const { return (folder_.path() / "trap.h").string(); }

 private:
  static constexpr const char* kVariables[] = {"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH",
                                               "INCLUDE"};
  testing::TemporaryFolder folder_;
  std::filesystem::path before_;
};

TEST_F(RealCompiler, WorldIsClosed) {
  const TrapFolder trap;
  // Odd spellings, so that the include scan of the template table does not see them.
  for (const std::string& include :
       {std::string("#include <trap.h>\n"), std::string("#  include \"trap.h\"\n"),
        "#  include \"" + trap.header() + "\"\n", "  #include <" + trap.header() + ">\n"}) {
    use_with(include);
    const Error error = failure();
    EXPECT_EQ(error.kind(), TORCHKILN_ERROR_COMPILE) << include;
    EXPECT_NE(std::string(error.what()).find("Templates include nothing but templates"),
              std::string::npos);
    EXPECT_NE(error.details().at("excerpt").get<std::string>().find(">    1 |"), std::string::npos);
  }
}

// The same without our scan: what NVRTC itself would find.
TEST_F(RealCompiler, NvrtcSearchesNoFolder) {
  const TrapFolder trap;
  use_with("#if __has_include(\"trap.h\") || __has_include(<trap.h>)\n#error found\n#endif\n");
  EXPECT_NO_THROW(compile());
}

TEST_F(RealCompiler, LeavesTheStackLimitAlone) {
  rlimit before{}, during{};
  ::getrlimit(RLIMIT_STACK, &before);
  const auto future = pool_.submit(Priority::kInteractive, [&] {
    return compiler_->compile(scale(), {.architecture = 90}, kKey, kOptions);
  });
  bool changed = false;
  while (future.wait_for(std::chrono::milliseconds(1)) != std::future_status::ready) {
    ::getrlimit(RLIMIT_STACK, &during);
    changed |= during.rlim_cur != before.rlim_cur;
  }
  EXPECT_FALSE(changed);
}

// Registers nothing itself, but the fake compile of the test program would be watched if names were not compared.
TEST(ExitHandlers, OnlyTheNamedLibraryIsWatched) {
  const auto here = reinterpret_cast<const void*>(&scale);
  EXPECT_FALSE(watch_exit_handlers("/nowhere/libnvrtc.so", here, [] {}));
}

TEST_F(RealCompiler, ExitHandlersOfNvrtcAreSeen) {
  const auto entry = reinterpret_cast<const void*>(nvrtc_.nvrtcCompileProgram);
  EXPECT_TRUE(watch_exit_handlers(nvrtc_.path, entry, &renew_exit_handler));
  EXPECT_TRUE(watch_exit_handlers(nvrtc_.path, entry, &renew_exit_handler)) << "a second time";
  EXPECT_NO_THROW(compile());
}

// Another file with the same soname, as that of torch and that of a toolkit are; and every other version at hand.
TEST_F(RealCompiler, SeveralLibrariesInOneProcess) {
  const std::filesystem::path original = nvrtc_.path;
  const testing::TemporaryFolder folder;
  for (const std::filesystem::path& file :
       {original, std::filesystem::path(builtins_beside(original))}) {
    std::filesystem::copy_file(file, folder.path() / file.filename());
  }
  std::vector<NvrtcApi> libraries = {load_nvrtc((folder.path() / original.filename()).string())};
  ASSERT_NE(libraries[0].nvrtcCreateProgram, nvrtc_.nvrtcCreateProgram) << "it is the same library";
  for (const NvrtcCandidate& candidate : testing::test_nvrtcs()) {
    libraries.push_back(load_nvrtc(candidate.path));
  }
  const cache::Object expected = compile();
  std::vector<std::shared_future<cache::Object>> objects;
  for (const NvrtcApi& library : libraries) {
    objects.push_back(pool_.submit(Priority::kInteractive, [this, library] {
      return Compiler(library, *sources_).compile(scale(), {.architecture = 90}, kKey, kOptions);
    }));
  }
  for (const auto& object : objects)
    EXPECT_FALSE(validate_object(object.get(), {.architecture = 90}));
  EXPECT_EQ(objects[0].get().payload, expected.payload);
  EXPECT_EQ(compile().payload, expected.payload);
}

// In a fresh process each time: the first compile of a process is the one that NVRTC sets itself up in.
TEST_F(RealCompiler, ExitDuringACompileIsClean) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  for (const int milliseconds : {0, 3, 20, 60}) {
    EXPECT_EXIT(
        {
          auto* pool = new CompilePool(2);  // never destroyed, as the engine's
          for (int i = 0; i < 4; ++i) {
            pool->submit(Priority::kInteractive, [this] {
              compiler_->compile(scale(), {.architecture = 90}, kKey, kOptions);
            });
          }
          std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
          std::exit(7);
        },
        ::testing::ExitedWithCode(7), "");
  }
}

TEST_F(RealCompiler, DamagedObjectsAreRefused) {
  const Target target{.architecture = 90};
  const cache::Object good = compile();
  cache::Object bad = good;
  bad.payload[good.payload.size() / 2] ^= 1;
  EXPECT_EQ(validate_object(bad, target), "the payload does not have the digest in its header");
  bad = good;
  bad.header["lowered_name"] = "_Z5otherv";
  EXPECT_EQ(validate_object(bad, target), "the kernel _Z5otherv is not in the code");
  EXPECT_EQ(validate_object(good, {.architecture = 80}), "the target must be sm_80; got sm_90");
  bad = good;
  bad.header["target"] = "sm_80";
  EXPECT_EQ(validate_object(bad, {.architecture = 80}), "the code must be for sm_80; got sm_90");

  // With a digest that fits, so that the ELF checks stand alone.
  for (std::size_t at = 0; at < std::min<std::size_t>(2048, good.payload.size()); ++at) {
    bad = good;
    bad.payload[at] = static_cast<char>(~bad.payload[at]);
    bad.header["payload_sha256"] = cache::sha256_hex(bad.payload);
    validate_object(bad, target);
    bad.payload.resize(at);
    bad.header["payload_sha256"] = cache::sha256_hex(bad.payload);
    EXPECT_NE(validate_object(bad, target), std::nullopt) << at;
  }
}

cache::Object object_of(const testing::FakeCubin& cubin) {
  cache::Object object;
  object.payload = cubin.bytes();
  object.header = {{"target", "sm_90"},
                   {"kind", "cubin"},
                   {"lowered_name", cubin.kernel},
                   {"payload_sha256", cache::sha256_hex(object.payload)}};
  return object;
}

TEST(ValidateObject, ChecksWhatTheDriverWouldNot) {
  const Target target{.architecture = 90};
  EXPECT_EQ(validate_object(object_of({}), target), std::nullopt);
  EXPECT_EQ(validate_object(object_of({.text = ""}), target), "the kernel _Z7forwardv is empty");
  EXPECT_EQ(validate_object(object_of({.architecture = 80}), target),
            "the code must be for sm_90; got sm_80");
  EXPECT_EQ(validate_object(object_of({.machine = 62}), target),
            "the ELF machine must be 190 (CUDA); got 62");
  for (const char* field : {"target", "kind", "lowered_name", "payload_sha256"}) {
    cache::Object object = object_of({});
    object.header[field] = 7;
    EXPECT_NE(validate_object(object, target), std::nullopt) << field;
    object.header.erase(field);
    EXPECT_NE(validate_object(object, target), std::nullopt) << field;
  }
  EXPECT_NE(validate_object({nlohmann::json(), ""}, target), std::nullopt);
}

}  // namespace
}  // namespace torchkiln::jit
