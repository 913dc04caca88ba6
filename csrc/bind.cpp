// The CPU ops as torch.ops.gose_native.<op>: checks, allocation, threads. With bind_cuda.cpp the
// only torch-aware C++, on torch's stable ABI: one library serves torch >= 2.11 and every Python.
#include <vector>

#include "bind_combine.h"
#include "bind_masked.h"
#include "bind_routing.h"
#include "cpu/kernels.h"

namespace gose {
namespace {

const cpu::Parallel kTorchThreads = {
    [](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
      if (count > 0)
        STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
    }};

// Every value in [-1, N); with `once`, every row in one slot at most.
void check_rows(const char* op, const Tensor& row, int64_t num_rows, bool once) {
  const int32_t* rows = static_cast<const int32_t*>(row.const_data_ptr());
  const int64_t count = row.numel();
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= rows[i] >= -1 && rows[i] < num_rows;
  if (!inside) refuse(op, ": row_TK must hold rows in [0, N=", num_rows, ") or -1");
  if (!once) return;
  std::vector<uint8_t> seen(num_rows, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] >= 0 && seen[rows[i]]++) {
      refuse(op, ": row_TK must use every row of y_ND at most once");
    }
  }
}

Tensor combine(Tensor y_ND, Tensor weight_TK, Tensor row_TK) {
  const CombineCall call = prepare_combine(y_ND, weight_TK, row_TK);
  check_rows("combine", call.row, call.y.size(0), false);
  cpu::kernels().combine(call.params, kTorchThreads);
  return call.out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_TD, Tensor y_ND, Tensor weight_TK,
                                            Tensor row_TK) {
  const CombineBackwardCall call = prepare_combine_backward(grad_TD, y_ND, weight_TK, row_TK);
  check_rows("combine_backward", call.row, call.y.size(0), true);
  cpu::kernels().combine_backward(call.params, kTorchThreads);
  return {call.grad_y, call.grad_weight};
}

Tensor entropy(Tensor logits_BMC) {
  const EntropyCall call = prepare_entropy(logits_BMC);
  cpu::kernels().entropy(call.params, kTorchThreads);
  return call.out;
}

Tensor entropy_backward(Tensor grad_BM, Tensor logits_BMC) {
  const EntropyBackwardCall call = prepare_entropy_backward(grad_BM, logits_BMC);
  cpu::kernels().entropy_backward(call.params, kTorchThreads);
  return call.grad_logits;
}

std::tuple<Tensor, Tensor, Tensor> dispatch(Tensor expert_TK, int64_t num_experts) {
  const DispatchCall call = prepare_dispatch(expert_TK, num_experts);
  cpu::kernels().dispatch(call.params, kTorchThreads);
  return {call.row, call.token, call.offset};
}

// Options of `route` that gose_kernels/ops/route.py keeps from the kernels come along unnamed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(
    Tensor score_TE, int64_t top_k, std::optional<Tensor> entropy_TE,
    std::optional<Tensor> entropy_E, std::optional<Tensor>, std::optional<Tensor>,
    std::string policy, bool softmax_before, bool renormalize, std::string, int64_t, int64_t,
    double entropy_floor, std::optional<double> tau, std::optional<int64_t>, std::string,
    std::optional<std::string>, double, std::vector<double>, double) {
  const RouteOptions options = {policy == "egs", renormalize || !softmax_before, entropy_floor,
                                tau};
  const RouteCall call = prepare_route(score_TE, top_k, entropy_TE, entropy_E, options);
  cpu::kernels().route(call.params, kTorchThreads);
  return {call.weight, call.expert, call.entropy, call.load, call.importance, call.loss};
}

