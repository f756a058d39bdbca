// Kernels that users declare: from the text to the launch, on a fake driver with the real NVRTC.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>

#include "jit/control.h"
#include "jit/deploy/manifest.h"
#include "jit/engine.h"
#include "jit/error.h"
#include "jit/spec/key.h"
#include "tests/jit/support/declared.h"
#include "tests/jit/support/fake_driver.h"
#include "tests/jit/support/files.h"

namespace torchkiln::jit {
namespace {

using testing::FakeDriver;

constexpr char kSource[] = R"(#include "common/types.h"
#include "step.h"
namespace mine {
template <class Scalar, bool kTwice, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) scale(const Scalar* __restrict__ x, Scalar* out, const bool* mask,
                                                    long n, const float factor) {
  const long i = long(blockIdx.x) * kBlockSize + threadIdx.x;
  if (i < n && mask[i]) torchkiln::store(out[i], torchkiln::load(x[i]) * factor * (kTwice ? 2 : STEP));
}
}  // namespace mine
)";

// Argument order and alignment of the packed parameters.
struct Packed {
  const void* x;
  void* out;
  const void* mask;
  std::int64_t n;
  float factor;
};
constexpr std::uint32_t kPackedBytes = 36;

// The declaration of mine::scale, to be changed by tests.
struct Declared {
  const char* operators[1] = {"scale"};
  std::int64_t types[3] = {TORCHKILN_FLOAT, TORCHKILN_HALF, TORCHKILN_BFLOAT16};
  std::int64_t flags[2] = {0, 1};
  std::int64_t blocks[3] = {64, 128, 256};
  std::int64_t defaults[1] = {128};
  torchkiln_param params[3] = {{"Scalar", TORCHKILN_PARAM_TYPE, 0, types, 3, 0},
                               {"twice", TORCHKILN_PARAM_BOOL, 0, flags, 2, 0},
                               {"block_size", TORCHKILN_PARAM_INT, 1, blocks, 3, 0}};
  torchkiln_size sizes[1] = {{"n", TORCHKILN_BUCKET_POW2}};
  torchkiln_argument arguments[5] = {{"x", TORCHKILN_CONST_POINTER, 0, 0},
                                     {"out", TORCHKILN_POINTER, 0, 0},
                                     {"mask", TORCHKILN_CONST_POINTER, TORCHKILN_BOOL, -1},
                                     {"n", TORCHKILN_VALUE, TORCHKILN_I64, -1},
                                     {"factor", TORCHKILN_VALUE, TORCHKILN_FLOAT, -1}};
  torchkiln_geometry geometry = {{4, 1, 1}, {0, 1, 1}, 0};  // block.x 0: the tunable
  torchkiln_declaration declaration{};

  Declared() {
    declaration =
        testing::declare("user/scale.cuh", "mine::scale", operators, params, sizes, defaults);
    declaration.args_size = kPackedBytes;
    declaration.min_architecture = 75;
    declaration.context = this;
    declaration.geometry = [](const torchkiln_problem* p, const std::int64_t* tunables,
                              torchkiln_geometry* out) {
      *out = static_cast<const Declared*>(p->context)->geometry;
      if (out->block[0] == 0) out->block[0] = static_cast<std::uint32_t>(tunables[0]);
    };
    declaration.arguments = arguments;
    declaration.n_arguments = 5;
    declaration.module = "acme.kernels";
  }
};

class UserKernel : public ::testing::Test {
 protected:
  void SetUp() override {
    if (testing::test_nvrtcs().empty()) GTEST_SKIP() << "no NVRTC: set TORCHKILN_NVRTC_PATH";
    engine = make_engine();
    add_files(*engine);
  }

  std::unique_ptr<Engine> make_engine() {
    Settings settings = Settings::from_environment();
    settings.cache_dir = folder_.path().string();
    settings.compile_jobs = 2;
    return std::make_unique<Engine>(Engine::Parts{.settings = settings,
                                                  .templates = embedded_files(),
                                                  .open_driver = [] { return FakeDriver::api(); },
                                                  .compilers = {}});
  }
  static void add_files(Engine& to, const std::string& source = kSource) {
    to.add_template("user/scale.cuh", source);
    to.add_template("user/step.h", "#pragma once\n#define STEP 1\n");
  }

