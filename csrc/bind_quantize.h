// Checks and allocation of the codecs on the CPU.
#pragma once

#include <cmath>
#include <limits>

#include "bind_masked.h"

namespace gose {

inline CodeFormat code_format(const char* op, const std::string& name) {
  if (name == "int8_b256_f32") return {8, 256, false, 0x1.020406p+121f};
  if (name == "int8_b64_f16") return {8, 64, true, 65504.f};
  if (name == "int4_b64_f16") return {4, 64, true, 65504.f};
  refuse(op, ": format must be one of int8_b256_f32, int8_b64_f16, int4_b64_f16, got '", name, "'");
}

// Of any L: a packet may lie, and a product that overflows would agree with it.
inline int64_t code_bytes(const CodeFormat& format, int64_t L) {
  return format.bits == 8 ? L : L / 2 + L % 2;
}
inline int64_t num_scales(const CodeFormat& format, int64_t L) {
  return L / format.block + (L % format.block > 0);
}

// The live elements of a tensor with an optional mask.
struct Live {
  FlatMask mask;
  std::vector<int64_t> start;
  int64_t L;

  const uint8_t* frozen() const { return mask.value; }
  const int64_t* starts() const { return mask.value == nullptr ? nullptr : start.data(); }
};

// kernel: find_live of the level in use.
template <class Kernel>
inline Live find_live(const std::optional<Tensor>& frozen, const Tensor& tensor,
                      const Kernel& kernel) {
  Live live = {{}, {}, tensor.numel()};
  if (!frozen || tensor.numel() == 0) return live;
  live.mask = flat_mask(*frozen, tensor);
  live.start.resize((tensor.numel() + kCodeUnit - 1) / kCodeUnit);
  kernel({live.mask.value, tensor.numel(), live.mask.inner, live.start.data(), &live.L});
  return live;
}

inline void check_code(const char* op, const Tensor& code, const Tensor& scale,
                       const CodeFormat& format) {
  check_dtype(op, "code", code, ScalarType::Byte);
  if (code.dim() != 1) refuse(op, ": code must have 1 dimension, got shape ", shape_of(code));
  check_dtype(op, "scale", scale, format.half_scale ? ScalarType::Half : ScalarType::Float);
  if (scale.dim() != 1) refuse(op, ": scale must have 1 dimension, got shape ", shape_of(scale));
}

// Sizes that fit L live elements, and scales that are finite and not negative; both contiguous.
inline void check_scales(const char* op, const Tensor& code, const Tensor& scale,
                         const CodeFormat& format, int64_t L) {
  if (code.numel() != code_bytes(format, L) || scale.numel() != num_scales(format, L)) {
    refuse(op, ": ", L, " live elements need ", code_bytes(format, L), " code bytes and ",
           num_scales(format, L), " scales, got ", code.numel(), " and ", scale.numel());
  }
  bool good = true;
  if (format.half_scale) {
    const uint16_t* bits = static_cast<const uint16_t*>(scale.const_data_ptr());
    for (int64_t g = 0; g < scale.numel(); ++g) good &= bits[g] < 0x7c00 || bits[g] == 0x8000;
  } else {
    const float* value = static_cast<const float*>(scale.const_data_ptr());
    for (int64_t g = 0; g < scale.numel(); ++g) {
      good &= value[g] >= 0 && value[g] <= std::numeric_limits<float>::max();
    }
  }
  if (!good) refuse(op, ": scale must be finite and not negative");
}

inline void check_finite(const std::vector<CodeBad>& bad) {
  for (const CodeBad& b : bad) {
    if (b.element < 0) continue;
    const char* text = std::isnan(b.value) ? "nan" : b.value > 0 ? "inf" : "-inf";
    refuse("quantize: x_P + residual_P must be finite, element ", b.element, " is ", text);
  }
}

}  // namespace gose
