// Screening, halving, final, decision.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/search.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr double kLeastGain = 0.03;
constexpr double kSigmas = 3;
constexpr double kTied = 0.01;       // nearer than this, two points are the same
constexpr double kHopeless = 1.5;    // times the best: one pair is enough to see it
constexpr double kPromising = 1.15;  // times the best: worth another look
constexpr double kDrift =
    0.03;                    // the default itself became slower or faster: the clock has changed
constexpr int kRepeats = 2;  // of a round in which it did
constexpr int kScreenPairs = 2, kHalvingPairs = 5, kFinalPairs = 12;
constexpr std::size_t kFinalists = 3;
// What the later rounds may count on.
constexpr double kScreenShare = 0.6, kHalvingShare = 0.8;

double median(std::vector<double> v) {
  const auto middle = v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2);
  std::nth_element(v.begin(), middle, v.end());
  if (v.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(v.begin(), middle)) / 2;
}

class Search {
 public:
  Search(Bench& bench, std::size_t standard, std::vector<Measured> known, double budget_ms)
      : bench_(bench), standard_(standard), ratios_(known.size()), budget_ms_(budget_ms) {
    result_.points = std::move(known);
    result_.best = standard;
    result_.points[standard] = {.ratio = 1, .noise = 0, .samples = 1};
  }

  SearchResult run() {
    screen_all();
    refine(std::max(kFinalists, result_.points.size() / 3), kHalvingPairs, kHalvingShare);
    refine(kFinalists, kFinalPairs, 1);
    decide();
    return std::move(result_);
  }

 private:
  Measured& at(std::size_t point) { return result_.points[point]; }

  bool may_measure(double share) {
    return !interrupted() && bench_.gpu_milliseconds() < share * budget_ms_;
  }

  // Pairs in which the default ran as it did before; after some repeats, whatever they are.
  std::vector<Bench::Pair> steady_pairs(std::size_t point, int count) {
    for (int repeat = 0;; ++repeat) {
      auto pairs = bench_.measure(point, count);
      std::vector<double> standard;
      for (const auto& pair : pairs) standard.push_back(pair.standard_us);
      const double now = median(standard);
      const double before = std::exchange(result_.standard_us, now);
      if (before == 0 || std::abs(now / before - 1) <= kDrift || repeat == kRepeats) return pairs;
    }
  }

  // False where the point cannot run.
  bool add_pairs(std::size_t point, int count) {
    try {
      for (const auto& pair : steady_pairs(point, count))
        ratios_[point].push_back(pair.candidate_us / pair.standard_us);
    } catch (const Error& error) {
      if (point == standard_) throw;
      at(point).failure = error.what();
      return false;
    }
    const auto [ratio, noise] = estimate(ratios_[point]);
    at(point).ratio = ratio;
    at(point).noise = noise;
    at(point).samples = static_cast<int>(ratios_[point].size());
    return true;
  }

  void screen(std::size_t point) {
    if (point == standard_) return;
    if (!may_measure(kScreenShare)) {
      if (result_.stopped.empty()) result_.stopped = "budget";
      return;
    }
    ++result_.measured;
    if (!add_pairs(point, 1)) return;
    if (at(point).ratio <= kHopeless * best_ratio()) add_pairs(point, kScreenPairs);
  }

  void screen_all() {
    std::vector<std::size_t> spilling;
    // Without budget nobody waits for the compiles that are left.
    while (!interrupted() && result_.stopped.empty()) {
      const auto ready = bench_.next();
      if (!ready) break;
      if (!ready->failure.empty()) {
        at(ready->point).failure = ready->failure;
        continue;
      }
      at(ready->point).spill_bytes = ready->spill_bytes;
      if (ready->spill_bytes > 0) {
        spilling.push_back(ready->point);
      } else {
        screen(ready->point);
      }
    }
    for (const std::size_t point : spilling) screen(point);
  }

