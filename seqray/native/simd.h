// What the kernels share: products from oneDNN's microkernels, and AVX-512 pieces of 16 floats at a time.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace seqray {

constexpr int64_t LANES = 16;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

inline int64_t rounded(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Lanes 0 to count - 1; none below, all above.
inline __mmask16 first_lanes(int64_t count) {
  return count >= LANES ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
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

// C (M, N) = A (M, K) B (K, N), or += it; rows of each are `ld_` apart. bf16: B's rows in interleaved pairs.
template <typename T>
inline void product(
    int64_t M, int64_t N, int64_t K, const T* A, int64_t ld_a, const T* B, int64_t ld_b, float* C, int64_t ld_c,
    bool add) {
  at::native::cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, add, A, B, C, sizeof(T) == 2);
}

// A thread that has multiplied says so before it does something else: AMX has a state.
template <typename T>
struct Products {
  ~Products() { at::native::cpublas::brgemm_release(sizeof(T) == 2); }
};

// Calls work(0) to work(count - 1), each on the thread that is free next; a thread says when it has multiplied enough.
template <typename T, typename Work>
void share(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const Products<T> products;
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

// 2^x for x <= 126, with a relative error of 2e-7; 0 far below.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 value = _mm512_set1_ps(1.3397487e-3f);
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(9.6183598e-3f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(5.5503324e-2f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(2.4022652e-1f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(6.9314718e-1f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(value, whole);
}

// 16 x 16 floats, rows become columns.
inline void transpose_16(__m512 (&row)[16]) {
  __m512 half[16];
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

// A well mixed word, the same for the same input everywhere (constants of Wellons' "lowbias32").
inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

inline __m512i mixed(__m512i x) {
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(0x846ca68b));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// The distribution function of the normal by Abramowitz & Stegun 7.1.26: to 3e-5, far below bf16, with the quick
// reciprocal, to 2e-7 with the `exact` one.
struct Normal {
  explicit Normal(__m512 x, bool exact = false) {
    const __m512 one = _mm512_set1_ps(1), half = _mm512_set1_ps(0.5f), size = _mm512_abs_ps(x);
    bell = exp2(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * LOG2_E)));
    const __m512 base = _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f * 0.70710678f), one);
    const __m512 t = exact ? _mm512_div_ps(one, base) : _mm512_rcp14_ps(base);
    __m512 tail = _mm512_set1_ps(1.061405429f);
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(-1.453152027f));
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(1.421413741f));
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(-0.284496736f));
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(0.254829592f));
    tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(tail, t), bell), half);
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
    share = _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), negative, tail);
  }

  __m512 bell, share;  // exp(-x^2 / 2), and the share of the distribution below x
};

// Which of 16 draws stay: a share of 1 - rate.
struct Dropout {
  Dropout(double rate, int64_t seed)
      : factor(static_cast<float>(1 / (1 - rate))), on(rate > 0), limit_(static_cast<uint32_t>(rate * 4294967296.0)),
        low_(static_cast<uint32_t>(seed)), high_(static_cast<uint32_t>(seed >> 32)) {}

  // The part of a draw that belongs to rows number to number + 15.
  __m512i lanes(int64_t number) const {
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return mixed(_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(low_ + number)), count));
  }

  // The part of a draw that belongs to a column of a sheet.
  __m512i place(int64_t column, int64_t sheet) const {
    return _mm512_set1_epi32(mixed(static_cast<uint32_t>(column) + mixed(high_ + static_cast<uint32_t>(sheet))));
  }

  __mmask16 kept(__m512i lanes, __m512i place) const {
    return _mm512_cmpge_epu32_mask(mixed(_mm512_xor_si512(lanes, place)), _mm512_set1_epi32(limit_));
  }

  float factor;
  bool on;

 private:
  uint32_t limit_, low_, high_;
};

}  // namespace seqray
