// Recording, bundles, the mode of compiling and substitutes: whole engines on a fake driver with the real NVRTC.
//
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "cache/bundle.h"
#include "cache/fault.h"
#include "cache/replace_file.h"
#include "cache/sha256.h"
#include "jit/control.h"
#include "jit/deploy/bundles.h"
#include "jit/deploy/manifest.h"
#include "jit/deploy/recorder.h"
#include "jit/engine.h"
#include "jit/error.h"
#include "tests/jit/support/declared.h"
#include "tests/jit/support/fake_driver.h"
#include "tests/jit/support/files.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
using testing::FakeDriver;
namespace fs = std::filesystem;

// The factor is a layer constant: compiled in, or with 0 taken from the arguments.
constexpr char kSource[] = R"(#pragma once
namespace torchkiln { using half = unsigned short; }
namespace torchkiln::scale {
struct Args { void* data; long long n; long long factor; };
template <class Scalar, int kFactor, int kBlockSize>
__global__ void forward(Args args) {
  const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
  const Scalar factor = kFactor != 0 ? kFactor : args.factor;
  if (i < args.n) static_cast<Scalar*>(args.data)[i] *= factor;
}
}  // namespace torchkiln::scale
)";

struct Args {
  void* data;
  std::int64_t n, factor;
};

struct Declared {
  const char* operators[1] = {"scale"};
  std::int64_t types[2] = {TORCHKILN_FLOAT, TORCHKILN_DOUBLE};
  std::int64_t factors[1] = {0};
  std::int64_t blocks[3] = {64, 128, 256};
  std::int64_t defaults[2] = {128, 256};
  torchkiln_param params[3] = {{"scalar", TORCHKILN_PARAM_TYPE, 0, types, 2, 0},
                               {"factor", TORCHKILN_PARAM_INT, 0, factors, 1, 1},
                               {"block_size", TORCHKILN_PARAM_INT, 1, blocks, 3, 0}};
  torchkiln_size sizes[1] = {{"n", TORCHKILN_BUCKET_POW2}};
  torchkiln_declaration declaration{};

  Declared() {
    declaration = testing::declare("demo/scale.cuh", "forward", operators, params, sizes, defaults);
    declaration.args_size = sizeof(Args);
    declaration.min_architecture = 75;
    declaration.choose = [](const torchkiln_problem* p) { return p->sizes[0] > 1000 ? 1u : 0u; };
    // The exact program takes a grid of its own, to tell which statics the geometry got.
    declaration.geometry = [](const torchkiln_problem* p, const std::int64_t* t,
                              torchkiln_geometry* g) {
      const auto factor = static_cast<std::uint32_t>(p->statics[1]);
      *g = {{1 + factor, 1, 1}, {static_cast<std::uint32_t>(t[0]), 1, 1}, 0};
    };
  }
};

// One process: an engine with settings of its own. No two share a cache folder unless told to.
class World {
 public:
  explicit World(const Settings& settings = {}, const std::string& source = kSource,
                 bool has_compiler = true)
      : source_(source), digest_(cache::sha256_hex(source_)) {
    Settings own = settings;
    own.nvrtc_path = testing::variable("TORCHKILN_NVRTC_PATH");
    if (own.cache_dir.empty()) own.cache_dir = (folder_.path() / "cache").string();
    own.compile_jobs = 2;
    table_.push_back({"demo/scale.cuh", source_.c_str(), source_.size(), digest_.c_str()});
    CompilerSource none;
    if (!has_compiler) {
      none.identity = [] { return std::string(); };
      none.open = []() -> std::shared_ptr<const Compiler> {
        throw Error(TORCHKILN_ERROR_COMPILER, "there is no NVRTC");
      };
    }
    engine = std::make_unique<Engine>(Engine::Parts{.settings = own,
                                                    .templates = table_,
                                                    .open_driver = [] { return FakeDriver::api(); },
                                                    .compilers = none});
    kernel = engine->declare(declared_.declaration);
  }

