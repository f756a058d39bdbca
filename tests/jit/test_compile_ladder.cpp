// The ladder for a dozen devices.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>

#include "jit/compile/ladder.h"

namespace torchkiln::jit {
namespace {

constexpr std::array k126 = {50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90};
constexpr std::array k135 = {75, 80, 86, 87, 88, 89, 90, 100, 103, 107, 110, 120, 121};

std::string targets(const std::vector<Rung>& rungs) {
  std::string text;
  for (const Rung& rung : rungs) text += (text.empty() ? "" : " ") + rung.target.text();
  return text;
}

struct Case {
  int device;
  bool old_compiler;  // 12.6, else 13.5
  int driver;
  const char* rungs;
};

class LadderTable : public ::testing::TestWithParam<Case> {};

TEST_P(LadderTable, HasTheRungs) {
  const Case& c = GetParam();
  const torchkiln_device device{c.device / 10, c.device % 10, 1, 1, 1};
  const std::span<const int> list =
      c.old_compiler ? std::span<const int>(k126) : std::span<const int>(k135);
  const Ladder result = ladder(device, false, 75, list, c.old_compiler ? 12060 : 13050, c.driver);
  EXPECT_EQ(targets(result.rungs), c.rungs) << result.explanation;
  for (const Rung& rung : result.rungs) EXPECT_FALSE(rung.reason.empty());
}

INSTANTIATE_TEST_SUITE_P(
    Devices, LadderTable,
    ::testing::Values(Case{75, false, 13050, "sm_75 compute_75"},        // T4
                      Case{80, false, 13050, "sm_80 compute_80"},        // A100
                      Case{86, false, 13050, "sm_86 sm_80 compute_86"},  // RTX 30
                      Case{87, false, 13050, "sm_87 compute_87"},        // Orin: Tegra
                      Case{89, false, 13050,
                           "sm_89 sm_86 sm_80 compute_89"},        // L4: not sm_87, sm_88
                      Case{90, false, 13050, "sm_90 compute_90"},  // H200
                      Case{90, false, 13000, "sm_90"},             // driver too old for PTX
                      Case{90, true, 13000, "sm_90 compute_90"},
                      Case{100, true, 13000, "compute_90"},  // B200, old compiler
                      Case{100, true, 12040, ""},            // ... and an older driver
                      Case{103, false, 13050, "sm_103 sm_100 compute_103"},  // B300
                      Case{110, false, 13050, "sm_110 compute_110"},         // Thor
                      Case{120, true, 12080, "compute_90"},                  // RTX 50
                      Case{121, false, 13050, "sm_121 sm_120 compute_121"},
                      Case{122, false, 13050, "sm_121 sm_120 compute_121"},  // not sold yet
                      Case{70, true, 13000, ""}),  // below the kernel's floor
    [](const auto& row) {
      return "sm_" + std::to_string(row.param.device) + "_" + std::to_string(row.index);
    });

TEST(Ladder, SpecificCodeHasOneRung) {
  const torchkiln_device hopper{9, 0, 1, 1, 1};
  EXPECT_EQ(targets(ladder(hopper, true, 90, k135, 13050, 13050).rungs), "sm_90a");
  const torchkiln_device ada{8, 9, 1, 1, 1};
  EXPECT_EQ(targets(ladder(ada, true, 80, k135, 13050, 13050).rungs), "sm_89a");
}

TEST(Ladder, EmptyOneTellsEverything) {
  const torchkiln_device blackwell{10, 0, 1, 1, 1};
  EXPECT_EQ(
      ladder(blackwell, false, 75, k126, 12060, 12040).explanation,
      "device of sm_100: exact machine code (sm_100): unknown to NVRTC 12.6; machine code of the "
      "same major: there is no older chip of this line; PTX for the driver's compiler "
      "(compute_90): the driver knows CUDA 12.4, older than the compiler. Install a newer NVRTC "
      "(pip install torchkiln[compiler]), or ship a bundle made for this device.");
  const torchkiln_device volta{7, 0, 1, 1, 1};
  EXPECT_EQ(
      ladder(volta, false, 75, k126, 12060, 13000).explanation,
      "device of sm_70: the kernel needs sm_75 or later. Use the CPU version, or a newer GPU.");
}

TEST(Ladder, WithoutACompilerTellsWhatMayBeLoaded) {
  const torchkiln_device ada{8, 9, 1, 1, 1};
  const Ladder result = ladder(ada, false, 75, {}, 0, 13000);
  EXPECT_EQ(targets(result.rungs), "");
  EXPECT_EQ(targets(result.loadable), "sm_89 sm_86 sm_80");
}

TEST(Ladder, KernelFloorHoldsForRelatives) {
  const torchkiln_device ada{8, 9, 1, 1, 1};
  EXPECT_EQ(targets(ladder(ada, false, 86, k135, 13050, 13050).rungs), "sm_89 sm_86 compute_89");
}

TEST(Ladder, BinaryCompatibility) {
  EXPECT_TRUE(binary_compatible(80, 86));
  EXPECT_TRUE(binary_compatible(87, 87));
  EXPECT_FALSE(binary_compatible(86, 80));
  EXPECT_FALSE(binary_compatible(80, 87));
  EXPECT_FALSE(binary_compatible(87, 89));
  EXPECT_FALSE(binary_compatible(90, 100));
}

}  // namespace
}  // namespace torchkiln::jit
