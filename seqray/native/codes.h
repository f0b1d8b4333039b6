// Rows in small whole numbers, what the rounding took from them, and how these are multiplied.
#pragma once

#include <cmath>
#include <cstring>

#include "floats.h"

namespace seqray {

// Codes go from -LARGEST to LARGEST. AVX-512 adds four products of 8 bits at once to a sum of 32. AVX2 adds two to one
// of 16, which with codes this small has room for STEPS of them.
constexpr int64_t VECTORS = 4, ITEMS = VECTORS * LANES;  // of a tile
constexpr int64_t QUERIES = LANES == 16 ? 4 : 2;         // of a product: with more the compiler runs out of registers
constexpr int64_t LARGEST = LANES == 16 ? 127 : 44;
constexpr int64_t STEPS = 32767 / (2 * LARGEST * 2 * LARGEST);

inline float dot(const float* left, const float* right, int64_t D) {
  Floats sum = all(0);
  columns(D, [&](int64_t i, Some some) { sum = multiply_add(load(left + i, some), load(right + i, some), sum); });
  return sum_of(sum);
}

inline float norm(const float* row, int64_t D) { return std::sqrt(dot(row, row, D)); }

// A row in codes: what a step stands for, and in steps the norm of the codes and of what the rounding took.
struct Rounded {
  Rounded(const float* row, int64_t D, int8_t* into) {
    float largest = 0;
    for (int64_t i = 0; i < D; i++) largest = std::max(largest, std::abs(row[i]));
    step = largest > 0 ? largest / LARGEST : 1;
    float squares = 0, of_rest = 0;
    for (int64_t i = 0; i < D; i++) {
      const float exact = row[i] / step;
      into[i] = static_cast<int8_t>(std::lrint(std::clamp<float>(exact, -LARGEST, LARGEST)));
      squares += into[i] * into[i], of_rest += (exact - into[i]) * (exact - into[i]);
    }
    size = std::sqrt(squares), error = std::sqrt(of_rest);
  }

  float step, size, error;
};

// The products of a tile of items and COUNT queries, each from `start` on. `codes` (K / 4, ITEMS, 4): those of the
// items, of which each is LARGEST too much; `query` (COUNT, K).
#ifdef __AVX512F__

template <int COUNT>
void products(
    const uint8_t* codes, const int8_t* query, int64_t K, const int32_t* start, Floats (&found)[COUNT][VECTORS]) {
  __m512i sums[COUNT][VECTORS];
#pragma GCC unroll 4
  for (int q = 0; q < COUNT; q++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sums[q][v] = _mm512_set1_epi32(start[q]);
  }
  for (int64_t k = 0; k < K; k += 4, codes += 4 * ITEMS) {
    __m512i weights[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) weights[v] = _mm512_loadu_si512(codes + v * 64);
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; q++) {
      int32_t four;
      std::memcpy(&four, query + q * K + k, 4);
      const __m512i factors = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[q][v] = _mm512_dpbusd_epi32(sums[q][v], weights[v], factors);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < COUNT; q++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) found[q][v] = _mm512_cvtepi32_ps(sums[q][v]);
  }
}

#else

template <int COUNT>
void products(
    const uint8_t* codes, const int8_t* query, int64_t K, const int32_t* start, Floats (&found)[COUNT][VECTORS]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[COUNT][VECTORS];
#pragma GCC unroll 4
  for (int q = 0; q < COUNT; q++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sums[q][v] = _mm256_set1_epi32(start[q]);
  }
  for (int64_t k = 0; k < K;) {
    __m256i pairs[COUNT][VECTORS] = {};
    for (const int64_t stop = std::min(K, k + 4 * STEPS); k < stop; k += 4, codes += 4 * ITEMS) {
      __m256i weights[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        weights[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
      }
#pragma GCC unroll 4
      for (int q = 0; q < COUNT; q++) {
        int32_t four;
        std::memcpy(&four, query + q * K + k, 4);
        const __m256i factors = _mm256_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
          pairs[q][v] = _mm256_add_epi16(pairs[q][v], _mm256_maddubs_epi16(weights[v], factors));
        }
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; q++) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        sums[q][v] = _mm256_add_epi32(sums[q][v], _mm256_madd_epi16(pairs[q][v], ones));
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < COUNT; q++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) found[q][v] = _mm256_cvtepi32_ps(sums[q][v]);
  }
}

#endif

}  // namespace seqray
