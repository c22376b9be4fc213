// Activations and their derivatives on vectors. Included once per instruction set, inside its namespace.
#pragma once

// e^x. Range reduction x = n·ln 2 + r, |r| <= ln(2) / 2, and the Taylor polynomial of degree 7 in r (its first
// dropped term is r^8 / 8! = 5e-9 relative, below float32's 6e-8). Saturates outside ±87.
FASTINV_INLINE V exp(V x) {
  x = min(max(x, set1(-87.0f)), set1(87.0f));
  const V n = round(mul(x, set1(1.44269504f)));
  V r = fma(n, set1(-0.693359375f), x);  // the high bits of ln 2, exact in n·hi
  r = fma(n, set1(2.12194440e-4f), r);   // the rest
  V p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return mul(p, exp2_whole(n));
}

FASTINV_INLINE V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// tanh x = 1 − 2 / (e^{2x} + 1), and near zero, where that cancels, the odd Taylor series to x^11 (the next term
// is 2e-3·x^13: 1e-9 relative at |x| = 0.3).
FASTINV_INLINE V tanh(V x) {
  const V far = sub(set1(1.0f), div(set1(2.0f), add(exp(add(x, x)), set1(1.0f))));
  const V s = mul(x, x);
  V p = set1(-1382.0f / 155925);
  p = fma(p, s, set1(62.0f / 2835));
  p = fma(p, s, set1(-17.0f / 315));
  p = fma(p, s, set1(2.0f / 15));
  p = fma(p, s, set1(-1.0f / 3));
  const V near = fma(mul(p, s), x, x);
  return select(less(abs(x), set1(0.3f)), near, far);
}

// e^x − 1 for x <= 0: above −1/4, where that loses digits, by its series to x^6 (the next term is 5e-8 relative).
FASTINV_INLINE V exp_less_one(V x) {
  V p = set1(1.0f / 720);
  p = fma(p, x, set1(1.0f / 120));
  p = fma(p, x, set1(1.0f / 24));
  p = fma(p, x, set1(1.0f / 6));
  p = fma(p, x, set1(0.5f));
  p = fma(p, x, set1(1.0f));
  return select(less(set1(-0.25f), x), mul(p, x), sub(exp(x), set1(1.0f)));
}

// ln(1 + u) for 0 <= u <= 1: 2·artanh(u / (2 + u)), whose series to s^15 leaves s^17 / 17 < 1e-9 at s = 1/3.
FASTINV_INLINE V log1p_unit(V u) {
  const V s = div(u, add(u, set1(2.0f)));
  const V q = mul(s, s);
  V p = set1(1.0f / 15);
  p = fma(p, q, set1(1.0f / 13));
  p = fma(p, q, set1(1.0f / 11));
  p = fma(p, q, set1(1.0f / 9));
  p = fma(p, q, set1(1.0f / 7));
  p = fma(p, q, set1(1.0f / 5));
  p = fma(p, q, set1(1.0f / 3));
  p = fma(p, q, set1(1.0f));
  return mul(add(s, s), p);
}

// Φ(x), the normal distribution function, from erfc's rational form (Abramowitz and Stegun 7.1.26: 1.5e-7 absolute).
FASTINV_INLINE V normal_cdf(V x) {
  const V u = mul(abs(x), set1(0.70710678f));
  const V t = div(set1(1.0f), fma(u, set1(0.3275911f), set1(1.0f)));
  V p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const V half_tail = mul(mul(set1(0.5f), mul(p, t)), exp(sub(zero(), mul(u, u))));
  return select(less(x, zero()), half_tail, sub(set1(1.0f), half_tail));
}

constexpr float kGeluTanhScale = 0.79788456f;  // sqrt(2 / π)
constexpr float kGeluTanhCubic = 0.044715f;

FASTINV_INLINE V gelu_tanh_inner(V x) {
  return mul(mul(set1(kGeluTanhScale), x), fma(mul(set1(kGeluTanhCubic), x), x, set1(1.0f)));
}

