// Checks of the masked optimizer steps and sums, and their lists as the kernels see them.
#pragma once

#include <algorithm>
#include <cmath>
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

inline bool is_packed(const Tensor& frozen) { return frozen.scalar_type() == ScalarType::Byte; }

// A mask of a step: bool or scores with sizes that divide those of the tensor, or packed bits.
inline void check_mask(const std::string& argument, const Tensor& frozen, const std::string& of,
                       const Tensor& tensor) {
  if (is_packed(frozen)) {
    const int64_t bytes = (tensor.numel() + 7) / 8;
    if (frozen.dim() != 1 || frozen.numel() != bytes) {
      refuse(argument, " of packed bits must have shape (", bytes, ",), got ", shape_of(frozen));
    }
    return;
  }
  if (frozen.scalar_type() != ScalarType::Bool && frozen.scalar_type() != ScalarType::Float) {
    refuse(argument, " must be bool, uint8 (packed bits) or float32 (scores), got ",
           dtype_name(frozen.scalar_type()));
  }
  bool fits = frozen.dim() <= tensor.dim();
  for (int64_t d = 1; fits && d <= frozen.dim(); ++d) {
    const int64_t own = frozen.size(frozen.dim() - d), size = tensor.size(tensor.dim() - d);
    fits = own == 1 || own == size || (own > 0 && size > 0 && size % own == 0);
  }
  if (!fits) {
    refuse(argument, " must have sizes that divide those of ", of, " ", shape_of(tensor), ", got ",
           shape_of(frozen));
  }
}

// A mask as kernels see it: value i / inner belongs to element i. One that varies along a dimension
// after one that it is repeated over (columns, blocks) is spread over the leading dimensions.
struct FlatMask {
  Tensor kept;                // keeps `value` alive
  std::vector<uint8_t> wide;  // or this does
  const uint8_t* value = nullptr;
  int64_t inner = 1;
  bool is_spread = false;
};

// Values of one index of each dimension before `d`, each written as often as it serves.
inline uint8_t* spread(const std::vector<int64_t>& own, const std::vector<int64_t>& size, size_t d,
                       int64_t value_bytes, const uint8_t*& from, uint8_t* out) {
  if (d + 1 == own.size()) {
    std::memcpy(out, from, own[d] * value_bytes);
    from += own[d] * value_bytes;
    return out + own[d] * value_bytes;
  }
  for (int64_t j = 0; j < own[d]; ++j) {
    uint8_t* const first = out;
    out = spread(own, size, d + 1, value_bytes, from, out);
    const int64_t bytes = out - first;
    for (int64_t repeat = size[d] / own[d]; repeat > 1; --repeat, out += bytes) {
      std::memcpy(out, first, bytes);
    }
  }
  return out;
}

// The same on the tensor's device: a copy of a broadcast view.
inline Tensor spread_there(const Tensor& mask, const std::vector<int64_t>& own,
                           const std::vector<int64_t>& size) {
  std::vector<int64_t> from, to;
  for (size_t d = 0; d < own.size(); ++d) {
    from.insert(from.end(), {own[d], 1});
    to.insert(to.end(), {own[d], d + 1 == own.size() ? 1 : size[d] / own[d]});
  }
  Tensor out = torch::stable::new_empty(mask, to, mask.scalar_type());
  torch::stable::copy_(out, torch::stable::view(mask, from));
  return out;
}

inline FlatMask flat_mask(const Tensor& frozen, const Tensor& tensor) {
  FlatMask out;
  out.kept = torch::stable::contiguous(frozen);
  out.value = static_cast<const uint8_t*>(out.kept.const_data_ptr());
  const int64_t dims = tensor.dim(), missing = dims - frozen.dim();
  if (is_packed(frozen) || tensor.numel() == 0) return out;
  std::vector<int64_t> own(dims, 1), size(dims);
  for (int64_t d = 0; d < dims; ++d) {
    size[d] = tensor.size(d);
    if (d >= missing) own[d] = frozen.size(d - missing);
  }
  while (!own.empty() && own.back() == 1) {
    out.inner *= size.back();
    own.pop_back();
    size.pop_back();
  }
  if (own.empty()) return out;
  out.inner *= size.back() / own.back();
  if (std::equal(own.begin(), own.end() - 1, size.begin())) return out;
  out.is_spread = true;
  if (frozen.is_cuda()) {
    out.kept = spread_there(out.kept, own, size);
    out.value = static_cast<const uint8_t*>(out.kept.const_data_ptr());
    return out;
  }
  const int64_t value_bytes = frozen.scalar_type() == ScalarType::Float ? 4 : 1;
  out.wide.resize(tensor.numel() / out.inner * value_bytes);
  const uint8_t* from = out.value;
  spread(own, size, 0, value_bytes, from, out.wide.data());
  out.value = out.wide.data();
  return out;
}

