// What the kernels of training share, all for AVX-512: products from oneDNN's microkernels, and dropout.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>

#include "floats.h"

namespace seqray {

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
