// Full cross-entropy and its slopes in one pass over the logits, which never leave the cache.
//
// A block of ROWS hidden states meets the catalogue a tile of ITEMS at a time: logits, exp(logit - reference) in bf16,
// and at once its product with the items' weights, which adds up to the slopes over the hidden states. The reference
// of a row is the largest logit of its first tile; where a later one exceeds it by far, what was made so far is scaled
// down. The factor of a row (its weight over its sum) is known at the end; it is applied to these slopes and, for the
// slopes over the weights, to the hidden states: they are a second product, a tile at a time, over the rows of a
// chunk. Targets are taken off in float32. Every number is made in an order that does not depend on the threads.
//
// Shapes: P asked events, S targets, D hidden (K: padded for products), V items + padding.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "bf16.h"
#include "simd.h"

namespace seqray {
namespace {

constexpr int64_t ROWS = 64, ITEMS = 256;
constexpr float NOTHING = -1e30f, FAR = 40;  // FAR: in powers of e; exp of it is well inside bf16 and float32

struct Inputs {
  int64_t P, S, D, V;
  const float *hidden, *weights;
  const int64_t *items, *rows;  // rows, ascending: null where target and asked event are one to one
  const float* target_weights;  // null: 1 each

  int64_t K() const { return rounded(D, 32); }
  int64_t tiles() const { return (V + ITEMS - 1) / ITEMS; }
  int64_t row(int64_t s) const { return rows ? rows[s] : s; }
  float weight(int64_t s) const { return target_weights ? target_weights[s] : 1.0f; }
  int64_t first_target(int64_t row) const {
    return rows ? std::lower_bound(rows, rows + S, row) - rows : std::min(row, S);
  }
};

// The catalogue's weights in bf16 as both products want them, tile by tile.
struct Catalogue {
  explicit Catalogue(const Inputs& in)
      : size(ITEMS * in.K()), memory(at::empty(2 * in.tiles() * size, at::kBFloat16)) {
    for_logits = memory.mutable_data_ptr<bf16>();
    for_hidden = for_logits + in.tiles() * size;
    share<bf16>(in.tiles(), [&](int64_t t) {
      const float* from = in.weights + t * ITEMS * in.D;
      const int64_t count = std::min(ITEMS, in.V - t * ITEMS);
      pair_columns(from, in.D, count, in.D, logits(t), ITEMS, in.K());
      pair_rows(from, in.D, count, in.D, hidden(t), ITEMS, in.K());
    });
  }

  bf16* logits(int64_t tile) const { return for_logits + tile * size; }
  bf16* hidden(int64_t tile) const { return for_hidden + tile * size; }

  int64_t size;
  at::Tensor memory;
  bf16 *for_logits, *for_hidden;
};

// What is kept of a chunk until the slopes over the weights are made of it.
struct Chunk {
  Chunk(const Inputs& in, int64_t rows)
      : rows(rounded(rows, ROWS)), size(this->rows * ITEMS),
        memory(at::empty(in.tiles() * size + in.D * this->rows, at::kBFloat16)) {
    exponentials = memory.mutable_data_ptr<bf16>();
    hidden = exponentials + in.tiles() * size;
  }

  // Of the rows from `row` on, in interleaved pairs.
  bf16* of(int64_t tile, int64_t row) const { return exponentials + tile * size + row * ITEMS; }

  int64_t rows, size;
  at::Tensor memory;
  bf16 *exponentials, *hidden;  // hidden: (D, rows), each row's factor applied
};

// State of a block's rows over the tiles.
struct Rows {
  float reference[ROWS], sum[ROWS];
};

float largest(const float* logits) {
  __m512 value = _mm512_loadu_ps(logits);
  for (int64_t i = LANES; i < ITEMS; i += LANES) value = _mm512_max_ps(value, _mm512_loadu_ps(logits + i));
  return _mm512_reduce_max_ps(value);
}

// Refers row r to a larger logit: scales down all that was made of the tiles before.
void refer(
    Rows& rows, int64_t r, float larger, int64_t tile, const Chunk& chunk, int64_t row, float* slopes, int64_t K) {
  const float factor = std::exp(rows.reference[r] - larger);
  rows.reference[r] = larger;
  rows.sum[r] *= factor;
  for (int64_t i = 0; i < K; i++) slopes[r * K + i] *= factor;
  for (int64_t t = 0; t < tile; t++) {
    bf16* pairs = chunk.of(t, row + r / 2 * 2) + r % 2;
    for (int64_t i = 0; i < ITEMS; i++) pairs[2 * i] = static_cast<float>(pairs[2 * i]) * factor;
  }
}

// exp(logit - reference) of two rows: side by side into `plain` (2, ITEMS), in pairs into `pairs` (ITEMS, 2).
void exponentials(const float* logits, const float* reference, float* sum, bf16* plain, bf16* pairs) {
  const __m512 scale = _mm512_set1_ps(LOG2_E);
  __m512 low[2], total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int r = 0; r < 2; r++) low[r] = _mm512_set1_ps(reference[r] * LOG2_E);
  for (int64_t i = 0; i < ITEMS; i += 2 * LANES) {
    __m512i row[2];
    for (int r = 0; r < 2; r++) {
      const float* from = logits + r * ITEMS + i;
      const __m512 left = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(from), scale, low[r]));
      const __m512 right = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(from + LANES), scale, low[r]));
      total[r] = _mm512_add_ps(total[r], _mm512_add_ps(left, right));
      row[r] = narrow(left, right);
      _mm512_storeu_si512(plain + r * ITEMS + i, row[r]);
    }
    store_pairs(row[0], row[1], pairs + 2 * i);
  }
  for (int r = 0; r < 2; r++) sum[r] += _mm512_reduce_add_ps(total[r]);
}

