// Rows in int8, with what the rounding took from them.
#pragma once

#include <cmath>

#include "bf16.h"
#include "simd.h"

namespace seqray {

constexpr int64_t ITEMS = 64;  // of a tile
constexpr float LARGEST = 127;

inline float dot(const float* left, const float* right, int64_t D) {
  __m512 sum = _mm512_setzero_ps();
  columns(D, [&](int64_t i, __mmask16 some) {
    sum = _mm512_fmadd_ps(load(left + i, some), load(right + i, some), sum);
  });
  return _mm512_reduce_add_ps(sum);
}

inline float norm(const float* row, int64_t D) { return std::sqrt(dot(row, row, D)); }

// A row in int8: what a step stands for, the norm of the rounded row and of what the rounding took.
struct Rounded {
  Rounded(const float* row, int64_t D, int8_t* into) {
    float largest = 0;
    for (int64_t i = 0; i < D; i++) largest = std::max(largest, std::abs(row[i]));
    step = largest > 0 ? largest / LARGEST : 1;
    float squares = 0, of_rest = 0;
    for (int64_t i = 0; i < D; i++) {
      into[i] = static_cast<int8_t>(std::lrint(std::clamp(row[i] / step, -LARGEST, LARGEST)));
      const float value = into[i] * step, rest = row[i] - value;
      squares += value * value, of_rest += rest * rest;
    }
    size = std::sqrt(squares), error = std::sqrt(of_rest);
  }

  float step, size, error;
};

}  // namespace seqray
