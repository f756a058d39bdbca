// A program with a kernel of its own, as docs/cpp.md shows it; test_cpp.py reads the JSON lines that it prints. It links the
// engine alone.
// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iostream>
#include <string>

#include "torchkiln/torchkiln.hpp"

namespace {

struct Args {
  const void* x;
  void* out;
  std::int64_t n;
  float factor;
};

constexpr const char* kSource = R"(
#include "common/types.h"
#include "acme/parts.h"
namespace acme {
struct Args { const void* x; void* out; long long n; float factor; };
template <class Scalar, int kBlockSize>
__global__ void scale(Args a) {
  const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
  if (i >= a.n) return;
  const float x = torchkiln::load(static_cast<const Scalar*>(a.x)[i]);
  torchkiln::store(static_cast<Scalar*>(a.out)[i], PART(x * a.factor));
}
}  // namespace acme
)";

const torchkiln::Template source("acme_scale", kSource,
                                 {{"acme/parts.h", "#define PART(x) (x)\n"}});

struct Statics {
  std::int64_t scalar;
};
struct Sizes {
  std::int64_t n;
};
struct Tunables {
  std::int64_t block_size;
};
using Scale = torchkiln::Kernel<Args, Statics, Sizes, Tunables>;

Scale::Declaration declaration(const char* entry, std::int64_t threads) {
  static std::int64_t fixed_threads = 0;
  fixed_threads = threads;
  return {
      .path = source.path(),
      .entry = entry,
      .operators = {"acme_scale"},
      .statics = {torchkiln::types("scalar", {TORCHKILN_FLOAT, TORCHKILN_HALF})},
      .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
      .tunables = {torchkiln::ints("block_size", {128, 256, 512})},
      .defaults = {{256}},
      .geometry =
          [](const Scale::Problem& p, const Tunables& t) {
            const std::int64_t block = fixed_threads != 0 ? fixed_threads : t.block_size;
            return torchkiln::linear(torchkiln::ceil_div(p.sizes.n, t.block_size), block);
          },
  };
}

const Scale scale(declaration("acme::scale", 0));

void launch(const Scale& kernel, std::int64_t type) {
  const Args args = {nullptr, nullptr, 1000, 0.5F};
  kernel.run({}, {type}, {args.n}, args,
             {{offsetof(Args, x), TORCHKILN_READ, TORCHKILN_FLOAT, 4000},
              {offsetof(Args, out), TORCHKILN_WRITE, TORCHKILN_FLOAT, 4000}});
}

void print_error(const std::string& name, const std::function<void()>& f) {
  std::string text = "no error";
  try {
    f();
  } catch (const torchkiln::Error& error) {
    text = error.what();
  }
  for (std::size_t at = 0; (at = text.find_first_of("\"\\\n", at)) != text.npos; ++at)
    text[at] = '\'';
  std::cout << R"({"case": ")" << name << R"(", "error": ")" << text << "\"}\n";
}

}  // namespace

int main() {
  std::cout << torchkiln::control("warm",
                                  R"({"operators": ["acme_scale"], "targets": ["sm_80", "sm_90"]})")
            << "\n";
  print_error("launch", [] { launch(scale, TORCHKILN_FLOAT); });
  print_error("half", [] { launch(scale, TORCHKILN_HALF); });
  std::cout << torchkiln::control("statistics") << "\n";
  print_error("text", [] { const torchkiln::Template other("acme_scale", "another text"); });
  print_error("entry", [] { const Scale other(declaration("acme::missing", 0)); });
  print_error("include", [] {
    const torchkiln::Template odd("acme_odd", "#include <vector>\n__global__ void scale() {}");
    auto wrong = declaration("scale", 0);
    wrong.path = odd.path();
    const Scale other(wrong);
  });
  static const Scale wide(declaration("acme::scale", 2048));
  print_error("block", [] { launch(wide, TORCHKILN_FLOAT); });
}
