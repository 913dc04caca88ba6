// In the place of csrc/cpu/isa.cpp: the level AMX with emulated tiles (tiles.h), on the portable
// level's kernels, so that a host without AMX runs every op as a host with it would.
#include "cpu/kernels.h"
#include "cpu/microgemm.h"

namespace gose::cpu {

const char* name_of(Level) { return "amx"; }
Level best_level() { return Level::kAmx; }
Level level_in_use() { return Level::kAmx; }

const Kernels& kernels() {
#define GOSE_KERNEL_OF(name, Params) &portable::name,
  static constexpr Kernels kPortable = {GOSE_CPU_KERNELS(GOSE_KERNEL_OF)};
#undef GOSE_KERNEL_OF
  return kPortable;
}

const MicroGemm& micro_gemm(DType dtype, Weights weights) {
  const bool tiles = dtype == DType::kBFloat16;
  if (weights == Weights::kInt8) return tiles ? amx::kGemmOfInt8 : portable::kGemmOfInt8;
  if (weights == Weights::kInt4) return tiles ? amx::kGemmOfInt4 : portable::kGemmOfInt4;
  if (tiles) return amx::kGemmOfBFloat16;
  return dtype == DType::kFloat16 ? portable::kGemmOfFloat16 : portable::kGemmOfFloat32;
}

// Small, so that an expert's rows make several blocks.
int64_t cache_bytes() { return 1 << 15; }

}  // namespace gose::cpu
