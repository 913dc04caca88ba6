// The CPU ops on experts' weights as torch.ops.gose_native.<op>: packing, layers, grouped products.
#include <algorithm>
#include <string>
#include <vector>

#include "bind_mlp.h"
#include "bind_moe.h"
#include "bind_threads.h"

namespace gose {
namespace {

// Where panels of w_EFD go in packed_EB, checked: from byte `at` of every row on.
PackParams pack_params(const char* op, const Tensor& packed_EB, const Tensor& w_EFD, int64_t at,
                       bool gated, bool interleaved, bool transposed, Weights weights) {
  const DType dtype = packable(op, "w_EFD", w_EFD);
  const int64_t columns = w_EFD.size(transposed ? 2 : 1), K = w_EFD.size(transposed ? 1 : 2);
  const int64_t bytes = panel_bytes(columns, K, gated, dtype, weights);
  if (packed_EB.scalar_type() != ScalarType::Byte || packed_EB.dim() != 2 ||
      packed_EB.size(0) != w_EFD.size(0) || at < 0 || at % 64 != 0 ||
      packed_EB.size(1) < at + bytes || packed_EB.stride(1) != 1 || packed_EB.stride(0) % 64 != 0) {
    refuse(op, ": packed_EB must be uint8 with ", w_EFD.size(0), " rows of at least ", at + bytes,
           " bytes, a multiple of 64 apart, got ", shape_of(packed_EB));
  }
  advise_huge_pages(packed_EB.mutable_data_ptr(), packed_EB.size(0) * packed_EB.stride(0));
  PackParams params = raw_params(w_EFD, transposed, gated, interleaved, dtype);
  params.packed = static_cast<char*>(packed_EB.mutable_data_ptr()) + at;
  params.stride_packed = packed_EB.stride(0);
  return params;
}

void pack_matrix(Tensor packed_EB, Tensor w_EFD, int64_t at, bool gated, bool interleaved,
                 bool transposed) {
  if (packed_EB.numel() == 0 && w_EFD.numel() == 0) return;
  const PackParams params = pack_params("pack_matrix", packed_EB, w_EFD, at, gated, interleaved,
                                        transposed, Weights::kPlain);
  cpu::kernels().pack(params, kTorchThreads);
}

// The first expert with a weight that is not finite, or -1. weights: 1 int8, 2 int4.
int64_t quantize_matrix(Tensor packed_EB, Tensor w_EFD, int64_t at, bool gated, bool interleaved,
                        bool transposed, int64_t weights) {
  const char* op = "quantize_matrix";
  if (weights != 1 && weights != 2) refuse(op, ": weights must be 1 or 2, got ", weights);
  if (packed_EB.numel() == 0 && w_EFD.numel() == 0) return -1;
  const PackParams pack = pack_params(op, packed_EB, w_EFD, at, gated, interleaved, transposed,
                                      Weights(int32_t(weights)));
  const int64_t threads = torch::stable::get_num_threads();
  const Scratch scratch(threads * 8 * cpu::kPanel * aligned_columns(pack.K));
  std::vector<uint8_t> infinite(pack.E);
  cpu::kernels().quantize_weights({.pack = pack,
                                   .weights = Weights(int32_t(weights)),
                                   .scratch = scratch.data(),
                                   .threads = threads,
                                   .infinite = infinite.data()},
                                  kTorchThreads);
  const auto first = std::find(infinite.begin(), infinite.end(), 1);
  return first == infinite.end() ? -1 : first - infinite.begin();
}

// Frozen weights matter to a backward alone, but only a caller that checks a call may pass them.
MlpOptions mlp_options(const char* op, const Tensor& options, const Tensor& x_TD,
                       std::initializer_list<const std::optional<Tensor>*> weights,
                       const std::optional<Tensor>& frozen_E,
                       const std::optional<Tensor>& frozen_EF) {
  const MlpOptions numbers(op, options);
  numbers.check_then(op, x_TD, weights);
  if (numbers.then != nullptr && (frozen_E || frozen_EF)) refuse(op, ": frozen weights unchecked");
  return numbers;
}

HandedOver expert_mlp(Tensor options, Tensor packed_EB, Tensor x_TD, Tensor weight_TK,
                      Tensor expert_TK, std::optional<Tensor> w_up_EHD,
                      std::optional<Tensor> w_down_EDF, std::optional<Tensor> bias_up_EH,
                      std::optional<Tensor> bias_down_ED, std::optional<Tensor> frozen_E,
                      std::optional<Tensor> frozen_EF) {
  const char* op = "expert_mlp";
  const MlpOptions numbers =
      mlp_options(op, options, x_TD, {&w_up_EHD, &w_down_EDF}, frozen_E, frozen_EF);
  check_dim(op, "packed_EB", packed_EB, 2);
  MlpCall call(op, x_TD, packed_EB.size(0), numbers);
  call.route(op, weight_TK, expert_TK);
  return run_expert_mlp(call, {&packed_EB, nullptr, nullptr, false}, bias_up_EH, bias_down_ED,
                        false, torch::stable::get_num_threads(), kTorchThreads)
      .first.hand_over();
}

std::tuple<HandedOver, HandedOver> expert_mlp_train(Tensor options, Tensor packed_EB, Tensor x_TD,
                                                    Tensor weight_TK, Tensor expert_TK,
                                                    std::optional<Tensor> bias_up_EH,
                                                    std::optional<Tensor> bias_down_ED) {
  const char* op = "expert_mlp";
  check_dim(op, "packed_EB", packed_EB, 2);
  MlpCall call(op, x_TD, packed_EB.size(0), MlpOptions(op, options));
  call.route(op, weight_TK, expert_TK);
  auto [out, pre] =
      run_expert_mlp(call, {&packed_EB, nullptr, nullptr, false}, bias_up_EH, bias_down_ED, true,
                     torch::stable::get_num_threads(), kTorchThreads);
  return {out.hand_over(), pre->hand_over()};
}

std::tuple<HandedOver, HandedOver> expert_mlp_train_raw(Tensor options, Tensor w_up_EHD,
                                                        Tensor w_down_EDF, bool transposed,
                                                        Tensor x_TD, Tensor weight_TK,
                                                        Tensor expert_TK,
                                                        std::optional<Tensor> bias_up_EH,
                                                        std::optional<Tensor> bias_down_ED) {
  const char* op = "expert_mlp";
  check_dim(op, "w_down_EDF", w_down_EDF, 3);
  MlpCall call(op, x_TD, w_down_EDF.size(0), MlpOptions(op, options));
  call.route(op, weight_TK, expert_TK);
  auto [out, pre] =
      run_expert_mlp(call, {nullptr, &w_up_EHD, &w_down_EDF, transposed}, bias_up_EH, bias_down_ED,
                     true, torch::stable::get_num_threads(), kTorchThreads);
  return {out.hand_over(), pre->hand_over()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    Tensor options, Tensor x_TD, Tensor weight_TK, Tensor expert_TK, Tensor w_up_EHD,
    Tensor w_down_EDF, bool transposed, std::optional<Tensor> bias_down_ED,
    std::optional<Tensor> frozen_E, std::optional<Tensor> frozen_EF, Tensor pre_NH, Tensor grad_TD,
    std::optional<Tensor> grad_up, std::optional<Tensor> grad_down, bool need_x, bool need_weight,
    bool need_bias_up, bool need_bias_down, bool add) {
  const char* op = "expert_mlp_backward";
  check_dim(op, "w_down_EDF", w_down_EDF, 3);
  MlpCall call(op, x_TD, w_down_EDF.size(0), MlpOptions(op, options));
  call.route(op, weight_TK, expert_TK);
  const MlpGradients wanted = {grad_up,      grad_down,      need_x, need_weight,
                               need_bias_up, need_bias_down, add};
  return run_expert_mlp_backward(call, w_up_EHD, w_down_EDF, transposed, bias_down_ED, frozen_E,
                                 frozen_EF, pre_NH, grad_TD, wanted,
                                 torch::stable::get_num_threads(), kTorchThreads);
}

std::tuple<HandedOver, HandedOver, HandedOver, HandedOver, HandedOver, HandedOver, HandedOver> moe(
    Tensor options, Tensor route_options, Tensor packed_EB, std::optional<Tensor> packed_router_1B,
    Tensor x_TD, std::optional<Tensor> w_up_EHD, std::optional<Tensor> w_down_EDF, int64_t top_k,
    std::optional<Tensor> w_router_ED, std::optional<Tensor> logits_TE,
    std::optional<Tensor> bias_up_EH, std::optional<Tensor> bias_down_ED,
    std::optional<Tensor> frozen_E, std::optional<Tensor> frozen_EF,
    std::optional<Tensor> entropy_TE, std::optional<Tensor> entropy_E, std::optional<Tensor> bias_E,
    std::optional<Tensor> noise_TE) {
  const MlpOptions numbers = mlp_options(
      "moe", options, x_TD, {&w_up_EHD, &w_down_EDF, &w_router_ED}, frozen_E, frozen_EF);
  const int64_t num_threads = torch::stable::get_num_threads();
  check_dim("moe", "packed_EB", packed_EB, 2);
  MlpCall call("moe", x_TD, packed_EB.size(0), numbers);
  const Tensor score_TE =
      scores_of(call, {packed_router_1B, logits_TE}, num_threads, kTorchThreads);
  RouteCall routing = prepare_route(score_TE, top_k, {entropy_TE, entropy_E, bias_E, noise_TE},
                                    RouteOptions(route_options));
  cpu::kernels().route(routing.params, kTorchThreads);
  call.K = top_k, call.weights = routing.params.weight, call.experts = routing.params.expert;
  NewTensor out = run_expert_mlp(call, {&packed_EB, nullptr, nullptr, false}, bias_up_EH,
                                 bias_down_ED, false, num_threads, kTorchThreads)
                      .first;
  return {out.hand_over(),
          routing.weight.hand_over(),
          routing.expert.hand_over(),
          routing.entropy.hand_over(),
          routing.load.hand_over(),
          routing.importance.hand_over(),
          routing.loss.hand_over()};
}

Tensor grouped_gemm(Tensor x_ND, Tensor packed_EB, Tensor offset_E1, std::optional<Tensor> bias_EF,
                    int64_t hidden) {
  return run_grouped_gemm(x_ND, {&packed_EB, nullptr, nullptr, false}, offset_E1, bias_EF, hidden,
                          torch::stable::get_num_threads(), kTorchThreads);
}

Tensor grouped_gemm_raw(Tensor x_ND, Tensor w_EFD, Tensor offset_E1, std::optional<Tensor> bias_EF,
                        bool transposed) {
  check_dim("grouped_gemm", "w_EFD", w_EFD, 3);
  return run_grouped_gemm(x_ND, {nullptr, &w_EFD, nullptr, transposed}, offset_E1, bias_EF,
                          w_EFD.size(transposed ? 2 : 1), torch::stable::get_num_threads(),
                          kTorchThreads);
}

Tensor grouped_gemm_backward(Tensor grad_NF, Tensor x_ND, Tensor offset_E1, Tensor grad_w,
                             bool transposed, bool bias, bool add) {
  return run_grouped_gemm_backward(grad_NF, x_ND, offset_E1, grad_w, transposed, bias, add,
                                   torch::stable::get_num_threads(), kTorchThreads);
}

std::string micro_kernel(std::string dtype) {
  const DType type = dtype == "bfloat16"  ? DType::kBFloat16
                     : dtype == "float16" ? DType::kFloat16
                                          : DType::kFloat32;
  return cpu::micro_gemm(type).name;
}

}  // namespace
}  // namespace gose

STABLE_TORCH_LIBRARY_FRAGMENT(gose_native, m) {
  m.def(
      "pack_matrix(Tensor(a!) packed_EB, Tensor w_EFD, int at, bool gated, bool interleaved, "
      "bool transposed) -> ()");
  m.def(
      "quantize_matrix(Tensor(a!) packed_EB, Tensor w_EFD, int at, bool gated, bool interleaved, "
      "bool transposed, int weights) -> int");
  m.def(
      "expert_mlp(Tensor options, Tensor packed_EB, Tensor x_TD, Tensor weight_TK, "
      "Tensor expert_TK, Tensor? w_up_EHD=None, Tensor? w_down_EDF=None, Tensor? bias_up_EH=None, "
      "Tensor? bias_down_ED=None, Tensor? frozen_E=None, Tensor? frozen_EF=None) -> Tensor");
  m.def(
      "expert_mlp_train(Tensor options, Tensor packed_EB, Tensor x_TD, Tensor weight_TK, "
      "Tensor expert_TK, Tensor? bias_up_EH, Tensor? bias_down_ED) -> (Tensor, Tensor)");
  m.def(
      "moe(Tensor options, Tensor route_options, Tensor packed_EB, Tensor? packed_router_1B, "
      "Tensor x_TD, Tensor? w_up_EHD, Tensor? w_down_EDF, int top_k, Tensor? w_router_ED=None, "
      "Tensor? logits_TE=None, Tensor? bias_up_EH=None, Tensor? bias_down_ED=None, "
      "Tensor? frozen_E=None, Tensor? frozen_EF=None, Tensor? entropy_TE=None, "
      "Tensor? entropy_E=None, Tensor? bias_E=None, Tensor? noise_TE=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "grouped_gemm(Tensor x_ND, Tensor packed_EB, Tensor offset_E1, Tensor? bias_EF, int hidden) "
      "-> Tensor");
  m.def(
      "expert_mlp_train_raw(Tensor options, Tensor w_up_EHD, Tensor w_down_EDF, bool transposed, "
      "Tensor x_TD, Tensor weight_TK, Tensor expert_TK, Tensor? bias_up_EH, Tensor? bias_down_ED) "
      "-> (Tensor, Tensor)");
  m.def(
      "expert_mlp_backward(Tensor options, Tensor x_TD, Tensor weight_TK, Tensor expert_TK, "
      "Tensor w_up_EHD, Tensor w_down_EDF, bool transposed, Tensor? bias_down_ED, "
      "Tensor? frozen_E, Tensor? frozen_EF, Tensor pre_NH, Tensor grad_TD, "
      "Tensor(a!)? grad_up, Tensor(b!)? grad_down, bool need_x, bool need_weight, "
      "bool need_bias_up, bool need_bias_down, bool add) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "grouped_gemm_raw(Tensor x_ND, Tensor w_EFD, Tensor offset_E1, Tensor? bias_EF, "
      "bool transposed) -> Tensor");
  m.def(
      "grouped_gemm_backward(Tensor grad_NF, Tensor x_ND, Tensor offset_E1, Tensor(a!) grad_w, "
      "bool transposed, bool bias, bool add) -> Tensor");
  m.def("micro_kernel(str dtype) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gose_native, CPU, m) {
  m.impl("pack_matrix", TORCH_BOX(&gose::pack_matrix));
  m.impl("quantize_matrix", TORCH_BOX(&gose::quantize_matrix));
  m.impl("expert_mlp", TORCH_BOX(&gose::expert_mlp));
  m.impl("expert_mlp_train", TORCH_BOX(&gose::expert_mlp_train));
  m.impl("expert_mlp_train_raw", TORCH_BOX(&gose::expert_mlp_train_raw));
  m.impl("moe", TORCH_BOX(&gose::moe));
  m.impl("expert_mlp_backward", TORCH_BOX(&gose::expert_mlp_backward));
  m.impl("grouped_gemm", TORCH_BOX(&gose::grouped_gemm));
  m.impl("grouped_gemm_raw", TORCH_BOX(&gose::grouped_gemm_raw));
  m.impl("grouped_gemm_backward", TORCH_BOX(&gose::grouped_gemm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(gose_native, CompositeExplicitAutograd, m) {
  m.impl("micro_kernel", TORCH_BOX(&gose::micro_kernel));
}
