// The CPU kernels without torch: every op on fixed inputs against its formula in float64, by plain
// loops. Prints the level and a checksum per op; the first difference ends the program with 1.
#include <algorithm>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/microgemm.h"
#include "guarded.h"

namespace driver {

using namespace gose;

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr int64_t kPanel = cpu::kPanel;

Checksum checksum;

// Pieces of the grain in descending order: whoever counts on another order, or on one piece, fails.
const cpu::Parallel kPieces = {
    [](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
      const int64_t pieces = (count + grain - 1) / grain;
      for (int64_t i = pieces - 1; i >= 0; --i) {
        body(i * grain, std::min(count, (i + 1) * grain), context);
      }
    }};
constexpr int64_t kThreads = 3;

int64_t round_up(int64_t x) { return (x + kPanel - 1) / kPanel * kPanel; }

template <class Type>
class Array {  // of integers, or of floats that are not converted
 public:
  explicit Array(int64_t count) : count_(count), memory_(count * int64_t(sizeof(Type))) {}
  Type& operator[](int64_t i) { return memory_.data<Type>()[i]; }
  const Type& operator[](int64_t i) const { return memory_.data<Type>()[i]; }
  Type* data() const { return memory_.data<Type>(); }
  const Guarded& memory() const { return memory_; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  Guarded memory_;
};

// ---- micro-kernels ---------------------------------------------------------------------------

// Where element (k, c) of a panel stands (microgemm.h).
int64_t panel_index(DType dtype, int64_t k, int64_t c) {
  return dtype == DType::kBFloat16 ? (k / 2 * kPanel + c) * 2 + k % 2 : k * kPanel + c;
}

void check_gemm(const cpu::MicroGemm& gemm, DType dtype, int64_t rows, int64_t K) {
  Random random(rows * 1000 + K);
  const DType row_type = gemm.bf16_rows ? DType::kBFloat16 : DType::kFloat32;
  const int64_t width = K + 96 / size_of(row_type);  // NaN between the rows
  Numbers a(row_type, (rows - 1) * width + K), panel(dtype, K * kPanel, random);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      a.set(r * width + k, dtype == DType::kFloat16 ? float(random.centered()) : random.centered());
    }
  }
  Array<float> c(rows * kPanel);
  gemm.run(a.data(), width * size_of(row_type), int32_t(rows), panel.data(), K, c.data(),
           static_cast<const char*>(panel.data()), K * kPanel * size_of(dtype) / 64);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t column = 0; column < kPanel; ++column) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double term = a[r * width + k] * panel[panel_index(dtype, k, column)];
        sum += term, size += std::fabs(term);
      }
      // One rounding per addition, and one of the product where it is not fused.
      const double allowed = double(K + 2) * 0x1p-24 * size;
      const double got = c[r * kPanel + column];
      if (!(std::fabs(got - sum) <= allowed)) {
        fail("%s, %ld rows, K %ld: c[%ld][%ld] is %.9g, not %.9g", gemm.name, long(rows), long(K),
             long(r), long(column), got, sum);
      }
    }
  }
  a.memory().check(), panel.memory().check();
  checksum.add(c.memory());
}

// A row's bits do not depend on the rows beside it, whatever these hold.
void check_rows_apart(const cpu::MicroGemm& gemm, DType dtype, int64_t rows) {
  constexpr int64_t K = 96;
  Random random(7);
  const DType row_type = gemm.bf16_rows ? DType::kBFloat16 : DType::kFloat32;
  Numbers one(row_type, K, random), panel(dtype, K * kPanel, random);
  Array<float> alone(kPanel);
  gemm.run(one.data(), K * size_of(row_type), 1, panel.data(), K, alone.data(), nullptr, 0);
  for (int64_t r = 0; r < rows; ++r) {
    Numbers many(row_type, rows * K);  // NaN
    for (int64_t k = 0; k < K; ++k) many.set(r * K + k, one[k]);
    Array<float> c(rows * kPanel);
    gemm.run(many.data(), K * size_of(row_type), int32_t(rows), panel.data(), K, c.data(), nullptr,
             0);
    for (int64_t i = 0; i < rows * kPanel; ++i) {
      const bool mine = i / kPanel == r;
      if (mine ? std::memcmp(&c[i], &alone[i % kPanel], 4) != 0 : c[i] == c[i]) {
        fail("%s: row %ld of %ld changes with its neighbours", gemm.name, long(r), long(rows));
      }
    }
  }
}

