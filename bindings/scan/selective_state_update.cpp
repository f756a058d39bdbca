// selective_state_update: schema, checks and shapes, CPU loops, launch.
// SPDX-License-Identifier: Apache-2.0
#include "scan/selective_state_update.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/scan/parameters.h"
#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using selective_state_update::Args;
using selective_state_update::Channel;
using Optional = std::optional<Tensor>;

constexpr const char* kOp = "selective_state_update";
// So few do not fill a GPU: more threads for each.
constexpr std::int64_t kFewChannels = 1 << 14;

// ---- kernels ----

struct Statics {
  std::int64_t scalar, state, is_complex, method, vector;
};
struct Sizes {
  std::int64_t sequences, channels, states;
};
struct Tunables {
  std::int64_t block_size, lanes;
};
using Update = Kernel<Args, Statics, Sizes, Tunables>;

// Methods that need no later sample.
const std::vector<std::int64_t> kCausal = {0, 1, 2, 3, 4, 6, 7, 8, 10};

// States that are read at once.
std::int64_t full_vector(const Statics& s) {
  return s.is_complex != 0 || s.state == TORCHKILN_DOUBLE ? 1 : 4;
}

const Update update_kernel({
    .path = "scan/selective_state_update.cuh",
    .entry = "update",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes), types("state", kFloatTypes), bools("complex"),
                ints("method", kCausal), ints("vector", {1, 4})},
    .sizes = {{"sequences", TORCHKILN_BUCKET_POW2},
              {"channels", TORCHKILN_BUCKET_POW2},
              {"states", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256}), ints("lanes", {2, 4, 8, 16, 32})},
    .defaults = {{128, 2}, {128, 16}, {128, 4}},
    .valid =
        [](const Statics& s) {
          const std::int64_t sums =
              s.scalar == TORCHKILN_DOUBLE ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT;
          const bool is_state = s.state == sums || (s.state == s.scalar && s.is_complex == 0);
          return is_state && (s.vector == 1 || s.vector == full_vector(s));
        },
    .choose = [](const Update::Problem& p) -> std::uint32_t {
      if (p.sizes.states > 8 * p.statics.vector) return 1;
      return p.sizes.sequences * p.sizes.channels <= kFewChannels ? 2 : 0;
    },
    .geometry =
        [](const Update::Problem& p, const Tunables& t) {
          return by_sequence(ceil_div(p.sizes.channels, t.block_size / t.lanes), p.sizes.sequences,
                             t.block_size);
        },
});

// ---- checks and shapes ----

// The tensors that keep the pointers of Args alive.
struct Plan {
  Tensor state, x, dt, A, B, C, out;
  Optional D, z, dt_bias, indices, seen, x_history, B_history, dt_history;
  Args args;
};

struct Inputs {
  const Tensor &state, &x, &dt, &A, &B, &C;
  const Optional &D, &z, &dt_bias, &indices, &seen, &x_history, &B_history, &dt_history;
  bool softplus, is_complex;
  std::int64_t method;

  bool has_heads() const { return state.dim() - is_complex == 4; }
};

using Sizes4 = std::vector<std::int64_t>;

std::string listed(const Sizes4& sizes) {
  std::string result = "(";
  for (const std::int64_t size : sizes)
    result += (result.size() > 1 ? ", " : "") + std::to_string(size);
  return result + (sizes.size() == 1 ? ",)" : ")");
}

void check_sizes(const char* name, const Tensor& tensor, Sizes4 sizes, bool is_complex = false) {
  if (is_complex) sizes.push_back(2);
  const Shape got = shape_of(tensor);
  if (std::equal(got.begin(), got.end(), sizes.begin(), sizes.end())) return;
  fail(TORCHKILN_ERROR_VALUE, kOp, name, "have shape " + listed(sizes), text(tensor));
}

void check_like_x(const char* name, const Tensor& tensor, const Tensor& x, const Sizes4& sizes,
                  bool is_complex = false) {
  check_same_dtype(kOp, name, tensor, "x", x);
  check_same_device(kOp, name, tensor, "x", x);
  check_sizes(name, tensor, sizes, is_complex);
}