  bool interrupted() {
    if (result_.stopped.empty() && bench_.interrupted()) result_.stopped = "interrupted";
    return result_.stopped == "interrupted";
  }

  bool is_candidate(std::size_t point) {
    return point != standard_ && at(point).failure.empty() && at(point).samples > 0;
  }

  double best_ratio() {
    double best = 1;
    for (std::size_t i = 0; i < result_.points.size(); ++i) {
      if (is_candidate(i)) best = std::min(best, at(i).ratio);
    }
    return best;
  }

  // Candidates, the quickest first.
  std::vector<std::size_t> ranking() {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < result_.points.size(); ++i) {
      if (is_candidate(i)) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return at(a).ratio < at(b).ratio; });
    return order;
  }

  void refine(std::size_t count, int pairs, double share) {
    // Where nothing new was learnt, the record stands as it is.
    if (result_.measured == 0) return;
    const double limit = kPromising * best_ratio();
    std::vector<std::size_t> order = ranking();
    if (order.size() > count) order.resize(count);
    for (const std::size_t point : order) {
      if (at(point).ratio > limit || !may_measure(share)) return;
      add_pairs(point, pairs);
    }
  }

  double margin(std::size_t point) { return std::max(kLeastGain, kSigmas * at(point).noise); }

  // The quickest that beats the default surely; of those that are as quick, the first of the space.
  std::size_t winner(bool spilling) {
    std::vector<std::size_t> order = ranking();
    std::erase_if(order, [&](std::size_t point) {
      return (at(point).spill_bytes > 0) != spilling || 1 - at(point).ratio <= margin(point);
    });
    if (order.empty()) return standard_;
    const Measured& quickest = at(order.front());
    const double limit = quickest.ratio + std::max(kTied, 2 * quickest.noise);
    std::erase_if(order, [&](std::size_t point) { return at(point).ratio > limit; });
    return *std::min_element(order.begin(), order.end());
  }

  std::size_t candidate() {
    const std::size_t plain = winner(false), spilling = winner(true);
    if (spilling == standard_) return plain;
    const bool much_better =
        1 - at(spilling).ratio / (plain == standard_ ? 1 : at(plain).ratio) > margin(spilling);
    return much_better ? spilling : plain;
  }

  void decide() {
    while (true) {
      const std::size_t point = candidate();
      if (point == standard_) {
        result_.best = standard_;
        result_.verified = true;
        return;
      }
      // A result that was not compared is not chosen.
      if (interrupted()) return;
      const std::string wrong = difference(point);
      if (wrong.empty()) {
        result_.best = point;
        result_.verified = true;
        return;
      }
      at(point).failure = wrong;
      refine(kFinalists, kFinalPairs, 1);  // those that looked hopeless beside it
    }
  }

  std::string difference(std::size_t point) {
    try {
      return bench_.difference(point);
    } catch (const Error& error) {
      return error.what();
    }
  }

  Bench& bench_;
  std::size_t standard_;
  std::vector<std::vector<double>> ratios_;
  double budget_ms_;
  SearchResult result_;
};

}  // namespace

Estimate estimate(std::vector<double> samples) {
  // For one sample nothing is known of its error: a tenth is more than any clock has.
  constexpr double kUnknown = 0.1;
  constexpr double kDeviationOfMad = 1.4826, kErrorOfMedian = 1.2533;
  const double value = median(samples);
  const auto n = static_cast<double>(samples.size());
  if (samples.size() < 2) return {value, kUnknown * value};
  for (double& sample : samples) sample = std::abs(sample - value);
  return {value, kErrorOfMedian * kDeviationOfMad * median(std::move(samples)) / std::sqrt(n)};
}

SearchResult search(Bench& bench, std::size_t standard, std::vector<Measured> known,
                    double budget_ms) {
  return Search(bench, standard, std::move(known), budget_ms).run();
}

}  // namespace torchkiln::jit
