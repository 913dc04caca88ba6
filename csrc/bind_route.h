// Arguments of route and its backward: the checks of gose_kernels/ops/route.py in the same words,
// conversion to what the kernels read, scratch.
#pragma once

#include <cmath>
#include <memory>
#include <optional>

#include "bind_routing.h"

namespace gose {

struct RouteOptions {  // in schema order
  std::string policy;
  bool softmax_before, renormalize;
  std::string gate;
  int64_t num_groups, top_groups;
  double entropy_floor;
  std::optional<double> tau;
  std::optional<int64_t> capacity;
  std::string capacity_order;
  std::optional<std::string> adaptive;
  double mass;
  std::vector<double> bands;
  double noise_std;

  bool egs() const { return policy == "egs"; }
  bool sigmoid() const {
    return policy == "sigmoid" || (policy == "group_limited" && gate == "sigmoid");
  }
};

struct RouteTensors {
  std::optional<Tensor> entropy_TE, entropy_E, bias_E, noise_TE;
};

// What route and its backward share: tensors that keep the input alive, and scratch.
struct RouteSource {
  Tensor score;
  std::optional<Tensor> entropy, bias, noise;
  std::vector<double> bands;
  std::unique_ptr<float[]> floats;
  std::vector<int32_t> ints;
  std::unique_ptr<double[]> doubles;
  std::unique_ptr<float[]> log_p;
  std::unique_ptr<uint32_t[]> order;
  RouteInput in;
  RouteScratch scratch;
};

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

template <class Wanted, class Got>
inline void want(bool holds, const char* argument, const Wanted& wanted, const Got& got) {
  if (!holds) refuse("route: ", argument, " must be ", wanted, ", got ", got);
}

// A number as Python writes it: 1.0, not 1.
inline std::string real(double x) {
  std::ostringstream text;
  text << x;
  return std::isfinite(x) && x == std::floor(x) && std::fabs(x) < 1e5 ? text.str() + ".0"
                                                                      : text.str();
}

inline std::string reals(const std::vector<double>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + real(values[i]);
  return text + "]";
}

inline std::string quoted(const std::string& text) { return "'" + text + "'"; }

inline void want_tensor(const char* name, const std::optional<Tensor>& value,
                        const std::vector<int64_t>& shape, bool read) {
  if (!value) return;
  want(read, name, "None", "a tensor: this policy does not read it");
  if (sizes_of(*value, value->dim()) != shape) {
    want(false, name, "of shape " + shape_text(shape), shape_of(*value));
  }
  want(is_floating(*value), name, "floating point", dtype_name(value->scalar_type()));
}

inline void check_groups(const RouteOptions& o, int64_t E, int64_t top_k) {
  if (o.num_groups < 1 || E % o.num_groups != 0) {
    want(false, "num_groups", "a divisor of E=" + std::to_string(E), o.num_groups);
  }
  if (o.top_groups < 1 || o.top_groups > o.num_groups) {
    want(false, "top_groups", "in [1, num_groups=" + std::to_string(o.num_groups) + "]",
         o.top_groups);
  }
  const int64_t room = o.top_groups * (E / o.num_groups);
  if (top_k > room) {
    want(false, "top_k", "at most the " + std::to_string(room) + " experts of the top_groups",
         top_k);
  }
}

inline void check_adaptive(const RouteOptions& o) {
  if (!o.adaptive) return;
  const std::string& kind = *o.adaptive;
  want(kind == "mass" || kind == "bands", "adaptive", "None, mass or bands", kind);
  want(o.policy != "expert_choice", "adaptive", "None for expert_choice", kind);
  if (!(0 < o.mass && o.mass <= 1)) want(false, "mass", "in (0, 1]", real(o.mass));
  bool fits = kind == "mass" || !o.bands.empty();
  for (size_t i = 1; i < o.bands.size(); ++i) fits = fits && o.bands[i - 1] < o.bands[i];
  if (!fits) want(false, "bands", "ascending and not empty", reals(o.bands));
}

inline void check_route(const Tensor& score, int64_t top_k, const RouteTensors& given,
                        const RouteOptions& o) {
  if (score.dim() != 2) {
    refuse("route: score_TE must be of 2 dimensions, got shape ", shape_of(score));
  }
  want(is_floating(score), "score_TE", "floating point", dtype_name(score.scalar_type()));
  const int64_t T = score.size(0), E = score.size(1);
  if (top_k < 1 || top_k > E) refuse("route: top_k must be in [1, E=", E, "], got ", top_k);
  const bool softmax = o.policy == "softmax", egs = o.egs();
  if (!softmax && !egs && o.policy != "sigmoid" && o.policy != "group_limited" &&
      o.policy != "expert_choice") {
    want(false, "policy", "one of softmax, sigmoid, group_limited, expert_choice, egs",
         quoted(o.policy));
  }
  want_tensor("entropy_TE", given.entropy_TE, {T, E}, egs);
  want_tensor("entropy_E", given.entropy_E, {E}, egs);
  want_tensor("bias_E", given.bias_E, {E}, o.sigmoid());
  want_tensor("noise_TE", given.noise_TE, {T, E}, softmax);
  const int count = given.entropy_TE.has_value() + given.entropy_E.has_value();
  want(count == egs, "exactly one of entropy_TE and entropy_E", "given to policy egs", count);
  if (!(o.entropy_floor > 0)) want(false, "entropy_floor", "above 0", real(o.entropy_floor));
  if (o.tau) {
    if (!egs) want(false, "tau", "None", real(*o.tau) + ": only policy egs reads it");
    if (!(*o.tau > 0)) want(false, "tau", "above 0", real(*o.tau));
  }
  if (o.gate != "softmax" && o.gate != "sigmoid") {
    want(false, "gate", "softmax or sigmoid", quoted(o.gate));
  }
  if (o.policy == "group_limited") check_groups(o, E, top_k);
  if (o.capacity_order != "token" && o.capacity_order != "priority") {
    want(false, "capacity_order", "token or priority", o.capacity_order);
  }
  want(o.capacity.has_value() || o.policy != "expert_choice", "capacity",
       "given to policy expert_choice", "None");
  if (o.capacity) want(*o.capacity >= 1, "capacity", "at least 1", *o.capacity);
  check_adaptive(o);
  if (!(o.noise_std >= 0)) want(false, "noise_std", "at least 0", real(o.noise_std));
  if (!softmax && o.noise_std != 0) {
    want(false, "noise_std", "0 for " + o.policy, real(o.noise_std));
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

inline RoutePolicy policy_of(const std::string& name) {
  return name == "softmax"         ? RoutePolicy::kSoftmax
         : name == "sigmoid"       ? RoutePolicy::kSigmoid
         : name == "group_limited" ? RoutePolicy::kGroupLimited
         : name == "expert_choice" ? RoutePolicy::kExpertChoice
                                   : RoutePolicy::kEgs;
}

inline RouteSource prepare_route_source(const Tensor& score_TE, int64_t top_k,
                                        const RouteTensors& given, const RouteOptions& o) {
  check_route(score_TE, top_k, given, o);
  const int64_t T = score_TE.size(0), E = score_TE.size(1);
  const int64_t blocks = std::max<int64_t>(1, (T + kRouteBlock - 1) / kRouteBlock);
  const int64_t padded = (E + 15) / 16 * 16, rows = blocks * kRouteRows * padded;
  RouteSource s = {};
  s.score = rows_contiguous(score_TE);
  s.entropy = float_rows(given.entropy_TE ? given.entropy_TE : given.entropy_E);
  s.bias = float_rows(given.bias_E);
  s.noise = float_rows(given.noise_TE);
  s.bands = o.bands;
  s.floats.reset(new float[rows + 2 * padded]);
  s.ints.resize(blocks * kRouteCounts * padded);
  s.doubles.reset(new double[blocks * 3]());
  const RoutePolicy policy = policy_of(o.policy);
  if (policy == RoutePolicy::kExpertChoice) {
    s.log_p.reset(new float[T * padded]);
    s.order.reset(new uint32_t[T * padded]);
  } else if (o.capacity && o.capacity_order == "priority") {
    s.log_p.reset(new float[T]);
    s.order.reset(new uint32_t[T * 4]);
  }
  s.in = {
      .score = s.score.const_data_ptr(),
      .entropy = floats_of(s.entropy),
      .bias = floats_of(s.bias),
      .noise = floats_of(s.noise),
      .bands = s.bands.data(),
      .T = T,
      .E = E,
      .K = top_k,
      .stride_st = s.score.stride(0),
      .stride_et = given.entropy_TE ? s.entropy->stride(0) : 0,
      .stride_nt = s.noise ? s.noise->stride(0) : 0,
      .num_groups = o.num_groups,
      .top_groups = o.top_groups,
      .num_bands = int64_t(s.bands.size()),
      .capacity = o.capacity.value_or(0),
      .floor = float(o.entropy_floor),
      .tau = o.tau ? float(*o.tau) : 0.f,
      .mass = float(o.mass),
      .noise_std = float(o.noise_std),
      .policy = policy,
      .sum = o.egs() || o.renormalize ? RouteSum::kChosen
             : o.sigmoid()            ? RouteSum::kNothing
             : o.softmax_before       ? RouteSum::kExperts
                                      : RouteSum::kChosen,
      .adaptive = !o.adaptive             ? RouteAdaptive::kNone
                  : *o.adaptive == "mass" ? RouteAdaptive::kMass
                                          : RouteAdaptive::kBands,
      .sigmoid = o.sigmoid(),
      .priority = o.capacity_order == "priority",
      .dtype = float_dtype("route", "score_TE", s.score),
  };
  s.scratch = {s.floats.get(),        s.ints.data(), s.doubles.get(),
               s.floats.get() + rows, s.log_p.get(), s.order.get()};
  return s;
}

// An uninitialised contiguous tensor, without the dispatcher: six outputs cost more than one row.
inline Tensor cpu_empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  const int64_t* size = sizes.begin();
  const int64_t stride[2] = {sizes.size() > 1 ? std::max<int64_t>(1, size[1]) : 1, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), size, stride,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

struct RouteCall {
  RouteSource source;
  Tensor weight, expert, entropy, load, importance, loss;
  RouteParams params;
};

inline RouteCall prepare_route(const Tensor& score_TE, int64_t top_k, const RouteTensors& given,
                               const RouteOptions& options) {
  RouteSource source = prepare_route_source(score_TE, top_k, given, options);
  const int64_t T = source.in.T, E = source.in.E;
  Tensor weight = cpu_empty({T, top_k}, ScalarType::Float);
  Tensor expert = cpu_empty({T, top_k}, ScalarType::Int);
  Tensor entropy = cpu_empty({T}, ScalarType::Float);
  Tensor load = cpu_empty({E}, ScalarType::Int);
  Tensor importance = cpu_empty({E}, ScalarType::Float);
  Tensor loss = cpu_empty({5}, ScalarType::Float);
  const RouteParams params = {
      .in = source.in,
      .weight = static_cast<float*>(weight.mutable_data_ptr()),
      .expert = static_cast<int32_t*>(expert.mutable_data_ptr()),
      .entropy = static_cast<float*>(entropy.mutable_data_ptr()),
      .load = static_cast<int32_t*>(load.mutable_data_ptr()),
      .importance = static_cast<float*>(importance.mutable_data_ptr()),
      .loss = static_cast<float*>(loss.mutable_data_ptr()),
      .scratch = source.scratch,
  };
  return {std::move(source), weight, expert, entropy, load, importance, loss, params};
}

struct RouteBackwardCall {
  RouteSource source;
  std::vector<Tensor> read;  // contiguous inputs
  Tensor grad;
  RouteBackwardParams params;
};

inline RouteBackwardCall prepare_route_backward(
    const Tensor& score_TE, int64_t top_k, const RouteTensors& given, const Tensor& expert_TK,
    const Tensor& load_E, const Tensor& importance_E, const std::optional<Tensor>& grad_weight_TK,
    const std::optional<Tensor>& grad_entropy_T, const std::optional<Tensor>& grad_importance_E,
    const std::optional<Tensor>& grad_loss_L, const RouteOptions& options) {
  RouteSource source = prepare_route_source(score_TE, top_k, given, options);
  const int64_t T = source.in.T, E = source.in.E;
  std::vector<Tensor> read;
  const auto pointer = [&](const char* name, const std::optional<Tensor>& t,
                           const std::vector<int64_t>& shape, ScalarType type) -> const void* {
    if (!t) return nullptr;
    if (sizes_of(*t, t->dim()) != shape || t->scalar_type() != type) {
      refuse("route_backward: ", name, " must be ", dtype_name(type), " of shape ",
             shape_text(shape), ", got ", dtype_name(t->scalar_type()), " of shape ", shape_of(*t));
    }
    read.push_back(torch::stable::contiguous(*t));
    return read.back().const_data_ptr();
  };
  const auto floats = [&](const char* name, const std::optional<Tensor>& t,
                          const std::vector<int64_t>& shape) {
    return static_cast<const float*>(pointer(name, t, shape, ScalarType::Float));
  };
  const auto ints = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
    return static_cast<const int32_t*>(pointer(name, t, shape, ScalarType::Int));
  };
  const int32_t* expert = ints("expert_TK", expert_TK, {T, top_k});
  for (int64_t n = 0; n < T * top_k; ++n) {
    if (expert[n] < 0 || expert[n] > E) {
      refuse("route_backward: expert_TK must hold experts in [0, E=", E, "], got ", expert[n]);
    }
  }
  // The gradient of entropies comes in float32 and is rounded to their dtype at the end.
  const ScalarType type = options.egs() ? ScalarType::Float : score_TE.scalar_type();
  const std::vector<int64_t> shape =
      given.entropy_E ? std::vector<int64_t>{E} : std::vector<int64_t>{T, E};
  Tensor grad = torch::stable::new_empty(source.score, shape, type);
  const RouteBackwardParams params = {
      .in = source.in,
      .expert = expert,
      .load = ints("load_E", load_E, {E}),
      .importance = floats("importance_E", importance_E, {E}),
      .grad_weight = floats("grad_weight_TK", grad_weight_TK, {T, top_k}),
      .grad_entropy = floats("grad_entropy_T", grad_entropy_T, {T}),
      .grad_importance = floats("grad_importance_E", grad_importance_E, {E}),
      .grad_loss = floats("grad_loss_L", grad_loss_L, {5}),
      .grad = grad.mutable_data_ptr(),
      .scratch = source.scratch,
  };
  return {std::move(source), std::move(read), grad, params};
}

}  // namespace gose
