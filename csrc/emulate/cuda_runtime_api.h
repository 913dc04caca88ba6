// What csrc/cuda uses of the CUDA runtime, for g++: tests only. A launch runs on the CPU.
#pragma once

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;

constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