  void launch(std::int64_t n, std::int64_t factor = 0, std::int64_t type = TORCHKILN_FLOAT) {
    const Args args{nullptr, n, factor};
    const std::int64_t statics[] = {type, factor};
    const std::int64_t sizes[] = {n};
    torchkiln_launch l{};
    l.struct_size = sizeof(l);
    l.statics = statics;
    l.sizes = sizes;
    l.args = &args;
    engine->run(*kernel, l);
  }

  // Compiles generic variants and writes them.
  void bundle(const fs::path& out, const std::vector<std::string>& archs,
              const std::vector<std::string>& dtypes = {"float32"}) {
    const json found = control(*engine, "expand", {{"dtypes", dtypes}});
    json items = json::array();
    for (const json& s : found.at("specializations")) {
      for (const std::string& arch : archs) {
        control(*engine, "compile",
                {{"specialization", s}, {"target", arch}, {"own_compiler", true}});
        items.push_back({{"specialization", s}, {"target", arch}});
      }
    }
    control(*engine, "bundle.create", {{"out", out.string()}, {"items", items}});
  }

  json verify(const fs::path& bundle, json request = json::object()) {
    request["path"] = bundle.string();
    return control(*engine, "bundle.verify", request);
  }
  const Statistics& statistics() { return engine->statistics(); }

  std::unique_ptr<Engine> engine;
  Kernel* kernel = nullptr;

 private:
  std::string source_, digest_;
  testing::TemporaryFolder folder_;
  std::vector<EmbeddedFile> table_;
  Declared declared_;
};

std::string bytes_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void put(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

class DeployTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (testing::test_nvrtcs().empty()) GTEST_SKIP() << "no NVRTC: set TORCHKILN_NVRTC_PATH";
  }

  // A program that has only the bundle: no cache folder, no compiler, no permission to compile.
  Settings sealed(const fs::path& bundle) const {
    Settings s;
    s.jit = "forbid";
    s.bundles = {bundle.string()};
    s.cache_dir = "/proc/torchkiln";
    return s;
  }

  FakeDriver driver;
  testing::TemporaryFolder folder;
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

bool mentions(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// ---- bundles -----------------------------------------------------------------------------------------------------

TEST_F(DeployTest, BundleServesWithoutCompilerAndCache) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  World runtime(sealed(path), kSource, /*has_compiler=*/false);
  runtime.launch(100);
  runtime.launch(5000);
  EXPECT_EQ(driver.launches().size(), 2u);
  EXPECT_EQ(runtime.statistics().hits_bundle.load(), 2u);
  EXPECT_EQ(runtime.statistics().nvrtc_opened.load(), 0u);
  EXPECT_EQ(runtime.statistics().generic_variants.load(), 0u);
}

TEST_F(DeployTest, BundleIsTheSameBytesEachTime) {
  const fs::path first = folder.path() / "first.bundle", second = folder.path() / "second.bundle";
  World().bundle(first, {"sm_80", "sm_90"}, {"float32", "float64"});
  World().bundle(second, {"sm_90", "sm_80"}, {"float64", "float32"});
  EXPECT_GT(bytes_of(first).size(), 8 * 1024u);
  EXPECT_EQ(bytes_of(first), bytes_of(second));
  struct stat status{};
  ASSERT_EQ(stat(first.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0644u);
}

TEST_F(DeployTest, CodeIsHandedOverWhereItLies) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  World runtime(sealed(path));
  const auto spec = expand(*runtime.kernel, {}).front();
  const auto found = runtime.engine->objects().find(spec, {.architecture = 90});
  ASSERT_TRUE(found);
  EXPECT_EQ(found->layer, Layer::kBundle);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(found->object->payload.data()) % 64, 0u);
  const auto& bundle = runtime.engine->objects().bundles().list().front();
  std::string why;
  bool inside = false;
  for (std::size_t i = 0; i < bundle->size(); ++i) {
    const auto item = bundle->item(i, why);
    ASSERT_TRUE(item) << why;
    inside |= item->object.payload.data() == found->object->payload.data();
  }
  EXPECT_TRUE(inside);
}

