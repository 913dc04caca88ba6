// grouped_gemm: one product per group of consecutive rows, bias in the epilogue.
#include "expert_gemm.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

struct Layout {
  const MicroGemm* micro;
  int64_t rows, K, stride_x, block_rows, gathered, bytes;

  explicit Layout(const GroupedGemmParams& p)
      : micro(&micro_gemm(p.dtype)), rows(p.offset[p.E]), K(round_up(p.D, kAlignK)) {
    stride_x = row_stride(K, micro->bf16_rows ? 2 : 4);
    const int64_t fitting = p.cache * 3 / 5 / stride_x;
    block_rows = most(1, least(fitting, 480) / micro->rows) * micro->rows;
    gathered = round_up(blocks_at_most(rows, p.E, block_rows) * int64_t(sizeof(Block)), 64);
    bytes = gathered + p.threads * least(block_rows, rows) * stride_x;
  }
};

template <class Float>
void groups(const GroupedGemmParams& p, const Layout& at, const Parallel& threads) {
  Block* blocks = reinterpret_cast<Block*>(p.scratch);
  const Gemm gemm = {.micro = at.micro,
                     .blocks = blocks,
                     .num_blocks = make_blocks(p.offset, p.E, at.block_rows, blocks),
                     .packed = p.w,
                     .stride_packed = p.stride_packed,
                     .panels = ceil_div(p.F, kPanel),
                     .K = at.K,
                     .panel_bytes = at.K * kPanel * bytes_of(p.dtype),
                     .threads = p.threads};
  multiply(
      gemm, threads,
      [&](const Block& block, int64_t thread) {
        char* to = p.scratch + at.gathered + thread * least(at.block_rows, at.rows) * at.stride_x;
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
          Float* y = static_cast<Float*>(p.y) + (block.first + first + r) * p.F + f0;
          for (int64_t c = 0; c < real; c += kLanes) {
            store_row(y, real, c, load(sums + r * kPanel + c));
          }
        }
      });
  Float* tail = static_cast<Float*>(p.y) + at.rows * p.F;
  std::memset(static_cast<void*>(tail), 0, (p.N - at.rows) * p.F * sizeof(Float));
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
