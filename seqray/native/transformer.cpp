// The hidden state after the newest event of each history, by a causal transformer in float32: pre-norm blocks of
// softmax attention and a GELU feed-forward, and a last norm (seqray.models.sasrec).
//
// One call does all of it, a history at a time, so that what it works on stays in the cache, no thread of Python is in
// the way, and a result does not depend on what else is in the batch. In the last block only the newest event asks.
// Shapes: T packed events, B histories, L events of one, D hidden = H heads of d, F inside the feed-forward.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "floats.h"
#include "multiply.h"
#include "transformer.h"
#include "turn.h"

namespace seqray {
namespace {

struct Norm {
  const float *scale, *shift;

  void operator()(const float* row, int64_t D, float epsilon, float* into) const {
    Floats sum = all(0), squares = all(0);
    columns(D, [&](int64_t i, Some some) { sum = sum + load(row + i, some); });
    const Floats mean = all(sum_of(sum) / D);
    columns(D, [&](int64_t i, Some some) {
      const Floats off = either(some, load(row + i, some) - mean, all(0));
      squares = multiply_add(off, off, squares);
    });
    const Floats rate = all(1 / std::sqrt(sum_of(squares) / D + epsilon));
    columns(D, [&](int64_t i, Some some) {
      const Floats normed = (load(row + i, some) - mean) * rate;
      store(into + i, some, multiply_add(normed, load(scale + i, some), load(shift + i, some)));
    });
  }
};

struct Layer {
  const float *weight, *bias;  // (inputs, outputs), (outputs)
};

struct Block {
  Norm attention_norm;
  Layer qkv, out;
  Norm feedforward_norm;
  Layer expand, contract;
};

// The model, over the memory of the tensors that it was made of.
struct Model {
  int64_t D, H, F;
  float epsilon, scale;  // scale: of the items' vectors
  bool from_newest;      // where positions count from
  const float *items, *positions;
  std::vector<Block> blocks;
  Norm norm;

  int64_t d() const { return D / H; }
};

// Memory for one history of up to L events.
struct Workspace {
  void fit(const Model& of, int64_t L) {
    const int64_t width = rounded(L, LANES);
    hidden = hidden_.of(L * of.D), normed = normed_.of(L * of.D), wide = wide_.of(L * std::max(3 * of.D, of.F));
    keys = keys_.of(of.d() * width), chances = chances_.of(ROWS * width);
  }

  float *hidden, *normed, *wide, *keys, *chances;

 private:
  Scratch<float> hidden_, normed_, wide_, keys_, chances_;
};

// Scores of the keys up to a query -> chances.
void soften(float* scores, int64_t count, float scale) {
  Floats most = all(-3e38f), sum = all(0);
  columns(count, [&](int64_t i, Some some) { most = larger(most, either(some, load(scores + i, some), most)); });
  const Floats scales = all(scale), top = all(largest_of(most) * scale);
  columns(count, [&](int64_t i, Some some) {
    const Floats chance = either(some, exp2(multiply_subtract(load(scores + i, some), scales, top)), all(0));
    sum = sum + chance;
    store(scores + i, some, chance);
  });
  const Floats share = all(1 / sum_of(sum));
  columns(count, [&](int64_t i, Some some) { store(scores + i, some, load(scores + i, some) * share); });
}

// Attention of the queries from `first` on; their rows of qkv (L, 3 D) in `wide` -> rows of `normed`.
void attend(const Model& of, const Workspace& space, int64_t L, int64_t first) {
  const int64_t d = of.d(), ld = 3 * of.D, width = rounded(L, LANES);
  const float scale = LOG2_E / std::sqrt(static_cast<float>(d));
  for (int64_t h = 0; h < of.H; h++) {
    const float *q = space.wide + h * d, *k = q + of.D, *v = k + of.D;
    turn(k, ld, L, d, space.keys, width, width);
    for (int64_t i = first; i < L; i += ROWS) {
      const int64_t rows = std::min(ROWS, L - i), seen = i + rows;
      multiply(rows, seen, {d, q + i * ld, ld, space.keys, width, nullptr, space.chances, width, false});
      for (int64_t r = 0; r < rows; r++) {
        float* row = space.chances + r * width;
        soften(row, i + r + 1, scale);
        std::fill(row + i + r + 1, row + seen, 0.0f);
      }
      float* into = space.normed + i * of.D + h * d;
      multiply(rows, d, {seen, space.chances, width, v, ld, nullptr, into, of.D, false});
    }
  }
}

void gelu(float* values, int64_t count) {
  columns(count, [&](int64_t i, Some some) {
    const Floats value = load(values + i, some);
    store(values + i, some, value * Normal(value, true).share);
  });
}

// A block over the history in `hidden`; of its results only those from `first` on are wanted.
void apply(const Model& of, const Block& block, const Workspace& space, int64_t L, int64_t first) {
  const int64_t D = of.D, wanted = L - first;
  float *hidden = space.hidden + first * D, *normed = space.normed + first * D, *wide = space.wide;
  for (int64_t i = 0; i < L; i++) {
    block.attention_norm(space.hidden + i * D, D, of.epsilon, space.normed + i * D);
  }
  const Layer &qkv = block.qkv, &out = block.out, &expand = block.expand, &contract = block.contract;
  multiply(wanted, D, {D, normed, D, qkv.weight, 3 * D, qkv.bias, wide + first * 3 * D, 3 * D, false});
  multiply(L, 2 * D, {D, space.normed, D, qkv.weight + D, 3 * D, qkv.bias + D, wide + D, 3 * D, false});
  attend(of, space, L, first);
  multiply(wanted, D, {D, normed, D, out.weight, D, out.bias, hidden, D, true});
  for (int64_t i = 0; i < wanted; i++) block.feedforward_norm(hidden + i * D, D, of.epsilon, normed + i * D);
  multiply(wanted, of.F, {D, normed, D, expand.weight, of.F, expand.bias, wide, of.F, false});
  gelu(wide, wanted * of.F);
  multiply(wanted, D, {of.F, wide, of.F, contract.weight, D, contract.bias, hidden, D, true});
}

// What goes into the first block: the item, its position, and what `added` (L, D) says of the event.
void embed(const Model& of, const int64_t* items, int64_t L, const float* added, float* hidden) {
  const Floats scale = all(of.scale);
  for (int64_t i = 0; i < L; i++) {
    const float* item = of.items + items[i] * of.D;
    const float* position = of.positions + (of.from_newest ? L - 1 - i : i) * of.D;
    columns(of.D, [&](int64_t c, Some some) {
      Floats value = multiply_add(load(item + c, some), scale, load(position + c, some));
      if (added) value = value + load(added + i * of.D + c, some);
      store(hidden + i * of.D + c, some, value);
    });
  }
}

constexpr int64_t OF_BLOCK = 12, OF_NORM = 2;

const float* floats(const at::Tensor& tensor, int64_t numel) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == numel);
  return tensor.const_data_ptr<float>();
}