void micro_kernels() {
  for (DType dtype : kTypes) {
    const cpu::MicroGemm& gemm = cpu::micro_gemm(dtype);
    if (gemm.rows > cpu::kMostRows) fail("%s: %d rows", gemm.name, gemm.rows);
    for (int64_t rows = 1; rows <= gemm.rows; ++rows) {
      for (int64_t K : {0, 32, 96, 128, 160, 288}) check_gemm(gemm, dtype, rows, K);
    }
    for (int64_t rows : {1, 2, 15, 16, 17, 33, 48}) {
      if (rows <= gemm.rows) check_rows_apart(gemm, dtype, rows);
    }
    checksum.print("micro-kernel", gemm.name);
  }
}

// ---- pack ------------------------------------------------------------------------------------

struct Weights {  // [E, columns, K], transposed: [E, K, columns]
  int64_t E, columns, K;
  bool transposed;
  Numbers values;
  std::vector<double> exact;  // what the values became, where they are quantized

  Weights(DType dtype, int64_t E, int64_t columns, int64_t K, bool transposed, Random& random)
      : E(E),
        columns(columns),
        K(K),
        transposed(transposed),
        values(dtype, E * columns * K, random, 1 / std::sqrt(double(K + 1))) {}

  int64_t stride_c() const { return transposed ? 1 : K; }
  int64_t stride_k() const { return transposed ? columns : 1; }
  int64_t index(int64_t e, int64_t c, int64_t k) const {
    return e * columns * K + c * stride_c() + k * stride_k();
  }
  double at(int64_t e, int64_t c, int64_t k) const {
    return exact.empty() ? values[index(e, c, k)] : exact[index(e, c, k)];
  }
};

int64_t packed_columns(const Weights& w, bool gated) {
  return gated ? 2 * round_up(w.columns / 2) : round_up(w.columns);
}
int64_t packed_bytes(const Weights& w, bool gated) {
  return packed_columns(w, gated) * round_up(w.K) * size_of(w.values.dtype());
}

PackParams place_of(const Weights& w, bool gated, bool interleaved, char* to, int64_t stride) {
  return {.w = w.values.data(),
          .packed = to,
          .E = w.E,
          .columns = w.columns,
          .K = w.K,
          .stride_we = w.columns * w.K,
          .stride_wc = w.stride_c(),
          .stride_wk = w.stride_k(),
          .stride_packed = stride,
          .gated = gated,
          .interleaved = interleaved,
          .dtype = w.values.dtype()};
}

void pack(const Weights& w, bool gated, bool interleaved, char* to, int64_t stride) {
  cpu::kernels().pack(place_of(w, gated, interleaved, to, stride), kPieces);
}

// The column of w that stands in this one of the panels; from w.columns on there is none.
int64_t source_column(const Weights& w, bool gated, bool interleaved, int64_t column) {
  if (!gated) return column;
  const int64_t units = w.columns / 2, unit = column / kPanel * 16 + column % 16;
  const int64_t up = column % kPanel / 16;
  return unit >= units ? w.columns : interleaved ? 2 * unit + up : up * units + unit;
}

void check_pack(const Weights& w, bool gated, bool interleaved) {
  const DType dtype = w.values.dtype();
  const int64_t size = size_of(dtype), steps = round_up(w.K), bytes = packed_bytes(w, gated);
  Guarded packed(w.E * bytes);
  pack(w, gated, interleaved, packed.data(), bytes);
  for (int64_t e = 0; e < w.E; ++e) {
    for (int64_t column = 0; column < packed_columns(w, gated); ++column) {
      const int64_t from = source_column(w, gated, interleaved, column);
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t place =
            column / kPanel * steps * kPanel + panel_index(dtype, k, column % kPanel);
        const char* got = packed.data() + e * bytes + place * size;
        const char* want = "\0\0\0\0";
        if (from < w.columns && k < w.K) {
          want = static_cast<const char*>(w.values.data()) + w.index(e, from, k) * size;
        }
        if (std::memcmp(got, want, size) != 0) {
          fail("pack %s: expert %ld, column %ld, k %ld", name_of(dtype), long(e), long(column),
               long(k));
        }
      }
    }
  }
  checksum.add(packed);
}