// The logits of a block and a tile, nothing for padding and beyond the catalogue.
void logits_of(const Inputs& in, const Catalogue& catalogue, const bf16* hidden, int64_t tile, float* logits) {
  product(ROWS, ITEMS, in.K(), hidden, in.K(), catalogue.logits(tile), ITEMS, logits, ITEMS, false);
  const int64_t end = in.V - tile * ITEMS;
  for (int64_t r = 0; r < ROWS && (tile == 0 || end < ITEMS); r++) {
    if (tile == 0) logits[r * ITEMS] = NOTHING;
    if (end < ITEMS) std::fill(logits + r * ITEMS + end, logits + (r + 1) * ITEMS, NOTHING);
  }
}

// Takes the targets of a row off its slopes; gives its loss.
double targets_of(const Inputs& in, int64_t row, int64_t first, int64_t stop, float log_sum, float* slope) {
  double loss = 0;
  for (int64_t s = first; s < stop; s++) {
    const float *weights = in.weights + in.items[s] * in.D, *hidden = in.hidden + row * in.D;
    const __m512 weight = _mm512_set1_ps(in.weight(s));
    __m512 logit = _mm512_setzero_ps();
    for (int64_t i = 0; i < in.D; i += LANES) {
      const __mmask16 some = first_lanes(in.D - i);
      const __m512 of_item = as_bf16(_mm512_maskz_loadu_ps(some, weights + i));
      const __m512 of_row = as_bf16(_mm512_maskz_loadu_ps(some, hidden + i));
      logit = _mm512_fmadd_ps(of_item, of_row, logit);
      if (slope) {
        const __m512 left = _mm512_maskz_loadu_ps(some, slope + i);
        _mm512_mask_storeu_ps(slope + i, some, _mm512_fnmadd_ps(weight, of_item, left));
      }
    }
    loss += static_cast<double>(in.weight(s)) * (log_sum - _mm512_reduce_add_ps(logit));
  }
  return loss;
}

// Rows `from` to from + ROWS of the chunk that begins with asked event `start`: their slopes, what the chunk keeps of
// them, and their loss.
double block(
    const Inputs& in, const Catalogue& catalogue, const Chunk& chunk, int64_t start, int64_t from, int64_t stop,
    float* slopes) {
  static thread_local Scratch<float> logit_memory, slope_memory;
  static thread_local Scratch<bf16> hidden_memory, plain_memory;
  const int64_t K = in.K(), count = std::min(ROWS, stop - start - from);
  float *logits = logit_memory.of(ROWS * ITEMS), *of_hidden = slope_memory.of(ROWS * K);
  bf16 *hidden = hidden_memory.of(ROWS * K), *plain = plain_memory.of(ROWS * ITEMS);
  const float* wide = in.hidden + (start + from) * in.D;
  narrow_rows(wide, in.D, count, in.D, hidden, ROWS, K);
  Rows rows{};
  for (int64_t t = 0; t < in.tiles(); t++) {
    logits_of(in, catalogue, hidden, t, logits);
    for (int64_t r = 0; r < ROWS; r++) {
      const float found = largest(logits + r * ITEMS);
      if (t == 0) rows.reference[r] = found;
      else if (found > rows.reference[r] + FAR) refer(rows, r, found, t, chunk, from, of_hidden, K);
    }
    for (int64_t r = 0; r < ROWS; r += 2) {
      exponentials(logits + r * ITEMS, rows.reference + r, rows.sum + r, plain + r * ITEMS, chunk.of(t, from + r));
    }
    if (slopes) product(ROWS, K, ITEMS, plain, ITEMS, catalogue.hidden(t), K, of_hidden, K, t > 0);
  }
  double loss = 0;
  float factor[ROWS] = {};
  int64_t first = in.first_target(start + from);
  for (int64_t r = 0; r < count; r++) {
    const int64_t row = start + from + r;
    int64_t last = first;
    float weight = 0;
    while (last < in.S && in.row(last) == row) weight += in.weight(last++);
    factor[r] = weight / rows.sum[r];
    float* slope = slopes ? slopes + row * in.D : nullptr;
    for (int64_t i = 0; slope && i < in.D; i++) slope[i] = of_hidden[r * K + i] * factor[r];
    loss += targets_of(in, row, first, last, rows.reference[r] + std::log(rows.sum[r]), slope);
    first = last;
  }
  if (slopes) turn(wide, in.D, count, in.D, chunk.hidden + from, chunk.rows, ROWS, factor);
  return loss;
}

