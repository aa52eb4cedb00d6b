// What the bodies of elementwise, attention and compare_logits need beyond Simd: 8 float32
// (Lanes32) or 4 float64 (Lanes64). lanes_avx512.h has the same names. Only *_avx2.cpp files
// include this.
#pragma once

#include "kernels/simd_avx2.h"

namespace {

struct Lanes32 : Simd {
  using Mask = __m256;

  // The larger one; b when one of them is NaN.
  static QCORE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static QCORE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static QCORE_INLINE F abs(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static QCORE_INLINE F round(F v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static QCORE_INLINE Mask less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static QCORE_INLINE F select(Mask mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask); }
  static QCORE_INLINE float largest(F v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  // Writes v as bfloat16 (half to even; NaN stays NaN); returns what it wrote.
  static QCORE_INLINE F store_bf16(uint16_t* p, F v) {
    const __m256i odd = both(shift_right(bits(v), 16), spread_word(1));
    const __m256i up = add_words(bits(v), add_words(odd, spread_word(0x7fff)));
    const F high = high_bf16(_mm256_castsi256_ps(up));
    const F kept = select(_mm256_cmp_ps(v, v, _CMP_UNORD_Q), spread(__builtin_nanf("")), high);
    const __m256i words = shift_right(bits(kept), 16);
    const __m128i narrow =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
    return kept;
  }
  // v · 2^n, n whole, |n| <= 252; in two steps, because 2^n alone may leave the range.
  static QCORE_INLINE F scale(F v, F n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return v * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
  }
  // To the nearest number of a 16-bit type, ties to even (base/half.h); v is no NaN.
  static QCORE_INLINE F round_to_f16(F v) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static QCORE_INLINE F round_to_bf16(F v) {
    const I word = bits(v);
    const I last = both(shift_right(word, 16), spread_word(1));
    const I rounded = _mm256_add_epi32(word, _mm256_add_epi32(last, spread_word(0x7fff)));
    return _mm256_castsi256_ps(both(rounded, spread_word(static_cast<int32_t>(0xffff0000u))));
  }
  // Whole numbers 0 … 255 as bytes.
  static QCORE_INLINE void store_codes(uint8_t* to, F v) {
    const __m256i words = _mm256_cvtps_epi32(v);
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
  }
  static QCORE_INLINE F power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

struct Lanes64 {
  using F = __m256d;
  using Mask = __m256d;
  static constexpr int kLanes = 4;

  static QCORE_INLINE F spread(double v) { return _mm256_set1_pd(v); }
  // kLanes float32, or the first of them and zeros.
  static QCORE_INLINE F load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static QCORE_INLINE F load_first(const float* p, int64_t count) {
    const __m128i lane = _mm_setr_epi32(0, 1, 2, 3);
    const __m128i kept = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count)), lane);
    return _mm256_cvtps_pd(_mm_maskload_ps(p, kept));
  }
  static QCORE_INLINE Mask first(int64_t count) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lane));
  }
  static QCORE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_pd(a, b, c); }
  static QCORE_INLINE F max(F a, F b) { return _mm256_max_pd(a, b); }
  static QCORE_INLINE F min(F a, F b) { return _mm256_min_pd(a, b); }
  static QCORE_INLINE F round(F v) {
    return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static QCORE_INLINE Mask equal(F a, F b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
  static QCORE_INLINE F select(Mask mask, F yes, F no) { return _mm256_blendv_pd(no, yes, mask); }
  // v · 2^n, n whole, |n| <= 2044; in two steps, because 2^n alone may leave the range.
  static QCORE_INLINE F scale(F v, F n) {
    const __m128i whole = _mm256_cvtpd_epi32(n);
    const __m128i half = _mm_srai_epi32(whole, 1);
    return v * power_of_two(half) * power_of_two(_mm_sub_epi32(whole, half));
  }
  static QCORE_INLINE F power_of_two(__m128i n) {
    const __m256i biased = _mm256_add_epi64(_mm256_cvtepi32_epi64(n), _mm256_set1_epi64x(1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52));
  }
  static QCORE_INLINE double sum(F v) { return (v[0] + v[1]) + (v[2] + v[3]); }
};

}  // namespace