void check_state(const Inputs& in) {
  check_floating(kOp, "x", in.x);
  const std::int64_t dim = in.state.dim() - in.is_complex;
  if (dim != 3 && dim != 4) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "state", "have shape (B, D, N) or (B, H, D, N)",
         text(in.state));
  }
  check_parameter(kOp, "state", in.state, in.x);
  if (in.is_complex && in.state.scalar_type() != ScalarType::Float &&
      in.state.scalar_type() != ScalarType::Double) {
    fail(TORCHKILN_ERROR_TYPE, kOp, "state", "be complex64 beside a complex A",
         text(in.state.scalar_type()));
  }
  check_own_memory(kOp, "state", in.state);
  if (in.x.dim() != dim - 1) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "x",
         in.has_heads() ? "have shape (B, H, D)" : "have shape (B, D)", text(in.x));
  }
}

void check(const Inputs& in) {
  check_state(in);
  const auto sizes = shape_of(in.x);
  const Sizes4 whole(sizes.begin(), sizes.end()), channels(sizes.begin() + 1, sizes.end());
  const std::int64_t n = in.state.size(in.state.dim() - 1 - in.is_complex);
  const auto with = [](Sizes4 first, std::int64_t last) {
    first.push_back(last);
    return first;
  };
  Sizes4 of_state = with(whole, n);
  if (in.indices) of_state[0] = in.state.size(0);
  check_sizes("state", in.state, of_state, in.is_complex);
  check_like_x("dt", in.dt, in.x, whole);
  check_parameter(kOp, "A", in.A, in.x);
  check_sizes("A", in.A, with(channels, n), in.is_complex);
  const std::int64_t groups = in.B.dim() > 1 ? in.B.size(1) : 0;
  check_like_x("B", in.B, in.x, {in.x.size(0), groups, n}, in.is_complex);
  check_like_x("C", in.C, in.x, {in.x.size(0), groups, n}, in.is_complex);
  if (groups < 1 || in.x.size(1) % groups != 0) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "B",
         "have a number of groups that divides " + std::to_string(in.x.size(1)),
         std::to_string(groups));
  }
  if (in.z) check_like_x("z", *in.z, in.x, whole);
  for (const auto& [name, tensor] : {std::pair{"D", &in.D}, std::pair{"dt_bias", &in.dt_bias}}) {
    if (!*tensor) continue;
    check_parameter(kOp, name, **tensor, in.x);
    check_sizes(name, **tensor, channels);
  }
  if (in.indices) check_numbers(kOp, "state_batch_indices", *in.indices, in.x);
  if (in.x.numel() >= std::int64_t(1) << 31) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "x", "have fewer than 2^31 elements", text(in.x),
         "Split the batch");
  }
}

void check_method(const Inputs& in) {
  const auto method = static_cast<int>(in.method);
  if (method < 0 || method >= selective_scan::kMethods) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "method",
         "be from 0 to " + std::to_string(selective_scan::kMethods - 1), std::to_string(method));
  }
  if (selective_scan::ahead_of(method) > 0) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "discretization", "be a rule that needs no later sample",
         "poly", "Decode with highorder, or scan whole sequences");
  }
}

// What the rules that look back need.
void check_history(const Inputs& in) {
  const std::int64_t back = selective_scan::back_of(static_cast<int>(in.method));
  if (back == 0) return;
  if (!in.x_history || !in.B_history || !in.seen) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "history", "be given for a rule that takes in earlier samples",
         "None", "Make one with torchkiln.ops.scan_history");
  }
  const std::int64_t rows = in.state.size(0), groups = in.B.size(1);
  std::int64_t channels = 1;
  for (std::int64_t i = 1; i < in.x.dim(); ++i) channels *= in.x.size(i);
  const std::int64_t n = in.state.size(in.state.dim() - 1 - in.is_complex);
  check_like_x("history.x", *in.x_history, in.x, {rows, back + 1, channels});
  check_like_x("history.B", *in.B_history, in.x, {rows, back + 1, groups, n}, in.is_complex);
  check_sizes("history.seen", *in.seen, {rows});
  if (in.seen->scalar_type() != ScalarType::Int)
    fail(TORCHKILN_ERROR_TYPE, kOp, "history.seen", "be int32", text(in.seen->scalar_type()));
  const bool has_steps = selective_scan::neighbour_of(static_cast<int>(in.method)) != 0;
  if (has_steps && !in.dt_history) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "history.dt", "be given for a rule in true time", "None",
         "Make the history with true_time=True");
  }
  if (has_steps) check_sizes("history.dt", *in.dt_history, {rows, back + 1, channels});
  for (const Optional* ring : {&in.x_history, &in.B_history, &in.dt_history, &in.seen}) {
    if (*ring && !(*ring)->is_contiguous())
      fail(TORCHKILN_ERROR_VALUE, kOp, "history", "be contiguous", "a tensor with other strides");
  }
}

