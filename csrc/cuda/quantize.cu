// Every operation rounds, none is fused: the bytes are part of the contract. The __f*_rn forms are
// never contracted.
#include "cuda/common.cuh"
#include "philox.h"

namespace gose::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kQuad = 4;                    // neighbours of one thread: 16 bytes of float32
constexpr int kHalf = kWarp * kQuad;        // elements of one access of a warp
constexpr int kTile = 2 * kHalf;            // elements of a warp: one block of 256 or four of 64
constexpr int kSteps = 4;                   // quads of one thread that decodes
constexpr unsigned kInfinity = 0x7f800000;  // bits of |y| have its order, infinity and NaN on top

struct Encoder {
  QuantizeParams p;
  PhiloxKey key;
};

// Elements l .. l + 3 of what is coded, 0 past the end. kWide: they are neighbours and aligned.
template <bool kWide, typename Float>
__device__ void load_quad(const Float* __restrict__ x, const int64_t* __restrict__ place, int64_t l,
                          int64_t L, float (&y)[kQuad]) {
  if (kWide && l + kQuad <= L) {
    const auto values = *reinterpret_cast<const Vector<Float, kQuad>*>(x + l);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) y[i] = to_float(values.lane[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    y[i] = l + i < L ? to_float(x[place != nullptr ? place[l + i] : l + i]) : 0.0f;
  }
}

// u of both quads of a thread. One block of words serves two neighbours: the even one draws for the
// first quads, the odd one for the second, and each gives the other its half.
__device__ inline void draw_shared(PhiloxKey key, int64_t tile, int lane, float (&u)[2][kQuad]) {
  const bool odd = lane & 1;
  const int64_t counter = tile * (kTile / 8) + (odd ? kHalf / 8 : 0) + lane / 2;
  const PhiloxBlock mine = philox(key, uint64_t(counter));
  const uint32_t first = __shfl_xor_sync(kWholeWarp, odd ? mine.word[0] : mine.word[2], 1);
  const uint32_t second = __shfl_xor_sync(kWholeWarp, odd ? mine.word[1] : mine.word[3], 1);
  const uint32_t word[2][2] = {
      {odd ? first : mine.word[0], odd ? second : mine.word[1]},
      {odd ? mine.word[2] : first, odd ? mine.word[3] : second},
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      u[half][i] = philox_uniform(word[half][i / 2] >> (i & 1) * 16 & 0xffffu);
    }
  }
}

// u of elements that lie anywhere: neighbours mostly share a block of words.
__device__ inline void draw_apart(const Encoder& e, int64_t l, float (&u)[kQuad]) {
  PhiloxBlock block = {};
  int64_t known = -1;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (l + i >= e.p.L) break;
    const int64_t at = e.p.place != nullptr ? e.p.place[l + i] : l + i;
    if (at >> 3 != known) block = philox(e.key, uint64_t(known = at >> 3));
    u[i] = philox_uniform(philox_draw(block, int(at & 7)));
  }
}

// The smallest scale with qmax * scale >= absmax, at most the format's largest; stored if `to`.
template <int kBlock>
__device__ float scale_of(unsigned top, float qmax, float max_scale, void* to, bool store) {
  const float absmax = __uint_as_float(top);
  float scale = absmax / qmax;  // to nearest: the wanted one, or the one below it
  if constexpr (kBlock == 64) {
    __half half = __float2half_rn(scale);
    const bool low = __fmul_rn(__half2float(half), qmax) < absmax;  // 18 bits: exact
    half = __ushort_as_half(static_cast<unsigned short>(__half_as_ushort(half) + low));
    scale = fminf(__half2float(half), max_scale);
    if (top >= kInfinity) scale = NAN;
    if (store) *static_cast<__half*>(to) = __float2half_rn(scale);
  } else {
    const bool low = fmaf(scale, qmax, -absmax) < 0.0f;  // the sign of the exact difference
    scale = fminf(__uint_as_float(__float_as_uint(scale) + low), max_scale);
    if (top >= kInfinity) scale = NAN;
    if (store) *static_cast<float*>(to) = scale;
  }
  return scale;
}

