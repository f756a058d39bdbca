// Trains a small detection head in C++: compiles its kernels ahead, takes gradient steps through torchkiln's operators,
// and prints what happened as JSON lines. Without a GPU it trains on the CPU, and still compiles ahead for GPUs.
//
//   train [--arch sm_90] [--manifest used.json] [--steps 20] [--device cpu|cuda]
//
// With TORCHKILN_RECORD=used.json in the environment a run on a GPU writes down the kernels that it used; --manifest
// compiles exactly those ahead, here or elsewhere.
//
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>

#include <cmath>
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "torchkiln/autograd.hpp"
#include "torchkiln/torchkiln.hpp"

namespace {

struct Options {
  std::string arch;      // empty: nothing is compiled ahead
  std::string manifest;  // empty: every variant of the operators
  std::string device = "cpu";
  int steps = 20;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--arch") {
      options.arch = value;
    } else if (name == "--manifest") {
      options.manifest = value;
    } else if (name == "--device") {
      options.device = value;
    } else if (name == "--steps") {
      options.steps = std::stoi(value);
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  return options;
}

// Numbers that another program can make again.
at::Tensor wave(at::IntArrayRef shape, double speed) {
  const auto count = c10::multiply_integers(shape);
  return at::sin(at::arange(count, at::kFloat) * speed).reshape(shape);
}

struct Batch {
  at::Tensor images = wave({2, 3, 32, 32}, 0.37);
  at::Tensor rois = at::tensor({0., 2., 2., 20., 20., 0., 8.,  4.,  30., 28.,
                                1., 0., 0., 31., 31., 1., 10., 12., 26., 24.},
                               at::kFloat)
                        .reshape({4, 5});
  at::Tensor labels = at::tensor({0, 1, 2, 3}, at::kLong);  // 3 classes; 3 is background
};

struct Model {
  at::Tensor filter = wave({8, 3, 3, 3}, 0.11) * 0.3;
  at::Tensor classifier = wave({3, 16}, 0.23) * 0.3;

  std::vector<at::Tensor*> parameters() { return {&filter, &classifier}; }

  at::Tensor loss(const Batch& batch) const {
    namespace ops = torchkiln::autograd;
    const at::Tensor maps = at::relu(at::conv2d(batch.images, filter, {}, 1, 1));
    const at::Tensor aligned = ops::roi_align(maps, batch.rois, 4, 4, 1.0, 2, true);
    const at::Tensor pooled = ops::roi_pool(maps, batch.rois, 4, 4);
    const at::Tensor features =
        at::cat({aligned.mean(at::IntArrayRef{2, 3}), pooled.mean(at::IntArrayRef{2, 3})}, 1);
    return ops::sigmoid_focal_loss(at::matmul(features, classifier.t()), batch.labels, {}, 0.25,
                                   2.0, ops::Reduction::kMean);
  }
};

void print_numbers(const char* name, const at::Tensor& tensor) {
  const at::Tensor flat = tensor.detach().cpu().contiguous().flatten();
  std::cout << "\"" << name << "\": [" << std::setprecision(9);
  for (std::int64_t i = 0; i < flat.numel(); ++i)
    std::cout << (i == 0 ? "" : ", ") << flat[i].item<float>();
  std::cout << "]";
}

void train(const Options& options) {
  Batch batch;
  Model model;
  for (at::Tensor* tensor : {&batch.images, &batch.rois, &batch.labels})
    *tensor = tensor->to(options.device);
  for (at::Tensor* parameter : model.parameters())
    *parameter = parameter->to(options.device).set_requires_grad(true);

  for (int step = 0; step < options.steps; ++step) {
    const at::Tensor loss = model.loss(batch);
    loss.backward();
    std::cout << "{\"step\": " << step << ", \"loss\": " << std::setprecision(9)
              << loss.item<float>();
    if (step == 0) {
      std::cout << ", ";
      print_numbers("filter_gradient", model.filter.grad());
      std::cout << ", ";
      print_numbers("classifier_gradient", model.classifier.grad());
    }
    std::cout << "}\n";
    const at::NoGradGuard no_grad;
    for (at::Tensor* parameter : model.parameters()) {
      parameter->sub_(parameter->grad(), 0.5);
      parameter->mutable_grad() = at::Tensor();
    }
  }
}

// An operator without a gradient: any schema can be called through torch's dispatcher.
void suppress() {
  using Nms = at::Tensor(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold,
                         double offset, std::optional<double> score_threshold,
                         std::optional<std::int64_t> max_output);
  static const auto nms =
      c10::Dispatcher::singleton().findSchemaOrThrow("torchkiln::nms", "").typed<Nms>();
  const at::Tensor boxes =
      at::tensor({0., 0., 9., 9., 1., 1., 9., 9., 20., 20., 29., 29.}, at::kFloat).reshape({3, 4});
  const at::Tensor kept =
      nms.call(boxes, at::tensor({0.8, 0.9, 0.7}, at::kFloat), 0.5, 0, std::nullopt, std::nullopt);
  std::cout << "{\"kept\": " << kept.size(0) << "}\n";
}

// Compiles ahead what training will run; on the machine that runs it, or on one that only builds.
void warm(const Options& options) {
  const std::string what =
      options.manifest.empty()
          ? R"("operators": ["roi_align", "roi_pool", "sigmoid_focal_loss"], "dtypes": ["float32"])"
          : R"("manifests": [")" + options.manifest + R"("])";
  const std::string request = "{" + what + R"(, "targets": [")" + options.arch + R"("]})";
  std::cout << "{\"warm\": " << torchkiln::control("warm", request) << "}\n";
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = parse(argc, argv);
  std::cout << "{\"version\": \"" << torchkiln_version() << "\"}\n";
  // What the engine has to say (a slow compile, an unusable cache) goes wherever the program likes.
  torchkiln_set_log_sink(
      [](void*, std::int32_t level, const char* sentence) {
        std::cerr << (level >= TORCHKILN_LOG_WARNING ? "warning: " : "") << sentence << "\n";
      },
      nullptr);

  if (!options.arch.empty()) warm(options);
  suppress();
  train(options);

  std::cout << "{\"statistics\": {";
  const char* separator = "";
  for (const auto& [name, value] : torchkiln::statistics()) {
    std::cout << separator << "\"" << name << "\": " << value;
    separator = ", ";
  }
  std::cout << "}}\n";
  return 0;
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
