// Random damage of bundles and manifests: a miss and one warning, or a sentence; never a crash or a wrong kernel.
// (Objects of the store are in test_attack.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <map>
#include <set>

#include "jit/control.h"
#include "jit/deploy/bundles.h"
#include "jit/deploy/manifest.h"
#include "jit/deploy/recorder.h"
#include "jit/engine.h"
#include "jit/log.h"
#include "tests/cache/damage.h"
#include "tests/cache/support.h"
#include "tests/jit/support/fake_nvrtc.h"

namespace torchkiln::jit {
namespace {

using cache::support::attack_rounds;
using cache::support::read_bytes;
using cache::support::write_file;
using nlohmann::json;
namespace fs = std::filesystem;

constexpr Target kTarget{.architecture = 90};
constexpr int kKernels = 8;  // the first half in one bundle, the rest in another

// An engine with the fake compiler and no driver: what the command line has.
struct World {
  World(const fs::path& folder, const std::string& bundle = "", const std::string& jit = "forbid",
        const char* root = "root")
      : nvrtc(folder, {}, folder / "compiles") {
    Settings settings;
    settings.cache_dir = (folder / root).string();
    settings.compile_jobs = 1;
    settings.jit = jit;
    if (!bundle.empty()) settings.bundles = {bundle};
    engine.emplace(Engine::Parts{.settings = settings,
                                 .templates = testing::scale_files(),
                                 .open_driver = [] { return CudaApi(); },
                                 .compilers = nvrtc.source(sources)});
  }
  // As the command line reads it: JSON that is written and parsed. A sentence, where it fails.
  json ask(const std::string& command, const json& request) try {
    return json::parse(control(*engine, command, request).dump());
  } catch (const Error& error) {
    return json::parse(json{{"error", error.what()}}.dump());
  }
  std::optional<Found> find(int index) {
    return engine->objects().find(testing::scale_specialization(index), kTarget);
  }

  TemplateSources sources = testing::scale_sources();
  testing::FakeNvrtc nvrtc;
  std::optional<Engine> engine;
};

class DamageTest : public ::testing::Test {
 protected:
  void SetUp() override {
    set_log_sink(
        [](void* self, std::int32_t level, const char* sentence) {
          if (level >= TORCHKILN_LOG_WARNING)
            static_cast<DamageTest*>(self)->warnings_.emplace_back(sentence);
        },
        this);
  }
  void TearDown() override { set_log_sink(nullptr, nullptr); }

  std::string bundle_of(int first, int count) {
    World world(folder_, "", "allow");
    json items = json::array();
    for (int i = first; i < first + count; ++i) {
      const Specialization specialization = testing::scale_specialization(i);
      world.engine->objects().get(specialization, kTarget, Priority::kPrewarm,
                                  Origin::kOwnCompiler);
      items.push_back({{"specialization", specialization.to_json()}, {"target", kTarget.text()}});
    }
    const fs::path out = folder_ / "sound.bundle";
    control(*world.engine, "bundle.create", {{"out", out.string()}, {"items", items}});
    return read_bytes(out);
  }

  // Looks up all kernels in a process that has the bundle alone; those that were found. None may be wrong.
  std::set<int> served(const fs::path& bundle) {
    World world(folder_, bundle.string());
    std::set<int> found;
    for (int i = 0; i < kKernels; ++i) {
      const auto kernel = world.find(i);
      if (!kernel) continue;
      EXPECT_TRUE(testing::is_right_kernel(*kernel->object, i)) << i;
      found.insert(i);
    }
    return found;
  }

  void report(int rounds, const char* files) {
    RecordProperty("damages", rounds);
    std::printf("[ damages  ] %d %s\n", rounds, files);
  }

