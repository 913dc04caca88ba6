// Checks of the masked optimizer steps on the CPU, and their lists as the kernels see them.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "bind_routing.h"

namespace gose {

using Tensors = std::vector<Tensor>;

// A frozen mask that is bool and broadcasts to the shape of `of`.
inline void check_frozen(const std::string& argument, const Tensor& frozen, const std::string& of,
                         const Tensor& tensor) {
  if (frozen.scalar_type() != ScalarType::Bool) {
    refuse(argument, " must be bool, got ", dtype_name(frozen.scalar_type()));
  }
  bool fits = frozen.dim() <= tensor.dim();
  for (int64_t d = 1; fits && d <= frozen.dim(); ++d) {
    const int64_t own = frozen.size(frozen.dim() - d);
    fits = own == 1 || own == tensor.size(tensor.dim() - d);
  }
  if (!fits) {
    refuse(argument, " must broadcast to the shape of ", of, " ", shape_of(tensor), ", got ",
           shape_of(frozen));
  }
}

// A mask as kernels see it: value i / inner belongs to element i. One that varies along a dimension
// after one that it is repeated over (columns) is spread to the elements.
struct FlatMask {
  Tensor kept;                // keeps `value` alive
  std::vector<uint8_t> wide;  // or this does
  const uint8_t* value = nullptr;
  int64_t inner = 1;
};

inline FlatMask flat_mask(const Tensor& frozen, const Tensor& tensor) {
  FlatMask out;
  out.kept = torch::stable::contiguous(frozen);
  out.value = static_cast<const uint8_t*>(out.kept.const_data_ptr());
  const int64_t dims = tensor.dim(), missing = dims - frozen.dim();
  std::vector<int64_t> size(dims, 1);
  for (int64_t d = missing; d < dims; ++d) size[d] = frozen.size(d - missing);
  int64_t d = dims;
  while (d > 0 && size[d - 1] == 1) out.inner *= tensor.size(--d);
  bool leading = true;
  for (int64_t e = 0; e < d; ++e) leading &= size[e] == tensor.size(e);
  if (leading || tensor.numel() == 0) return out;
  std::vector<int64_t> stride(dims, 0), index(dims, 0);
  for (int64_t e = dims - 1, step = 1; e >= 0; --e) {
    stride[e] = size[e] == 1 ? 0 : step;
    step *= size[e];
  }
  out.wide.resize(tensor.numel());
  for (int64_t i = 0, at = 0; i < tensor.numel(); ++i) {
    out.wide[i] = out.value[at];
    for (int64_t e = dims - 1; e >= 0; --e) {
      at += stride[e];
      if (++index[e] < tensor.size(e)) break;
      at -= stride[e] * index[e];
      index[e] = 0;
    }
  }
  out.value = out.wide.data();
  out.inner = 1;
  return out;
}

// A list argument: its name, its tensors, whether the options use it.
struct UpdateState {
  const char* name;
  const Tensors& tensors;
  bool used;
};

// lr or grad_scale.
inline double scalar_of(const char* op, const char* name, const Tensor& t) {
  const bool narrow = t.scalar_type() == ScalarType::Float;
  if (t.dim() != 0 || !(narrow || t.scalar_type() == ScalarType::Double)) {
    refuse(op, ": ", name, " must be a float32 or float64 tensor of shape (), got ",
           dtype_name(t.scalar_type()), " of shape ", shape_of(t));
  }
  return narrow ? double(*static_cast<const float*>(t.const_data_ptr()))
                : *static_cast<const double*>(t.const_data_ptr());
}

inline float scale_of(const char* op, const std::optional<Tensor>& grad_scale, bool maximize) {
  const float scale = grad_scale ? float(scalar_of(op, "grad_scale", *grad_scale)) : 1.f;
  return maximize ? -scale : scale;
}

// 1 - lr * weight_decay as torch computes it: in the dtype of lr, then rounded to float32.
inline float keep_of(const Tensor& lr, double value, double weight_decay) {
  if (weight_decay == 0) return 1.f;
  if (lr.scalar_type() == ScalarType::Double) return float(1 - value * weight_decay);
  const float product = float(value) * float(weight_decay);
  return 1.f - product;
}

inline void check_update(const char* op, const Tensors& param, const Tensors& frozen,
                         const std::vector<UpdateState>& lists) {
  const size_t count = param.size();
  const auto check_count = [&](const char* name, size_t got, size_t wanted) {
    if (got != wanted) refuse(op, ": ", name, " must have ", wanted, " tensors, got ", got);
  };
  for (const UpdateState& list : lists) {
    check_count(list.name, list.tensors.size(), list.used ? count : 0);
  }
  check_count("frozen", frozen.size(), frozen.empty() ? 0 : count);
  for (size_t n = 0; n < count; ++n) {
    std::string at(1, '[');
    at.append(std::to_string(n)).append(1, ']');
    const Tensor& p = param[n];
    if (p.scalar_type() != ScalarType::Float) {
      refuse(op, ": param", at, " must be float32 or float64, got ", dtype_name(p.scalar_type()));
    }
    for (const UpdateState& list : lists) {
      if (!list.used) continue;
      const Tensor& t = list.tensors[n];
      if (t.scalar_type() != ScalarType::Float || sizes_of(t, t.dim()) != sizes_of(p, p.dim())) {
        refuse(op, ": ", list.name, at, " must be torch.float32 of shape ", shape_of(p), ", got ",
               dtype_name(t.scalar_type()), " of shape ", shape_of(t));
      }
    }
    if (!frozen.empty()) {
      check_frozen(std::string(op) + ": frozen" + at, frozen[n], "param" + at, p);
    }
  }
}

inline void check_step(const char* op, const Tensors& step, const Tensors& param,
                       const Tensors& frozen) {
  if (step.size() != param.size()) {
    refuse(op, ": step must have ", param.size(), " tensors, got ", step.size());
  }
  for (size_t n = 0; n < step.size(); ++n) {
    const Tensor& t = step[n];
    const std::vector<int64_t> shape = sizes_of(t, t.dim());
    const std::vector<int64_t> wanted =
        frozen.empty() ? std::vector<int64_t>{} : sizes_of(frozen[n], frozen[n].dim());
    if (t.scalar_type() != ScalarType::Float || (!shape.empty() && shape != wanted)) {
      refuse(op, ": step[", n, "] must be float32 of shape () or of its mask ", shape_text(wanted),
             ", got ", dtype_name(t.scalar_type()), " of shape ", shape_of(t));
    }
  }
}

// The lists of a call that was checked. Tensors with gaps are updated as contiguous copies.
class UpdateCall {
 public:
  // lists[0] is grad, the others are states.
  UpdateCall(const char* op, const Tensors& param, const std::vector<UpdateState>& lists,
             const Tensors& step, const Tensors& frozen) {
    masks_.reserve(param.size());
    std::vector<const void*> seen;
    int64_t chunks = 0, elements = 0;
    for (size_t n = 0; n < param.size(); ++n) {
      UpdateTensor t = {};
      t.param = writable(param[n]);
      const Tensor grad = torch::stable::contiguous(lists[0].tensors[n]);
      kept_.push_back(grad);
      t.grad = static_cast<const float*>(grad.const_data_ptr());
      for (size_t s = 1; s < lists.size(); ++s) {
        t.state[s - 1] = lists[s].used ? writable(lists[s].tensors[n]) : nullptr;
      }
      t.numel = param[n].numel();
      if (!frozen.empty()) {
        masks_.push_back(flat_mask(frozen[n], param[n]));
        t.frozen = masks_.back().value;
        t.inner = masks_.back().inner;
      }
      if (!step.empty()) {
        t.step_by_mask = !frozen.empty() && step[n].dim() == frozen[n].dim();
        if (t.step_by_mask && !masks_.back().wide.empty()) {
          refuse(op, ": step[", n, "] of the shape of a mask that is not one per expert, row or ",
                 "element needs backend='torch'");
        }
        t.step = writable(step[n]);
        t.num_steps = step[n].numel();
      }
      chunks += (t.numel + kUpdateChunk - 1) / kUpdateChunk;
      elements += t.numel;
      t.end_chunk = chunks;
      tensor_.push_back(t);
      if (t.numel > 0) seen.push_back(t.param);
    }
    grain_ = elements == 0 ? 1 : std::max<int64_t>(1, kUpdateChunk * chunks / elements);
    std::sort(seen.begin(), seen.end());
    repeats_ = std::adjacent_find(seen.begin(), seen.end()) != seen.end();
  }

  // run(list) for the whole call; a tensor that stands in it twice makes its steps one by one.
  template <class Run>
  void run(const Run& run) {
    if (!repeats_) {
      run(UpdateList{tensor_.data(), int64_t(tensor_.size()), grain_});
    } else {
      for (UpdateTensor& t : tensor_) {
        t.end_chunk = (t.numel + kUpdateChunk - 1) / kUpdateChunk;
        run(UpdateList{&t, 1, 1});
      }
    }
    for (auto& [to, from] : copies_) torch::stable::copy_(to, from);
  }

 private:
  float* writable(const Tensor& t) {
    Tensor own = torch::stable::contiguous(t);
    if (!t.is_contiguous()) copies_.emplace_back(t, own);
    kept_.push_back(own);
    return static_cast<float*>(own.mutable_data_ptr());
  }

  std::vector<UpdateTensor> tensor_;
  std::vector<FlatMask> masks_;
  Tensors kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  int64_t grain_ = 1;
  bool repeats_ = false;
};

}  // namespace gose
