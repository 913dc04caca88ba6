// distill_loss and its gradient: a row of logits is read from memory once and stays in cache for
// three passes: largest values, sums of exponentials, terms and slopes. A thread keeps the
// exponentials of its row, or for a teacher cache the student's row without the listed classes.
#include <cstdlib>

#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

inline float exp(float x) { return exp(splat(x))[0]; }

// log(a / b), precise where the two are close.
inline float log_ratio(double a, double b) {
  return a >= b ? log1p(float((a - b) / b)) : -log1p(float((b - a) / a));
}

// A sum whose rounding errors are carried along [Kahan 1965], every 16 vectors: each time would
// wait for four additions. At a high temperature the slopes are differences of nearly equal
// probabilities, and an error of a total moves them all.
struct Total {
  vf part, sum, lost;
  int count;

  void add(vf x) {
    part += x;
    if (++count == 4) carry();
  }
  void carry() {
    const vf y = part - lost;
    const vf next = sum + y;
    lost = select(next - next == 0.f, (next - sum) - y, vf{});  // an infinite sum lost nothing
    sum = next;
    part = vf{};
    count = 0;
  }
  double value() {
    carry();
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += double(sum[i]) - double(lost[i]);
    return total;
  }
};

// What an outcome of probability p, q = p * exp(-e) of the student, adds to KL and its slope.
struct Outcome {
  vf term;        // p * (exp(-e) - 1 + e), q where p = 0
  vf difference;  // q - p
};

[[gnu::always_inline]] inline Outcome outcome(vf p, vf q, vf e) {
  const vf f = -e;
  vf series = f * (1.f / 9.f) + 1.f;  // exp(f) - 1 - f = f^2 / 2 * series, by Taylor
  for (int n = 8; n >= 3; --n) series = f * (1.f / float(n)) * series + 1.f;
  const vf rest = f * f * 0.5f * series;
  const vi near = (f < 0.5f) & (f > -0.5f);
  const vf difference = q - p;
  return {select(p == 0.f, q, select(near, p * rest, p * e + difference)),
          select(near, p * (f + rest), difference)};
}

// What multiplies CE and KL of a sample; 0 leaves the part out.
struct Factors {
  float ce, kl;
};

inline Factors factors(const DistillParams& p, int64_t n) {
  const float weight = p.weight == nullptr ? 1.f : p.weight[n];
  const float task = p.task_weight_B == nullptr ? p.task_weight : p.task_weight_B[n];
  return {weight * task, weight * (1.f - task) * p.kl_scale};
}

// The label's row: y'[c] = keep * y[c] + spread.
struct Target {
  const void* soft;  // nullptr: the one class
  DType dtype;
  int64_t label;
  float keep, spread;

  [[gnu::always_inline]] vf at(int64_t c, int64_t C) const {
    if (soft == nullptr) {
      const vi hit = lane_ids() + int32_t(c) == int32_t(label);
      return select(hit, splat(keep), vf{}) + spread;
    }
    const auto read = [&](const auto* row) {
      return c + kLanes <= C ? load(row + c) : load_some(row + c, C - c, 0.f);
    };
    const vf y = dtype == DType::kFloat32    ? read(static_cast<const float*>(soft))
                 : dtype == DType::kBFloat16 ? read(static_cast<const bf16*>(soft))
                                             : read(static_cast<const fp16*>(soft));
    return y * keep + spread;
  }
  float at(int64_t c) const {
    if (soft == nullptr) return (c == label ? keep : 0.f) + spread;
    const float y = dtype == DType::kFloat32    ? static_cast<const float*>(soft)[c]
                    : dtype == DType::kBFloat16 ? to_float(static_cast<const bf16*>(soft)[c])
                                                : to_float(static_cast<const fp16*>(soft)[c]);
    return y * keep + spread;
  }
};

inline vi inside(int64_t c, int64_t C) {
  return lane_ids() < int32_t(C - c < kLanes ? C - c : kLanes);
}

template <class Float>
inline float highest(const Float* row, int64_t C) {
  vf top = splat(-kInfinity);
  for_row(row, C, -kInfinity, [&](int64_t, vf x) { top = max(x, top); });
  return highest_lane(top);
}

// CE, and Y = sum of y'. total: sum of exp(s - top).
struct Task {
  float ce, sum_target, inverse_total;
};

