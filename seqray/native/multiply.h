// Products of small matrices in float32, of any sizes and without a word beforehand: a kernel that is made for each new
// size, as oneDNN's are, takes longer to make than a history takes to read.
#pragma once

#include "bf16.h"
#include "simd.h"

namespace seqray {

constexpr int64_t ROWS = 4, VECTORS = 4, COLUMNS = VECTORS * LANES;

// What a product adds to: C = A B + bias, and + C where that is there already.
struct Factors {
  int64_t K;
  const float* A;
  int64_t ld_a;
  const float* B;
  int64_t ld_b;
  const float* bias;  // null: none
  float* C;
  int64_t ld_c;
  bool add;
};

// COUNT rows of a product, in up to COLUMNS columns, `last` of the last vector. All sums stay in registers.
template <int COUNT, int WIDTH>
void tile(const Factors& of, __mmask16 last) {
  __m512 sums[COUNT][WIDTH];
  const auto mask = [&](int v) { return v + 1 < WIDTH ? static_cast<__mmask16>(0xffff) : last; };
#pragma GCC unroll 4
  for (int v = 0; v < WIDTH; v++) {
    const __m512 start = of.bias ? load(of.bias + v * LANES, mask(v)) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++) {
      sums[r][v] = of.add ? _mm512_add_ps(start, load(of.C + r * of.ld_c + v * LANES, mask(v))) : start;
    }
  }
  for (int64_t k = 0; k < of.K; k++) {
    __m512 row[WIDTH];
#pragma GCC unroll 4
    for (int v = 0; v < WIDTH; v++) row[v] = load(of.B + k * of.ld_b + v * LANES, mask(v));
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++) {
      const __m512 factor = _mm512_set1_ps(of.A[r * of.ld_a + k]);
#pragma GCC unroll 4
      for (int v = 0; v < WIDTH; v++) sums[r][v] = _mm512_fmadd_ps(factor, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < COUNT; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < WIDTH; v++) store(of.C + r * of.ld_c + v * LANES, mask(v), sums[r][v]);
  }
}

using Tile = void (*)(const Factors&, __mmask16);
constexpr Tile TILES[ROWS][VECTORS] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>},
    {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>},
    {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>}};

// A product of M rows and N columns. Each sum is taken in the order of K.
inline void multiply(int64_t M, int64_t N, const Factors& of) {
  for (int64_t n = 0; n < N; n += COLUMNS) {
    const int64_t width = std::min(COLUMNS, N - n), vectors = (width + LANES - 1) / LANES;
    const __mmask16 last = first_lanes(width - (vectors - 1) * LANES);
    for (int64_t m = 0; m < M; m += ROWS) {
      Factors part = of;
      part.A += m * of.ld_a, part.B += n, part.C += m * of.ld_c + n;
      if (of.bias) part.bias += n;
      TILES[std::min(ROWS, M - m) - 1][vectors - 1](part, last);
    }
  }
}

}  // namespace seqray
