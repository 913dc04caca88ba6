// Memory that notices who leaves it, and numbers of every storage type in it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "params.h"

namespace driver {

using gose::DType;

template <class... Parts>
[[noreturn]] void fail(const char* format, Parts... parts) {
  std::printf("FAILED: ");
  std::printf(format, parts...);
  std::printf("\n");
  std::exit(1);
}

// `bytes` bytes that begin at a cache line and end at most 63 bytes before a page that nobody may
// touch; another such page stands before them. What lies between holds a pattern. All bytes are
// set: read before it was written, memory is NaN in every storage type.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    inner_ = (bytes + 63) / 64 * 64;
    inner_ = (inner_ + page - 1) / page * page + page;  // one page of pattern at least
    mapped_ = inner_ + 2 * page;
    void* at = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) fail("no memory");
    begin_ = static_cast<unsigned char*>(at) + page;
    if (mprotect(begin_, inner_, PROT_READ | PROT_WRITE) != 0) fail("no memory");
    std::memset(begin_, kPattern, inner_);
    data_ = begin_ + inner_ - (bytes + 63) / 64 * 64;
    std::memset(data_, 0xff, bytes);
  }
  ~Guarded() {
    check();
    munmap(begin_ - sysconf(_SC_PAGESIZE), mapped_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class Type = char>
  Type* data() const {
    return reinterpret_cast<Type*>(data_);
  }
  int64_t bytes() const { return bytes_; }

  void check() const {
    for (unsigned char* at = begin_; at < begin_ + inner_; ++at) {
      if (at == data_) at += bytes_;
      if (at < begin_ + inner_ && *at != kPattern) fail("byte %ld was written", long(at - data_));
    }
  }

 private:
  static constexpr int kPattern = 0xa5;
  int64_t bytes_, inner_, mapped_;
  unsigned char *begin_, *data_;
};

// [0, 2^53): splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) >> 11;
  }
  double uniform() { return double(bits()) * 0x1p-53; }
  double centered() { return 2 * uniform() - 1; }
  int64_t below(int64_t end) { return int64_t(bits() % uint64_t(end)); }

 private:
  uint64_t state_;
};

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// Number x as a 16-bit float of `mantissa` bits, rounded to nearest even; no infinities.
inline uint16_t encode(double x, int mantissa) {
  const int exponents = 15 - mantissa, bias = (1 << (exponents - 1)) - 1;
  int exponent;
  std::frexp(x, &exponent);
  const int biased = exponent - 1 + bias < 1 ? 1 : exponent - 1 + bias;
  const double steps = std::nearbyint(std::ldexp(std::fabs(x), bias - biased + mantissa));
  // A carry of the mantissa goes on into the exponent, and a subnormal has none.
  const uint64_t bits = uint64_t(steps) + (uint64_t(biased - 1) << mantissa);
  return uint16_t(bits | (x < 0 ? 0x8000u : 0u));
}

inline double decode(uint16_t bits, int mantissa) {
  const int exponents = 15 - mantissa, bias = (1 << (exponents - 1)) - 1;
  const int biased = (bits & 0x7fff) >> mantissa, rest = bits & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (biased == (1 << exponents) - 1) return rest ? NAN : sign * INFINITY;
  if (biased == 0) return sign * std::ldexp(rest, 1 - bias - mantissa);
  return sign * std::ldexp(rest + (1 << mantissa), biased - bias - mantissa);
}

// Numbers of one storage type in guarded memory.
class Numbers {
 public:
  Numbers(DType dtype, int64_t count)
      : dtype_(dtype), count_(count), memory_(count * size_of(dtype)) {}

  Numbers(DType dtype, int64_t count, Random& random, double scale = 1) : Numbers(dtype, count) {
    for (int64_t i = 0; i < count; ++i) set(i, scale * random.centered());
  }

  int mantissa() const { return dtype_ == DType::kBFloat16 ? 7 : 10; }
  void set(int64_t i, double x) {
    if (dtype_ == DType::kFloat32) {
      memory_.data<float>()[i] = float(x);
    } else {
      memory_.data<uint16_t>()[i] = encode(x, mantissa());
    }
  }
  double operator[](int64_t i) const {
    if (dtype_ == DType::kFloat32) return memory_.data<float>()[i];
    return decode(memory_.data<uint16_t>()[i], mantissa());
  }
  void* data() const { return memory_.data<void>(); }
  const Guarded& memory() const { return memory_; }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }

 private:
  DType dtype_;
  int64_t count_;
  Guarded memory_;
};

// FNV-1a of all bytes since the last line.
class Checksum {
 public:
  void add(const Guarded& memory) {
    for (int64_t i = 0; i < memory.bytes(); ++i) {
      sum_ = (sum_ ^ memory.data<unsigned char>()[i]) * 0x100000001b3u;
    }
    memory.check();
  }
  void print(const char* what, const char* detail) {
    std::printf("%s %s %016llx\n", what, detail, static_cast<unsigned long long>(sum_));
    sum_ = kStart;
  }

 private:
  static constexpr uint64_t kStart = 0xcbf29ce484222325u;
  uint64_t sum_ = kStart;
};

// The error rule of a chain of products, relative L2 error by storage type, twice: in tensors this
// small the roundings do not average out. One element may have eight times the error of all.
inline void check_chain(const char* what, const Numbers& got, const std::vector<double>& want) {
  const double rule = got.dtype() == DType::kFloat32    ? 1e-6
                      : got.dtype() == DType::kBFloat16 ? 2.6e-3
                                                        : 2.6e-3 / 8;
  double error = 0, size = 0;
  for (int64_t i = 0; i < got.count(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  const double rms = std::sqrt(size / double(got.count() + 1));
  if (!(std::sqrt(error) <= 2 * rule * std::sqrt(size))) {
    fail("%s: relative error %g", what, std::sqrt(error / size));
  }
  for (int64_t i = 0; i < got.count(); ++i) {
    if (!(std::fabs(got[i] - want[i]) <= 8 * rule * (std::fabs(want[i]) + rms))) {
      fail("%s: element %ld is %.9g, not %.9g", what, long(i), got[i], want[i]);
    }
  }
}

}  // namespace driver
