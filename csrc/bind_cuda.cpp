// The CUDA ops as torch.ops.gose_native.<op>: they run on torch's current stream of the device of
// their first tensor and trust what only a synchronisation could check.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "bind_combine.h"
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

}  // namespace
}  // namespace gose

STABLE_TORCH_LIBRARY_IMPL(gose_native, CUDA, m) {
  m.impl("combine", TORCH_BOX(&gose::combine));
  m.impl("combine_backward", TORCH_BOX(&gose::combine_backward));
  m.impl("dispatch", TORCH_BOX(&gose::dispatch));
  m.impl("entropy", TORCH_BOX(&gose::entropy));
  m.impl("entropy_backward", TORCH_BOX(&gose::entropy_backward));
}