// The arguments that all steps share; gose_kernels/ops/masked_update.py has their contract.
struct UpdateArguments {
  const char* op;
  const Tensors &param, &grad, &state, &step, &master, &frozen, &row;
  const Tensor& lr;
  const std::optional<Tensor>& grad_scale;
  const std::vector<double>& threshold;
  const std::vector<int64_t>&seed, &start;
  int64_t draw;
};

// lr or grad_scale; whether it is float64.
inline bool check_scalar(const char* op, const char* name, const Tensor& t) {
  const bool narrow = t.scalar_type() == ScalarType::Float;
  if (t.dim() != 0 || !(narrow || t.scalar_type() == ScalarType::Double)) {
    refuse(op, ": ", name, " must be a float32 or float64 tensor of shape (), got ",
           dtype_name(t.scalar_type()), " of shape ", shape_of(t));
  }
  return !narrow;
}

inline double scalar_of(const char* op, const char* name, const Tensor& t) {
  const bool narrow = !check_scalar(op, name, t);
  return narrow ? double(*static_cast<const float*>(t.const_data_ptr()))
                : *static_cast<const double*>(t.const_data_ptr());
}

inline float scale_of(const UpdateArguments& a, bool maximize) {
  const float scale = a.grad_scale ? float(scalar_of(a.op, "grad_scale", *a.grad_scale)) : 1.f;
  return maximize ? -scale : scale;
}

// 1 - lr * weight_decay as torch computes it: in the dtype of lr, then rounded to float32.
inline float keep_of(const Tensor& lr, double value, double weight_decay) {
  if (weight_decay == 0) return 1.f;
  if (lr.scalar_type() == ScalarType::Double) return float(1 - value * weight_decay);
  const float product = float(value) * float(weight_decay);
  return 1.f - product;
}

inline std::string at_index(const char* name, size_t n) {
  std::ostringstream text;
  text << name << '[' << n << ']';
  return text.str();
}

// The shape that counts by mask have.
inline std::vector<int64_t> count_shape(const Tensor& frozen, const Tensor& param) {
  return is_packed(frozen) ? sizes_of(param, param.dim()) : sizes_of(frozen, frozen.dim());
}

inline void check_like(const char* op, const std::string& name, const Tensor& t, ScalarType type,
                       const std::vector<int64_t>& shape) {
  if (t.scalar_type() != type || sizes_of(t, t.dim()) != shape) {
    refuse(op, ": ", name, " must be ", dtype_name(type), " of shape ", shape_text(shape), ", got ",
           dtype_name(t.scalar_type()), " of shape ", shape_of(t));
  }
}

inline void check_thresholds(const char* op, const Tensors& frozen,
                             const std::vector<double>& threshold, size_t count) {
  bool scores = false;
  for (const Tensor& t : frozen) scores |= t.scalar_type() == ScalarType::Float;
  if (threshold.size() != count && (scores || !threshold.empty())) {
    refuse(op, ": threshold must have ", scores ? count : 0, " numbers, got ", threshold.size());
  }
}

inline void check_counts(const UpdateArguments& a, size_t num_states, bool counts) {
  const size_t count = a.param.size();
  const auto check = [&](const char* name, size_t got, size_t wanted, const char* what) {
    if (got != wanted) refuse(a.op, ": ", name, " must have ", wanted, what, ", got ", got);
  };
  const auto check_optional = [&](const char* name, size_t got, const char* what) {
    check(name, got, got == 0 ? 0 : count, what);
  };
  check("grad", a.grad.size(), count, " tensors");
  check("state", a.state.size(), num_states * count, " tensors");
  check("step", a.step.size(), counts ? count : 0, " tensors");
  check_optional("master", a.master.size(), " tensors");
  check_optional("frozen", a.frozen.size(), " tensors");
  check_optional("row", a.row.size(), " tensors");
  check_thresholds(a.op, a.frozen, a.threshold, count);
  check_optional("seed", a.seed.size(), " numbers");
  check_optional("start", a.start.size(), " numbers");
  if (!a.master.empty() && !a.seed.empty()) {
    refuse(a.op, ": seed must be empty where there are master copies");
  }
}