void packs() {
  for (DType dtype : kTypes) {
    for (bool transposed : {false, true}) {
      for (int64_t columns : {2, 34, 100}) {
        for (int64_t K : {1, 37, 130, 288}) {
          Random random(columns + K);
          const Weights w(dtype, 2, columns, K, transposed, random);
          check_pack(w, false, false);
          check_pack(w, true, false);
          check_pack(w, true, true);
        }
      }
    }
    checksum.print("pack", name_of(dtype));
  }
}

// ---- quantized weights -----------------------------------------------------------------------

using Kind = gose::Weights;
constexpr Kind kKinds[] = {Kind::kInt8, Kind::kInt4};
const char* name_of(Kind kind) { return kind == Kind::kInt8 ? "int8" : "int4"; }

// Bytes of the panels before the float32 scales of their columns.
int64_t integer_bytes(Kind kind, int64_t K) { return kind == Kind::kInt8 ? 32 * K : 18 * K; }
int64_t quantized_bytes(const Weights& w, bool gated, Kind kind) {
  const int64_t panel = integer_bytes(kind, round_up(w.K)) + 128;
  return packed_columns(w, gated) / kPanel * panel;
}

// One weight: a level of the int8 or int4 integers, times a scale.
struct Value {
  double level, scale;
  double number() const { return level * scale; }
};

constexpr int kLevels[16] = {-30, -24, -20, -16, -12, -8, -5, -2, 0, 3, 6, 9, 12, 16, 20, 26};

Value value_at(const char* panel, Kind kind, int64_t K, int64_t k, int64_t c) {
  float r;
  std::memcpy(&r, panel + integer_bytes(kind, K) + 4 * c, 4);
  if (kind == Kind::kInt8) return {double(int8_t(panel[k * kPanel + c])), r};
  const char* steps = panel + k / 32 * 576;
  uint32_t word;
  std::memcpy(&word, steps + k % 32 / 8 * 128 + 4 * c, 4);
  const int code = uint8_t(steps[512 + k % 32 / 16 * 32 + c]);
  const double s = std::ldexp(1 + (code & 7) / 8., ((code & 127) >> 3) - 7);
  return {double(kLevels[word >> (k % 2 * 16 + k % 8 / 2 * 4) & 15]), r * (code & 128 ? -s : s)};
}

void check_quantized_gemm(const cpu::MicroGemm& gemm, Kind kind, int64_t rows, int64_t K) {
  Random random(rows * 1000 + K);
  const DType row_type = gemm.bf16_rows ? DType::kBFloat16 : DType::kFloat32;
  const int64_t width = K + 96 / size_of(row_type), integers = integer_bytes(kind, K);
  Numbers a(row_type, (rows - 1) * width + K);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < K; ++k) a.set(r * width + k, random.centered());
  }
  const Guarded panel(integers + 128);
  for (int64_t i = 0; i < integers; ++i) {
    const bool scale = kind == Kind::kInt4 && i % 576 >= 512;  // a normal float8_e4m3fn
    panel.data()[i] =
        char(scale ? 8 + random.below(119) + 128 * random.below(2) : random.below(256));
  }
  for (int64_t c = 0; c < kPanel; ++c) {
    const float r = float(random.uniform());
    std::memcpy(panel.data() + integers + 4 * c, &r, 4);
  }
  Array<float> sums(rows * kPanel);
  gemm.run(a.data(), width * size_of(row_type), int32_t(rows), panel.data(), K, sums.data(),
           panel.data(), panel.bytes() / 64);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < kPanel; ++c) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double term = a[r * width + k] * value_at(panel.data(), kind, K, k, c).number();
        sum += term, size += std::fabs(term);
      }
      const double got = sums[r * kPanel + c];
      if (!(std::fabs(got - sum) <= double(K + 6) * 0x1p-24 * size)) {
        fail("%s, %ld rows, K %ld: c[%ld][%ld] is %.9g, not %.9g", gemm.name, long(rows), long(K),
             long(r), long(c), got, sum);
      }
    }
  }
  a.memory().check(), panel.check();
  checksum.add(sums.memory());
}