  static void launch(Engine& on, Kernel& kernel, std::int64_t type = TORCHKILN_FLOAT,
                     int device = 0) {
    const Packed args = {nullptr, nullptr, nullptr, 5, 0.5F};
    const std::int64_t statics[] = {type, 1};
    const std::int64_t sizes[] = {5};
    on.run(kernel, {.struct_size = sizeof(torchkiln_launch),
                    .device = device,
                    .stream = nullptr,
                    .statics = statics,
                    .sizes = sizes,
                    .args = &args,
                    .buffers = nullptr,
                    .n_buffers = 0,
                    .allocator = nullptr});
  }

  static Error failure_of(const std::function<void()>& f) {
    try {
      f();
    } catch (const Error& e) {
      return e;
    }
    ADD_FAILURE() << "no error";
    return {TORCHKILN_ERROR_NONE, ""};
  }
  // Of a declaration that must be refused because of `argument`, with `sentence` in its text.
  void expect_refused(const char* argument, const std::string& sentence) {
    const Error e = failure_of([&] { engine->declare(declared.declaration); });
    EXPECT_EQ(e.kind(), TORCHKILN_ERROR_VALUE);
    EXPECT_EQ(e.argument(), argument) << e.what();
    EXPECT_NE(std::string(e.what()).find(sentence), std::string::npos) << e.what();
  }
  // Of a kernel whose program must not compile, with `sentence` in the first error.
  void expect_not_compiled(const std::string& sentence) {
    Kernel* kernel = engine->declare(declared.declaration);
    const Error e = failure_of([&] { launch(*engine, *kernel); });
    EXPECT_EQ(e.kind(), TORCHKILN_ERROR_COMPILE);
    EXPECT_NE(std::string(e.what()).find(sentence), std::string::npos) << e.what();
  }

  FakeDriver driver;
  Declared declared;
  std::unique_ptr<Engine> engine;

 private:
  testing::TemporaryFolder folder_;
};

TEST_F(UserKernel, IsLaunchedWithPackedParameters) {
  driver.args_bytes = 64;
  Kernel* kernel = engine->declare(declared.declaration);
  launch(*engine, *kernel);
  launch(*engine, *kernel, TORCHKILN_BFLOAT16);
  const auto launches = driver.launches();
  ASSERT_EQ(launches.size(), 2u);
  EXPECT_EQ(launches[0].grid[0], 4u);
  EXPECT_EQ(launches[0].block[0], 128u);
  const Packed expected = {nullptr, nullptr, nullptr, 5, 0.5F};
  EXPECT_EQ(launches[0].args, std::string(reinterpret_cast<const char*>(&expected), kPackedBytes));
  EXPECT_NE(launches[0].kernel.find("4mine5scale"), std::string::npos) << launches[0].kernel;
  EXPECT_NE(launches[1].kernel, launches[0].kernel);
}

TEST_F(UserKernel, IsFoundAgainAndByEveryField) {
  launch(*engine, *engine->declare(declared.declaration));
  const auto second = make_engine();
  add_files(*second);
  launch(*second, *second->declare(declared.declaration));
  EXPECT_EQ(second->statistics().compiles.load(), 0u);

  // Another signature is another program, though text and template arguments are the same.
  const std::int64_t statics[] = {TORCHKILN_FLOAT, 1}, tunables[] = {128};
  const Specialization s = specialize(*engine->kernels().back(), statics, tunables);
  ASSERT_EQ(s.parameters.size(), 5u);
  const auto key = [](const Specialization& of) {
    return cache_key(of, {.architecture = 90}, "digest", {});
  };
  Specialization other = s;
  other.parameters[2].type = TORCHKILN_U8;
  EXPECT_NE(key(other), key(s));
  other = s;
  other.parameters[0].passing = TORCHKILN_POINTER;
  EXPECT_NE(key(other), key(s));
  EXPECT_EQ(Specialization::from_json(s.to_json()), s);
  EXPECT_EQ(s.text(), "user/scale.mine::scale<float, twice=true, block_size=128>");
  EXPECT_EQ(s.name_expression(), "mine::scale<float, true, 128>");
}