// Slots in [-1, slots).
inline void check_row(const char* op, size_t n, const Tensor& row, int64_t units, int64_t slots) {
  check_like(op, at_index("row", n), row, ScalarType::Int, {units});
  if (row.is_cuda()) return;  // trusted: looking would wait for the device
  const Tensor own = torch::stable::contiguous(row);
  const int32_t* slot = static_cast<const int32_t*>(own.const_data_ptr());
  int32_t lowest = -1, highest = -1;
  for (int64_t u = 0; u < units; ++u) {
    lowest = slot[u] < lowest ? slot[u] : lowest;
    highest = slot[u] > highest ? slot[u] : highest;
  }
  if (lowest < -1 || highest >= slots) {
    refuse(op, ": row[", n, "] must hold slots in [0, ", slots, ") or -1, got ",
           lowest < -1 ? lowest : highest);
  }
}

// Entry n of the masks, checked, into t.
inline FlatMask set_mask(const char* op, size_t n, const char* of, const Tensor& tensor,
                         const Tensor& frozen, UpdateTensor& t) {
  check_mask(std::string(op) + ": " + at_index("frozen", n), frozen, at_index(of, n), tensor);
  FlatMask mask = flat_mask(frozen, tensor);
  t.frozen = mask.value;
  t.inner = mask.inner;
  t.kind = is_packed(frozen)                           ? MaskKind::kBits
           : frozen.scalar_type() == ScalarType::Float ? MaskKind::kScores
                                                       : MaskKind::kBytes;
  return mask;
}

inline void check_update_dtype(const char* op, const char* name, size_t n, const Tensors& list) {
  const ScalarType type = list[n].scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16) {
    refuse(op, ": ", at_index(name, n), " must be float32, bfloat16 or float64, got ",
           dtype_name(type));
  }
  if (type != list[0].scalar_type()) {
    refuse(op, ": ", at_index(name, n), " must have the dtype of ", name, "[0], got ",
           dtype_name(type));
  }
}

// The lists of a call, checked. Tensors with gaps are updated as contiguous copies.
class UpdateCall {
 public:
  UpdateCall(const UpdateArguments& a, size_t num_states, bool counts) : a_(a) {
    check_counts(a, num_states, counts);
    const size_t count = a.param.size();
    for (size_t n = 0; n < count; ++n) add(n, num_states);
    grain_ = elements_ == 0 ? 1 : std::max<int64_t>(1, kUpdateChunk * chunks_ / elements_);
    std::vector<const void*> seen;
    for (const UpdateTensor& t : tensor_) {
      if (t.numel > 0) seen.push_back(t.param);
    }
    std::sort(seen.begin(), seen.end());
    repeats_ = std::adjacent_find(seen.begin(), seen.end()) != seen.end();
  }

  // run(list) for the whole call; a tensor that stands in it twice makes its steps one by one.
  template <class Run>
  void run(const Run& run, const UpdateScalars& scalar = {}) {
    const bool half = !a_.param.empty() && a_.param[0].scalar_type() == ScalarType::BFloat16;
    UpdateList list = {tensor_.data(),
                       int64_t(tensor_.size()),
                       grain_,
                       a_.draw,
                       half ? DType::kBFloat16 : DType::kFloat32,
                       half && !a_.seed.empty(),
                       scalar};
    if (!repeats_) {
      run(list);
    } else {
      list.count = list.grain = 1;
      for (UpdateTensor& t : tensor_) {
        t.end_chunk = (t.numel + kUpdateChunk - 1) / kUpdateChunk;
        list.tensor = &t;
        run(list);
      }
    }
    for (auto& [to, from] : copies_) torch::stable::copy_(to, from);
  }

