// AMX's tile instructions on plain arrays, for hosts without them: force-included before
// csrc/cpu/microgemm_amx.cpp, which then leaves <immintrin.h> out (-DGOSE_EMULATE_TILES).
//
// What the CPU would refuse ends the program: the rules are the operation and exception sections
// of LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS and TILERELEASE in Intel's Software
// Developer's Manual, volume 2.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tiles {

constexpr int kTiles = 8, kMostRows = 16, kRowBytes = 64;  // palette 1
constexpr int kMostK = 16, kMostN = 64;                    // of the multiplier

struct Tile {
  int rows, colsb;  // 0, 0: not configured
  unsigned char data[kMostRows][kRowBytes];
};

struct State {
  bool configured;
  Tile tile[kTiles];
};
inline State state = {};

[[noreturn]] inline void fault(const char* exception, const char* instruction, const char* reason) {
  std::fprintf(stderr, "%s: %s: %s\n", exception, instruction, reason);
  std::abort();
}

inline Tile& valid_tile(const char* instruction, int index) {
  if (!state.configured) fault("#UD", instruction, "tiles are not configured");
  if (index < 0 || index >= kTiles) fault("#UD", instruction, "no such tile");
  Tile& tile = state.tile[index];
  if (tile.rows == 0) fault("#UD", instruction, "the tile is not configured");
  return tile;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Denormals are zero, as operands and as results; MXCSR is not asked.
inline float flushed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x7f800000u) == 0 ? float_of(bits & 0x80000000u) : x;
}

inline float bf16_at(const Tile& tile, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, tile.data[row] + 2 * column, 2);
  return flushed(float_of(uint32_t(bits) << 16));
}

inline float fused(float sum, float a, float b) {
  return flushed(__builtin_fmaf(a, b, flushed(sum)));
}

}  // namespace tiles

inline void _tile_loadconfig(const void* config) {
  const char* name = "LDTILECFG";
  const auto* bytes = static_cast<const unsigned char*>(config);
  if (bytes[0] > 1) tiles::fault("#GP", name, "no such palette");
  std::memset(&tiles::state, 0, sizeof tiles::state);
  if (bytes[0] == 0) return;
  if (bytes[1] != 0) tiles::fault("#UD", name, "start_row is for interrupted instructions");
  for (int i = 2; i < 16; ++i) {
    if (bytes[i] != 0) tiles::fault("#GP", name, "a reserved byte is not zero");
  }
  for (int i = 0; i < 16; ++i) {
    uint16_t colsb;
    std::memcpy(&colsb, bytes + 16 + 2 * i, 2);
    const int rows = bytes[48 + i];
    if (i >= tiles::kTiles) {
      if (colsb != 0 || rows != 0) tiles::fault("#GP", name, "a tile beyond the palette's");
      continue;
    }
    if (colsb > tiles::kRowBytes) tiles::fault("#GP", name, "rows are too wide");
    if (rows > tiles::kMostRows) tiles::fault("#GP", name, "too many rows");
    if ((colsb == 0) != (rows == 0)) tiles::fault("#GP", name, "half of a tile is configured");
    tiles::state.tile[i].colsb = colsb;
    tiles::state.tile[i].rows = rows;
  }
  tiles::state.configured = true;
}

inline void _tile_release() { std::memset(&tiles::state, 0, sizeof tiles::state); }

inline void _tile_zero(int index) {
  std::memset(tiles::valid_tile("TILEZERO", index).data, 0, sizeof(tiles::Tile::data));
}

// Touches colsb bytes of each configured row and no other; what a row does not hold becomes zero.
inline void _tile_loadd(int index, const void* base, int64_t stride) {
  tiles::Tile& tile = tiles::valid_tile("TILELOADD", index);
  std::memset(tile.data, 0, sizeof tile.data);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(tile.data[row], static_cast<const char*>(base) + row * stride, tile.colsb);
  }
}

inline void _tile_stored(int index, void* base, int64_t stride) {
  const tiles::Tile& tile = tiles::valid_tile("TILESTORED", index);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, tile.data[row], tile.colsb);
  }
}

// sum[m][n] += a[m][2k] * b[k][2n] + a[m][2k+1] * b[k][2n+1]: the even and the odd products of a
// row are summed apart, k ascending, each step fused; the two sums are added, then the result.
inline void _tile_dpbf16ps(int sum_index, int a_index, int b_index) {
  const char* name = "TDPBF16PS";
  tiles::Tile& sum = tiles::valid_tile(name, sum_index);
  const tiles::Tile& a = tiles::valid_tile(name, a_index);
  const tiles::Tile& b = tiles::valid_tile(name, b_index);
  if (sum_index == a_index || sum_index == b_index || a_index == b_index) {
    tiles::fault("#UD", name, "two operands are one tile");
  }
  if (sum.colsb % 4 || a.colsb % 4 || b.colsb % 4) tiles::fault("#UD", name, "odd columns");
  if (sum.rows != a.rows) tiles::fault("#UD", name, "sum and a differ in rows");
  if (sum.colsb != b.colsb) tiles::fault("#UD", name, "sum and b differ in columns");
  if (a.colsb / 4 != b.rows) tiles::fault("#UD", name, "a's columns are not b's rows");
  if (sum.colsb > tiles::kMostN || b.rows > tiles::kMostK) tiles::fault("#UD", name, "too large");
  for (int m = 0; m < sum.rows; ++m) {
    for (int n = 0; n < sum.colsb / 4; ++n) {
      float even = 0.f, odd = 0.f, old;
      for (int k = 0; k < a.colsb / 4; ++k) {
        even = tiles::fused(even, tiles::bf16_at(a, m, 2 * k), tiles::bf16_at(b, k, 2 * n));
        odd = tiles::fused(odd, tiles::bf16_at(a, m, 2 * k + 1), tiles::bf16_at(b, k, 2 * n + 1));
      }
      std::memcpy(&old, sum.data[m] + 4 * n, 4);
      const float total = tiles::flushed(tiles::flushed(old) + tiles::flushed(even + odd));
      std::memcpy(sum.data[m] + 4 * n, &total, 4);
    }
  }
  for (int m = sum.rows; m < tiles::kMostRows; ++m) std::memset(sum.data[m], 0, tiles::kRowBytes);
}
