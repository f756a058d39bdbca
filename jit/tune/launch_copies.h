// Copies of a launch's arguments and buffers, so that measuring touches nothing of the user's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "jit/launch/driver.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

// As many sets as it takes to run through three times the L2 cache, so that a launch does not find what the one before
// it left there; fewer where memory is short. Everything happens on a stream of its own.
class LaunchCopies {
 public:
  // Waits for the launch's stream. Throws Error where there is no memory for one set, and where the arguments hold a
  // pointer to GPU memory that the launch does not name.
  LaunchCopies(Driver& driver, const torchkiln_launch& launch, std::size_t args_size);
  LaunchCopies(const LaunchCopies&) = delete;
  LaunchCopies& operator=(const LaunchCopies&) = delete;
  ~LaunchCopies();

  CudaStream stream() const { return stream_; }
  std::size_t sets() const { return sets_.size(); }
  // Whether a launch must find its buffers as they were: then each set serves one launch between two resets.
  bool consumes() const { return consumes_; }

  std::string& args(std::size_t set) { return sets_[set].args; }
  // Gives buffers that are both read and written their first content again.
  void reset(std::size_t set);
  // The same, and zeros into those that are only written.
  void clear(std::size_t set);

  // Written buffers that can be compared, in the order of the launch.
  struct Result {
    std::size_t buffer = 0;  // of the launch
    std::uint32_t offset = 0;
    int type = 0;
  };
  const std::vector<Result>& results() const { return results_; }
  std::string read(std::size_t set, const Result& result);  // waits

  void wait();

 private:
  struct Set {
    std::string args;
    std::vector<CudaPointer> pointers;  // by buffer; 0 for none
    std::vector<void*> owners;
  };

  void* pointer_of(const torchkiln_buffer& buffer) const;
  void require_named(std::size_t args_size);
  std::size_t wanted_sets(Driver& driver) const;
  bool add_set(std::size_t args_size);
  void release(Set& set);
  void copy(const Set& set, std::size_t buffer);

  Driver& driver_;
  const torchkiln_launch& launch_;
  CudaStream stream_ = nullptr;
  bool consumes_ = false;
  std::vector<Result> results_;
  std::vector<Set> sets_;
};

}  // namespace torchkiln::jit
