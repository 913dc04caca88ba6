// Allocation of route on a GPU; the checks are those of bind_route.h.
#pragma once

#include "bind_route.h"

namespace gose {

struct RouteDeviceCall {
  RouteSource source;
  std::vector<Tensor> scratch;
  Tensor weight, expert, entropy, load, importance, loss;
  RouteDeviceParams params;
};

// Tokens of a block, a multiple of `group`: few enough blocks to add up quickly.
inline int64_t route_device_tokens(int64_t T, int64_t group = 16) {
  constexpr int64_t kBlocks = 512;
  return group * std::max<int64_t>(1, (T + group * kBlocks - 1) / (group * kBlocks));
}

// Tokens that route sums at once: the more, the fewer sums to write and read again; 64 blocks stay.
inline int64_t route_group(int64_t T, int64_t E) {
  if (E > 128 || T < 2048) return 16;
  return T < 4096 ? 32 : 64;
}

inline int64_t bits_of(int64_t x) {
  int64_t bits = 0;
  for (; x > 0; x >>= 1) ++bits;
  return bits;
}

using NamedTensors = std::initializer_list<std::pair<const char*, const std::optional<Tensor>*>>;

inline void check_devices(const char* op, const Tensor& score, const NamedTensors& others) {
  for (const auto& [name, t] : others) {
    if (*t) check_device(op, name, **t, "score_TE", score);
  }
}

inline RouteSource route_device_source(const char* op, const Tensor& score_TE, int64_t top_k,
                                       const RouteTensors& given, const RouteOptions& o) {
  RouteSource source = route_source(score_TE, top_k, given, o);
  check_devices(op, source.score,
                {{"entropy_TE", &given.entropy_TE},
                 {"entropy_E", &given.entropy_E},
                 {"bias_E", &given.bias_E},
                 {"noise_TE", &given.noise_TE}});
  return source;
}

inline void copy_bands(const RouteInput& in, float (&band)[kRouteBands]) {
  for (int64_t i = 0; i < in.num_bands && i < kRouteBands; ++i) band[i] = float(in.bands[i]);
}

inline RouteDeviceCall prepare_route_device(const Tensor& score_TE, int64_t top_k,
                                            const RouteTensors& given, const RouteOptions& o) {
  RouteDeviceCall call;
  call.source = route_device_source("route", score_TE, top_k, given, o);
  const Tensor& score = call.source.score;
  const RouteInput& in = call.source.in;
  const int64_t T = in.T, E = in.E;
  const int64_t tokens = std::min(route_device_tokens(T, route_group(T, E)), kRouteMostTokens);
  const int64_t blocks = (T + tokens - 1) / tokens;
  const bool takes = in.policy == RoutePolicy::kExpertChoice, drops = !takes && in.capacity > 0;
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(score, sizes, type);
  };
  const auto scratch = [&](bool wanted, std::initializer_list<int64_t> sizes,
                           ScalarType type) -> void* {
    if (!wanted) return nullptr;
    call.scratch.push_back(make(sizes, type));
    return call.scratch.back().mutable_data_ptr();
  };
  call.weight = make({T, top_k}, ScalarType::Float);
  call.expert = make({T, top_k}, ScalarType::Int);
  call.entropy = make({T}, ScalarType::Float);
  call.load = make({E}, ScalarType::Int);
  call.importance = make({E}, ScalarType::Float);
  call.loss = make({5}, ScalarType::Float);
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const auto more_floats = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return static_cast<float*>(scratch(wanted, sizes, ScalarType::Float));
  };
  call.params = {
      .in = in,
      .weight = floats(call.weight),
      .expert = ints(call.expert),
      .entropy = floats(call.entropy),
      .load = ints(call.load),
      .importance = floats(call.importance),
      .loss = floats(call.loss),
      .log_p = more_floats(takes, {E, T}),
      .level = static_cast<int16_t*>(scratch(drops, {E, T}, ScalarType::Short)),
      .first = more_floats(drops && in.priority, {T}),
      .part_importance = more_floats(true, {blocks, E}),
      .win = more_floats(in.noise_std > 0, {blocks, E}),
      .part_count = static_cast<int16_t*>(scratch(true, {blocks, E}, ScalarType::Short)),
      .part_sums = more_floats(true, {blocks, 3}),
      .tokens = tokens,
      .rank_bits = takes ? 32 : bits_of(top_k) + (in.priority ? 32 : 0),
      .pass = RoutePass::kAll,
      .band = {},
  };
  copy_bands(in, call.params.band);
  return call;
}

