// The k items with the largest scores, exactly, without a list of all scores.
//
// A tile of ITEMS items meets all queries at once in small whole numbers. In steps of the item and the query such a
// product is off by no more than `margin` (Cauchy-Schwarz over the rounding of both factors), so that it says what an
// item's score is at the most and at the least. An item whose most is less than the k-th largest least so far cannot be
// among the k best. Few are left; these are scored again in float32, each sum in the same order whatever the batch and
// the threads, and sorted: equal scores by lower item_index.
//
// Shapes: B queries, D hidden (K: padded for products), V items + padding, P pairs (query, excluded item).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "codes.h"
#include "top_items.h"

namespace seqray {
namespace {

constexpr int64_t FEWEST = 256;  // candidates of a query before those are dropped that do not matter any more
constexpr int64_t AHEAD = 4;     // items whose weights are asked of the memory before their turn comes
constexpr float ROUNDING = 1e-5f;  // float32's, of any product
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
  std::vector<int64_t> excluded;  // ascending
  const bool* allowed;            // null: every item

  bool pass(int64_t item) const {
    return (!allowed || allowed[item]) && !std::binary_search(excluded.begin(), excluded.end(), item);
  }
};

// Items that can still be among the k best of a query, with the most that their scores can be.
class Candidates {
 public:
  // margin: of a product, in steps of the item; rounding: of a score.
  void begin(int64_t k, float margin, float rounding) {
    k_ = k, margin_ = margin, rounding_ = rounding, room_ = std::max(8 * k, FEWEST);
    limit = std::isfinite(margin + rounding) ? NEVER : -NEVER;
    best_.assign(1 + rounded(k, LANES), NEVER);
    best_[0] = -NEVER;  // stands before the first
    items.clear();
  }

  void add(float most, float step, int64_t item) {
    if (const float least = most - 2 * margin_ * step; least > best_[k_]) {
      insert(least);
      limit = best_[k_] - 2 * rounding_;
    }
    items.push_back({most, item});
    if (static_cast<int64_t>(items.size()) < room_) return;
    drop();
    room_ = std::max<int64_t>(room_, 2 * items.size());
  }

  // Those that are below the limit by now.
  void drop() {
    std::erase_if(items, [&](const Scored& one) { return one.score < limit; });
  }

  float limit;  // of the most that a score can be
  std::vector<Scored> items;

 private:
  // Each of the best stays, becomes the one before it, or the new one, which stands between these.
  void insert(float least) {
    const Floats added = all(least);
    for (int64_t i = best_.size() - LANES; i > 0; i -= LANES) {
      float* at = best_.data() + i;
      store(at, larger(load(at), smaller(load(at - 1), added)));
    }
  }

  int64_t k_, room_;
  float margin_, rounding_;
  std::vector<float> best_;  // of the least that scores are, descending, from 1 on
};

// The catalogue as pack_items made it.
struct Items {
  int64_t V, D;
  const uint8_t* codes;         // (tiles, K / 4, ITEMS, 4): codes + LARGEST
  const float *weights, *step;  // (V, D), (tiles * ITEMS)
  // The largest of all items: norm of the codes, of what their rounding took, of the weights, of a part of the codes.
  float size, error, norm, part;

  int64_t K() const { return rounded(D, 4); }
  int64_t tiles() const { return (V + ITEMS - 1) / ITEMS; }
};

// The queries; their scores are in steps of their own.
struct Queries {
  Queries(const Items& items, const at::Tensor& hidden, std::vector<Limits> limits)
      : B(hidden.size(0)), hidden(hidden.const_data_ptr<float>()), limits(std::move(limits)), codes(B * items.K()),
        start(B * segments(items.K())), margin(B), rounding(B) {
    for (int64_t b = 0; b < B; b++) {
      int8_t* into = codes.data() + b * items.K();
      const float* row = this->hidden + b * items.D;
      const Rounded code(row, items.D, query_step(row, items.D, items.part), into);
      starts(into, items.K(), start.data() + b * segments(items.K()));
      const float whole = norm(row, items.D) / code.step;
      margin[b] = code.error * items.size + whole * items.error;
      rounding[b] = ROUNDING * whole * items.norm;
    }
  }

  int64_t B;
  const float* hidden;
  std::vector<Limits> limits;
  std::vector<int8_t> codes;
  std::vector<int32_t> start;           // see starts
  std::vector<float> margin, rounding;  // not finite: the query has no scores
};

// What of a tile matters to a query, of the items that `above` has bits for.
void take(const float* most, const float* step, uint64_t above, int64_t tile, const Limits& limits, Candidates& found) {
  for (; above; above &= above - 1) {
    const int64_t place = __builtin_ctzll(above), item = tile * ITEMS + place;
    if (most[place] >= found.limit && item && limits.pass(item)) found.add(most[place], step[place], item);
  }
}

// A tile meets COUNT queries from `b` on.
template <int COUNT>
void meet(const Items& items, const Queries& queries, int64_t tile, int64_t b, Candidates* found) {
  const int64_t K = items.K(), left = items.V - tile * ITEMS;
  const float* step = items.step + tile * ITEMS;
  const int8_t* codes = queries.codes.data() + b * K;
  Floats scores[COUNT][VECTORS];
  products<COUNT>(items.codes + tile * ITEMS * K, codes, K, queries.start.data() + b * segments(K), scores);
#pragma GCC unroll 4
  for (int q = 0; q < COUNT; q++) {
    const Floats margin = all(queries.margin[b + q]), limit = all(found[q].limit);
    uint64_t above = 0;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      scores[q][v] = (scores[q][v] + margin) * load(step + v * LANES);
      above |= at_least(scores[q][v], limit) << (v * LANES);
    }
    if (left < ITEMS) above &= (uint64_t{1} << left) - 1;
    if (above) [[unlikely]] {
      alignas(64) float most[ITEMS];
      for (int v = 0; v < VECTORS; v++) store(most + v * LANES, scores[q][v]);
      take(most, step, above, tile, queries.limits[b + q], found[q]);
    }
  }
}