TEST_F(DeployTest, BundleMadeByAnotherCompilerServesUnlessExactIsAsked) {
  const fs::path path = folder.path() / "app.bundle";
  World maker;
  maker.bundle(path, {"sm_90"});
  // The same code under another compiler's name.
  const auto original = open_bundle(path.string());
  cache::BundleObjects renamed;
  for (std::size_t i = 0; i < original->size(); ++i) {
    std::string why;
    const auto item = original->item(i, why);
    json header = item->object.header;
    header["compiler"] = "nvrtc-12.4-0123456789abcdef-01234567";
    renamed[{item->key, header["compiler"]}] = cache::encode_object(header, item->object.payload);
  }
  ASSERT_EQ(cache::replace_file(path, cache::encode_bundle(renamed)), 0);

  World any(sealed(path));
  any.launch(100);
  EXPECT_EQ(any.statistics().hits_bundle.load(), 1u);
  Settings exact = sealed(path);
  exact.compiler_policy = "exact";
  World strict(exact);
  EXPECT_EQ(failure_of([&] { strict.launch(100); }).kind(), TORCHKILN_ERROR_MISSING);
}

TEST_F(DeployTest, MergeHoldsBothAndMayReplaceAnInput) {
  const fs::path a = folder.path() / "a.bundle", b = folder.path() / "b.bundle";
  World world;
  world.bundle(a, {"sm_80"});
  world.bundle(b, {"sm_90"});
  const fs::path both = folder.path() / "both.bundle";
  world.bundle(both, {"sm_80", "sm_90"});
  control(*world.engine, "bundle.merge",
          {{"out", a.string()}, {"inputs", {b.string(), a.string()}}});
  EXPECT_EQ(bytes_of(a), bytes_of(both));
}

TEST_F(DeployTest, VerifyProvesCoverage) {
  const fs::path path = folder.path() / "app.bundle";
  World world;
  world.bundle(path, {"sm_80", "sm_90"});
  json reply = world.verify(path);
  EXPECT_EQ(reply.at("objects"), 4);
  EXPECT_EQ(reply.at("architectures"), json({"sm_80", "sm_90"}));
  EXPECT_TRUE(reply.at("missing").empty()) << reply;
  EXPECT_TRUE(reply.at("problems").empty()) << reply;

  EXPECT_EQ(world.verify(path, {{"architectures", {"sm_90", "sm_120"}}}).at("missing").size(), 2u);
  const fs::path manifest = folder.path() / "app.json";
  put(manifest, manifest_text({"demo/scale.forward<float, factor=0, block_size=128>",
                               "demo/scale.forward<double, factor=0, block_size=128>"}));
  reply = world.verify(path, {{"manifest", manifest.string()}});
  EXPECT_EQ(reply.at("missing"),
            json({{{"specialization", "demo/scale.forward<double, factor=0, block_size=128>"},
                   {"arch", "sm_80"}},
                  {{"specialization", "demo/scale.forward<double, factor=0, block_size=128>"},
                   {"arch", "sm_90"}}}));

  // Made by a version of the library whose template differs.
  World newer({}, std::string(kSource) + "// edited\n");
  reply = newer.verify(path);
  EXPECT_EQ(reply.at("problems").size(), 4u);
  EXPECT_TRUE(mentions(reply.dump(), "other sources")) << reply;
}

