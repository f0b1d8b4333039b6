// Products of small matrices in float32, of any sizes and without a word beforehand: a kernel that is made for each new
// size, as oneDNN's are, takes longer to make than a history takes to read.
#pragma once

#include <array>
#include <utility>

#include "floats.h"

namespace seqray {

// Of a tile: its sums, and what a step takes beside them, fit into 32 registers of AVX-512 and 16 of AVX2.
constexpr int64_t ROWS = LANES == 16 ? 4 : 6, VECTORS = LANES == 16 ? 4 : 2, COLUMNS = VECTORS * LANES;

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
template <int COUNT, int WIDTH, bool WHOLE>
void tile(const Factors& of, Some last) {
  Floats sums[COUNT][WIDTH];
  const auto some = [&](int v) { return WHOLE || v + 1 < WIDTH ? ALL : last; };
#pragma GCC unroll 8
  for (int v = 0; v < WIDTH; v++) {
    const Floats start = of.bias ? load(of.bias + v * LANES, some(v)) : all(0);
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
      sums[r][v] = of.add ? start + load(of.C + r * of.ld_c + v * LANES, some(v)) : start;
    }
  }
  for (int64_t k = 0; k < of.K; k++) {
    Floats row[WIDTH];
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; v++) row[v] = load(of.B + k * of.ld_b + v * LANES, some(v));
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
      const Floats factor = all(of.A[r * of.ld_a + k]);
#pragma GCC unroll 8
      for (int v = 0; v < WIDTH; v++) sums[r][v] = multiply_add(factor, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; v++) store(of.C + r * of.ld_c + v * LANES, some(v), sums[r][v]);
  }
}

using Tile = void (*)(const Factors&, Some);

template <bool WHOLE, int... PLACE>
constexpr std::array<Tile, ROWS * VECTORS> tiles(std::integer_sequence<int, PLACE...>) {
  return {tile<PLACE / VECTORS + 1, PLACE % VECTORS + 1, WHOLE>...};
}

using Places = std::make_integer_sequence<int, ROWS * VECTORS>;
constexpr std::array<Tile, ROWS * VECTORS> WHOLE_TILES = tiles<true>(Places()), TILES = tiles<false>(Places());

// A product of M rows and N columns. Each sum is taken in the order of K.
inline void multiply(int64_t M, int64_t N, const Factors& of) {
  for (int64_t n = 0; n < N; n += COLUMNS) {
    const int64_t width = std::min(COLUMNS, N - n), vectors = (width + LANES - 1) / LANES;
    const Some last = first_lanes(width - (vectors - 1) * LANES);
    const auto& fitting = last == ALL ? WHOLE_TILES : TILES;
    for (int64_t m = 0; m < M; m += ROWS) {
      Factors part = of;
      part.A += m * of.ld_a, part.B += n, part.C += m * of.ld_c + n;
      if (of.bias) part.bias += n;
      fitting[(std::min(ROWS, M - m) - 1) * VECTORS + vectors - 1](part, last);
    }
  }
}

}  // namespace seqray
