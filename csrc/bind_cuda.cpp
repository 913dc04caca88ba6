// The CUDA ops as torch.ops.gose_native.<op>: they run on torch's current stream of the device of
// their first tensor and trust what only a synchronisation could check.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "bind_combine.h"
#include "bind_distill.h"
#include "bind_quantize.h"
#include "bind_route_device.h"
#include "bind_routing.h"
#include "cuda/kernels.h"

// CPU builds of torch lack this one symbol; weak, so that the library loads in them.
#pragma weak aoti_torch_get_current_cuda_stream

namespace gose {
namespace {

// Launches on torch's current stream of the tensor's device; an error of the launch is raised.
template <class Params>
void launch(const char* op, const Tensor& on, const Params& params,
            cudaError_t (*kernel)(const Params&, cudaStream_t)) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error(std::string(op) + ": this build of torch has no CUDA streams");
  }
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = kernel(params, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA launch failed with " +
                             cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                             ") on device " + std::to_string(device));
  }
}

Tensor combine(Tensor y_ND, Tensor weight_TK, Tensor row_TK) {
  const CombineCall call = prepare_combine(y_ND, weight_TK, row_TK);
  launch("combine", call.y, call.params, &cuda::combine);
  return call.out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_TD, Tensor y_ND, Tensor weight_TK,
                                            Tensor row_TK) {
  const CombineBackwardCall call = prepare_combine_backward(grad_TD, y_ND, weight_TK, row_TK);
  launch("combine_backward", call.y, call.params, &cuda::combine_backward);
  return {call.grad_y, call.grad_weight};
}

Tensor entropy(Tensor logits_BMC) {
  const EntropyCall call = prepare_entropy(logits_BMC);
  launch("entropy", call.logits, call.params, &cuda::entropy);
  return call.out;
}

Tensor entropy_backward(Tensor grad_BM, Tensor logits_BMC) {
  const EntropyBackwardCall call = prepare_entropy_backward(grad_BM, logits_BMC);
  check_device("entropy_backward", "grad_BM", grad_BM, "logits_BMC", logits_BMC);
  launch("entropy_backward", call.logits, call.params, &cuda::entropy_backward);
  return call.grad_logits;
}

std::tuple<Tensor, Tensor, Tensor> dispatch(Tensor expert_TK, int64_t num_experts) {
  check_dispatch(expert_TK, num_experts);
  const Tensor expert = torch::stable::contiguous(torch::stable::to(expert_TK, {ScalarType::Int}));
  const int64_t T = expert_TK.size(0), K = expert_TK.size(1);
  const int64_t chunk = 512;  // slots of one warp: enough warps to fill a GPU at 100k slots
  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(expert, sizes, ScalarType::Int);
  };
  Tensor row = integers({T, K}), token = integers({T * K}), offset = integers({num_experts + 1});
  Tensor scratch = integers({(T * K + chunk - 1) / chunk, num_experts + 1});
  const DispatchParams params = {
      .expert = static_cast<const int32_t*>(expert.const_data_ptr()),
      .row = static_cast<int32_t*>(row.mutable_data_ptr()),
      .token = static_cast<int32_t*>(token.mutable_data_ptr()),
      .offset = static_cast<int32_t*>(offset.mutable_data_ptr()),
      .scratch = static_cast<int32_t*>(scratch.mutable_data_ptr()),
      .T = T,
      .K = K,
      .E = num_experts,
      .chunk = chunk,
  };
  launch("dispatch", expert, params, &cuda::dispatch);
  return {row, token, offset};
}

const int64_t* places(const std::optional<Tensor>& place_L) {
  return place_L ? static_cast<const int64_t*>(place_L->const_data_ptr()) : nullptr;
}

