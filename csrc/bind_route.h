// Arguments of route and its backward: the checks of gose_kernels/ops/route_call.py in its words,
// conversion to what the kernels read, scratch.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>

#include "bind_routing.h"

namespace gose {

// The numbers of pack_options in gose_kernels/ops/route_call.py, which has checked them: one
// tensor, kept from call to call, where fourteen arguments of their own would cost 4 us each time.
struct RouteOptions {
  RoutePolicy policy;
  bool softmax_before, renormalize, sigmoid_gate;
  int64_t num_groups, top_groups;
  float entropy_floor, tau;  // tau 0 = none
  int64_t capacity;          // 0 = none
  bool priority;
  RouteAdaptive adaptive;
  float mass, noise_std;
  const double* bands;
  int64_t num_bands;

  explicit RouteOptions(const Tensor& packed) {
    constexpr int64_t kNumbers = 13;
    const int64_t count = packed.numel();
    if (packed.scalar_type() != ScalarType::Double || count < kNumbers || !packed.is_contiguous()) {
      refuse("route: options must be the tensor that gose_kernels.ops.route makes of them");
    }
    const double* x = static_cast<const double*>(packed.const_data_ptr());
    policy = RoutePolicy(int32_t(x[0]));
    softmax_before = x[1] != 0, renormalize = x[2] != 0, sigmoid_gate = x[3] != 0;
    num_groups = int64_t(x[4]), top_groups = int64_t(x[5]);
    entropy_floor = float(x[6]), tau = float(x[7]);
    capacity = int64_t(x[8]), priority = x[9] != 0;
    adaptive = RouteAdaptive(int32_t(x[10]));
    mass = float(x[11]), noise_std = float(x[12]);
    bands = x + kNumbers, num_bands = count - kNumbers;
  }

