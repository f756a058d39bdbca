// Texts, keys and include closures of specialisations.
//
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "cache/sha256.h"
#include "jit/error.h"
#include "jit/spec/embedded.h"
#include "jit/spec/key.h"
#include "jit/spec/specialization.h"
#include "jit/spec/template_source.h"

namespace torchkiln::jit {
namespace {

Specialization box_iou() {
  return {.path = "detection/box_iou.cuh",
          .entry = "forward",
          .arguments = {{"scalar", TORCHKILN_PARAM_TYPE, TORCHKILN_HALF},
                        {"mode", TORCHKILN_PARAM_INT, 2},
                        {"fast", TORCHKILN_PARAM_BOOL, 1},
                        {"block_size", TORCHKILN_PARAM_INT, 256}},
          .args_size = 48};
}

TEST(Specialization, IsReadable) {
  EXPECT_EQ(box_iou().text(), "detection/box_iou.forward<half, mode=2, fast=true, block_size=256>");
  EXPECT_EQ(box_iou().name_expression(),
            "torchkiln::box_iou::forward<torchkiln::half, 2, true, 256>");
}

TEST(Specialization, SurvivesJson) {
  EXPECT_EQ(Specialization::from_json(box_iou().to_json()), box_iou());
}

TEST(Specialization, RefusesJsonWithoutPath) {
  EXPECT_THROW(Specialization::from_json(nlohmann::json::object()), Error);
  auto json = box_iou().to_json();
  json["arguments"][0]["value"] = "quaternion";
  EXPECT_THROW(Specialization::from_json(json), Error);
}

TEST(Target, ParsesWhatItPrints) {
  for (const char* text : {"sm_75", "sm_90", "sm_90a", "compute_90", "sm_120"}) {
    EXPECT_EQ(Target::parse(text).text(), text);
  }
  for (const char* text :
       {"", "90", "sm_", "sm_x", "sm_90b", "sm_90aa", "gfx90a", "sm_7", "sm_-1", "sm_99999"}) {
    EXPECT_THROW(Target::parse(text), Error) << text;
  }
}

// Metamorphic: every field changes the key, and nothing else does.
TEST(CacheKey, EveryFieldCounts) {
  const Target target{.architecture = 90};
  const std::vector<std::string> options = {"std=c++17"};
  std::set<std::string> keys = {cache_key(box_iou(), target, "digest", options)};
  const auto expect_new = [&](const std::string& key) { EXPECT_TRUE(keys.insert(key).second); };

  const std::vector<std::function<void(Specialization&)>> changes = {
      [](auto& s) { s.path = "detection/box_iox.cuh"; },
      [](auto& s) { s.entry = "backward"; },
      [](auto& s) { s.arguments[0].value = TORCHKILN_FLOAT; },
      [](auto& s) { s.arguments[1].value = 3; },
      [](auto& s) { s.arguments[1].name = "made"; },
      [](auto& s) { s.arguments[2].kind = TORCHKILN_PARAM_INT; },
      [](auto& s) { s.arguments.pop_back(); },
      [](auto& s) { std::swap(s.arguments[1], s.arguments[3]); },
      [](auto& s) { s.args_size = 56; },
  };
  for (const auto& change : changes) {
    Specialization s = box_iou();
    change(s);
    expect_new(cache_key(s, target, "digest", options));
  }
  expect_new(cache_key(box_iou(), {.architecture = 80}, "digest", options));
  expect_new(cache_key(box_iou(), {.architecture = 90, .specific = true}, "digest", options));
  expect_new(cache_key(box_iou(), {.architecture = 90, .ptx = true}, "digest", options));
  expect_new(cache_key(box_iou(), target, "other digest", options));
  expect_new(cache_key(box_iou(), target, "digest", {"std=c++17", "lineinfo"}));
  expect_new(cache_key(box_iou(), target, "digest", {}));
  EXPECT_EQ(cache_key(box_iou(), target, "digest", options),
            *keys.find(cache_key(box_iou(), target, "digest", options)));
}

constexpr char kRoot[] = "#include \"common/b.h\"\n// #include \"common/ghost.h\"\nint a;\n";
constexpr char kLeaf[] = "#include \"common/c.h\"\n";
constexpr char kEnd[] = "int c;\n";

std::vector<EmbeddedFile> files(const char* c_text) {
  static std::vector<std::string> digests;
  digests = {cache::sha256_hex(kRoot), cache::sha256_hex(kLeaf), cache::sha256_hex(c_text)};
  return {{"detection/a.cuh", kRoot, sizeof(kRoot) - 1, digests[0].c_str()},
          {"common/b.h", kLeaf, sizeof(kLeaf) - 1, digests[1].c_str()},
          {"common/c.h", c_text, std::char_traits<char>::length(c_text), digests[2].c_str()},
          {"common/unrelated.h", kEnd, sizeof(kEnd) - 1, digests[0].c_str()}};
}

TEST(TemplateSources, FindsTheClosure) {
  const auto table = files(kEnd);
  const TemplateSources sources(table);
  std::vector<std::string> paths;
  for (const SourceFile& file : sources.closure("detection/a.cuh")) paths.push_back(file.path);
  EXPECT_EQ(paths, (std::vector<std::string>{"common/b.h", "common/c.h", "detection/a.cuh"}));
  EXPECT_THROW(sources.closure("detection/none.cuh"), Error);
}

TEST(TemplateSources, DigestFollowsEveryFileOfTheClosure) {
  const auto table = files(kEnd);
  const std::string before = TemplateSources(table).digest("detection/a.cuh");
  const std::string unrelated = TemplateSources(table).digest("common/unrelated.h");
  const auto changed = files("int d;\n");
  EXPECT_NE(TemplateSources(changed).digest("detection/a.cuh"), before);
  EXPECT_EQ(before.size(), 64u);
  EXPECT_NE(before, unrelated);
}

TEST(TemplateSources, EveryEmbeddedTemplateIsClosed) {
  const TemplateSources sources(embedded_files());
  for (const std::string& path : sources.paths()) EXPECT_NO_THROW(sources.closure(path)) << path;
  EXPECT_FALSE(sources.paths().empty());
}

}  // namespace
}  // namespace torchkiln::jit
