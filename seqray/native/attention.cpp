// Causal softmax attention over packed sequences, none of which is padded.
//
// Queries go in blocks of 32 consecutive events, whatever sequences these belong to; a block meets the keys from the
// start of its first sequence to its own end. Scores stand with a key in a row and the block's queries in two vectors,
// so that softmax never adds up across a vector. Short sequences are done together, so that blocks are full; what one
// thread does depends on the lengths alone, and so do the results. Shapes: T events, D = H * d; qkv (T, 3D).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "simd.h"

namespace seqray {
namespace {

constexpr int64_t QUERIES = 32, EVENTS = 128;

struct Sizes {
  int64_t T, H, d;
  int64_t D() const { return H * d; }
  int64_t row() const { return 3 * D(); }
};

// Where each event's sequence begins and ends, and runs of whole sequences that a thread does in one go.
struct Sequences {
  explicit Sequences(const at::Tensor& lengths) {
    TORCH_CHECK(lengths.is_contiguous());
    const int64_t* length = lengths.const_data_ptr<int64_t>();
    runs.push_back(0);
    for (int64_t b = 0, at = 0; b < lengths.numel(); at += length[b++]) {
      begin.insert(begin.end(), length[b], at);
      end.insert(end.end(), length[b], at + length[b]);
      if (at > runs.back() && at + length[b] - runs.back() > EVENTS) runs.push_back(at);
    }
    runs.push_back(static_cast<int64_t>(begin.size()));
  }

  std::vector<int64_t> begin, end, runs;
};

// A block of queries first to stop of a head, and the keys it meets.
struct Block {
  Block(const Sequences& of, int64_t first, int64_t stop)
      : sequences(of), first(first), count(stop - first), key(of.begin[first]), keys(stop - key) {}

  // Which of 16 queries, from the block's `lane` on, see the key.
  __mmask16 see(int64_t other, int64_t lane) const {
    const int64_t query = first + lane;
    return first_lanes(sequences.end[other] - query) & ~first_lanes(other - query);
  }

  const Sequences& sequences;
  int64_t first, count, key, keys;
};

// Scores (keys, QUERIES) become exp2(score - largest), dropped where dropout says so; gives what makes them chances.
void soften(const Block& block, int64_t head, const Dropout& dropout, float* scores, float* factor, float* log_sum) {
  for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
    __m512 largest = _mm512_set1_ps(-3e38f), sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < block.keys; k++) {
      const __m512 score = _mm512_loadu_ps(scores + k * QUERIES + lane);
      largest = _mm512_mask_max_ps(largest, block.see(block.key + k, lane), largest, score);
    }
    const __m512i draws = dropout.lanes(block.first + lane);
    for (int64_t k = 0; k < block.keys; k++) {
      __mmask16 seen = block.see(block.key + k, lane);
      __m512 chance = _mm512_setzero_ps();
      if (seen) {
        chance = exp2(_mm512_sub_ps(_mm512_loadu_ps(scores + k * QUERIES + lane), largest));
        sum = _mm512_mask_add_ps(sum, seen, sum, chance);
        if (dropout.on) seen &= dropout.kept(draws, dropout.place(block.key + k, head));
      }
      _mm512_storeu_ps(scores + k * QUERIES + lane, _mm512_maskz_mov_ps(seen, chance));
    }
    _mm512_storeu_ps(factor + lane, _mm512_div_ps(_mm512_set1_ps(dropout.factor), sum));
    for (int64_t i = lane; i < std::min(lane + LANES, block.count); i++) {
      log_sum[i] = largest[i - lane] + std::log2(sum[i - lane]);
    }
  }
}

