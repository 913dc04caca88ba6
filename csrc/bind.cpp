// The CPU ops as torch.ops.gose_native.<op>: checks, allocation, threads. With bind_cuda.cpp the
// only torch-aware C++, on torch's stable ABI: one library serves torch >= 2.11 and every Python.
#include "bind_combine.h"

#include <vector>

#include "cpu/kernels.h"

namespace gose {
namespace {

const cpu::Parallel kTorchThreads = {
    [](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
      if (count > 0) STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
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
