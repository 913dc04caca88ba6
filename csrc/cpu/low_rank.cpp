// low_rank: three passes over y = x + residual, which is never written: y @ q, y^T @ p and what the
// product leaves; between them an orthonormal basis by Householder reflections, which completes
// itself where columns are missing. Factors are kept by columns, [R, ...], padded with zeros.
#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

constexpr int64_t kRows = 4, kColumns = 1024;  // of y that are staged for y @ q: 16 KB
constexpr int64_t kStripe = 128, kDeep = 32;   // columns and rows for y^T @ p: 16 KB
constexpr int64_t kTile = 4;                   // columns of a factor at a time

// y[m, n .. n + kLanes), zeros past the end.
template <class Float>
inline vf load_y(const LowRankParams& p, int64_t m, int64_t n) {
  const Float* x = static_cast<const Float*>(p.x) + m * p.stride_xm + n;
  const float* residual = p.residual == nullptr ? nullptr : p.residual + m * p.N + n;
  if (n + kLanes <= p.N) return residual == nullptr ? load(x) : load(x) + load(residual);
  if (n >= p.N) return vf{};
  const vf value = load_some(x, p.N - n, 0.f);
  return residual == nullptr ? value : value + load_some(residual, p.N - n, 0.f);
}

// image[r, m] = sum_n y[m, n] * q[r, n], and the first element of y that is not finite.
template <class Float>
void image_rows(const LowRankParams& p, int64_t begin, int64_t end) {
  float y[kRows][kColumns];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRows, count = p.M - first < kRows ? p.M - first : kRows;
    p.bad[block] = {-1, 0.f};
    for (int64_t start = 0; start < p.padded_N; start += kColumns) {
      const int64_t width = p.padded_N - start < kColumns ? p.padded_N - start : kColumns;
      for (int64_t i = 0; i < kRows; ++i) {
        vi worst = {};
        for (int64_t n = 0; n < width; n += kLanes) {
          const vf value = i < count ? load_y<Float>(p, first + i, start + n) : vf{};
          worst = max(worst, (vi)value & 0x7fffffff);
          store(y[i] + n, value);
        }
        if (highest_lane(worst) < 0x7f800000 || p.bad[block].element >= 0) continue;
        int64_t n = 0;
        while ((bits_of(y[i][n]) & 0x7fffffffu) < 0x7f800000u) ++n;
        p.bad[block] = {(first + i) * p.N + start + n, y[i][n]};
      }
      for (int64_t r = 0; r < p.padded_R; r += kTile) {
        vf total[kRows][kTile] = {};
        for (int64_t n = 0; n < width; n += kLanes) {
          for (int i = 0; i < kRows; ++i) {
            const vf value = load(y[i] + n);
            for (int j = 0; j < kTile; ++j) {
              total[i][j] += value * load(p.q + (r + j) * p.padded_N + start + n);
            }
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          for (int j = 0; j < kTile; ++j) {
            double& out = p.image[(r + j) * p.padded_M + first + i];
            if (start == 0) out = 0;
            for (int k = 0; k < kLanes; ++k) out += double(total[i][j][k]);
          }
        }
      }
    }
  }
}

