// The micro-kernel on bfloat16 rows with AMX tiles: up to 3 x 2 tiles of 16 x 16 sums, so 6 tile
// products for 7 tile loads of a step of 32 along K.
//
// Tiles 0..5 are sums (row tile i, column tile j: 2 i + j), 6 holds rows, 7 a column tile of the
// panel. A product wants all row tiles of one height: the rows are split evenly and the last tile
// starts where it ends with them, so it may make a row or two again, and nothing beyond is read.
// Quantized panels are widened 128 steps at a time, without the scales of the columns.
#if defined(__x86_64__)
#include "quantized.h"

// A host without AMX tests this file by defining the intrinsics itself.
#if defined(GOSE_EMULATE_TILES)
namespace widening = gose::cpu::portable;
#else
#include <immintrin.h>
namespace widening = gose::cpu::avx512;
#endif

namespace gose::cpu::amx {
namespace {

constexpr int kRows = 48, kTileRows = 16;
constexpr int64_t kStep = 32;                       // of K
constexpr int64_t kPanelStride = kPanel * 2 * 2;    // bytes from one pair of K to the next
constexpr int64_t kColumnTile = kTileRows * 2 * 2;  // bytes from column tile 0 to 1
constexpr int64_t kOutStride = kPanel * 4;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

inline void configure(int32_t height) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = uint8_t(tile < 7 ? height : kTileRows);
  }
  // GCC's intrinsic declares 8 bytes of its operand read: keep the compiler from dropping the rest.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Tile (i, j): zeros, or the sums that are there.
#define GOSE_BEGIN(tile, i, j)                                              \
  if (add) {                                                                \
    _tile_loadd(tile, c + first[i] * kPanel + (j) * kTileRows, kOutStride); \
  } else {                                                                  \
    _tile_zero(tile);                                                       \
  }

// Sums `tile` += row tile i of A times the column tile that is loaded. GCC wants literal tiles.
#define GOSE_ROWS(i, tile)                           \
  _tile_loadd(6, a + first[i] * stride_a, stride_a); \
  _tile_dpbf16ps(tile, 6, 7);

template <int TILES>
inline void sums(const char* a, int64_t stride_a, int32_t rows, const char* panel, int64_t K,
                 float* c, bool add, const char* ahead, int64_t lines) {
  const int32_t height = (rows + TILES - 1) / TILES;
  const int64_t first[3] = {0, TILES == 2 ? rows - height : height, rows - height};
  configure(height);
  GOSE_BEGIN(0, 0, 0)
  GOSE_BEGIN(1, 0, 1)
  if constexpr (TILES > 1) {
    GOSE_BEGIN(2, 1, 0)
    GOSE_BEGIN(3, 1, 1)
  }
  if constexpr (TILES > 2) {
    GOSE_BEGIN(4, 2, 0)
    GOSE_BEGIN(5, 2, 1)
  }
  const int64_t steps = K / kStep, per_step = steps == 0 ? 0 : (lines + steps - 1) / steps;
  int64_t fetched = 0;
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t i = 0; i < per_step && fetched < lines; ++i, ++fetched) {
      __builtin_prefetch(ahead + 64 * fetched, 0, 2);
    }
    _tile_loadd(7, panel, kPanelStride);
    GOSE_ROWS(0, 0)
    if constexpr (TILES > 1) {
      GOSE_ROWS(1, 2)
    }
    if constexpr (TILES > 2) {
      GOSE_ROWS(2, 4)
    }
    _tile_loadd(7, panel + kColumnTile, kPanelStride);
    // The row tile that is loaded stays: 7 loads a step, not 8.
    if constexpr (TILES == 1) {
      _tile_dpbf16ps(1, 6, 7);
    } else if constexpr (TILES == 2) {
      _tile_dpbf16ps(3, 6, 7);
      GOSE_ROWS(0, 1)
    } else {
      _tile_dpbf16ps(5, 6, 7);
      GOSE_ROWS(1, 3)
      GOSE_ROWS(0, 1)
    }
    a += kStep * 2;
    panel += kStep * kPanel * 2;
  }
  _tile_stored(0, c, kOutStride);
  _tile_stored(1, c + kTileRows, kOutStride);
  if constexpr (TILES > 1) {
    _tile_stored(2, c + first[1] * kPanel, kOutStride);
    _tile_stored(3, c + first[1] * kPanel + kTileRows, kOutStride);
  }
  if constexpr (TILES > 2) {
    _tile_stored(4, c + first[2] * kPanel, kOutStride);
    _tile_stored(5, c + first[2] * kPanel + kTileRows, kOutStride);
  }
  _tile_release();
}
#undef GOSE_ROWS
#undef GOSE_BEGIN

void add_up(const char* a, int64_t stride_a, int32_t rows, const char* panel, int64_t K, float* c,
            bool add, const char* ahead, int64_t lines) {
  switch ((rows + kTileRows - 1) / kTileRows) {
    case 1: return sums<1>(a, stride_a, rows, panel, K, c, add, ahead, lines);
    case 2: return sums<2>(a, stride_a, rows, panel, K, c, add, ahead, lines);
    default: return sums<3>(a, stride_a, rows, panel, K, c, add, ahead, lines);
  }
}

void run(const void* rows_a, int64_t stride_a, int32_t rows, const void* panel_of, int64_t K,
         float* c, const char* ahead, int64_t lines) {
  add_up(static_cast<const char*>(rows_a), stride_a, rows, static_cast<const char*>(panel_of), K, c,
         false, ahead, lines);
}

template <Weights WEIGHTS>
void run_quantized(const void* rows_a, int64_t stride_a, int32_t rows, const void* panel, int64_t K,
                   float* c, const char* ahead, int64_t lines) {
  constexpr int64_t kSteps = 128;
  alignas(64) uint16_t wide[kSteps * kPanel];
  const char* a = static_cast<const char*>(rows_a);
  const char* r = static_cast<const char*>(panel) + offset_of_r(WEIGHTS, K);
  float scale[kPanel];
  __builtin_memcpy(scale, r, sizeof scale);
  for (int64_t begin = 0; begin == 0 || begin < K; begin += kSteps) {
    const int64_t end = begin + kSteps < K ? begin + kSteps : K;
    (WEIGHTS == Weights::kInt8 ? widening::widen_int8 : widening::widen_int4)(panel, begin, end,
                                                                              wide);
    const int64_t fetched = K == 0 ? 0 : lines * begin / K;
    const int64_t fetching = K == 0 ? 0 : lines * end / K - fetched;
    add_up(a + 2 * begin, stride_a, rows, reinterpret_cast<const char*>(wide), end - begin, c,
           begin > 0, ahead + 64 * fetched, fetching);
  }
  for (int64_t i = 0; i < rows * kPanel; ++i) c[i] *= scale[i % kPanel];
}

}  // namespace

const MicroGemm kGemmOfBFloat16 = {"amx bf16 tiles", kRows, true, run};
const MicroGemm kGemmOfInt8 = {"amx bf16 tiles, int8 widened", kRows, true,
                               run_quantized<Weights::kInt8>};
const MicroGemm kGemmOfInt4 = {"amx bf16 tiles, int4 widened", kRows, true,
                               run_quantized<Weights::kInt4>};

}  // namespace gose::cpu::amx

#endif
