// What the bindings of every device share: argument checks that name op, argument, wanted and got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace gose {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python raises what follows "ValueError: " as a ValueError; other exceptions are RuntimeErrors.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "ValueError: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    default: return "another dtype";
  }
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  if (t.dim() != dim) {
    refuse(op, ": ", name, " must have ", dim, " dimensions, got shape ", shape_of(t));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type) {
    refuse(op, ": ", name, " must be ", dtype_name(type), ", got ", dtype_name(t.scalar_type()));
  }
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                         const Tensor& other) {
  if (t.is_cuda() != other.is_cuda() || t.get_device_index() != other.get_device_index()) {
    refuse(op, ": ", name, " must be on the device of ", other_name);
  }
}

inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      refuse(op, ": ", name, " must be float32, bfloat16 or float16, got ",
             dtype_name(t.scalar_type()));
  }
}

// The tensor itself where its last dimension is contiguous, else a contiguous copy.
inline Tensor rows_contiguous(const Tensor& t) {
  const bool unit = t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1;
  return unit ? t : torch::stable::contiguous(t);
}

}  // namespace gose