// In double: the basis carries the errors of an ill-conditioned image into the whole matrix.
inline double dot(const double* a, const double* b, int64_t begin, int64_t end) {
  double part[8] = {};
  for (; begin + 8 <= end; begin += 8) {
    for (int i = 0; i < 8; ++i) part[i] += a[begin + i] * b[begin + i];
  }
  for (; begin < end; ++begin) part[0] += a[begin] * b[begin];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// The reflection 1 - beta * v v^T of columns [begin, end), from element j on.
void reflect(const LowRankParams& p, const Parallel& threads, int64_t j, int64_t begin) {
  const double* v = p.reflect + j * p.padded_M;
  const double beta = p.beta[j];
  const int64_t M = p.M, grain = 1 + (int64_t{1} << 15) / M;
  parallel_for(threads, p.R - begin, grain, [&](int64_t first, int64_t stop) {
    for (int64_t k = begin + first; k < begin + stop; ++k) {
      double* column = p.image + k * p.padded_M;
      const double factor = beta * dot(v, column, j, M);
      for (int64_t m = j; m < M; ++m) column[m] -= factor * v[m];
    }
  });
}

// The image becomes an orthonormal basis of its columns.
void orthonormalize(const LowRankParams& p, const Parallel& threads) {
  const int64_t M = p.M, stride = p.padded_M;
  for (int64_t j = 0; j < p.R; ++j) {
    const double* column = p.image + j * stride;
    double* v = p.reflect + j * stride;
    const double norm = __builtin_sqrt(dot(column, column, j, M));
    p.beta[j] = 0;
    if (norm == 0) continue;
    for (int64_t m = j; m < M; ++m) v[m] = column[m] / norm;
    v[j] += v[j] < 0 ? -1 : 1;
    p.beta[j] = 2 / dot(v, v, j, M);
    reflect(p, threads, j, j + 1);
  }
  for (int64_t j = p.R - 1; j >= 0; --j) {
    double* own = p.image + j * stride;
    for (int64_t m = 0; m < M; ++m) own[m] = m == j ? 1 : 0;
    reflect(p, threads, j, j);
  }
  for (int64_t r = 0; r < p.R; ++r) {
    for (int64_t m = 0; m < M; ++m) {
      p.p_RM[r * stride + m] = p.p_MR[m * p.R + r] = float(p.image[r * stride + m]);
    }
  }
}

// q[r, n] = sum_m y[m, n] * p[m, r], in stripes of columns.
template <class Float>
void refine_stripes(const LowRankParams& p, int64_t begin, int64_t end) {
  float y[kDeep][kStripe];
  for (int64_t stripe = begin; stripe < end; ++stripe) {
    const int64_t start = stripe * kStripe;
    const int64_t width = p.padded_N - start < kStripe ? p.padded_N - start : kStripe;
    for (int64_t first = 0; first < p.M; first += kDeep) {
      const int64_t deep = p.M - first < kDeep ? p.M - first : kDeep;
      for (int64_t i = 0; i < deep; ++i) {
        for (int64_t n = 0; n < width; n += kLanes) {
          store(y[i] + n, load_y<Float>(p, first + i, start + n));
        }
      }
      for (int64_t r = 0; r < p.padded_R; r += kTile) {
        for (int64_t n = 0; n < width; n += 2 * kLanes) {
          vf total[kTile][2] = {};
          for (int64_t i = 0; i < deep; ++i) {
            const vf left = load(y[i] + n), right = load(y[i] + n + kLanes);
            for (int j = 0; j < kTile; ++j) {
              const float factor = p.p_RM[(r + j) * p.padded_M + first + i];
              total[j][0] += left * factor;
              total[j][1] += right * factor;
            }
          }
          for (int j = 0; j < kTile; ++j) {
            for (int v = 0; v < 2; ++v) {
              float* out = p.q + (r + j) * p.padded_N + start + n + v * kLanes;
              store(out, first == 0 ? total[j][v] : load(out) + total[j][v]);
            }
          }
        }
      }
    }
    for (int64_t n = start; n < start + width && n < p.N; ++n) {
      for (int64_t r = 0; r < p.R; ++r) p.q_NR[n * p.R + r] = p.q[r * p.padded_N + n];
    }
  }
}

// left[m, n] = y[m, n] - sum_r p[m, r] * q[r, n].
template <class Float>
void left_rows(const LowRankParams& p, int64_t begin, int64_t end) {
  for (int64_t start = 0; start < p.N; start += kColumns) {  // of q, which stay in cache
    const int64_t stop = p.N - start < kColumns ? p.N : start + kColumns;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, count = p.M - first < kRows ? p.M - first : kRows;
      for (int64_t n = start; n < stop; n += kLanes) {
        vf value[kRows] = {};
        for (int64_t i = 0; i < count; ++i) value[i] = load_y<Float>(p, first + i, n);
        for (int64_t r = 0; r < p.R; ++r) {
          const vf factor = load(p.q + r * p.padded_N + n);
          const float* of_row = p.p_RM + r * p.padded_M + first;  // padded beyond M
          for (int i = 0; i < kRows; ++i) value[i] -= factor * of_row[i];
        }
        for (int64_t i = 0; i < count; ++i) store_row(p.left + (first + i) * p.N, p.N, n, value[i]);
      }
    }
  }
}

template <class Float>
void run(const LowRankParams& p, const Parallel& threads) {
  const int64_t blocks = (p.M + kRows - 1) / kRows, stripes = (p.padded_N + kStripe - 1) / kStripe;
  const int64_t grain = grain_of(4 * kRows * p.N);
  parallel_for(threads, blocks, grain,
               [&p](int64_t begin, int64_t end) { image_rows<Float>(p, begin, end); });
  for (int64_t block = 0; block < blocks; ++block) {
    if (p.bad[block].element >= 0) return;  // the binding raises
  }
  orthonormalize(p, threads);
  parallel_for(threads, stripes, grain_of(4 * kStripe * p.M),
               [&p](int64_t begin, int64_t end) { refine_stripes<Float>(p, begin, end); });
  if (p.left == nullptr) return;
  parallel_for(threads, blocks, grain,
               [&p](int64_t begin, int64_t end) { left_rows<Float>(p, begin, end); });
}

}  // namespace

void low_rank(const LowRankParams& p, const Parallel& threads) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, threads);
    case DType::kBFloat16: return run<bf16>(p, threads);
    case DType::kFloat16: return run<fp16>(p, threads);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace gose::cpu::GOSE_LEVEL
