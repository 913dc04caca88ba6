// Checks and allocation of distill_loss.
#pragma once

#include <optional>
#include <vector>

#include "bind_routing.h"

// The arguments of both ops, and what the functions below take of them.
#define GOSE_DISTILL_ARGUMENTS                                                     \
  Tensor student_BC, Tensor teacher, Tensor label, std::optional<Tensor> weight_B, \
      std::optional<Tensor> task_weight_B, std::optional<Tensor> teacher_id_BJ,    \
      std::optional<Tensor> teacher_tail_B, double task_weight, double tau,        \
      double label_smoothing, std::string kl_reduction, std::string reduction
#define GOSE_DISTILL_CALL                                                                 \
  {student_BC, teacher, label, weight_B, task_weight_B, teacher_id_BJ, teacher_tail_B}, { \
    task_weight, tau, label_smoothing, kl_reduction, reduction                            \
  }

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

// A checked call as the kernels read it; params without grad and bad.
struct DistillSource {
  Tensor student, teacher, label;
  std::optional<Tensor> weight, task_weight, id, tail;
  Tensor term;
  DistillParams params;
};

inline DistillSource prepare_distill(const char* op, const DistillTensors& in,
                                     const DistillOptions& o) {
  check_distill(op, in, o);
  const DType dtype = float_dtype(op, "student_BC", in.student_BC);
  const int64_t B = in.student_BC.size(0), C = in.student_BC.size(1);
  const bool hard = in.label.dim() == 1;
  const auto given = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(floats(*t)) : std::nullopt;
  };
  const auto pointer = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  DistillSource s;
  s.student = rows_contiguous(in.student_BC);
  s.teacher = readable(in.teacher);
  s.label = hard ? torch::stable::contiguous(in.label) : readable(in.label);
  s.weight = given(in.weight_B);
  s.task_weight = given(in.task_weight_B);
  s.tail = given(in.teacher_tail_B);
  if (in.teacher_id_BJ) s.id = torch::stable::contiguous(*in.teacher_id_BJ);
  s.term = torch::stable::new_empty(s.student, {B}, ScalarType::Float);
  s.params = {
      .student = s.student.const_data_ptr(),
      .teacher = s.teacher.const_data_ptr(),
      .label = hard ? static_cast<const int64_t*>(s.label.const_data_ptr()) : nullptr,
      .soft = hard ? nullptr : s.label.const_data_ptr(),
      .weight = pointer(s.weight),
      .task_weight_B = pointer(s.task_weight),
      .id = s.id ? static_cast<const int64_t*>(s.id->const_data_ptr()) : nullptr,
      .tail = pointer(s.tail),
      .term = static_cast<float*>(s.term.mutable_data_ptr()),
      .grad = nullptr,
      .bad = nullptr,
      .B = B,
      .C = C,
      .J = s.teacher.size(1),
      .stride_sb = s.student.stride(0),
      .stride_tb = s.teacher.stride(0),
      .stride_lb = s.label.stride(0),
      .task_weight = float(o.task_weight),
      .inverse_tau = float(1 / o.tau),
      .smoothing = float(o.label_smoothing),
      .kl_scale = float(o.tau * o.tau / (o.kl_reduction == "numel" ? double(C) : 1.0)),
      .grad_scale = o.reduction == "mean" && B > 0 ? 1.f / float(B) : 1.f,
      .dtype = dtype,
      .teacher_dtype = float_dtype(op, "teacher", s.teacher),
      .soft_dtype = hard ? DType::kFloat32 : float_dtype(op, "label", s.label),
  };
  return s;
}

struct DistillResult {
  Tensor loss, grad;
};

// kernel: distill_loss of the level in use.
template <class Kernel>
inline DistillResult distill(const char* op, const DistillTensors& in, const DistillOptions& o,
                             bool with_grad, const Kernel& kernel) {
  DistillSource s = prepare_distill(op, in, o);
  const int64_t B = s.params.B, C = s.params.C;
  Tensor grad = s.term;
  if (with_grad) {
    grad = on_huge_pages(torch::stable::new_empty(s.student, {B, C}),
                         B * C * s.student.element_size());
    s.params.grad = grad.mutable_data_ptr();
  }
  std::vector<DistillBad> bad(B, DistillBad::kNothing);
  s.params.bad = bad.data();
  kernel(s.params);
  check_values(op, bad, C);
  if (o.reduction != "mean") return {s.term, grad};
  double total = 0;
  for (int64_t n = 0; n < B; ++n) total += s.params.term[n];
  Tensor loss = torch::stable::new_empty(s.student, {}, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = float(total / double(B > 0 ? B : 1));
  return {loss, grad};
}

struct DistillDeviceCall {
  DistillSource source;
  Tensor loss, grad;
  std::optional<Tensor> seen;
  DistillDeviceParams params = {};
};

inline DistillDeviceCall prepare_distill_device(const char* op, const DistillTensors& in,
                                                const DistillOptions& o, bool with_grad) {
  DistillDeviceCall call;
  call.source = prepare_distill(op, in, o);
  const Tensor& student = call.source.student;
  check_device(op, "teacher", in.teacher, "student_BC", student);
  check_device(op, "label", in.label, "student_BC", student);
  const std::pair<const char*, const std::optional<Tensor>*> others[] = {
      {"weight_B", &in.weight_B},
      {"task_weight_B", &in.task_weight_B},
      {"teacher_id_BJ", &in.teacher_id_BJ},
      {"teacher_tail_B", &in.teacher_tail_B},
  };
  for (const auto& [name, t] : others) {
    if (*t) check_device(op, name, **t, "student_BC", student);
  }
  call.loss = call.grad = call.source.term;
  call.params.in = call.source.params;
  if (with_grad) {
    call.grad = torch::stable::new_empty(student, sizes_of(student, 2));
    call.params.in.grad = call.grad.mutable_data_ptr();
  }
  if (in.teacher_id_BJ) {
    call.seen = torch::stable::new_zeros(student, sizes_of(student, 2), ScalarType::Byte);
    call.params.seen = static_cast<uint8_t*>(call.seen->mutable_data_ptr());
  }
  if (o.reduction == "mean") {
    call.loss = torch::stable::new_empty(student, {}, ScalarType::Float);
    call.params.loss = static_cast<float*>(call.loss.mutable_data_ptr());
  }
  return call;
}

}  // namespace gose
