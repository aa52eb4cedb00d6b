// Vectors of 16 lanes for tile_product.h: AVX-512 F, BW, VL, DQ, VNNI, BF16. Only *_avx512.cpp
// files include this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/tile.h"

namespace {

struct Simd {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kStrips = 4;     // strips that one tile takes
  static constexpr int kFloatRows = 6;  // 6 x 4 sums, 4 weights, 1 x: 29 of 32 registers
  static constexpr int kWordRows = 6;
  static constexpr int kFewRows = 8;     // of a product without a panel
  static constexpr int kNumberBits = 5;  // of the codes that number_pairs takes

  static QCORE_INLINE F zero() { return _mm512_setzero_ps(); }
  static QCORE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static QCORE_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static QCORE_INLINE __mmask16 first(int64_t count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << (count > 0 ? count : 0)) - 1);
  }
  // The first `count` lanes; the others are zero and their memory is left alone.
  static QCORE_INLINE F load_first(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(first(count), p);
  }
  static QCORE_INLINE void store_first(float* p, F v, int64_t count) {
    _mm512_mask_storeu_ps(p, first(count), v);
  }
  static QCORE_INLINE F spread(float v) { return _mm512_set1_ps(v); }
  static QCORE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static QCORE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static QCORE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static QCORE_INLINE I load_words(const void* p) { return _mm512_loadu_si512(p); }
  static QCORE_INLINE void store_words(void* p, I v) { _mm512_storeu_si512(p, v); }
  static QCORE_INLINE I spread_word(int32_t v) { return _mm512_set1_epi32(v); }
  static QCORE_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static QCORE_INLINE I sub_bytes(I a, I b) { return _mm512_sub_epi8(a, b); }
  static QCORE_INLINE I mul_words(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static QCORE_INLINE I both(I a, I b) { return _mm512_and_si512(a, b); }
  static QCORE_INLINE I either(I a, I b) { return _mm512_or_si512(a, b); }
  static QCORE_INLINE I shift_right(I a, int n) {
    return _mm512_srli_epi32(a, static_cast<unsigned>(n));
  }
  static QCORE_INLINE I shift_right_by(I a, int64_t n) {  // n known at run time
    return _mm512_srl_epi32(a, _mm_cvtsi64_si128(n));
  }
  static QCORE_INLINE I shift_left(I a, int n) {
    return _mm512_slli_epi32(a, static_cast<unsigned>(n));
  }
  static QCORE_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static QCORE_INLINE I bits(F v) { return _mm512_castps_si512(v); }
  static QCORE_INLINE F float_of(I v) { return _mm512_castsi512_ps(v); }

  // a & b | c
  static QCORE_INLINE I both_or(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0xea); }
  // What number_pairs takes for one zero <= 32 a word.
  static QCORE_INLINE I pair_shift(I zero) {
    return sub(spread_word(0x40404040), mul_words(zero, spread_word(0x01010101)));
  }
  // Bytes of `first` and `second` are eight codes. pairs[p] holds code - zero of codes 2p and 2p +
  // 1 as bfloat16. Bytes become code - zero + 64, so none borrows from its neighbour; their low
  // kBits + 1 bits, or one more, are the table's index.
  template <int kBits>
  static QCORE_INLINE void number_pairs(I first, I second, I shift, I (&pairs)[4]) {
    const auto two = [](int low, int high) { return low | high << 16; };
    // bfloat16 of 0 … 15; of -16 … -1; of 16 … 31; of -32 … -17.
    const __m256i small = _mm256_setr_epi32(
        two(0x0000, 0x3f80), two(0x4000, 0x4040), two(0x4080, 0x40a0), two(0x40c0, 0x40e0),
        two(0x4100, 0x4110), two(0x4120, 0x4130), two(0x4140, 0x4150), two(0x4160, 0x4170));
    const __m256i below = _mm256_setr_epi32(
        two(0xc180, 0xc170), two(0xc160, 0xc150), two(0xc140, 0xc130), two(0xc120, 0xc110),
        two(0xc100, 0xc0e0), two(0xc0c0, 0xc0a0), two(0xc080, 0xc040), two(0xc000, 0xbf80));
    first = _mm512_add_epi8(first, shift);
    second = _mm512_add_epi8(second, shift);
    if constexpr (kBits <= 4) {
      table_pairs(first, second, halves(small, below), pairs);
    } else {
      const __m256i large = _mm256_setr_epi32(
          two(0x4180, 0x4188), two(0x4190, 0x4198), two(0x41a0, 0x41a8), two(0x41b0, 0x41b8),
          two(0x41c0, 0x41c8), two(0x41d0, 0x41d8), two(0x41e0, 0x41e8), two(0x41f0, 0x41f8));
      const __m256i far_below = _mm256_setr_epi32(
          two(0xc200, 0xc1f8), two(0xc1f0, 0xc1e8), two(0xc1e0, 0xc1d8), two(0xc1d0, 0xc1c8),
          two(0xc1c0, 0xc1b8), two(0xc1b0, 0xc1a8), two(0xc1a0, 0xc198), two(0xc190, 0xc188));
      const I positive = halves(small, large);
      const I negative = halves(far_below, below);
      spread_bytes(first, second, pairs);
#pragma GCC unroll 4
      for (I& pair : pairs) pair = _mm512_permutex2var_epi16(positive, pair, negative);
    }
  }
  static QCORE_INLINE I halves(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  // 16 numbers to choose from by bits 0 … 3 of each word.
  using Table = F;
  static QCORE_INLINE Table load_table(const float* table) { return load(table); }
  static QCORE_INLINE F lookup(Table table, I index) { return _mm512_permutexvar_ps(index, table); }
  // number_pairs with the table's numbers, which must be exact in bfloat16.
  static QCORE_INLINE I load_pair_table(const float* table) {
    return _mm512_castsi256_si512(_mm512_cvtepi32_epi16(shift_right(bits(load(table)), 16)));
  }
  static QCORE_INLINE void table_pairs(I first, I second, I table, I (&pairs)[4]) {
    spread_bytes(first, second, pairs);
#pragma GCC unroll 4
    for (I& pair : pairs) pair = _mm512_permutexvar_epi16(pair, table);
  }
  // Bytes 0, 1 and 2, 3 of each word to the low bytes of the halves of a word.
  static QCORE_INLINE void spread_bytes(I first, I second, I (&pairs)[4]) {
    const I first_two = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
    const I last_two = _mm512_broadcast_i32x4(
        _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
    pairs[0] = _mm512_shuffle_epi8(first, first_two);
    pairs[1] = _mm512_shuffle_epi8(first, last_two);
    pairs[2] = _mm512_shuffle_epi8(second, first_two);
    pairs[3] = _mm512_shuffle_epi8(second, last_two);
  }
  // Each byte of `index`, below 16, to that byte of the table.
  static QCORE_INLINE I lookup_bytes(const uint8_t* table, I index) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), index);
  }

  // 16 values of another type as float32 or int32.
  static QCORE_INLINE F load_bf16(const void* p) {
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // The bfloat16 in the low or high half of each word, as float32.
  static QCORE_INLINE F low_bf16(F v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits(v), 16));
  }
  static QCORE_INLINE F high_bf16(F v) {
    return _mm512_castsi512_ps(both(bits(v), spread_word(static_cast<int>(0xffff0000u))));
  }
  static QCORE_INLINE F load_f16(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static QCORE_INLINE I load_bytes(const void* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }

  // sum + x · w over pairs, the odd input first (vdpbf16ps; subnormal numbers count as zero).
  static QCORE_INLINE F dot_pairs(F sum, I x, I w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  // sum + Σ a · b over four uint8 a and int8 b.
  template <bool kWide>
  static QCORE_INLINE I dot_codes(I sum, I a, I b) {
    return _mm512_dpbusd_epi32(sum, a, b);
  }

  static QCORE_INLINE void transpose(F (&r)[16]) {
    F t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    // After this, r[4q + j] holds in each 128-bit quarter l the four rows 4q … 4q + 3 of column
    // 4l + j.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const auto d = [&](int k) { return _mm512_castps_pd(t[i + k]); };
      r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(0), d(2)));
      r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(0), d(2)));
      r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(1), d(3)));
      r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(1), d(3)));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const F even_top = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
      const F odd_top = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
      const F even_bottom = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
      const F odd_bottom = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
      t[j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
      t[4 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
      t[12 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
};

}  // namespace
