// Checks and allocation of entropy, dispatch and route on the CPU.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "bind.h"
#include "scratch.h"

namespace gose {

inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < dims; ++i) sizes.push_back(t.size(i));
  return sizes;
}

// The tensor, just made and not yet written, on huge pages where Linux gives them on request: a
// fault for every 4 KB of a large output takes longer than the kernel that fills it.
inline Tensor on_huge_pages(Tensor fresh, int64_t bytes) {
  constexpr int64_t kLeast = 16 << 20;
  if (bytes >= kLeast) advise_huge_pages(fresh.mutable_data_ptr(), bytes);
  return fresh;
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
  const Tensor logits = dense(logits_BMC);
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
  const Tensor grad = dense(grad_BM);
  const Tensor logits = dense(logits_BMC);
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

// The plan of a counting sort by expert, in memory of the caller.
struct PlanMemory {
  int32_t *row, *token, *offset, *counts;  // [T, K], [N], [E1], plan_counts()
};

// 8192 slots cost about as much as waking a thread; E of them keep the counts below the slots.
inline int64_t plan_chunk(int64_t E) { return std::max<int64_t>(8192, E); }

// Slots and unused ones of every expert, for every chunk.
inline int64_t plan_counts(int64_t N, int64_t E) {
  return (N + plan_chunk(E) - 1) / plan_chunk(E) * (E + 1);
}

inline DispatchParams plan_params(const int32_t* expert, int64_t T, int64_t K, int64_t E,
                                  const PlanMemory& memory) {
  return {.expert = expert,
          .row = memory.row,
          .token = memory.token,
          .offset = memory.offset,
          .scratch = memory.counts,
          .T = T,
          .K = K,
          .E = E,
          .chunk = plan_chunk(E)};
}

// The ids as a contiguous int32 tensor, every one in [0, num_experts].
template <class Id>
inline Tensor checked_ids(const Tensor& expert_TK, int64_t num_experts) {
  const Tensor given = dense(expert_TK);
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

inline void check_dispatch(const Tensor& expert_TK, int64_t num_experts) {
  check_dim("dispatch", "expert_TK", expert_TK, 2);
  const ScalarType type = expert_TK.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long) {
    refuse("dispatch: expert_TK must be int32 or int64, got ", dtype_name(type));
  }
  if (num_experts < 0) refuse("dispatch: num_experts must be at least 0, got ", num_experts);
  if (expert_TK.numel() >= int64_t{1} << 31) {
    refuse("dispatch: expert_TK must have fewer than 2**31 slots, got ", expert_TK.numel());
  }
}

inline Tensor checked_experts(const Tensor& expert_TK, int64_t num_experts) {
  check_dispatch(expert_TK, num_experts);
  return expert_TK.scalar_type() == ScalarType::Int ? checked_ids<int32_t>(expert_TK, num_experts)
                                                    : checked_ids<int64_t>(expert_TK, num_experts);
}

struct DispatchCall {
  Tensor expert, row, token, offset;
  std::vector<int32_t> counts;
  DispatchParams params;
};

inline DispatchCall prepare_dispatch(const Tensor& expert_TK, int64_t num_experts) {
  DispatchCall call;
  call.expert = checked_experts(expert_TK, num_experts);
  const int64_t T = expert_TK.size(0), K = expert_TK.size(1);
  call.row = torch::stable::new_empty(call.expert, {T, K}, ScalarType::Int);
  call.token = torch::stable::new_empty(call.expert, {T * K}, ScalarType::Int);
  call.offset = torch::stable::new_empty(call.expert, {num_experts + 1}, ScalarType::Int);
  call.counts.resize(plan_counts(T * K, num_experts));
  call.params =
      plan_params(static_cast<const int32_t*>(call.expert.const_data_ptr()), T, K, num_experts,
                  {.row = static_cast<int32_t*>(call.row.mutable_data_ptr()),
                   .token = static_cast<int32_t*>(call.token.mutable_data_ptr()),
                   .offset = static_cast<int32_t*>(call.offset.mutable_data_ptr()),
                   .counts = call.counts.data()});
  return call;
}

}  // namespace gose