template <class Float>
inline Task task_of(const Float* s, int64_t C, float top, double total, const Target& target) {
  const float log_total = log1p(float(total - 1));
  Task task = {0.f, target.keep + target.spread * float(C), float(1 / total)};
  if (target.soft == nullptr && target.spread == 0.f) {
    task.ce = target.keep * (log_total - (to_float(s[target.label]) - top));
    return task;
  }
  Total sum_y = {}, sum_yz = {};
  for_row(s, C, 0.f, [&](int64_t c, vf x) {
    const vf y = select(inside(c, C), target.at(c, C), vf{});
    sum_y.add(y);
    sum_yz.add(select(y == 0.f, vf{}, y * (x - top)));
  });
  task.sum_target = float(sum_y.value());
  task.ce = task.sum_target * log_total - float(sum_yz.value());
  return task;
}

// Exponentials of a row, each padded to whole vectors: of the student, of the student and of the
// teacher at the temperature.
struct Kept {
  float *student, *q, *p;
};

// Teacher and student over all C classes. Returns KL.
template <class Student, class Teacher>
float row_of_all(const DistillParams& p, const Student* s, const Teacher* t, Factors factor,
                 const Target& target, float scale, Student* grad, float* ce, const Kept& kept) {
  const int64_t C = p.C;
  const bool with_ce = factor.ce != 0.f, with_kl = factor.kl != 0.f;
  const float top = highest(s, C), top_t = with_kl ? highest(t, C) : 0.f;
  const bool tempered = p.inverse_tau != 1.f;
  Total total_1 = {}, total_q = {}, total_p = {};
  const auto keep = [](vf x, float* row, Total* total) __attribute__((always_inline)) {
    store(row, x);
    total->add(x);
  };
  for_row(s, C, -kInfinity, [&](int64_t c, vf x) {
    const vf z = x - top;
    if (with_ce || !tempered) keep(exp(z), kept.student + c, &total_1);
    if (with_kl && tempered) keep(exp(z * p.inverse_tau), kept.q + c, &total_q);
  });
  if (with_kl) {
    for_row(t, C, -kInfinity,
            [&](int64_t c, vf x) { keep(exp((x - top_t) * p.inverse_tau), kept.p + c, &total_p); });
  }
  const Task task = with_ce ? task_of(s, C, top, total_1.value(), target) : Task{};
  *ce = task.ce;
  if (!with_kl && grad == nullptr) return 0.f;
  const double sum_q = tempered ? total_q.value() : total_1.value(), sum_p = total_p.value();
  const float inverse_q = float(1 / sum_q), inverse_p = float(1 / sum_p);
  const float shift = with_kl ? log_ratio(sum_p, sum_q) : 0.f;
  const float ce_slope = factor.ce * scale, kl_slope = factor.kl * p.inverse_tau * scale;
  Total kl = {};
  const auto body = [&](int64_t c, vf x, vf y) __attribute__((always_inline)) {
    vf slope = {};
    if (with_kl) {
      const vf z = x - top, z_t = y - top_t;
      const Outcome at = outcome(load(kept.p + c) * inverse_p,
                                 load((tempered ? kept.q : kept.student) + c) * inverse_q,
                                 (z_t - z) * p.inverse_tau - shift);
      kl.add(at.term);
      slope = at.difference * kl_slope;
    }
    if (grad == nullptr) return;
    if (with_ce) {
      slope += (load(kept.student + c) * (task.sum_target * task.inverse_total) - target.at(c, C)) *
               ce_slope;
    }
    store_row(grad, C, c, slope);
  };
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) body(c, load(s + c), with_kl ? load(t + c) : vf{});
  if (c < C) {
    body(c, load_some(s + c, C - c, -kInfinity),
         with_kl ? load_some(t + c, C - c, -kInfinity) : vf{});
  }
  return float(kl.value());
}

// What a thread needs for a teacher cache.
struct Listed {
  float* rest;        // [C] the student's row, -infinity at the listed classes
  float* student;     // [J] what stood there
  float* difference;  // [J]
  uint8_t* seen;      // [C] all 0
};

