// Checks and allocation of entropy, dispatch and route on the CPU.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "bind.h"

namespace gose {

inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < dims; ++i) sizes.push_back(t.size(i));
  return sizes;
}

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

struct EntropyCall {
  Tensor logits, out;
  EntropyParams params;
};

inline void check_logits(const char* op, const Tensor& logits) {
  if (logits.dim() < 1 || logits.size(logits.dim() - 1) < 1) {
    refuse(op, ": logits_BMC must have a last dimension of at least one class, got shape ",
           shape_of(logits));
  }
}

inline EntropyCall prepare_entropy(const Tensor& logits_BMC) {
  check_logits("entropy", logits_BMC);
  const DType dtype = float_dtype("entropy", "logits_BMC", logits_BMC);
  const Tensor logits = torch::stable::contiguous(logits_BMC);
  const int64_t dims = logits.dim() - 1, C = logits.size(dims);
  Tensor out = torch::stable::new_empty(logits, sizes_of(logits, dims), ScalarType::Float);
  const EntropyParams params = {
      .logits = logits.const_data_ptr(),
      .out = static_cast<float*>(out.mutable_data_ptr()),
      .rows = logits.numel() / C,
      .C = C,
      .dtype = dtype,
  };
  return {logits, out, params};
}

struct EntropyBackwardCall {
  Tensor grad, logits, grad_logits;
  EntropyBackwardParams params;
};

inline EntropyBackwardCall prepare_entropy_backward(const Tensor& grad_BM,
                                                    const Tensor& logits_BMC) {
  const char* op = "entropy_backward";
  check_logits(op, logits_BMC);
  const int64_t dims = logits_BMC.dim() - 1, C = logits_BMC.size(dims);
  const std::vector<int64_t> wanted = sizes_of(logits_BMC, dims);
  if (sizes_of(grad_BM, grad_BM.dim()) != wanted) {
    refuse(op, ": grad_BM must have shape ", shape_text(wanted), ", got ", shape_of(grad_BM));
  }
  if (grad_BM.scalar_type() != ScalarType::Float) {
    refuse(op, ": grad_BM must be torch.float32 for logits_BMC of ",
           dtype_name(logits_BMC.scalar_type()), ", got ", dtype_name(grad_BM.scalar_type()));
  }
  const DType dtype = float_dtype(op, "logits_BMC", logits_BMC);
  const Tensor grad = torch::stable::contiguous(grad_BM);
  const Tensor logits = torch::stable::contiguous(logits_BMC);
  Tensor grad_logits = torch::stable::new_empty(logits, sizes_of(logits, dims + 1));
  const EntropyBackwardParams params = {
      .grad = static_cast<const float*>(grad.const_data_ptr()),
      .logits = logits.const_data_ptr(),
      .grad_logits = grad_logits.mutable_data_ptr(),
      .rows = logits.numel() / C,
      .C = C,
      .dtype = dtype,
  };
  return {grad, logits, grad_logits, params};
}

struct DispatchCall {
  Tensor expert, row, token, offset;
  std::vector<int32_t> scratch;
  DispatchParams params;
};

// The ids as a contiguous int32 tensor, every one in [0, num_experts].
template <class Id>
inline Tensor checked_experts(const Tensor& expert_TK, int64_t num_experts) {
  const Tensor given = torch::stable::contiguous(expert_TK);
  const Id* ids = static_cast<const Id*>(given.const_data_ptr());
  const int64_t N = given.numel();
  Id lowest = 0, highest = 0;
  for (int64_t n = 0; n < N; ++n) {
    lowest = ids[n] < lowest ? ids[n] : lowest;
    highest = ids[n] > highest ? ids[n] : highest;
  }
  if (lowest < 0 || highest > num_experts) {
    refuse("dispatch: expert_TK must hold experts in [0, num_experts=", num_experts, "], where ",
           num_experts, " is an unused slot; got [", *std::min_element(ids, ids + N), ", ",
           *std::max_element(ids, ids + N), "]");
  }
  if (sizeof(Id) == sizeof(int32_t)) return given;
  Tensor narrow = torch::stable::new_empty(given, {N}, ScalarType::Int);
  int32_t* to = static_cast<int32_t*>(narrow.mutable_data_ptr());
  for (int64_t n = 0; n < N; ++n) to[n] = int32_t(ids[n]);
  return narrow;
}