TEST_F(DeployTest, VerifyFindsCodeForAnotherArchitecture) {
  const fs::path path = folder.path() / "app.bundle";
  World world;
  world.bundle(path, {"sm_80", "sm_90"});
  const auto good = open_bundle(path.string());
  std::string why;
  std::vector<cache::Bundle::Item> items;
  for (std::size_t i = 0; i < good->size(); ++i) items.push_back(*good->item(i, why));
  // The code of each under the header of one for the other architecture.
  cache::BundleObjects swapped;
  for (const auto& item : items) {
    const auto other = std::find_if(items.begin(), items.end(), [&](const auto& candidate) {
      return candidate.object.header.at("target") != item.object.header.at("target");
    });
    json header = item.object.header;
    header["payload_sha256"] = cache::sha256_hex(other->object.payload);
    header["lowered_name"] = other->object.header["lowered_name"];
    swapped[{item.key, header["compiler"]}] = cache::encode_object(header, other->object.payload);
  }
  const fs::path bad = folder.path() / "bad.bundle";
  ASSERT_EQ(cache::replace_file(bad, cache::encode_bundle(swapped)), 0);
  const json reply = world.verify(bad);
  EXPECT_EQ(reply.at("problems").size(), 4u);
  EXPECT_TRUE(mentions(reply.dump(), "the code must be for sm_")) << reply;
  World runtime(sealed(bad));
  EXPECT_EQ(failure_of([&] { runtime.launch(100); }).kind(), TORCHKILN_ERROR_MISSING);
}

// Every byte of a bundle, damaged one at a time (some at random beyond the first objects): never a crash, never other
// code than the right one, and the tools say what is wrong.
TEST_F(DeployTest, DamageIsAMiss) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  const std::string good = bytes_of(path);
  const auto spec = expand(*World().kernel, {}).front();
  const auto code_in = [&](const fs::path& file) -> std::string {
    World runtime(sealed(file));
    const auto found = runtime.engine->objects().find(spec, {.architecture = 90});
    return found ? std::string(found->object->payload) : "";
  };
  const std::string right = code_in(path);
  ASSERT_FALSE(right.empty());
  const fs::path damaged = folder.path() / "damaged.bundle";
  std::size_t misses = 0;
  std::vector<std::size_t> places;
  for (std::size_t at = 0; at < 256; at += 5) places.push_back(at);
  for (std::size_t at = 256; at < good.size(); at += 397) places.push_back(at);
  for (const std::size_t at : places) {
    std::string bytes = good;
    bytes[at] = static_cast<char>(bytes[at] ^ (1 << (at % 8)));
    put(damaged, bytes);
    const std::string code = code_in(damaged);
    misses += code.empty() ? 1 : 0;
    EXPECT_TRUE(code.empty() || code == right) << at;
  }
  EXPECT_GT(misses, 50u);
  for (const std::size_t length :
       {std::size_t{0}, std::size_t{63}, std::size_t{64}, good.size() / 2, good.size() - 1}) {
    put(damaged, good.substr(0, length));
    EXPECT_EQ(code_in(damaged), "") << length;
  }
  put(damaged, good + '\0');
  EXPECT_EQ(code_in(damaged), "");
}

TEST_F(DeployTest, DamagedObjectIsCompiledAgainWhereThatIsAllowed) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  std::string bytes = bytes_of(path);
  bytes[bytes.size() - 200] ^= 1;
  bytes[bytes.size() / 2] ^= 1;
  put(path, bytes);
  Settings settings;
  settings.bundles = {path.string()};
  World world(settings);
  EXPECT_GE(world.verify(path).at("problems").size(), 1u);
  world.launch(100);
  world.launch(5000);
  EXPECT_EQ(driver.launches().size(), 2u);
  EXPECT_GE(world.statistics().compiles.load(), 1u);
}

TEST_F(DeployTest, FilesThatOthersCanWriteAreRefused) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  fs::permissions(path, fs::perms::others_write, fs::perm_options::add);
  World runtime(sealed(path));
  EXPECT_TRUE(runtime.engine->objects().bundles().list().empty());
  ASSERT_EQ(runtime.engine->objects().bundles().refused().size(), 1u);
  EXPECT_TRUE(mentions(runtime.engine->objects().bundles().refused()[0].why, "others can change"));
}

TEST_F(DeployTest, FolderOfBundlesAndMissingFiles) {
  World world;
  fs::create_directory(folder.path() / "bundles");
  world.bundle(folder.path() / "bundles" / "b.bundle", {"sm_90"});
  world.bundle(folder.path() / "bundles" / "a.bundle", {"sm_80"});
  Settings settings;
  settings.bundles = {(folder.path() / "bundles").string(), "/nowhere/x.bundle"};
  World runtime(settings);
  const json reply = control(*runtime.engine, "bundles", json::object());
  ASSERT_EQ(reply.at("bundles").size(), 2u);
  EXPECT_TRUE(mentions(reply["bundles"][0]["path"], "a.bundle"));
  EXPECT_EQ(reply.at("refused").size(), 1u);
}

