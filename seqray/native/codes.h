// Rows in small whole numbers, what the rounding took from them, and how these are multiplied.
#pragma once

#include <cmath>
#include <cstring>

#include "floats.h"

namespace seqray {

// AVX-512 adds four products at once to a sum of 32 bits, with room for all dimensions. AVX2 adds two to one of 16 bits,
// which has to have room for half of the dimensions of a segment, modulo 2^16 on the way: see query_step.
constexpr int64_t VECTORS = 4, ITEMS = VECTORS * LANES;           // of a tile
constexpr int64_t QUERIES = LANES == 16 ? 4 : 2;                  // of a product: with more there are too few registers
constexpr int64_t LARGEST = LANES == 16 ? 127 : 63;               // codes go from -LARGEST to LARGEST
constexpr int64_t SEGMENT = LANES == 16 ? int64_t{1} << 40 : 64;  // dimensions
constexpr float ROOM = 32000;                                     // in 16 bits

inline float dot(const float* left, const float* right, int64_t D) {
  Floats sum = all(0);
  columns(D, [&](int64_t i, Some some) { sum = multiply_add(load(left + i, some), load(right + i, some), sum); });
  return sum_of(sum);
}

inline float norm(const float* row, int64_t D) { return std::sqrt(dot(row, row, D)); }

// A row in codes; in steps, the norm of the codes and of what the rounding took.
struct Rounded {
  Rounded(const float* row, int64_t D, float step, int8_t* into) : step(step) {
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

// The smallest step with which the codes of a row are no larger than LARGEST, and which a float32 can be divided by.
inline float finest_step(const float* row, int64_t D) {
  float largest = 0;
  for (int64_t i = 0; i < D; i++) largest = std::max(largest, std::abs(row[i]));
  return std::max(largest / LARGEST, 1e-30f);
}

// The largest norm of the parts of a row, or of its codes, that AVX2 sums up in 16 bits: of each segment the dimensions
// of which the second bit is 0, and those of which it is 1.
template <typename T>
float largest_part(const T* row, int64_t D) {
  float largest = 0;
  for (int64_t begin = 0; begin < D; begin += SEGMENT) {
    float squares[2] = {0, 0};
    for (int64_t i = begin; i < std::min(D, begin + SEGMENT); i++) squares[i / 2 % 2] += float(row[i]) * float(row[i]);
    largest = std::max({largest, squares[0], squares[1]});
  }
  return std::sqrt(largest);
}

// The smallest step of a query whose products with items fit, by Cauchy-Schwarz over the largest part of their codes.
inline float query_step(const float* row, int64_t D, float part_of_items) {
  const float finest = finest_step(row, D);
  if (LANES == 16) return finest;
  const float rounding = std::sqrt(SEGMENT / 2.0f) / 2;  // half a step in each dimension
  return std::max(finest, largest_part(row, D) / (ROOM / std::max(part_of_items, 1.0f) - rounding));
}

// Sums of which a product of two rows is made.
inline int64_t segments(int64_t K) { return (K + SEGMENT - 1) / SEGMENT; }

// With what the sums of a query begin, for each segment: it takes back what the codes of items are too much.
inline void starts(const int8_t* codes, int64_t K, int32_t* into) {
  for (int64_t s = 0; s < segments(K); s++) {
    int32_t sums[2] = {0, 0};
    for (int64_t i = s * SEGMENT; i < std::min(K, (s + 1) * SEGMENT); i++) sums[i / 2 % 2] -= LARGEST * codes[i];
    if (LANES == 16) into[s] = sums[0] + sums[1];
    else into[s] = (sums[0] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(sums[1]) << 16);  // modulo 2^16
  }
}

// Sums of the products of codes, LANES items at a time: how they begin, are added to, and become floats.
#ifdef __AVX512F__

using Sums = __m512i;
inline Sums same(int32_t four) { return _mm512_set1_epi32(four); }
inline Sums load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Sums add_products(Sums sums, Sums items, Sums query) { return _mm512_dpbusd_epi32(sums, items, query); }
inline Floats as_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }

#else

using Sums = __m256i;
inline Sums same(int32_t four) { return _mm256_set1_epi32(four); }
inline Sums load_codes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Sums add_products(Sums sums, Sums items, Sums query) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(items, query));
}
inline Floats as_floats(Sums sums) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))); }

#endif

// The products of a tile of items and COUNT queries. `codes` (K / 4, ITEMS, 4): those of the items, of which each is
// LARGEST too much; `query` (COUNT, K); `start` (COUNT, segments).
template <int COUNT>
void products(
    const uint8_t* codes, const int8_t* query, int64_t K, const int32_t* start, Floats (&found)[COUNT][VECTORS]) {
  for (int64_t k = 0; k < K; start++) {
    const bool is_first = k == 0;
    Sums sums[COUNT][VECTORS];
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; q++) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[q][v] = same(start[q * segments(K)]);
    }
    for (const int64_t stop = std::min(K, k + SEGMENT); k < stop; k += 4, codes += 4 * ITEMS) {
      Sums items[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) items[v] = load_codes(codes + v * 4 * LANES);
#pragma GCC unroll 4
      for (int q = 0; q < COUNT; q++) {
        int32_t four;
        std::memcpy(&four, query + q * K + k, 4);
        const Sums factors = same(four);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[q][v] = add_products(sums[q][v], items[v], factors);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; q++) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const Floats part = as_floats(sums[q][v]);
        found[q][v] = is_first ? part : found[q][v] + part;
      }
    }
  }
}

}  // namespace seqray
