// Which specialisations follow from a declaration: points of the search space, what is legal where.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <set>

#include "jit/driver/device.h"
#include "jit/launch/kernel.h"
#include "tests/jit/support/declared.h"

namespace torchkiln::jit {
namespace {

using Row = std::vector<std::int64_t>;

// Two types, two tunables with three and two values, two defaults; the small type knows no factor of 3.
struct Declared {
  const char* operators[1] = {"scale"};
  std::int64_t types[2] = {TORCHKILN_FLOAT, TORCHKILN_DOUBLE};
  std::int64_t factors[2] = {2, 3};
  std::int64_t blocks[3] = {128, 64, 256};
  std::int64_t stages[2] = {1, 4};
  std::int64_t defaults[4] = {128, 1, 256, 4};
  torchkiln_param params[4] = {{"scalar", TORCHKILN_PARAM_TYPE, 0, types, 2, 0},
                               {"factor", TORCHKILN_PARAM_INT, 0, factors, 2, 0},
                               {"block_size", TORCHKILN_PARAM_INT, 1, blocks, 3, 0},
                               {"stages", TORCHKILN_PARAM_INT, 1, stages, 2, 0}};
  torchkiln_size sizes[1] = {{"n", TORCHKILN_BUCKET_POW2}};
  torchkiln_declaration declaration{};

  Declared() {
    declaration = testing::declare("demo/scale.cuh", "forward", operators, params, sizes, defaults);
  }
};

class ExpandTest : public ::testing::Test {
 protected:
  // The values of all parameters, one row for each specialisation; none stands there twice.
  std::set<Row> rows(Points points, std::vector<torchkiln_device> devices = {},
                     Row dtypes = {TORCHKILN_FLOAT}) {
    const Kernel kernel(declared_.declaration);
    std::set<Row> result;
    for (const Specialization& s : expand(kernel, dtypes, points, devices)) {
      Row row;
      for (const TemplateArgument& argument : s.arguments) row.push_back(argument.value);
      EXPECT_TRUE(result.insert(row).second) << s.text();
    }
    return result;
  }

  Declared declared_;
};

TEST_F(ExpandTest, DefaultsAreTheRowsThatChooseCanReturn) {
  EXPECT_EQ(rows(Points::kDefaults),
            (std::set<Row>{{0, 2, 128, 1}, {0, 2, 256, 4}, {0, 3, 128, 1}, {0, 3, 256, 4}}));
}

TEST_F(ExpandTest, CornersAreSmallestAndLargestOfEachTunable) {
  declared_.params[1].n_values = 1;
  EXPECT_EQ(rows(Points::kCorners),
            (std::set<Row>{{0, 2, 64, 1}, {0, 2, 64, 4}, {0, 2, 256, 1}, {0, 2, 256, 4}}));
}

TEST_F(ExpandTest, TunableWithOneValueHasOneCorner) {
  declared_.params[1].n_values = 1;
  declared_.params[3].n_values = 1;
  EXPECT_EQ(rows(Points::kCorners), (std::set<Row>{{0, 2, 64, 1}, {0, 2, 256, 1}}));
}

TEST_F(ExpandTest, AllIsTheWholeSpace) {
  EXPECT_EQ(rows(Points::kAll).size(), 2U * 3 * 2);
  EXPECT_EQ(rows(Points::kAll, {}, {}).size(), 2U * 2 * 3 * 2);
}

TEST_F(ExpandTest, KernelWithoutTunablesHasOnePoint) {
  declared_.declaration.n_params = 2;
  declared_.declaration.n_defaults = 1;
  for (const Points points : {Points::kDefaults, Points::kCorners, Points::kAll}) {
    EXPECT_EQ(rows(points), (std::set<Row>{{0, 2}, {0, 3}}));
  }
}

TEST_F(ExpandTest, StaticsThatDoNotExistAreLeftOut) {
  declared_.declaration.valid = [](const void*, const std::int64_t* statics) {
    return statics[1] == 2 ? 1 : 0;
  };
  EXPECT_EQ(rows(Points::kDefaults).size(), 2U);
}

TEST_F(ExpandTest, PointMustBeLegalOnOneOfTheDevices) {
  declared_.params[1].n_values = 1;
  declared_.declaration.legal = [](const torchkiln_problem* p, const std::int64_t* tunables) {
    return tunables[1] * 50'000 <= p->device->shared_bytes_per_block ? 1 : 0;
  };
  EXPECT_EQ(rows(Points::kAll, {typical_device(90)}).size(), 6U);
  EXPECT_EQ(rows(Points::kAll, {typical_device(86)}).size(), 3U);
  EXPECT_EQ(rows(Points::kDefaults, {typical_device(86)}), (std::set<Row>{{0, 2, 128, 1}}));
  EXPECT_EQ(rows(Points::kAll, {typical_device(86), typical_device(90)}).size(), 6U);
  EXPECT_EQ(rows(Points::kAll).size(), 6U);
}

TEST_F(ExpandTest, PointThatOnlyFewOrManyCanUseStays) {
  declared_.params[1].n_values = 1;
  declared_.declaration.legal = [](const torchkiln_problem* p, const std::int64_t* tunables) {
    return (tunables[0] == 64) == (p->sizes[0] < 100) ? 1 : 0;
  };
  EXPECT_EQ(rows(Points::kAll, {typical_device(90)}).size(), 6U);
}

TEST_F(ExpandTest, PointThatNothingCanRunIsLeftOut) {
  declared_.params[1].n_values = 1;
  declared_.declaration.legal = [](const torchkiln_problem* p, const std::int64_t* tunables) {
    return p->statics[1] == 2 && tunables[0] == 256 ? 0 : 1;
  };
  EXPECT_EQ(rows(Points::kDefaults), (std::set<Row>{{0, 2, 128, 1}}));
}

TEST(TypicalDevice, HasTheNumbersOfItsDataSheet) {
  const torchkiln_device device = typical_device(90);
  EXPECT_EQ(device.major, 9);
  EXPECT_EQ(device.minor, 0);
  EXPECT_EQ(device.multiprocessors, 132);
  EXPECT_EQ(device.shared_bytes_per_block, 232'448);
  EXPECT_EQ(device.l2_bytes, std::int64_t{50} << 20);
}

TEST(TypicalDevice, UnknownArchitectureTakesTheNextOlderOne) {
  const torchkiln_device device = typical_device(103);
  EXPECT_EQ(device.major * 10 + device.minor, 103);
  EXPECT_EQ(device.multiprocessors, typical_device(100).multiprocessors);
  EXPECT_EQ(typical_device(70).multiprocessors, typical_device(75).multiprocessors);
  EXPECT_EQ(typical_device(130).l2_bytes, typical_device(121).l2_bytes);
}

TEST(TypicalDevice, EveryArchitectureStandsOnce) {
  std::set<int> architectures;
  for (const torchkiln_device& device : typical_devices()) {
    EXPECT_TRUE(architectures.insert(device.major * 10 + device.minor).second);
    EXPECT_GT(device.multiprocessors, 0);
    EXPECT_GE(device.shared_bytes_per_block, 48 * 1024);
  }
  EXPECT_GE(architectures.size(), 8U);
}

}  // namespace
}  // namespace torchkiln::jit