template <int kBits>
__device__ void store_codes(uint8_t* __restrict__ code, int64_t l, int64_t L,
                            const int (&q)[kQuad]) {
  constexpr int kBytes = kQuad * kBits / 8;
  Vector<uint8_t, kBytes> bytes;
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    bytes.lane[i] =
        uint8_t(kBits == 8 ? q[i] : (q[2 * i % kQuad] & 15) | q[(2 * i + 1) % kQuad] << 4);
  }
  uint8_t* to = code + l * kBits / 8;
  if (l + kQuad <= L) {
    *reinterpret_cast<Vector<uint8_t, kBytes>*>(to) = bytes;
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if (l + i * 8 / kBits < L) to[i] = bytes.lane[i];
  }
}

// One warp per 256 elements, two quads a thread, so that every access of a warp is dense.
template <typename Float, int kBits, int kBlock, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    quantize_kernel(const Encoder e) {
  const QuantizeParams& p = e.p;
  const int lane = threadIdx.x;
  const int64_t tile = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (tile * kTile >= p.L) return;  // the whole warp
  constexpr float qmax = (1 << (kBits - 1)) - 1;
  float y[2][kQuad];
  unsigned top[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t l = tile * kTile + half * kHalf + lane * kQuad;
    load_quad<kWide>(static_cast<const Float*>(p.x), p.place, l, p.L, y[half]);
    float residual[kQuad] = {};
    if (p.residual != nullptr) load_quad<kWide>(p.residual, p.place, l, p.L, residual);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (p.residual != nullptr) y[half][i] = __fadd_rn(y[half][i], residual[i]);
      top[half] = max(top[half], __float_as_uint(y[half][i]) & 0x7fffffffu);
    }
  }
  if (kBlock == kTile) top[0] = max(top[0], top[1]);
  float scale[2];
#pragma unroll
  for (int half = 0; half < (kBlock == kTile ? 1 : 2); ++half) {
    constexpr int kGroup = kBlock == kTile ? kWarp : kBlock / kQuad;  // lanes of a block
#pragma unroll
    for (int apart = kGroup / 2; apart > 0; apart /= 2) {
      top[half] = max(top[half], __shfl_xor_sync(kWholeWarp, top[half], apart));
    }
    const int64_t l = tile * kTile + half * kHalf + lane * kQuad;
    constexpr int kScaleBytes = kBlock == 64 ? 2 : 4;
    scale[half] = scale_of<kBlock>(top[half], qmax, p.format.max_scale,
                                   static_cast<char*>(p.scale) + l / kBlock * kScaleBytes,
                                   lane % kGroup == 0 && l < p.L);
  }
  if (kBlock == kTile) scale[1] = scale[0];
  float u[2][kQuad] = {};
  if (kWide && p.stochastic) draw_shared(e.key, tile, lane, u);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t l = tile * kTile + half * kHalf + lane * kQuad;
    if (!kWide && p.stochastic) draw_apart(e, l, u[half]);
    int q[kQuad];
    Vector<float, kQuad> left;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const float ratio = scale[half] > 0.0f ? y[half][i] / scale[half] : 0.0f;
      float code = p.stochastic ? floorf(__fadd_rn(ratio, u[half][i])) : rintf(ratio);
      code = fminf(fmaxf(code, -qmax), qmax);
      q[i] = int(code);
      left.lane[i] = __fsub_rn(y[half][i], __fmul_rn(code, scale[half]));
    }
    store_codes<kBits>(p.code, l, p.L, q);
    if (p.left == nullptr) continue;
    if (kWide && l + kQuad <= p.L) {
      *reinterpret_cast<Vector<float, kQuad>*>(p.left + l) = left;
      continue;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (l + i < p.L) p.left[p.place != nullptr ? p.place[l + i] : l + i] = left.lane[i];
    }
  }
}