TEST_F(DeployTest, PackagesBringBundlesByEntryPoint) {
  folder.write("acme-1.0.dist-info/entry_points.txt",
               "[console_scripts]\nx = acme:main\n\n[torchkiln.bundles]\nacme = acme.kernels\n"
               "evil = ../../etc\n");
  folder.write("acme/kernels/sm.bundle", "x");
  folder.write("acme/kernels/readme.txt", "x");
  folder.write("other/not.bundle", "x");
  const std::vector<std::string> sites = {folder.path().string(), "/nowhere"};
  EXPECT_EQ(installed_bundles(sites),
            std::vector<std::string>{(folder.path() / "acme/kernels/sm.bundle").string()});
}

// ---- the mode ----------------------------------------------------------------------------------------------------

TEST_F(DeployTest, MissingExactVariantRunsTheGenericOne) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  World runtime(sealed(path), kSource, /*has_compiler=*/false);
  runtime.launch(100, /*factor=*/3);
  runtime.launch(100, /*factor=*/3);
  ASSERT_EQ(driver.launches().size(), 2u);
  EXPECT_EQ(driver.launches()[0].grid[0], 1u);  // of the generic program: factor 0
  EXPECT_EQ(runtime.statistics().generic_variants.load(), 1u);
  EXPECT_EQ(runtime.statistics().compiles.load(), 0u);
}

TEST_F(DeployTest, WhereCompilingIsAllowedTheExactVariantRuns) {
  World world;
  world.launch(100, /*factor=*/3);
  EXPECT_EQ(driver.launches().back().grid[0], 4u);
  EXPECT_EQ(world.statistics().generic_variants.load(), 0u);
}

TEST_F(DeployTest, WithoutACompilerTheGenericVariantStandsInToo) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  Settings settings = sealed(path);
  settings.jit = "allow";
  World runtime(settings, kSource, /*has_compiler=*/false);
  runtime.launch(100, /*factor=*/3);
  EXPECT_EQ(runtime.statistics().generic_variants.load(), 1u);
  EXPECT_EQ(failure_of([&] { runtime.launch(1, 0, TORCHKILN_DOUBLE); }).kind(),
            TORCHKILN_ERROR_COMPILER);
}

TEST_F(DeployTest, MissingKernelNamesTheNearestAndTheCommand) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_80", "sm_90"});
  World runtime(sealed(path));
  const Error e = failure_of([&] { runtime.launch(5000, 0, TORCHKILN_DOUBLE); });
  EXPECT_EQ(e.kind(), TORCHKILN_ERROR_MISSING);
  const std::string text = e.what();
  for (const char* part :
       {"demo/scale.forward<double, factor=0, block_size=256>@sm_90 is in no bundle",
        "The nearest one is demo/scale.forward<float, factor=0, block_size=256>@sm_90 in ",
        "scalar is float instead of double", "torchkiln bundle create --out ",
        " --ops scale --dtypes float64 --arch sm_90 && torchkiln bundle merge"}) {
    EXPECT_TRUE(mentions(text, part)) << part << "\n" << text;
  }
  EXPECT_EQ(e.details().at("differences"), json({"scalar is float instead of double"}));
  EXPECT_EQ(runtime.statistics().missing.load(), 1u);

  Settings bare;
  bare.jit = "forbid";
  World alone(bare);
  const Error none = failure_of([&] { alone.launch(100); });
  EXPECT_EQ(none.details().at("nearest"), nullptr);
  EXPECT_EQ(none.details().at("command"),
            "torchkiln warm --ops scale --dtypes float32 --arch sm_90");

  World newer(sealed(path), std::string(kSource) + "// edited\n");
  EXPECT_TRUE(mentions(failure_of([&] { newer.launch(5000); }).what(), "made from other sources"));
}