TEST_F(UserKernel, EditedHeaderMisses) {
  launch(*engine, *engine->declare(declared.declaration));
  const auto second = make_engine();
  second->add_template("user/scale.cuh", kSource);
  second->add_template("user/step.h", "#define STEP 3\n");
  launch(*second, *second->declare(declared.declaration));
  EXPECT_EQ(second->statistics().compiles.load(), 1u);
}

TEST_F(UserKernel, ManifestTextsLeadBack) {
  Kernel* kernel = engine->declare(declared.declaration);
  const auto kernels = engine->kernels();
  for (const Specialization& s : expand(*kernel, {}))
    EXPECT_EQ(parse_specialization(s.text(), kernels), s);
  EXPECT_EQ(expand(*kernel, {}).size(), 6u);
  const std::string unknown =
      failure_of([&] { parse_specialization("user/other.forward<float>", kernels); }).what();
  EXPECT_NE(unknown.find("--import MODULE"), std::string::npos) << unknown;
}

TEST_F(UserKernel, ToolsTreatItLikeAnyOther) {
  engine->declare(declared.declaration);
  const nlohmann::json scale = {{"operators", {"scale"}}, {"dtypes", {"float16"}}};
  const auto specs = control(*engine, "expand", scale).at("specializations");
  ASSERT_EQ(specs.size(), 2u);
  const nlohmann::json request = {{"specialization", specs[0]}, {"target", "sm_80"}};
  EXPECT_EQ(control(*engine, "compile", request).at("status"), "compiled");
  EXPECT_EQ(control(*engine, "compile", request).at("status"), "hit");
  const auto rows = control(*engine, "explain",
                            {{"operator", "scale"},
                             {"target", "sm_80"},
                             {"values", {{"twice", "false"}, {"n", "100"}}}})
                        .at("kernels");
  const auto layer = [&](const std::string& scalar) {
    for (const auto& row : rows) {
      if (row.at("statics").at("Scalar") == scalar) return row.at("layer").get<std::string>();
    }
    return std::string("no such row");
  };
  EXPECT_EQ(layer("half"), "memory");
  EXPECT_EQ(layer("float"), "compile");

  const testing::TemporaryFolder out;
  const auto dumped = control(*engine, "dump",
                              {{"specialization", specs[0]},
                               {"target", "sm_80"},
                               {"folder", out.path().string()},
                               {"what", {"source", "ptx"}}});
  const std::filesystem::path folder = dumped.at("folder").get<std::string>();
  EXPECT_TRUE(std::filesystem::exists(folder / "user/scale.cuh"));
  EXPECT_TRUE(std::filesystem::exists(folder / "user/step.h"));
  EXPECT_TRUE(std::filesystem::exists(folder / "common/types.h"));
}

TEST_F(UserKernel, WhatIsMissingNamesTheModule) {
  control(*engine, "seal", {{"mode", "forbid"}});
  Kernel* kernel = engine->declare(declared.declaration);
  const Error e = failure_of([&] { launch(*engine, *kernel, TORCHKILN_HALF); });
  EXPECT_EQ(e.kind(), TORCHKILN_ERROR_MISSING);
  EXPECT_EQ(e.details().at("command"),
            "torchkiln warm --import acme.kernels --ops scale --dtypes float16 --arch sm_90");
}

TEST_F(UserKernel, RunsOnTheDeviceOfTheLaunchWhateverIsCurrent) {
  driver.devices.resize(2);
  driver.needs_context = true;
  Kernel* kernel = engine->declare(declared.declaration);
  engine->driver().attach(0);
  const auto current = [&] {
    CudaContext context = nullptr;
    FakeDriver::api().cuCtxGetCurrent(&context);
    return context;
  };
  const CudaContext before = current();
  launch(*engine, *kernel, TORCHKILN_FLOAT, 1);
  EXPECT_EQ(current(), before);
  const auto calls = driver.calls();
  const auto at = [&](const char* name) { return std::find(calls.rbegin(), calls.rend(), name); };
  EXPECT_GT(at("cuLaunchKernel"), at("cuCtxSetCurrent"));  // given back after the launch
  EXPECT_EQ(driver.count("cuCtxSetCurrent"), 3);
}