void quantized_micro_kernels() {
  for (Kind kind : kKinds) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      const cpu::MicroGemm& gemm = cpu::micro_gemm(dtype, kind);
      if (gemm.rows > cpu::kMostRows) fail("%s: %d rows", gemm.name, gemm.rows);
      for (int64_t rows = 1; rows <= gemm.rows; ++rows) {
        for (int64_t K : {0, 32, 96, 160, 288}) check_quantized_gemm(gemm, kind, rows, K);
      }
      checksum.print("micro-kernel", gemm.name);
    }
  }
}

// Packs as integers, checks that each is the nearest, and has `exact` hold what they stand for.
void quantize(Weights& w, bool gated, bool interleaved, Kind kind, char* to, int64_t stride) {
  const int64_t K = round_up(w.K), panels = packed_columns(w, gated) / kPanel;
  const Guarded scratch(kThreads * 8 * kPanel * K);
  Array<uint8_t> infinite(w.E);
  std::memset(infinite.data(), 0, w.E);
  cpu::kernels().quantize_weights({.pack = place_of(w, gated, interleaved, to, stride),
                                   .weights = kind,
                                   .scratch = scratch.data(),
                                   .threads = kThreads,
                                   .infinite = infinite.data()},
                                  kPieces);
  w.exact.assign(w.E * w.columns * w.K, NAN);
  for (int64_t e = 0; e < w.E; ++e) {
    if (infinite[e] != 0) fail("quantize: expert %ld is finite", long(e));
    for (int64_t column = 0; column < panels * kPanel; ++column) {
      const int64_t from = source_column(w, gated, interleaved, column);
      const char* panel = to + e * stride + column / kPanel * (integer_bytes(kind, K) + 4 * kPanel);
      for (int64_t k = 0; k < K; ++k) {
        const Value value = value_at(panel, kind, K, k, column % kPanel);
        const bool real = from < w.columns && k < w.K;
        const double wanted = real ? w.values[w.index(e, from, k)] : 0;
        const double miss = std::fabs(value.number() - wanted);
        bool nearest = real || value.number() == 0;
        // The neighbours of an int8, all levels of an int4.
        for (int i = 0; i < (kind == Kind::kInt8 ? 2 : 16); ++i) {
          const double level = kind == Kind::kInt8 ? value.level + 2 * i - 1 : kLevels[i];
          nearest &= miss <= std::fabs(level * value.scale - wanted) * (1 + 1e-4) + 1e-30;
        }
        if (!nearest) {
          fail("quantize %s: expert %ld, column %ld, k %ld", name_of(kind), long(e), long(column),
               long(k));
        }
        if (real) w.exact[w.index(e, from, k)] = value.number();
      }
    }
  }
}

void quantizes() {
  for (Kind kind : kKinds) {
    for (DType dtype : kTypes) {
      for (bool transposed : {false, true}) {
        Random random(17);
        Weights w(dtype, 2, 70, 77, transposed, random);
        for (bool interleaved : {false, true}) {
          const int64_t bytes = quantized_bytes(w, true, kind);
          const Guarded packed(w.E * bytes);
          quantize(w, true, interleaved, kind, packed.data(), bytes);
          checksum.add(packed);
        }
      }
      checksum.print(name_of(kind), name_of(dtype));
    }
  }
}

// ---- routing ---------------------------------------------------------------------------------

struct Plan {
  Array<int32_t> row, token, offset;

  Plan(const Array<int32_t>& expert, int64_t T, int64_t K, int64_t E)
      : row(T * K), token(T * K), offset(E + 1) {
    constexpr int64_t kChunk = 16;
    Array<int32_t> scratch((T * K + kChunk - 1) / kChunk * (E + 1));
    cpu::kernels().dispatch({.expert = expert.data(),
                             .row = row.data(),
                             .token = token.data(),
                             .offset = offset.data(),
                             .scratch = scratch.data(),
                             .T = T,
                             .K = K,
                             .E = E,
                             .chunk = kChunk},
                            kPieces);
    int32_t n = 0;
    for (int64_t e = 0; e < E; ++e) {
      if (offset[e] != n) fail("dispatch: offset of expert %ld", long(e));
      for (int64_t slot = 0; slot < T * K; ++slot) {
        if (expert[slot] != e) continue;
        if (row[slot] != n || token[n] != slot / K) fail("dispatch: slot %ld", long(slot));
        ++n;
      }
    }
    if (offset[E] != n) fail("dispatch: %d rows, not %d", offset[E], n);
    for (int64_t slot = 0; slot < T * K; ++slot) {
      if (expert[slot] == E && row[slot] != -1) fail("dispatch: unused slot %ld", long(slot));
    }
    for (int64_t i = n; i < T * K; ++i) {
      if (token[i] != -1) fail("dispatch: row %ld is no row", long(i));
    }
    checksum.add(row.memory()), checksum.add(token.memory()), checksum.add(offset.memory());
  }
};

