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

inline vf phi(Phi which, vf g, float alpha) {
  switch (which) {
    case Phi::kSilu: return g * sigmoid(alpha * g);
    case Phi::kGelu: {
      const vf tail = 0.5f * erfc(select(g < 0.f, -g, g) * 0.70710678118654752f);
      return g * select(g < 0.f, tail, 1.f - tail);
    }
    case Phi::kGeluTanh:  // (1 + tanh(u)) / 2 = sigmoid(2 u)
      return g * sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
    case Phi::kRelu:
    case Phi::kRelu2: break;
  }
  const vf positive = select(g <= 0.f, splat(0.f), g);  // NaN stays
  return which == Phi::kRelu ? positive : positive * positive;
}

// act of one vector of gates, or of pre-activations where there is no gate (then without `up`).
inline vf activate(const ExpertMlpParams& p, vf gate, vf up) {
  if (!p.gated) return phi(p.phi, gate, p.alpha);
  // Comparisons that are false for NaN keep it.
  const vf g = select(gate > p.limit, splat(p.limit), gate);
  const vf below = select(up > p.limit, splat(p.limit), up);
  const vf u = select(below < -p.limit, splat(-p.limit), below);
  return phi(p.phi, g, p.alpha) * (u + p.shift);
}

}  // namespace
}  // namespace gose::cpu::GOSE_LEVEL
