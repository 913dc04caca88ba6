// float16 of csrc/cuda under g++.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, sizeof(value));
  return float(value);
}

inline __half __float2half_rn(float x) {
  const _Float16 value = _Float16(x);
  __half out;
  std::memcpy(&out.bits, &value, sizeof(value));
  return out;
}

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
