// Vectors of 8 lanes for tile_product.h: AVX2, FMA, F16C. Only *_avx2.cpp files include this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/tile.h"

namespace {

struct Simd {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kStrips = 1;      // strips that one tile takes
  static constexpr int kFloatRows = 6;   // 6 x 2 sums, 2 weights, 1 x: 15 of 16 registers
  static constexpr int kWordRows = 4;    // pairs and codes need temporaries
  static constexpr int kFewRows = 4;     // of a product without a panel
  static constexpr int kNumberBits = 4;  // of the codes that number_pairs takes

  static QCORE_INLINE F zero() { return _mm256_setzero_ps(); }
  static QCORE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static QCORE_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static QCORE_INLINE I first(int64_t count) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int64_t bounded = count > kLanes ? kLanes : (count > 0 ? count : 0);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bounded)), lane);
  }
  // The first `count` lanes; the others are zero and their memory is left alone.
  static QCORE_INLINE F load_first(const float* p, int64_t count) {
    return count >= kLanes ? load(p) : _mm256_maskload_ps(p, first(count));
  }
  static QCORE_INLINE void store_first(float* p, F v, int64_t count) {
    if (count >= kLanes) {
      store(p, v);
    } else {
      _mm256_maskstore_ps(p, first(count), v);
    }
  }
  static QCORE_INLINE F spread(float v) { return _mm256_set1_ps(v); }
  static QCORE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static QCORE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static QCORE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  static QCORE_INLINE I load_words(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static QCORE_INLINE void store_words(void* p, I v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
  static QCORE_INLINE I spread_word(int32_t v) { return _mm256_set1_epi32(v); }
  static QCORE_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static QCORE_INLINE I sub_bytes(I a, I b) { return _mm256_sub_epi8(a, b); }
  static QCORE_INLINE I mul_words(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static QCORE_INLINE I both(I a, I b) { return _mm256_and_si256(a, b); }
  static QCORE_INLINE I either(I a, I b) { return _mm256_or_si256(a, b); }
  static QCORE_INLINE I shift_right(I a, int n) { return _mm256_srli_epi32(a, n); }
  static QCORE_INLINE I shift_right_by(I a, int64_t n) {  // n known at run time
    return _mm256_srl_epi32(a, _mm_cvtsi64_si128(n));
  }
  static QCORE_INLINE I shift_left(I a, int n) { return _mm256_slli_epi32(a, n); }
  static QCORE_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static QCORE_INLINE I bits(F v) { return _mm256_castps_si256(v); }
  static QCORE_INLINE F float_of(I v) { return _mm256_castsi256_ps(v); }

  // a & b | c
  static QCORE_INLINE I both_or(I a, I b, I c) { return either(both(a, b), c); }
  // What number_pairs takes for one zero a word.
  static QCORE_INLINE I pair_shift(I zero) { return zero; }
  // Bytes of `first` and `second` are eight codes. pairs[p] holds code - zero of codes 2p and 2p +
  // 1 as bfloat16: it has at most 8 significant bits, so the lower half of its float32 is 0.
  template <int kBits>
  static QCORE_INLINE void number_pairs(I first, I second, I zero, I (&pairs)[4]) {
    const auto value = [&](int i) {
      const I code = both(shift_right(i < 4 ? first : second, 8 * (i % 4)), spread_word(255));
      return bits(to_float(sub(code, zero)));
    };
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      pairs[p] = either(shift_right(value(2 * p), 16), value(2 * p + 1));
    }
  }

  // 16 numbers to choose from by bits 0 … 3 of each word.
  struct Table {
    F low;
    F high;
  };
  static QCORE_INLINE Table load_table(const float* table) {
    return Table{load(table), load(table + kLanes)};
  }
  static QCORE_INLINE F lookup(const Table& table, I index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                            _mm256_permutevar8x32_ps(table.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  // number_pairs with the table's numbers, which must be exact in bfloat16.
  static QCORE_INLINE Table load_pair_table(const float* table) { return load_table(table); }
  static QCORE_INLINE void table_pairs(I first, I second, const Table& table, I (&pairs)[4]) {
    const auto value = [&](int i) {
      return bits(lookup(table, shift_right(i < 4 ? first : second, 8 * (i % 4))));
    };
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      pairs[p] = either(shift_right(value(2 * p), 16), value(2 * p + 1));
    }
  }
  // Each byte of `index`, below 16, to that byte of the table.
  static QCORE_INLINE I lookup_bytes(const uint8_t* table, I index) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), index);
  }

  // 8 values of another type as float32 or int32.
  static QCORE_INLINE F load_bf16(const void* p) {
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  // The bfloat16 in the low or high half of each word, as float32.
  static QCORE_INLINE F low_bf16(F v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits(v), 16));
  }
  static QCORE_INLINE F high_bf16(F v) {
    return _mm256_castsi256_ps(both(bits(v), spread_word(static_cast<int>(0xffff0000u))));
  }
  static QCORE_INLINE F load_f16(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static QCORE_INLINE I load_bytes(const void* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  }

  // sum + x · w over pairs, the odd input first: two fused multiply-adds of exact products.
  static QCORE_INLINE F dot_pairs(F sum, I x, I w) {
    const I high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(both(x, high)), _mm256_castsi256_ps(both(w, high)),
                          sum);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                           _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), sum);
  }
  // sum + Σ a · b over four uint8 a and int8 b. vpmaddubsw saturates outside [-2^15, 2^15): where
  // one side is at most 64, 2 · 255 · 64 fits; where not, the top bit of a goes apart, and 2 · 127
  // · -128 and 2 · 128 · -128 just fit.
  template <bool kWide>
  static QCORE_INLINE I dot_codes(I sum, I a, I b) {
    const I ones = _mm256_set1_epi16(1);
    if (!kWide) return add_words(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    const I top = _mm256_set1_epi8(static_cast<char>(0x80));
    const I low = _mm256_maddubs_epi16(_mm256_andnot_si256(top, a), b);
    const I high = _mm256_maddubs_epi16(both(a, top), b);
    sum = add_words(sum, _mm256_madd_epi16(low, ones));
    return add_words(sum, _mm256_madd_epi16(high, ones));
  }
  static QCORE_INLINE I add_words(I a, I b) { return _mm256_add_epi32(a, b); }

  static QCORE_INLINE void transpose(F (&r)[8]) {
    F t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
      t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