// Scores become slopes of the scores; `slopes`, those of the dropped chances, become the dropped chances.
void slopes_of_scores(
    const Block& block, int64_t head, const Dropout& dropout, const float* log_sum, float scale, float* scores,
    float* slopes) {
  for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
    const __m512 log_sums = _mm512_maskz_loadu_ps(first_lanes(block.count - lane), log_sum + lane);
    const __m512i draws = dropout.lanes(block.first + lane);
    __m512 total = _mm512_setzero_ps();
    for (int64_t k = 0; k < block.keys; k++) {
      float *score = scores + k * QUERIES + lane, *slope = slopes + k * QUERIES + lane;
      const __mmask16 seen = block.see(block.key + k, lane);
      __mmask16 kept = seen;
      if (seen && dropout.on) kept &= dropout.kept(draws, dropout.place(block.key + k, head));
      const __m512 chance = seen ? _mm512_maskz_mov_ps(seen, exp2(_mm512_sub_ps(_mm512_loadu_ps(score), log_sums)))
                                 : _mm512_setzero_ps();
      const __m512 factor = _mm512_maskz_mov_ps(kept, _mm512_set1_ps(dropout.factor));
      const __m512 of_chance = _mm512_maskz_mul_ps(kept, _mm512_loadu_ps(slope), factor);
      const __m512 part = _mm512_mul_ps(chance, of_chance);
      total = _mm512_add_ps(total, part);
      _mm512_storeu_ps(slope, _mm512_mul_ps(chance, factor));
      _mm512_storeu_ps(score, chance);
      _mm512_storeu_ps(slope + block.keys * QUERIES, part);
    }
    for (int64_t k = 0; k < block.keys; k++) {
      float* score = scores + k * QUERIES + lane;
      const __m512 part = _mm512_loadu_ps(slopes + (block.keys + k) * QUERIES + lane);
      const __m512 slope = _mm512_fnmadd_ps(_mm512_loadu_ps(score), total, part);
      _mm512_storeu_ps(score, _mm512_mul_ps(slope, _mm512_set1_ps(scale)));
    }
  }
}

void forward_run(
    const Sequences& sequences, int64_t first, int64_t stop, const Sizes& of, int64_t head, const Dropout& dropout,
    const float* qkv, float* mixed, float* log_sums) {
  static thread_local Scratch<float> query_memory, value_memory, score_memory, mixed_memory;
  const int64_t width = rounded(stop - first, LANES);
  float *query = query_memory.of(of.d * QUERIES), *value = value_memory.of(of.d * width);
  float *scores = score_memory.of((stop - first) * QUERIES), *out = mixed_memory.of(of.d * QUERIES);
  const float *q = qkv + head * of.d, *k = q + of.D(), *v = k + of.D();
  transpose(v + first * of.row(), of.row(), stop - first, of.d, 1, value, width, width);
  for (int64_t at = first; at < stop; at += QUERIES) {
    const Block block(sequences, at, std::min(at + QUERIES, stop));
    const float scale = LOG2_E / std::sqrt(static_cast<float>(of.d));
    transpose(q + at * of.row(), of.row(), block.count, of.d, scale, query, QUERIES, QUERIES);
    product(block.keys, QUERIES, of.d, k + block.key * of.row(), of.row(), query, QUERIES, scores, QUERIES, false);
    float factor[QUERIES], log_sum[QUERIES];
    soften(block, head, dropout, scores, factor, log_sum);
    std::copy_n(log_sum, block.count, log_sums + head * of.T + at);
    product(of.d, QUERIES, block.keys, value + block.key - first, width, scores, QUERIES, out, QUERIES, false);
    for (int64_t i = 0; i < of.d * QUERIES; i++) out[i] *= factor[i % QUERIES];
    transpose(out, QUERIES, of.d, block.count, 1, mixed + at * of.D() + head * of.d, of.D(), of.d);
  }
}

void backward_run(
    const Sequences& sequences, int64_t first, int64_t stop, const Sizes& of, int64_t head, const Dropout& dropout,
    const float* qkv, const float* slope, const float* log_sums, float* slopes) {
  static thread_local Scratch<float> query_memory, slope_memory, key_memory, score_memory, of_chance_memory, out_memory;
  const int64_t width = rounded(stop - first, LANES), row = of.row(), D = of.D();
  float *query = query_memory.of(of.d * QUERIES), *slope_T = slope_memory.of(of.d * QUERIES);
  float *key_T = key_memory.of(of.d * width), *out = out_memory.of(of.d * QUERIES);
  float *scores = score_memory.of((stop - first) * QUERIES), *chances = of_chance_memory.of(2 * (stop - first) * QUERIES);
  const float *q = qkv + head * of.d, *k = q + D, *v = k + D, *of_mixed = slope + head * of.d;
  float *dq = slopes + head * of.d, *dk = dq + D, *dv = dk + D;
  for (int64_t t = first; t < stop; t++) {
    std::fill_n(dk + t * row, of.d, 0.0f);
    std::fill_n(dv + t * row, of.d, 0.0f);
  }
  transpose(k + first * row, row, stop - first, of.d, 1, key_T, width, width);
  const float scale = 1 / std::sqrt(static_cast<float>(of.d));
  for (int64_t at = first; at < stop; at += QUERIES) {
    const Block block(sequences, at, std::min(at + QUERIES, stop));
    const int64_t keys = block.keys, from = block.key * row;
    transpose(q + at * row, row, block.count, of.d, scale * LOG2_E, query, QUERIES, QUERIES);
    transpose(of_mixed + at * D, D, block.count, of.d, 1, slope_T, QUERIES, QUERIES);
    product(keys, QUERIES, of.d, k + from, row, query, QUERIES, scores, QUERIES, false);
    product(keys, QUERIES, of.d, v + from, row, slope_T, QUERIES, chances, QUERIES, false);
    slopes_of_scores(block, head, dropout, log_sums + head * of.T + at, scale, scores, chances);
    product(keys, of.d, block.count, chances, QUERIES, of_mixed + at * D, D, dv + from, row, true);
    product(keys, of.d, block.count, scores, QUERIES, q + at * row, row, dk + from, row, true);
    product(of.d, QUERIES, keys, key_T + block.key - first, width, scores, QUERIES, out, QUERIES, false);
    transpose(out, QUERIES, of.d, block.count, 1, dq + at * row, row, of.d);
  }
}

