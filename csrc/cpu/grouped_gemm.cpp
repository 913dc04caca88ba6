// grouped_gemm: one product per group of consecutive rows, bias in the epilogue.
#include "expert_gemm.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

struct Layout {
  const MicroGemm* micro;
  int64_t rows, K, panels, panel_bytes, stride_x, block_rows, gathered_bytes;
  int64_t runs, gathered, bytes;  // offsets in the scratch memory; the work items stand first

  explicit Layout(const GroupedGemmParams& p)
      : micro(&micro_gemm(p.dtype_w)), rows(p.offset[p.E]), K(round_up(p.D, kAlignK)) {
    panels = ceil_div(p.F, kPanel), panel_bytes = K * kPanel * bytes_of(p.dtype_w);
    stride_x = row_stride(K, micro->bf16_rows ? 2 : 4);
    block_rows = rows_of_block(*micro, p.cache, stride_x);
    gathered_bytes = least(block_rows, rows) * stride_x;
    runs = round_up(items_at_most(p.E, p.threads, panels, panel_bytes) * int64_t(sizeof(Item)), 64);
    gathered = runs + (p.w == nullptr ? p.threads * run_buffer(panel_bytes) : 0);
    bytes = gathered + p.threads * gathered_bytes;
  }
};

template <class Float, class Out>
void groups(const GroupedGemmParams& p, const Layout& at, const Parallel& threads) {
  const Gemm gemm = {.micro = at.micro,
                     .offset = p.offset,
                     .E = p.E,
                     .block_rows = at.block_rows,
                     .packed = p.w,
                     .stride_packed = p.stride_packed,
                     .raw = p.w == nullptr ? &p.raw : nullptr,
                     .buffer = p.scratch + at.runs,
                     .first_panel = 0,
                     .panels = at.panels,
                     .K = at.K,
                     .panel_bytes = at.panel_bytes,
                     .threads = p.threads,
                     .items = reinterpret_cast<Item*>(p.scratch)};
  multiply(
      gemm, threads,
      [&](const Block& block, int64_t thread) {
        char* to = p.scratch + at.gathered + thread * at.gathered_bytes;
        for (int64_t r = 0; r < block.rows; ++r) {
          copy_row(static_cast<const Float*>(p.x) + (block.first + r) * p.stride_xn, p.D, at.K,
                   at.micro->bf16_rows, to + r * at.stride_x);
        }
        return Rows{to, at.stride_x};
      },
      [&](const Block& block, int64_t first, int64_t count, int64_t panel, float* sums) {
        const int64_t f0 = panel * kPanel, real = least(kPanel, p.F - f0);
        for (int64_t c = 0; p.bias.data != nullptr && c < real; ++c) {
          const float bias = bias_at(p.bias, p.dtype, block.expert, f0 + c);
          for (int64_t r = 0; r < count; ++r) sums[r * kPanel + c] += bias;
        }
        for (int64_t r = 0; r < count; ++r) {
          Out* y = static_cast<Out*>(p.y) + (block.first + first + r) * p.F + f0;
          for (int64_t c = 0; c < real; c += kLanes) {
            store_row(y, real, c, load(sums + r * kPanel + c));
          }
        }
      });
  if (at.rows == p.N || p.F == 0) return;
  Out* tail = static_cast<Out*>(p.y) + at.rows * p.F;
  std::memset(static_cast<void*>(tail), 0, (p.N - at.rows) * p.F * sizeof(Out));
}

template <class Float>
void groups(const GroupedGemmParams& p, const Layout& at, const Parallel& threads) {
  return p.dtype_y == p.dtype ? groups<Float, Float>(p, at, threads)
                              : groups<Float, float>(p, at, threads);
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Parallel& threads) {
  const Layout at(p);
  if (p.scratch == nullptr) {
    *p.scratch_bytes = at.bytes;
    return;
  }
  switch (p.dtype) {
    case DType::kFloat32: return groups<float>(p, at, threads);
    case DType::kBFloat16: return groups<bf16>(p, at, threads);
    case DType::kFloat16: return groups<fp16>(p, at, threads);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace gose::cpu::GOSE_LEVEL