  bool egs() const { return policy == RoutePolicy::kEgs; }
  bool sigmoid() const {
    return policy == RoutePolicy::kSigmoid ||
           (policy == RoutePolicy::kGroupLimited && sigmoid_gate);
  }
};

struct RouteTensors {
  std::optional<Tensor> entropy_TE, entropy_E, bias_E, noise_TE;
};

// What route and its backward share: tensors that keep the input alive, and scratch.
struct RouteSource {
  Tensor score;
  std::optional<Tensor> entropy, bias, noise;
  std::unique_ptr<std::byte[]> large;
  std::unique_ptr<float[]> log_p;
  std::unique_ptr<uint32_t[]> order;
  RouteInput in;
  RouteScratch scratch;
};

template <class Wanted, class Got>
inline void want(bool holds, const char* argument, const Wanted& wanted, const Got& got) {
  if (!holds) refuse("route: ", argument, " must be ", wanted, ", got ", got);
}

inline void want_tensor(const char* name, const std::optional<Tensor>& value,
                        std::initializer_list<int64_t> sizes, bool read) {
  if (!value) return;
  const std::vector<int64_t> shape = sizes;
  want(read, name, "None", "a tensor: this policy does not read it");
  if (sizes_of(*value, value->dim()) != shape) {
    want(false, name, "of shape " + shape_text(shape), shape_of(*value));
  }
  want(is_floating(*value), name, "floating point", dtype_name(value->scalar_type()));
}

inline void check_route(const Tensor& score, int64_t top_k, const RouteTensors& given,
                        const RouteOptions& o) {
  if (score.dim() != 2) {
    refuse("route: score_TE must be of 2 dimensions, got shape ", shape_of(score));
  }
  want(is_floating(score), "score_TE", "floating point", dtype_name(score.scalar_type()));
  const int64_t T = score.size(0), E = score.size(1);
  if (top_k < 1 || top_k > E) refuse("route: top_k must be in [1, E=", E, "], got ", top_k);
  const bool egs = o.egs();
  want_tensor("entropy_TE", given.entropy_TE, {T, E}, egs);
  want_tensor("entropy_E", given.entropy_E, {E}, egs);
  want_tensor("bias_E", given.bias_E, {E}, o.sigmoid());
  want_tensor("noise_TE", given.noise_TE, {T, E}, o.policy == RoutePolicy::kSoftmax);
  const int count = given.entropy_TE.has_value() + given.entropy_E.has_value();
  want(count == egs, "exactly one of entropy_TE and entropy_E", "given to policy egs", count);
  if (o.policy != RoutePolicy::kGroupLimited) return;
  if (E % o.num_groups != 0) {
    refuse("route: num_groups must be a divisor of E=", E, ", got ", o.num_groups);
  }
  const int64_t room = o.top_groups * (E / o.num_groups);
  if (top_k > room) {
    refuse("route: top_k must be at most the ", room, " experts of the top_groups, got ", top_k);
  }
}

inline std::optional<Tensor> float_rows(const std::optional<Tensor>& t) {
  if (!t) return t;
  const bool same = t->scalar_type() == ScalarType::Float;
  return rows_contiguous(same ? *t : torch::stable::to(*t, ScalarType::Float));
}

inline const float* floats_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Scratch of a few tokens stays with the calling thread: its malloc and free cost 0.3 us.
inline std::byte* small_scratch(int64_t count, std::unique_ptr<std::byte[]>& large) {
  constexpr int64_t kKept = 1 << 15;
  thread_local const std::unique_ptr<std::byte[]> kept(new std::byte[kKept]);
  if (count <= kKept) return kept.get();
  large.reset(new std::byte[count]);
  return large.get();
}

// The tensors of a checked call as the kernels read them, and their description. No scratch.
inline RouteSource route_source(const Tensor& score_TE, int64_t top_k, const RouteTensors& given,
                                const RouteOptions& o) {
  check_route(score_TE, top_k, given, o);
  RouteSource s = {};
  s.score = rows_contiguous(score_TE);
  s.entropy = float_rows(given.entropy_TE ? given.entropy_TE : given.entropy_E);
  s.bias = float_rows(given.bias_E);
  s.noise = float_rows(given.noise_TE);
  s.in = {
      .score = s.score.const_data_ptr(),
      .entropy = floats_of(s.entropy),
      .bias = floats_of(s.bias),
      .noise = floats_of(s.noise),
      .bands = o.bands,
      .T = score_TE.size(0),
      .E = score_TE.size(1),
      .K = top_k,
      .stride_st = s.score.stride(0),
      .stride_et = given.entropy_TE ? s.entropy->stride(0) : 0,
      .stride_nt = s.noise ? s.noise->stride(0) : 0,
      .num_groups = o.num_groups,
      .top_groups = o.top_groups,
      .num_bands = o.adaptive == RouteAdaptive::kBands ? o.num_bands : 0,
      .capacity = o.capacity,
      .floor = o.entropy_floor,
      .tau = o.tau,
      .mass = o.mass,
      .noise_std = o.noise_std,
      .policy = o.policy,
      .sum = o.egs() || o.renormalize ? RouteSum::kChosen
             : o.sigmoid()            ? RouteSum::kNothing
             : o.softmax_before       ? RouteSum::kExperts
                                      : RouteSum::kChosen,
      .adaptive = o.adaptive,
      .sigmoid = o.sigmoid(),
      .priority = o.priority,
      .dtype = float_dtype("route", "score_TE", s.score),
  };
  return s;
}

inline RouteSource prepare_route_source(const Tensor& score_TE, int64_t top_k,
                                        const RouteTensors& given, const RouteOptions& o) {
  RouteSource s = route_source(score_TE, top_k, given, o);
  const int64_t T = s.in.T, E = s.in.E;
  const int64_t blocks = std::max<int64_t>(1, (T + kRouteBlock - 1) / kRouteBlock);
  const int64_t padded = (E + 15) / 16 * 16, rows = blocks * kRouteRows * padded;
  // One allocation: doubles, counts, then rows. Doubles and counts start as zeros.
  const int64_t zeros = blocks * (3 * sizeof(double) + kRouteCounts * padded * sizeof(int32_t));
  std::byte* const bytes = small_scratch(zeros + (rows + 2 * padded) * sizeof(float), s.large);
  std::memset(bytes, 0, zeros);
  double* const doubles = reinterpret_cast<double*>(bytes);
  float* const floats = reinterpret_cast<float*>(bytes + zeros);
  if (o.policy == RoutePolicy::kExpertChoice) {
    s.log_p.reset(new float[T * padded]);
    s.order.reset(new uint32_t[T * padded]);
  } else if (o.capacity > 0 && o.priority) {
    s.log_p.reset(new float[T]);
    s.order.reset(new uint32_t[T * 4]);
  }
  s.scratch = {floats,        reinterpret_cast<int32_t*>(doubles + blocks * 3),
               doubles,       floats + rows,
               s.log_p.get(), s.order.get()};
  return s;
}

struct RouteCall {
  RouteSource source;
  NewTensor weight, expert, entropy, load, importance, loss;
  RouteParams params;
};

inline RouteCall prepare_route(const Tensor& score_TE, int64_t top_k, const RouteTensors& given,
                               const RouteOptions& options) {
  RouteSource source = prepare_route_source(score_TE, top_k, given, options);
  const int64_t T = source.in.T, E = source.in.E;
  NewTensor weight({T, top_k}, ScalarType::Float), expert({T, top_k}, ScalarType::Int);
  NewTensor entropy({T}, ScalarType::Float), load({E}, ScalarType::Int);
  NewTensor importance({E}, ScalarType::Float), loss({5}, ScalarType::Float);
  const RouteParams params = {
      .in = source.in,
      .weight = static_cast<float*>(weight.data()),
      .expert = static_cast<int32_t*>(expert.data()),
      .entropy = static_cast<float*>(entropy.data()),
      .load = static_cast<int32_t*>(load.data()),
      .importance = static_cast<float*>(importance.data()),
      .loss = static_cast<float*>(loss.data()),
      .scratch = source.scratch,
  };
  return {std::move(source), std::move(weight),     std::move(expert), std::move(entropy),
          std::move(load),   std::move(importance), std::move(loss),   params};
}

// What route_backward takes beside route's inputs: its outputs, and a gradient of each or none.
struct RouteUpstream {
  Tensor expert_TK, load_E, importance_E;
  std::optional<Tensor> grad_weight_TK, grad_entropy_T, grad_importance_E, grad_loss_L;
};

// The same as the kernels read it.
struct RouteRead {
  std::vector<Tensor> tensors;  // contiguous
  const int32_t *expert, *load;
  const float *importance, *grad_weight, *grad_entropy, *grad_importance, *grad_loss;
};

inline RouteRead read_upstream(const RouteUpstream& up, int64_t T, int64_t E, int64_t K) {
  RouteRead read = {};
  const auto pointer = [&](const char* name, const std::optional<Tensor>& t,
                           const std::vector<int64_t>& shape, ScalarType type) -> const void* {
    if (!t) return nullptr;
    if (sizes_of(*t, t->dim()) != shape || t->scalar_type() != type) {
      refuse("route_backward: ", name, " must be ", dtype_name(type), " of shape ",
             shape_text(shape), ", got ", dtype_name(t->scalar_type()), " of shape ", shape_of(*t));
    }
    read.tensors.push_back(dense(*t));
    return read.tensors.back().const_data_ptr();
  };
  const auto floats = [&](const char* name, const std::optional<Tensor>& t,
                          const std::vector<int64_t>& shape) {
    return static_cast<const float*>(pointer(name, t, shape, ScalarType::Float));
  };
  const auto ints = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
    return static_cast<const int32_t*>(pointer(name, t, shape, ScalarType::Int));
  };
  read.expert = ints("expert_TK", up.expert_TK, {T, K});
  read.load = ints("load_E", up.load_E, {E});
  read.importance = floats("importance_E", up.importance_E, {E});
  read.grad_weight = floats("grad_weight_TK", up.grad_weight_TK, {T, K});
  read.grad_entropy = floats("grad_entropy_T", up.grad_entropy_T, {T});
  read.grad_importance = floats("grad_importance_E", up.grad_importance_E, {E});
  read.grad_loss = floats("grad_loss_L", up.grad_loss_L, {5});
  return read;
}