Tensor route_backward(Tensor score_TE, int64_t top_k, std::optional<Tensor> entropy_TE,
                      std::optional<Tensor> entropy_E, std::optional<Tensor>, std::optional<Tensor>,
                      Tensor expert_TK, Tensor load_E, Tensor importance_E,
                      std::optional<Tensor> grad_weight_TK, std::optional<Tensor> grad_entropy_T,
                      std::optional<Tensor> grad_importance_E, std::optional<Tensor> grad_loss_L,
                      std::string policy, bool softmax_before, bool renormalize, std::string,
                      int64_t, int64_t, double entropy_floor, std::optional<double> tau,
                      std::optional<int64_t>, std::string, std::optional<std::string>, double,
                      std::vector<double>, double) {
  const RouteOptions options = {policy == "egs", renormalize || !softmax_before, entropy_floor,
                                tau};
  const RouteBackwardCall call = prepare_route_backward(
      score_TE, top_k, entropy_TE, entropy_E, expert_TK, load_E, importance_E, grad_weight_TK,
      grad_entropy_T, grad_importance_E, grad_loss_L, options);
  cpu::kernels().route_backward(call.params, kTorchThreads);
  const Tensor& ranked = entropy_TE ? *entropy_TE : entropy_E ? *entropy_E : score_TE;
  return torch::stable::to(call.grad, ranked.scalar_type());
}

void masked_sgd(Tensors param, Tensors grad, Tensors momentum_buffer, Tensors frozen, Tensor lr,
                std::optional<Tensor> grad_scale, double momentum, double weight_decay,
                bool nesterov, bool maximize) {
  const char* op = "masked_sgd_";
  if (nesterov && !(momentum > 0)) refuse(op, ": nesterov needs momentum > 0, got ", momentum);
  const std::vector<UpdateState> lists = {{"grad", grad, true},
                                          {"momentum_buffer", momentum_buffer, momentum != 0}};
  const double rate = scalar_of(op, "lr", lr);
  const float scale = scale_of(op, grad_scale, maximize);
  check_update(op, param, frozen, lists);
  UpdateCall(op, param, lists, {}, frozen).run([&](const UpdateList& list) {
    cpu::kernels().masked_sgd({.list = list,
                               .lr = float(rate),
                               .scale = scale,
                               .momentum = float(momentum),
                               .weight_decay = float(weight_decay),
                               .nesterov = nesterov},
                              kTorchThreads);
  });
}

void masked_adam(Tensors param, Tensors grad, Tensors exp_avg, Tensors exp_avg_sq,
                 Tensors max_exp_avg_sq, Tensors step, Tensors frozen, Tensor lr,
                 std::optional<Tensor> grad_scale, double beta1, double beta2, double eps,
                 double weight_decay, bool decoupled, bool amsgrad, bool maximize) {
  const char* op = "masked_adam_";
  const std::vector<UpdateState> lists = {{"grad", grad, true},
                                          {"exp_avg", exp_avg, true},
                                          {"exp_avg_sq", exp_avg_sq, true},
                                          {"max_exp_avg_sq", max_exp_avg_sq, amsgrad}};
  const double rate = scalar_of(op, "lr", lr);
  const float scale = scale_of(op, grad_scale, maximize);
  check_update(op, param, frozen, lists);
  check_step(op, step, param, frozen);
  UpdateCall(op, param, lists, step, frozen).run([&](const UpdateList& list) {
    cpu::kernels().masked_adam({.list = list,
                                .lr = rate,
                                .beta1 = beta1,
                                .beta2 = beta2,
                                .scale = scale,
                                .eps = float(eps),
                                .weight_decay = decoupled ? 0.f : float(weight_decay),
                                .keep = decoupled ? keep_of(lr, rate, weight_decay) : 1.f,
                                .amsgrad = amsgrad},
                               kTorchThreads);
  });
}

void masked_lion(Tensors param, Tensors grad, Tensors exp_avg, Tensors frozen, Tensor lr,
                 std::optional<Tensor> grad_scale, double beta1, double beta2, double weight_decay,
                 bool maximize) {
  const char* op = "masked_lion_";
  const std::vector<UpdateState> lists = {{"grad", grad, true}, {"exp_avg", exp_avg, true}};
  const double rate = scalar_of(op, "lr", lr);
  const float scale = scale_of(op, grad_scale, maximize);
  check_update(op, param, frozen, lists);
  UpdateCall(op, param, lists, {}, frozen).run([&](const UpdateList& list) {
    cpu::kernels().masked_lion({.list = list,
                                .lr = float(rate),
                                .scale = scale,
                                .keep = keep_of(lr, rate, weight_decay),
                                .beta1 = float(beta1),
                                .beta2 = float(beta2),
                                .rest1 = float(1 - beta1),
                                .rest2 = float(1 - beta2)},
                               kTorchThreads);
  });
}