Model model(const Transformer& of) {
  const std::vector<at::Tensor>& weights = of.weights;
  const int64_t D = of.table.size(1), blocks = (static_cast<int64_t>(weights.size()) - OF_NORM) / OF_BLOCK;
  TORCH_CHECK(blocks > 0 && static_cast<int64_t>(weights.size()) == blocks * OF_BLOCK + OF_NORM && D % of.heads == 0);
  const int64_t F = weights[8].size(1);
  Model made{
      D, of.heads, F, static_cast<float>(of.epsilon), static_cast<float>(of.scale), of.from_newest,
      floats(of.table, of.table.size(0) * D), floats(of.positions, of.positions.size(0) * D), {}, {}};
  for (int64_t b = 0; b < blocks; b++) {
    const at::Tensor* part = weights.data() + b * OF_BLOCK;
    const auto norm = [&](int64_t at) { return Norm{floats(part[at], D), floats(part[at + 1], D)}; };
    const auto layer = [&](int64_t at, int64_t inputs, int64_t outputs) {
      return Layer{floats(part[at], inputs * outputs), floats(part[at + 1], outputs)};
    };
    made.blocks.push_back({norm(0), layer(2, D, 3 * D), layer(4, D, D), norm(6), layer(8, D, F), layer(10, F, D)});
  }
  made.norm = {floats(weights[weights.size() - 2], D), floats(weights.back(), D)};
  return made;
}

// A hidden state as it meets the items.
void question(const Transformer& of, int64_t D, float* hidden) {
  float factor = static_cast<float>(1 / of.temperature);
  if (of.normalize) {
    float squares = 0;
    for (int64_t i = 0; i < D; i++) squares += hidden[i] * hidden[i];
    factor /= std::max(std::sqrt(squares), 1e-12f);
  }
  if (factor == 1) return;
  for (int64_t i = 0; i < D; i++) hidden[i] *= factor;
}

}  // namespace

at::Tensor run(
    const Transformer& transformer, const at::Tensor& items, const at::Tensor& lengths,
    const std::optional<at::Tensor>& added) {
  const Model of = model(transformer);
  const int64_t B = lengths.numel(), T = items.numel();
  TORCH_CHECK(items.is_contiguous() && lengths.is_contiguous());
  const int64_t *item = items.const_data_ptr<int64_t>(), *length = lengths.const_data_ptr<int64_t>();
  const int64_t V = transformer.table.size(0), longest = transformer.positions.size(0);
  for (int64_t t = 0; t < T; t++) TORCH_CHECK_INDEX(item[t] >= 0 && item[t] < V, "no such item");
  std::vector<int64_t> begin{0};
  for (int64_t b = 0; b < B; b++) {
    TORCH_CHECK(length[b] > 0 && length[b] <= longest, "a history is empty or too long");
    begin.push_back(begin.back() + length[b]);
  }
  TORCH_CHECK(begin.back() == T);
  const float* more = added ? floats(*added, T * of.D) : nullptr;
  const at::Tensor hidden = at::empty({B, of.D}, transformer.table.options());
  float* into = hidden.mutable_data_ptr<float>();
  at::parallel_for(0, B, 1, [&](int64_t first, int64_t stop) {
    static thread_local Workspace space;
    for (int64_t b = first; b < stop; b++) {
      const int64_t L = length[b], newest = (L - 1) * of.D;
      space.fit(of, L);
      embed(of, item + begin[b], L, more ? more + begin[b] * of.D : nullptr, space.hidden);
      for (const Block& block : of.blocks) apply(of, block, space, L, &block == &of.blocks.back() ? L - 1 : 0);
      of.norm(space.hidden + newest, of.D, of.epsilon, into + b * of.D);
      question(transformer, of.D, into + b * of.D);
    }
  });
  return hidden;
}

namespace {

at::Tensor transformer(
    const at::Tensor& items, const at::Tensor& lengths, const std::optional<at::Tensor>& added, const at::Tensor& table,
    double scale, const at::Tensor& positions, bool from_newest, std::vector<at::Tensor> weights, int64_t heads,
    double epsilon, bool normalize, double temperature) {
  const Transformer of{
      table, scale, positions, from_newest, std::move(weights), heads, epsilon, normalize, temperature};
  return run(of, items, lengths, added);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def(
      "transformer(Tensor items, Tensor lengths, Tensor? added, Tensor table, float scale, Tensor positions, bool "
      "from_newest, Tensor[] weights, int heads, float epsilon, bool normalize, float temperature) -> Tensor",
      &transformer);
}

}  // namespace seqray
