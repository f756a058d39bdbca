// The rules of the search, with a bench whose times, noise and errors are planted.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

#include "jit/error.h"
#include "jit/tune/compare.h"
#include "jit/tune/search.h"

namespace torchkiln::jit {
namespace {

constexpr double kUnlimited = 1e9;

// Point i takes us[i]; each replay costs 0.2 ms.
class FakeBench : public Bench {
 public:
  explicit FakeBench(std::vector<double> times) : us(std::move(times)), order(us.size()) {
    std::iota(order.begin(), order.end(), std::size_t{0});
  }

  std::optional<Ready> next() override {
    if (given_ == order.size()) return std::nullopt;
    const std::size_t point = order[given_++];
    const auto spilled = spills.find(point);
    const auto failed = failures.find(point);
    return Ready{point, failed == failures.end() ? "" : failed->second,
                 spilled == spills.end() ? 0 : spilled->second};
  }
  std::vector<Pair> measure(std::size_t point, int count) override {
    if (breaks.contains(point)) throw Error(TORCHKILN_ERROR_DRIVER, "cannot be launched");
    std::vector<Pair> pairs;
    for (int i = 0; i < count; ++i) {
      const double clock = throttle ? throttle(replays) : 1;
      pairs.push_back({us[0] * clock * jitter(), us[point] * clock * jitter()});
      replays += 2;
    }
    samples[point] += count;
    return pairs;
  }
  std::string difference(std::size_t point) override {
    ++checks;
    const auto found = wrong.find(point);
    return found == wrong.end() ? "" : found->second;
  }
  double gpu_milliseconds() const override { return 0.2 * replays; }
  bool interrupted() override { return replays >= interrupt_after; }

  std::vector<double> us;
  std::vector<std::size_t> order;
  std::map<std::size_t, std::string> failures, wrong;
  std::map<std::size_t, std::int64_t> spills;
  std::set<std::size_t> breaks;
  std::function<double(int)> throttle;
  double noise = 0;
  int interrupt_after = 1 << 30;
  int replays = 0, checks = 0;
  std::map<std::size_t, int> samples;
  std::mt19937 random{1};

  std::size_t given() const { return given_; }