// ---- the signature ----------------------------------------------------------------------------------------------

TEST_F(UserKernel, WrongPointeeNamesTheArgument) {
  declared.arguments[2].type = TORCHKILN_I32;
  expect_not_compiled(
      "parameter 3 of mine::scale must be const int* or const void*, as args says of mask");
}

TEST_F(UserKernel, InputThatTheKernelMayWriteNamesTheArgument) {
  declared.arguments[1].passing = TORCHKILN_CONST_POINTER;
  expect_not_compiled(
      "parameter 2 of mine::scale must be const float* or const void*, as args says of out");
}

TEST_F(UserKernel, WrongScalarNamesTheArgument) {
  declared.arguments[4].type = TORCHKILN_I32;
  expect_not_compiled("parameter 5 of mine::scale must be int, as args says of factor");
}

TEST_F(UserKernel, WrongCountNamesBothNumbers) {
  declared.declaration.n_arguments = 4;
  declared.declaration.args_size = 32;
  expect_not_compiled("args must be the parameters of mine::scale; got 4 args");
}

TEST_F(UserKernel, StructArgumentsAreAssertedBySize) {
  declared.declaration.arguments = nullptr;
  declared.declaration.n_arguments = 0;
  engine->add_template("user/scale.cuh", R"(
    struct Args { const float* x; long n; };
    template <class T, bool b, int k> __global__ void run(Args args) {})");
  declared.declaration.entry = "run";
  declared.types[1] = declared.types[2] = TORCHKILN_DOUBLE;
  declared.declaration.args_size = 24;
  expect_not_compiled("disagree");
}

// ---- what is refused when it is declared -------------------------------------------------------------------------

TEST_F(UserKernel, MissingEntryTellsWhatThereIs) {
  declared.declaration.entry = "mine::forward";
  expect_refused("entry",
                 "scale: entry must be a __global__ function of the source; got mine::forward. The "
                 "source has scale");
}

TEST_F(UserKernel, BadNamesAreRefused) {
  declared.declaration.entry = "scale(";
  expect_refused("entry", "be a C++ name such as forward or mine::forward");
  declared.declaration.entry = "mine::scale";
  declared.params[2].name = "block size";
  expect_refused("tunables", "letters, digits and _; got block size");
  declared.params[2].name = "x";
  expect_refused("args", "each name once; got x");
}

TEST_F(UserKernel, NameOfAnOperatorIsRefused) {
  Declared embedded;
  embedded.declaration.path = "detection/box_iou.cuh";
  embedded.declaration.arguments = nullptr;
  engine->declare(embedded.declaration);
  expect_refused("name", "not be that of an operator of torchkiln; got scale");
}

TEST_F(UserKernel, OtherParametersUnderTheSameNameAreRefused) {
  engine->declare(declared.declaration);
  engine->declare(declared.declaration);  // a module that is loaded twice
  Declared other;
  other.params[1].name = "thrice";
  const Error e = failure_of([&] { engine->declare(other.declaration); });
  EXPECT_EQ(e.argument(), "name") << e.what();
}

TEST_F(UserKernel, HalfNeedsItsHeader) {
  engine->add_template("user/scale.cuh",
                       "template <class T, bool b, int k> __global__ void scale(const T* x) {}");
  declared.declaration.entry = "scale";
  expect_refused("source", "include \"common/types.h\"");
}

TEST_F(UserKernel, WrongArgumentsOfTheInterfaceAreOurBug) {
  const auto refused = [&] {
    return failure_of([&] { engine->declare(declared.declaration); }).kind() ==
           TORCHKILN_ERROR_INTERNAL;
  };
  declared.declaration.args_size = 40;
  EXPECT_TRUE(refused());
  declared.declaration.args_size = kPackedBytes;
  declared.arguments[3].type = TORCHKILN_HALF;
  EXPECT_TRUE(refused());
  declared.arguments[3] = {"n", TORCHKILN_VALUE, 0, 0};
  EXPECT_TRUE(refused());
  declared.arguments[3] = {"n", TORCHKILN_POINTER, 0, 1};  // no type parameter
  EXPECT_TRUE(refused());
}

// ---- files -------------------------------------------------------------------------------------------------------

