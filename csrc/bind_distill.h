// Checks and allocation of distill_loss on the CPU.
#pragma once

#include <optional>
#include <vector>

#include "bind_routing.h"

namespace gose {

struct DistillTensors {
  const Tensor &student_BC, &teacher, &label;
  const std::optional<Tensor>&weight_B, &task_weight_B, &teacher_id_BJ, &teacher_tail_B;
};

struct DistillOptions {
  double task_weight, tau, label_smoothing;
  const std::string &kl_reduction, &reduction;
};

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  if (!is_floating(t)) {
    refuse(op, ": ", name, " must be floating point, got ", dtype_name(t.scalar_type()));
  }
}

inline void check_per_sample(const char* op, const char* name, const std::optional<Tensor>& t,
                             int64_t B) {
  if (t && !(t->dim() == 1 && t->size(0) == B && is_floating(*t))) {
    refuse(op, ": ", name, " must be floating point of shape (", B, ",), got ",
           dtype_name(t->scalar_type()), " of shape ", shape_of(*t));
  }
}

inline void check_teacher(const char* op, const DistillTensors& in, int64_t B, int64_t C) {
  const Tensor& teacher = in.teacher;
  if (bool(in.teacher_id_BJ) != bool(in.teacher_tail_B)) {
    refuse(op, ": teacher_id_BJ and teacher_tail_B go together, got only ",
           in.teacher_id_BJ ? "teacher_id_BJ" : "teacher_tail_B");
  }
  if (!in.teacher_id_BJ) {
    if (teacher.dim() != 2 || teacher.size(0) != B || teacher.size(1) != C) {
      refuse(op, ": teacher must have the shape of student_BC (", B, ", ", C, "), got ",
             shape_of(teacher));
    }
    return;
  }
  if (teacher.dim() != 2 || teacher.size(0) != B || teacher.size(1) < 1 || teacher.size(1) > C) {
    refuse(op, ": teacher must have shape (", B, ", J) with J in [1, C=", C, "], got ",
           shape_of(teacher));
  }
  const Tensor& id = *in.teacher_id_BJ;
  if (sizes_of(id, id.dim()) != sizes_of(teacher, 2) || id.scalar_type() != ScalarType::Long) {
    refuse(op, ": teacher_id_BJ must be int64 of the shape of teacher ", shape_of(teacher),
           ", got ", dtype_name(id.scalar_type()), " of shape ", shape_of(id));
  }
  check_per_sample(op, "teacher_tail_B", in.teacher_tail_B, B);
}

inline void check_distill(const char* op, const DistillTensors& in, const DistillOptions& o) {
  check_floating(op, "student_BC", in.student_BC);
  check_floating(op, "teacher", in.teacher);
  if (in.student_BC.dim() != 2 || in.student_BC.size(1) < 1) {
    refuse(op, ": student_BC must have shape (B, C) with C >= 1, got ", shape_of(in.student_BC));
  }
  const int64_t B = in.student_BC.size(0), C = in.student_BC.size(1);
  check_teacher(op, in, B, C);
  const Tensor& label = in.label;
  const bool hard =
      label.dim() == 1 && label.size(0) == B && label.scalar_type() == ScalarType::Long;
  const bool soft =
      label.dim() == 2 && label.size(0) == B && label.size(1) == C && is_floating(label);
  if (!hard && !soft) {
    refuse(op, ": label must be int64 of shape (", B, ",) or floating point of shape (", B, ", ", C,
           "), got ", dtype_name(label.scalar_type()), " of shape ", shape_of(label));
  }
  check_per_sample(op, "weight_B", in.weight_B, B);
  check_per_sample(op, "task_weight_B", in.task_weight_B, B);
  if (!(o.task_weight >= 0 && o.task_weight <= 1)) {
    refuse(op, ": task_weight must be in [0, 1], got ", real(o.task_weight));
  }
  if (!(o.tau > 0)) refuse(op, ": tau must be positive, got ", real(o.tau));
  if (!(o.label_smoothing >= 0 && o.label_smoothing <= 1)) {
    refuse(op, ": label_smoothing must be in [0, 1], got ", real(o.label_smoothing));
  }
  if (o.kl_reduction != "batchmean" && o.kl_reduction != "numel") {
    refuse(op, ": kl_reduction must be batchmean or numel, got '", o.kl_reduction, "'");
  }
  if (o.reduction != "mean" && o.reduction != "none") {
    refuse(op, ": reduction must be mean or none, got '", o.reduction, "'");
  }
}

