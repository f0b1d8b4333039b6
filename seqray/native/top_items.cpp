// The k items with the largest scores, exactly, without a list of all scores.
//
// A tile of ITEMS items meets all queries at once in bf16. Such a score is off by no more than `slack` (Cauchy-Schwarz
// over the rounding of both factors), so an item whose rounded score is more than two slacks below the k-th best one
// so far cannot be among the k best. Few are left; these are scored again in float32, each sum in the same order
// whatever the batch and the threads, and sorted: equal scores by lower item_index.
//
// Shapes: B queries, D hidden (K: padded for products), V items + padding, P pairs (query, excluded item).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "bf16.h"
#include "simd.h"

namespace seqray {
namespace {

constexpr int64_t ITEMS = 256, QUERIES = 16, FEWEST = 64;
// FEWEST: candidates of a query before the first sifting; more of them cost more than sifting sooner.
constexpr float ROUNDING = 0.00785f;  // 2^-8 in each factor, and float32's share
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Scored {
  float score;
  int64_t item;
  bool operator<(const Scored& other) const {
    return score > other.score || (score == other.score && item < other.item);
  }
};

// What one query may be answered with.
struct Limits {
  int64_t k;
  const int64_t *excluded, *excluded_end;  // ascending
  const bool* allowed;                     // null: every item

  bool pass(int64_t item) const {
    return (!allowed || allowed[item]) && !std::binary_search(excluded, excluded_end, item);
  }
};

// Items that can still be among the k best of a query, by their rounded scores.
class Candidates {
 public:
  void begin(int64_t k, float slack) {
    k_ = k, slack_ = slack, limit = NEVER, room_ = std::max(4 * k, FEWEST);
    items.clear();
  }

  void add(float score, int64_t item) {
    items.push_back({score, item});
    if (static_cast<int64_t>(items.size()) >= room_) sift();
  }

  float limit;  // of a rounded score that matters
  std::vector<Scored> items;

 private:
  void sift() {
    std::nth_element(items.begin(), items.begin() + (k_ - 1), items.end());
    limit = items[k_ - 1].score - 2 * slack_;
    std::erase_if(items, [&](const Scored& one) { return one.score < limit; });
    room_ = std::max<int64_t>(room_, 2 * items.size());
  }

  int64_t k_, room_;
  float slack_;
};

struct Inputs {
  int64_t B, D, V;
  const float *hidden, *weights;
  const bf16* packed;
  std::vector<Limits> limits;