// Calls work(first, stop, head) for each run of sequences and each head.
template <typename Work>
void over_runs(const Sequences& sequences, int64_t heads, const Work& work) {
  const int64_t runs = static_cast<int64_t>(sequences.runs.size()) - 1;
  share<float>(runs * heads, [&](int64_t i) { work(sequences.runs[i / heads], sequences.runs[i / heads + 1], i % heads); });
}

Sizes sizes(const at::Tensor& qkv, int64_t heads) {
  TORCH_CHECK(qkv.dim() == 2 && qkv.is_contiguous() && qkv.scalar_type() == at::kFloat && qkv.size(1) % (3 * heads) == 0);
  return {qkv.size(0), heads, qkv.size(1) / (3 * heads)};
}

// (mixed (T, D), log2 of the sum of exp(scores) (H, T)).
std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& qkv, const at::Tensor& lengths, int64_t heads, double rate, int64_t seed) {
  const Sizes of = sizes(qkv, heads);
  const Sequences sequences(lengths);
  TORCH_CHECK(static_cast<int64_t>(sequences.begin.size()) == of.T);
  at::Tensor mixed = at::empty({of.T, of.D()}, qkv.options()), log_sums = at::empty({heads, of.T}, qkv.options());
  const Dropout dropout(rate, seed);
  const float* from = qkv.const_data_ptr<float>();
  float *into = mixed.mutable_data_ptr<float>(), *sums = log_sums.mutable_data_ptr<float>();
  over_runs(sequences, heads, [&](int64_t first, int64_t stop, int64_t head) {
    forward_run(sequences, first, stop, of, head, dropout, from, into, sums);
  });
  return {mixed, log_sums};
}

at::Tensor attention_backward(
    const at::Tensor& slope, const at::Tensor& qkv, const at::Tensor& log_sums, const at::Tensor& lengths,
    int64_t heads, double rate, int64_t seed) {
  const Sizes of = sizes(qkv, heads);
  TORCH_CHECK(slope.is_contiguous() && slope.scalar_type() == at::kFloat && slope.numel() == of.T * of.D());
  const Sequences sequences(lengths);
  at::Tensor slopes = at::empty(qkv.sizes(), qkv.options());
  const Dropout dropout(rate, seed);
  const float *from = qkv.const_data_ptr<float>(), *sums = log_sums.const_data_ptr<float>();
  const float* of_mixed = slope.const_data_ptr<float>();
  float* into = slopes.mutable_data_ptr<float>();
  over_runs(sequences, heads, [&](int64_t first, int64_t stop, int64_t head) {
    backward_run(sequences, first, stop, of, head, dropout, from, of_mixed, sums, into);
  });
  return slopes;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def("attention(Tensor qkv, Tensor lengths, int heads, float rate, int seed) -> (Tensor, Tensor)");
  library.def("attention_backward(Tensor slope, Tensor qkv, Tensor log_sums, Tensor lengths, int heads, float rate, int seed) -> Tensor");
}

TORCH_LIBRARY_IMPL(seqray, CPU, library) {
  library.impl("attention", &attention);
  library.impl("attention_backward", &attention_backward);
}

}  // namespace seqray