// Strides of up to `count` dimensions; where there are no heads, a channel is a head of one place, and its stride 0
// stands at `places`. A complex number counts as one.
template <class Stride, std::size_t kCount>
void set_strides(Stride (&to)[kCount], const Tensor& tensor, std::int64_t places, bool has_heads,
                 bool is_complex) {
  std::int64_t from = 0;
  for (std::size_t i = 0; i < kCount; ++i) {
    const bool is_missing = !has_heads && static_cast<std::int64_t>(i) == places;
    to[i] = is_missing ? 0 : static_cast<Stride>(tensor.stride(from++) / (is_complex ? 2 : 1));
  }
}

// Pairs must lie together.
Tensor as_pairs(const Tensor& tensor, bool is_complex) {
  if (!is_complex) return tensor;
  for (std::int64_t i = 0; i + 1 < tensor.dim(); ++i)
    if (tensor.stride(i) % 2 != 0) return torch::stable::contiguous(tensor);
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Strides of what is only read have 32 bits; a tensor in steps of more is a slice of one that has as many bytes.
Tensor near(const char* name, const Tensor& tensor) {
  const auto is_near = [](const Tensor& t) {
    return std::all_of(t.strides().begin(), t.strides().end(),
                       [](std::int64_t s) { return s < std::int64_t(1) << 32; });
  };
  if (is_near(tensor)) return tensor;
  const Tensor copy = torch::stable::contiguous(tensor);
  if (!is_near(copy)) {
    fail(TORCHKILN_ERROR_VALUE, kOp, name, "have strides below 2^32", text(copy),
         "Split the batch or the states");
  }
  return copy;
}
Optional near(const char* name, const Optional& tensor) {
  return tensor ? Optional(near(name, *tensor)) : std::nullopt;
}

const void* pointer(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* mutable_pointer(const Optional& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}
i32 is_float(const Optional& tensor) {
  return tensor && tensor->scalar_type() == ScalarType::Float;
}

Plan plan(const Inputs& in) {
  check(in);
  check_method(in);
  check_history(in);
  const bool heads = in.has_heads();
  Plan p{.state = in.state,
         .x = near("x", in.x),
         .dt = near("dt", in.dt),
         .A = near("A", as_pairs(in.A, in.is_complex)),
         .B = near("B", as_pairs(in.B, in.is_complex)),
         .C = near("C", as_pairs(in.C, in.is_complex)),
         .out = empty(in.x, in.x.scalar_type(), shape_of(in.x)),
         .D = near("D", in.D),
         .z = near("z", in.z),
         .dt_bias = near("dt_bias", in.dt_bias),
         .indices = in.indices ? Optional(as_contiguous(*in.indices)) : std::nullopt,
         .seen = in.seen,
         .x_history = in.x_history,
         .B_history = in.B_history,
         .dt_history = in.dt_history,
         .args = {}};
  Args& a = p.args;
  a.state = p.state.mutable_data_ptr();
  a.x = p.x.const_data_ptr();
  a.dt = p.dt.const_data_ptr();
  a.A = p.A.const_data_ptr();
  a.B = p.B.const_data_ptr();
  a.C = p.C.const_data_ptr();
  a.D = pointer(p.D);
  a.z = pointer(p.z);
  a.dt_bias = pointer(p.dt_bias);
  a.indices = pointer(p.indices);
  a.seen = pointer(p.seen);
  a.x_history = mutable_pointer(p.x_history);
  a.B_history = mutable_pointer(p.B_history);
  a.dt_history = mutable_pointer(p.dt_history);
  a.out = p.out.mutable_data_ptr();
  set_strides(a.state_strides, p.state, 2, heads, in.is_complex);
  set_strides(a.x_strides, p.x, 2, heads, false);
  set_strides(a.dt_strides, p.dt, 2, heads, false);
  if (p.z) set_strides(a.z_strides, *p.z, 2, heads, false);
  set_strides(a.A_strides, p.A, 1, heads, in.is_complex);
  set_strides(a.B_strides, p.B, -1, true, in.is_complex);
  set_strides(a.C_strides, p.C, -1, true, in.is_complex);
  if (p.D) set_strides(a.D_strides, *p.D, 1, heads, false);
  if (p.dt_bias) set_strides(a.bias_strides, *p.dt_bias, 1, heads, false);
  a.batch = p.x.size(0);
  a.heads = p.x.size(1);
  a.places = heads ? p.x.size(2) : 1;
  a.states = p.B.size(2);
  a.groups = p.B.size(1);
  a.channels = static_cast<u32>(a.heads * a.places);
  a.group_heads = static_cast<u32>(a.heads / a.groups);
  a.rows = p.state.size(0);
  a.slots = p.x_history ? p.x_history->size(1) : 1;
  a.softplus = in.softplus;
  a.A_is_float = p.A.scalar_type() == ScalarType::Float;
  a.D_is_float = is_float(p.D);
  a.bias_is_float = is_float(p.dt_bias);
  return p;
}

// ---- CPU ----

void check_rows(const Plan& p) {
  if (!p.indices) return;
  const auto* rows = data<std::int32_t>(*p.indices);
  for (std::int64_t b = 0; b < p.x.size(0); ++b) {
    if (rows[b] < p.args.rows) continue;
    fail(TORCHKILN_ERROR_INDEX, kOp, "state_batch_indices",
         "be below the number of states (" + std::to_string(p.args.rows) + ")",
         std::to_string(rows[b]));
  }
}

// The state is of the type of sums, or of x's own; which one is told at run time, for code that is half as large.
template <class Scalar, class V, int kMethod>
void update_channel(const Args& args, bool is_own, std::int64_t at) {
  using T = Acc<Scalar>;
  using selective_state_update::load_number;
  using selective_state_update::store_number;
  const i64 channels = args.heads * args.places, batch = at / channels;
  const Channel<Scalar, V, kMethod> channel(args, batch, at - batch * channels);
  T sum = 0;
  if (channel.row >= 0) {
    for (i64 n = 0; n < args.states; ++n) {
      const i64 where = channel.state_at(n);
      const V before =
          is_own ? load_number<V, Scalar>(args.state, where) : load_number<V, T>(args.state, where);
      const V state = channel.advance(before, n, sum);
      if (is_own) {
        store_number<V, Scalar>(args.state, where, state);
      } else {
        store_number<V, T>(args.state, where, state);
      }
    }
  }
  channel.finish(sum);
}

template <class Scalar, class V, int kMethod>
void update_all(const Args& args, bool is_own) {
  parallel_for(args.batch * args.heads * args.places, 20 + 8 * args.states,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i)
                   update_channel<Scalar, V, kMethod>(args, is_own, i);
               });
}

