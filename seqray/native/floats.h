// Floats: as many float32 numbers as a register of the CPU holds, LANES of them, and what kernels for all CPUs do with
// them. `+`, `-`, `*` and `/` are the compiler's own; Some are lanes from the first on, ALL of them or fewer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef __AVX512F__
#include "floats_avx512.h"
#else
#include "floats_avx2.h"
#endif

namespace seqray {

constexpr float LOG2_E = 1.4426950408889634f;

inline int64_t rounded(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Memory that a thread keeps from call to call, on the boundary of a cache line.
template <typename T>
class Scratch {
 public:
  T* of(int64_t count) {
    const size_t bytes = rounded(count * sizeof(T), 64) + 64;
    if (memory_.size() < bytes) memory_.resize(bytes);
    return reinterpret_cast<T*>(rounded(reinterpret_cast<intptr_t>(memory_.data()), 64));
  }

 private:
  std::vector<char> memory_;
};

// 2^x for x <= 126, with a relative error of 2e-7; 0 far below.
inline Floats exp2(Floats x) {
  const Floats power = whole(x), part = x - power;
  Floats value = all(1.3397487e-3f);
  value = multiply_add(value, part, all(9.6183598e-3f));
  value = multiply_add(value, part, all(5.5503324e-2f));
  value = multiply_add(value, part, all(2.4022652e-1f));
  value = multiply_add(value, part, all(6.9314718e-1f));
  value = multiply_add(value, part, all(1.0f));
  return times_power_of_2(value, power);
}

// The distribution function of the normal by Abramowitz & Stegun 7.1.26: to 3e-5, far below bf16, with the quick
// reciprocal of AVX-512, to 2e-7 with the `exact` one.
struct Normal {
  explicit Normal(Floats x, bool exact = false) {
    const Floats one = all(1);
    bell = exp2(x * x * all(-0.5f * LOG2_E));
    const Floats base = multiply_add(magnitude(x), all(0.3275911f * 0.70710678f), one);
    const Floats t = exact ? one / base : quick_inverse(base);
    Floats tail = all(1.061405429f);
    tail = multiply_add(tail, t, all(-1.453152027f));
    tail = multiply_add(tail, t, all(1.421413741f));
    tail = multiply_add(tail, t, all(-0.284496736f));
    tail = multiply_add(tail, t, all(0.254829592f));
    tail = tail * t * bell * all(0.5f);
    share = where_negative(x, tail, one - tail);
  }

  Floats bell, share;  // exp(-x^2 / 2), and the share of the distribution below x
};

// Calls work(i, lanes) for every LANES of count columns.
template <typename Work>
void columns(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) work(i, ALL);
  if (i < count) work(i, first_lanes(count - i));
}

}  // namespace seqray