struct RouteBackwardCall {
  RouteSource source;
  RouteRead read;
  NewTensor grad;
  RouteBackwardParams params;
};

inline RouteBackwardCall prepare_route_backward(const Tensor& score_TE, int64_t top_k,
                                                const RouteTensors& given, const RouteUpstream& up,
                                                const RouteOptions& options) {
  RouteSource source = prepare_route_source(score_TE, top_k, given, options);
  const int64_t T = source.in.T, E = source.in.E;
  RouteRead read = read_upstream(up, T, E, top_k);
  for (int64_t n = 0; n < T * top_k; ++n) {
    if (read.expert[n] < 0 || read.expert[n] > E) {
      refuse("route_backward: expert_TK must hold experts in [0, E=", E, "], got ", read.expert[n]);
    }
  }
  // The gradient of entropies comes in float32 and is rounded to their dtype at the end.
  const ScalarType type = options.egs() ? ScalarType::Float : score_TE.scalar_type();
  NewTensor grad = given.entropy_E ? NewTensor({E}, type) : NewTensor({T, E}, type);
  const RouteBackwardParams params = {
      .in = source.in,
      .expert = read.expert,
      .load = read.load,
      .importance = read.importance,
      .grad_weight = read.grad_weight,
      .grad_entropy = read.grad_entropy,
      .grad_importance = read.grad_importance,
      .grad_loss = read.grad_loss,
      .grad = grad.data(),
      .scratch = source.scratch,
  };
  return {std::move(source), std::move(read), std::move(grad), params};
}

}  // namespace gose
