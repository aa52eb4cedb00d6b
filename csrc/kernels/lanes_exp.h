// e^x on vectors of float32 and float64, tanh on float32: one body for every width of lanes.
// Included after lanes_avx2.h or lanes_avx512.h.
//
// n = round(x / ln 2), r = x - n · ln 2 in two steps, e^x = 2^n · e^r. NaN stays NaN; infinity
// above the range, 0 below it.
//
// exp32: |error| <= 2 · 2^-23 · e^x where e^x is a normal number, else one subnormal step (2^-149)
// more. exp64: the polynomial is the Taylor sum to r^13, whose rest is below 4.2e-18 for |r| <=
// ln 2 / 2; with the roundings of the reduction and of Horner's rule |error| <= 2 · 2^-52 · e^x.
// The tests measure both.
#pragma once

namespace {

QCORE_INLINE Lanes32::F exp32(Lanes32::F x) {
  using L = Lanes32;
  // Beyond these the result is 0 or infinity anyway. x comes second: NaN passes through.
  x = L::max(L::spread(-104.0f), x);
  x = L::min(L::spread(89.0f), x);
  const L::F n = L::round(x * L::spread(1.44269504088896341f));
  // ln 2 in two parts; the first has 9 bits, so n times it is exact.
  L::F r = L::fma(n, L::spread(-0.693359375f), x);
  r = L::fma(n, L::spread(2.12194440e-4f), r);
  // e^r = 1 + r + r² p(r); minimax coefficients of expf in the Cephes library (S. Moshier).
  L::F p = L::spread(1.9875691500e-4f);
  p = L::fma(p, r, L::spread(1.3981999507e-3f));
  p = L::fma(p, r, L::spread(8.3334519073e-3f));
  p = L::fma(p, r, L::spread(4.1665795894e-2f));
  p = L::fma(p, r, L::spread(1.6666665459e-1f));
  p = L::fma(p, r, L::spread(5.0000001201e-1f));
  p = L::fma(p, r * r, r) + L::spread(1.0f);
  return L::scale(p, n);
}

// tanh, |error| <= 4 · 2^-24 · |tanh x|: an odd polynomial near 0 (Cephes, tanhf), else by e^2x.
QCORE_INLINE Lanes32::F tanh32(Lanes32::F x) {
  using L = Lanes32;
  const L::F one = L::spread(1.0f);
  const L::F magnitude = L::abs(x);
  const L::F square = x * x;
  L::F p = L::spread(-5.70498872745e-3f);
  p = L::fma(p, square, L::spread(2.06390887954e-2f));
  p = L::fma(p, square, L::spread(-5.37397155531e-2f));
  p = L::fma(p, square, L::spread(1.33314422036e-1f));
  p = L::fma(p, square, L::spread(-3.33332819422e-1f));
  const L::F near_zero = L::fma(p * square, x, x);
  const L::F large = one - L::spread(2.0f) / (exp32(magnitude + magnitude) + one);
  const L::F with_sign = L::select(L::less(x, L::zero()), L::zero() - large, large);
  return L::select(L::less(magnitude, L::spread(0.625f)), near_zero, with_sign);
}

QCORE_INLINE Lanes64::F exp64(Lanes64::F x) {
  using L = Lanes64;
  x = L::max(L::spread(-746.0), x);
  x = L::min(L::spread(710.0), x);
  const L::F n = L::round(x * L::spread(1.44269504088896340736));
  L::F r = L::fma(n, L::spread(-6.93145751953125e-1), x);  // 20 bits: n times it is exact
  r = L::fma(n, L::spread(-1.42860682030941723212e-6), r);
  L::F p = L::spread(1.0 / 6227020800.0);
  p = L::fma(p, r, L::spread(1.0 / 479001600.0));
  p = L::fma(p, r, L::spread(1.0 / 39916800.0));
  p = L::fma(p, r, L::spread(1.0 / 3628800.0));
  p = L::fma(p, r, L::spread(1.0 / 362880.0));
  p = L::fma(p, r, L::spread(1.0 / 40320.0));
  p = L::fma(p, r, L::spread(1.0 / 5040.0));
  p = L::fma(p, r, L::spread(1.0 / 720.0));
  p = L::fma(p, r, L::spread(1.0 / 120.0));
  p = L::fma(p, r, L::spread(1.0 / 24.0));
  p = L::fma(p, r, L::spread(1.0 / 6.0));
  p = L::fma(p, r, L::spread(0.5));
  p = L::fma(p, r, L::spread(1.0));
  p = L::fma(p, r, L::spread(1.0));
  return L::scale(p, n);
}

}  // namespace