// The J listed classes, and all others as one outcome. Returns KL.
template <class Student, class Teacher>
float row_of_listed(const DistillParams& p, const Student* s, const Teacher* t, const int64_t* id,
                    float tail, Factors factor, const Target& target, float scale, Student* grad,
                    float* ce, const Listed& listed) {
  const int64_t C = p.C, J = p.J;
  const bool with_ce = factor.ce != 0.f, with_kl = factor.kl != 0.f;
  vf highest_s = splat(-kInfinity);
  for_row(s, C, -kInfinity, [&](int64_t c, vf x) {
    highest_s = max(x, highest_s);
    store_row(listed.rest, C, c, x);
  });
  const float top = highest_lane(highest_s);
  for (int64_t j = 0; j < J; ++j) {
    listed.student[j] = listed.rest[id[j]];
    listed.rest[id[j]] = -kInfinity;
  }
  Task task = {};
  if (with_ce) {
    Total total = {};
    for_row(s, C, -kInfinity, [&](int64_t, vf x) { total.add(exp(x - top)); });
    task = task_of(s, C, top, total.value(), target);
  }
  *ce = task.ce;
  float kl = 0.f, slope_rest = 0.f, top_rest = 0.f;
  if (with_kl) {
    const float top_t = highest(t, J);
    top_rest = highest(listed.rest, C);
    if (top_rest == -kInfinity) top_rest = 0.f;
    Total total_rest = {}, total_q = {}, total_p = {};
    for_row(listed.rest, C, -kInfinity,
            [&](int64_t, vf x) { total_rest.add(exp((x - top_rest) * p.inverse_tau)); });
    for_row(listed.student, J, -kInfinity,
            [&](int64_t, vf x) { total_q.add(exp((x - top) * p.inverse_tau)); });
    for_row(t, J, -kInfinity,
            [&](int64_t, vf x) { total_p.add(exp((x - top_t) * p.inverse_tau)); });
    const double sum_rest = total_rest.value();
    const float log_rest = (top_rest - top) * p.inverse_tau + log(float(sum_rest));
    const double sum_q = total_q.value() + double(exp(log_rest));
    const double sum_p = total_p.value() / (1 - double(tail));  // infinite for tail = 1: p = 0
    const float inverse_q = float(1 / sum_q), inverse_p = float(1 / sum_p);
    const float shift = tail < 1.f ? log_ratio(sum_p, sum_q) : kInfinity;
    vf terms = {};
    const auto body = [&](int64_t j, vf x, vf y) {
      const vf z = x - top, z_t = y - top_t;
      const Outcome at =
          outcome(exp(z_t * p.inverse_tau) * inverse_p, exp(z * p.inverse_tau) * inverse_q,
                  (z_t - z) * p.inverse_tau - shift);
      terms += at.term;
      store_row(listed.difference, J, j, at.difference);
    };
    int64_t j = 0;
    for (; j + kLanes <= J; j += kLanes) body(j, load(listed.student + j), load(t + j));
    if (j < J) {
      body(j, load_some(listed.student + j, J - j, -kInfinity),
           load_some(t + j, J - j, -kInfinity));
    }
    const float q_rest = exp(log_rest) * inverse_q;
    const float e =
        q_rest > 1e-30f ? log_ratio(tail, q_rest) : log(tail) - (log_rest - log(float(sum_q)));
    const Outcome others = outcome(splat(tail), splat(q_rest), splat(e));
    kl = sum(terms) + others.term[0];
    slope_rest = sum_rest > 0 ? others.difference[0] / float(sum_rest) : 0.f * float(sum_rest);
  }
  if (grad == nullptr) return kl;
  const float ce_slope = factor.ce * scale, kl_slope = factor.kl * p.inverse_tau * scale;
  const auto slope_of_ce = [&](vf x, vf y) {
    return (exp(x - top) * (task.sum_target * task.inverse_total) - y) * ce_slope;
  };
  for_row(listed.rest, C, -kInfinity, [&](int64_t c, vf x) {
    vf slope = {};
    if (with_kl) slope = exp((x - top_rest) * p.inverse_tau) * slope_rest * kl_slope;
    if (with_ce) slope += slope_of_ce(x, target.at(c, C));
    store_row(grad, C, c, slope);
  });
  for (int64_t j = 0; j < J; ++j) {
    float slope = with_kl ? listed.difference[j] * kl_slope : 0.f;
    if (with_ce) slope += slope_of_ce(splat(listed.student[j]), splat(target.at(id[j])))[0];
    from_float(slope, grad + id[j]);
  }
  return kl;
}

template <class Float>
bool no_negative(const Float* row, int64_t C) {
  vi bad = {};
  for_row(row, C, 0.f, [&](int64_t, vf x) { bad |= ~(x >= 0.f); });
  return sum(bad) == 0;
}