inline DispatchCall prepare_dispatch(const Tensor& expert_TK, int64_t num_experts) {
  check_dim("dispatch", "expert_TK", expert_TK, 2);
  const ScalarType type = expert_TK.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long) {
    refuse("dispatch: expert_TK must be int32 or int64, got ", dtype_name(type));
  }
  if (num_experts < 0) refuse("dispatch: num_experts must be at least 0, got ", num_experts);
  const int64_t T = expert_TK.size(0), K = expert_TK.size(1), N = T * K;
  if (N >= int64_t{1} << 31) {
    refuse("dispatch: expert_TK must have fewer than 2**31 slots, got ", N);
  }
  Tensor expert = type == ScalarType::Int ? checked_experts<int32_t>(expert_TK, num_experts)
                                          : checked_experts<int64_t>(expert_TK, num_experts);
  Tensor row = torch::stable::new_empty(expert, {T, K}, ScalarType::Int);
  Tensor token = torch::stable::new_empty(expert, {N}, ScalarType::Int);
  Tensor offset = torch::stable::new_empty(expert, {num_experts + 1}, ScalarType::Int);
  // 8192 slots cost about as much as waking a thread; E of them keep the counts below the slots.
  const int64_t chunk = std::max<int64_t>(8192, num_experts);
  std::vector<int32_t> scratch((N + chunk - 1) / chunk * (num_experts + 1));
  const DispatchParams params = {
      .expert = static_cast<const int32_t*>(expert.const_data_ptr()),
      .row = static_cast<int32_t*>(row.mutable_data_ptr()),
      .token = static_cast<int32_t*>(token.mutable_data_ptr()),
      .offset = static_cast<int32_t*>(offset.mutable_data_ptr()),
      .scratch = scratch.data(),
      .T = T,
      .K = K,
      .E = num_experts,
      .chunk = chunk,
  };
  return {expert, row, token, offset, std::move(scratch), params};
}

// The options that gose_kernels/ops/route.py keeps from the kernels are not here.
struct RouteOptions {
  bool egs, chosen;
  double floor;
  std::optional<double> tau;
};

// What route and its backward share: tensors that keep the input alive, and scratch.
struct RouteSource {
  Tensor score;
  std::optional<Tensor> entropy;
  std::vector<float> floats;
  std::vector<int32_t> ints;
  std::vector<double> doubles;
  RouteInput in;
  RouteScratch scratch;
};

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline void check_route_entropy(const char* name, const std::optional<Tensor>& H,
                                const std::vector<int64_t>& shape, bool egs) {
  if (!H) return;
  if (!egs) refuse("route: ", name, " must be None, got a tensor: this policy does not read it");
  if (sizes_of(*H, H->dim()) != shape) {
    refuse("route: ", name, " must be of shape ", shape_text(shape), ", got ", shape_of(*H));
  }
  if (!is_floating(*H)) {
    refuse("route: ", name, " must be floating point, got ", dtype_name(H->scalar_type()));
  }
}

