// Checks and allocation of entropy, dispatch and route on the CPU.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "bind.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gose {

inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < dims; ++i) sizes.push_back(t.size(i));
  return sizes;
}

// The tensor, just made and not yet written, on huge pages where Linux gives them on request: a
// fault for every 4 KB of a large output takes longer than the kernel that fills it.
inline Tensor on_huge_pages(Tensor fresh, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20, kLeast = 16 << 20;
  if (bytes < kLeast) return fresh;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  stop = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);  // a wish: may be refused
#else
  (void)bytes;
#endif
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

}  // namespace gose