FASTINV_INLINE V activate(V x, Activation act) {
  switch (act.kind) {
    case ActivationKind::kIdentity: return x;
    case ActivationKind::kRelu: return max(x, zero());
    case ActivationKind::kLeakyRelu: return select(less(zero(), x), x, mul(x, set1(act.a)));
    case ActivationKind::kSigmoid: return sigmoid(x);
    case ActivationKind::kTanh: return tanh(x);
    case ActivationKind::kSilu: return mul(x, sigmoid(x));
    case ActivationKind::kGelu: return mul(x, normal_cdf(x));
    case ActivationKind::kGeluTanh: {  // (1 + tanh u) / 2 = sigmoid(2u), which does not cancel
      const V u = gelu_tanh_inner(x);
      return mul(x, sigmoid(add(u, u)));
    }
    case ActivationKind::kSoftplus: {
      const V u = mul(x, set1(act.a));
      const V soft = add(max(u, zero()), log1p_unit(exp(sub(zero(), abs(u)))));
      return select(less(set1(act.b), u), x, div(soft, set1(act.a)));
    }
    case ActivationKind::kHardtanh:
    case ActivationKind::kClamp: return min(max(x, set1(act.a)), set1(act.b));
    case ActivationKind::kElu: return select(less(zero(), x), x, mul(set1(act.a), exp_less_one(mul(set1(act.b), x))));
    case ActivationKind::kExp: return exp(x);
    case ActivationKind::kSqrt: return sqrt(max(x, zero()));
    case ActivationKind::kReciprocal: return div(set1(1.0f), x);
  }
  return x;
}

// activation'(x), given x and y = activation(x).
FASTINV_INLINE V derivative(V x, V y, Activation act) {
  const V one = set1(1.0f);
  switch (act.kind) {
    case ActivationKind::kIdentity: return one;
    case ActivationKind::kRelu: return select(less(zero(), y), one, zero());
    case ActivationKind::kLeakyRelu: return select(less(zero(), x), one, set1(act.a));
    case ActivationKind::kSigmoid: return mul(y, sub(one, y));
    case ActivationKind::kTanh: return sub(one, mul(y, y));
    case ActivationKind::kSilu: {
      const V s = sigmoid(x);
      return mul(s, fma(x, sub(one, s), one));
    }
    case ActivationKind::kGelu: {
      const V density = mul(set1(0.39894228f), exp(mul(set1(-0.5f), mul(x, x))));
      return fma(x, density, normal_cdf(x));
    }
    case ActivationKind::kGeluTanh: {
      const V t = tanh(gelu_tanh_inner(x));
      const V inner = mul(set1(kGeluTanhScale), fma(mul(set1(3 * kGeluTanhCubic), x), x, one));
      const V half = set1(0.5f);
      return fma(mul(mul(half, x), sub(one, mul(t, t))), inner, fma(half, t, half));
    }
    case ActivationKind::kSoftplus: {
      const V u = mul(x, set1(act.a));
      return select(less(set1(act.b), u), one, sigmoid(u));
    }
    case ActivationKind::kHardtanh:  // 0 at the bounds themselves, as in PyTorch
      return select(less(set1(act.a), y), select(less(y, set1(act.b)), one, zero()), zero());
    case ActivationKind::kClamp:  // 1 at the bounds
      return select(less_equal(set1(act.a), x), select(less_equal(x, set1(act.b)), one, zero()), zero());
    case ActivationKind::kElu: return select(less(zero(), x), one, mul(set1(act.b), add(y, set1(act.a))));
    case ActivationKind::kExp: return y;
    case ActivationKind::kSqrt: return select(less(zero(), y), div(set1(0.5f), y), zero());
    case ActivationKind::kReciprocal: return sub(zero(), mul(y, y));
  }
  return one;
}

// `count` values at p, as the tail of a vector loop would see them.
__attribute__((noinline)) void activate_in_place(float* p, int64_t count, Activation act) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(p + i, activate(load(p + i), act));
  if (i < count) {
    const int n = static_cast<int>(count - i);
    store_first(p + i, activate(load_first(p + i, n), act), n);
  }
}

// The cheap activations inline, the rest by the general function on what was stored.
FASTINV_INLINE bool is_cheap(ActivationKind kind) {
  return kind == ActivationKind::kIdentity || kind == ActivationKind::kRelu;
}
FASTINV_INLINE V activate_cheap(V x, ActivationKind kind) { return kind == ActivationKind::kRelu ? max(x, zero()) : x; }

void activate(const float* in, float* out, int64_t size, Activation act) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, activate(load(in + i), act));
  if (i < size) {
    const int n = static_cast<int>(size - i);
    store_first(out + i, activate(load_first(in + i, n), act), n);
  }
}

void activate_gradient(const float* x, const float* y, float* grad, int64_t size, Activation act) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    store(grad + i, mul(load(grad + i), derivative(load(x + i), load(y + i), act)));
  }
  if (i < size) {
    const int n = static_cast<int>(size - i);
    const V d = derivative(load_first(x + i, n), load_first(y + i, n), act);
    store_first(grad + i, mul(load_first(grad + i, n), d), n);
  }
}