inline void check_values(const char* op, const std::vector<DistillBad>& bad, int64_t C) {
  DistillBad first = DistillBad::kNothing;
  for (const DistillBad b : bad) {
    if (b != DistillBad::kNothing && (first == DistillBad::kNothing || b < first)) first = b;
  }
  switch (first) {
    case DistillBad::kNothing: return;
    case DistillBad::kLabel: refuse(op, ": label must hold classes in [0, C=", C, ")");
    case DistillBad::kSoftLabel: refuse(op, ": label must hold no negative weight and no NaN");
    case DistillBad::kTaskWeight: refuse(op, ": task_weight_B must hold values in [0, 1]");
    case DistillBad::kId: refuse(op, ": teacher_id_BJ must hold classes in [0, C=", C, ")");
    case DistillBad::kSameId: refuse(op, ": teacher_id_BJ must hold distinct classes in every row");
    case DistillBad::kTail: refuse(op, ": teacher_tail_B must hold values in [0, 1]");
    case DistillBad::kMemory: throw std::runtime_error(std::string(op) + ": out of memory");
  }
}

// The tensor with contiguous rows, in a dtype that kernels read.
inline Tensor readable(const Tensor& t) {
  return rows_contiguous(
      t.scalar_type() == ScalarType::Double ? torch::stable::to(t, ScalarType::Float) : t);
}

inline Tensor floats(const Tensor& t) {
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
}

struct DistillResult {
  Tensor loss, grad;
};

// kernel: distill_loss of the level in use.
template <class Kernel>
inline DistillResult distill(const char* op, const DistillTensors& in, const DistillOptions& o,
                             bool with_grad, const Kernel& kernel) {
  check_distill(op, in, o);
  const DType dtype = float_dtype(op, "student_BC", in.student_BC);
  const int64_t B = in.student_BC.size(0), C = in.student_BC.size(1);
  const bool hard = in.label.dim() == 1, mean = o.reduction == "mean";
  const Tensor student = rows_contiguous(in.student_BC), teacher = readable(in.teacher);
  const Tensor label = hard ? torch::stable::contiguous(in.label) : readable(in.label);
  const auto given = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(floats(*t)) : std::nullopt;
  };
  const auto pointer = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  const std::optional<Tensor> weight = given(in.weight_B), task_weight = given(in.task_weight_B);
  const std::optional<Tensor> tail = given(in.teacher_tail_B);
  std::optional<Tensor> id;
  if (in.teacher_id_BJ) id = torch::stable::contiguous(*in.teacher_id_BJ);
  Tensor term = torch::stable::new_empty(student, {B}, ScalarType::Float);
  Tensor grad = with_grad ? on_huge_pages(torch::stable::new_empty(student, {B, C}),
                                          B * C * student.element_size())
                          : term;
  std::vector<DistillBad> bad(B, DistillBad::kNothing);
  kernel({
      .student = student.const_data_ptr(),
      .teacher = teacher.const_data_ptr(),
      .label = hard ? static_cast<const int64_t*>(label.const_data_ptr()) : nullptr,
      .soft = hard ? nullptr : label.const_data_ptr(),
      .weight = pointer(weight),
      .task_weight_B = pointer(task_weight),
      .id = id ? static_cast<const int64_t*>(id->const_data_ptr()) : nullptr,
      .tail = pointer(tail),
      .term = static_cast<float*>(term.mutable_data_ptr()),
      .grad = with_grad ? grad.mutable_data_ptr() : nullptr,
      .bad = bad.data(),
      .B = B,
      .C = C,
      .J = teacher.size(1),
      .stride_sb = student.stride(0),
      .stride_tb = teacher.stride(0),
      .stride_lb = label.stride(0),
      .task_weight = float(o.task_weight),
      .inverse_tau = float(1 / o.tau),
      .smoothing = float(o.label_smoothing),
      .kl_scale = float(o.tau * o.tau / (o.kl_reduction == "numel" ? double(C) : 1.0)),
      .grad_scale = mean && B > 0 ? 1.f / float(B) : 1.f,
      .dtype = dtype,
      .teacher_dtype = float_dtype(op, "teacher", teacher),
      .soft_dtype = hard ? DType::kFloat32 : float_dtype(op, "label", label),
  });
  check_values(op, bad, C);
  if (!mean) return {term, grad};
  double total = 0;
  const float* terms = static_cast<const float*>(term.const_data_ptr());
  for (int64_t n = 0; n < B; ++n) total += terms[n];
  Tensor loss = torch::stable::new_empty(student, {}, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = float(total / double(B > 0 ? B : 1));
  return {loss, grad};
}

}  // namespace gose
