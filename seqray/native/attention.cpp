// Causal softmax attention over packed sequences, none of which is padded; products in the type of the input.
//
// Queries go in blocks of 32 consecutive events, whatever sequences these belong to; a block meets the keys from the
// start of its first sequence to its own end. Scores stand with a key in a row and the block's queries in two vectors,
// so that softmax never adds up across a vector. Short sequences are done together, so that blocks are full; what one
// thread does depends on the lengths alone, and so do the results. Shapes: T events, D = H * d; qkv (T, 3D).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "bf16.h"
#include "packed.h"
#include "simd.h"

namespace seqray {
namespace {

// Two rows of a block's queries, one for each of two keys, where a product's second factor wants them.
void put(__m512 (&row)[2][2], float* into) {
  for (int k = 0; k < 2; k++) {
    for (int half = 0; half < 2; half++) _mm512_storeu_ps(into + k * QUERIES + half * LANES, row[k][half]);
  }
}
void put(__m512 (&row)[2][2], bf16* into) {
  store_pairs(narrow(row[0][0], row[0][1]), narrow(row[1][0], row[1][1]), into);
}

// Rows of events as a product's second factor: one column for each.
void as_columns(const float* from, int64_t ld, int64_t rows, int64_t d, float* into) {
  turn(from, ld, rows, d, into, QUERIES, QUERIES);
}
void as_columns(const bf16* from, int64_t ld, int64_t rows, int64_t d, bf16* into) {
  pair_columns(from, ld, rows, d, into, QUERIES, rounded(d, 32));
}

// A head's rows in a run of sequences. What follows in the memory of a row is of another head.
template <typename T>
struct Rows {
  const T* at;
  int64_t ld;
  const T* row(int64_t t) const { return at + t * ld; }
};

// C (M, d) += A (M, count) times `count` rows of events; A has zeros from `count` on.
void add_product(
    int64_t M, int64_t count, int64_t d, const float* A, Rows<float> rows, int64_t t, float* C, float* /* memory */) {
  product(M, d, count, A, QUERIES, rows.row(t), rows.ld, C, d, true);
}
void add_product(
    int64_t M, int64_t count, int64_t d, const bf16* A, Rows<bf16> rows, int64_t t, float* C, bf16* memory) {
  const int64_t width = rounded(d, 32);
  pair_rows(rows.row(t), rows.ld, count, d, memory, QUERIES, width);
  product(M, d, rounded(count, 2), A, QUERIES, memory, width, C, d, true);
}

// Scores (keys, QUERIES) -> exp2(scale * (score - largest)), dropped where dropout says so; `factor` makes chances of
// them.
template <typename T>
void soften(
    const Block& block, int64_t head, const Dropout& dropout, float scale, const float* scores, T* chances,
    float* factor, float* log_sum) {
  const __m512 scales = _mm512_set1_ps(scale);
  __m512 largest[2], sum[2];
  __m512i draws[2];
  for (int half = 0; half < 2; half++) {
    largest[half] = _mm512_set1_ps(-3e38f);
    sum[half] = _mm512_setzero_ps();
    draws[half] = dropout.lanes(block.first + half * LANES);
  }
  for (int64_t k = 0; k < block.keys; k++) {
    for (int half = 0; half < 2; half++) {
      const __m512 score = _mm512_loadu_ps(scores + k * QUERIES + half * LANES);
      largest[half] = _mm512_mask_max_ps(largest[half], block.see(block.key + k, half * LANES), largest[half], score);
    }
  }
  for (int half = 0; half < 2; half++) largest[half] = _mm512_mul_ps(largest[half], scales);
  for (int64_t k = 0; k < block.keys; k += 2) {
    __m512 row[2][2] = {};
    for (int64_t i = k; i < std::min(k + 2, block.keys); i++) {
      for (int half = 0; half < 2; half++) {
        __mmask16 seen = block.see(block.key + i, half * LANES);
        if (!seen) continue;
        const __m512 score = _mm512_loadu_ps(scores + i * QUERIES + half * LANES);
        const __m512 chance = exp2(_mm512_fmsub_ps(score, scales, largest[half]));
        sum[half] = _mm512_mask_add_ps(sum[half], seen, sum[half], chance);
        if (dropout.on) seen &= dropout.kept(draws[half], dropout.place(block.key + i, head));
        row[i - k][half] = _mm512_maskz_mov_ps(seen, chance);
      }
    }
    put(row, chances + k * QUERIES);
  }
  for (int half = 0; half < 2; half++) {
    _mm512_storeu_ps(factor + half * LANES, _mm512_div_ps(_mm512_set1_ps(dropout.factor), sum[half]));
    for (int64_t i = half * LANES; i < std::min((half + 1) * LANES, block.count); i++) {
      log_sum[i] = largest[half][i % LANES] + std::log2(sum[half][i % LANES]);
    }
  }
}

// From scores and the slopes of the dropped chances: the dropped chances, as a product's first factor, and the slopes
// of the scores as first and as second factor.
template <typename T>
void slopes_of_scores(
    const Block& block, int64_t head, const Dropout& dropout, const float* log_sum, float scale, float* scores,
    float* slopes, T* chances, T* first, T* second) {
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, log_sums[2];
  __m512i draws[2];
  for (int half = 0; half < 2; half++) {
    log_sums[half] = load(log_sum + half * LANES, first_lanes(block.count - half * LANES));
    draws[half] = dropout.lanes(block.first + half * LANES);
  }
  for (int64_t k = 0; k < block.keys; k++) {
    for (int half = 0; half < 2; half++) {
      const int64_t at = k * QUERIES + half * LANES;
      const __mmask16 seen = block.see(block.key + k, half * LANES);
      __m512 chance = _mm512_setzero_ps(), dropped = chance, part = chance;
      if (seen) {
        const __m512 score = _mm512_mul_ps(load(scores + at, seen), _mm512_set1_ps(scale * LOG2_E));
        chance = _mm512_maskz_mov_ps(seen, exp2(_mm512_sub_ps(score, log_sums[half])));
        const __mmask16 kept = dropout.on ? dropout.kept(draws[half], dropout.place(block.key + k, head)) : 0xffff;
        dropped = _mm512_maskz_mul_ps(kept, chance, _mm512_set1_ps(dropout.factor));
        part = _mm512_mul_ps(dropped, load(slopes + at, seen));
        total[half] = _mm512_add_ps(total[half], part);
      }
      store(chances + at, 0xffff, dropped);
      store(scores + at, 0xffff, chance);
      store(slopes + at, 0xffff, part);
    }
  }
  for (int64_t k = 0; k < block.keys; k += 2) {
    __m512 row[2][2] = {};
    for (int64_t i = k; i < std::min(k + 2, block.keys); i++) {
      for (int half = 0; half < 2; half++) {
        const int64_t at = i * QUERIES + half * LANES;
        const __m512 slope = _mm512_fnmadd_ps(load(scores + at, 0xffff), total[half], load(slopes + at, 0xffff));
        row[i - k][half] = _mm512_mul_ps(slope, _mm512_set1_ps(scale));
        if (static_cast<void*>(first) != second) store(first + at, 0xffff, row[i - k][half]);
      }
    }
    put(row, second + k * QUERIES);
  }
}

template <typename T>
void forward_run(
    const Sequences& sequences, int64_t first, int64_t stop, const Sizes& of, int64_t head, const Dropout& dropout,
    const T* qkv, T* mixed, float* log_sums) {
  static thread_local Scratch<T> query_memory, value_memory, chance_memory;
  static thread_local Scratch<float> score_memory, mixed_memory;
  const int64_t events = stop - first, width = rounded(events + 1, LANES), d = of.d;
  T *query = query_memory.of(rounded(d, 32) * QUERIES), *value = value_memory.of(d * width);
  T* chances = chance_memory.of((events + 1) * QUERIES);
  float *scores = score_memory.of(events * QUERIES), *out = mixed_memory.of(d * QUERIES);
  const Rows<T> q{qkv + head * d, of.row()}, k{q.at + of.D(), of.row()}, v{k.at + of.D(), of.row()};
  turn(v.row(first), v.ld, events, d, value, width, width);
  for (int64_t at = first; at < stop; at += QUERIES) {
    const Block block(sequences, at, std::min(at + QUERIES, stop));
    as_columns(q.row(at), q.ld, block.count, d, query);
    product(block.keys, QUERIES, d, k.row(block.key), k.ld, query, QUERIES, scores, QUERIES, false);
    float factor[QUERIES], log_sum[QUERIES];
    soften(block, head, dropout, LOG2_E / std::sqrt(static_cast<float>(d)), scores, chances, factor, log_sum);
    std::copy_n(log_sum, block.count, log_sums + head * of.T + at);
    const int64_t keys = rounded(block.keys, sizeof(T) == 2 ? 2 : 1);
    product(d, QUERIES, keys, value + block.key - first, width, chances, QUERIES, out, QUERIES, false);
    for (int64_t i = 0; i < d * QUERIES; i += QUERIES) {
      for (int64_t j = 0; j < QUERIES; j++) out[i + j] *= factor[j];
    }
    turn(out, QUERIES, d, block.count, mixed + at * of.D() + head * d, of.D(), d);
  }
}

template <typename T>
void backward_run(
    const Sequences& sequences, int64_t first, int64_t stop, const Sizes& of, int64_t head, const Dropout& dropout,
    const T* qkv, const T* slope, const float* log_sums, T* slopes) {
  static thread_local Scratch<T> query_memory, slope_memory, key_memory, chance_memory, left_memory, right_memory;
  static thread_local Scratch<T> pair_memory;
  static thread_local Scratch<float> score_memory, of_chance_memory, out_memory, sum_memory;
  const int64_t events = stop - first, width = rounded(events + 1, LANES), d = of.d, cells = (events + 1) * QUERIES;
  T *query = query_memory.of(rounded(d, 32) * QUERIES), *of_mixed = slope_memory.of(rounded(d, 32) * QUERIES);
  T *key = key_memory.of(d * width), *chances = chance_memory.of(cells), *right = right_memory.of(cells);
  T *left = sizeof(T) == 2 ? left_memory.of(cells) : right, *pairs = pair_memory.of(rounded(d, 32) * QUERIES);
  float *scores = score_memory.of(cells), *of_chances = of_chance_memory.of(cells), *out = out_memory.of(d * QUERIES);
  float *of_key = sum_memory.of(2 * events * d), *of_value = of_key + events * d;
  const Rows<T> q{qkv + head * d, of.row()}, k{q.at + of.D(), of.row()}, v{k.at + of.D(), of.row()};
  const Rows<T> upstream{slope + head * d, of.D()};
  std::fill_n(of_key, 2 * events * d, 0.0f);
  turn(k.row(first), k.ld, events, d, key, width, width);
  for (int64_t at = first; at < stop; at += QUERIES) {
    const Block block(sequences, at, std::min(at + QUERIES, stop));
    const int64_t keys = block.keys, from = block.key - first;
    as_columns(q.row(at), q.ld, block.count, d, query);
    as_columns(upstream.row(at), upstream.ld, block.count, d, of_mixed);
    product(keys, QUERIES, d, k.row(block.key), k.ld, query, QUERIES, scores, QUERIES, false);
    product(keys, QUERIES, d, v.row(block.key), v.ld, of_mixed, QUERIES, of_chances, QUERIES, false);
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    slopes_of_scores(
        block, head, dropout, log_sums + head * of.T + at, scale, scores, of_chances, chances, left, right);
    add_product(keys, block.count, d, chances, upstream, at, of_value + from * d, pairs);
    add_product(keys, block.count, d, left, q, at, of_key + from * d, pairs);
    const int64_t even = rounded(keys, sizeof(T) == 2 ? 2 : 1);
    product(d, QUERIES, even, key + from, width, right, QUERIES, out, QUERIES, false);
    turn(out, QUERIES, d, block.count, slopes + at * of.row() + head * d, of.row(), d);
  }
  for (int64_t t = 0; t < events; t++) {
    T* into = slopes + (first + t) * of.row() + of.D() + head * d;
    columns(d, [&](int64_t i, __mmask16 some) {
      store(into + i, some, load(of_key + t * d + i, some));
      store(into + of.D() + i, some, load(of_value + t * d + i, some));
    });
  }
}

// Calls work(first, stop, head) for each run of sequences and each head.
template <typename T, typename Work>
void over_runs(const Sequences& sequences, int64_t heads, const Work& work) {
  const int64_t runs = static_cast<int64_t>(sequences.runs.size()) - 1;
  share<T>(runs * heads, [&](int64_t i) {
    work(sequences.runs[i / heads], sequences.runs[i / heads + 1], i % heads);
  });
}

Sizes sizes(const at::Tensor& qkv, int64_t heads) {
  TORCH_CHECK(qkv.dim() == 2 && qkv.is_contiguous() && qkv.size(1) % (3 * heads) == 0);
  const int64_t d = qkv.size(1) / (3 * heads);
  TORCH_CHECK(qkv.scalar_type() == at::kFloat || (qkv.scalar_type() == at::kBFloat16 && d % 2 == 0));
  return {qkv.size(0), heads, d};
}

// (mixed (T, D), log2 of the sum of exp(scores) (H, T)).
std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& qkv, const at::Tensor& lengths, int64_t heads, double rate, int64_t seed) {
  const Sizes of = sizes(qkv, heads);
  const Sequences sequences(lengths);
  TORCH_CHECK(static_cast<int64_t>(sequences.begin.size()) == of.T);
  const at::Tensor mixed = at::empty({of.T, of.D()}, qkv.options());
  const at::Tensor log_sums = at::empty({heads, of.T}, qkv.options().dtype(at::kFloat));
  const Dropout dropout(rate, seed);
  float* sums = log_sums.mutable_data_ptr<float>();
  typed(qkv, [&]<typename T>(T* from) {
    T* into = mixed.mutable_data_ptr<T>();
    over_runs<T>(sequences, heads, [&](int64_t first, int64_t stop, int64_t head) {
      forward_run<T>(sequences, first, stop, of, head, dropout, from, into, sums);
    });
  });
  return {mixed, log_sums};
}

at::Tensor attention_backward(
    const at::Tensor& slope, const at::Tensor& qkv, const at::Tensor& log_sums, const at::Tensor& lengths,
    int64_t heads, double rate, int64_t seed) {
  const Sizes of = sizes(qkv, heads);
  TORCH_CHECK(slope.is_contiguous() && slope.scalar_type() == qkv.scalar_type() && slope.numel() == of.T * of.D());
  const Sequences sequences(lengths);
  const at::Tensor slopes = at::empty(qkv.sizes(), qkv.options());
  const Dropout dropout(rate, seed);
  const float* sums = log_sums.const_data_ptr<float>();
  typed(qkv, [&]<typename T>(T* from) {
    const T* of_mixed = slope.const_data_ptr<T>();
    T* into = slopes.mutable_data_ptr<T>();
    over_runs<T>(sequences, heads, [&](int64_t first, int64_t stop, int64_t head) {
      backward_run<T>(sequences, first, stop, of, head, dropout, from, of_mixed, sums, into);
    });
  });
  return slopes;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def("attention(Tensor qkv, Tensor lengths, int heads, float rate, int seed) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor slope, Tensor qkv, Tensor log_sums, Tensor lengths, int heads, float rate, int seed) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(seqray, CPU, library) {
  library.impl("attention", &attention);
  library.impl("attention_backward", &attention_backward);
}

}  // namespace seqray