template <class Scalar, class V>
void with_method(const Args& args, bool is_own, std::int64_t method) {
  using namespace selective_scan;
  switch (method) {
    case kMamba:
      return update_all<Scalar, V, kMamba>(args, is_own);
    case kZoh:
      return update_all<Scalar, V, kZoh>(args, is_own);
    case kFoh:
      return update_all<Scalar, V, kFoh>(args, is_own);
    case kBilinear:
      return update_all<Scalar, V, kBilinear>(args, is_own);
    case kTustin:
      return update_all<Scalar, V, kTustin>(args, is_own);
    case kHighorder:
      return update_all<Scalar, V, kHighorder>(args, is_own);
    case kRk4:
      return update_all<Scalar, V, kRk4>(args, is_own);
    case kRk4Constant:
      return update_all<Scalar, V, kRk4Constant>(args, is_own);
    default:
      return update_all<Scalar, V, kHighorderTrueTime>(args, is_own);
  }
}

void run_cpu(const Plan& p, const Inputs& in) {
  check_rows(p);
  const bool is_own = p.state.scalar_type() == p.x.scalar_type();
  with_float(p.x.scalar_type(), [&]<class Scalar>() {
    using T = Acc<Scalar>;
    if (in.is_complex) {
      with_method<Scalar, Complex<T>>(p.args, false, in.method);
    } else {
      with_method<Scalar, T>(p.args, is_own, in.method);
    }
  });
}

