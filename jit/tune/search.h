// Which point of a space is best: what to measure, how often, and when to believe it. Knows no device: a Bench does the
// measuring, so that a test can plant times, noise and errors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace torchkiln::jit {

// Points go by their number in the space.
class Bench {
 public:
  virtual ~Bench() = default;

  struct Ready {
    std::size_t point = 0;
    std::string failure;  // it cannot run; otherwise it can be measured
    std::int64_t spill_bytes = 0;
  };
  // The next of the points that were asked for, in the order in which they become ready; nothing after the last.
  virtual std::optional<Ready> next() = 0;

  struct Pair {
    double standard_us = 0, candidate_us = 0;  // of one launch, measured one after the other
  };
  // The default and a point in turn, `count` times. Throws Error where the point cannot run.
  virtual std::vector<Pair> measure(std::size_t point, int count) = 0;
  // Empty when the point's results equal those of the default; otherwise what is different.
  virtual std::string difference(std::size_t point) = 0;
  virtual double gpu_milliseconds() const = 0;  // spent so far
  virtual bool interrupted() = 0;
};

// What is known of a point: from this search, or from an earlier one.
struct Measured {
  double ratio = 0;  // of the default's time, a median; 0: unknown
  double noise = 0;  // standard error of the ratio
  int samples = 0;
  std::string failure = {};
  std::int64_t spill_bytes = 0;
};

struct SearchResult {
  std::vector<Measured> points = {};
  std::size_t best = 0;
  double standard_us = 0;  // 0: nothing was measured
  int measured = 0;        // points, in this search
  bool verified = false;
  std::string stopped = {};  // "budget" or "interrupted" when the search did not come to its end
};

// `known` has a row for every point, empty where nothing is known; those that are not empty are not measured again unless
// they may win. `standard` is the default's number.
//
// Every comparison is with the default, in turn and in the same moments, so that a clock that changes hits both. Points
// are screened with three pairs, or one where they are hopeless; the third that is best gets more, the best three more
// again. A point is chosen when it takes less time than the default by more than max(3 %, 3 x noise) and gives the same
// result; among points that cannot be told apart the first one of the space is, so that repeated searches agree. One that
// spills registers must beat those that do not by as much.
SearchResult search(Bench& bench, std::size_t standard, std::vector<Measured> known,
                    double budget_ms);

// Median, and the standard error of it from the median absolute deviation.
struct Estimate {
  double value = 0, error = 0;
};
Estimate estimate(std::vector<double> samples);

}  // namespace torchkiln::jit
