// The CPU ops as torch.ops.gose_native.<op>: checks, allocation, threads. With bind_experts.cpp and
// bind_cuda.cpp the only torch-aware C++, on torch's stable ABI: one library serves torch >= 2.11
// and every Python.
#include <vector>

#include "bind_combine.h"
#include "bind_distill.h"
#include "bind_low_rank.h"
#include "bind_masked.h"
#include "bind_quantize.h"
#include "bind_route.h"
#include "bind_routing.h"
#include "bind_squared_grad.h"
#include "bind_threads.h"
#include "cpu/kernels.h"

namespace gose {
namespace {

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

std::tuple<HandedOver, HandedOver, HandedOver, HandedOver, HandedOver, HandedOver> route(
    Tensor options, Tensor score_TE, int64_t top_k, std::optional<Tensor> entropy_TE,
    std::optional<Tensor> entropy_E, std::optional<Tensor> bias_E, std::optional<Tensor> noise_TE) {
  const RouteTensors given = {entropy_TE, entropy_E, bias_E, noise_TE};
  RouteCall call = prepare_route(score_TE, top_k, given, RouteOptions(options));
  cpu::kernels().route(call.params, kTorchThreads);
  return {call.weight.hand_over(), call.expert.hand_over(),     call.entropy.hand_over(),
          call.load.hand_over(),   call.importance.hand_over(), call.loss.hand_over()};
}

Tensor route_backward(Tensor options, Tensor score_TE, int64_t top_k,
                      std::optional<Tensor> entropy_TE, std::optional<Tensor> entropy_E,
                      std::optional<Tensor> bias_E, std::optional<Tensor> noise_TE,
                      Tensor expert_TK, Tensor load_E, Tensor importance_E,
                      std::optional<Tensor> grad_weight_TK, std::optional<Tensor> grad_entropy_T,
                      std::optional<Tensor> grad_importance_E, std::optional<Tensor> grad_loss_L) {
  const RouteTensors given = {entropy_TE, entropy_E, bias_E, noise_TE};
  RouteBackwardCall call = prepare_route_backward(score_TE, top_k, given,
                                                  {expert_TK, load_E, importance_E, grad_weight_TK,
                                                   grad_entropy_T, grad_importance_E, grad_loss_L},
                                                  RouteOptions(options));
  cpu::kernels().route_backward(call.params, kTorchThreads);
  const Tensor& ranked = entropy_TE ? *entropy_TE : entropy_E ? *entropy_E : score_TE;
  const Tensor grad = call.grad.tensor();
  const bool same = ranked.scalar_type() == grad.scalar_type();
  return same ? grad : torch::stable::to(grad, ranked.scalar_type());
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
  const double rate = scalar_of(op, "lr", lr);
  const float scale = scale_of(a, maximize);
  UpdateCall(a, momentum != 0, false).run([&](const UpdateList& list) {
    cpu::kernels().masked_sgd({.list = list,
                               .lr = float(rate),
                               .scale = scale,
                               .momentum = float(momentum),
                               .weight_decay = float(weight_decay),
                               .undamped = float(1 - dampening),
                               .nesterov = nesterov},
                              kTorchThreads);
  });
}

void masked_adam(Tensors param, Tensors grad, Tensors state, Tensors step, Tensors master,
                 Tensors frozen, Tensors row, Tensor lr, std::optional<Tensor> grad_scale,
                 std::vector<double> threshold, std::vector<int64_t> seed,
                 std::vector<int64_t> start, int64_t draw, double beta1, double beta2, double eps,
                 double weight_decay, bool decoupled, bool amsgrad, bool maximize) {
  const char* op = "masked_adam_";
  const UpdateArguments a = {op,  param, grad,       state,     step, master, frozen,
                             row, lr,    grad_scale, threshold, seed, start,  draw};
  const double rate = scalar_of(op, "lr", lr);
  const float scale = scale_of(a, maximize);
  UpdateCall(a, amsgrad ? 3 : 2, true).run([&](const UpdateList& list) {
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

void masked_lion(Tensors param, Tensors grad, Tensors state, Tensors step, Tensors master,
                 Tensors frozen, Tensors row, Tensor lr, std::optional<Tensor> grad_scale,
                 std::vector<double> threshold, std::vector<int64_t> seed,
                 std::vector<int64_t> start, int64_t draw, double beta1, double beta2,
                 double weight_decay, bool maximize) {
  const char* op = "masked_lion_";
  const UpdateArguments a = {op,  param, grad,       state,     step, master, frozen,
                             row, lr,    grad_scale, threshold, seed, start,  draw};
  const double rate = scalar_of(op, "lr", lr);
  const float scale = scale_of(a, maximize);
  UpdateCall(a, 1, false).run([&](const UpdateList& list) {
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

int64_t scratch_bytes() { return ScratchPool::of_process().held(); }

void release_scratch() { ScratchPool::of_process().release(); }

Tensor masked_square_sum(Tensors grad, Tensors frozen, std::vector<double> threshold) {
  const SquareSumCall call("masked_square_sum", grad, frozen, threshold);
  Tensor out = torch::stable::new_empty(grad.at(0), {int64_t(grad.size())}, ScalarType::Double);
  std::vector<double> partial(call.chunks());
  cpu::kernels().masked_square_sum(
      {call.list(), partial.data(), static_cast<double*>(out.mutable_data_ptr())}, kTorchThreads);
  return out;
}

void run_find_live(const LiveParams& params) { cpu::kernels().find_live(params, kTorchThreads); }

std::tuple<Tensor, Tensor, Tensor> quantize(Tensor x_P, std::optional<Tensor> residual_P,
                                            std::optional<Tensor> frozen_P, std::string format_name,
                                            std::string rounding, int64_t seed, int64_t step) {
  const char* op = "quantize";
  const CodeFormat format = code_format(op, format_name);
  const DType dtype = float_dtype(op, "x_P", x_P);
  if (rounding != "nearest" && rounding != "stochastic") {
    refuse(op, ": rounding must be nearest or stochastic, got '", rounding, "'");
  }
  if (residual_P) {
    if (sizes_of(*residual_P, residual_P->dim()) != sizes_of(x_P, x_P.dim())) {
      refuse(op, ": residual_P must have the shape of x_P ", shape_of(x_P), ", got ",
             shape_of(*residual_P));
    }
    if (residual_P->scalar_type() != ScalarType::Float) {
      refuse(op, ": residual_P must be float32, got ", dtype_name(residual_P->scalar_type()));
    }
  }
  if (frozen_P) check_frozen("quantize: frozen_P", *frozen_P, "x_P", x_P);
  const Tensor x = torch::stable::contiguous(x_P);
  const Tensor residual = residual_P ? torch::stable::contiguous(*residual_P) : x;
  const Live live = find_live(frozen_P, x, run_find_live);
  const int64_t bytes = code_bytes(format, live.L);
  Tensor code = on_huge_pages(torch::stable::new_empty(x, {bytes}, ScalarType::Byte), bytes);
  Tensor scale = torch::stable::new_empty(x, {num_scales(format, live.L)},
                                          format.half_scale ? ScalarType::Half : ScalarType::Float);
  const std::vector<int64_t> shape = residual_P ? sizes_of(x, x.dim()) : std::vector<int64_t>{0};
  Tensor left = live.frozen() != nullptr
                    ? torch::stable::new_zeros(x, shape, ScalarType::Float)
                    : on_huge_pages(torch::stable::new_empty(x, shape, ScalarType::Float),
                                    residual_P ? 4 * x.numel() : 0);
  std::vector<CodeBad> bad((live.L + kCodeUnit - 1) / kCodeUnit);
  cpu::kernels().quantize(
      {
          .x = x.const_data_ptr(),
          .residual = residual_P ? static_cast<const float*>(residual.const_data_ptr()) : nullptr,
          .frozen = live.frozen(),
          .start = live.starts(),
          .code = static_cast<uint8_t*>(code.mutable_data_ptr()),
          .scale = scale.mutable_data_ptr(),
          .left = residual_P ? static_cast<float*>(left.mutable_data_ptr()) : nullptr,
          .bad = bad.data(),
          .P = x.numel(),
          .L = live.L,
          .inner = live.mask.inner,
          .seed = seed,
          .step = step,
          .stochastic = rounding == "stochastic",
          .format = format,
          .dtype = dtype,
      },
      kTorchThreads);
  check_finite(bad);
  return {code, scale, left};
}

void run_dequantize(const Tensor& code, const Tensor& scale, const Live& live, const Tensor& out,
                    const CodeFormat& format, bool add, double weight) {
  cpu::kernels().dequantize({.code = static_cast<const uint8_t*>(code.const_data_ptr()),
                             .scale = scale.const_data_ptr(),
                             .frozen = live.frozen(),
                             .start = live.starts(),
                             .out = static_cast<float*>(out.mutable_data_ptr()),
                             .P = out.numel(),
                             .L = live.L,
                             .inner = live.mask.inner,
                             .weight = float(weight),
                             .add = add,
                             .format = format},
                            kTorchThreads);
}

Tensor dequantize(Tensor code, Tensor scale, int64_t numel, std::optional<Tensor> frozen_P,
                  std::string format_name) {
  const char* op = "dequantize";
  const CodeFormat format = code_format(op, format_name);
  check_code(op, code, scale, format);
  if (numel < 0) refuse(op, ": numel must not be negative, got ", numel);
  std::optional<Tensor> frozen;
  if (frozen_P) {
    if (frozen_P->scalar_type() != ScalarType::Bool) {
      refuse(op, ": frozen_P must be bool, got ", dtype_name(frozen_P->scalar_type()));
    }
    if (frozen_P->numel() != numel) {
      refuse(op, ": frozen_P must have numel=", numel, " elements, got ", frozen_P->numel());
    }
    frozen = torch::stable::contiguous(*frozen_P);
  }
  const Tensor code_1 = torch::stable::contiguous(code);
  const Tensor scale_1 = torch::stable::contiguous(scale);
  // The mask has its own shape: what it masks is found before `out`, which a lie must not size.
  const Live live = frozen ? find_live(frozen, *frozen, run_find_live) : Live{{}, {}, numel};
  check_scales(op, code_1, scale_1, format, live.L);
  Tensor out = frozen ? torch::stable::new_zeros(code_1, {numel}, ScalarType::Float)
                      : on_huge_pages(torch::stable::new_empty(code_1, {numel}, ScalarType::Float),
                                      4 * numel);
  run_dequantize(code_1, scale_1, live, out, format, false, 1);
  return out;
}

void dequantize_add(Tensor acc_P, Tensor code, Tensor scale, std::optional<Tensor> frozen_P,
                    std::string format_name, double weight) {
  const char* op = "dequantize_add_";
  const CodeFormat format = code_format(op, format_name);
  check_code(op, code, scale, format);
  if (acc_P.scalar_type() != ScalarType::Float) {
    refuse(op, ": acc_P must be float32, got ", dtype_name(acc_P.scalar_type()));
  }
  if (!acc_P.is_contiguous()) {
    std::vector<int64_t> strides;
    for (int64_t d = 0; d < acc_P.dim(); ++d) strides.push_back(acc_P.stride(d));
    refuse(op, ": acc_P must be contiguous, got strides ", shape_text(strides), " for shape ",
           shape_of(acc_P));
  }
  if (frozen_P) check_frozen("dequantize_add_: frozen_P", *frozen_P, "acc_P", acc_P);
  const Tensor code_1 = torch::stable::contiguous(code);
  const Tensor scale_1 = torch::stable::contiguous(scale);
  const Live live = find_live(frozen_P, acc_P, run_find_live);
  check_scales(op, code_1, scale_1, format, live.L);
  run_dequantize(code_1, scale_1, live, acc_P, format, true, weight);
}

void run_distill(const DistillParams& params) {
  cpu::kernels().distill_loss(params, kTorchThreads);
}

Tensor distill_loss(GOSE_DISTILL_ARGUMENTS) {
  return distill("distill_loss", GOSE_DISTILL_CALL, false, run_distill).loss;
}

std::tuple<Tensor, Tensor> distill_loss_train(GOSE_DISTILL_ARGUMENTS) {
  const DistillResult result = distill("distill_loss", GOSE_DISTILL_CALL, true, run_distill);
  return {result.loss, result.grad};
}

std::tuple<Tensor, Tensor> squared_grad(Tensor x_ND, Tensor grad_NF, std::optional<Tensor> sample_N,
                                        std::optional<Tensor> offset_E1) {
  SquaredGradCall call = prepare_squared_grad(x_ND, grad_NF, sample_N, offset_E1);
  cpu::kernels().squared_grad(call.params, kTorchThreads);
  return {call.square, call.square_bias};
}

std::tuple<Tensor, Tensor, Tensor> low_rank_op(Tensor x_MN, Tensor q_NR,
                                               std::optional<Tensor> residual_MN) {
  return low_rank(x_MN, q_NR, residual_MN, [](const LowRankParams& params) {
    cpu::kernels().low_rank(params, kTorchThreads);
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
#define GOSE_UPDATE_ARGUMENTS                                                           \
  "(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] state, Tensor(c!)[] step, "         \
  "Tensor(d!)[] master, Tensor[] frozen, Tensor[] row, Tensor lr, Tensor? grad_scale, " \
  "float[] threshold, int[] seed, int[] start, int draw, "
  m.def("masked_sgd_" GOSE_UPDATE_ARGUMENTS
        "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize) -> ()");
  m.def("masked_square_sum(Tensor[] grad, Tensor[] frozen, float[] threshold) -> Tensor");
  m.def("masked_adam_" GOSE_UPDATE_ARGUMENTS
        "float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool amsgrad, "
        "bool maximize) -> ()");
  m.def("masked_lion_" GOSE_UPDATE_ARGUMENTS
        "float beta1, float beta2, float weight_decay, bool maximize) -> ()");
#undef GOSE_UPDATE_ARGUMENTS
  m.def(
      "quantize(Tensor x_P, Tensor? residual_P, Tensor? frozen_P, str format, str rounding, "
      "int seed, int step) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize(Tensor code, Tensor scale, int numel, Tensor? frozen_P, str format) -> Tensor");
  m.def(
      "dequantize_add_(Tensor(a!) acc_P, Tensor code, Tensor scale, Tensor? frozen_P, str format, "
      "float weight) -> ()");
  m.def(
      "quantize_at(Tensor x_P, Tensor? residual_P, Tensor? place_L, str format, bool stochastic, "
      "int seed, int step) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dequantize_at(Tensor(a!) out_P, Tensor code, Tensor scale, Tensor? place_L, str format, "
      "float? weight) -> ()");
#define GOSE_DISTILL_SCHEMA                                                                     \
  "(Tensor student_BC, Tensor teacher, Tensor label, Tensor? weight_B, Tensor? task_weight_B, " \
  "Tensor? teacher_id_BJ, Tensor? teacher_tail_B, float task_weight, float tau, "               \
  "float label_smoothing, str kl_reduction, str reduction)"
  m.def("distill_loss" GOSE_DISTILL_SCHEMA " -> Tensor");
  m.def("distill_loss_train" GOSE_DISTILL_SCHEMA " -> (Tensor, Tensor)");
#undef GOSE_DISTILL_SCHEMA
  m.def(
      "squared_grad(Tensor x_ND, Tensor grad_NF, Tensor? sample_N, Tensor? offset_E1) -> "
      "(Tensor, Tensor)");
  m.def("low_rank(Tensor x_MN, Tensor q_NR, Tensor? residual_MN) -> (Tensor, Tensor, Tensor)");
  m.def("entropy(Tensor logits_BMC) -> Tensor");
  m.def("entropy_backward(Tensor grad_BM, Tensor logits_BMC) -> Tensor");
  m.def("dispatch(Tensor expert_TK, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "route(Tensor options, Tensor score_TE, int top_k, Tensor? entropy_TE=None, "
      "Tensor? entropy_E=None, Tensor? bias_E=None, Tensor? noise_TE=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "route_backward(Tensor options, Tensor score_TE, int top_k, Tensor? entropy_TE, "
      "Tensor? entropy_E, Tensor? bias_E, Tensor? noise_TE, Tensor expert_TK, Tensor load_E, "
      "Tensor importance_E, Tensor? grad_weight_TK, Tensor? grad_entropy_T, "
      "Tensor? grad_importance_E, Tensor? grad_loss_L) -> Tensor");
  m.def("scratch_bytes() -> int");
  m.def("release_scratch() -> ()");
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
  m.impl("quantize", TORCH_BOX(&gose::quantize));
  m.impl("dequantize", TORCH_BOX(&gose::dequantize));
  m.impl("dequantize_add_", TORCH_BOX(&gose::dequantize_add));
  m.impl("distill_loss", TORCH_BOX(&gose::distill_loss));
  m.impl("distill_loss_train", TORCH_BOX(&gose::distill_loss_train));
  m.impl("low_rank", TORCH_BOX(&gose::low_rank_op));
  m.impl("squared_grad", TORCH_BOX(&gose::squared_grad));
  m.impl("masked_sgd_", TORCH_BOX(&gose::masked_sgd));
  m.impl("masked_adam_", TORCH_BOX(&gose::masked_adam));
  m.impl("masked_lion_", TORCH_BOX(&gose::masked_lion));
  m.impl("masked_square_sum", TORCH_BOX(&gose::masked_square_sum));
}

STABLE_TORCH_LIBRARY_IMPL(gose_native, CompositeExplicitAutograd, m) {
  m.impl("scratch_bytes", TORCH_BOX(&gose::scratch_bytes));
  m.impl("release_scratch", TORCH_BOX(&gose::release_scratch));
  m.impl("cpu_levels", TORCH_BOX(&gose::cpu_levels));
  m.impl("cpu_level", TORCH_BOX(&gose::cpu_level));
  m.impl("built_with_cuda", TORCH_BOX(&gose::built_with_cuda));
}
