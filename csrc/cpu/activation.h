// The activations of expert MLPs on vectors: phi of ops/activations.py, and its gate.
#pragma once

#include "vec_math.h"

namespace gose::cpu::GOSE_LEVEL {
namespace {

inline vf sigmoid(vf x) { return 1.f / (1.f + exp(-x)); }

// erfc(t) for t >= 0 as exp(-t q(t)): a least-squares fit to -ln(erfc(t)) / t on [0, 4], reweighted
// towards equal errors. Errors are below 1e-7; beyond 4 q stands still and erfc fades to 0.
inline vf erfc(vf t) {
  const vf s = select(t > 4.f, splat(4.f), t);
  vf q = splat(-4.917566912e-6f);
  q = q * s + 7.538707723e-5f;
  q = q * s - 4.676816752e-4f;
  q = q * s + 1.332350192e-3f;
  q = q * s + 2.184847835e-4f;
  q = q * s - 1.939337701e-2f;
  q = q * s + 1.028587371e-1f;
  q = q * s + 6.366067529e-1f;
  q = q * s + 1.128379822f;
  return exp(-t * q);
}

template <Phi PHI>
inline vf phi(vf g, float alpha) {
  if constexpr (PHI == Phi::kSilu) {
    return g * sigmoid(alpha * g);
  } else if constexpr (PHI == Phi::kGelu) {
    const vf tail = 0.5f * erfc(select(g < 0.f, -g, g) * 0.70710678118654752f);
    return g * select(g < 0.f, tail, 1.f - tail);
  } else if constexpr (PHI == Phi::kGeluTanh) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    return g * sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
  } else {
    const vf positive = select(g <= 0.f, splat(0.f), g);  // NaN stays
    return PHI == Phi::kRelu ? positive : positive * positive;
  }
}

// x in [-limit, limit]; NaN stays.
inline vf clamp(vf x, float limit) {
  const vf below = select(x > limit, splat(limit), x);
  return select(below < -limit, splat(-limit), below);
}

// body(Phi) with the activation as a constant.
template <Phi PHI>
struct Constant {
  static constexpr Phi value = PHI;
};
template <class Body>
inline void with_phi(Phi phi, const Body& body) {
  switch (phi) {
    case Phi::kSilu: return body(Constant<Phi::kSilu>{});
    case Phi::kGelu: return body(Constant<Phi::kGelu>{});
    case Phi::kGeluTanh: return body(Constant<Phi::kGeluTanh>{});
    case Phi::kRelu: return body(Constant<Phi::kRelu>{});
    case Phi::kRelu2: return body(Constant<Phi::kRelu2>{});
  }
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
