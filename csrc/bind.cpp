// The CPU ops as torch.ops.gose_native.<op>: checks, allocation, threads. With bind_cuda.cpp the
// only torch-aware C++, on torch's stable ABI: one library serves torch >= 2.11 and every Python.
#include "bind.h"

#include <vector>

#include "cpu/kernels.h"

namespace gose {
namespace {

const cpu::Parallel kTorchThreads = {
    [](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
      if (count > 0) STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
    }};

void check_combine(const char* op, const Tensor& y, const Tensor& weight, const Tensor& row) {
  check_dim(op, "y_ND", y, 2);
  check_dim(op, "weight_TK", weight, 2);
  if (row.dim() != 2 || row.size(0) != weight.size(0) || row.size(1) != weight.size(1)) {
    refuse(op, ": row_TK must have the shape of weight_TK ", shape_of(weight), ", got ",
           shape_of(row));
  }
  check_dtype(op, "row_TK", row, ScalarType::Int);
  if (weight.scalar_type() != ScalarType::Float) {
    refuse(op, ": weight_TK must be torch.float32 for y_ND of ", dtype_name(y.scalar_type()),
           ", got ", dtype_name(weight.scalar_type()));
  }
}

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
  check_combine("combine", y_ND, weight_TK, row_TK);
  const Tensor y = rows_contiguous(y_ND);
  const Tensor weight = torch::stable::contiguous(weight_TK);
  const Tensor row = torch::stable::contiguous(row_TK);
  check_rows("combine", row, y.size(0), false);
  Tensor out = torch::stable::new_empty(y, {weight.size(0), y.size(1)});
  const CombineParams p = {
      .y = y.const_data_ptr(),
      .weight = static_cast<const float*>(weight.const_data_ptr()),
      .row = static_cast<const int32_t*>(row.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .T = weight.size(0),
      .D = y.size(1),
      .K = weight.size(1),
      .stride_yn = y.stride(0),
      .dtype = float_dtype("combine", "y_ND", y),
  };
  cpu::kernels().combine(p, kTorchThreads);
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_TD, Tensor y_ND, Tensor weight_TK,
                                            Tensor row_TK) {
  const char* op = "combine_backward";
  check_combine(op, y_ND, weight_TK, row_TK);
  check_dtype(op, "grad_TD", grad_TD, y_ND.scalar_type());
  if (grad_TD.dim() != 2 || grad_TD.size(0) != weight_TK.size(0) ||
      grad_TD.size(1) != y_ND.size(1)) {
    refuse(op, ": grad_TD must have shape (", weight_TK.size(0), ", ", y_ND.size(1), "), got ",
           shape_of(grad_TD));
  }
  const Tensor grad = rows_contiguous(grad_TD);
  const Tensor y = rows_contiguous(y_ND);
  const Tensor weight = torch::stable::contiguous(weight_TK);
  const Tensor row = torch::stable::contiguous(row_TK);
  check_rows(op, row, y.size(0), true);
  Tensor grad_y = torch::stable::new_zeros(y, {y.size(0), y.size(1)});
  Tensor grad_weight = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  const CombineBackwardParams p = {
      .grad = grad.const_data_ptr(),
      .y = y.const_data_ptr(),
      .weight = static_cast<const float*>(weight.const_data_ptr()),
      .row = static_cast<const int32_t*>(row.const_data_ptr()),
      .grad_y = grad_y.mutable_data_ptr(),
      .grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr()),
      .T = weight.size(0),
      .D = y.size(1),
      .K = weight.size(1),
      .stride_gt = grad.stride(0),
      .stride_yn = y.stride(0),
      .dtype = float_dtype(op, "y_ND", y),
  };
  cpu::kernels().combine_backward(p, kTorchThreads);
  return {grad_y, grad_weight};
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
  m.def("cpu_levels() -> str");
  m.def("cpu_level() -> str");
  m.def("built_with_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gose_native, CPU, m) {
  m.impl("combine", TORCH_BOX(&gose::combine));
  m.impl("combine_backward", TORCH_BOX(&gose::combine_backward));
}

STABLE_TORCH_LIBRARY_IMPL(gose_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_levels", TORCH_BOX(&gose::cpu_levels));
  m.impl("cpu_level", TORCH_BOX(&gose::cpu_level));
  m.impl("built_with_cuda", TORCH_BOX(&gose::built_with_cuda));
}
