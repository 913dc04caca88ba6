// Checks and allocation of packing, expert_mlp and grouped_gemm on the CPU.
//
// Python checks what users pass and packs it; what arrives here is refused where memory would be
// read that is not there, with fewer words.
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "bind_routing.h"
#include "cpu/kernels.h"
#include "cpu/quantized.h"
#include "scratch.h"

namespace gose {

inline int64_t aligned_columns(int64_t columns) {
  return (columns + cpu::kPanel - 1) / cpu::kPanel * cpu::kPanel;
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Bytes of one expert's panels for [columns, K] weights; with a gate, columns = 2 * units.
inline int64_t panel_bytes(int64_t columns, int64_t K, bool gated, DType dtype,
                           Weights weights = Weights::kPlain) {
  const int64_t padded = gated ? 2 * aligned_columns(columns / 2) : aligned_columns(columns);
  return padded / cpu::kPanel * cpu::bytes_of_panel(weights, aligned_columns(K), size_of(dtype));
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

// [E, columns, K] weights, or [E, K, columns] (transposed).
inline PackParams raw_params(const Tensor& w, bool transposed, bool gated, bool interleaved,
                             DType dtype) {
  const int column = transposed ? 2 : 1, k = transposed ? 1 : 2;
  return {.w = w.const_data_ptr(),
          .packed = nullptr,
          .E = w.size(0),
          .columns = w.size(column),
          .K = w.size(k),
          .stride_we = w.stride(0),
          .stride_wc = w.stride(column),
          .stride_wk = w.stride(k),
          .stride_packed = 0,
          .gated = gated,
          .interleaved = interleaved,
          .dtype = dtype};
}

// What the weights of a call were when their packed copy was made.
struct WeightsThen {
  const double* numbers;  // of every tensor: data pointer, dimensions, sizes, strides

  bool still(const Tensor& w) {
    const int64_t dims = w.dim();
    bool same = double(uintptr_t(w.const_data_ptr())) == numbers[0] && double(dims) == numbers[1];
    for (int64_t i = 0; same && i < dims; ++i) {
      same = double(w.size(i)) == numbers[2 + i] && double(w.stride(i)) == numbers[2 + dims + i];
    }
    numbers += 2 + 2 * dims;
    return same;
  }
};

// What mlp_numbers in gose_kernels/ops/mlp_call.py makes of the options, checked there: one
// tensor, kept from call to call. After them, for a call that is like an earlier one, the dtype of
// x and the weights of that one.
struct MlpOptions {
  Phi phi;
  bool gated, interleaved;
  float limit, alpha, shift;
  int64_t hidden;
  Weights weights;
  const double* then;  // or null

  MlpOptions(const char* op, const Tensor& packed) {
    constexpr int64_t kNumbers = 8;
    const int64_t count = packed.numel();
    if (packed.scalar_type() != ScalarType::Double || count < kNumbers || !packed.is_contiguous()) {
      refuse(op, ": options must be the tensor that gose_kernels.ops.mlp_call makes of them");
    }
    const double* x = static_cast<const double*>(packed.const_data_ptr());
    phi = Phi(int32_t(x[0])), gated = x[1] != 0, interleaved = x[2] != 0;
    limit = float(x[3]), alpha = float(x[4]), shift = float(x[5]);
    hidden = int64_t(x[6]), weights = Weights(int32_t(x[7]));
    then = count > kNumbers ? x + kNumbers : nullptr;
  }

  int64_t pre_columns() const { return gated ? 2 * hidden : hidden; }

  // Whether a copy that was packed of these weights, for x of this dtype, is still theirs.
  void check_then(const char* op, const Tensor& x,
                  std::initializer_list<const std::optional<Tensor>*> weights) const {
    if (then == nullptr) return;
    // Packed weights of close widths have equal sizes.
    bool same = double(int32_t(float_dtype(op, "x_TD", x))) == then[0] && x.dim() == 2 &&
                double(x.size(1)) == then[1];
    WeightsThen of = {then + 2};
    for (const std::optional<Tensor>* w : weights) same = same && (!*w || of.still(**w));
    if (!same) refuse(op, ": the weights changed");
  }
};

inline Bias bias_of(const char* op, const char* name, const std::optional<Tensor>& bias, int64_t E,
                    int64_t columns, const Tensor& x) {
  if (!bias) return {nullptr, 0, 0};
  if (bias->dim() != 2 || bias->size(0) != E || bias->size(1) != columns) {
    refuse(op, ": ", name, " must have shape (", E, ", ", columns, "), got ", shape_of(*bias));
  }
  check_dtype(op, name, *bias, x.scalar_type());
  return {bias->const_data_ptr(), bias->stride(0), bias->stride(1)};
}

// Tokens of one pass: scratch for more would exceed this.
constexpr int64_t kMostScratch = int64_t{256} << 20;

// What forward and backward of a call share, checked.
struct MlpCall {
  DType dtype;
  int64_t T, D, K = 0, E, F, H;
  MlpOptions options;
  Tensor x;
  std::optional<Tensor> weight, expert;  // of a caller; of a layer they are its own
  const float* weights = nullptr;        // [T, K]
  const int32_t* experts = nullptr;

  MlpCall(const char* op, const Tensor& x_TD, int64_t num_experts, const MlpOptions& options)
      : dtype(float_dtype(op, "x_TD", x_TD)), E(num_experts), F(options.hidden), options(options) {
    check_dim(op, "x_TD", x_TD, 2);
    if (F < 0) refuse(op, ": hidden must be at least 0, got ", F);
    if (!(options.limit > 0)) refuse(op, ": limit must be above 0, got ", options.limit);
    T = x_TD.size(0), D = x_TD.size(1), H = options.gated ? 2 * F : F;
    x = rows_contiguous(x_TD);
  }

  void route(const char* op, const Tensor& weight_TK, const Tensor& expert_TK) {
    check_dim(op, "weight_TK", weight_TK, 2);
    check_dim(op, "expert_TK", expert_TK, 2);
    check_dtype(op, "weight_TK", weight_TK, ScalarType::Float);
    K = weight_TK.size(1);
    if (weight_TK.size(0) != T || expert_TK.size(0) != T || expert_TK.size(1) != K) {
      refuse(op, ": weight_TK and expert_TK must have shape [T=", T, ", K], got ",
             shape_of(weight_TK), " and ", shape_of(expert_TK));
    }
    weight = dense(weight_TK), expert = checked_experts(expert_TK, E);
    weights = static_cast<const float*>(weight->const_data_ptr());
    experts = static_cast<const int32_t*>(expert->const_data_ptr());
  }

  // w_up_EHD and w_down_EDF, or w_up_EDH and w_down_EFD (transposed).
  void check_weights(const char* op, const Tensor& up, const Tensor& down, bool transposed) const {
    const bool fit = up.dim() == 3 && down.dim() == 3 && up.size(0) == E && down.size(0) == E &&
                     up.size(transposed ? 2 : 1) == H && up.size(transposed ? 1 : 2) == D &&
                     down.size(transposed ? 1 : 2) == F && down.size(transposed ? 2 : 1) == D;
    if (!fit) {
      refuse(op, ": weights must fit x_TD ", shape_of(x), " and each other, got ", shape_of(up),
             " and ", shape_of(down));
    }
    check_dtype(op, "w_up_EHD", up, x.scalar_type());
    check_dtype(op, "w_down_EDF", down, x.scalar_type());
  }
};

// The plan of tokens [begin, begin + tokens), in reused memory.
struct MlpPlan {
  Scratch memory;
  PlanMemory plan;

  MlpPlan(const MlpCall& call, int64_t begin, int64_t tokens, const cpu::Parallel& threads)
      : memory((2 * tokens * call.K + call.E + 1 + plan_counts(tokens * call.K, call.E)) *
               int64_t(sizeof(int32_t))) {
    const int64_t slots = tokens * call.K;
    int32_t* row = reinterpret_cast<int32_t*>(memory.data());
    plan = {row, row + slots, row + 2 * slots, row + 2 * slots + call.E + 1};
    const int32_t* ids = call.experts + begin * call.K;
    cpu::kernels().dispatch(plan_params(ids, tokens, call.K, call.E, plan), threads);
  }
};

// Runs a kernel that first says how much scratch it needs.
template <class Params>
inline void run_with_scratch(void (*kernel)(const Params&, const cpu::Parallel&), Params& params,
                             const cpu::Parallel& threads) {
  int64_t bytes = 0;
  params.scratch = nullptr;
  params.scratch_bytes = &bytes;
  kernel(params, threads);
  const Scratch scratch(bytes);
  params.scratch = scratch.data();
  kernel(params, threads);
}

inline char* at_row(const Tensor& t, int64_t row, int64_t size) {
  return static_cast<char*>(t.mutable_data_ptr()) + row * t.stride(0) * size;
}

// The weights of a call: packed_EB, or the weights as they are, packed while they are used.
struct MlpWeights {
  const Tensor* packed;
  const Tensor* up;
  const Tensor* down;
  bool transposed;
};

// out_TD, and pre_NH where it is wanted.
inline std::pair<NewTensor, std::optional<NewTensor>> run_expert_mlp(
    const MlpCall& call, const MlpWeights& weights, const std::optional<Tensor>& bias_up_EH,
    const std::optional<Tensor>& bias_down_ED, bool keep_pre, int64_t num_threads,
    const cpu::Parallel& threads) {
  const char* op = "expert_mlp";
  const MlpOptions& options = call.options;
  const int64_t size = size_of(call.dtype),
                up_bytes = panel_bytes(call.H, call.D, options.gated, call.dtype, options.weights);
  NewTensor out({call.T, call.D}, call.x.scalar_type());
  std::optional<NewTensor> pre;
  if (keep_pre) {
    pre.emplace(std::initializer_list<int64_t>{call.T * call.K, call.H}, call.x.scalar_type());
  }
  void* kept = pre ? pre->data() : nullptr;
  ExpertMlpParams params = {
      .weight = nullptr,
      .up = nullptr,
      .down = nullptr,
      .bias_up = bias_of(op, "bias_up_EH", bias_up_EH, call.E, call.H, call.x),
      .bias_down = bias_of(op, "bias_down_ED", bias_down_ED, call.E, call.D, call.x),
      .pre = kept,
      .K = call.K,
      .E = call.E,
      .D = call.D,
      .F = call.F,
      .stride_xt = call.x.stride(0),
      .stride_packed = 0,
      .threads = num_threads,
      .cache = cpu::cache_bytes(),
      .gated = options.gated,
      .interleaved = options.interleaved,
      .phi = options.phi,
      .limit = options.limit,
      .alpha = options.alpha,
      .shift = options.shift,
      .dtype = call.dtype,
      .weights = options.weights,
  };
  if (weights.packed != nullptr) {
    check_dim(op, "packed_EB", *weights.packed, 2);
    check_packed(op, *weights.packed, call.E,
                 up_bytes + panel_bytes(call.D, call.F, false, call.dtype, options.weights));
    params.up = static_cast<const char*>(weights.packed->const_data_ptr());
    params.down = params.up + up_bytes;
    params.stride_packed = weights.packed->stride(0);
  } else {
    call.check_weights(op, *weights.up, *weights.down, weights.transposed);
    params.raw_up =
        raw_params(*weights.up, weights.transposed, options.gated, options.interleaved, call.dtype);
    params.raw_down = raw_params(*weights.down, weights.transposed, false, false, call.dtype);
  }
  const int64_t token_bytes = std::max<int64_t>(1, call.K * 4 * (call.D + aligned_columns(call.F)));
  const int64_t pass = keep_pre ? call.T : std::max<int64_t>(1, kMostScratch / token_bytes);
  for (int64_t begin = 0; begin < call.T; begin += pass) {
    const int64_t tokens = std::min(pass, call.T - begin);
    const MlpPlan plan(call, begin, tokens, threads);
    params.x = at_row(call.x, begin, size);
    params.row = plan.plan.row;
    params.token = plan.plan.token;
    params.offset = plan.plan.offset;
    params.weight = call.weights + begin * call.K;
    params.out = static_cast<char*>(out.data()) + begin * call.D * size;
    params.T = tokens;
    run_with_scratch(cpu::kernels().expert_mlp, params, threads);
    if (keep_pre) {  // rows of unused slots
      const int64_t row_bytes = call.H * size, used = plan.plan.offset[call.E];
      std::fill_n(static_cast<char*>(kept) + used * row_bytes, (call.T * call.K - used) * row_bytes,
                  char(0));
    }
  }
  return {std::move(out), std::move(pre)};
}

// A dense bool mask of the given shape as bytes, or null; `kept` holds the tensor.
inline const uint8_t* mask_of(const char* op, const char* name, const std::optional<Tensor>& mask,
                              const std::vector<int64_t>& shape, Tensor& kept) {
  if (!mask) return nullptr;
  if (mask->scalar_type() != ScalarType::Bool || sizes_of(*mask, mask->dim()) != shape) {
    refuse(op, ": ", name, " must be bool of shape ", shape_text(shape), ", got ",
           dtype_name(mask->scalar_type()), " of shape ", shape_of(*mask));
  }
  kept = dense(*mask);
  return static_cast<const uint8_t*>(kept.const_data_ptr());
}

inline void check_gradient(const char* op, const char* name, const std::optional<Tensor>& grad,
                           const Tensor& like) {
  if (!grad) return;
  if (sizes_of(*grad, grad->dim()) != sizes_of(like, like.dim()) || !grad->is_contiguous()) {
    refuse(op, ": ", name, " must be contiguous of shape ", shape_of(like), ", got ",
           shape_of(*grad));
  }
  check_dtype(op, name, *grad, like.scalar_type());
}

struct MlpGradients {
  std::optional<Tensor> up, down;  // written where given
  bool need_x, need_weight, need_bias_up, need_bias_down;
  bool add;  // up and down, to what is there
};

// Gradients of x, weight, bias_up and bias_down, [0] where they are not needed.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> run_expert_mlp_backward(
    const MlpCall& call, const Tensor& w_up, const Tensor& w_down, bool transposed,
    const std::optional<Tensor>& bias_down_ED, const std::optional<Tensor>& frozen_E,
    const std::optional<Tensor>& frozen_EF, const Tensor& pre_NH, const Tensor& grad_TD,
    const MlpGradients& wanted, int64_t num_threads, const cpu::Parallel& threads) {
  const char* op = "expert_mlp_backward";
  const MlpOptions& options = call.options;
  call.check_weights(op, w_up, w_down, transposed);
  check_gradient(op, "grad_up", wanted.up, w_up);
  check_gradient(op, "grad_down", wanted.down, w_down);
  check_dim(op, "pre_NH", pre_NH, 2);
  check_dim(op, "grad_TD", grad_TD, 2);
  check_dtype(op, "pre_NH", pre_NH, call.x.scalar_type());
  check_dtype(op, "grad_TD", grad_TD, call.x.scalar_type());
  if (pre_NH.size(0) != call.T * call.K || pre_NH.size(1) != call.H) {
    refuse(op, ": pre_NH must have shape (", call.T * call.K, ", ", call.H, "), got ",
           shape_of(pre_NH));
  }
  if (grad_TD.size(0) != call.T || grad_TD.size(1) != call.D) {
    refuse(op, ": grad_TD must have the shape of x_TD ", shape_of(call.x), ", got ",
           shape_of(grad_TD));
  }
  const Tensor pre = dense(pre_NH), grad = rows_contiguous(grad_TD);
  Tensor masks[2];
  const auto made = [&](bool needed, const Tensor& like, int64_t rows, int64_t columns) {
    return needed ? torch::stable::new_empty(like, {rows, columns})
                  : torch::stable::new_empty(like, {0});
  };
  Tensor grad_x = made(wanted.need_x, call.x, call.T, call.D);
  Tensor grad_weight = made(wanted.need_weight, *call.weight, call.T, call.K);
  Tensor grad_bias_up = made(wanted.need_bias_up, call.x, call.E, call.H);
  Tensor grad_bias_down = made(wanted.need_bias_down, call.x, call.E, call.D);
  const auto data = [](bool needed, const Tensor& t) {
    return needed ? t.mutable_data_ptr() : nullptr;
  };
  const MlpPlan plan(call, 0, call.T, threads);
  ExpertMlpBackwardParams params = {
      .x = call.x.const_data_ptr(),
      .grad = grad.const_data_ptr(),
      .pre = pre.const_data_ptr(),
      .row = plan.plan.row,
      .token = plan.plan.token,
      .offset = plan.plan.offset,
      .weight = call.weights,
      .raw_up = raw_params(w_up, !transposed, false, false, call.dtype),
      .raw_down = raw_params(w_down, !transposed, false, false, call.dtype),
      .bias_down = bias_of(op, "bias_down_ED", bias_down_ED, call.E, call.D, call.x),
      .frozen_e = mask_of(op, "frozen_E", frozen_E, {call.E}, masks[0]),
      .frozen_ef = mask_of(op, "frozen_EF", frozen_EF, {call.E, call.F}, masks[1]),
      .grad_x = data(wanted.need_x, grad_x),
      .grad_weight = static_cast<float*>(data(wanted.need_weight, grad_weight)),
      .grad_up = {wanted.up ? wanted.up->mutable_data_ptr() : nullptr, transposed ? call.D : call.H,
                  transposed ? call.H : call.D, wanted.add},
      .grad_down = {wanted.down ? wanted.down->mutable_data_ptr() : nullptr,
                    transposed ? call.F : call.D, transposed ? call.D : call.F, wanted.add},
      .grad_bias_up = data(wanted.need_bias_up, grad_bias_up),
      .grad_bias_down = data(wanted.need_bias_down, grad_bias_down),
      .scratch = nullptr,
      .scratch_bytes = nullptr,
      .T = call.T,
      .K = call.K,
      .E = call.E,
      .D = call.D,
      .F = call.F,
      .stride_xt = call.x.stride(0),
      .stride_gt = grad.stride(0),
      .threads = num_threads,
      .cache = cpu::cache_bytes(),
      .gated = options.gated,
      .interleaved = options.interleaved,
      .transposed = transposed,
      .phi = options.phi,
      .limit = options.limit,
      .alpha = options.alpha,
      .shift = options.shift,
      .dtype = call.dtype,
  };
  run_with_scratch(cpu::kernels().expert_mlp_backward, params, threads);
  return {grad_x, grad_weight, grad_bias_up, grad_bias_down};
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

// y_NF from packed_EB, or from w_EFD (w_EDF, transposed) as it is.
inline Tensor run_grouped_gemm(const Tensor& x_ND, const MlpWeights& weights,
                               const Tensor& offset_E1, const std::optional<Tensor>& bias_EF,
                               int64_t hidden, int64_t num_threads, const cpu::Parallel& threads) {
  const char* op = "grouped_gemm";
  const DType dtype = float_dtype(op, "x_ND", x_ND);
  check_dim(op, "x_ND", x_ND, 2);
  const Tensor& given = weights.packed != nullptr ? *weights.packed : *weights.up;
  const int64_t N = x_ND.size(0), D = x_ND.size(1), E = given.size(0);
  const Tensor x = rows_contiguous(x_ND), offset = dense(offset_E1);
  check_offsets(op, offset, E, N);
  Tensor y = torch::stable::new_empty(x, {N, hidden});
  GroupedGemmParams params = {
      .x = x.const_data_ptr(),
      .offset = static_cast<const int32_t*>(offset.const_data_ptr()),
      .w = nullptr,
      .raw = {},
      .bias = bias_of(op, "bias_EF", bias_EF, E, hidden, x),
      .y = y.mutable_data_ptr(),
      .scratch = nullptr,
      .scratch_bytes = nullptr,
      .N = N,
      .E = E,
      .D = D,
      .F = hidden,
      .stride_xn = x.stride(0),
      .stride_packed = 0,
      .threads = num_threads,
      .cache = cpu::cache_bytes(),
      .dtype = dtype,
      .dtype_w = dtype,
      .dtype_y = dtype,
  };
  if (weights.packed != nullptr) {
    check_dim(op, "packed_EB", given, 2);
    check_packed(op, given, E, panel_bytes(hidden, D, false, dtype));
    params.w = static_cast<const char*>(given.const_data_ptr());
    params.stride_packed = given.stride(0);
  } else {
    check_dim(op, "w_EFD", given, 3);
    check_dtype(op, "w_EFD", given, x.scalar_type());
    if (given.size(weights.transposed ? 2 : 1) != hidden ||
        given.size(weights.transposed ? 1 : 2) != D) {
      refuse(op, ": w_EFD must fit x_ND ", shape_of(x), ", got ", shape_of(given));
    }
    params.raw = raw_params(given, weights.transposed, false, false, dtype);
  }
  run_with_scratch(cpu::kernels().grouped_gemm, params, threads);
  return y;
}

// Gradient of the bias ([0] without one); that of the weights goes to grad_w.
inline Tensor run_grouped_gemm_backward(const Tensor& grad_NF, const Tensor& x_ND,
                                        const Tensor& offset_E1, const Tensor& grad_w,
                                        bool transposed, bool bias, bool add, int64_t num_threads,
                                        const cpu::Parallel& threads) {
  const char* op = "grouped_gemm_backward";
  const DType dtype = float_dtype(op, "grad_NF", grad_NF);
  check_dim(op, "grad_NF", grad_NF, 2);
  check_dim(op, "x_ND", x_ND, 2);
  check_dim(op, "grad_w", grad_w, 3);
  check_dtype(op, "x_ND", x_ND, grad_NF.scalar_type());
  check_dtype(op, "grad_w", grad_w, grad_NF.scalar_type());
  const Tensor grad = rows_contiguous(grad_NF), x = rows_contiguous(x_ND);
  const Tensor offset = dense(offset_E1);
  const int64_t N = grad.size(0), E = grad_w.size(0), F = grad.size(1), D = x.size(1);
  const int64_t M = transposed ? D : F, C = transposed ? F : D;
  if (x.size(0) != N || grad_w.size(1) != M || grad_w.size(2) != C || !grad_w.is_contiguous()) {
    refuse(op, ": grad_w must be contiguous of shape (", E, ", ", M, ", ", C, "), got ",
           shape_of(grad_w));
  }
  check_offsets(op, offset, E, N);
  Tensor grad_bias =
      bias ? torch::stable::new_empty(grad, {E, F}) : torch::stable::new_empty(grad, {0});
  GroupedGemmBackwardParams params = {
      .grad = grad.const_data_ptr(),
      .x = x.const_data_ptr(),
      .offset = static_cast<const int32_t*>(offset.const_data_ptr()),
      .grad_w = {grad_w.mutable_data_ptr(), M, C, add},
      .grad_bias = bias ? grad_bias.mutable_data_ptr() : nullptr,
      .scratch = nullptr,
      .scratch_bytes = nullptr,
      .N = N,
      .E = E,
      .D = D,
      .F = F,
      .stride_gn = grad.stride(0),
      .stride_xn = x.stride(0),
      .threads = num_threads,
      .cache = cpu::cache_bytes(),
      .transposed = transposed,
      .dtype = dtype,
  };
  run_with_scratch(cpu::kernels().grouped_gemm_backward, params, threads);
  return grad_bias;
}

}  // namespace gose