// Experts in [0, E], E = unused; every seventh token has none.
void draw_experts(int64_t K, int64_t E, Random& random, Array<int32_t>& expert) {
  for (int64_t slot = 0; slot < expert.count(); ++slot) {
    expert[slot] = int32_t(slot / K % 7 == 6 ? E : random.below(E + 1));
  }
}

void dispatches() {
  Random random(3);
  for (int64_t T : {0, 1, 37}) {
    Array<int32_t> expert(T * 3);
    draw_experts(3, 5, random, expert);
    const Plan plan(expert, T, 3, 5);
  }
  checksum.print("dispatch", "int32");
}

// Entropy of softmax(logits), over the logarithm of the number of classes that are offered.
double entropy_of(const std::vector<double>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double total = 0, sum = 0;
  int64_t offered = 0;
  for (double x : logits) {
    if (x == -INFINITY) continue;
    ++offered, total += std::exp(x - top), sum += std::exp(x - top) * (x - top);
  }
  return offered < 2 ? 0 : (std::log(total) - sum / total) / std::log(double(offered));
}

void entropies() {
  constexpr int64_t kRows = 9, kClasses = 37;
  for (DType dtype : kTypes) {
    Random random(5);
    Numbers logits(dtype, kRows * kClasses, random, 6);
    Array<float> out(kRows);
    cpu::kernels().entropy({logits.data(), out.data(), kRows, kClasses, dtype}, kPieces);
    for (int64_t row = 0; row < kRows; ++row) {
      std::vector<double> of_row;
      for (int64_t c = 0; c < kClasses; ++c) of_row.push_back(logits[row * kClasses + c]);
      const double want = entropy_of(of_row);
      if (!(std::fabs(out[row] - want) <= 1e-6)) {
        fail("entropy: %.9g, not %.9g", double(out[row]), want);
      }
    }
    checksum.add(out.memory());
    checksum.print("entropy", name_of(dtype));
  }
}

void routes() {
  constexpr int64_t T = 130, E = 19, K = 3, kPadded = 32;
  const int64_t blocks = (T + kRouteBlock - 1) / kRouteBlock;
  for (DType dtype : kTypes) {
    Random random(11);
    Numbers score(dtype, T * E, random, 4);
    Array<float> weight(T * K), entropy(T), importance(E), loss(5);
    Array<int32_t> expert(T * K), load(E);
    Array<float> floats(blocks * kRouteRows * kPadded), column(2 * kPadded);
    Array<int32_t> ints(blocks * kRouteCounts * kPadded);
    Array<double> doubles(blocks * 3);
    std::memset(ints.data(), 0, ints.memory().bytes());
    RouteParams p = {};
    p.in.score = score.data();
    p.in.T = T, p.in.E = E, p.in.K = K, p.in.stride_st = E;
    p.in.num_groups = p.in.top_groups = 1;
    p.in.policy = RoutePolicy::kSoftmax, p.in.sum = RouteSum::kChosen;
    p.in.dtype = dtype;
    p.weight = weight.data(), p.expert = expert.data(), p.entropy = entropy.data();
    p.load = load.data(), p.importance = importance.data(), p.loss = loss.data();
    p.scratch = {floats.data(), ints.data(), doubles.data(), column.data(), nullptr, nullptr};
    cpu::kernels().route(p, kPieces);
    std::vector<int64_t> given(E);
    for (int64_t t = 0; t < T; ++t) {
      std::vector<double> of_token;
      std::vector<int64_t> order;
      for (int64_t e = 0; e < E; ++e) of_token.push_back(score[t * E + e]), order.push_back(e);
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return of_token[a] > of_token[b]; });
      double total = 0;
      for (int64_t k = 0; k < K; ++k) total += std::exp(of_token[order[k]]);
      for (int64_t k = 0; k < K; ++k) {
        const double want = std::exp(of_token[order[k]]) / total;
        if (expert[t * K + k] != order[k] || !(std::fabs(weight[t * K + k] - want) <= 1e-6)) {
          fail("route: token %ld, slot %ld", long(t), long(k));
        }
        ++given[order[k]];
      }
      if (!(std::fabs(entropy[t] - entropy_of(of_token)) <= 1e-6)) fail("route: entropy");
    }
    for (int64_t e = 0; e < E; ++e) {
      if (load[e] != given[e]) fail("route: load of expert %ld", long(e));
    }
    checksum.add(weight.memory()), checksum.add(expert.memory()), checksum.add(entropy.memory());
    checksum.add(importance.memory()), checksum.add(loss.memory());
    checksum.print("route", name_of(dtype));
  }
}

