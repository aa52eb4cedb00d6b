// What the bodies of elementwise, attention and compare_logits need beyond Simd: 16 float32
// (Lanes32) or 8 float64 (Lanes64). lanes_avx2.h has the same names. Only *_avx512.cpp files
// include this.
#pragma once

#include "kernels/simd_avx512.h"

namespace {

struct Lanes32 : Simd {
  using Mask = __mmask16;

  // The larger one; b when one of them is NaN.
  static QCORE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static QCORE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static QCORE_INLINE F abs(F v) { return _mm512_abs_ps(v); }
  static QCORE_INLINE F round(F v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static QCORE_INLINE Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static QCORE_INLINE F select(Mask mask, F yes, F no) {
    return _mm512_mask_blend_ps(mask, no, yes);
  }
  static QCORE_INLINE float largest(F v) { return _mm512_reduce_max_ps(v); }
  // Writes v as bfloat16 (half to even, subnormal numbers as zero); returns what it wrote.
  static QCORE_INLINE F store_bf16(uint16_t* p, F v) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  }
  // v · 2^n, n whole; rounds once, below the normal range too.
  static QCORE_INLINE F scale(F v, F n) { return _mm512_scalef_ps(v, n); }
  // To the nearest number of a 16-bit type, ties to even (base/half.h); v is no NaN.
  static QCORE_INLINE F round_to_f16(F v) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static QCORE_INLINE F round_to_bf16(F v) {
    const I word = bits(v);
    const I last = both(shift_right(word, 16), spread_word(1));
    const I rounded = _mm512_add_epi32(word, _mm512_add_epi32(last, spread_word(0x7fff)));
    return _mm512_castsi512_ps(both(rounded, spread_word(static_cast<int32_t>(0xffff0000u))));
  }
  // Whole numbers 0 … 255 as bytes.
  static QCORE_INLINE void store_codes(uint8_t* to, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
};

struct Lanes64 {
  using F = __m512d;
  using Mask = __mmask8;
  static constexpr int kLanes = 8;

  static QCORE_INLINE F spread(double v) { return _mm512_set1_pd(v); }
  // kLanes float32, or the first of them and zeros.
  static QCORE_INLINE F load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static QCORE_INLINE F load_first(const float* p, int64_t count) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first(count), p));
  }
  static QCORE_INLINE Mask first(int64_t count) {
    return static_cast<Mask>(count >= kLanes ? 0xff : (1 << count) - 1);
  }
  static QCORE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_pd(a, b, c); }
  static QCORE_INLINE F max(F a, F b) { return _mm512_max_pd(a, b); }
  static QCORE_INLINE F min(F a, F b) { return _mm512_min_pd(a, b); }
  static QCORE_INLINE F round(F v) {
    return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static QCORE_INLINE Mask equal(F a, F b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  static QCORE_INLINE F select(Mask mask, F yes, F no) {
    return _mm512_mask_blend_pd(mask, no, yes);
  }
  static QCORE_INLINE F scale(F v, F n) { return _mm512_scalef_pd(v, n); }
  static QCORE_INLINE double sum(F v) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
};

}  // namespace
