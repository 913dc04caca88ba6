// Checks and allocation of packing, expert_mlp and grouped_gemm on the CPU.
//
// Python checks what users pass and packs it; what arrives here is refused where memory would be
// read that is not there, with fewer words.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "bind.h"
#include "bind_routing.h"
#include "cpu/kernels.h"
#include "cpu/microgemm.h"
#include "scratch.h"

namespace gose {

inline int64_t aligned_columns(int64_t columns) {
  return (columns + cpu::kPanel - 1) / cpu::kPanel * cpu::kPanel;
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Bytes of one expert's panels for [columns, K] weights; with a gate, columns = 2 * units.
inline int64_t panel_bytes(int64_t columns, int64_t K, bool gated, DType dtype) {
  const int64_t padded = gated ? 2 * aligned_columns(columns / 2) : aligned_columns(columns);
  return padded * aligned_columns(K) * size_of(dtype);
}

inline DType packable(const char* op, const char* name, const Tensor& w) {
  check_dim(op, name, w, 3);
  return float_dtype(op, name, w);
}

inline void check_packed(const char* op, const Tensor& packed, int64_t E, int64_t bytes) {
  const bool rows = packed.numel() == 0 || (packed.stride(1) == 1 && packed.stride(0) % 64 == 0 &&
                                            uintptr_t(packed.const_data_ptr()) % 4 == 0);
  if (packed.scalar_type() != ScalarType::Byte || packed.size(0) != E || packed.size(1) != bytes ||
      !rows) {
    refuse(op, ": packed_EB must be uint8 of shape (", E, ", ", bytes,
           ") with rows a multiple of 64 bytes apart, got ", shape_of(packed));
  }
}

inline PackParams pack_params(const Tensor& w, bool transposed, bool gated, bool interleaved,
                              const Tensor& packed, int64_t from, DType dtype) {
  const int column = transposed ? 2 : 1, k = transposed ? 1 : 2;
  return {.w = w.const_data_ptr(),
          .packed = static_cast<char*>(packed.mutable_data_ptr()) + from,
          .E = w.size(0),
          .columns = w.size(column),
          .K = w.size(k),
          .stride_we = w.stride(0),
          .stride_wc = w.stride(column),
          .stride_wk = w.stride(k),
          .stride_packed = packed.stride(0),
          .gated = gated,
          .interleaved = interleaved,
          .dtype = dtype};
}

// ops/activations.py in the kernel's terms.
struct ActivationOf {
  Phi phi;
  bool gated;
  float shift = 0.f, limit = std::numeric_limits<float>::infinity();
};

inline ActivationOf activation_of(const char* op, const std::string& name) {
  static const struct {
    const char* name;
    ActivationOf activation;
  } kTable[] = {
      {"swiglu", {Phi::kSilu, true}}, {"swiglu_oai", {Phi::kSilu, true, 1.f, 7.f}},
      {"geglu", {Phi::kGelu, true}},  {"geglu_tanh", {Phi::kGeluTanh, true}},
      {"reglu", {Phi::kRelu, true}},  {"silu", {Phi::kSilu, false}},
      {"gelu", {Phi::kGelu, false}},  {"gelu_tanh", {Phi::kGeluTanh, false}},
      {"relu", {Phi::kRelu, false}},  {"relu2", {Phi::kRelu2, false}},
  };
  for (const auto& row : kTable) {
    if (name == row.name) return row.activation;
  }
  refuse(op, ": no activation named ", name);
}

inline Bias bias_of(const char* op, const char* name, const std::optional<Tensor>& bias, int64_t E,
                    int64_t columns, const Tensor& x) {
  if (!bias) return {nullptr, 0, 0};
  if (bias->dim() != 2 || bias->size(0) != E || bias->size(1) != columns) {
    refuse(op, ": ", name, " must have shape (", E, ", ", columns, "), got ", shape_of(*bias));
  }
  check_dtype(op, name, *bias, x.scalar_type());
  return {bias->const_data_ptr(), bias->stride(0), bias->stride(1)};
}

// Rows [begin, begin + count); torch's narrow takes no const tensor, and a copy shares the data.
inline Tensor rows_of(Tensor t, int64_t begin, int64_t count) {
  return torch::stable::narrow(t, 0, begin, count);
}

// Tokens of one pass: scratch for more would exceed this.
constexpr int64_t kMostScratch = int64_t{256} << 20;

struct ExpertMlpOptions {
  int64_t hidden;
  std::string activation;
  bool interleaved;
  std::optional<double> limit;
  double alpha;
  bool keep_pre;
};

// out_TD, and pre_NH or an empty tensor. threads(params) runs the kernel.
inline std::tuple<Tensor, Tensor> run_expert_mlp(
    const Tensor& x_TD, const Tensor& weight_TK, const Tensor& expert_TK, const Tensor& packed_EB,
    const std::optional<Tensor>& bias_up_EH, const std::optional<Tensor>& bias_down_ED,
    const ExpertMlpOptions& options, int64_t num_threads, const cpu::Parallel& threads) {
  const char* op = "expert_mlp";
  const DType dtype = float_dtype(op, "x_TD", x_TD);
  check_dim(op, "x_TD", x_TD, 2);
  check_dim(op, "packed_EB", packed_EB, 2);
  check_dim(op, "weight_TK", weight_TK, 2);
  check_dim(op, "expert_TK", expert_TK, 2);
  check_dtype(op, "weight_TK", weight_TK, ScalarType::Float);
  const int64_t T = x_TD.size(0), D = x_TD.size(1), K = weight_TK.size(1);
  const int64_t E = packed_EB.size(0), F = options.hidden;
  if (weight_TK.size(0) != T || expert_TK.size(0) != T || expert_TK.size(1) != K) {
    refuse(op, ": weight_TK and expert_TK must have shape [T=", T, ", K], got ",
           shape_of(weight_TK), " and ", shape_of(expert_TK));
  }
  const ActivationOf activation = activation_of(op, options.activation);
  const int64_t H = activation.gated ? 2 * F : F;
  if (F < 0) refuse(op, ": hidden must be at least 0, got ", F);
  const int64_t up_bytes = panel_bytes(H, D, activation.gated, dtype);
  check_packed(op, packed_EB, E, up_bytes + panel_bytes(D, F, false, dtype));
  const float limit = options.limit ? float(*options.limit) : activation.limit;
  if (!(limit > 0)) refuse(op, ": limit must be above 0, got ", limit);

  const Tensor x = rows_contiguous(x_TD), weight = dense(weight_TK);
  const Tensor expert = torch::stable::contiguous(expert_TK);
  Tensor out = torch::stable::new_empty(x, {T, D});
  Tensor pre = torch::stable::new_empty(x, {options.keep_pre ? T * K : 0, H});
  const char* packed = static_cast<const char*>(packed_EB.const_data_ptr());
  void* kept = options.keep_pre ? pre.mutable_data_ptr() : nullptr;
  ExpertMlpParams params = {
      .weight = static_cast<const float*>(weight.const_data_ptr()),
      .up = packed,
      .down = packed + up_bytes,
      .bias_up = bias_of(op, "bias_up_EH", bias_up_EH, E, H, x),
      .bias_down = bias_of(op, "bias_down_ED", bias_down_ED, E, D, x),
      .pre = kept,
      .K = K,
      .E = E,
      .D = D,
      .F = F,
      .stride_xt = x.stride(0),
      .stride_packed = packed_EB.stride(0),
      .threads = num_threads,
      .cache = cpu::cache_bytes(),
      .gated = activation.gated,
      .interleaved = options.interleaved,
      .phi = activation.phi,
      .limit = limit,
      .alpha = options.activation == "swiglu_oai" ? float(options.alpha) : 1.f,
      .shift = activation.shift,
      .dtype = dtype,
  };
  const int64_t row_bytes = 4 * (D + aligned_columns(F));
  const int64_t pass =
      options.keep_pre ? T
                       : std::max<int64_t>(1, kMostScratch / std::max<int64_t>(1, K * row_bytes));
  for (int64_t begin = 0; begin < T; begin += pass) {
    const int64_t tokens = std::min(pass, T - begin);
    const DispatchCall plan =
        prepare_dispatch(tokens == T ? expert : rows_of(expert, begin, tokens), E);
    cpu::kernels().dispatch(plan.params, threads);
    params.x = static_cast<const char*>(x.const_data_ptr()) + begin * x.stride(0) * size_of(dtype);
    params.row = plan.params.row;
    params.token = plan.params.token;
    params.offset = plan.params.offset;
    params.weight = static_cast<const float*>(weight.const_data_ptr()) + begin * K;
    params.out = static_cast<char*>(out.mutable_data_ptr()) + begin * D * size_of(dtype);
    params.T = tokens;
    int64_t bytes = 0;
    params.scratch = nullptr;
    params.scratch_bytes = &bytes;
    cpu::kernels().expert_mlp(params, threads);
    const Scratch scratch(bytes);
    params.scratch = scratch.data();
    cpu::kernels().expert_mlp(params, threads);
    if (options.keep_pre) {  // rows of unused slots
      const int64_t used = plan.params.offset[E];
      std::fill_n(static_cast<char*>(pre.mutable_data_ptr()) + used * H * size_of(dtype),
                  (T * K - used) * H * size_of(dtype), char(0));
    }
  }
  return {out, pre};
}

inline void check_offsets(const char* op, const Tensor& offset, int64_t E, int64_t N) {
  check_dtype(op, "offset_E1", offset, ScalarType::Int);
  bool sound = offset.dim() == 1 && offset.size(0) == E + 1 && offset.stride(0) == 1;
  const int32_t* at = static_cast<const int32_t*>(offset.const_data_ptr());
  sound = sound && at[0] == 0 && at[E] <= N;
  for (int64_t e = 0; sound && e < E; ++e) sound = at[e] <= at[e + 1];
  if (sound) return;
  std::ostringstream text;
  for (int64_t i = 0; i < offset.numel(); ++i) text << (i ? ", " : "") << at[i];
  refuse(op, ": offset_E1 must ascend from 0 to at most N=", N, ", got [", text.str(), "]");
}

inline Tensor run_grouped_gemm(const Tensor& x_ND, const Tensor& packed_EB, const Tensor& offset_E1,
                               const std::optional<Tensor>& bias_EF, int64_t hidden,
                               int64_t num_threads, const cpu::Parallel& threads) {
  const char* op = "grouped_gemm";
  const DType dtype = float_dtype(op, "x_ND", x_ND);
  check_dim(op, "x_ND", x_ND, 2);
  check_dim(op, "packed_EB", packed_EB, 2);
  const int64_t N = x_ND.size(0), D = x_ND.size(1), E = packed_EB.size(0);
  check_packed(op, packed_EB, E, panel_bytes(hidden, D, false, dtype));
  const Tensor x = rows_contiguous(x_ND), offset = dense(offset_E1);
  check_offsets(op, offset, E, N);
  Tensor y = torch::stable::new_empty(x, {N, hidden});
  int64_t bytes = 0;
  GroupedGemmParams params = {
      .x = x.const_data_ptr(),
      .offset = static_cast<const int32_t*>(offset.const_data_ptr()),
      .w = static_cast<const char*>(packed_EB.const_data_ptr()),
      .bias = bias_of(op, "bias_EF", bias_EF, E, hidden, x),
      .y = y.mutable_data_ptr(),
      .scratch = nullptr,
      .scratch_bytes = &bytes,
      .N = N,
      .E = E,
      .D = D,
      .F = hidden,
      .stride_xn = x.stride(0),
      .stride_packed = packed_EB.stride(0),
      .threads = num_threads,
      .cache = cpu::cache_bytes(),
      .dtype = dtype,
  };
  cpu::kernels().grouped_gemm(params, threads);
  const Scratch scratch(bytes);
  params.scratch = scratch.data();
  cpu::kernels().grouped_gemm(params, threads);
  return y;
}

}  // namespace gose