void combines() {
  constexpr int64_t T = 23, K = 3, D = 37;
  for (DType dtype : kTypes) {
    Random random(13);
    Numbers y(dtype, T * K * D, random), out(dtype, T * D);
    Array<float> weight(T * K);
    Array<int32_t> row(T * K);
    for (int64_t slot = 0; slot < T * K; ++slot) {
      row[slot] = random.below(5) == 0 ? -1 : int32_t(random.below(T * K));
      weight[slot] = row[slot] < 0 ? NAN : float(random.uniform());
    }
    cpu::kernels().combine({y.data(), weight.data(), row.data(), out.data(), T, D, K, D, dtype},
                           kPieces);
    std::vector<double> want(T * D);
    for (int64_t i = 0; i < T * K * D; ++i) {
      const int64_t slot = i / D, d = i % D;
      if (row[slot] >= 0) want[slot / K * D + d] += double(weight[slot]) * y[row[slot] * D + d];
    }
    check_chain("combine", out, want);
    checksum.add(out.memory());
    checksum.print("combine", name_of(dtype));
  }
}

// ---- expert GEMMs ----------------------------------------------------------------------------

// Scratch memory of the size that the kernel asks for, then the call itself.
template <class Params>
void run_with_scratch(void (*kernel)(const Params&, const cpu::Parallel&), Params& p) {
  int64_t bytes = -1;
  p.scratch = nullptr, p.scratch_bytes = &bytes;
  kernel(p, kPieces);
  const Guarded scratch(bytes);
  p.scratch = scratch.data();
  kernel(p, kPieces);
}

// Weights that are packed as they are read give the bits of packed ones.
void check_same(const char* what, const Guarded& packed, const Guarded& raw) {
  if (std::memcmp(packed.data(), raw.data(), packed.bytes()) != 0) fail("%s: raw weights", what);
}

void grouped_gemms() {
  constexpr int64_t N = 137, E = 5, kOffsets[E + 1] = {0, 3, 3, 20, 121, 133};
  Array<int32_t> offset(E + 1);
  for (int64_t i = 0; i <= E; ++i) offset[i] = int32_t(kOffsets[i]);
  for (DType dtype : kTypes) {
    for (int64_t D : {1, 37, 160}) {
      for (int64_t F : {1, 70}) {
        Random random(D + F);
        const int64_t stride = D + 5;
        Numbers x(dtype, N * stride - 5), bias(dtype, E * F, random), y(dtype, N * F);
        for (int64_t n = 0; n < kOffsets[E]; ++n) {
          for (int64_t d = 0; d < D; ++d) x.set(n * stride + d, random.centered());
        }
        const Weights w(dtype, E, F, D, false, random);
        const Guarded packed(E * packed_bytes(w, false));
        pack(w, false, false, packed.data(), packed_bytes(w, false));
        GroupedGemmParams p = {.x = x.data(),
                               .offset = offset.data(),
                               .w = packed.data(),
                               .raw = place_of(w, false, false, nullptr, 0),
                               .bias = {bias.data(), F, 1},
                               .y = y.data(),
                               .scratch = nullptr,
                               .scratch_bytes = nullptr,
                               .N = N,
                               .E = E,
                               .D = D,
                               .F = F,
                               .stride_xn = stride,
                               .stride_packed = packed_bytes(w, false),
                               .threads = kThreads,
                               .cache = cpu::cache_bytes(),
                               .dtype = dtype,
                               .dtype_w = dtype,
                               .dtype_y = dtype};
        run_with_scratch(cpu::kernels().grouped_gemm, p);
        std::vector<double> want(N * F);
        for (int64_t e = 0; e < E; ++e) {
          for (int64_t n = kOffsets[e]; n < kOffsets[e + 1]; ++n) {
            for (int64_t f = 0; f < F; ++f) {
              double sum = bias[e * F + f];
              for (int64_t d = 0; d < D; ++d) sum += x[n * stride + d] * w.at(e, f, d);
              want[n * F + f] = sum;
            }
          }
        }
        check_chain("grouped_gemm", y, want);
        checksum.add(y.memory());
        Numbers again(dtype, N * F);
        p.w = nullptr, p.y = again.data();
        run_with_scratch(cpu::kernels().grouped_gemm, p);
        check_same("grouped_gemm", y.memory(), again.memory());
      }
    }
    checksum.print("grouped_gemm", name_of(dtype));
  }
}

