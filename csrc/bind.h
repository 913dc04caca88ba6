// What the bindings of every device share: argument checks that name op, argument, wanted and got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <memory>
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

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// A number as Python writes it: 1.0, not 1.
inline std::string real(double x) {
  std::ostringstream text;
  text << x;
  return std::isfinite(x) && x == std::floor(x) && std::fabs(x) < 1e5 ? text.str() + ".0"
                                                                      : text.str();
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

// The tensor itself where it is contiguous, else a copy: a trip through the dispatcher.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The tensor itself where its last dimension is contiguous, else a contiguous copy.
inline Tensor rows_contiguous(const Tensor& t) {
  const bool unit = t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1;
  return unit ? t : torch::stable::contiguous(t);
}

// A tensor on its way to the caller, who gets this very handle. A returned Tensor is copied and
// counted twice more: 0.1 us each.
struct HandedOver {
  AtenTensorHandle handle;
};

// An uninitialised contiguous tensor on the CPU.
class NewTensor {
 public:
  NewTensor(std::initializer_list<int64_t> sizes, ScalarType type) {
    const int64_t* size = sizes.begin();
    const int64_t stride[2] = {sizes.size() > 1 ? std::max<int64_t>(1, size[1]) : 1, 1};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        int64_t(sizes.size()), size, stride,
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
        aoti_torch_device_type_cpu(), 0, &handle));
    handle_.reset(handle);
  }

  void* data() const {
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_.get(), &data));
    return data;
  }

  HandedOver hand_over() { return {handle_.release()}; }
  Tensor tensor() { return Tensor(handle_.release()); }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

}  // namespace gose

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct FromImpl<gose::HandedOver> {
  static StableIValue call(const gose::HandedOver& value, uint64_t version, bool is_internal) {
    return FromImpl<AtenTensorHandle>::call(value.handle, version, is_internal);
  }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