TEST_F(DeployTest, RelativeOfTheSameMajorServesASealedProgram) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_80"});
  driver.devices[0].facts.major = 8;
  driver.devices[0].facts.minor = 6;
  World runtime(sealed(path));
  runtime.launch(100);
  EXPECT_EQ(driver.launches().size(), 1u);
}

TEST_F(DeployTest, CodeThatTheDriverRefusesIsNotTriedAgain) {
  const fs::path path = folder.path() / "app.bundle";
  World().bundle(path, {"sm_90"});
  Settings settings;
  settings.bundles = {path.string()};
  World world(settings);
  driver.fail("cuLibraryLoadData", kCudaInvalidImage, 1);
  world.launch(100);
  EXPECT_EQ(world.statistics().refused.load(), 1u);
  EXPECT_EQ(world.statistics().compiles.load(), 1u);
  EXPECT_EQ(driver.launches().size(), 1u);
}

TEST_F(DeployTest, SealStopsCompilingButNotWarmKernelsNorPrewarming) {
  World world;
  world.launch(100);
  EXPECT_EQ(control(*world.engine, "seal", {{"mode", "forbid"}}).at("before"), "allow");
  world.launch(100);
  const Error e = failure_of([&] { world.launch(100, 0, TORCHKILN_DOUBLE); });
  EXPECT_EQ(e.kind(), TORCHKILN_ERROR_MISSING);
  // What is asked for by name is compiled, and then there.
  const auto found = control(*world.engine, "expand", {{"dtypes", {"float64"}}});
  for (const json& s : found.at("specializations")) {
    control(*world.engine, "compile", {{"specialization", s}, {"target", "sm_90"}});
  }
  EXPECT_NO_THROW(world.launch(100, 0, TORCHKILN_DOUBLE));
  control(*world.engine, "seal", {{"mode", "warn"}});
  EXPECT_NO_THROW(world.launch(100, 5));
  EXPECT_EQ(failure_of([&] { control(*world.engine, "seal", {{"mode", "never"}}); }).kind(),
            TORCHKILN_ERROR_VALUE);
}

// ---- manifests ---------------------------------------------------------------------------------------------------

TEST_F(DeployTest, RecordsWhatWasAskedForWarmOrCold) {
  const fs::path path = folder.path() / "app.json";
  World world;
  world.launch(100);
  const json started = control(*world.engine, "record.start", {{"path", path.string()}});
  EXPECT_FALSE(fs::exists(path));
  world.launch(100);  // warm
  world.launch(100);
  world.launch(5000, 3);
  EXPECT_EQ(*read_manifest(path),
            (Manifest{"demo/scale.forward<float, factor=0, block_size=128>",
                      "demo/scale.forward<float, factor=3, block_size=256>"}));
  EXPECT_EQ(control(*world.engine, "record.stop", started).at("kernels"), 2);
  world.launch(5000, 4);
  EXPECT_EQ(read_manifest(path)->size(), 2u);
  EXPECT_EQ(world.statistics().cold_launches.load(), 4u);

  // Sorted, one line each, and the way back.
  EXPECT_EQ(bytes_of(path),
            "{\n  \"format\": 1,\n  \"kernels\": [\n"
            "    \"demo/scale.forward<float, factor=0, block_size=128>\",\n"
            "    \"demo/scale.forward<float, factor=3, block_size=256>\"\n  ]\n}\n");
  const json expanded = control(*world.engine, "manifest.expand", {{"paths", {path.string()}}});
  EXPECT_TRUE(expanded.at("unknown").empty());
  ASSERT_EQ(expanded.at("specializations").size(), 2u);
  const json request = {{"specialization", expanded["specializations"][1]}, {"target", "sm_90"}};
  EXPECT_EQ(control(*world.engine, "compile", request).at("status"), "hit");
}