 private:
  // Entry n of the lists.
  void add(size_t n, size_t num_states) {
    const char* op = a_.op;
    const Tensor& p = a_.param[n];
    const ScalarType type = p.scalar_type();
    check_update_dtype(op, "param", n, a_.param);
    const std::vector<int64_t> shape = sizes_of(p, p.dim());
    check_like(op, at_index("grad", n), a_.grad[n], type, shape);
    UpdateTensor t = {};
    t.numel = p.numel();
    t.inner = std::max<int64_t>(1, t.numel);
    t.param = writable(p);
    kept_.push_back(torch::stable::contiguous(a_.grad[n]));
    t.grad = kept_.back().const_data_ptr();
    std::vector<int64_t> mask_shape;
    bool wide = false;
    if (!a_.frozen.empty()) {
      masks_.push_back(set_mask(op, n, "param", p, a_.frozen[n], t));
      mask_shape = count_shape(a_.frozen[n], p);
      wide = masks_.back().is_spread;
    }
    if (!a_.threshold.empty()) t.threshold = float(a_.threshold[n]);
    std::vector<int64_t> state_shape = shape;
    if (!a_.row.empty() && a_.row[n].numel() > 0) {
      const Tensor& like = num_states > 0 ? a_.state[n] : a_.master.empty() ? p : a_.master[n];
      const int64_t slots = like.dim() == 2 ? like.size(0) : 0;
      check_row(op, n, a_.row[n], t.numel / std::max<int64_t>(1, t.inner), slots);
      kept_.push_back(torch::stable::contiguous(a_.row[n]));
      t.row = static_cast<const int32_t*>(kept_.back().const_data_ptr());
      state_shape = {slots, t.inner};
    }
    for (size_t s = 0; s < num_states; ++s) {
      const size_t at = s * a_.param.size() + n;
      check_like(op, at_index("state", at), a_.state[at], ScalarType::Float, state_shape);
      t.state[s] = static_cast<float*>(writable(a_.state[at]));
    }
    if (!a_.master.empty()) {
      check_like(op, at_index("master", n), a_.master[n], ScalarType::Float, state_shape);
      t.master = static_cast<float*>(writable(a_.master[n]));
    }
    if (!a_.step.empty()) {
      const Tensor& step = a_.step[n];
      const std::vector<int64_t> own = sizes_of(step, step.dim());
      if (step.scalar_type() != ScalarType::Float || (!own.empty() && own != mask_shape)) {
        refuse(op, ": step[", n, "] must be float32 of shape () or of its mask ",
               shape_text(mask_shape), ", got ", dtype_name(step.scalar_type()), " of shape ",
               shape_of(step));
      }
      t.step_by_mask = !a_.frozen.empty() && own == mask_shape;
      if (t.step_by_mask && wide) {
        refuse(op, ": step[", n, "] of the shape of a mask that is not one per expert, row or ",
               "element needs backend='torch'");
      }
      t.step = static_cast<float*>(writable(step));
      t.num_steps = step.numel();
    }
    if (!a_.seed.empty()) t.seed = a_.seed[n];
    if (!a_.start.empty()) t.start = a_.start[n];
    chunks_ += (t.numel + kUpdateChunk - 1) / kUpdateChunk;
    elements_ += t.numel;
    t.end_chunk = chunks_;
    tensor_.push_back(t);
  }

  void* writable(const Tensor& t) {
    Tensor own = torch::stable::contiguous(t);
    if (!t.is_contiguous()) copies_.emplace_back(t, own);
    kept_.push_back(own);
    return own.mutable_data_ptr();
  }

  const UpdateArguments& a_;
  std::vector<UpdateTensor> tensor_;
  std::vector<FlatMask> masks_;
  Tensors kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  int64_t grain_ = 1, chunks_ = 0, elements_ = 0;
  bool repeats_ = false;
};

// The lists of masked_square_sum, checked.
class SquareSumCall {
 public:
  SquareSumCall(const char* op, const Tensors& grad, const Tensors& frozen,
                const std::vector<double>& threshold) {
    if (!frozen.empty() && frozen.size() != grad.size()) {
      refuse(op, ": frozen must have ", grad.size(), " tensors, got ", frozen.size());
    }
    check_thresholds(op, frozen, threshold, grad.size());
    int64_t chunks = 0, elements = 0;
    for (size_t n = 0; n < grad.size(); ++n) {
      check_update_dtype(op, "grad", n, grad);
      UpdateTensor t = {};
      kept_.push_back(torch::stable::contiguous(grad[n]));
      t.grad = kept_.back().const_data_ptr();
      t.numel = grad[n].numel();
      t.inner = std::max<int64_t>(2, t.numel);
      if (!frozen.empty()) masks_.push_back(set_mask(op, n, "grad", grad[n], frozen[n], t));
      if (!threshold.empty()) t.threshold = float(threshold[n]);
      chunks += (t.numel + kUpdateChunk - 1) / kUpdateChunk;
      elements += t.numel;
      t.end_chunk = chunks;
      tensor_.push_back(t);
    }
    const int64_t grain =
        elements == 0 ? 1 : std::max<int64_t>(1, kUpdateChunk * chunks / elements);
    const bool half = !grad.empty() && grad[0].scalar_type() == ScalarType::BFloat16;
    list_ = {tensor_.data(),
             int64_t(tensor_.size()),
             4 * grain,
             0,
             half ? DType::kBFloat16 : DType::kFloat32,
             false};
  }

  int64_t chunks() const { return tensor_.empty() ? 0 : tensor_.back().end_chunk; }
  const UpdateList& list() const { return list_; }

 private:
  std::vector<UpdateTensor> tensor_;
  std::vector<FlatMask> masks_;
  Tensors kept_;
  UpdateList list_;
};

}  // namespace gose