double phi_of(Phi phi, double g, double alpha) {
  switch (phi) {
    case Phi::kSilu: return g / (1 + std::exp(-alpha * g));
    case Phi::kGelu: return g * 0.5 * std::erfc(-g * M_SQRT1_2);
    case Phi::kGeluTanh:
      return 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
    case Phi::kRelu: return g > 0 ? g : 0;
    case Phi::kRelu2: return g > 0 ? g * g : 0;
  }
  return NAN;
}

struct Mlp {
  int64_t T, K, E, D, F;
  bool gated, interleaved, transposed;
  Phi phi;
  float limit, alpha, shift;

  int64_t hidden() const { return gated ? 2 * F : F; }
};

void check_mlp(const Mlp& m, DType dtype, Kind kind) {
  Random random(m.T + 10 * m.D + 100 * m.F);
  const int64_t T = m.T, K = m.K, E = m.E, D = m.D, F = m.F, H = m.hidden();
  const int64_t stride = D + 3;
  Array<int32_t> expert(T * K);
  draw_experts(K, E, random, expert);
  const Plan plan(expert, T, K, E);
  Numbers x(dtype, T * stride, random, 2), out(dtype, T * D), pre(dtype, T * K * H);
  Numbers bias_up(dtype, E * H, random), bias_down(dtype, E * D, random);
  Weights up(dtype, E, H, D, m.transposed, random), down(dtype, E, D, F, m.transposed, random);
  Array<float> weight(T * K);
  for (int64_t slot = 0; slot < T * K; ++slot) {
    weight[slot] = expert[slot] == E ? NAN : float(random.uniform());
  }
  const bool plain = kind == Kind::kPlain;
  const auto bytes_of = [&](const Weights& w, bool gated) {
    return plain ? packed_bytes(w, gated) : quantized_bytes(w, gated, kind);
  };
  const int64_t up_bytes = bytes_of(up, m.gated), bytes = up_bytes + bytes_of(down, false);
  const Guarded packed(E * bytes);
  if (plain) {
    pack(up, m.gated, m.interleaved, packed.data(), bytes);
    pack(down, false, false, packed.data() + up_bytes, bytes);
  } else {
    quantize(up, m.gated, m.interleaved, kind, packed.data(), bytes);
    quantize(down, false, false, kind, packed.data() + up_bytes, bytes);
  }
  ExpertMlpParams p = {.x = x.data(),
                       .row = plan.row.data(),
                       .token = plan.token.data(),
                       .offset = plan.offset.data(),
                       .weight = weight.data(),
                       .up = packed.data(),
                       .down = packed.data() + up_bytes,
                       .raw_up = place_of(up, m.gated, m.interleaved, nullptr, 0),
                       .raw_down = place_of(down, false, false, nullptr, 0),
                       .bias_up = {bias_up.data(), H, 1},
                       .bias_down = {bias_down.data(), D, 1},
                       .out = out.data(),
                       .pre = pre.data(),
                       .scratch = nullptr,
                       .scratch_bytes = nullptr,
                       .T = T,
                       .K = K,
                       .E = E,
                       .D = D,
                       .F = F,
                       .stride_xt = stride,
                       .stride_packed = bytes,
                       .threads = kThreads,
                       .cache = cpu::cache_bytes(),
                       .gated = m.gated,
                       .interleaved = m.interleaved,
                       .phi = m.phi,
                       .limit = m.limit,
                       .alpha = m.alpha,
                       .shift = m.shift,
                       .dtype = dtype,
                       .weights = kind};
  run_with_scratch(cpu::kernels().expert_mlp, p);
  std::vector<double> want(T * D), want_pre(T * K * H);
  for (int64_t slot = 0; slot < T * K; ++slot) {
    const int64_t t = slot / K, e = expert[slot];
    if (e == E) continue;
    double* of_row = want_pre.data() + plan.row[slot] * H;
    for (int64_t h = 0; h < H; ++h) {
      of_row[h] = bias_up[e * H + h];
      for (int64_t d = 0; d < D; ++d) of_row[h] += x[t * stride + d] * up.at(e, h, d);
    }
    std::vector<double> a(F);
    for (int64_t f = 0; f < F; ++f) {
      const double gate = of_row[m.gated && m.interleaved ? 2 * f : f];
      a[f] = phi_of(m.phi, std::min<double>(gate, m.limit), m.alpha);
      if (m.gated) {
        const double factor = of_row[m.interleaved ? 2 * f + 1 : F + f];
        a[f] *= std::clamp<double>(factor, -m.limit, m.limit) + m.shift;
      }
    }
    for (int64_t d = 0; d < D; ++d) {
      double y = bias_down[e * D + d];
      for (int64_t f = 0; f < F; ++f) y += down.at(e, d, f) * a[f];
      want[t * D + d] += weight[slot] * y;
    }
  }
  check_chain("expert_mlp", out, want);
  Numbers used(dtype, plan.offset[E] * H);  // the kernel leaves the rows of unused slots alone
  std::memcpy(used.data(), pre.data(), used.memory().bytes());
  check_chain("expert_mlp, pre", used, want_pre);
  checksum.add(out.memory()), checksum.add(used.memory());
  if (plain) {
    Numbers again(dtype, T * D);
    p.up = p.down = nullptr, p.out = again.data();
    run_with_scratch(cpu::kernels().expert_mlp, p);
    check_same("expert_mlp", out.memory(), again.memory());
  }
  for (const Guarded* memory : {&x.memory(), &packed, &weight.memory(), &pre.memory()}) {
    memory->check();
  }
}