// place_L: contiguous int64 of this op's own making.
std::tuple<Tensor, Tensor, Tensor> quantize_at(Tensor x_P, std::optional<Tensor> residual_P,
                                               std::optional<Tensor> place_L,
                                               std::string format_name, bool stochastic,
                                               int64_t seed, int64_t step) {
  const char* op = "quantize";
  const CodeFormat format = code_format(op, format_name);
  const Tensor x = dense(x_P);
  const Tensor residual = residual_P ? dense(*residual_P) : x;
  const int64_t L = place_L ? place_L->numel() : x.numel();
  Tensor code = torch::stable::new_empty(x, {code_bytes(format, L)}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(x, {num_scales(format, L)},
                                          format.half_scale ? ScalarType::Half : ScalarType::Float);
  const std::vector<int64_t> shape = residual_P ? sizes_of(x, x.dim()) : std::vector<int64_t>{0};
  Tensor left = place_L ? torch::stable::new_zeros(x, shape, ScalarType::Float)
                        : torch::stable::new_empty(x, shape, ScalarType::Float);
  const QuantizeParams params = {
      .x = x.const_data_ptr(),
      .residual = residual_P ? static_cast<const float*>(residual.const_data_ptr()) : nullptr,
      .frozen = nullptr,
      .start = nullptr,
      .place = places(place_L),
      .code = static_cast<uint8_t*>(code.mutable_data_ptr()),
      .scale = scale.mutable_data_ptr(),
      .left = residual_P ? static_cast<float*>(left.mutable_data_ptr()) : nullptr,
      .bad = nullptr,
      .P = x.numel(),
      .L = L,
      .inner = 1,
      .seed = seed,
      .step = step,
      .stochastic = stochastic,
      .format = format,
      .dtype = float_dtype(op, "x_P", x),
  };
  launch(op, x, params, &cuda::quantize);
  return {code, scale, left};
}

// out = q * scale, or with a weight out += weight * (q * scale).
void dequantize_at(Tensor out_P, Tensor code, Tensor scale, std::optional<Tensor> place_L,
                   std::string format_name, std::optional<double> weight) {
  const char* op = weight ? "dequantize_add_" : "dequantize";
  const Tensor code_1 = dense(code), scale_1 = dense(scale);
  const DequantizeParams params = {
      .code = static_cast<const uint8_t*>(code_1.const_data_ptr()),
      .scale = scale_1.const_data_ptr(),
      .frozen = nullptr,
      .start = nullptr,
      .place = places(place_L),
      .out = static_cast<float*>(out_P.mutable_data_ptr()),
      .P = out_P.numel(),
      .L = place_L ? place_L->numel() : out_P.numel(),
      .inner = 1,
      .weight = float(weight.value_or(1.0)),
      .add = weight.has_value(),
      .format = code_format(op, format_name),
  };
  launch(op, out_P, params, &cuda::dequantize);
}

void check_list_device(const char* op, const char* name, const Tensors& list,
                       const char* other_name, const Tensor& other) {
  for (size_t n = 0; n < list.size(); ++n) {
    check_device(op, at_index(name, n).c_str(), list[n], other_name, other);
  }
}

// lr and grad_scale stay on the device; all tensors are there.
UpdateScalars update_scalars(const UpdateArguments& a, double decay, bool maximize) {
  UpdateScalars out;
  out.lr = a.lr.const_data_ptr();
  out.lr_is_double = check_scalar(a.op, "lr", a.lr);
  if (a.grad_scale) {
    out.grad_scale = a.grad_scale->const_data_ptr();
    out.grad_scale_is_double = check_scalar(a.op, "grad_scale", *a.grad_scale);
    check_device(a.op, "grad_scale", *a.grad_scale, "lr", a.lr);
  }
  out.decay = decay;
  out.maximize = maximize;
  const std::pair<const char*, const Tensors*> lists[] = {
      {"param", &a.param},   {"grad", &a.grad},     {"state", &a.state}, {"step", &a.step},
      {"master", &a.master}, {"frozen", &a.frozen}, {"row", &a.row}};
  for (const auto& [name, list] : lists) check_list_device(a.op, name, *list, "lr", a.lr);
  return out;
}

void masked_sgd(Tensors param, Tensors grad, Tensors state, Tensors step, Tensors master,
                Tensors frozen, Tensors row, Tensor lr, std::optional<Tensor> grad_scale,
                std::vector<double> threshold, std::vector<int64_t> seed,
                std::vector<int64_t> start, int64_t draw, double momentum, double dampening,
                double weight_decay, bool nesterov, bool maximize) {
  const char* op = "masked_sgd_";
  if (nesterov && !(momentum > 0)) refuse(op, ": nesterov needs momentum > 0, got ", momentum);
  const UpdateArguments a = {op,  param, grad,       state,     step, master, frozen,
                             row, lr,    grad_scale, threshold, seed, start,  draw};
  const UpdateScalars scalar = update_scalars(a, 0, maximize);
  const auto run = [&](const UpdateList& list) {
    const MaskedSgdParams params = {.list = list,
                                    .lr = 0,
                                    .scale = 1,
                                    .momentum = float(momentum),
                                    .weight_decay = float(weight_decay),
                                    .undamped = float(1 - dampening),
                                    .nesterov = nesterov};
    launch(op, lr, params, &cuda::masked_sgd);
  };
  UpdateCall(a, momentum != 0, false).run(run, scalar);
}

void masked_adam(Tensors param, Tensors grad, Tensors state, Tensors step, Tensors master,
                 Tensors frozen, Tensors row, Tensor lr, std::optional<Tensor> grad_scale,
                 std::vector<double> threshold, std::vector<int64_t> seed,
                 std::vector<int64_t> start, int64_t draw, double beta1, double beta2, double eps,
                 double weight_decay, bool decoupled, bool amsgrad, bool maximize) {
  const char* op = "masked_adam_";
  const UpdateArguments a = {op,  param, grad,       state,     step, master, frozen,
                             row, lr,    grad_scale, threshold, seed, start,  draw};
  const UpdateScalars scalar = update_scalars(a, decoupled ? weight_decay : 0, maximize);
  const auto run = [&](const UpdateList& list) {
    const MaskedAdamParams params = {.list = list,
                                     .lr = 0,
                                     .beta1 = beta1,
                                     .beta2 = beta2,
                                     .scale = 1,
                                     .eps = float(eps),
                                     .weight_decay = decoupled ? 0.f : float(weight_decay),
                                     .keep = 1,
                                     .amsgrad = amsgrad};
    launch(op, lr, params, &cuda::masked_adam);
  };
  UpdateCall(a, amsgrad ? 3 : 2, true).run(run, scalar);
}

void masked_lion(Tensors param, Tensors grad, Tensors state, Tensors step, Tensors master,
                 Tensors frozen, Tensors row, Tensor lr, std::optional<Tensor> grad_scale,
                 std::vector<double> threshold, std::vector<int64_t> seed,
                 std::vector<int64_t> start, int64_t draw, double beta1, double beta2,
                 double weight_decay, bool maximize) {
  const char* op = "masked_lion_";
  const UpdateArguments a = {op,  param, grad,       state,     step, master, frozen,
                             row, lr,    grad_scale, threshold, seed, start,  draw};
  const UpdateScalars scalar = update_scalars(a, weight_decay, maximize);
  const auto run = [&](const UpdateList& list) {
    const MaskedLionParams params = {.list = list,
                                     .lr = 0,
                                     .scale = 1,
                                     .keep = 1,
                                     .beta1 = float(beta1),
                                     .beta2 = float(beta2),
                                     .rest1 = float(1 - beta1),
                                     .rest2 = float(1 - beta2)};
    launch(op, lr, params, &cuda::masked_lion);
  };
  UpdateCall(a, 1, false).run(run, scalar);
}

Tensor masked_square_sum(Tensors grad, Tensors frozen, std::vector<double> threshold) {
  const char* op = "masked_square_sum";
  check_list_device(op, "grad", grad, "grad[0]", grad.at(0));
  check_list_device(op, "frozen", frozen, "grad[0]", grad.at(0));
  const SquareSumCall call(op, grad, frozen, threshold);
  const auto doubles = [&](int64_t count) {
    return torch::stable::new_empty(grad.at(0), {count}, ScalarType::Double);
  };
  Tensor out = doubles(int64_t(grad.size())), partial = doubles(call.chunks());
  const MaskedSquareSumParams params = {.list = call.list(),
                                        .partial = static_cast<double*>(partial.mutable_data_ptr()),
                                        .out = static_cast<double*>(out.mutable_data_ptr())};
  launch(op, out, params, &cuda::masked_square_sum);
  return out;
}

Tensor distill_loss(GOSE_DISTILL_ARGUMENTS) {
  const char* op = "distill_loss";
  const DistillDeviceCall call = prepare_distill_device(op, GOSE_DISTILL_CALL, false);
  launch(op, call.source.student, call.params, &cuda::distill_loss);
  return call.loss;
}

std::tuple<Tensor, Tensor> distill_loss_train(GOSE_DISTILL_ARGUMENTS) {
  const char* op = "distill_loss_train";
  const DistillDeviceCall call = prepare_distill_device(op, GOSE_DISTILL_CALL, true);
  launch(op, call.source.student, call.params, &cuda::distill_loss);
  return {call.loss, call.grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(
    Tensor options, Tensor score_TE, int64_t top_k, std::optional<Tensor> entropy_TE,
    std::optional<Tensor> entropy_E, std::optional<Tensor> bias_E, std::optional<Tensor> noise_TE) {
  const RouteDeviceCall call = prepare_route_device(
      score_TE, top_k, {entropy_TE, entropy_E, bias_E, noise_TE}, RouteOptions(options));
  launch("route", call.source.score, call.params, &cuda::route);
  return {call.weight, call.expert, call.entropy, call.load, call.importance, call.loss};
}

Tensor route_backward(Tensor options, Tensor score_TE, int64_t top_k,
                      std::optional<Tensor> entropy_TE, std::optional<Tensor> entropy_E,
                      std::optional<Tensor> bias_E, std::optional<Tensor> noise_TE,
                      Tensor expert_TK, Tensor load_E, Tensor importance_E,
                      std::optional<Tensor> grad_weight_TK, std::optional<Tensor> grad_entropy_T,
                      std::optional<Tensor> grad_importance_E, std::optional<Tensor> grad_loss_L) {
  const RouteBackwardDeviceCall call =
      prepare_route_backward_device(score_TE, top_k, {entropy_TE, entropy_E, bias_E, noise_TE},
                                    {expert_TK, load_E, importance_E, grad_weight_TK,
                                     grad_entropy_T, grad_importance_E, grad_loss_L},
                                    RouteOptions(options));
  launch("route_backward", call.source.score, call.params, &cuda::route_backward);
  const Tensor& ranked = entropy_TE ? *entropy_TE : entropy_E ? *entropy_E : score_TE;
  const bool same = ranked.scalar_type() == call.grad.scalar_type();
  return same ? call.grad : torch::stable::to(call.grad, ranked.scalar_type());
}

}  // namespace
}  // namespace gose

STABLE_TORCH_LIBRARY_IMPL(gose_native, CUDA, m) {
  m.impl("combine", TORCH_BOX(&gose::combine));
  m.impl("combine_backward", TORCH_BOX(&gose::combine_backward));
  m.impl("dequantize_at", TORCH_BOX(&gose::dequantize_at));
  m.impl("dispatch", TORCH_BOX(&gose::dispatch));
  m.impl("distill_loss", TORCH_BOX(&gose::distill_loss));
  m.impl("distill_loss_train", TORCH_BOX(&gose::distill_loss_train));
  m.impl("entropy", TORCH_BOX(&gose::entropy));
  m.impl("entropy_backward", TORCH_BOX(&gose::entropy_backward));
  m.impl("masked_adam_", TORCH_BOX(&gose::masked_adam));
  m.impl("masked_lion_", TORCH_BOX(&gose::masked_lion));
  m.impl("masked_sgd_", TORCH_BOX(&gose::masked_sgd));
  m.impl("masked_square_sum", TORCH_BOX(&gose::masked_square_sum));
  m.impl("quantize_at", TORCH_BOX(&gose::quantize_at));
  m.impl("route", TORCH_BOX(&gose::route));
  m.impl("route_backward", TORCH_BOX(&gose::route_backward));
}