// A quad of neighbours at a time; kWide: they are neighbours in `out` too, and aligned.
template <int kBits, int kBlock, bool kAdd, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dequantize_kernel(const DequantizeParams p) {
  constexpr int kBytes = kQuad * kBits / 8;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t quad = (int64_t(blockIdx.x) * kSteps + step) * kThreads + threadIdx.x;
    const int64_t l = quad * kQuad;
    if (l >= p.L) return;
    const uint8_t* __restrict__ from = p.code + l * kBits / 8;
    const bool whole = kWide && l + kQuad <= p.L;
    Vector<uint8_t, kBytes> code = {};
    if (whole) {
      code = *reinterpret_cast<const Vector<uint8_t, kBytes>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes; ++i) {
        if (l + i * 8 / kBits < p.L) code.lane[i] = from[i];
      }
    }
    const int64_t block = l / kBlock;
    const float scale = kBlock == 64 ? to_float(static_cast<const __half*>(p.scale)[block])
                                     : static_cast<const float*>(p.scale)[block];
    Vector<float, kQuad> value;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int byte = code.lane[i * kBits / 8];
      const int q = kBits == 8 ? int8_t(byte) : ((i & 1 ? byte >> 4 : byte & 15) ^ 8) - 8;
      value.lane[i] = __fmul_rn(float(q), scale);
      if (kAdd) value.lane[i] = __fmul_rn(value.lane[i], p.weight);
    }
    if (whole) {
      auto* out = reinterpret_cast<Vector<float, kQuad>*>(p.out + l);
      if (kAdd) {
        const Vector<float, kQuad> old = *out;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) value.lane[i] = __fadd_rn(old.lane[i], value.lane[i]);
      }
      *out = value;
      continue;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (l + i >= p.L) break;
      const int64_t at = p.place != nullptr ? p.place[l + i] : l + i;
      if (at < 0) continue;
      p.out[at] = kAdd ? __fadd_rn(p.out[at], value.lane[i]) : value.lane[i];
    }
  }
}

template <typename Float, int kBits, int kBlock>
cudaError_t quantize_as(const QuantizeParams& p, cudaStream_t stream) {
  const bool wide = p.place == nullptr && aligned(p.x, kQuad * sizeof(Float)) &&
                    aligned(p.residual, kVectorBytes) && aligned(p.left, kVectorBytes);
  constexpr int kTiles = kThreads / kWarp;
  return launch(wide ? &quantize_kernel<Float, kBits, kBlock, true>
                     : &quantize_kernel<Float, kBits, kBlock, false>,
                ceil_div(p.L, kTile * kTiles), 1, dim3(kWarp, kTiles), stream,
                Encoder{p, philox_key(p.seed, p.step)});
}

template <typename Float>
cudaError_t quantize_from(const QuantizeParams& p, cudaStream_t stream) {
  if (!p.format.half_scale) return quantize_as<Float, 8, 256>(p, stream);
  if (p.format.bits == 8) return quantize_as<Float, 8, 64>(p, stream);
  return quantize_as<Float, 4, 64>(p, stream);
}

template <int kBits, int kBlock, bool kAdd>
cudaError_t dequantize_as(const DequantizeParams& p, cudaStream_t stream) {
  const bool wide =
      p.place == nullptr && aligned(p.code, kQuad * kBits / 8) && aligned(p.out, kVectorBytes);
  return launch(wide ? &dequantize_kernel<kBits, kBlock, kAdd, true>
                     : &dequantize_kernel<kBits, kBlock, kAdd, false>,
                ceil_div(p.L, kQuad * kSteps * kThreads), 1, dim3(kThreads), stream, p);
}

template <bool kAdd>
cudaError_t dequantize_to(const DequantizeParams& p, cudaStream_t stream) {
  if (!p.format.half_scale) return dequantize_as<8, 256, kAdd>(p, stream);
  if (p.format.bits == 8) return dequantize_as<8, 64, kAdd>(p, stream);
  return dequantize_as<4, 64, kAdd>(p, stream);
}

}  // namespace

cudaError_t quantize(const QuantizeParams& p, cudaStream_t stream) {
  if (p.L == 0) return cudaSuccess;  // an empty grid is a launch error
  switch (p.dtype) {
    case DType::kFloat32: return quantize_from<float>(p, stream);
    case DType::kBFloat16: return quantize_from<__nv_bfloat16>(p, stream);
    case DType::kFloat16: return quantize_from<__half>(p, stream);
    case DType::kFloat64:
    case DType::kInt32: return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream) {
  if (p.L == 0) return cudaSuccess;
  return p.add ? dequantize_to<true>(p, stream) : dequantize_to<false>(p, stream);
}

}  // namespace gose::cuda