// Levels this CPU can run, best first, separated by blanks.
std::string cpu_levels() {
  std::string names;
  for (int level = int(cpu::best_level()); level >= 0; --level) {
    names += std::string(names.empty() ? "" : " ") + cpu::name_of(cpu::Level(level));
  }
  return names;
}

std::string cpu_level() { return cpu::name_of(cpu::level_in_use()); }

bool built_with_cuda() {
#if defined(GOSE_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace gose

STABLE_TORCH_LIBRARY(gose_native, m) {
  m.def("combine(Tensor y_ND, Tensor weight_TK, Tensor row_TK) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_TD, Tensor y_ND, Tensor weight_TK, Tensor row_TK) -> "
      "(Tensor, Tensor)");
  m.def(
      "masked_sgd_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] momentum_buffer, "
      "Tensor[] frozen, Tensor lr, Tensor? grad_scale, float momentum, float weight_decay, "
      "bool nesterov, bool maximize) -> ()");
  m.def(
      "masked_adam_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] max_exp_avg_sq, Tensor(e!)[] step, Tensor[] frozen, "
      "Tensor lr, Tensor? grad_scale, float beta1, float beta2, float eps, float weight_decay, "
      "bool decoupled, bool amsgrad, bool maximize) -> ()");
  m.def(
      "masked_lion_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor[] frozen, "
      "Tensor lr, Tensor? grad_scale, float beta1, float beta2, float weight_decay, "
      "bool maximize) -> ()");
  m.def("entropy(Tensor logits_BMC) -> Tensor");
  m.def("entropy_backward(Tensor grad_BM, Tensor logits_BMC) -> Tensor");
  m.def("dispatch(Tensor expert_TK, int num_experts) -> (Tensor, Tensor, Tensor)");
#define GOSE_ROUTE_OPTIONS                                                                        \
  "str policy, bool softmax_before, bool renormalize, str gate, int num_groups, int top_groups, " \
  "float entropy_floor, float? tau, int? capacity, str capacity_order, str? adaptive, "           \
  "float mass, float[] bands, float noise_std)"
  m.def(
      "route(Tensor score_TE, int top_k, Tensor? entropy_TE, Tensor? entropy_E, Tensor? bias_E, "
      "Tensor? noise_TE, " GOSE_ROUTE_OPTIONS
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "route_backward(Tensor score_TE, int top_k, Tensor? entropy_TE, Tensor? entropy_E, "
      "Tensor? bias_E, Tensor? noise_TE, Tensor expert_TK, Tensor load_E, Tensor importance_E, "
      "Tensor? grad_weight_TK, Tensor? grad_entropy_T, Tensor? grad_importance_E, "
      "Tensor? grad_loss_L, " GOSE_ROUTE_OPTIONS " -> Tensor");
#undef GOSE_ROUTE_OPTIONS
  m.def("cpu_levels() -> str");
  m.def("cpu_level() -> str");
  m.def("built_with_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gose_native, CPU, m) {
  m.impl("combine", TORCH_BOX(&gose::combine));
  m.impl("combine_backward", TORCH_BOX(&gose::combine_backward));
  m.impl("entropy", TORCH_BOX(&gose::entropy));
  m.impl("entropy_backward", TORCH_BOX(&gose::entropy_backward));
  m.impl("dispatch", TORCH_BOX(&gose::dispatch));
  m.impl("route", TORCH_BOX(&gose::route));
  m.impl("route_backward", TORCH_BOX(&gose::route_backward));
  m.impl("masked_sgd_", TORCH_BOX(&gose::masked_sgd));
  m.impl("masked_adam_", TORCH_BOX(&gose::masked_adam));
  m.impl("masked_lion_", TORCH_BOX(&gose::masked_lion));
}

STABLE_TORCH_LIBRARY_IMPL(gose_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_levels", TORCH_BOX(&gose::cpu_levels));
  m.impl("cpu_level", TORCH_BOX(&gose::cpu_level));
  m.impl("built_with_cuda", TORCH_BOX(&gose::built_with_cuda));
}
