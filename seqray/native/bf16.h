// bf16 and float32, and both in the orders that products want: rows side by side, or interleaved in pairs (VNNI).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include "turn.h"

namespace seqray {

using bf16 = c10::BFloat16;

// 32 numbers, the left ones first.
inline __m512i narrow(__m512 left, __m512 right) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(right, left));
}

// The same numbers as bf16 has them.
inline __m512 as_bf16(__m512 value) {
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 16 numbers of this type, as far as the mask goes.
template <>
inline __m512 load(const bf16* from, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16));
}
template <>
inline void store(bf16* into, __mmask16 some, __m512 value) {
  _mm256_mask_storeu_epi16(into, some, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

// Up to 32 numbers from `from` on, then zeros.
inline __m512i narrow_load(const float* from, int64_t count) {
  return narrow(load(from, first_lanes(count)), load(from + LANES, first_lanes(count - LANES)));
}
inline __m512i narrow_load(const bf16* from, int64_t count) {
  const uint32_t some = first_lanes(count) | static_cast<uint32_t>(first_lanes(count - LANES)) << LANES;
  return _mm512_maskz_loadu_epi16(some, from);
}

// 32 numbers of one row and 32 of the next, interleaved.
inline void store_pairs(__m512i row, __m512i next, bf16* into) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_or_si512(count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(32)), 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(into, _mm512_permutex2var_epi16(row, low, next));
  _mm512_storeu_si512(into + 32, _mm512_permutex2var_epi16(row, high, next));
}

// (rows, columns) -> (height, width), zeros around; width is a multiple of 32.
inline void narrow_rows(
    const float* from, int64_t ld_from, int64_t rows, int64_t columns, bf16* into, int64_t height, int64_t width) {
  for (int64_t r = 0; r < height; r++) {
    for (int64_t c = 0; c < width; c += 32) {
      _mm512_storeu_si512(into + r * width + c, narrow_load(from + r * ld_from + c, r < rows ? columns - c : 0));
    }
  }
}

// (rows, columns) -> (height / 2, width, 2), zeros around: rows in interleaved pairs; width is a multiple of 32.
template <typename From>
void pair_rows(
    const From* from, int64_t ld_from, int64_t rows, int64_t columns, bf16* into, int64_t height, int64_t width) {
  for (int64_t r = 0; r < height; r += 2) {
    for (int64_t c = 0; c < width; c += 32) {
      const From* here = from + r * ld_from + c;
      const __m512i row = narrow_load(here, r < rows ? columns - c : 0);
      const __m512i next = narrow_load(here + ld_from, r + 1 < rows ? columns - c : 0);
      store_pairs(row, next, into + r * width + 2 * c);
    }
  }
}

// (rows, columns) -> (height / 2, width, 2) of its transpose, zeros around: columns in interleaved pairs; height is a
// multiple of 32, width of 16.
template <typename From>
void pair_columns(
    const From* from, int64_t ld_from, int64_t rows, int64_t columns, bf16* into, int64_t width, int64_t height) {
  for (int64_t r = 0; r < width; r += LANES) {
    const int64_t real = std::clamp<int64_t>(rows - r, 0, LANES);
    for (int64_t c = 0; c < height; c += 32) {
      __m512 pairs[16];
      read_rows(real, [&](int64_t i) {
        return _mm512_castsi512_ps(narrow_load(from + (r + i) * ld_from + c, columns - c));
      }, pairs);
      transpose(pairs);
      for (int64_t i = 0; i < LANES; i++) _mm512_storeu_ps(into + (c + 2 * i) * width + 2 * r, pairs[i]);
    }
  }
}

// Calls work with a pointer of the tensor's own type.
template <typename Work>
void typed(const at::Tensor& tensor, const Work& work) {
  TORCH_CHECK(tensor.is_contiguous());
  if (tensor.scalar_type() == at::kBFloat16) work(static_cast<bf16*>(tensor.data_ptr()));
  else work(tensor.data_ptr<float>());
}

}  // namespace seqray
