// Floats with AVX2; see floats.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace seqray {

using Floats = __m256;
constexpr int64_t LANES = 8;

struct Some {
  int64_t count;

  bool operator==(const Some& other) const { return count == other.count; }
  __m256i mask() const {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
};
constexpr Some ALL{LANES};

// Numbers of any type as far as `some` goes, zeros beyond.
template <typename T>
Floats load(const T* from, Some some);
template <typename T>
void store(T* into, Some some, Floats value);

// Lanes 0 to count - 1; none below, all above.
inline Some first_lanes(int64_t count) { return {std::clamp<int64_t>(count, 0, LANES)}; }

inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
template <>
inline Floats load(const float* from, Some some) {
  return some == ALL ? load(from) : _mm256_maskload_ps(from, some.mask());
}
inline void store(float* into, Floats value) { _mm256_storeu_ps(into, value); }
template <>
inline void store(float* into, Some some, Floats value) {
  if (some == ALL) store(into, value);  // a masked one takes 20 times as long on some CPUs
  else _mm256_maskstore_ps(into, some.mask(), value);
}
inline Floats where_negative(Floats sign, Floats value, Floats otherwise) {
  return _mm256_blendv_ps(otherwise, value, sign);
}
inline Floats either(Some some, Floats value, Floats otherwise) {
  return some == ALL ? value : where_negative(_mm256_castsi256_ps(some.mask()), value, otherwise);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats magnitude(Floats a) { return _mm256_andnot_ps(all(-0.0f), a); }
inline Floats quick_inverse(Floats a) { return all(1) / a; }
inline __m128 upper(Floats a) { return _mm256_extractf128_ps(a, 1); }
inline __m128 lower(Floats a) { return _mm256_castps256_ps128(a); }
inline float sum_of(Floats a) {
  __m128 four = lower(a) + upper(a);
  four = four + _mm_movehl_ps(four, four);
  return four[0] + four[1];
}
inline float largest_of(Floats a) {
  __m128 four = _mm_max_ps(lower(a), upper(a));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return std::max(four[0], four[1]);
}
inline Floats whole(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// power: whole, at most 127; what is below 2^-126 becomes 0.
inline Floats times_power_of_2(Floats a, Floats power) {
  const __m256i exponent = _mm256_cvtps_epi32(larger(power, all(-127)) + all(127));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

// A bit for each lane in which a >= b.
inline uint64_t at_least(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

// LANES x LANES floats, rows become columns.
inline void transpose(Floats (&row)[LANES]) {
  Floats half[8];
  for (int i = 0; i < 8; i += 2) {
    half[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    half[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_shuffle_ps(half[i], half[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(half[i], half[i + 2], 0xee);
    row[i + 2] = _mm256_shuffle_ps(half[i + 1], half[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(half[i + 1], half[i + 3], 0xee);
  }
  std::copy_n(row, 8, half);
  for (int i = 0; i < 4; i++) {
    row[i] = _mm256_permute2f128_ps(half[i], half[i + 4], 0x20);
    row[i + 4] = _mm256_permute2f128_ps(half[i], half[i + 4], 0x31);
  }
}

}  // namespace seqray
