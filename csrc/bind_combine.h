// combine as every device binds it: checks, allocation, params. The tensors of a call keep alive
// what its params point to.
#pragma once

#include "bind.h"

namespace gose {

inline void check_combine(const char* op, const Tensor& y, const Tensor& weight,
                          const Tensor& row) {
  check_dim(op, "y_ND", y, 2);
  check_dim(op, "weight_TK", weight, 2);
  if (row.dim() != 2 || row.size(0) != weight.size(0) || row.size(1) != weight.size(1)) {
    refuse(op, ": row_TK must have the shape of weight_TK ", shape_of(weight), ", got ",
           shape_of(row));
  }
  check_dtype(op, "row_TK", row, ScalarType::Int);
  if (weight.scalar_type() != ScalarType::Float) {
    refuse(op, ": weight_TK must be torch.float32 for y_ND of ", dtype_name(y.scalar_type()),
           ", got ", dtype_name(weight.scalar_type()));
  }
  check_device(op, "weight_TK", weight, "y_ND", y);
  check_device(op, "row_TK", row, "y_ND", y);
}

struct CombineCall {
  Tensor y, weight, row, out;
  CombineParams params;
};

inline CombineCall prepare_combine(const Tensor& y_ND, const Tensor& weight_TK,
                                   const Tensor& row_TK) {
  check_combine("combine", y_ND, weight_TK, row_TK);
  const Tensor y = rows_contiguous(y_ND);
  const Tensor weight = dense(weight_TK);
  const Tensor row = dense(row_TK);
  Tensor out = torch::stable::new_empty(y, {weight.size(0), y.size(1)});
  const CombineParams params = {
      .y = y.const_data_ptr(),
      .weight = static_cast<const float*>(weight.const_data_ptr()),
      .row = static_cast<const int32_t*>(row.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .T = weight.size(0),
      .D = y.size(1),
      .K = weight.size(1),
      .stride_yn = y.stride(0),
      .dtype = float_dtype("combine", "y_ND", y),
  };
  return {y, weight, row, out, params};
}

struct CombineBackwardCall {
  Tensor grad, y, weight, row, grad_y, grad_weight;
  CombineBackwardParams params;
};

inline CombineBackwardCall prepare_combine_backward(const Tensor& grad_TD, const Tensor& y_ND,
                                                    const Tensor& weight_TK, const Tensor& row_TK) {
  const char* op = "combine_backward";
  check_combine(op, y_ND, weight_TK, row_TK);
  check_dtype(op, "grad_TD", grad_TD, y_ND.scalar_type());
  check_device(op, "grad_TD", grad_TD, "y_ND", y_ND);
  if (grad_TD.dim() != 2 || grad_TD.size(0) != weight_TK.size(0) ||
      grad_TD.size(1) != y_ND.size(1)) {
    refuse(op, ": grad_TD must have shape (", weight_TK.size(0), ", ", y_ND.size(1), "), got ",
           shape_of(grad_TD));
  }
  const Tensor grad = rows_contiguous(grad_TD);
  const Tensor y = rows_contiguous(y_ND);
  const Tensor weight = dense(weight_TK);
  const Tensor row = dense(row_TK);
  Tensor grad_y = torch::stable::new_zeros(y, {y.size(0), y.size(1)});
  Tensor grad_weight = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  const CombineBackwardParams params = {
      .grad = grad.const_data_ptr(),
      .y = y.const_data_ptr(),
      .weight = static_cast<const float*>(weight.const_data_ptr()),
      .row = static_cast<const int32_t*>(row.const_data_ptr()),
      .grad_y = grad_y.mutable_data_ptr(),
      .grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr()),
      .T = weight.size(0),
      .D = y.size(1),
      .K = weight.size(1),
      .stride_gt = grad.stride(0),
      .stride_yn = y.stride(0),
      .dtype = float_dtype(op, "y_ND", y),
  };
  return {grad, y, weight, row, grad_y, grad_weight, params};
}

}  // namespace gose
