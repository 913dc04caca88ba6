// The CUDA ops as torch.ops.gose_native.<op>: they run on torch's current stream of the device of
// their first tensor and trust what only a synchronisation could check.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "bind_combine.h"
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

}  // namespace
}  // namespace gose

STABLE_TORCH_LIBRARY_IMPL(gose_native, CUDA, m) {
  m.impl("combine", TORCH_BOX(&gose::combine));
  m.impl("combine_backward", TORCH_BOX(&gose::combine_backward));
}