struct RouteBackwardDeviceCall {
  RouteSource source;
  RouteRead read;
  std::vector<Tensor> scratch;
  Tensor grad;
  RouteBackwardDeviceParams params;
};

inline RouteBackwardDeviceCall prepare_route_backward_device(const Tensor& score_TE, int64_t top_k,
                                                             const RouteTensors& given,
                                                             const RouteUpstream& up,
                                                             const RouteOptions& o) {
  constexpr int64_t kLiveTokens = 64;  // at least, of a warp that looks for tokens of an expert
  const char* op = "route_backward";
  RouteBackwardDeviceCall call;
  call.source = route_device_source(op, score_TE, top_k, given, o);
  const Tensor& score = call.source.score;
  const RouteInput& in = call.source.in;
  check_device(op, "expert_TK", up.expert_TK, "score_TE", score);
  check_device(op, "load_E", up.load_E, "score_TE", score);
  check_device(op, "importance_E", up.importance_E, "score_TE", score);
  check_devices(op, score,
                {{"grad_weight_TK", &up.grad_weight_TK},
                 {"grad_entropy_T", &up.grad_entropy_T},
                 {"grad_importance_E", &up.grad_importance_E},
                 {"grad_loss_L", &up.grad_loss_L}});
  const int64_t T = in.T, E = in.E, tokens = route_device_tokens(T);
  const int64_t live_tokens = (tokens + kLiveTokens - 1) / kLiveTokens * kLiveTokens;
  const int64_t blocks = (T + tokens - 1) / tokens, parts = (T + live_tokens - 1) / live_tokens;
  call.read = read_upstream(up, T, E, top_k);
  const bool losses = up.grad_loss_L.has_value(), wins = losses && in.noise_std > 0;
  const bool per_module = given.entropy_E.has_value();
  const auto scratch = [&](bool wanted, std::initializer_list<int64_t> sizes,
                           ScalarType type) -> void* {
    if (!wanted) return nullptr;
    call.scratch.push_back(torch::stable::new_empty(score, sizes, type));
    return call.scratch.back().mutable_data_ptr();
  };
  const auto floats = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return static_cast<float*>(scratch(wanted, sizes, ScalarType::Float));
  };
  // The gradient of entropies comes in float32 and is rounded to their dtype at the end.
  const ScalarType type = o.egs() ? ScalarType::Float : score.scalar_type();
  call.grad = per_module ? torch::stable::new_empty(score, {E}, type)
                         : torch::stable::new_empty(score, {T, E}, type);
  call.params = {
      .in = in,
      .expert = call.read.expert,
      .load = call.read.load,
      .importance = call.read.importance,
      .grad_weight = call.read.grad_weight,
      .grad_entropy = call.read.grad_entropy,
      .grad_importance = call.read.grad_importance,
      .grad_loss = call.read.grad_loss,
      .grad = call.grad.mutable_data_ptr(),
      .column = floats(losses, {E}),
      .scalar = floats(losses, {2}),
      .part_live = static_cast<uint8_t*>(scratch(losses, {parts, E}, ScalarType::Byte)),
      .part_win = floats(wins, {blocks, E}),
      .win_slope = floats(wins, {E}),
      .part_grad = floats(per_module, {blocks, E}),
      .tokens = tokens,
      .live_tokens = live_tokens,
      .again = up.grad_weight_TK.has_value() && in.capacity > 0 &&
               in.policy != RoutePolicy::kExpertChoice && in.sum == RouteSum::kChosen,
      .band = {},
  };
  copy_bands(in, call.params.band);
  return call;
}

}  // namespace gose