using Meet = void (*)(const Items&, const Queries&, int64_t, int64_t, Candidates*);

template <int... ONE_LESS>
constexpr std::array<Meet, QUERIES> meetings(std::integer_sequence<int, ONE_LESS...>) {
  return {meet<ONE_LESS + 1>...};
}

constexpr std::array<Meet, QUERIES> MEET = meetings(std::make_integer_sequence<int, QUERIES>());

// Goes through the tiles first to stop for all queries, in groups of about the same size.
void sweep(const Items& items, const Queries& queries, int64_t first, int64_t stop, std::vector<Candidates>& found) {
  const int64_t B = queries.B, groups = (B + QUERIES - 1) / QUERIES;
  for (int64_t tile = first; tile < stop; tile++) {
    for (int64_t g = 0; g < groups; g++) {
      const int64_t b = g * B / groups, count = (g + 1) * B / groups - b;
      MEET[count - 1](items, queries, tile, b, found.data() + b);
    }
  }
}

// The best of all that the sweeps left of a query.
std::vector<Scored> best(
    const Items& items, const Queries& queries, int64_t b, std::vector<std::vector<Candidates>>& found) {
  std::vector<Scored> all;
  for (auto& part : found) {
    part[b].drop();
    const std::vector<Scored>& left = part[b].items;
    const auto weights = [&](size_t place) { return items.weights + left[place].item * items.D; };
    for (size_t i = 0; i < left.size(); i++) {
      for (int64_t d = 0; i + AHEAD < left.size() && d < items.D; d += 16) __builtin_prefetch(weights(i + AHEAD) + d);
      all.push_back({dot(queries.hidden + b * items.D, weights(i), items.D), left[i].item});
    }
  }
  const int64_t count = std::min<int64_t>(queries.limits[b].k, all.size());
  std::partial_sort(all.begin(), all.begin() + count, all.end());
  all.resize(count);
  return all;
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
    std::vector<int64_t> ascending(items + begin, items + end);
    std::sort(ascending.begin(), ascending.end());
    limits.push_back({std::min(k.const_data_ptr<int64_t>()[b], V), std::move(ascending), mask});
    begin = end;
  }
  return limits;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> top_items(
    const Catalogue& catalogue, const at::Tensor& hidden, const at::Tensor& k, const at::Tensor& excluded,
    const at::Tensor& ends, const std::vector<at::Tensor>& allowed) {
  const at::Tensor& weights = catalogue.weights;
  TORCH_CHECK(hidden.is_contiguous() && weights.is_contiguous() && hidden.size(1) == weights.size(1));
  const float* bound = catalogue.bounds.const_data_ptr<float>();
  const Items items{
      weights.size(0), weights.size(1), catalogue.codes.const_data_ptr<uint8_t>(), weights.const_data_ptr<float>(),
      catalogue.step.const_data_ptr<float>(), bound[0], bound[1], bound[2], bound[3]};
  const int64_t B = hidden.size(0), room = items.tiles() * ITEMS;
  TORCH_CHECK(catalogue.codes.numel() == room * items.K() && catalogue.step.numel() == room);
  TORCH_CHECK(k.numel() == B && ends.numel() == B && static_cast<int64_t>(allowed.size()) == B && B > 0);
  const Queries queries(items, hidden, limits_of(k, excluded, ends, allowed, items.V));
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), items.tiles());
  std::vector<std::vector<Candidates>> found(parts, std::vector<Candidates>(B));
  int64_t K = 1;
  for (int64_t b = 0; b < B; b++) {
    for (auto& part : found) part[b].begin(queries.limits[b].k, queries.margin[b], queries.rounding[b]);
    K = std::max(K, queries.limits[b].k);
  }
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      sweep(items, queries, p * items.tiles() / parts, (p + 1) * items.tiles() / parts, found[p]);
    }
  });
  at::Tensor index = at::zeros({B, K}, at::kLong), scores = at::empty({B, K}, at::kFloat);
  std::fill(scores.mutable_data_ptr<float>(), scores.mutable_data_ptr<float>() + B * K, NEVER);
  for (int64_t b = 0; b < B; b++) {
    int64_t place = b * K;
    for (const Scored& one : best(items, queries, b, found)) {
      index.mutable_data_ptr<int64_t>()[place] = one.item;
      scores.mutable_data_ptr<float>()[place++] = one.score;
    }
  }
  return {index, scores};
}

namespace {

std::tuple<at::Tensor, at::Tensor> top_items_of(
    const at::Tensor& hidden, const at::Tensor& weights, const at::Tensor& codes, const at::Tensor& step,
    const at::Tensor& bounds, const at::Tensor& k, const at::Tensor& excluded, const at::Tensor& ends,
    const std::vector<at::Tensor>& allowed) {
  return top_items({weights, codes, step, bounds}, hidden, k, excluded, ends, allowed);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def(
      "top_items(Tensor hidden, Tensor weights, Tensor codes, Tensor step, Tensor bounds, Tensor k, Tensor excluded, "
      "Tensor ends, Tensor[] allowed) -> (Tensor, Tensor)",
      &top_items_of);
}

}  // namespace seqray
