// Flags by NVRTC version, and what is read from logs.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>

#include "jit/compile/nvrtc_log.h"
#include "jit/compile/options.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

const std::string kKey(64, 'a');

using List = std::vector<std::string>;

TEST(Options, CanonicalOnesFollowSettings) {
  Settings settings;
  EXPECT_EQ(canonical_options(settings), (List{"std=c++17"}));
  settings.lineinfo = true;
  EXPECT_EQ(canonical_options(settings), (List{"std=c++17", "lineinfo"}));
}

TEST(Options, NewFlagsOnlyWhereTheyAreKnown) {
  const Target target{.architecture = 90};
  const List common = {
      "--gpu-architecture=sm_90",   "--std=c++17",       "-default-device", "--no-source-include",
      "--modify-stack-limit=false", "--ptxas-options=-v"};
  List newer = common;
  newer.insert(newer.end(), {"--no-cache", "--frandom-seed=aaaaaaaaaaaaaaaa"});
  for (const int version : {12000, 12060, 12080}) {
    EXPECT_EQ(nvrtc_options({"std=c++17"}, target, false, version, kKey), common) << version;
  }
  for (const int version : {12090, 13000, 13050}) {
    EXPECT_EQ(nvrtc_options({"std=c++17"}, target, false, version, kKey), newer) << version;
  }
}

TEST(Options, OnlyOurFilesDoWithoutTextures) {
  const auto is_minimal = [](bool embedded, int version) {
    const List list = nvrtc_options({"std=c++17"}, {.architecture = 90}, embedded, version, kKey);
    return std::find(list.begin(), list.end(), "--minimal") != list.end();
  };
  EXPECT_TRUE(is_minimal(true, 12060));
  EXPECT_TRUE(is_minimal(true, 13050));
  EXPECT_FALSE(is_minimal(true, 12000));
  EXPECT_FALSE(is_minimal(false, 13050));
}

TEST(Options, FollowTargetAndLineinfo) {
  const auto has = [](const List& list, const char* flag) {
    return std::find(list.begin(), list.end(), flag) != list.end();
  };
  const Target specific{.architecture = 90, .specific = true};
  EXPECT_TRUE(has(nvrtc_options({}, specific, true, 12060, kKey), "--gpu-architecture=sm_90a"));
  EXPECT_TRUE(has(nvrtc_options({"lineinfo"}, specific, true, 12060, kKey), "-lineinfo"));
  const Target ptx{.architecture = 90, .ptx = true};
  EXPECT_TRUE(has(nvrtc_options({}, ptx, true, 12060, kKey), "--gpu-architecture=compute_90"));
  EXPECT_FALSE(has(nvrtc_options({}, ptx, true, 12060, kKey), "--ptxas-options=-v"));
}

TEST(Options, UnknownCanonicalOptionIsOurBug) {
  EXPECT_THROW(nvrtc_options({"fast=yes"}, {.architecture = 90}, true, 13000, kKey), Error);
}

constexpr const char* kSpillLog =
    "x.cuh(7): warning #177-D: variable \"unused\" was declared but never referenced\n"
    "      int unused;\n"
    "          ^\n\n"
    "ptxas info    : 0 bytes gmem\n"
    "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'\n"
    "ptxas info    : Function properties for _Z1kv\n"
    "ptxas         .     344 bytes stack frame, 660 bytes spill stores, 752 bytes spill loads\n"
    "ptxas info    : Used 24 registers, used 1 barriers, 352 bytes cumulative stack size, 128 "
    "bytes "
    "smem, 368 bytes cmem[0]\n"
    "ptxas info    : Compile time = 42.803 ms\n";

TEST(NvrtcLog, ResourcesAreRead) {
  const Resources resources = parse_resources(kSpillLog);
  EXPECT_TRUE(resources.known);
  EXPECT_EQ(resources.registers, 24);
  EXPECT_EQ(resources.shared_bytes, 128);
  EXPECT_EQ(resources.stack_bytes, 352);
  EXPECT_EQ(resources.spill_bytes, 660 + 752);
  EXPECT_FALSE(parse_resources("").known);
}

TEST(NvrtcLog, WarningsAreOneLineEach) {
  EXPECT_EQ(
      parse_warnings(kSpillLog),
      (List{"x.cuh(7): warning #177-D: variable \"unused\" was declared but never referenced"}));
}

TEST(NvrtcLog, FirstErrorHasItsPlace) {
  const FirstError error = parse_first_error(
      "x.cuh(3): warning #1-D: last line ends without a newline\n"
      "detection/a (b).cuh(41): error: identifier \"foo\" is undefined\n"
      "y.cuh(1): error: later\n");
  EXPECT_EQ(error.file, "detection/a (b).cuh");
  EXPECT_EQ(error.line, 41);
  EXPECT_EQ(error.text, "identifier \"foo\" is undefined");
  const FirstError fatal =
      parse_first_error("x.h(2): catastrophic error: could not open \"y.h\"\n");
  EXPECT_EQ(fatal.line, 2);
  const FirstError option = parse_first_error("nvrtc: error: unrecognized option --zork found\n");
  EXPECT_EQ(option.file, "");
  EXPECT_EQ(option.text, "nvrtc: error: unrecognized option --zork found");
  EXPECT_EQ(parse_first_error("").text, "");
}

TEST(NvrtcLog, ExcerptMarksTheLine) {
  EXPECT_EQ(excerpt("a\nb\nc\nd\ne\nf\ng\n", 5),
            "     2 | b\n     3 | c\n     4 | d\n>    5 | e\n     6 | f\n     7 | g\n");
  EXPECT_EQ(excerpt("a\n", 1), ">    1 | a\n");
  EXPECT_EQ(excerpt("a\n", 2), "");
  EXPECT_EQ(excerpt("", 0), "");
}

}  // namespace
}  // namespace torchkiln::jit
