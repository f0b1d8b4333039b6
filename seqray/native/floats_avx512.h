// Floats with AVX-512; see floats.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace seqray {

using Floats = __m512;
using Some = __mmask16;
constexpr int64_t LANES = 16;
constexpr Some ALL = 0xffff;

// Numbers of any type as far as `some` goes, zeros beyond.
template <typename T>
Floats load(const T* from, Some some);
template <typename T>
void store(T* into, Some some, Floats value);

// Lanes 0 to count - 1; none below, all above.
inline Some first_lanes(int64_t count) {
  return count >= LANES ? ALL : count <= 0 ? 0 : static_cast<Some>((1u << count) - 1);
}

inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
template <>
inline Floats load(const float* from, Some some) {
  return _mm512_maskz_loadu_ps(some, from);
}
inline void store(float* into, Floats value) { _mm512_storeu_ps(into, value); }
template <>
inline void store(float* into, Some some, Floats value) {
  _mm512_mask_storeu_ps(into, some, value);
}
inline Floats either(Some some, Floats value, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, some, value); }
inline Floats where_negative(Floats sign, Floats value, Floats otherwise) {
  return either(_mm512_movepi32_mask(_mm512_castps_si512(sign)), value, otherwise);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
inline Floats quick_inverse(Floats a) { return _mm512_rcp14_ps(a); }
inline float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest_of(Floats a) { return _mm512_reduce_max_ps(a); }
inline Floats whole(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_2(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }

// A bit for each lane in which a >= b.
inline uint64_t at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

// LANES x LANES floats, rows become columns.
inline void transpose(Floats (&row)[LANES]) {
  Floats half[16];
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    half[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_shuffle_ps(half[i], half[i + 2], 0x44);
    row[i + 1] = _mm512_shuffle_ps(half[i], half[i + 2], 0xee);
    row[i + 2] = _mm512_shuffle_ps(half[i + 1], half[i + 3], 0x44);
    row[i + 3] = _mm512_shuffle_ps(half[i + 1], half[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    half[i] = _mm512_shuffle_f32x4(row[i], row[i + 4], 0x88);
    half[i + 4] = _mm512_shuffle_f32x4(row[i], row[i + 4], 0xdd);
    half[i + 8] = _mm512_shuffle_f32x4(row[i + 8], row[i + 12], 0x88);
    half[i + 12] = _mm512_shuffle_f32x4(row[i + 8], row[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    row[i] = _mm512_shuffle_f32x4(half[i], half[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_f32x4(half[i], half[i + 8], 0xdd);
    row[i + 4] = _mm512_shuffle_f32x4(half[i + 4], half[i + 12], 0x88);
    row[i + 12] = _mm512_shuffle_f32x4(half[i + 4], half[i + 12], 0xdd);
  }
}

}  // namespace seqray