  std::vector<std::string> warnings_;
  cache::support::TemporaryDirectory directory_;
  const fs::path folder_ = directory_.path();
  const cache::support::ScopedVariable runtime_{"XDG_RUNTIME_DIR", directory_.path().c_str()};
};

TEST_F(DamageTest, DamagedBundlesAreMisses) {
  const std::string sound = bundle_of(0, kKernels / 2);
  const std::string other = bundle_of(kKernels / 2, kKernels / 2);
  fs::remove_all(folder_ / "root");
  const fs::path path = folder_ / "damaged.bundle";
  cache::support::Damage damage(20250117);
  std::map<std::string, int> outcomes;
  const int rounds = attack_rounds(300);
  for (int round = 0; round < rounds; ++round) {
    std::string kind;
    write_file(path, damage.of(sound, other, kind));
    SCOPED_TRACE(std::to_string(round) + ": " + kind);
    warnings_.clear();
    const auto found = served(path);
    World tools(folder_);
    const json listed = tools.ask("bundle.list", {{"path", path.string()}});
    const json verified = tools.ask("bundle.verify", {{"path", path.string()}});
    if (verified.contains("error")) {  // nothing in it can be trusted
      ASSERT_EQ(found.size(), 0U);
      ASSERT_EQ(warnings_.size(), 1U);
      ASSERT_TRUE(listed.contains("error"));
      ++outcomes["refused"];
    } else if (!verified.at("problems").empty()) {
      ASSERT_EQ(warnings_.size(), 1U);
      ASSERT_LT(found.size(), kKernels / 2);
      ASSERT_TRUE(listed.contains("error")) << verified;
      ++outcomes["partly served"];
    } else {  // between the objects, or a sound bundle in the place of another one
      ASSERT_EQ(warnings_.size(), 0U) << warnings_.at(0);
      ASSERT_EQ(found.size(), kKernels / 2);
      ASSERT_EQ(listed.at("objects").size(), kKernels / 2);
      ++outcomes["all served"];
    }
    World healing(folder_, path.string(), "allow", "healed");
    const int index = round % kKernels;
    const Found kernel = healing.engine->objects().get(testing::scale_specialization(index),
                                                       kTarget, Priority::kInteractive);
    ASSERT_TRUE(testing::is_right_kernel(*kernel.object, index));
    if (round % 100 == 0) fs::remove_all(folder_ / "healed");
  }
  for (const auto& [name, count] : outcomes) std::printf("[ %s ] %d\n", name.c_str(), count);
  EXPECT_GT(outcomes["refused"], 0);
  EXPECT_GT(outcomes["partly served"], 0);
  report(rounds, "bundles");
}

Manifest names_from(int first, int count) {
  Manifest names;
  for (int i = first; i < first + count; ++i) names.insert(testing::scale_specialization(i).text());
  return names;
}

TEST_F(DamageTest, DamagedManifestsGetASentenceAndLoseNothing) {
  const std::string sound = manifest_text(names_from(0, 20));
  const std::string other = manifest_text(names_from(100, 15));
  const fs::path path = folder_ / "app.json", aside = folder_ / "app.json.damaged";
  const std::string fresh = testing::scale_specialization(1000).text();
  World tools(folder_);
  cache::support::Damage damage(20250118);
  std::map<std::string, int> outcomes;
  const int rounds = attack_rounds(300);
  for (int round = 0; round < rounds; ++round) {
    std::string kind;
    const std::string bad = damage.of(sound, other, kind);
    SCOPED_TRACE(std::to_string(round) + ": " + kind);
    write_file(path, bad);
    fs::remove(aside);
    warnings_.clear();
    const json expanded = tools.ask("manifest.expand", {{"paths", {path.string()}}});
    std::optional<Manifest> before;
    try {
      before = read_manifest(path);
    } catch (const Error& error) {
      ASSERT_NE(std::string(error.what()).find("manifest must be"), std::string::npos);
    }
    ASSERT_EQ(expanded.contains("error"), !before);
    ASSERT_EQ(merge_into_manifest(path, {fresh}), "");
    const Manifest after = read_manifest(path).value();
    ASSERT_TRUE(after.contains(fresh));
    if (before) {
      before->insert(fresh);
      ASSERT_EQ(after, *before);
      ASSERT_FALSE(fs::exists(aside));
      ASSERT_EQ(expanded.at("specializations").size() + expanded.at("unknown").size(),
                after.size() - 1);
    } else {
      ASSERT_EQ(after.size(), 1U);
      ASSERT_EQ(read_bytes(aside), bad);
      ASSERT_EQ(warnings_.size(), 1U);
      ASSERT_NO_THROW(json(warnings_[0]).dump()) << "not UTF-8";
    }
    ++outcomes[before ? "readable" : "set aside"];
  }
  for (const auto& [name, count] : outcomes) std::printf("[ %s ] %d\n", name.c_str(), count);
  EXPECT_GT(outcomes["readable"], 0);
  EXPECT_GT(outcomes["set aside"], 0);
  report(rounds, "manifests");
}

// Only damage is moved aside: a file that others can read must not vanish because this process cannot.
TEST_F(DamageTest, ManifestsThatCannotBeReadStayWhereTheyAre) {
  const fs::path folder = folder_ / "folder", pipe = folder_ / "pipe", good = folder_ / "app.json";
  fs::create_directory(folder);
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  for (const fs::path& path : {folder, pipe}) {
    EXPECT_NE(merge_into_manifest(path, {"a"}), "") << path;
    EXPECT_THROW(read_manifest(path), Error) << path;
    EXPECT_TRUE(fs::exists(path)) << path;
  }
  ASSERT_EQ(merge_into_manifest(good, {"a"}), "");
  for (rlim_t descriptors = 0; descriptors < 16; ++descriptors) {
    const int code = cache::support::exit_code([&] {
      const rlimit limit{descriptors, descriptors};
      ::setrlimit(RLIMIT_NOFILE, &limit);
      merge_into_manifest(good, {"b"});
      return 0;
    });
    ASSERT_EQ(code, 0);
    ASSERT_TRUE(read_manifest(good).value().contains("a")) << descriptors << " descriptors";
  }
  EXPECT_EQ(read_manifest(good).value(), (Manifest{"a", "b"}));
}

}  // namespace
}  // namespace torchkiln::jit