// Why the values of sample n cannot be used.
DistillBad check_row(const DistillParams& p, int64_t n, const Target& target, uint8_t* seen) {
  if (target.soft == nullptr) {
    if (target.label < 0 || target.label >= p.C) return DistillBad::kLabel;
  } else {
    const bool good = target.dtype == DType::kFloat32
                          ? no_negative(static_cast<const float*>(target.soft), p.C)
                      : target.dtype == DType::kBFloat16
                          ? no_negative(static_cast<const bf16*>(target.soft), p.C)
                          : no_negative(static_cast<const fp16*>(target.soft), p.C);
    if (!good) return DistillBad::kSoftLabel;
  }
  if (p.task_weight_B != nullptr && !(p.task_weight_B[n] >= 0.f && p.task_weight_B[n] <= 1.f)) {
    return DistillBad::kTaskWeight;
  }
  if (p.id == nullptr) return DistillBad::kNothing;
  const int64_t* id = p.id + n * p.J;
  bool inside = true, distinct = true;
  for (int64_t j = 0; j < p.J; ++j) inside &= id[j] >= 0 && id[j] < p.C;
  if (!inside) return DistillBad::kId;
  for (int64_t j = 0; j < p.J; ++j) {
    distinct &= seen[id[j]] == 0;
    seen[id[j]] = 1;
  }
  for (int64_t j = 0; j < p.J; ++j) seen[id[j]] = 0;
  if (!distinct) return DistillBad::kSameId;
  return p.tail[n] >= 0.f && p.tail[n] <= 1.f ? DistillBad::kNothing : DistillBad::kTail;
}

template <class Student, class Teacher>
void rows(const DistillParams& p, int64_t begin, int64_t end) {
  Listed listed = {};
  Kept kept = {};
  float* scratch = nullptr;
  if (p.id == nullptr) {
    const int64_t padded = (p.C + kLanes - 1) / kLanes * kLanes;
    scratch = static_cast<float*>(std::malloc(4 * (3 * padded + 1)));  // + 1: nullptr is no memory
    kept = {scratch, scratch + padded, scratch + 2 * padded};
  } else {
    scratch = static_cast<float*>(std::calloc(1, (4 * (p.C + 2 * p.J) + p.C)));
    listed = {scratch, scratch + p.C, scratch + p.C + p.J,
              reinterpret_cast<uint8_t*>(scratch + p.C + 2 * p.J)};
  }
  for (int64_t n = begin; n < end; ++n) {
    if (scratch == nullptr) {
      p.bad[n] = DistillBad::kMemory;
      continue;
    }
    Target target = {nullptr, p.soft_dtype, 0, 1.f - p.smoothing, p.smoothing / float(p.C)};
    if (p.soft == nullptr) {
      target.label = p.label[n];
    } else {
      target.soft = static_cast<const char*>(p.soft) + n * p.stride_lb * bytes_of(p.soft_dtype);
    }
    p.bad[n] = check_row(p, n, target, listed.seen);
    if (p.bad[n] != DistillBad::kNothing) continue;
    const Factors factor = factors(p, n);
    const Student* s = static_cast<const Student*>(p.student) + n * p.stride_sb;
    const Teacher* t = static_cast<const Teacher*>(p.teacher) + n * p.stride_tb;
    Student* grad = p.grad == nullptr ? nullptr : static_cast<Student*>(p.grad) + n * p.C;
    float ce = 0.f;
    const float kl = p.id == nullptr
                         ? row_of_all(p, s, t, factor, target, p.grad_scale, grad, &ce, kept)
                         : row_of_listed(p, s, t, p.id + n * p.J, p.tail[n], factor, target,
                                         p.grad_scale, grad, &ce, listed);
    p.term[n] =
        (factor.ce != 0.f ? factor.ce * ce : 0.f) + (factor.kl != 0.f ? factor.kl * kl : 0.f);
  }
  std::free(scratch);
}

template <class Student>
void rows_of(const DistillParams& p, int64_t begin, int64_t end) {
  switch (p.teacher_dtype) {
    case DType::kFloat32: return rows<Student, float>(p, begin, end);
    case DType::kBFloat16: return rows<Student, bf16>(p, begin, end);
    case DType::kFloat16: return rows<Student, fp16>(p, begin, end);
    case DType::kFloat64:
    case DType::kInt32: return;  // refused by the binding
  }
}

}  // namespace

void distill_loss(const DistillParams& p, const Parallel& threads) {
  parallel_for(threads, p.B, grain_of(4 * p.C * bytes_of(p.dtype)),
               [&p](int64_t begin, int64_t end) {
                 switch (p.dtype) {
                   case DType::kFloat32: return rows_of<float>(p, begin, end);
                   case DType::kBFloat16: return rows_of<bf16>(p, begin, end);
                   case DType::kFloat16: return rows_of<fp16>(p, begin, end);
                   case DType::kFloat64:
                   case DType::kInt32: return;  // refused by the binding
                 }
               });
}

}  // namespace gose::cpu::GOSE_LEVEL
