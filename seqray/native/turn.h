// Rows that become columns.
#pragma once

#include "floats.h"

namespace seqray {

// read(0) to read(real - 1), then zeros; all LANES are the usual case and stay in registers.
template <typename Read>
inline __attribute__((always_inline)) void read_rows(int64_t real, const Read& read, Floats (&rows)[LANES]) {
  if (real == LANES) {
    for (int64_t i = 0; i < LANES; i++) rows[i] = read(i);
  } else {
    for (int64_t i = 0; i < LANES; i++) rows[i] = i < real ? read(i) : all(0);
  }
}

// (rows, columns) -> its transpose (columns, ld_into), zeros from `rows` to `width`. With `factor` each row is
// multiplied by its own.
template <typename From, typename Into>
void turn(
    const From* from, int64_t ld_from, int64_t rows, int64_t columns, Into* into, int64_t ld_into, int64_t width,
    const float* factor = nullptr) {
  for (int64_t r = 0; r < width; r += LANES) {
    const int64_t real = std::clamp<int64_t>(rows - r, 0, LANES);
    const Some room = first_lanes(width - r);
    for (int64_t c = 0; c < columns; c += LANES) {
      const Some some = first_lanes(columns - c);
      Floats tile[LANES];
      read_rows(real, [&](int64_t i) { return load(from + (r + i) * ld_from + c, some); }, tile);
      for (int64_t i = 0; factor && i < real; i++) tile[i] = tile[i] * all(factor[r + i]);
      transpose(tile);
      if (some == ALL) {
        for (int64_t i = 0; i < LANES; i++) store(into + (c + i) * ld_into + r, room, tile[i]);
      } else {
        for (int64_t i = 0; i < columns - c; i++) store(into + (c + i) * ld_into + r, room, tile[i]);
      }
    }
  }
}

}  // namespace seqray