 private:
  double jitter() { return 1 + noise * std::normal_distribution<double>()(random); }
  std::size_t given_ = 0;
};

SearchResult run(FakeBench& bench, double budget = kUnlimited) {
  return search(bench, 0, std::vector<Measured>(bench.us.size()), budget);
}

TEST(Search, FindsThePlantedBest) {
  std::vector<double> times(32, 10.0);
  times[17] = 7;
  FakeBench bench(times);
  const SearchResult result = run(bench);
  EXPECT_EQ(result.best, 17u);
  EXPECT_NEAR(result.points[17].ratio, 0.7, 1e-12);
  EXPECT_TRUE(result.verified);
  EXPECT_EQ(result.stopped, "");
  EXPECT_EQ(result.measured, 31);
  EXPECT_DOUBLE_EQ(result.standard_us, 10);
  EXPECT_EQ(bench.checks, 1);
}

TEST(Search, SameChoiceUnderNoise) {
  std::vector<double> times = {10, 9.95, 8.1, 8.0, 9, 30, 12, 8.05};
  std::set<std::size_t> choices;
  for (unsigned seed = 0; seed < 200; ++seed) {
    FakeBench bench(times);
    bench.noise = 0.01;
    bench.random.seed(seed);
    std::shuffle(bench.order.begin() + 1, bench.order.end(), bench.random);
    choices.insert(run(bench).best);
  }
  // All of them within 2 % of the best.
  for (const std::size_t choice : choices) EXPECT_LT(times[choice], 8.0 * 1.02) << choice;
}

TEST(Search, ASmallGainIsNotWorthAnotherChoice) {
  FakeBench bench({10, 9.75});
  EXPECT_EQ(run(bench).best, 0u);
  FakeBench worth({10, 9.65});
  EXPECT_EQ(run(worth).best, 1u);
}

TEST(Search, NoiseMustBeBeatenThreefold) {
  // 6 % of gain under 30 % of noise: the error of the median is about 8 %.
  int changed = 0;
  for (unsigned seed = 0; seed < 50; ++seed) {
    FakeBench bench({10, 9.4});
    bench.noise = 0.3;
    bench.random.seed(seed);
    changed += run(bench).best == 1;
  }
  EXPECT_LE(changed, 3);
}

TEST(Search, EquallyQuickPointsGiveTheFirstOfTheSpace) {
  FakeBench bench({10, 8.0, 7.98, 8.01});
  EXPECT_EQ(run(bench).best, 1u);
}

TEST(Search, HopelessPointsCostOnePair) {
  FakeBench bench({10, 8, 40});
  run(bench);
  EXPECT_EQ(bench.samples[2], 1);
  EXPECT_GE(bench.samples[1], 10);
}

TEST(Search, ThrottlingDoesNotChangeTheChoice) {
  std::vector<double> times = {10, 9.8, 9, 8, 11};
  FakeBench bench(times);
  bench.throttle = [](int replay) { return replay < 12 ? 1.0 : 1.6; };  // the clock falls once
  const SearchResult result = run(bench);
  EXPECT_EQ(result.best, 3u);
  EXPECT_NEAR(result.points[3].ratio, 0.8, 0.02);
}

TEST(Search, ARoundInWhichTheClockChangesIsRepeated) {
  FakeBench steady({10, 8}), drifting({10, 8});
  drifting.throttle = [](int replay) { return replay < 2 ? 1.0 : 1.2; };
  run(steady);
  run(drifting);
  EXPECT_GT(drifting.samples[1], steady.samples[1]);
}

TEST(Search, AWrongResultIsExcludedAndReported) {
  FakeBench bench({10, 5, 8});
  bench.wrong[1] = "3 elements differ";
  const SearchResult result = run(bench);
  EXPECT_EQ(result.best, 2u);
  EXPECT_EQ(result.points[1].failure, "3 elements differ");
  EXPECT_TRUE(result.verified);
}

TEST(Search, EveryCandidateFails) {
  FakeBench bench({10, 5, 6, 7});
  bench.failures = {{1, "too much shared memory"}, {2, "does not compile"}};
  bench.breaks = {3};
  const SearchResult result = run(bench);
  EXPECT_EQ(result.best, 0u);
  EXPECT_EQ(result.points[1].failure, "too much shared memory");
  EXPECT_EQ(result.points[3].failure, "cannot be launched");
  EXPECT_EQ(result.stopped, "");
}

TEST(Search, ABudgetOfNothingMeasuresNothing) {
  FakeBench bench({10, 5});
  const SearchResult result = run(bench, 0);
  EXPECT_EQ(result.best, 0u);
  EXPECT_EQ(result.measured, 0);
  EXPECT_EQ(result.stopped, "budget");
  EXPECT_EQ(bench.replays, 0);
}

TEST(Search, ASmallBudgetEndsTheSearchAndKeepsWhatIsKnown) {
  std::vector<double> times(32, 10.0);
  times[1] = 7;
  FakeBench bench(times);
  const SearchResult result = run(bench, 10);
  EXPECT_EQ(result.stopped, "budget");
  EXPECT_EQ(result.best, 1u);
  EXPECT_LT(result.measured, 31);
  EXPECT_LT(bench.gpu_milliseconds(),
            10 + 0.4 * 12);  // the last call may begin just before the end
}

TEST(Search, WithoutBudgetNobodyWaitsForMorePoints) {
  FakeBench bench(std::vector<double>(100, 10.0));
  run(bench, 10);
  EXPECT_LT(bench.given(), 20u);
}

TEST(Search, SpillingPointsComeLastAndMustWinClearly) {
  FakeBench bench({10, 7.9, 8.0});
  bench.spills[1] = 64;
  EXPECT_EQ(run(bench).best, 2u);
  FakeBench clear({10, 6, 8.0});
  clear.spills[1] = 64;
  const SearchResult result = run(clear);
  EXPECT_EQ(result.best, 1u);
  EXPECT_EQ(result.points[1].spill_bytes, 64);
}

TEST(Search, SpillingPointsAreLeftOutWhenTheBudgetEnds) {
  std::vector<double> times(16, 10.0);
  FakeBench bench(times);
  bench.spills[1] = 64;
  run(bench, 20);
  EXPECT_EQ(bench.samples[1], 0);
}

TEST(Search, AnInterruptKeepsTheTrialsAndTheDefault) {
  FakeBench bench({10, 9, 5, 6, 7});
  bench.interrupt_after = 7;
  const SearchResult result = run(bench);
  EXPECT_EQ(result.stopped, "interrupted");
  EXPECT_EQ(result.best, 0u);  // nothing was compared yet
  EXPECT_EQ(bench.checks, 0);
  EXPECT_GT(result.points[1].samples, 0);
}

TEST(Search, WhatIsKnownIsNotMeasuredAgain) {
  std::vector<Measured> known(4);
  known[1] = {.ratio = 0.9, .noise = 0.001, .samples = 20};
  known[2] = {.ratio = 1.4, .noise = 0.001, .samples = 3};
  FakeBench bench({10, 9, 14, 7});
  bench.order = {3};  // the only new one
  const SearchResult result = search(bench, 0, known, kUnlimited);
  EXPECT_EQ(result.best, 3u);
  EXPECT_EQ(result.measured, 1);
  EXPECT_EQ(bench.samples[2], 0);
  EXPECT_EQ(result.points[2].samples, 3);
}

TEST(Search, AnOldWinnerStaysWhenTheNewPointIsWorse) {
  std::vector<Measured> known(3);
  known[1] = {.ratio = 0.7, .noise = 0.001, .samples = 20};
  FakeBench bench({10, 7, 9});
  bench.order = {2};
  EXPECT_EQ(search(bench, 0, known, kUnlimited).best, 1u);
}

TEST(Estimate, MedianAndItsError) {
  EXPECT_DOUBLE_EQ(estimate({3, 1, 2}).value, 2);
  EXPECT_DOUBLE_EQ(estimate({4, 1, 2, 3}).value, 2.5);
  EXPECT_DOUBLE_EQ(estimate({5, 5, 5}).error, 0);
  EXPECT_DOUBLE_EQ(estimate({5}).error, 0.5);  // nothing is known
  std::mt19937 random(3);
  std::normal_distribution<double> normal(1, 0.1);
  std::vector<double> samples(400);
  for (double& sample : samples) sample = normal(random);
  EXPECT_NEAR(estimate(samples).error, 0.1 * 1.2533 / 20, 0.0015);
}

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

TEST(Compare, FloatsByDistanceAndSpecialValuesExactly) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const std::vector<float> a = {1, -4, infinity, nan, 2}, b = {1.5, -4, infinity, nan, 2};
  const Distance d = compare(bytes_of(a), bytes_of(b), TORCHKILN_FLOAT);
  EXPECT_DOUBLE_EQ(d.apart, 0.5);
  EXPECT_DOUBLE_EQ(d.scale, 4);
  EXPECT_EQ(d.different, 0u);
  const std::vector<float> c = {1, -4, 3, 1, nan};
  EXPECT_EQ(compare(bytes_of(a), bytes_of(c), TORCHKILN_FLOAT).different, 3u);
}

TEST(Compare, HalfTypes) {
  // 1, -2, the smallest subnormal, 65504, infinity.
  const std::vector<std::uint16_t> a = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x7c00};
  const Distance same = compare(bytes_of(a), bytes_of(a), TORCHKILN_HALF);
  EXPECT_EQ(same.different, 0u);
  EXPECT_DOUBLE_EQ(same.scale, 65504);
  const std::vector<std::uint16_t> b = {0x3c00, 0xc000, 0x0000, 0x7bff, 0x7c00};
  EXPECT_DOUBLE_EQ(compare(bytes_of(a), bytes_of(b), TORCHKILN_HALF).apart, std::ldexp(1, -24));
  const std::vector<std::uint16_t> one = {0x3f80}, two = {0x4000};
  EXPECT_DOUBLE_EQ(compare(bytes_of(one), bytes_of(two), TORCHKILN_BFLOAT16).apart, 1);
}

TEST(Compare, BytesExactly) {
  const std::vector<std::int64_t> a = {1, 2}, b = {1, 3};
  EXPECT_EQ(compare(bytes_of(a), bytes_of(b), TORCHKILN_BYTES).different, 1u);
}

}  // namespace
}  // namespace torchkiln::jit
