// Checks, order of rows and allocation of squared_grad on the CPU.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "bind_routing.h"

namespace gose {

struct SquaredGradCall {
  Tensor x, grad, square, square_bias;
  std::vector<int64_t> order, offset;
  std::vector<uint8_t> last;
  std::unique_ptr<float[]> panel_x, panel_g;
  SquaredGradParams params;
};

inline void check_squared_grad(const Tensor& x, const Tensor& grad,
                               const std::optional<Tensor>& sample,
                               const std::optional<Tensor>& offset) {
  const char* op = "squared_grad";
  if (x.dim() != 2 || grad.dim() != 2 || x.size(0) != grad.size(0)) {
    refuse(op, ": x_ND and grad_NF must be matrices with as many rows, got shapes ", shape_of(x),
           " and ", shape_of(grad));
  }
  if (grad.scalar_type() != x.scalar_type()) {
    refuse(op, ": grad_NF must be ", dtype_name(x.scalar_type()), " as x_ND, got ",
           dtype_name(grad.scalar_type()));
  }
  if (sample && (sample->scalar_type() != ScalarType::Int || sample->dim() != 1 ||
                 sample->size(0) != x.size(0))) {
    refuse(op, ": sample_N must be int32 of shape [N=", x.size(0), "], got ",
           dtype_name(sample->scalar_type()), " of shape ", shape_of(*sample));
  }
  if (offset &&
      (offset->scalar_type() != ScalarType::Int || offset->dim() != 1 || offset->size(0) < 1)) {
    refuse(op, ": offset_E1 must be int32 of shape [E + 1], got ",
           dtype_name(offset->scalar_type()), " of shape ", shape_of(*offset));
  }
}

inline std::vector<int64_t> read_offset(const std::optional<Tensor>& offset_E1, int64_t N) {
  if (!offset_E1) return {0, N};
  const Tensor kept = torch::stable::contiguous(*offset_E1);
  const int32_t* value = static_cast<const int32_t*>(kept.const_data_ptr());
  const std::vector<int64_t> offset(value, value + kept.numel());
  if (offset.front() != 0 || offset.back() > N || !std::is_sorted(offset.begin(), offset.end())) {
    std::ostringstream text;
    for (size_t e = 0; e < offset.size(); ++e) text << (e ? ", " : "") << offset[e];
    refuse("squared_grad: offset_E1 must ascend from 0 to at most N=", N, ", got [", text.str(),
           "]");
  }
  return offset;
}

// Rows of every expert ordered by sample, and where samples end. Nothing is ordered or marked where
// no sample has two rows of an expert.
inline void order_rows(SquaredGradCall& call, const Tensor& sample_N) {
  const Tensor kept = torch::stable::contiguous(sample_N);
  const int32_t* sample = static_cast<const int32_t*>(kept.const_data_ptr());
  const int64_t rows = call.offset.back();
  std::vector<int64_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::vector<uint8_t> last(rows, 1);
  bool sorted = true, alone = true;
  for (size_t e = 0; e + 1 < call.offset.size(); ++e) {
    const auto begin = order.begin() + call.offset[e], end = order.begin() + call.offset[e + 1];
    const auto by_sample = [sample](int64_t a, int64_t b) { return sample[a] < sample[b]; };
    if (!std::is_sorted(begin, end, by_sample)) {
      sorted = false;
      std::stable_sort(begin, end, by_sample);
    }
    for (auto row = begin; row != end; ++row) {
      if (row + 1 == end || sample[row[0]] != sample[row[1]]) continue;
      last[row - order.begin()] = 0;
      alone = false;
    }
  }
  if (alone) return;
  call.last = std::move(last);
  if (!sorted) call.order = std::move(order);
}

inline SquaredGradCall prepare_squared_grad(const Tensor& x_ND, const Tensor& grad_NF,
                                            const std::optional<Tensor>& sample_N,
                                            const std::optional<Tensor>& offset_E1) {
  check_squared_grad(x_ND, grad_NF, sample_N, offset_E1);
  SquaredGradCall call;
  const DType dtype = float_dtype("squared_grad", "x_ND", x_ND);
  call.x = rows_contiguous(x_ND);
  call.grad = rows_contiguous(grad_NF);
  call.offset = read_offset(offset_E1, x_ND.size(0));
  if (sample_N) order_rows(call, *sample_N);
  const int64_t rows = call.offset.back(), E = int64_t(call.offset.size()) - 1;
  const int64_t D = x_ND.size(1), F = grad_NF.size(1);
  std::vector<int64_t> shape = {F, D};
  if (offset_E1) shape.insert(shape.begin(), E);
  call.square = torch::stable::new_empty(call.x, shape, ScalarType::Float);
  shape.pop_back();
  call.square_bias = torch::stable::new_empty(call.x, shape, ScalarType::Float);
  call.panel_x.reset(new float[rows * (D + kPanelWidth)]);
  call.panel_g.reset(new float[rows * (F + kPanelWidth)]);
  call.params = {
      .x = call.x.const_data_ptr(),
      .grad = call.grad.const_data_ptr(),
      .order = call.order.empty() ? nullptr : call.order.data(),
      .last = call.last.empty() ? nullptr : call.last.data(),
      .offset = call.offset.data(),
      .square = static_cast<float*>(call.square.mutable_data_ptr()),
      .square_bias = static_cast<float*>(call.square_bias.mutable_data_ptr()),
      .panel_x = call.panel_x.get(),
      .panel_g = call.panel_g.get(),
      .rows = rows,
      .D = D,
      .F = F,
      .E = E,
      .stride_xn = call.x.stride(0),
      .stride_gn = call.grad.stride(0),
      .dtype = dtype,
  };
  return call;
}

}  // namespace gose
