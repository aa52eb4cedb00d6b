// Sixteen numbers side by side, one body for every instruction set (GCC vector extensions).
//
// Every element is summed in the order of k with separate products and sums, so the bits are the
// same whatever the vector width. For files that are compiled for one instruction set: everything
// is forced inline, nothing is left for the linker to share.
#pragma once

#include <cstdint>

#define QCORE_INLINE static inline __attribute__((always_inline))

namespace qcore {
namespace {

constexpr int64_t kLanes = 16;

typedef float FloatLanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef double DoubleLanes __attribute__((vector_size(128)));

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef FloatLanes type;
};
template <>
struct LanesOf<double> {
  typedef DoubleLanes type;
};

template <typename T>
QCORE_INLINE typename LanesOf<T>::type load_lanes(const T* from) {
  typename LanesOf<T>::type value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename T, typename V>
QCORE_INLINE void store_lanes(T* to, const V& value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// One matrix of scalars seen as s(k, j) = data[k · k_stride + j · j_stride].
template <typename T>
struct Scalars {
  const T* data;
  int64_t k_stride;
  int64_t j_stride;
};

template <int kColumns, typename T>
QCORE_INLINE void accumulate_columns(T* sums, int64_t sums_stride, const T* lanes,
                                     int64_t lanes_stride, const Scalars<T>& s, int64_t n_k) {
  typedef typename LanesOf<T>::type V;
  V sum[kColumns];
  for (int c = 0; c < kColumns; ++c) sum[c] = load_lanes(sums + c * sums_stride);
  for (int64_t k = 0; k < n_k; ++k) {
    const V x = load_lanes(lanes + k * lanes_stride);
    const T* scalar = s.data + k * s.k_stride;
    for (int c = 0; c < kColumns; ++c) sum[c] += x * scalar[c * s.j_stride];
  }
  for (int c = 0; c < kColumns; ++c) store_lanes(sums + c * sums_stride, sum[c]);
}

// sums[j] += Σ_k lanes[k] · s(k, j), k ascending, for j in [0, n_j); strides count elements.
template <typename T>
QCORE_INLINE void accumulate(T* sums, int64_t sums_stride, const T* lanes, int64_t lanes_stride,
                             const Scalars<T>& s, int64_t n_k, int64_t n_j) {
#if defined(__AVX512F__)
  constexpr int kColumns = 8;  // 8 (float) or 16 (double) sums of the 32 registers
#else
  constexpr int kColumns = sizeof(T) == 4 ? 4 : 2;
#endif
  constexpr int64_t kDepth = 256;  // 16 KiB of float lanes: they stay in the first cache
  for (int64_t k0 = 0; k0 < n_k; k0 += kDepth) {
    const int64_t depth = n_k - k0 < kDepth ? n_k - k0 : kDepth;
    const T* x = lanes + k0 * lanes_stride;
    const T* row = s.data + k0 * s.k_stride;
    int64_t j = 0;
    for (; j + kColumns <= n_j; j += kColumns) {
      accumulate_columns<kColumns>(sums + j * sums_stride, sums_stride, x, lanes_stride,
                                   Scalars<T>{row + j * s.j_stride, s.k_stride, s.j_stride}, depth);
    }
    for (; j < n_j; ++j) {
      accumulate_columns<1>(sums + j * sums_stride, sums_stride, x, lanes_stride,
                            Scalars<T>{row + j * s.j_stride, s.k_stride, s.j_stride}, depth);
    }
  }
}

// Per lane: d · H · dᵀ = Σ_j d_j (H_jj d_j + 2 Σ_{i<j} d_i H_ij) from H's upper triangle.
//   d (n, 16), h (n, n) row-major; sums (n, 16) is scratch; out (16,) is overwritten.
template <typename T>
QCORE_INLINE void quadratic_form_lanes(const T* d, const T* h, int64_t h_stride, int64_t n, T* sums,
                                       double* out) {
  constexpr int64_t kBlock = 32;
  DoubleLanes total = {};
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    const int64_t width = n - j0 < kBlock ? n - j0 : kBlock;
    const typename LanesOf<T>::type zero = {};
    for (int64_t j = 0; j < width; ++j) store_lanes(sums + j * kLanes, zero);
    accumulate(sums, kLanes, d, kLanes, Scalars<T>{h + j0, h_stride, 1}, j0, width);
    for (int64_t j = 0; j < width; ++j) {
      const auto dj = load_lanes(d + (j0 + j) * kLanes);
      const T* row = h + (j0 + j) * h_stride + j0;
      const auto term = dj * (dj * row[j] + load_lanes(sums + j * kLanes) * T(2));
      total += __builtin_convertvector(term, DoubleLanes);
      for (int64_t l = j + 1; l < width; ++l) {
        store_lanes(sums + l * kLanes, load_lanes(sums + l * kLanes) + dj * row[l]);
      }
    }
  }
  store_lanes(out, total);
}

}  // namespace
}  // namespace qcore
