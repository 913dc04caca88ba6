// Quantized weights as panels of 32 columns (microgemm.h): integers q, and float32 scales r of the
// columns, each of which is one output of the layer.
//
//   int8   w = q * r               [K][32] q in [-127, 127], int8; [32] r
//   int4   w = kLevels[q] * s * r  [K/32] of [4][32] words of a column's q at 8 steps of K, step k
//                                  in the 4 bits from 4 * (k % 2 * 4 + k % 8 / 2) on, and [2][32]
//                                  s, float8_e4m3fn of a column's 16 steps; [32] r
//
// q and s of int4 are one stream: two would have the CPU's prefetchers start anew at every panel.
// The levels are the best integers for Gaussian weights that leave exact bfloat16 numbers: a level
// and an s have 4 significant bits each, bfloat16 has 8. Evenly spaced ones err by 9 % more.
#pragma once

#include "microgemm.h"

namespace gose::cpu {
namespace {

constexpr int64_t kScaleSteps = 16;  // of K that share an s
constexpr int64_t kWordSteps = 8;
constexpr int32_t kLevels[16] = {-30, -24, -20, -16, -12, -8, -5, -2, 0, 3, 6, 9, 12, 16, 20, 26};
constexpr float kLargestLevel = 30;

// Where bits of step k % 8 stand in a word: the two steps of a pair in one place of its halves.
constexpr int32_t shift_of(int64_t k) { return int32_t(4 * (k % 2 * 4 + k % kWordSteps / 2)); }

// Bytes from the start of a panel of int4: to column 0 of the words, of the s of step k.
constexpr int64_t kWordBytes = kAlignK * kPanel / 2;
constexpr int64_t kStepsBytes = kWordBytes + kAlignK / kScaleSteps * kPanel;
constexpr int64_t offset_of_word(int64_t k) {
  return k / kAlignK * kStepsBytes + k % kAlignK / kWordSteps * kPanel * 4;
}
constexpr int64_t offset_of_s(int64_t k) {
  return k / kAlignK * kStepsBytes + kWordBytes + k % kAlignK / kScaleSteps * kPanel;
}
constexpr int64_t offset_of_r(Weights weights, int64_t K) {
  return weights == Weights::kInt8 ? K * kPanel : K / kAlignK * kStepsBytes;
}

// Bytes of a panel; `plain` is the size of a weight that is kept as it is.
constexpr int64_t bytes_of_panel(Weights weights, int64_t K, int64_t plain) {
  return weights == Weights::kPlain ? K * kPanel * plain
                                    : offset_of_r(weights, K) + kPanel * int64_t(sizeof(float));
}

// The bits of s that float8_e4m3fn and float32 share stand 20 places apart, its exponents 120.
constexpr int32_t kScaleShift = 20, kScaleBias = 120 << 3;

}  // namespace
}  // namespace gose::cpu
