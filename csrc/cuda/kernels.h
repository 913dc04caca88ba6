// Launchers of the CUDA kernels: they trust the params, queue work on `stream` and return the error
// of the launch. Nothing here waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace gose::cuda {

cudaError_t combine(const CombineParams& p, cudaStream_t stream);
cudaError_t combine_backward(const CombineBackwardParams& p, cudaStream_t stream);
cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream);
cudaError_t dispatch(const DispatchParams& p, cudaStream_t stream);
cudaError_t distill_loss(const DistillDeviceParams& p, cudaStream_t stream);
cudaError_t entropy(const EntropyParams& p, cudaStream_t stream);
cudaError_t entropy_backward(const EntropyBackwardParams& p, cudaStream_t stream);
cudaError_t masked_adam(const MaskedAdamParams& p, cudaStream_t stream);
cudaError_t masked_lion(const MaskedLionParams& p, cudaStream_t stream);
cudaError_t masked_sgd(const MaskedSgdParams& p, cudaStream_t stream);
cudaError_t masked_square_sum(const MaskedSquareSumParams& p, cudaStream_t stream);
cudaError_t quantize(const QuantizeParams& p, cudaStream_t stream);
cudaError_t route(const RouteDeviceParams& p, cudaStream_t stream);
cudaError_t route_backward(const RouteBackwardDeviceParams& p, cudaStream_t stream);

}  // namespace gose::cuda
