// Prints, for each operator of autograd.hpp, the gradients of sum(output * (1 + wave)) and what goes wrong when it should, one
// JSON object a line; test_cpp.py computes the same in Python.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>

#include <exception>
#include <iomanip>
#include <iostream>
#include <string>
#include <vector>

#include "torchkiln/autograd.hpp"
#include "torchkiln/torchkiln.hpp"

namespace {

namespace ops = torchkiln::autograd;
using at::Tensor;

Tensor wave(at::IntArrayRef shape, double speed) {
  return at::sin(at::arange(c10::multiply_integers(shape), at::kFloat) * speed).reshape(shape);
}

Tensor leaf(const Tensor& tensor) { return tensor.detach().set_requires_grad(true); }

Tensor rois() {
  return at::tensor({0., 1., 1., 7., 6., 1., 0., 2., 5., 7.}, at::kFloat).reshape({2, 5});
}

Tensor boxes(double shift) {
  return at::tensor({0., 0., 4., 4., 2., 1., 7., 5.}, at::kFloat).reshape({2, 4}) + shift;
}

void print(const std::string& name, const Tensor& output, const std::vector<Tensor>& leaves) {
  (output * (1 + wave(output.sizes(), 0.7))).sum().backward();
  std::cout << "{\"case\": \"" << name << "\", \"gradients\": [" << std::setprecision(9);
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    const Tensor flat = leaves[i].grad().contiguous().flatten();
    std::cout << (i == 0 ? "[" : ", [");
    for (std::int64_t j = 0; j < flat.numel(); ++j)
      std::cout << (j == 0 ? "" : ", ") << flat[j].item<float>();
    std::cout << "]";
  }
  std::cout << "]}\n";
}

template <class F>
void print_error(const std::string& name, const F& f) {
  std::string text = "no error";
  try {
    f();
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    text = error.what();
  }
  for (std::size_t at = 0; (at = text.find_first_of("\"\\\n", at)) != text.npos; ++at)
    text[at] = '\'';
  std::cout << "{\"case\": \"" << name << "\", \"error\": \"" << text << "\", \"record\": \""
            << torchkiln_last_error()->message << "\"}\n";
}

void print_gradients() {
  const Tensor a = leaf(boxes(0)), b = leaf(boxes(0.5));
  print("box_iou", ops::box_iou(a, b, ops::IouKind::kGeneralized), {a, b});

  const Tensor maps = leaf(wave({2, 3, 8, 8}, 0.3));
  print("roi_align", ops::roi_align(maps, rois(), 3, 2, 0.8, 2, true), {maps});
  const Tensor peaks = leaf(wave({2, 3, 8, 8}, 0.3));
  print("roi_align_max", ops::roi_align(peaks, rois(), 3, 2, 0.8, 2, true, ops::Pooling::kMaximum),
        {peaks});
  const Tensor last = leaf(wave({2, 3, 8, 8}, 0.3).contiguous(at::MemoryFormat::ChannelsLast));
  print("roi_align_channels_last", ops::roi_align(last, rois(), 3, 2), {last});
  const Tensor pooled = leaf(wave({2, 3, 8, 8}, 0.3));
  print("roi_pool", ops::roi_pool(pooled, rois(), 3, 2, 0.8, false), {pooled});

  const Tensor logits = leaf(wave({4, 3}, 0.9));
  const Tensor labels = at::tensor({0, 1, 2, 3}, at::kLong);
  print(
      "focal_labels",
      ops::sigmoid_focal_loss(logits, labels, wave({3}, 0.4).abs(), 0.3, 1.5, ops::Reduction::kSum),
      {logits});
  const Tensor soft = leaf(wave({4, 3}, 0.9));
  print("focal_soft", ops::sigmoid_focal_loss(soft, wave({4, 3}, 0.2).abs()), {soft});
}

void print_errors() {
  print_error("wrong_shape", [] { ops::roi_align(wave({3, 8, 8}, 1), rois(), 2, 2); });
  print_error("second_derivative", [] {
    const Tensor a = leaf(boxes(0));
    ops::box_iou(a, boxes(1)).sum().backward({}, true, true);
  });
  print_error("gradient_of_targets", [] {
    const Tensor soft = leaf(wave({4, 3}, 0.2).abs());
    ops::sigmoid_focal_loss(leaf(wave({4, 3}, 0.9)), soft).sum().backward();
  });
  const Tensor fixed = ops::roi_pool(wave({2, 3, 8, 8}, 0.3), rois(), 2, 2);
  std::cout << "{\"case\": \"no_gradient_wanted\", \"requires_grad\": " << fixed.requires_grad()
            << "}\n";
}

}  // namespace

int main() {
  print_gradients();
  print_errors();
}