void expert_mlps() {
  constexpr float kNone = INFINITY;
  const Mlp layers[] = {
      {37, 2, 5, 70, 41, true, false, false, Phi::kSilu, kNone, 1, 0},
      {37, 2, 5, 70, 41, true, true, true, Phi::kSilu, 1.5f, 1.702f, 1},
      {150, 3, 2, 33, 16, true, false, true, Phi::kGelu, kNone, 1, 0},
      {150, 3, 2, 96, 64, false, false, false, Phi::kGeluTanh, kNone, 1, 0},
      {13, 1, 3, 1, 1, false, false, true, Phi::kRelu, kNone, 1, 0},
      {13, 8, 64, 12, 9, true, true, false, Phi::kRelu2, 4, 1, 0},
      {1, 2, 3, 64, 32, true, false, false, Phi::kSilu, kNone, 1, 0},
      {0, 2, 3, 8, 8, true, false, false, Phi::kSilu, kNone, 1, 0},
  };
  for (DType dtype : kTypes) {
    for (const Mlp& layer : layers) check_mlp(layer, dtype, Kind::kPlain);
    for (Kind kind : kKinds) {
      for (int i : {1, 4, 6}) check_mlp(layers[i], dtype, kind);
    }
    checksum.print("expert_mlp", name_of(dtype));
  }
}

}  // namespace driver

int main(int count, char**) {
  std::printf("level %s of %s\n", gose::cpu::name_of(gose::cpu::level_in_use()),
              gose::cpu::name_of(gose::cpu::best_level()));
  if (count > 1) return 0;  // any argument: the level alone
  driver::micro_kernels();
  driver::quantized_micro_kernels();
  driver::packs();
  driver::quantizes();
  driver::dispatches();
  driver::entropies();
  driver::routes();
  driver::combines();
  driver::grouped_gemms();
  driver::expert_mlps();
}
