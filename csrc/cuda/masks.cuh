// Frozen masks: a `Masked` has the fields frozen, kind and threshold of an UpdateTensor.
#pragma once

#include "cuda/common.cuh"

namespace gose::cuda {
namespace {

// Whether the mask says that a unit must not change.
template <class Masked>
__device__ bool mask_freezes(const Masked& t, int64_t unit) {
  switch (t.kind) {
    case MaskKind::kNone: return false;
    case MaskKind::kBytes: return static_cast<const uint8_t*>(t.frozen)[unit] != 0;
    case MaskKind::kBits: return static_cast<const uint8_t*>(t.frozen)[unit >> 3] >> (unit & 7) & 1;
    case MaskKind::kScores: return static_cast<const float*>(t.frozen)[unit] >= t.threshold;
  }
  return false;
}

// A bit for each of the kLanes elements from i on, a multiple of kLanes, four or eight, that have a
// mask value each.
template <int kLanes, class Masked>
__device__ unsigned live_elements(const Masked& t, int64_t i) {
  constexpr unsigned kAll = (1u << kLanes) - 1;
  unsigned live = 0;
  switch (t.kind) {
    case MaskKind::kNone: return kAll;
    case MaskKind::kBits: return ~(static_cast<const uint8_t*>(t.frozen)[i >> 3] >> (i & 7)) & kAll;
    case MaskKind::kBytes: {
      const auto frozen = *reinterpret_cast<const Vector<uint8_t, kLanes>*>(
          static_cast<const uint8_t*>(t.frozen) + i);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) live |= unsigned(frozen.lane[j] == 0) << j;
      return live;
    }
    case MaskKind::kScores: {
      const auto* score = reinterpret_cast<const Vector<float, kWidest<float>>*>(
          static_cast<const float*>(t.frozen) + i);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        const float own = score[j / kWidest<float>].lane[j % kWidest<float>];
        live |= unsigned(!(own >= t.threshold)) << j;
      }
      return live;
    }
  }
  return live;
}

// Whether the mask of elements lies so that live_elements can read it.
inline bool fits_lanes(const void* frozen, MaskKind kind, int lanes) {
  const int bytes = kind == MaskKind::kBytes ? lanes : kind == MaskKind::kScores ? kVectorBytes : 1;
  return aligned(frozen, bytes);
}

__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

}  // namespace
}  // namespace gose::cuda