  int64_t K() const { return rounded(D, 32); }
  int64_t tiles() const { return (V + ITEMS - 1) / ITEMS; }
};

// What of a tile's scores of a query matters.
void take(const float* scores, int64_t tile, int64_t count, const Limits& limits, Candidates& found) {
  const __m512 limit = _mm512_set1_ps(found.limit);
  columns(count, [&](int64_t i, __mmask16 some) {
    uint32_t above = _mm512_mask_cmp_ps_mask(some, _mm512_loadu_ps(scores + i), limit, _CMP_GE_OQ);
    for (; above; above &= above - 1) {
      const int64_t place = i + __builtin_ctz(above), item = tile * ITEMS + place;
      if (scores[place] >= found.limit && item && limits.pass(item)) found.add(scores[place], item);
    }
  });
}

// Goes through the tiles first to stop for all queries, a few at a time so that their scores stay in the nearest cache.
void sweep(const Inputs& in, const bf16* hidden, int64_t first, int64_t stop, std::vector<Candidates>& found) {
  thread_local Scratch<float> scratch;
  float* scores = scratch.of(QUERIES * ITEMS);
  for (int64_t tile = first; tile < stop; tile++) {
    const int64_t items = std::min(ITEMS, in.V - tile * ITEMS);
    for (int64_t b = 0; b < in.B; b += QUERIES) {
      const int64_t count = std::min(QUERIES, in.B - b);
      const bf16* weights = in.packed + tile * ITEMS * in.K();
      product(count, ITEMS, in.K(), hidden + b * in.K(), in.K(), weights, ITEMS, scores, ITEMS, false);
      for (int64_t q = 0; q < count; q++) take(scores + q * ITEMS, tile, items, in.limits[b + q], found[b + q]);
    }
  }
}

float dot(const float* left, const float* right, int64_t D) {
  __m512 sum = _mm512_setzero_ps();
  columns(D, [&](int64_t i, __mmask16 some) { sum = _mm512_fmadd_ps(load(left + i, some), load(right + i, some), sum); });
  return _mm512_reduce_add_ps(sum);
}

// The best of all that the sweeps left of a query.
std::vector<Scored> best(const Inputs& in, int64_t b, std::vector<std::vector<Candidates>>& found) {
  std::vector<Scored> all;
  for (auto& part : found) {
    for (const Scored& one : part[b].items) {
      all.push_back({dot(in.hidden + b * in.D, in.weights + one.item * in.D, in.D), one.item});
    }
  }
  const int64_t count = std::min<int64_t>(in.limits[b].k, all.size());
  std::partial_sort(all.begin(), all.begin() + count, all.end());
  all.resize(count);
  return all;
}

// The catalogue's weights (V, D) in bf16, tile by tile, as the products want them.
at::Tensor pack_items(const at::Tensor& weights) {
  TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kFloat);
  const int64_t V = weights.size(0), D = weights.size(1), K = rounded(D, 32), tiles = (V + ITEMS - 1) / ITEMS;
  at::Tensor packed = at::empty(tiles * ITEMS * K, at::kBFloat16);
  bf16* into = packed.mutable_data_ptr<bf16>();
  const float* from = weights.const_data_ptr<float>();
  share<bf16>(tiles, [&](int64_t t) {
    const int64_t count = std::min(ITEMS, V - t * ITEMS);
    pair_columns(from + t * ITEMS * D, D, count, D, into + t * ITEMS * K, ITEMS, K);
  });
  return packed;
}

std::vector<Limits> limits_of(
    const at::Tensor& k, const at::Tensor& excluded, const at::Tensor& ends, const std::vector<at::Tensor>& allowed,
    int64_t V) {
  std::vector<Limits> limits;
  const int64_t* items = excluded.const_data_ptr<int64_t>();
  for (int64_t b = 0, begin = 0; b < k.numel(); b++) {
    const int64_t end = ends.const_data_ptr<int64_t>()[b];
    TORCH_CHECK(k.const_data_ptr<int64_t>()[b] > 0 && begin <= end && end <= excluded.numel());
    TORCH_CHECK(allowed[b].numel() == 0 || (allowed[b].numel() == V && allowed[b].is_contiguous()));
    const bool* mask = allowed[b].numel() ? allowed[b].const_data_ptr<bool>() : nullptr;
    limits.push_back({std::min(k.const_data_ptr<int64_t>()[b], V), items + begin, items + end, mask});
    begin = end;
  }
  return limits;
}

// item_index (B, K) and score of the best items of each query, 0 and -inf where fewer are allowed. `k` (B); `excluded`
// (P): ascending for each query, up to `ends` (B); `allowed`: a mask (V) for each query, or empty.
std::tuple<at::Tensor, at::Tensor> top_items(
    const at::Tensor& hidden, const at::Tensor& weights, const at::Tensor& packed, double largest_norm,
    const at::Tensor& k, const at::Tensor& excluded, const at::Tensor& ends, const std::vector<at::Tensor>& allowed) {
  TORCH_CHECK(hidden.is_contiguous() && weights.is_contiguous() && hidden.size(1) == weights.size(1));
  Inputs in{hidden.size(0), hidden.size(1), weights.size(0), hidden.const_data_ptr<float>(),
            weights.const_data_ptr<float>(), packed.const_data_ptr<bf16>(), {}};
  TORCH_CHECK(k.numel() == in.B && ends.numel() == in.B && static_cast<int64_t>(allowed.size()) == in.B && in.B > 0);
  in.limits = limits_of(k, excluded, ends, allowed, in.V);
  at::Tensor narrowed = at::empty({in.B, in.K()}, at::kBFloat16);
  bf16* rows = narrowed.mutable_data_ptr<bf16>();
  narrow_rows(in.hidden, in.D, in.B, in.D, rows, in.B, in.K());
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), in.tiles());
  std::vector<std::vector<Candidates>> found(parts, std::vector<Candidates>(in.B));
  int64_t K = 1;
  for (int64_t b = 0; b < in.B; b++) {
    const float norm = std::sqrt(dot(in.hidden + b * in.D, in.hidden + b * in.D, in.D));
    for (auto& part : found) part[b].begin(in.limits[b].k, ROUNDING * norm * largest_norm + 1e-30f);
    K = std::max(K, in.limits[b].k);
  }
  share<bf16>(parts, [&](int64_t p) {
    sweep(in, rows, p * in.tiles() / parts, (p + 1) * in.tiles() / parts, found[p]);
  });
  at::Tensor index = at::zeros({in.B, K}, at::kLong), scores = at::empty({in.B, K}, at::kFloat);
  std::fill(scores.mutable_data_ptr<float>(), scores.mutable_data_ptr<float>() + in.B * K, NEVER);
  for (int64_t b = 0; b < in.B; b++) {
    int64_t place = b * K;
    for (const Scored& one : best(in, b, found)) {
      index.mutable_data_ptr<int64_t>()[place] = one.item;
      scores.mutable_data_ptr<float>()[place++] = one.score;
    }
  }
  return {index, scores};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def("pack_items(Tensor weights) -> Tensor", &pack_items);
  library.def(
      "top_items(Tensor hidden, Tensor weights, Tensor packed, float largest_norm, Tensor k, Tensor excluded, Tensor "
      "ends, Tensor[] allowed) -> (Tensor, Tensor)",
      &top_items);
}

}  // namespace seqray