TEST_F(UserKernel, FilesStayOnceAKernelIsDeclared) {
  engine->add_template("user/scale.cuh", "another text");
  engine->add_template("user/scale.cuh", kSource);
  engine->declare(declared.declaration);
  engine->add_template("user/scale.cuh", kSource);
  for (const char* path : {"user/scale.cuh", "user/step.h"}) {
    const Error e = failure_of([&] { engine->add_template(path, "another text"); });
    EXPECT_EQ(e.kind(), TORCHKILN_ERROR_VALUE);
    EXPECT_NE(std::string(e.what()).find("must stay the same"), std::string::npos) << e.what();
  }
}

TEST_F(UserKernel, PathsStayBelowUser) {
  for (const char* path : {"scale.cuh", "user/", "user/../common/types.h", "user//a.h",
                           "user/a b.h", "/user/a.h", "common/types.h", "user/a\".h"}) {
    EXPECT_EQ(failure_of([&] { engine->add_template(path, ""); }).kind(), TORCHKILN_ERROR_VALUE)
        << path;
  }
}

TEST_F(UserKernel, ForeignIncludesTellWhatThereIs) {
  for (const char* line : {"#include <cuda_fp16.h>", "  #  include \"none.h\"",
                           "#include \"/etc/passwd\"", "#include NAME"}) {
    engine->add_template("user/scale.cuh", std::string(line) + "\n" + kSource);
    const Error e = failure_of([&] { engine->declare(declared.declaration); });
    EXPECT_EQ(e.argument(), "headers") << line;
    for (const char* part : {"user/scale.cuh(1)", "common/types.h"})
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST_F(UserKernel, IncludesAreRelativeFirst) {
  engine->add_template("user/scale.cuh", "#include \"parts/a.h\"\n" + std::string(kSource));
  engine->add_template("user/parts/a.h", "#include \"b.h\"\n#include \"user/step.h\"\n");
  engine->add_template("user/parts/b.h", "#include \"../step.h\"\n");
  launch(*engine, *engine->declare(declared.declaration));
  EXPECT_EQ(engine->statistics().compiles.load(), 1u);
}

TEST_F(UserKernel, OneNameMeansOneFile) {
  engine->add_template("user/scale.cuh", "#include \"parts/a.h\"\n" + std::string(kSource));
  engine->add_template("user/parts/a.h", "#include \"step.h\"\n");
  engine->add_template("user/parts/step.h", "");
  expect_refused("template", "\"step.h\" must mean one file");
}

// ---- limits ------------------------------------------------------------------------------------------------------

TEST_F(UserKernel, LimitsAreToldBeforeTheDriverIsAsked) {
  driver.kernel_attributes = {{kFunctionMaxThreadsPerBlock, 512}, {kFunctionSharedBytes, 1024}};
  Kernel* kernel = engine->declare(declared.declaration);
  const auto refused = [&](const torchkiln_geometry& geometry, const char* argument,
                           const char* sentence) {
    declared.geometry = geometry;
    const Error e = failure_of([&] { launch(*engine, *kernel); });
    EXPECT_EQ(e.kind(), TORCHKILN_ERROR_VALUE);
    EXPECT_EQ(e.argument(), argument);
    EXPECT_NE(std::string(e.what()).find(sentence), std::string::npos) << e.what();
  };
  refused({{1, 1, 1}, {1024, 1, 1}, 0}, "block", "at most 512 threads");
  refused({{1, 1, 1}, {32, 32, 1}, 0}, "block", "got 1024 (32x32x1)");
  refused({{1, 1, 1}, {1, 1, 65}, 0}, "block", "1024x1024x64 threads; got 1x1x65");
  refused({{1, 65536, 1}, {32, 1, 1}, 0}, "grid", "got 1x65536x1");
  refused({{1, 1, 1}, {32, 1, 1}, 232448}, "shared", "at most 231424 bytes");
  EXPECT_EQ(driver.count("cuLaunchKernel"), 0);
  declared.geometry = {{1, 1, 1}, {512, 1, 1}, 231424};
  launch(*engine, *kernel);
  EXPECT_EQ(driver.count("cuLaunchKernel"), 1);
}

}  // namespace
}  // namespace torchkiln::jit