// ---- CUDA ----

// Whether so many states lie next to each other, aligned, wherever a vector of them begins.
template <class Stride, std::size_t kCount>
bool is_in_vectors(const Tensor& tensor, const Stride (&strides)[kCount], std::int64_t vector) {
  const auto bytes = static_cast<std::uint64_t>(vector) * element_size(tensor.scalar_type());
  return strides[kCount - 1] == 1 &&
         std::all_of(strides, strides + kCount - 1, [&](Stride s) { return s % vector == 0; }) &&
         reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

Statics statics_of(const Plan& p, const Inputs& in) {
  Statics s = {kernel_type(p.x.scalar_type()), kernel_type(p.state.scalar_type()), in.is_complex,
               in.method, 1};
  const std::int64_t full = full_vector(s);
  const Args& a = p.args;
  const bool is_tied = a.A_strides[2] == 0;
  if (a.states % full == 0 && is_in_vectors(p.state, a.state_strides, full) &&
      (is_tied || is_in_vectors(p.A, a.A_strides, full)) && is_in_vectors(p.B, a.B_strides, full) &&
      is_in_vectors(p.C, a.C_strides, full))
    s.vector = full;
  return s;
}

void run_cuda(const Plan& p, const Inputs& in) {
  if (p.out.numel() == 0) return;
  const CudaPlace place(p.x);
  const auto reads_if = [](std::size_t offset, const Optional& tensor) {
    return tensor ? reads(offset, *tensor) : unused(offset);
  };
  const auto updates_if = [](std::size_t offset, const Optional& tensor) {
    return tensor ? updates(offset, *tensor) : unused(offset);
  };
  update_kernel.run(
      place, statics_of(p, in), {p.args.batch, p.args.channels, p.args.states}, p.args,
      {updates(offsetof(Args, state), p.state), reads(offsetof(Args, x), p.x),
       reads(offsetof(Args, dt), p.dt), reads(offsetof(Args, A), p.A),
       reads(offsetof(Args, B), p.B), reads(offsetof(Args, C), p.C),
       reads_if(offsetof(Args, D), p.D), reads_if(offsetof(Args, z), p.z),
       reads_if(offsetof(Args, dt_bias), p.dt_bias), reads_if(offsetof(Args, indices), p.indices),
       reads_if(offsetof(Args, seen), p.seen), updates_if(offsetof(Args, x_history), p.x_history),
       updates_if(offsetof(Args, B_history), p.B_history),
       updates_if(offsetof(Args, dt_history), p.dt_history), writes(offsetof(Args, out), p.out)});
}

template <void (*kRun)(const Plan&, const Inputs&)>
Tensor update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A,
              const Tensor& B, const Tensor& C, const Optional& D, const Optional& z,
              const Optional& dt_bias, bool dt_softplus, const Optional& state_batch_indices,
              std::int64_t method, bool is_complex, const Optional& x_history,
              const Optional& B_history, const Optional& dt_history, const Optional& seen) {
  const Inputs in{.state = state,
                  .x = x,
                  .dt = dt,
                  .A = A,
                  .B = B,
                  .C = C,
                  .D = D,
                  .z = z,
                  .dt_bias = dt_bias,
                  .indices = state_batch_indices,
                  .seen = seen,
                  .x_history = x_history,
                  .B_history = B_history,
                  .dt_history = dt_history,
                  .softplus = dt_softplus,
                  .is_complex = is_complex,
                  .method = method};
  const Plan p = plan(in);
  kRun(p, in);
  return p.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, bool dt_softplus=False, "
      "Tensor? state_batch_indices=None, int method=0, bool is_complex=False, "
      "Tensor(b!)? x_history=None, Tensor(c!)? B_history=None, Tensor(d!)? dt_history=None, "
      "Tensor? seen=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("selective_state_update", TORCH_BOX(&update<&run_cpu>));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("selective_state_update", TORCH_BOX(&update<&run_cuda>));
}

}  // namespace torchkiln::bindings