inline RouteSource prepare_route_source(const Tensor& score_TE, int64_t top_k,
                                        const std::optional<Tensor>& entropy_TE,
                                        const std::optional<Tensor>& entropy_E,
                                        const RouteOptions& options) {
  if (score_TE.dim() != 2) {
    refuse("route: score_TE must be of 2 dimensions, got shape ", shape_of(score_TE));
  }
  if (!is_floating(score_TE)) {
    refuse("route: score_TE must be floating point, got ", dtype_name(score_TE.scalar_type()));
  }
  const int64_t T = score_TE.size(0), E = score_TE.size(1);
  if (top_k < 1 || top_k > E) refuse("route: top_k must be in [1, E=", E, "], got ", top_k);
  check_route_entropy("entropy_TE", entropy_TE, {T, E}, options.egs);
  check_route_entropy("entropy_E", entropy_E, {E}, options.egs);
  if (options.egs && entropy_TE.has_value() == entropy_E.has_value()) {
    refuse("route: exactly one of entropy_TE and entropy_E must be given to policy egs, got ",
           entropy_TE ? 2 : 0);
  }
  if (!(options.floor > 0)) {
    refuse("route: entropy_floor must be above 0, got ", options.floor);
  }
  if (options.tau && !options.egs) {
    refuse("route: tau must be None, got ", *options.tau, ": only policy egs reads it");
  }
  if (options.tau && !(*options.tau > 0)) refuse("route: tau must be above 0, got ", *options.tau);
  std::optional<Tensor> entropy;
  if (options.egs) {
    const Tensor& H = entropy_TE ? *entropy_TE : *entropy_E;
    const bool same = H.scalar_type() == ScalarType::Float;
    entropy = rows_contiguous(same ? H : torch::stable::to(H, ScalarType::Float));
  }
  const int64_t blocks = std::max<int64_t>(1, (T + kRouteBlock - 1) / kRouteBlock);
  const int64_t padded = (E + 15) / 16 * 16;
  RouteSource s = {rows_contiguous(score_TE),
                   entropy,
                   std::vector<float>((blocks * 4 + 1) * padded),
                   std::vector<int32_t>(blocks * 2 * padded),
                   std::vector<double>(blocks * 3),
                   {},
                   {}};
  s.in = {
      .score = s.score.const_data_ptr(),
      .entropy = entropy ? static_cast<const float*>(entropy->const_data_ptr()) : nullptr,
      .T = T,
      .E = E,
      .K = top_k,
      .stride_st = s.score.stride(0),
      .stride_et = entropy_TE ? entropy->stride(0) : 0,
      .floor = float(options.floor),
      .tau = options.tau ? float(*options.tau) : 0.f,
      .chosen = options.chosen || options.egs,
      .dtype = float_dtype("route", "score_TE", s.score),
  };
  s.scratch = {s.floats.data(), s.ints.data(), s.doubles.data(),
               s.floats.data() + blocks * 4 * padded};
  return s;
}

struct RouteCall {
  RouteSource source;
  Tensor weight, expert, entropy, load, importance, loss;
  RouteParams params;
};

inline RouteCall prepare_route(const Tensor& score_TE, int64_t top_k,
                               const std::optional<Tensor>& entropy_TE,
                               const std::optional<Tensor>& entropy_E,
                               const RouteOptions& options) {
  RouteSource source = prepare_route_source(score_TE, top_k, entropy_TE, entropy_E, options);
  const int64_t T = source.in.T, E = source.in.E;
  const auto empty = [&](std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(source.score, sizes, type);
  };
  Tensor weight = empty({T, top_k}, ScalarType::Float);
  Tensor expert = empty({T, top_k}, ScalarType::Int);
  Tensor entropy = empty({T}, ScalarType::Float);
  Tensor load = empty({E}, ScalarType::Int);
  Tensor importance = empty({E}, ScalarType::Float);
  Tensor loss = empty({5}, ScalarType::Float);
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
    const Tensor& score_TE, int64_t top_k, const std::optional<Tensor>& entropy_TE,
    const std::optional<Tensor>& entropy_E, const Tensor& expert_TK, const Tensor& load_E,
    const Tensor& importance_E, const std::optional<Tensor>& grad_weight_TK,
    const std::optional<Tensor>& grad_entropy_T, const std::optional<Tensor>& grad_importance_E,
    const std::optional<Tensor>& grad_loss_L, const RouteOptions& options) {
  RouteSource source = prepare_route_source(score_TE, top_k, entropy_TE, entropy_E, options);
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
  const ScalarType type = options.egs ? ScalarType::Float : score_TE.scalar_type();
  const std::vector<int64_t> shape =
      entropy_E ? std::vector<int64_t>{E} : std::vector<int64_t>{T, E};
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