// Turns each tile (D, ITEMS) into (ITEMS, D), in its place, and takes the targets off.
void finish(const Inputs& in, float* slopes) {
  share<bf16>(in.tiles(), [&](int64_t t) {
    static thread_local Scratch<float> memory;
    float *tile = slopes + t * ITEMS * in.D, *copy = memory.of(ITEMS * in.D);
    std::copy_n(tile, ITEMS * in.D, copy);
    turn(copy, ITEMS, in.D, ITEMS, tile, in.D, in.D);
  });
  at::parallel_for(0, in.V, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < in.S; s++) {
      const int64_t item = in.items[s];
      if (item < begin || item >= end) continue;
      const float *hidden = in.hidden + in.row(s) * in.D, weight = in.weight(s);
      for (int64_t i = 0; i < in.D; i++) slopes[item * in.D + i] -= weight * static_cast<float>(bf16(hidden[i]));
    }
  });
}

// The loss summed over S; fills `of_hidden` (P, D) and `of_weights` (tiles * ITEMS, D) unless they are null.
double over_chunks(const Inputs& in, int64_t chunk_rows, float* of_hidden, float* of_weights) {
  const Catalogue catalogue(in);
  const Chunk chunk(in, std::min(chunk_rows, in.P));
  double loss = 0;
  for (int64_t start = 0; start < in.P; start += chunk.rows) {
    const int64_t stop = std::min(start + chunk.rows, in.P), blocks = (stop - start + ROWS - 1) / ROWS;
    std::vector<double> losses(blocks);
    share<bf16>(blocks, [&](int64_t b) {
      losses[b] = block(in, catalogue, chunk, start, b * ROWS, stop, of_hidden);
    });
    for (const double part : losses) loss += part;
    if (!of_weights) continue;
    share<bf16>(in.tiles(), [&](int64_t t) {
      product(
          in.D, ITEMS, blocks * ROWS, chunk.hidden, chunk.rows, chunk.of(t, 0), ITEMS, of_weights + t * ITEMS * in.D,
          ITEMS, start > 0);
    });
  }
  if (of_weights) finish(in, of_weights);
  return loss;
}

const float* floats(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous());
  return tensor.const_data_ptr<float>();
}

// (loss, slopes over hidden (P, D), slopes over weights (V rounded up, D)); the slopes are empty unless `slopes`.
std::tuple<double, at::Tensor, at::Tensor> cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weights, const at::Tensor& items,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& target_weights, int64_t chunk,
    bool slopes) {
  TORCH_CHECK(hidden.dim() == 2 && weights.dim() == 2 && hidden.size(1) == weights.size(1) && hidden.size(0) > 0);
  TORCH_CHECK(items.is_contiguous() && (!rows || (rows->is_contiguous() && rows->numel() == items.numel())));
  TORCH_CHECK(rows || items.numel() == hidden.size(0));
  TORCH_CHECK(!target_weights || target_weights->numel() == items.numel());
  const Inputs in{
      hidden.size(0), items.numel(), hidden.size(1), weights.size(0), floats(hidden), floats(weights),
      items.const_data_ptr<int64_t>(), rows ? rows->const_data_ptr<int64_t>() : nullptr,
      target_weights ? floats(*target_weights) : nullptr};
  for (int64_t s = 0; s < in.S; s++) {
    const bool inside = in.items[s] > 0 && in.items[s] < in.V && in.row(s) >= 0 && in.row(s) < in.P;
    TORCH_CHECK(inside, "a target beyond the logits");
  }
  at::Tensor of_hidden = at::empty({slopes ? in.P : 0, in.D}, hidden.options());
  at::Tensor of_weights = at::empty({slopes ? in.tiles() * ITEMS : 0, in.D}, hidden.options());
  float* into_hidden = slopes ? of_hidden.mutable_data_ptr<float>() : nullptr;
  float* into_weights = slopes ? of_weights.mutable_data_ptr<float>() : nullptr;
  const double loss = over_chunks(in, chunk, into_hidden, into_weights);
  return {loss, of_hidden, of_weights};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def(
      "cross_entropy(Tensor hidden, Tensor weights, Tensor items, Tensor? rows, Tensor? target_weights, int chunk, "
      "bool slopes) -> (float, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(seqray, CPU, library) { library.impl("cross_entropy", &cross_entropy); }

}  // namespace seqray