TEST_F(DeployTest, RecordsBeforeTheCompile) {
  Settings settings;
  settings.record = (folder.path() / "app.json").string();
  World broken(settings, std::string(kSource) + "int x = undeclared;\n");
  EXPECT_THROW(broken.launch(100), Error);
  EXPECT_EQ(read_manifest(settings.record)->size(), 1u);
}

TEST_F(DeployTest, UnwritableManifestFailsNoLaunch) {
  Settings settings;
  settings.record = "/proc/app.json";
  World world(settings);
  EXPECT_NO_THROW(world.launch(100));
}

TEST(ManifestTest, WrongNamesAreToldApart) {
  Declared declared;
  Kernel kernel(declared.declaration);
  Kernel* const kernels[] = {&kernel};
  const auto text = [&](const std::string& name) {
    return std::string(failure_of([&] { parse_specialization(name, kernels); }).what());
  };
  EXPECT_TRUE(mentions(text("demo/scale.backward<float>"), "no operator launches"));
  EXPECT_TRUE(mentions(text("demo/scale.forward<float>"), "has 3 parameters"));
  EXPECT_TRUE(mentions(text("demo/scale.forward<float, 3, block_size=64>"), "must be factor"));
  EXPECT_TRUE(mentions(text("demo/scale.forward<float, factor=x, block_size=64>"), "factor"));
  EXPECT_TRUE(mentions(text("demo/scale.forward<int, factor=1, block_size=64>"), "scalar"));
  for (const char* bad : {"", "<", ">", "a.b", "a<b>", ".<>"}) EXPECT_NE(text(bad), "") << bad;
  EXPECT_EQ(
      parse_specialization("demo/scale.forward<double, factor=2, block_size=64>", kernels).text(),
      "demo/scale.forward<double, factor=2, block_size=64>");
  for (const char* bad : {"", "[]", "{}", "{\"format\": 2, \"kernels\": []}",
                          "{\"format\": 1, \"kernels\": [1]}", "{\"format\": 1}"}) {
    EXPECT_THROW(parse_manifest(bad, "x"), Error) << bad;
  }
}

TEST(ManifestTest, ProcessesAndThreadsLoseNothing) {
  const testing::TemporaryFolder folder;
  const fs::path path = folder.path() / "app.json";
  std::vector<pid_t> children;
  for (int process = 0; process < 8; ++process) {
    const pid_t child = fork();
    if (child == 0) {
      Recorder recorder(path.string());
      std::vector<std::thread> threads;
      for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
          for (int i = 0; i < 5; ++i) {
            recorder.note(std::to_string(process) + "." + std::to_string(t) + "." +
                          std::to_string(i));
            recorder.note("common " + std::to_string(i));
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
      kill(getpid(), SIGKILL);  // no exit handler may be needed
    }
    children.push_back(child);
  }
  for (const pid_t child : children) waitpid(child, nullptr, 0);
  EXPECT_EQ(read_manifest(path)->size(), 8u * 4 * 5 + 5);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
}

TEST(ManifestTest, DamagedFileIsKeptAside) {
  const testing::TemporaryFolder folder;
  const std::string path = folder.write("app.json", "{ damaged");
  EXPECT_EQ(merge_into_manifest(path, {"a"}), "");
  EXPECT_EQ(*read_manifest(path), Manifest{"a"});
  EXPECT_EQ(bytes_of(path + ".damaged"), "{ damaged");
}

TEST(ManifestTest, LitterOfDeadWritersIsSwept) {
  const testing::TemporaryFolder folder;
  const fs::path path = folder.path() / "app.json";
  const pid_t child = fork();
  if (child == 0) {
    cache::testing::fault_hook = [](const char* step) -> int {
      if (std::string(step) == "replacement_written") kill(getpid(), SIGKILL);
      return 0;
    };
    merge_into_manifest(path, {"a"});
    _exit(0);
  }
  waitpid(child, nullptr, 0);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
  EXPECT_FALSE(fs::exists(path));
  EXPECT_EQ(merge_into_manifest(path, {"b"}), "");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
  EXPECT_EQ(*read_manifest(path), Manifest{"b"});
}

}  // namespace
}  // namespace torchkiln::jit
